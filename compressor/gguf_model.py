"""GGUF files: the shape, the tokenizer and the weights of the model inside one.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Heavy imports happen in the functions.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from compressor.errors import InputError
from compressor.space import ModelShape

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_CONTROL, _USER_DEFINED = 3, 4
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING = 8
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: Mapping[str, str | None] = {
    "smollm": None,
    "default": None,
    "gpt-2": None,
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "qwen2": _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
}
"""What the file's ``tokenizer.ggml.pre`` splits on before byte-level BPE; None: GPT-2's own pattern."""


OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_architecture(path: Path) -> str:
    """The file's ``general.architecture``, from its first bytes. Raises ``InputError``."""
    try:
        with path.open("rb") as stream:
            magic, _version, _tensors, count = struct.unpack("<4sIQQ", stream.read(24))
            if magic == b"GGUF":
                for _ in range(count):
                    key = _read_string(stream)
                    value = _read_scalar(stream)
                    if key == "general.architecture":
                        return str(value)
    except (struct.error, UnicodeDecodeError, KeyError):
        pass
    raise InputError(f"{path} is not a readable GGUF file: download it again or name another model")


def read_license(path: Path) -> str:
    return str(_fields(path).get("general.license", ""))


def read_shape(path: Path) -> ModelShape:
    """Dimensions from the metadata and the tensors' names; no weights are read."""
    reader = _reader(path)
    fields = _fields(path)
    arch = fields["general.architecture"]
    names = {tensor.name for tensor in reader.tensors}
    heads = int(fields[f"{arch}.attention.head_count"])
    hidden = int(fields[f"{arch}.embedding_length"])
    return ModelShape(
        hidden_size=hidden,
        intermediate_size=int(fields[f"{arch}.feed_forward_length"]),
        num_layers=int(fields[f"{arch}.block_count"]),
        num_heads=heads,
        num_kv_heads=int(fields.get(f"{arch}.attention.head_count_kv", heads)),
        head_dim=int(fields.get(f"{arch}.attention.key_length", hidden // heads)),
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        tie_word_embeddings="output.weight" not in names,
        qkv_bias="blk.0.attn_q.bias" in names,
        o_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_gate.bias" in names,
        qk_norm="blk.0.attn_q_norm.weight" in names,
        max_position_embeddings=int(fields[f"{arch}.context_length"]),
    )


def load_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights unpacked to ``dtype``, ready to be trained and saved.

    Ten times faster than transformers' way, which stays for files with scaled rotary embeddings.
    """
    import torch
    from transformers import AutoModelForCausalLM

    reader = _reader(path)
    fields = _fields(path)
    if any(".rope.scaling." in name for name in fields) or _has_tensor(reader, "rope_freqs.weight"):
        return _load_through_transformers(path, dtype)
    config = _config(path, fields)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device="cpu")
    _fill(model, reader, config, fields["general.architecture"] == "llama")
    return model


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The file's own tokenizer, rebuilt from its vocabulary and merges.

    transformers guesses a class from the architecture instead, which is wrong for byte-level BPE in a
    Llama. Vocabularies of another kind (SentencePiece) are left to it.
    """
    fields = _fields(path)
    if fields.get("tokenizer.ggml.model") != "gpt2":
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return tokenizer
    return _byte_level_tokenizer(path, fields)


def _load_through_transformers(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GgufConfig

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )
    return model


def _config(path: Path, fields: Mapping[str, Any]) -> Any:
    """transformers' configuration of the model in the file."""
    from transformers import AutoConfig

    arch = fields["general.architecture"]
    shape = read_shape(path)
    settings: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": float(f"{fields[f'{arch}.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(fields.get(f"{arch}.rope.freq_base", 10000.0)),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    if arch != "qwen2":
        settings["attention_bias"] = shape.o_bias
    if shape.mlp_bias:
        settings["mlp_bias"] = True
    return AutoConfig.for_model(arch, **settings)


def _fill(model: PreTrainedModel, reader: Any, config: Any, interleaved: bool) -> None:
    """Copy the file's tensors into the model. ``interleaved``: rotary halves lie pairwise in q and k."""
    import torch
    from gguf.quants import dequantize

    model.model.rotary_emb.__init__(config)  # its buffers are computed, not stored
    model.tie_weights()
    parameters = dict(model.named_parameters())
    for tensor in reader.tensors:
        parameter = parameters.pop(_parameter_name(tensor.name), None)
        if parameter is None:
            raise _unknown_tensor(tensor.name)
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if interleaved and ".attn_q." in tensor.name:
            values = _pairs_to_halves(values, config.num_attention_heads)
        elif interleaved and ".attn_k." in tensor.name:
            values = _pairs_to_halves(values, config.num_key_value_heads)
        with torch.no_grad():
            parameter.copy_(values)
    if parameters:
        raise InputError(f"the GGUF file lacks tensors ({next(iter(parameters))}): download it again")


def _pairs_to_halves(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of q and k (pairs of rotated elements side by side)."""
    return values.view(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def _parameter_name(tensor: str) -> str:
    """transformers' name of a GGUF tensor. Raises ``InputError`` on one that LLaMA-like models lack."""
    parts = tensor.split(".")
    try:
        if parts[0] != "blk":
            return f"{OUTER_NAMES[parts[0]]}.{parts[1]}"
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    except (KeyError, IndexError):
        raise _unknown_tensor(tensor) from None


def _unknown_tensor(name: str) -> InputError:
    return InputError(
        f"the GGUF file has a tensor '{name}' that LLaMA-like models lack: choose another model"
    )


def _has_tensor(reader: Any, name: str) -> bool:
    return any(tensor.name == name for tensor in reader.tensors)


def _byte_level_tokenizer(path: Path, fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", [])]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = _pre_tokenizer(path, str(fields.get("tokenizer.ggml.pre", "default")))
    backend.decoder = decoders.ByteLevel()
    kinds = fields.get("tokenizer.ggml.token_type", [])
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)
    if fields.get("tokenizer.ggml.add_bos_token"):
        _prepend_token(backend, tokens[fields["tokenizer.ggml.bos_token_id"]])
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {
        f"{role}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]]
        for role, name in roles.items()
        if f"tokenizer.ggml.{name}_token_id" in fields
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, add_prefix_space=False, **named
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def _pre_tokenizer(path: Path, name: str) -> Any:
    """tokenizers' pre-tokenizer for the name llama.cpp gives it. Raises ``InputError``."""
    from tokenizers import Regex, pre_tokenizers

    if name not in SPLITS:
        raise InputError(
            f"{path}: its tokenizer splits text the '{name}' way, which is unknown here; "
            f"use the Hugging Face folder of this model instead (known: {', '.join(sorted(SPLITS))})"
        )
    split = SPLITS[name]
    steps: list[Any] = []
    if name == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split is not None:
        steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    return pre_tokenizers.Sequence(steps)


def _prepend_token(backend: Any, token: str) -> None:
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token} $B",
        special_tokens=[(token, backend.token_to_id(token))],
    )


@lru_cache(maxsize=2)
def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(str(path))
    except (ValueError, IndexError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}): download it again or name another model") from None


@lru_cache(maxsize=2)
def _fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in _reader(path).fields.items()}


def _read_string(stream: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > 1 << 20:
        raise struct.error("implausible string length")
    return stream.read(length).decode("utf-8")


def _read_scalar(stream: BinaryIO) -> str | bytes:
    """The next value: decoded if a string, raw bytes if a number. Raises ``KeyError`` on an array."""
    (kind,) = struct.unpack("<I", stream.read(4))
    return _read_string(stream) if kind == _STRING else stream.read(_SCALAR_BYTES[kind])
