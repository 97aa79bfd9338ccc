"""One decoder layer's own modules, computed on packed tokens [N, hidden]: all but attention itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.evaluation import kernels, products
from compressor.evaluation.kernels import Workspace
from compressor.evaluation.products import Means


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines [N, 1, D] of a pass, and whether attention applies them as it gathers its inputs."""

    cos: Tensor
    sin: Tensor
    in_attention: bool


@dataclass(frozen=True)
class Layer:
    """One decoder layer's modules, read from the model as it stands."""

    attention: Any
    mlp: Any
    input_norm: Callable[[Tensor], Tensor]
    mlp_norm: Callable[[Tensor], Tensor]
    head_dim: int
    scaling: float
    means: Means

    @classmethod
    def of(cls, layer: Any, means: Means) -> Layer:
        attention = layer.self_attn
        return cls(
            attention,
            layer.mlp,
            layer.input_layernorm,
            layer.post_attention_layernorm,
            attention.head_dim,
            attention.scaling,
            means,
        )

    def project(self, normed: Tensor, rotation: Rotation, memory: Workspace) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, D], scaled for attention, and keys and values [N, G, D]; rotated, unless that and
        the scaling are left to attention."""
        attention = self.attention
        modules = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
        query, key, value = (
            self._linear(module, normed, memory, None, name).view(len(normed), -1, self.head_dim)
            for name, module in modules.items()
        )
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        if rotation.in_attention:
            return query, key, value
        cos, sin = rotation.cos, rotation.sin
        return _rotate(query, cos * self.scaling, sin * self.scaling), _rotate(key, cos, sin), value

    def finish(self, hidden: Tensor, mixed: Tensor, memory: Workspace) -> Tensor:
        """The rest of the layer after attention: output projection, MLP and both residuals."""
        hidden = self._linear(self.attention.o_proj, mixed, memory, hidden, "between")
        normed = normed_states(self.mlp_norm, hidden, self.means.fused)
        gate, up, down = self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj
        silu = isinstance(self.mlp.act_fn, nn.SiLU | _silu_type())
        if silu and _fusible(normed, gate, up):
            inner = self._gated(normed, gate.weight, up.weight, memory)
        else:
            gates = _linear(gate, normed)
            inner = F.silu(gates, inplace=True) if silu else self.mlp.act_fn(gates)
            inner = inner.mul_(_linear(up, normed))
        return self._linear(down, inner, memory, hidden, None)

    def _linear(
        self, module: Any, inputs: Tensor, memory: Workspace, residual: Tensor | None, name: str | None
    ) -> Tensor:
        """A product, plus a residual, perhaps in the thread's memory of that name."""
        if self.means.tiled and _is_plain(module) and module.bias is None and products.suit(module.weight):
            size = len(inputs), len(module.weight)
            out = memory.take(name, *size, inputs) if name else inputs.new_empty(size)
            return products.product(inputs, module.weight, residual, out, memory)
        output = _linear(module, inputs)
        return output if residual is None else output.add_(residual)

    def _gated(self, normed: Tensor, gate: Tensor, up: Tensor, memory: Workspace) -> Tensor:
        """silu(gate) * up [N, width] in bf16 on a CPU, by our kernels or else by oneDNN's."""
        if not self.means.fused:
            fused = torch.ops.mkldnn._linear_pointwise
            activated = fused(normed, gate, None, "swish", [], "")
            output: Tensor = fused.binary(normed, activated, up, None, "mul")
            return output
        size = len(normed), len(gate)
        out = memory.take("gated", *size, normed)
        if self.means.tiled and products.suit(gate, up) and gate.stride() == up.stride():
            return products.gated_product(normed, gate, up, out, memory)
        gates, ups = (memory.take(name, *size, normed) for name in ("gate", "up"))
        torch.mm(normed, gate.t(), out=gates)
        torch.mm(normed, up.t(), out=ups)
        return kernels.gated(gates, ups, out)


def normed_states(norm: Any, states: Tensor, fused: bool) -> Tensor:
    """RMS norm (arXiv 1910.07467) of [N, hidden], its sums in fp32, by fewer passes than the module's own."""
    if states.device.type != "cpu" or not hasattr(norm, "variance_epsilon") or norm.weight.ndim != 1:
        output: Tensor = norm(states)
        return output
    if fused and norm.weight.dtype == states.dtype:
        return kernels.rms_norm(states, norm.weight, norm.variance_epsilon)
    full = states.float()
    square = torch.linalg.vector_norm(full, dim=-1, keepdim=True).square_()
    scale = square.div_(states.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    scaled = full * scale if full is states else full.mul_(scale)
    return scaled.to(states.dtype).mul_(norm.weight)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [N, heads, D] by cos and sin [N, 1, D] (RoFormer, arXiv 2104.09864)."""
    half = states.shape[-1] // 2
    rotated = states * cos
    rotated[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return rotated


def _linear(module: Any, inputs: Tensor) -> Tensor:
    if not _is_plain(module):
        output: Tensor = module(inputs)
        return output
    weight = module.weight  # a slice of a wider one: fp32 products read it in place, oneDNN's bf16 ones not
    return F.linear(inputs, weight if weight.dtype == torch.float32 else weight.contiguous(), module.bias)


def has_plain_products(layer: Any) -> bool:
    """Whether a layer's matrix products are no more than that, and change nothing when they are computed."""
    attention, mlp = layer.self_attn, layer.mlp
    modules = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return all(map(_is_plain, (*modules, mlp.gate_proj, mlp.up_proj, mlp.down_proj)))


def _is_plain(module: Any) -> bool:
    """Whether the module is a matrix product with its ``weight``: a Linear, or a slice of one."""
    if type(module) is nn.Linear:
        return True
    own = next(module.parameters(recurse=False), None)
    return own is None and [type(child) for child in module.children()] == [nn.Linear]


def _fusible(inputs: Tensor, *modules: Any) -> bool:
    """Whether oneDNN can fuse what follows the product, in bf16 on a CPU that computes it."""
    return (
        inputs.device.type == "cpu"
        and inputs.dtype == torch.bfloat16
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and all(_is_plain(module) and module.bias is None for module in modules)
    )


def _silu_type() -> type:
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])
