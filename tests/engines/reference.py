"""PyTorch models that engine tests compare with: a sub-network cut out by hand, quantized the same way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.engines.quantize import quantize
from compressor.space import SubNetwork


def cut(folder: Path, subnet: SubNetwork) -> PreTrainedModel:
    """The sub-network of an unsorted super-network folder, in fp32."""
    return _cut(_load(folder), subnet)


def cut_quantized(folder: Path, subnet: SubNetwork) -> PreTrainedModel:
    """The sub-network with every matrix rounded to the nearest, as an export does, before it is cut."""
    model = _load(folder)
    for index, bits in zip(subnet.layers, subnet.bits, strict=True):
        for module in model.model.layers[index].modules():
            if isinstance(module, nn.Linear):
                _round(module.weight, bits)
    _round(model.model.embed_tokens.weight, subnet.embed_bits)
    if not model.config.tie_word_embeddings:
        _round(model.lm_head.weight, subnet.head_bits)
    return _cut(model, subnet)


def logits(model: PreTrainedModel, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(ids)).logits.numpy())


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _cut(model: PreTrainedModel, subnet: SubNetwork) -> PreTrainedModel:
    layers = [model.model.layers[i] for i in subnet.layers]
    for position, (layer, width) in enumerate(zip(layers, subnet.widths, strict=True)):
        layer.self_attn.layer_idx = position
        for name in ("gate_proj", "up_proj"):
            linear = getattr(layer.mlp, name)
            linear.weight = nn.Parameter(linear.weight[:width].detach())
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias[:width].detach())
        layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight[:, :width].detach())
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    return model


def _round(weight: nn.Parameter, bits: int) -> None:
    with torch.no_grad():
        weight.copy_(quantize(weight, bits).values(weight.shape[1]))
