"""A sub-network's logits in fp32, straight from a super-network's files: one matrix in memory at a time.

With its weights as they are, or rounded to its bits as a package holds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import cpu_offload, init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compressor.engines.rounding import EMBED, HEAD, Rounding
from compressor.engines.source import Source
from compressor.engines.vllm_package import package_config, read_config
from compressor.engines.vllm_weights import plan_tensors
from compressor.space import SubNetwork


def streamed_logits(
    supernet: Path, subnet: SubNetwork, ids: npt.NDArray[np.int64], rounded: bool = False
) -> npt.NDArray[np.float32]:
    """Logits [tokens, vocabulary] along ids [tokens]. Raises ``InputError`` for a damaged super-network."""
    base = read_config(supernet)
    tied = bool(base.get("tie_word_embeddings"))
    source = RoundedSource(supernet, subnet) if rounded else Source(supernet)
    entries = {e.name: e.make for e in plan_tensors(source, subnet, "fp32", tied)}
    if tied:
        entries["lm_head.weight"] = entries["model.embed_tokens.weight"]
    model = _empty(package_config(base, subnet, "fp32"), subnet)
    cpu_offload(model, torch.device("cpu"), state_dict=_Made(entries))
    with torch.inference_mode():
        logits: npt.NDArray[np.float32] = model(torch.from_numpy(ids[None])).logits[0].numpy()
    return logits


class RoundedSource(Source):
    """A super-network's tensors, each matrix rounded to a sub-network's bits."""

    def __init__(self, folder: Path, subnet: SubNetwork) -> None:
        super().__init__(folder)
        self._rounding = Rounding.load(folder)
        tied = self.shape.tie_word_embeddings
        self._bits = {EMBED: subnet.head_bits if tied else subnet.embed_bits, HEAD: subnet.head_bits}
        self._layer_bits = dict(zip(subnet.layers, subnet.bits, strict=True))

    def read(self, name: str, kept: tuple[int, ...] | None = None) -> Tensor:
        bits = self._bits_of(name)
        if bits is None:
            return super().read(name, kept)
        rows, columns = kept or self.shape_of(name)
        whole = super().read(name)
        return self._rounding.values(name.removesuffix(".weight"), whole.float(), bits)[:rows, :columns]

    def _bits_of(self, name: str) -> int | None:
        """None for norms and biases, which are not rounded."""
        module, _, part = name.rpartition(".")
        if part != "weight" or len(self.shape_of(name)) < 2:
            return None
        if module in self._bits:
            return self._bits[module]
        return self._layer_bits[int(module.split(".")[2])]


def _empty(config: dict[str, Any], subnet: SubNetwork) -> PreTrainedModel:
    """The sub-network without weights."""
    settings = {name: value for name, value in config.items() if name not in ("architectures", "model_type")}
    with init_empty_weights(include_buffers=False):
        made = AutoConfig.for_model(config["model_type"], **settings)
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
        for layer, width in zip(model.model.layers, subnet.widths, strict=True):
            mlp = layer.mlp
            hidden, bias = mlp.gate_proj.in_features, mlp.gate_proj.bias is not None
            mlp.gate_proj = nn.Linear(hidden, width, bias)
            mlp.up_proj = nn.Linear(hidden, width, bias)
            mlp.down_proj = nn.Linear(width, hidden, bias)
    return model


class _Made(Mapping[str, Tensor]):
    """Tensors that are computed whenever they are asked for."""

    def __init__(self, makers: Mapping[str, Any]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._makers[name]()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)
