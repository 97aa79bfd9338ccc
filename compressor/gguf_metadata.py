"""What a GGUF file says of itself: opened once, every key used, known to be without effect, or refused.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Heavy imports happen in the functions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from compressor.errors import InputError

MAGIC = b"GGUF"
ARCHITECTURES = ("llama", "qwen2", "qwen3")

USED = frozenset(
    {
        *("block_count", "context_length", "embedding_length", "feed_forward_length"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
        *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scale_linear"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
        *("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    }
)
"""Keys of an architecture, without its name, that the shape and the configuration are made of."""
HARMLESS = frozenset({"rope.scaling.finetuned", "tensor_data_layout", "attention.layer_norm_epsilon"})
TOKENIZER_USED = frozenset(
    {
        *("model", "pre", "tokens", "token_type", "merges", "scores", "add_bos_token", "add_eos_token"),
        *("add_space_prefix", "bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id"),
        *("unknown_token_id", "padding_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id"),
    }
)
TOKENIZER_HARMLESS = frozenset(
    {
        *("seperator_token_id", "separator_token_id", "sep_token_id", "mask_token_id", "cls_token_id"),
        *("add_sep_token", "token_type_count", "prefix_token_id", "suffix_token_id", "middle_token_id"),
        *("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id"),
    }
)
"""Keys after ``tokenizer.ggml.``; roles that no text of a language model plays are harmless."""

Fields = Mapping[str, Any]


def is_gguf(path: Path) -> bool:
    """By the first bytes: Ollama's blobs have no ending."""
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def read_architecture(path: Path) -> str:
    """The file's ``general.architecture``, from its first bytes. Raises ``InputError``."""
    try:
        with path.open("rb") as stream:
            magic, _version, _tensors, count = struct.unpack("<4sIQQ", stream.read(24))
            if magic == MAGIC:
                for _ in range(count):
                    key = _read_string(stream)
                    value = _read_scalar(stream)
                    if key == "general.architecture":
                        return str(value)
    except (struct.error, UnicodeDecodeError, KeyError):
        pass
    raise InputError(f"{path} is not a readable GGUF file: download it again or name another model")


def open_reader(path: Path) -> Any:
    """gguf's reader of a file, kept while the file stays as it is."""
    return _open(path, *_state(path))


def read_fields(path: Path) -> dict[str, Any]:
    """Every key with its value. Raises ``InputError`` for a damaged file."""
    return _read(path, *_state(path))


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=2)
def _open(path: Path, _changed: int, _size: int) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(str(path))
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise InputError(f"{path} is damaged ({error}): download it again or name another model") from None


@lru_cache(maxsize=2)
def _read(path: Path, _changed: int, _size: int) -> dict[str, Any]:
    try:
        return {name: field.contents() for name, field in open_reader(path).fields.items()}
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}): download it again or name another model") from None


def check_fields(path: Path, fields: Fields) -> None:
    """Raise ``InputError`` for the first key that says something this program cannot follow."""
    if int(fields.get("split.count", 0)) > 1:
        raise InputError(
            f"{path} is one of the {fields['split.count']} parts of a model: put them together with "
            "llama.cpp's `llama-gguf-split --merge FIRST-PART OUT.gguf` and name that file"
        )
    if fields.get("general.type", "model") != "model":
        raise InputError(
            f"{path} holds no model of its own (general.type is '{fields['general.type']}'): merge it into "
            "its base model, or name a model"
        )
    for key in (*(f"{_architecture(fields)}.{name}" for name in _REQUIRED), "tokenizer.ggml.tokens"):
        if key not in fields:
            raise InputError(f"{path} lacks the key {key}: download it again or convert the model again")
    for name in fields:
        verdict, reason = judge(name, fields)
        if verdict == "refused":
            raise InputError(
                f"{path}: its key {name} {reason}: use the Hugging Face folder of this model, or another"
            )


def judge(name: str, fields: Fields) -> tuple[str, str]:
    """``used``, ``harmless`` or ``refused`` for a key of these fields, and why it is refused.

    Names outside the architecture's, the tokenizer's and ``general`` are notes that no loader reads.
    """
    arch = _architecture(fields)
    if name.startswith("tokenizer.ggml."):
        return _judge_tokenizer(name.removeprefix("tokenizer.ggml."), fields[name])
    if name.startswith("tokenizer.chat_template"):
        return "used", ""
    if name == "tokenizer.huggingface.json":
        return "harmless", ""
    if name.startswith("tokenizer."):
        return "refused", "is unknown here"
    if not name.startswith(f"{arch}."):
        return ("used" if name in ("general.architecture", "general.license") else "harmless"), ""
    key = name.removeprefix(f"{arch}.")
    if key in _CHECKED:
        wrong = _CHECKED[key](fields[name], fields, arch)
        return ("refused", wrong) if wrong else ("used", "")
    if key in USED:
        if isinstance(fields[name], list) and len(set(fields[name])) != 1:
            return "refused", "differs by layer, which Llama, Qwen2 and Qwen3 models don't"
        return "used", ""
    return ("harmless", "") if key in HARMLESS else ("refused", "is unknown here")


