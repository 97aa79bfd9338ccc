"""Made-up vocabularies of each kind that GGUF files have, the same on every machine, and text for them."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

CORPUS = (
    "The quick brown fox jumps over the lazy dog, and then it's gone. We're told they've seen 123456 foxes!\n"
    "def main(argv: list[str]) -> int:\n    for i in range(10):\n        print(f'{i:>4}')  # it's code\n"
    "café naïve Straße señor façade über ångström déjà vu. Привет мир, как дела? Ελληνικά γράμματα.\n"
    "日本語のテキストです。中文字符也在这里。한국어 문장도 있습니다. 😀😃🎉👩‍💻 ok\n"
    'SELECT name, count(*) FROM users WHERE age >= 21 GROUP BY name; <div class="x">&nbsp;</div>\n'
    "\t\ttabs\tand    spaces   here\r\n\r\n  The end of the text, the theory of the thing.\n"
)
_PHRASES = (
    *(
        "Hello  world",
        "  two leading spaces",
        "trailing spaces  ",
        "a\tb\n\n  c\r\n",
        " ",
        "",
        "\n\n\n",
        "      ",
    ),
    *(
        "12345 + 67 = 12412",
        "3.14159e-10",
        "v1.2.3-rc4",
        "x=1234567890",
        "٣٤٥ १२३ ½ Ⅷ",
        "1 22 333 4444 55555",
    ),
    *(
        "def f(x):\n    return x**2  # it's",
        "if (a<=b && c!=d) { e->f(); }",
        "</div><p>&amp;",
        "a_b.c::d#e@f",
    ),
    *(
        "café naïve Straße",
        "ÀÉÎÕÜ àéîõü",
        "Ça va? C'est déjà l'été!",
        "I'LL WE'VE it'S you'Re",
        "don't can't'll",
    ),
    *(
        "日本語テキスト",
        "中文字符也在这里",
        "한국어 문장",
        "Привет, мир!",
        "Ελληνικά",
        "العربية עברית",
        "ไทย हिन्दी",
    ),
    *(
        "😀😃🎉",
        "👩‍💻 👍🏽 🇯🇵",
        "a😀b 😀 c",
        "…—–“quotes”‘x’",
        "\u00a0nbsp\u2003em\u3000wide",
        "zero\u200bwidth",
    ),
    *(
        "<|im_start|>user\nhi<|im_end|>\n",
        "<s>[INST] hi [/INST]</s>",
        "<|eot_id|><|begin_of_text|>x",
        "<unk> y",
    ),
    *("The quick brown fox", "the theory of the thing", "▁under▁score", "URL: https://a.b/c?d=e&f=g#h"),
)


def lines(count: int = 200) -> list[str]:
    """Mixed text: every phrase alone, then pairs of them joined in every way."""
    joints = ("", " ", "\n", "  ", "\t", ", ")
    pairs = itertools.combinations(_PHRASES, 2)
    joined = (
        joints[i % len(joints)].join(pair) for i, pair in enumerate(itertools.islice(pairs, 0, None, 3))
    )
    return [*_PHRASES, *itertools.islice(joined, count - len(_PHRASES))]


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def byte_level(pre: str, special: Sequence[str], extra: Sequence[str] = (), **keys: Any) -> dict[str, Any]:
    """Metadata of a byte-level BPE. ``extra`` tokens are reached by no merge."""
    letters = byte_letters()
    words = ["".join(letters[b] for b in word.encode()) for word in _words(CORPUS)]
    merges = _train(tuple(words), 300)
    spelled = ["".join(letters[b] for b in word.encode()) for word in extra]
    plain = [*letters, *("".join(pair) for pair in merges), *spelled]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*plain, *special],
        "tokenizer.ggml.token_type": [1] * len(plain) + [3] * len(special),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        **{f"tokenizer.ggml.{name}": value for name, value in keys.items()},
    }


def sentence_piece(**keys: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece BPE with bytes to fall back on."""
    known = re.sub("[日本語中文字한국어]", "", CORPUS)  # the others are bytes
    words = ["▁" + word.replace(" ", "▁") for word in re.findall(r"[^\s]+| {2,}", known)]
    merges = _train((*words, "▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁") * 2, 300)
    joined = list(dict.fromkeys("".join(pair) for pair in merges))
    letters = sorted(set("".join(words)))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*special, *joined, *letters],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(joined) + len(letters))],
        "tokenizer.ggml.scores": [
            *([0.0] * len(special)),
            *(-float(rank) for rank in range(len(joined))),
            *(-float(len(joined) + i) for i in range(len(letters))),
        ],
        **{f"tokenizer.ggml.{name}": value for name, value in keys.items()},
    }


LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>")
CHATML_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|file_sep|>")


def _after(kind: dict[str, Any], name: str) -> int:
    return int(kind["tokenizer.ggml.tokens"].index(name))


def kinds() -> dict[str, dict[str, Any]]:
    """The metadata of each kind of tokenizer by name."""
    made = {
        "smollm": byte_level("smollm", CHATML_SPECIAL),
        "gpt-2": byte_level("gpt-2", CHATML_SPECIAL),
        "default": byte_level("default", CHATML_SPECIAL),
        "llama-bpe": byte_level("llama-bpe", LLAMA3_SPECIAL, extra=(" unreached", "zyzzyva")),
        "llama-bpe without BOS": byte_level("llama-bpe", LLAMA3_SPECIAL, add_bos_token=False),
        "qwen2": byte_level("qwen2", CHATML_SPECIAL),
        "deepseek-r1-qwen": byte_level("deepseek-r1-qwen", CHATML_SPECIAL, add_bos_token=True),
        "sentencepiece": sentence_piece(bos_token_id=1, eos_token_id=2, unknown_token_id=0),
        "sentencepiece of few keys": sentence_piece(),
        "sentencepiece without prefix": sentence_piece(add_space_prefix=False, add_bos_token=False),
        "sentencepiece with EOS": sentence_piece(add_eos_token=True),
    }
    for kind in made.values():
        tokens = kind["tokenizer.ggml.tokens"]
        if "<|begin_of_text|>" in tokens:
            kind["tokenizer.ggml.bos_token_id"] = _after(kind, "<|begin_of_text|>")
            kind["tokenizer.ggml.eos_token_id"] = _after(kind, "<|end_of_text|>")
        elif "<|im_end|>" in tokens:
            kind["tokenizer.ggml.bos_token_id"] = _after(kind, "<|endoftext|>")
            kind["tokenizer.ggml.eos_token_id"] = _after(kind, "<|im_end|>")
    return made


def _words(text: str) -> list[str]:
    return re.findall(r" ?[^\W\d_]+|\d| ?[^\w\s]+|\s+", text)


@cache
def _train(words: tuple[str, ...], count: int) -> list[tuple[str, str]]:
    """The merges of plain BPE training; ties go to the pair that sorts first."""
    counted = Counter(words)
    parts = {word: list(word) for word in counted}
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in counted.items():
            for pair in itertools.pairwise(parts[word]):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in counted:
            parts[word] = _merged(parts[word], best)
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out
