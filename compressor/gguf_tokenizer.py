"""The tokenizer inside a GGUF file, rebuilt so that it gives llama.cpp's ids, and where its texts end.

A file says only part of what it means: the name in ``tokenizer.ggml.pre`` implies how text is split, whether
whole words go before merges and whether a text begins with BOS; names of tokens imply that a text ends
there. What is implied is what llama.cpp's ``src/llama-vocab.cpp`` does. transformers guesses a class from the
architecture instead, which is wrong for byte-level BPE in a Llama, and loses BOS in SentencePiece ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


@dataclass(frozen=True)
class Pre:
    """What a name in ``tokenizer.ggml.pre`` implies. ``splits`` are applied one after the other; none is
    GPT-2's own."""

    splits: tuple[str, ...] = ()
    single_digits: bool = False
    whole_words_first: bool = False
    begins_with_bos: bool = False
    composes: bool = False
    """Whether text is composed (NFC) first: llama.cpp leaves that out, the model's own tokenizer has it."""


_LLAMA3 = Pre((_LLAMA3_SPLIT,), whole_words_first=True, begins_with_bos=True)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
PRES: Mapping[str, Pre] = {
    "smollm": Pre(single_digits=True),
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Pre(),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": Pre((_QWEN2_SPLIT,), composes=True),
    "deepseek-r1-qwen": Pre((_QWEN2_SPLIT,)),
}
ENDS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
        *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
        *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
        *("<｜end▁of▁sentence｜>", "[e~["),
    }
)
"""Tokens at which llama.cpp ends a text whatever the file says, and which are control tokens by that."""
_FILE_ENDS: Mapping[str, frozenset[str]] = {
    "fim_pad": frozenset({"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"}),
    "fim_rep": frozenset({"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"}),
    "fim_sep": frozenset({"<|file_sep|>"}),
}
"""Between files of code a text ends too: by a key, else by one of these names."""

Fields = Mapping[str, Any]


def check_tokenizer(path: Path, fields: Fields) -> None:
    """Raise ``InputError`` for a tokenizer that cannot be rebuilt exactly."""
    kind = fields.get("tokenizer.ggml.model")
    tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
    folder = "use the Hugging Face folder of this model instead"
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{path}: its tokenizer is of the kind '{kind}', which is unknown here; {folder}")
    if len(set(tokens)) != len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise InputError(f"{path}: its tokenizer has the token {twice!r} twice; {folder}")
    name = str(fields.get("tokenizer.ggml.pre", "default"))
    if kind == "gpt2" and name not in PRES:
        raise InputError(
            f"{path}: its tokenizer splits text the '{name}' way, which is unknown here; {folder} "
            f"(known: {', '.join(sorted(PRES))})"
        )
    if kind == "gpt2" and "tokenizer.ggml.merges" not in fields:
        raise InputError(f"{path} lacks the key tokenizer.ggml.merges: convert the model again")
    if kind == "llama":
        if len(fields.get("tokenizer.ggml.scores", ())) != len(tokens):
            raise InputError(f"{path} lacks a score (tokenizer.ggml.scores) for some token: convert it again")
        missing = [name for name in (f"<0x{byte:02X}>" for byte in range(256)) if name not in set(tokens)]
        if missing:
            raise InputError(f"{path}: its tokenizer lacks the byte {missing[0]}; {folder}")
    for role in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        number = fields.get(f"tokenizer.ggml.{role}_token_id")
        if number is not None and not 0 <= int(number) < len(tokens) and role != "padding":
            raise InputError(f"{path}: its {role} token is {number}, of {len(tokens)}; {folder}")


def load_tokenizer(path: Path, fields: Fields) -> PreTrainedTokenizerFast:
    """The file's own tokenizer. Raises ``InputError`` where it cannot be rebuilt exactly."""
    from transformers import PreTrainedTokenizerFast

    check_tokenizer(path, fields)
    backend = _byte_level(fields) if fields["tokenizer.ggml.model"] == "gpt2" else _sentence_piece(fields)
    _add_special(backend, fields)
    _frame(backend, fields)
    tokens = fields["tokenizer.ggml.tokens"]
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {ours: _role(fields, theirs) for ours, theirs in roles.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
        **{name: tokens[number] for name, number in named.items() if number is not None},
    )
    tokenizer.chat_template = chat_templates(fields)
    return tokenizer


