"""The search space: genotypes, the sub-networks they name, and their exact sizes.

Nothing here needs torch. Sizes are computed from the shape of the model, never predicted.
Source of the space: LLaMA-NAS (Sarah et al., arXiv 2405.18377), section 3.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from compressor.errors import InputError

Numerics = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]
Genotype = tuple[int, ...]

QUANT_BLOCK: Mapping[int, int] = {8: 64, 4: 32}
"""Weights that share one scale along the input dimension, by their bits, in block-quantized formats."""
SCALE_BYTES = 2
"""A block's scale is stored in fp16."""
ZERO_POINTS = frozenset({4})
"""Bits whose blocks have a zero point of as many bits each; the others lie evenly around 0."""
WIDTH_MULTIPLE = max(QUANT_BLOCK.values())

BYTES_PER_ELEMENT: Mapping[str, float] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "int4": 0.5}
BITS_NUMERICS: Mapping[int, Numerics] = {8: "int8", 4: "int4"}
OUTER_8 = (8, 8)


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a LLaMA-like decoder, enough to count its parameters exactly.

    ``qkv_bias``, ``o_bias``, ``mlp_bias`` and ``qk_norm`` cover Qwen2, Llama with biases and Qwen3.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 2048

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def attention_matrices(self) -> tuple[tuple[int, int], ...]:
        """(out features, in features) of the q, k, v and o projections."""
        return (
            (self.q_size, self.hidden_size),
            (self.kv_size, self.hidden_size),
            (self.kv_size, self.hidden_size),
            (self.hidden_size, self.q_size),
        )

    def mlp_matrices(self, width: int) -> tuple[tuple[int, int], ...]:
        """(out features, in features) of the gate, up and down projections."""
        return ((width, self.hidden_size), (width, self.hidden_size), (self.hidden_size, width))

    def layer_vectors(self, width: int) -> int:
        """Elements of a layer's norms and biases: what stays in floating point."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        biases = (self.q_size + 2 * self.kv_size) * self.qkv_bias + self.hidden_size * self.o_bias
        return norms + biases + (2 * width + self.hidden_size) * self.mlp_bias


@dataclass(frozen=True)
class SubNetwork:
    """One architecture: the super-network's layers that it keeps, and each one's MLP width and bits.

    ``layers`` ascend; ``widths`` (neurons) and ``bits`` (of the layer's weights once quantized) are
    aligned with them. ``outer`` are the bits of the embeddings and of the head, the same where those are
    tied. Bits matter to quantized numerics only.
    """

    layers: tuple[int, ...]
    widths: tuple[int, ...]
    bits: tuple[int, ...] = ()
    outer: tuple[int, int] = OUTER_8

    def __post_init__(self) -> None:
        if not self.bits:
            object.__setattr__(self, "bits", (8,) * len(self.layers))
        if not (len(self.layers) == len(self.widths) == len(self.bits)):
            raise ValueError("layers, widths and bits differ in length")

    @property
    def embed_bits(self) -> int:
        return self.outer[0]

    @property
    def head_bits(self) -> int:
        return self.outer[1]

    @property
    def fewest_bits(self) -> int:
        """Of any of its matrices."""
        return min((*self.bits, *self.outer))

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def digest(self) -> str:
        """Hash of the architecture, the same whichever search space it was found in."""
        parts = [self.layers, self.widths, self.bits, *([self.outer] if self.outer != OUTER_8 else [])]
        text = json.dumps(parts, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, list[int]]:
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Sequence[int]]) -> SubNetwork:
        """What ``to_dict`` gave; 8 bits where an older one names none."""
        embed, head = data.get("outer") or OUTER_8
        return cls(tuple(data["layers"]), tuple(data["widths"]), tuple(data.get("bits", ())), (embed, head))


@dataclass(frozen=True)
class SearchSpace:
    """All sub-networks of a super-network that a search may choose from.

    A genotype is integers: an index into ``depths``, then for each layer of the super-network an
    index into ``widths`` and, only if ``bits`` offers a choice, after all widths one index a layer
    into ``bits``; last, only if ``outer_bits`` offers a choice, an index into those for the embeddings
    and, where it is not tied to them, another for the head. ``drop_order`` lists the layers in the
    order they are dropped, the least important first; a sub-network of depth d lacks the first
    ``num_layers - d`` of them.
    """

    shape: ModelShape
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    drop_order: tuple[int, ...] = ()
    bits: tuple[int, ...] = (8,)
    outer_bits: tuple[int, ...] = (8,)
    _kept: Mapping[int, tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        total = self.shape.num_layers
        if not self.drop_order:
            object.__setattr__(self, "drop_order", tuple(reversed(range(total))))
        for name in ("depths", "widths", "bits", "outer_bits"):
            values = tuple(sorted(set(getattr(self, name))))
            if not values:
                raise InputError(f"the search space has no {name}: name at least one")
            object.__setattr__(self, name, values)
        if not 1 <= self.depths[0] <= self.depths[-1] <= total:
            raise InputError(f"depths {self.depths} must lie between 1 and the model's {total} layers")
        if not 1 <= self.widths[0] <= self.widths[-1] <= self.shape.intermediate_size:
            raise InputError(
                f"widths {self.widths} must lie between 1 and the model's {self.shape.intermediate_size}"
            )
        for offered in (self.bits, self.outer_bits):
            if not set(offered) <= set(BITS_NUMERICS):
                raise InputError(f"bits {offered} must be of {sorted(BITS_NUMERICS)}")
        if sorted(self.drop_order) != list(range(total)):
            raise ValueError("drop_order must name every layer once")
        kept = {d: tuple(sorted(self.drop_order[total - d :])) for d in self.depths}
        object.__setattr__(self, "_kept", kept)

    @classmethod
    def from_fractions(
        cls,
        shape: ModelShape,
        depth_fractions: Sequence[float],
        width_fractions: Sequence[float],
        drop_order: tuple[int, ...] = (),
        bits: tuple[int, ...] = (8,),
        outer_bits: tuple[int, ...] = (8,),
        width_multiple: int = WIDTH_MULTIPLE,
    ) -> SearchSpace:
        """The space of a profile's fractions for this model; widths round to ``width_multiple``."""
        multiple = math.gcd(width_multiple, shape.intermediate_size)
        depths = tuple(max(1, round(f * shape.num_layers)) for f in depth_fractions)
        widths = tuple(
            max(multiple, round(f * shape.intermediate_size / multiple) * multiple) for f in width_fractions
        )
        return cls(shape, depths, widths, drop_order, bits, outer_bits)

    @property
    def choices(self) -> tuple[int, ...]:
        """Number of values of each gene."""
        layers = self.shape.num_layers
        bit_genes = (len(self.bits),) * layers if len(self.bits) > 1 else ()
        outer_genes = (len(self.outer_bits),) * self.outer_genes
        return (len(self.depths), *(len(self.widths),) * layers, *bit_genes, *outer_genes)

    @property
    def outer_genes(self) -> int:
        """How many genes the bits of embeddings and head take: one, two where they are not tied, or none."""
        if len(self.outer_bits) == 1:
            return 0
        return 1 if self.shape.tie_word_embeddings else 2

    @property
    def num_encodings(self) -> int:
        """Genotypes before canonicalisation (the paper's count: 3 · 2^32 for LLaMA2-7B)."""
        return math.prod(self.choices)

    @property
    def num_distinct(self) -> int:
        """Distinct sub-networks: genes of dropped layers do not count."""
        per_layer = len(self.widths) * len(self.bits)
        inside: int = sum(per_layer**depth for depth in self.depths)
        return inside * math.prod((len(self.outer_bits),) * self.outer_genes)

    def decode(self, genotype: Sequence[int]) -> SubNetwork:
        """The sub-network a genotype names. Raises ``ValueError`` on a gene out of range."""
        genes = [int(g) for g in genotype]
        if len(genes) != len(self.choices) or any(
            not 0 <= g < n for g, n in zip(genes, self.choices, strict=True)
        ):
            raise ValueError(f"not a genotype of this space: {genes}")
        layers = self._kept[self.depths[genes[0]]]
        total = self.shape.num_layers
        widths = tuple(self.widths[genes[1 + i]] for i in layers)
        outer = (self.outer_bits[0],) * 2
        if self.outer_genes:
            chosen = genes[-self.outer_genes :]
            outer = (self.outer_bits[chosen[0]], self.outer_bits[chosen[-1]])
        if len(self.bits) > 1:
            bits = tuple(self.bits[genes[1 + total + i]] for i in layers)
            return SubNetwork(layers, widths, bits, outer)
        return SubNetwork(layers, widths, self.bits * len(layers), outer)

    def encode(self, subnet: SubNetwork) -> Genotype:
        """The canonical genotype: genes of dropped layers take their largest value.

        Raises ``ValueError`` for a sub-network outside this space.
        """
        if subnet.depth not in self.depths or self._kept[subnet.depth] != subnet.layers:
            raise ValueError(f"a sub-network with layers {subnet.layers} is outside this space")
        width_genes = [len(self.widths) - 1] * self.shape.num_layers
        bit_genes = [len(self.bits) - 1] * self.shape.num_layers
        for layer, width, bits in zip(subnet.layers, subnet.widths, subnet.bits, strict=True):
            width_genes[layer] = self.widths.index(width)
            bit_genes[layer] = self.bits.index(bits)
        if self.shape.tie_word_embeddings and subnet.embed_bits != subnet.head_bits:
            raise ValueError(f"tied embeddings have the head's bits, not {subnet.outer}")
        outer_genes = [self.outer_bits.index(bits) for bits in subnet.outer]
        tail = bit_genes if len(self.bits) > 1 else []
        return (self.depths.index(subnet.depth), *width_genes, *tail, *outer_genes[: self.outer_genes])

    def canonical(self, genotype: Sequence[int]) -> Genotype:
        """The one genotype that stands for this genotype's architecture."""
        return self.encode(self.decode(genotype))

    def contains(self, subnet: SubNetwork) -> bool:
        try:
            self.encode(subnet)
        except ValueError:
            return False
        return True

    @property
    def full(self) -> SubNetwork:
        """The super-network itself: every layer, every neuron, at the most bits."""
        layers = tuple(range(self.shape.num_layers))
        return SubNetwork(
            layers,
            (self.shape.intermediate_size,) * len(layers),
            (self.bits[-1],) * len(layers),
            (self.outer_bits[-1],) * 2,
        )

    @property
    def free(self) -> tuple[SubNetwork, ...]:
        """What needs neither tuning nor search: the whole model in each number of bits for layers and, no
        fewer, for embeddings and head; the largest first."""
        layers = tuple(range(self.shape.num_layers))
        widths = (self.shape.intermediate_size,) * len(layers)
        return tuple(
            SubNetwork(layers, widths, (bits,) * len(layers), (outer, outer))
            for bits in reversed(self.bits)
            for outer in reversed(self.outer_bits)
            if outer >= bits or len(self.outer_bits) == 1
        )

    @property
    def largest(self) -> SubNetwork:
        return self.uniform(self.depths[-1], self.widths[-1], self.bits[-1], self.outer_bits[-1])

    @property
    def smallest(self) -> SubNetwork:
        return self.uniform(self.depths[0], self.widths[0], self.bits[0], self.outer_bits[0])

    def uniform(self, depth: int, width: int, bits: int = 8, outer: int = 8) -> SubNetwork:
        """The sub-network with one width, and one number of bits in its layers and one around them."""
        layers = self._kept[depth]
        return SubNetwork(layers, (width,) * depth, (bits,) * depth, (outer, outer))

    def uniform_subnetworks(self) -> Iterator[SubNetwork]:
        for choice in itertools.product(self.depths, self.widths, self.bits, self.outer_bits):
            yield self.uniform(*choice)

    def sample(self, rng: np.random.Generator) -> SubNetwork:
        """A sub-network drawn uniformly in genes."""
        return self.decode([int(rng.integers(n)) for n in self.choices])

    def to_dict(self) -> dict[str, Any]:
        return {
            "shape": asdict(self.shape),
            "depths": list(self.depths),
            "widths": list(self.widths),
            "drop_order": list(self.drop_order),
            "bits": list(self.bits),
            "outer_bits": list(self.outer_bits),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchSpace:
        return cls(
            ModelShape(**data["shape"]),
            tuple(data["depths"]),
            tuple(data["widths"]),
            tuple(data["drop_order"]),
            tuple(data["bits"]),
            tuple(data.get("outer_bits", (8,))),
        )


def parameter_count(shape: ModelShape, subnet: SubNetwork) -> int:
    """Exact number of parameters of the extracted sub-network; tied embeddings count once."""
    attention = sum(n * k for n, k in shape.attention_matrices())
    layers = sum(
        attention + sum(n * k for n, k in shape.mlp_matrices(width)) + shape.layer_vectors(width)
        for width in subnet.widths
    )
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    return layers + embeddings + shape.hidden_size


def weight_bytes(shape: ModelShape, subnet: SubNetwork, numerics: Numerics) -> int:
    """Exact bytes of the weights in the given numerics.

    ``int8`` and ``int4`` are block-quantized: blocks of ``QUANT_BLOCK`` inputs, one fp16 scale a block
    and, for ``ZERO_POINTS`` bits, a zero point; norms and biases in fp32. Under ``int8`` each layer has
    its own ``subnet.bits`` and embeddings and head ``subnet.outer``; under ``int4`` all have 4. Tied
    embeddings are stored once.
    """
    if numerics not in ("int8", "int4"):
        return int(parameter_count(shape, subnet) * BYTES_PER_ELEMENT[numerics])
    served = in_numerics(subnet, numerics)
    total = 4 * shape.hidden_size
    for bits in served.outer[: 1 if shape.tie_word_embeddings else 2]:
        total += _quantized_bytes(shape.vocab_size, shape.hidden_size, bits)
    for (width, bits), layers in Counter(zip(served.widths, served.bits, strict=True)).items():
        matrices = (*shape.attention_matrices(), *shape.mlp_matrices(width))
        quantized = sum(_quantized_bytes(n, k, bits) for n, k in matrices)
        total += layers * (quantized + 4 * shape.layer_vectors(width))
    return total


def in_numerics(subnet: SubNetwork, numerics: Numerics) -> SubNetwork:
    """The sub-network with the bits that it is served in: 4 everywhere under ``int4``, else its own."""
    if numerics != "int4":
        return subnet
    return replace(subnet, bits=(4,) * subnet.depth, outer=(4, 4))


def kv_cache_bytes(
    shape: ModelShape, subnet: SubNetwork, tokens: int, sequences: int, element_bytes: int = 4
) -> int:
    """Bytes of the key-value cache for ``sequences`` sequences of ``tokens`` tokens each."""
    return 2 * subnet.depth * shape.kv_size * tokens * sequences * element_bytes


def flops_per_token(shape: ModelShape, subnet: SubNetwork, context: int = 0) -> int:
    """Floating-point operations of one token's forward pass, head included.

    Two for each weight of a matrix product, and the attention over ``context`` earlier tokens.
    """
    attention = sum(n * k for n, k in shape.attention_matrices())
    mlp = sum(3 * shape.hidden_size * width for width in subnet.widths)
    head = shape.vocab_size * shape.hidden_size
    scores = 2 * shape.q_size * context
    return 2 * (subnet.depth * (attention + scores) + mlp + head)


def _quantized_bytes(n: int, k: int, bits: int) -> int:
    block = QUANT_BLOCK[bits]
    blocks = -(-k // block)
    zero_points = -(-blocks * bits // 8) if bits in ZERO_POINTS else 0
    return n * (blocks * (block * bits // 8 + SCALE_BYTES) + zero_points)
