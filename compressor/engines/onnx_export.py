"""Export a super-network once: every matrix quantized, tensor by tensor, into one shared file.

The graph is written by ``onnx_graph`` for each sub-network, so nothing here traces a model: peak
memory is one matrix, whatever the model's size, and a 135M model takes seconds.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, PretrainedConfig

from compressor.config_fields import uniform_window
from compressor.engines.onnx_store import (
    INDEX_FILE,
    SOURCE_FOLDER,
    UNQUANTIZED,
    WEIGHTS_FILE,
    Constants,
    Export,
    TensorFile,
    open_export,
)
from compressor.engines.quantize import Quantized
from compressor.engines.rounding import EMBED, Rounding, head_module, rounding_file
from compressor.engines.source import Source
from compressor.errors import InputError, PackageError
from compressor.events import Listener, StageProgress, ignore
from compressor.space import WIDTH_MULTIPLE

STAGE = "export"
SOURCE_SUFFIXES = (".json", ".jinja", ".txt", ".model")
NOT_SOURCE = ("model.safetensors.index.json", "supernet.json")


def export(
    source: Path, out: Path, bits: Sequence[int] = (8,), listener: Listener = ignore, replace: bool = False
) -> Export:
    """Quantize a Hugging Face folder into ``out``, and open the result.

    Matrices are rounded as ``Rounding`` keeps it beside the weights, to the nearest where it doesn't.

    A finished export of the same weights and bits is reused; one of others is an ``InputError``
    unless ``replace``. ``out`` is whole or absent.
    """
    wanted = tuple(sorted(set(bits)))
    weights_hash = _hash_of(source)
    if (out / INDEX_FILE).is_file() and not replace:
        present = open_export(out)
        if present.weights_hash == weights_hash and set(wanted) <= set(present.bits):
            return present
        raise InputError(f"{out} is an export of other weights or bits: delete it or choose another folder")
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(source, temporary, wanted, weights_hash, listener)
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    except OSError as error:
        raise PackageError(f"{out} could not be written ({error}): free disk space and try again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_export(out)


def _write(source: Path, out: Path, bits: tuple[int, ...], weights_hash: str, listener: Listener) -> None:
    weights, rounding = Source(source), Rounding.load(source)
    shape = weights.shape
    if shape.hidden_size % WIDTH_MULTIPLE:
        raise InputError(f"{source}: hidden size {shape.hidden_size} is no multiple of {WIDTH_MULTIPLE}")
    config = AutoConfig.from_pretrained(source)
    with TensorFile(out / WEIGHTS_FILE) as file:
        inverse_frequencies, rope_scale = _rope(config)
        file.add("inverse_frequencies", inverse_frequencies)
        file.add("norm", _float(weights.read("model.norm.weight")))
        for layer in range(shape.num_layers):
            _add_layer(file, weights, rounding, layer, bits)
            listener(StageProgress(STAGE, layer + 1, shape.num_layers + 1))
        tied = shape.tie_word_embeddings
        _add_matrix(file, "head", weights, rounding, [head_module(tied)], bits)
        if not tied:
            _add_matrix(file, "embed", weights, rounding, [EMBED], bits)
        listener(StageProgress(STAGE, shape.num_layers + 1, shape.num_layers + 1))
    _copy_source(source, out / SOURCE_FOLDER)
    Export(out, shape, _constants(config, rope_scale), file.table, bits, weights_hash).save()


def _add_layer(
    file: TensorFile, weights: Source, rounding: Rounding, layer: int, bits: tuple[int, ...]
) -> None:
    shape, source, target = weights.shape, f"model.layers.{layer}.", f"layers.{layer}."
    file.add(f"{target}input_norm", _float(weights.read(f"{source}input_layernorm.weight")))
    file.add(f"{target}post_norm", _float(weights.read(f"{source}post_attention_layernorm.weight")))
    if shape.qk_norm:
        for head in ("q", "k"):
            file.add(f"{target}{head}_norm", _float(weights.read(f"{source}self_attn.{head}_norm.weight")))
    attention = [f"{source}self_attn.{part}_proj" for part in ("q", "k", "v")]
    _add_matrix(file, f"{target}qkv", weights, rounding, attention, bits)
    if shape.qkv_bias:
        biases = [_float(weights.read(f"{name}.bias")) for name in attention]
        file.add(f"{target}qkv_bias", np.concatenate(biases))
    rest = {"o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    for name, module in rest.items():
        _add_matrix(file, f"{target}{name}", weights, rounding, [f"{source}{module}"], bits)
        if f"{source}{module}.bias" in weights:
            file.add(f"{target}{name}_bias", _float(weights.read(f"{source}{module}.bias")))


def _add_matrix(
    file: TensorFile,
    name: str,
    weights: Source,
    rounding: Rounding,
    modules: Sequence[str],
    bits: tuple[int, ...],
) -> None:
    """The matrices of ``modules``, which read the same inputs, one below the other."""
    parts = [weights.read(f"{module}.weight") for module in modules]
    for width in bits:
        if width == UNQUANTIZED:
            whole = torch.cat(parts).bfloat16().contiguous()
            file.add(f"{name}.{width}.weight", whole.view(torch.uint16).numpy())
            continue
        matrix = Quantized.stacked(
            [rounding.of(module, part, width) for module, part in zip(modules, parts, strict=True)]
        )
        file.add(f"{name}.{width}.weight", matrix.integers.numpy())
        file.add(f"{name}.{width}.scales", matrix.scales.numpy())
        if matrix.zeros is not None:
            file.add(f"{name}.{width}.zeros", matrix.zeros.numpy())


def _rope(config: PretrainedConfig) -> tuple[npt.NDArray[np.float32], float]:
    """Radians a position, fp32 [head_dim / 2], and the factor of cosines and sines."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = LlamaRotaryEmbedding(config)
    return _float(rope.inv_freq), float(rope.attention_scaling)


def _constants(config: PretrainedConfig, rope_scale: float) -> Constants:
    window = uniform_window(config.to_dict())
    return Constants(
        norm_epsilon=float(config.rms_norm_eps),
        context_length=int(config.max_position_embeddings),
        local_window=int(window) if window else -1,
        rope_scale=rope_scale,
    )


def _copy_source(source: Path, out: Path) -> None:
    out.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in SOURCE_SUFFIXES and path.name not in NOT_SOURCE:
            shutil.copyfile(path, out / path.name)


def _hash_of(source: Path) -> str:
    """Hash of the folder's config, weight bytes and how they are rounded."""
    digest = hashlib.sha256()
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise InputError(f"{source} holds no safetensors weights: give a Hugging Face folder")
    rounding = [path for path in (rounding_file(source),) if path.is_file()]
    for path in (source / "config.json", *shards, *rounding):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def _float(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    return np.asarray(tensor.float().numpy())