def ends(fields: Fields) -> list[int]:
    """Ids at which a text ends, the file's own EOS first, as llama.cpp has them."""
    tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
    found = [_role(fields, role) for role in ("eos", "eot", "eom")]
    for role, names in _FILE_ENDS.items():
        number = _role(fields, role)
        found.append(
            next((i for i, token in enumerate(tokens) if token in names), None) if number is None else number
        )
    named = [i for i, token in enumerate(tokens) if token in ENDS]
    present = {tokens[i] for i in named}
    if "<|end|>" in present and (
        {"<|return|>", "<|call|>"} <= present
        or ("<|flush|>" in present and present & {"<|call|>", "<|calls|>"})
    ):
        named = [i for i in named if tokens[i] != "<|end|>"]  # there it ends a message, not the turn
    if {"<|tool_response>", "</s>"} <= present:
        named = [i for i in named if tokens[i] != "</s>"]
    return list(dict.fromkeys(number for number in (*found, *named) if number is not None))


def chat_templates(fields: Fields) -> str | dict[str, str] | None:
    """The chat template, or all of them by name where there are several."""
    stem = "tokenizer.chat_template"
    named = {
        key.removeprefix(f"{stem}."): str(value)
        for key, value in fields.items()
        if key.startswith(f"{stem}.")
    }
    plain = fields.get(stem)
    if not named:
        return None if plain is None else str(plain)
    return {**({} if plain is None else {"default": str(plain)}), **named}


def _byte_level(fields: Fields) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = PRES[str(fields.get("tokenizer.ggml.pre", "default"))]
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [_pair(merge) for merge in fields["tokenizer.ggml.merges"]]
    known = [
        pair
        for pair in merges
        if pair[0] in vocabulary and pair[1] in vocabulary and "".join(pair) in vocabulary
    ]
    backend = Tokenizer(models.BPE(vocabulary, known, ignore_merges=pre.whole_words_first))
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in pre.splits]
    if pre.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pre.splits))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre.composes:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(merge: str) -> tuple[str, str]:
    """The two halves; the first may begin with a space of its own."""
    cut = merge.find(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _sentence_piece(fields: Fields) -> Any:
    """SentencePiece BPE: of two neighbours that make a token, those of the best score are joined first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    scores: Sequence[float] = fields["tokenizer.ggml.scores"]
    unknown = _role(fields, "unknown")
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            list(_merges(vocabulary, scores)),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    steps = [normalizers.Prepend("▁")] * prefixed + [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * prefixed)
    return backend


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Every way to put a token together from two others, the best tokens first."""
    for token in sorted(vocabulary, key=lambda token: (-scores[vocabulary[token]], vocabulary[token])):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        yield from sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))


def _add_special(backend: Any, fields: Fields) -> None:
    """Tokens that are found in a text before anything else is done with it."""
    from tokenizers import AddedToken

    tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
    kinds: Sequence[int] = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    control = ENDS.union(*_FILE_ENDS.values())
    added = [
        AddedToken(token, special=kind != _USER_DEFINED or token in control, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if token and (kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) or token in control)
    ]
    backend.add_tokens(added)


def _frame(backend: Any, fields: Fields) -> None:
    """What stands before and after every text: BOS and EOS, where the file says or its kind implies."""
    from tokenizers import processors

    tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
    implied = (
        fields["tokenizer.ggml.model"] == "llama"
        or PRES[str(fields.get("tokenizer.ggml.pre", "default"))].begins_with_bos
    )
    before = _role(fields, "bos") if fields.get("tokenizer.ggml.add_bos_token", implied) else None
    after = _role(fields, "eos") if fields.get("tokenizer.ggml.add_eos_token", False) else None
    if before is None and after is None:
        return
    head = [] if before is None else [tokens[before]]
    tail = [] if after is None else [tokens[after]]
    backend.post_processor = processors.TemplateProcessing(
        single=[*head, "$A", *tail],
        pair=[
            *head,
            "$A",
            *tail,
            *(f"{token}:1" for token in head),
            "$B:1",
            *(f"{token}:1" for token in tail),
        ],
        special_tokens=[(token, backend.token_to_id(token)) for token in {*head, *tail}],
    )


def _role(fields: Fields, role: str) -> int | None:
    """The id that plays a role: the file's, else the one that llama.cpp takes for SentencePiece."""
    tokens = len(fields["tokenizer.ggml.tokens"])
    implied = {"bos": 1, "eos": 2, "unknown": 0} if fields.get("tokenizer.ggml.model") == "llama" else {}
    number = fields.get(f"tokenizer.ggml.{role}_token_id", implied.get(role))
    return int(number) if number is not None and 0 <= int(number) < tokens else None