def number(fields: Fields, key: str, default: Any = None) -> Any:
    """A key of the file's architecture; arrays of one value stand for it."""
    value = fields.get(f"{_architecture(fields)}.{key}", default)
    return value[0] if isinstance(value, list) and value else value


def _judge_tokenizer(key: str, value: Any) -> tuple[str, str]:
    if key == "remove_extra_whitespaces":
        return ("refused", "removes spaces from texts, which is unknown here") if value else ("harmless", "")
    if key in TOKENIZER_USED:
        return "used", ""
    return ("harmless", "") if key in TOKENIZER_HARMLESS else ("refused", "is unknown here")


def _architecture(fields: Fields) -> str:
    return str(fields["general.architecture"])


def _head_dim(fields: Fields) -> int:
    plain = int(number(fields, "embedding_length")) // int(number(fields, "attention.head_count"))
    return int(number(fields, "attention.key_length", plain))


def _check_head_dim(value: Any, fields: Fields, arch: str) -> str:
    del arch
    return "" if int(value) == _head_dim(fields) else f"is {value}, its heads have {_head_dim(fields)}"


def _check_vocabulary(value: Any, fields: Fields, arch: str) -> str:
    del arch
    tokens = len(fields.get("tokenizer.ggml.tokens", ()))
    return "" if int(value) == tokens else f"is {value}, its tokenizer has {tokens} tokens"


def _check_window(value: Any, fields: Fields, arch: str) -> str:
    context = int(fields.get(f"{arch}.context_length", 0))
    none = not isinstance(value, list) and (not value or int(value) >= context)
    return "" if none else f"asks for attention over {value} tokens, which {arch} files don't have elsewhere"


def _check_scale(value: Any, fields: Fields, arch: str) -> str:
    del arch
    usual = _head_dim(fields) ** -0.5
    return "" if not value or abs(value / usual - 1) < 1e-5 else f"is {value}, not the usual {usual:.6g}"


def _check_zero(value: Any, fields: Fields, arch: str) -> str:
    del fields
    return f"is {value}: {arch} models here have none" if value else ""


def _check_true(value: Any, fields: Fields, arch: str) -> str:
    del fields
    return "" if value else f"is {value}: {arch} models here write text from left to right"


def _check_one(value: Any, fields: Fields, arch: str) -> str:
    del fields
    return "" if value in (0, 1) else f"is {value}: {arch} models here have no such factor"


_CHECKED: Mapping[str, Callable[[Any, Fields, str], str]] = {
    "attention.value_length": _check_head_dim,
    "rope.dimension_count": _check_head_dim,
    "vocab_size": _check_vocabulary,
    "attention.sliding_window": _check_window,
    "attention.scale": _check_scale,
    "attention.causal": _check_true,
    "attention.clamp_kqv": _check_zero,
    "attention.max_alibi_bias": _check_zero,
    "expert_count": _check_zero,
    "expert_used_count": _check_zero,
    "expert_shared_count": _check_zero,
    "pooling_type": _check_zero,
    "rope.scaling.alpha": _check_zero,
    "rope.scaling.yarn_log_multiplier": _check_zero,
    "rope.scaling.yarn_ext_factor": _check_one,
    "logit_scale": _check_one,
    "residual_scale": _check_one,
    "embedding_scale": _check_one,
}
"""Keys that must say what every model of these architectures does; what is wrong with them, or nothing."""
_REQUIRED = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon"),
)

_STRING = 8
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _read_string(stream: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > 1 << 20:
        raise struct.error("implausible string length")
    return stream.read(length).decode("utf-8")


def _read_scalar(stream: BinaryIO) -> str | bytes:
    """The next value: decoded if a string, raw bytes if a number. Raises ``KeyError`` on an array."""
    (kind,) = struct.unpack("<I", stream.read(4))
    return _read_string(stream) if kind == _STRING else stream.read(_SCALAR_BYTES[kind])
