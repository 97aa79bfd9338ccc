"""The search space: one genotype an architecture, and sizes that are exact."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compressor.errors import InputError
from compressor.space import (
    ModelShape,
    SearchSpace,
    SubNetwork,
    flops_per_token,
    kv_cache_bytes,
    parameter_count,
    weight_bytes,
)

LLAMA2_7B = ModelShape(4096, 11008, 32, 32, 32, 128, 32000)
TINY = ModelShape(64, 128, 4, 4, 2, 16, 512, tie_word_embeddings=True)


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    """Spaces of up to 6 layers with any drop order, up to 3 depths and widths, one or two bits."""
    layers = draw(st.integers(1, 6))
    shape = ModelShape(64, 192, layers, 4, 2, 16, 100)
    depths = draw(st.sets(st.integers(1, layers), min_size=1, max_size=3))
    widths = draw(st.sets(st.sampled_from([32, 64, 96, 160, 192]), min_size=1, max_size=3))
    order = draw(st.permutations(range(layers)))
    bits = draw(st.sampled_from([(8,), (4,), (4, 8)]))
    return SearchSpace(shape, tuple(depths), tuple(widths), tuple(order), bits)


@st.composite
def spaces_and_genotypes(draw: st.DrawFn, count: int = 1) -> tuple[SearchSpace, list[tuple[int, ...]]]:
    space = draw(spaces())
    genotype = st.tuples(*(st.integers(0, n - 1) for n in space.choices))
    return space, [draw(genotype) for _ in range(count)]


@given(spaces_and_genotypes())
def test_canonical_form_is_reached_at_once_and_names_the_same_architecture(drawn):
    space, [genotype] = drawn
    canonical = space.canonical(genotype)
    assert space.canonical(canonical) == canonical
    assert space.decode(canonical) == space.decode(genotype)
    assert space.encode(space.decode(genotype)) == canonical


@given(spaces_and_genotypes(count=2))
def test_one_hash_an_architecture_and_one_architecture_a_hash(drawn):
    space, [left, right] = drawn
    same_genotype = space.canonical(left) == space.canonical(right)
    same_subnet = space.decode(left) == space.decode(right)
    same_hash = space.decode(left).digest == space.decode(right).digest
    assert same_genotype == same_subnet == same_hash


@given(spaces())
@settings(max_examples=30)
def test_distinct_count_is_what_enumeration_finds(space):
    assume(space.num_encodings <= 3000)
    genotypes = list(itertools.product(*(range(n) for n in space.choices)))
    assert len(genotypes) == space.num_encodings
    assert len({space.decode(g).digest for g in genotypes}) == space.num_distinct


def test_llama2_7b_has_the_papers_number_of_encodings():
    space = SearchSpace(LLAMA2_7B, (24, 28, 32), (5504, 11008))
    assert space.num_encodings == 3 * 2**32
    assert space.num_distinct == 2**24 + 2**28 + 2**32


def test_default_fractions_give_the_papers_space_for_llama2_7b():
    space = SearchSpace.from_fractions(LLAMA2_7B, [0.75, 0.875, 1.0], [0.5, 1.0])
    assert (space.depths, space.widths) == ((24, 28, 32), (5504, 11008))


def test_dropped_layers_are_the_first_of_the_drop_order():
    space = SearchSpace(TINY, (2, 4), (64, 128), drop_order=(1, 3, 0, 2))
    assert space.uniform(2, 64).layers == (0, 2)
    assert space.uniform(4, 64).layers == (0, 1, 2, 3)


@given(spaces_and_genotypes(count=2))
def test_sizes_are_linear_in_the_genes_of_kept_layers(drawn):
    """Changing one layer changes every size by the same amount, whatever the other layers are."""
    space, [left, right] = drawn
    depth_gene = left[0]
    right = (depth_gene, *right[1:])
    layer = space.decode(left).layers[0]
    gene = 1 + layer

    def change(genotype, size):
        low, high = (space.decode((*genotype[:gene], g, *genotype[gene + 1 :])) for g in (0, last))
        return size(high) - size(low)

    last = len(space.widths) - 1
    if len(space.bits) > 1:  # the bits of that layer decide what a neuron costs
        bit = 1 + space.shape.num_layers + layer
        right = (*right[:bit], left[bit], *right[bit + 1 :])
    for size in (
        lambda s: parameter_count(space.shape, s),
        lambda s: weight_bytes(space.shape, s, "int8"),
        lambda s: weight_bytes(space.shape, s, "bf16"),
        lambda s: flops_per_token(space.shape, s, 7),
    ):
        assert change(left, size) == change(right, size)


@given(spaces_and_genotypes())
def test_no_subnetwork_is_smaller_than_the_smallest_nor_larger_than_the_full(drawn):
    space, [genotype] = drawn
    sizes = [
        weight_bytes(space.shape, s, "int8") for s in (space.smallest, space.decode(genotype), space.full)
    ]
    assert sizes == sorted(sizes)


@given(spaces_and_genotypes())
def test_spaces_and_subnetworks_survive_json(drawn):
    space, [genotype] = drawn
    subnet = space.decode(genotype)
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    assert SubNetwork.from_dict(json.loads(json.dumps(subnet.to_dict()))) == subnet


SHAPES = {
    "llama": ("LlamaConfig", {}, {}),
    "llama, untied": ("LlamaConfig", {"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
    "llama, biases": (
        "LlamaConfig",
        {"attention_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    ),
    "qwen2": ("Qwen2Config", {}, {"qkv_bias": True}),
    "qwen3": ("Qwen3Config", {}, {"qk_norm": True}),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layers, width", [((0, 1, 2, 3), 128), ((0, 2), 64)])
def test_parameter_count_is_that_of_a_real_model(name, layers, width):
    import transformers

    config_class, config_changes, shape_changes = SHAPES[name]
    config = getattr(transformers, config_class)(
        **{
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": width,
            "num_hidden_layers": len(layers),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
        }
        | config_changes
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    shape = ModelShape(**(TINY.__dict__ | shape_changes))
    subnet = SubNetwork(layers, (width,) * len(layers))
    assert parameter_count(shape, subnet) == sum(p.numel() for p in model.parameters())


def test_parameter_count_is_that_of_an_extracted_subnetwork(tiny_model_folder):
    from transformers import AutoModelForCausalLM

    from compressor.supernet.extraction import extract

    subnet = SubNetwork((0, 2, 3), (64, 128, 96))
    extracted = extract(AutoModelForCausalLM.from_pretrained(tiny_model_folder), subnet)
    assert parameter_count(TINY, subnet) == sum(p.numel() for p in extracted.parameters())


def test_quantized_bytes_count_blocks_scales_and_what_stays_in_floating_point():
    """One layer by hand: blocks of 64 weights in 8 bits, of 32 in 4, each with an fp16 scale; norms in
    fp32, tied embedding once."""
    shape = ModelShape(128, 64, 1, 4, 2, 32, 10, tie_word_embeddings=True)
    subnet = SubNetwork((0,), (64,))
    blocks = (128 + 64 + 64 + 128) * 2 + (64 + 64) * 2 + 128 * 1  # q, k, v, o; gate, up; down
    floats = 4 * (2 * 128 + 128)
    assert weight_bytes(shape, subnet, "int8") == blocks * 66 + 10 * 2 * 66 + floats
    four = SubNetwork((0,), (64,), (4,))
    two = 2 * 18 + 1  # blocks of 32 weights of 4 bits, and the zero points of both in a byte
    assert weight_bytes(shape, four, "int8") == blocks * two + 10 * 2 * 66 + floats
    assert weight_bytes(shape, subnet, "int4") == (blocks + 10 * 2) * two + floats
    assert (
        weight_bytes(shape, SubNetwork((0,), (64,), (8,), (4, 4)), "int8") == blocks * 66 + 20 * two + floats
    )


def test_quantized_bytes_round_an_incomplete_block_up():
    shape = ModelShape(128, 80, 1, 4, 2, 32, 10)
    whole = weight_bytes(shape, SubNetwork((0,), (80,)), "int8")
    less = weight_bytes(shape, SubNetwork((0,), (73,)), "int8")
    assert whole - less == 7 * 2 * 2 * 66  # seven rows of gate and up; down has two blocks a row in both


def test_kv_cache_counts_keys_and_values_of_kept_layers():
    subnet = SubNetwork((0, 2), (128, 128))
    assert kv_cache_bytes(TINY, subnet, tokens=10, sequences=3) == 2 * 2 * 32 * 10 * 3 * 4


def test_sampling_depends_on_the_generator_alone():
    space = SearchSpace(TINY, (2, 3, 4), (64, 128))
    draws = [[space.sample(np.random.default_rng(5)) for _ in range(3)] for _ in range(2)]
    assert draws[0] == draws[1]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"depths": (0, 4)}, "depths"),
        ({"depths": (5,)}, "4 layers"),
        ({"depths": ()}, "no depths"),
        ({"widths": (256,)}, "128"),
        ({"bits": (3,)}, "bits"),
    ],
)
def test_a_space_that_does_not_fit_the_model_says_what_would(changes, words):
    with pytest.raises(InputError, match=words):
        SearchSpace(**({"shape": TINY, "depths": (4,), "widths": (128,)} | changes))


@pytest.mark.parametrize("genotype", [(0,), (9, 0, 0, 0, 0), (0, 0, 0, 0, -1)])
def test_a_genotype_of_another_space_is_refused(genotype):
    with pytest.raises(ValueError, match="not a genotype"):
        SearchSpace(TINY, (4,), (64, 128)).decode(genotype)


def test_a_subnetwork_of_another_space_is_not_contained():
    space = SearchSpace(TINY, (2, 4), (64, 128), drop_order=(1, 3, 0, 2))
    assert space.contains(SubNetwork((0, 2), (64, 128)))
    assert not space.contains(SubNetwork((0, 1), (64, 128)))
    assert not space.contains(SubNetwork((0, 2), (64, 96)))
    assert not space.contains(SubNetwork((0, 2), (64, 128), (8, 4)))
