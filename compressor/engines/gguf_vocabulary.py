"""A Hugging Face tokenizer as GGUF metadata, so that llama.cpp encodes the same ids.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section "Tokenizer".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from compressor.errors import InputError
from compressor.gguf_tokenizer import PRES

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def vocabulary(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Metadata keys and values of the tokenizer in a Hugging Face folder, padded to ``vocab_size``.

    Raises ``InputError`` for a tokenizer that llama.cpp has no name for.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder} has no tokenizer.json, which a GGUF file is made from: convert it first")
    description = json.loads(path.read_text(encoding="utf-8"))
    if description["model"]["type"] != "BPE":
        raise InputError(f"{path} is no BPE but {description['model']['type']}: llama.cpp's Llamas have BPE")
    tokenizer = Tokenizer.from_file(str(path))
    tokens = _tokens(tokenizer, vocab_size)
    byte_level = _parts(description, "ByteLevel")
    kind = _byte_level(path, description) if byte_level else _sentence_piece(description, tokens)
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": _types(description, tokens),
        **kind,
        **_special(folder, tokenizer),
    }


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    ids = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    return [ids.get(number, f"[PAD{number}]") for number in range(vocab_size)]


def _types(description: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    known = description["model"]["vocab"]
    fallback = description["model"].get("byte_fallback")
    types = [_NORMAL if token in known else _UNUSED for token in tokens]
    for number, token in enumerate(tokens):
        if fallback and len(token) == 6 and token.startswith("<0x"):
            types[number] = _BYTE
    for entry in description["added_tokens"]:
        types[entry["id"]] = _CONTROL if entry["special"] else _USER_DEFINED
    unknown = description["model"].get("unk_token")
    if fallback and unknown in known:
        types[known[unknown]] = _UNKNOWN
    return types


def _byte_level(path: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    merges = [m if isinstance(m, str) else " ".join(m) for m in description["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(path, description),
        "tokenizer.ggml.merges": merges,
    }


def _pre_tokenizer(path: Path, description: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way text is split before BPE."""
    if _parts(description, "Digits"):
        return "smollm"
    splits = tuple(part["pattern"].get("Regex") for part in _parts(description, "Split"))
    words_first = bool(description["model"].get("ignore_merges"))
    for name in ("gpt-2", "llama-bpe", "qwen2", "default"):
        if (splits, words_first) == (PRES[name].splits, PRES[name].whole_words_first):
            return name
    raise InputError(
        f"{path} splits text in a way that has no name here: convert this model with llama.cpp's own script"
    )


def _parts(description: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """The tokenizer's pre-tokenizers of a kind."""
    whole = description.get("pre_tokenizer") or {}
    return [part for part in whole.get("pretokenizers", [whole]) if part.get("type") == kind]


def _sentence_piece(description: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """SentencePiece BPE: the earlier a token's merge, the higher its score."""
    merges = description["model"]["merges"]
    ranks = {"".join(m.split(" ") if isinstance(m, str) else m): rank for rank, m in enumerate(merges)}
    normalizer = json.dumps(description.get("normalizer")) + json.dumps(description.get("pre_tokenizer"))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [float(-ranks.get(token, len(ranks))) for token in tokens],
        "tokenizer.ggml.add_space_prefix": '"prepend_scheme": "never"' not in normalizer
        and ('"Prepend"' in normalizer or '"Metaspace"' in normalizer),
    }


def _special(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of special tokens, whether text starts with one, and the chat template."""
    settings = _read(folder / "tokenizer_config.json")
    generation = _read(folder / "config.json") | _read(folder / "generation_config.json")
    found: dict[str, Any] = {}
    for role, name in _ROLES.items():
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.token_to_id(token) if token else None
        if number is not None:
            found[f"tokenizer.ggml.{name}_token_id"] = number
    ends = generation.get("eos_token_id")
    if isinstance(ends, int):
        found["tokenizer.ggml.eos_token_id"] = ends
    elif ends:
        found |= {"tokenizer.ggml.eos_token_id": ends[0], "tokenizer.ggml.eot_token_id": ends[-1]}
    start = tokenizer.encode("").ids
    found["tokenizer.ggml.add_bos_token"] = bool(start) and start[0] == found.get(
        "tokenizer.ggml.bos_token_id"
    )
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if isinstance(text, str):
        found["tokenizer.chat_template"] = text
    return found


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
