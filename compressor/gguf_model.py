"""GGUF files: the shape and the weights of the model inside one.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. ``gguf_metadata`` reads the keys and
``gguf_tokenizer`` makes the tokenizer. Heavy imports happen in the functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor import gguf_tokenizer
from compressor.errors import InputError
from compressor.gguf_metadata import check_fields, number, open_reader, read_fields
from compressor.gguf_rope import FACTORS, rope_parameters
from compressor.space import ModelShape
from compressor.weight_files import expected_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

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


def check(path: Path) -> None:
    """Raise ``InputError`` for a file whose model, tokenizer or weights would not be understood exactly.

    Reads keys, the tensors' names and shapes, and a row of each number format.
    """
    try:
        _check(path)
    except (TypeError, ValueError, ZeroDivisionError, KeyError) as error:
        raise InputError(
            f"{path} has a key of another form than GGUF files have ({error}): convert the model again"
        ) from None


def _check(path: Path) -> None:
    fields = read_fields(path)
    check_fields(path, fields)
    gguf_tokenizer.check_tokenizer(path, fields)
    shape = read_shape(path)
    wanted = expected_tensors(shape)
    seen: set[str] = set()
    for tensor in open_reader(path).tensors:
        if tensor.name == FACTORS:
            continue
        name, dims = _parameter_name(tensor.name), tuple(int(n) for n in reversed(tensor.shape))
        if name not in wanted or name in seen:
            raise _unknown_tensor(tensor.name)
        if dims != wanted[name]:
            raise InputError(
                f"{path}: its tensor {tensor.name} has shape {list(dims)}, not {list(wanted[name])}: "
                "download it again or convert the model again"
            )
        seen.add(name)
    if missing := sorted(set(wanted) - seen):
        raise InputError(f"the GGUF file lacks tensors ({missing[0]}): download it again")
    rope_parameters(path, fields, shape)
    _check_formats(path)


def read_license(path: Path) -> str:
    return str(read_fields(path).get("general.license", ""))


def read_name(path: Path) -> str:
    """What the file calls its model, or nothing."""
    return str(read_fields(path).get("general.name", ""))


def read_shape(path: Path) -> ModelShape:
    """Dimensions from the metadata and the tensors' names; no weights are read."""
    fields = read_fields(path)
    names = {tensor.name for tensor in open_reader(path).tensors}
    heads = int(number(fields, "attention.head_count"))
    hidden = int(number(fields, "embedding_length"))
    return ModelShape(
        hidden_size=hidden,
        intermediate_size=int(number(fields, "feed_forward_length")),
        num_layers=int(number(fields, "block_count")),
        num_heads=heads,
        num_kv_heads=int(number(fields, "attention.head_count_kv", heads)),
        head_dim=int(number(fields, "attention.key_length", hidden // heads)),
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        tie_word_embeddings="output.weight" not in names,
        qkv_bias="blk.0.attn_q.bias" in names,
        o_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_gate.bias" in names,
        qk_norm="blk.0.attn_q_norm.weight" in names,
        max_position_embeddings=int(number(fields, "context_length")),
    )


def load_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights unpacked to ``dtype``, ready to be trained and saved.

    Ten times faster than transformers' way, which reads rotary scaling wrong besides.
    """
    import torch
    from transformers import AutoModelForCausalLM

    fields = read_fields(path)
    config = _config(path, fields)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device="cpu")
    _fill(model, open_reader(path), config, fields["general.architecture"] == "llama")
    ends = gguf_tokenizer.ends(fields)
    if ends:
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    return model


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The file's own tokenizer; see ``gguf_tokenizer``."""
    return gguf_tokenizer.load_tokenizer(path, read_fields(path))


def _config(path: Path, fields: Mapping[str, Any]) -> Any:
    """transformers' configuration of the model in the file."""
    from transformers import AutoConfig

    arch = fields["general.architecture"]
    shape = read_shape(path)
    padding = fields.get("tokenizer.ggml.padding_token_id")
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
        "rms_norm_eps": float(f"{number(fields, 'attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": rope_parameters(path, fields, shape),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": padding if padding is not None and padding < shape.vocab_size else None,
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
        if tensor.name == FACTORS:
            continue
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


def _check_formats(path: Path) -> None:
    from gguf.quants import dequantize

    formats = {tensor.tensor_type: tensor for tensor in open_reader(path).tensors}
    for kind, tensor in formats.items():
        try:
            dequantize(tensor.data[:1], kind)
        except NotImplementedError:
            raise InputError(
                f"{path} stores {tensor.name} as {kind.name}, which is not unpacked here: name a file in "
                "another format (Q8_0, Q4_K_M, BF16 ...)"
            ) from None


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
