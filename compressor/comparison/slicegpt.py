"""SliceGPT: every layer's states turned to their principal axes, and the least of these cut off.

Source: Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns"
(arXiv 2401.15024). The scale of each norm goes into the matrices that read it; a norm without scale
commutes with any rotation, so states before each block may be rotated by the principal axes of what the
norm makes of them, and the rows and columns of the least important axes deleted. Residual paths between
blocks then need a matrix each. Layers are sliced in order, each calibrated on what the sliced ones before
it give.

The paper unties the embeddings from the head. Of a model whose embeddings are tied they stay tied here,
with one small matrix between the last states' axes and theirs: untied, a small model would be larger
than before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from compressor.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INTERVAL = 4
"""Widths are multiples of it. The authors take 8, in which a small model would miss its size by over 1%."""
DAMPING = 0.01
"""Share of the mean variance that is added to every axis."""


class ScaleFreeNorm(nn.Module):
    """RMS norm of states of which some axes are cut off; ``whole`` is how many there were. Then, where one is
    given, a matrix [width, width] to other axes."""

    def __init__(self, whole: int, epsilon: float, turn: Tensor | None = None) -> None:
        super().__init__()
        self.whole, self.epsilon = whole, epsilon
        self.turn = None if turn is None else nn.Parameter(turn)

    def forward(self, states: Tensor) -> Tensor:
        found = states.float()
        variance = found.square().sum(-1, keepdim=True) / self.whole
        normed = (found * torch.rsqrt(variance + self.epsilon)).to(states.dtype)
        return normed if self.turn is None else normed @ self.turn


class SlicedLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """A decoder layer whose residual paths change axes: matrices [width, width] on both."""

    def __init__(self, layer: Any, norm: ScaleFreeNorm) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        if hasattr(layer, "attention_type"):  # which of its masks a model with sliding windows gives a layer
            self.attention_type = layer.attention_type
        self.input_layernorm = self.post_attention_layernorm = norm
        self.attention_shortcut = nn.Parameter(torch.empty(0))
        self.mlp_shortcut = nn.Parameter(torch.empty(0))

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)
        hidden_states = hidden_states @ self.attention_shortcut + attended
        moved: Tensor = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states @ self.mlp_shortcut + moved


@torch.no_grad()
def slice_model(model: PreTrainedModel, batches: Sequence[Tensor], parameters: int) -> PreTrainedModel:
    """Slice in place until the model has at most ``parameters``; returns it.

    ``batches`` of token ids (batch, length) are what axes are found on. Raises ``InputError`` for a size that
    no width reaches.
    """
    width = sliced_width(model, parameters)
    with _plain_attention(model):
        return _Slicing(model, batches, width).run()


def sliced_width(model: PreTrainedModel, parameters: int) -> int:
    """The largest width of the states with which the sliced model has at most ``parameters``."""
    whole: int = model.config.hidden_size
    for width in range(whole - whole % INTERVAL, 0, -INTERVAL):
        if sliced_parameters(model, width) <= parameters:
            return width
    raise InputError(f"SliceGPT cannot reach {parameters / 1e6:.1f}M parameters")


def sliced_parameters(model: PreTrainedModel, width: int) -> int:
    """Parameters of the model with states of that width."""
    layers: Any = model.model.layers
    whole: int = model.config.hidden_size
    tied = model.config.tie_word_embeddings
    outer = model.config.vocab_size * width * (1 if tied else 2) + (width * width if tied else 0)
    inner = 0
    layer: Any
    for layer in layers:
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        fixed = sum(p.numel() for p in layer.parameters() if p.dim() == 1)
        fixed -= sum(norm.weight.numel() for norm in norms)
        matrices = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
        outputs = [layer.self_attn.o_proj.bias, layer.mlp.down_proj.bias]
        fixed -= sum(whole - width for bias in outputs if bias is not None)
        inner += matrices // whole * width + fixed + 2 * width * width
    total: int = outer + inner
    return total


class _Slicing:
    """The states of the calibration text on their way through the layers, each sliced as they leave it."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Tensor], width: int) -> None:
        self._model: Any = model
        self._ids = [ids.to(model.device) for ids in batches]
        self._width, self._whole = width, int(model.config.hidden_size)
        self._epsilon = float(model.config.rms_norm_eps)
        self._norm = ScaleFreeNorm(self._whole, self._epsilon)

    def run(self) -> PreTrainedModel:
        model = self._model
        table: Tensor = model.model.embed_tokens.weight
        head: Tensor = model.lm_head.weight
        whole = [table[ids] for ids in self._ids]
        axes = first = self._axes(whole)
        states = [each @ axes for each in whole]
        layers = []
        for layer in model.model.layers:
            sliced, states, axes = self._slice(layer, states, axes)
            layers.append(sliced)
        scale = model.model.norm.weight.to(head.dtype)
        turned = axes.t() * scale
        if model.config.tie_word_embeddings:
            model.model.norm = ScaleFreeNorm(self._whole, self._epsilon, turned @ first)
        else:
            model.model.norm = self._norm
            model.lm_head = _linear(head @ turned.t())
        model.model.layers = nn.ModuleList(layers)
        model.model.embed_tokens = _embedding(table @ first, model.model.embed_tokens.padding_idx)
        if model.config.tie_word_embeddings:
            model.lm_head = _linear(model.model.embed_tokens.weight)
            model.lm_head.weight = model.model.embed_tokens.weight
        sliced_model: PreTrainedModel = model
        return sliced_model

    def _slice(
        self, layer: Any, states: list[Tensor], axes: Tensor
    ) -> tuple[SlicedLayer, list[Tensor], Tensor]:
        """The layer for states on ``axes`` [hidden, width]; the states that leave it, and their axes."""
        attention, mlp = layer.self_attn, layer.mlp
        _read(attention, ("q_proj", "k_proj", "v_proj"), layer.input_layernorm.weight, axes)
        _read(mlp, ("gate_proj", "up_proj"), layer.post_attention_layernorm.weight, None)
        sliced = SlicedLayer(layer, self._norm)
        whole = [each @ axes.t() + self._attend(attention, each) for each in states]
        middle = self._axes(whole)
        _write(attention, "o_proj", middle)
        _read(mlp, ("gate_proj", "up_proj"), None, middle)
        sliced.attention_shortcut = nn.Parameter(axes.t() @ middle)
        states = [each @ middle for each in whole]
        whole = [each @ middle.t() + mlp(self._norm(each)) for each in states]
        after = self._axes(whole)
        _write(mlp, "down_proj", after)
        sliced.mlp_shortcut = nn.Parameter(middle.t() @ after)
        return sliced, [each @ after for each in whole], after

    def _attend(self, attention: Any, states: Tensor) -> Tensor:
        positions = torch.arange(states.shape[1], device=states.device)[None]
        rotary = self._model.model.rotary_emb(states, position_ids=positions)
        attended: Tensor = attention(
            hidden_states=self._norm(states), position_embeddings=rotary, attention_mask=None
        )[0]
        return attended

    def _axes(self, states: Sequence[Tensor]) -> Tensor:
        """The principal axes [hidden, width] of what the norm makes of states, the largest first."""
        total = torch.zeros(self._whole, self._whole, dtype=torch.float64, device=states[0].device)
        for each in states:
            normed = self._norm(each).flatten(0, -2).double()
            total += normed.t() @ normed
        total += DAMPING * total.diagonal().mean() * torch.eye(self._whole, device=total.device)
        vectors: Tensor = torch.linalg.eigh(total).eigenvectors
        return vectors.flip(-1)[:, : self._width].to(states[0].dtype)


def _read(block: Any, names: Sequence[str], scale: Tensor | None, axes: Tensor | None) -> None:
    """Let linears read states on ``axes``, with the norm's scale in their weights."""
    for name in names:
        linear: nn.Linear = getattr(block, name)
        weight = linear.weight if scale is None else linear.weight * scale.to(linear.weight.dtype)
        setattr(block, name, _linear(weight if axes is None else weight @ axes, linear.bias))


def _write(block: Any, name: str, axes: Tensor) -> None:
    """Let a linear write states on ``axes``."""
    linear: nn.Linear = getattr(block, name)
    bias = None if linear.bias is None else axes.t() @ linear.bias
    setattr(block, name, _linear(axes.t() @ linear.weight, bias))


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear


def _embedding(table: Tensor, padding: int | None) -> nn.Embedding:
    rows, columns = table.shape
    embedding = nn.Embedding(rows, columns, padding_idx=padding, device="meta", dtype=table.dtype)
    embedding.weight = nn.Parameter(table)
    return embedding


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention that is causal without being given a mask."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
