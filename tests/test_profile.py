"""Profiles: the files that ship load, and what is wrong in a user's file is named in one line."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.engines.memory import required_memory_bytes, served_memory
from compressor.errors import InputError
from compressor.pipeline.plan import profile_space
from compressor.profile import (
    Profile,
    load_profile,
    load_profiles,
    parse_profile,
    profile_names,
    profile_text,
)
from compressor.space import ModelShape, SearchSpace, SubNetwork, weight_bytes

STARTER_SHAPE = ModelShape(576, 1536, 30, 9, 3, 64, 49152, tie_word_embeddings=True)

GOOD = """
name = "mine"
[device]
kind = "cpu"
memory_gib = 8
[budgets]
memory_gib = 1.5
ttft_ms = 100
tpot_ms = 10
[workload]
prompt_tokens = 128
output_tokens = 64
"""


def test_the_promised_profiles_ship() -> None:
    promised = {
        *("starter-cpu", "laptop-cpu", "xeon-cpu", "raspberry-pi-5", "jetson-orin-16g", "t4-16g"),
        *("l4-24g", "a10g-24g", "rtx-4090-24g", "a100-40g", "l40s-48g", "a100-80g", "h100-80g"),
        *("h200-141g", "b200-180g"),
    }
    assert promised <= set(profile_names())


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_profile_loads_and_is_documented(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.summary and profile.device.description and profile.device.source
    assert profile.engine == ("vllm" if profile.device.kind == "cuda" else "onnxruntime")
    assert 1.0 in profile.space.depth_fractions and 1.0 in profile.space.width_fractions
    assert profile_text(name).startswith("#"), "a copy should explain itself"


def test_gpu_profiles_name_their_bandwidth() -> None:
    known = {"t4-16g": 320, "a100-40g": 1555, "h100-80g": 3350, "jetson-orin-16g": 102.4}
    found = {p.name: p.device.memory_bandwidth_gb_s for p in load_profiles()}
    assert {name: found[name] for name in known} == known


MODELS = {
    "Llama-3.2-3B": ModelShape(3072, 8192, 28, 24, 8, 128, 128256, tie_word_embeddings=True),
    "LLaMA2-7B": ModelShape(4096, 11008, 32, 32, 32, 128, 32000),
    "LLaMA2-13B": ModelShape(5120, 13824, 40, 40, 40, 128, 32000),
    "CodeLlama-34B": ModelShape(8192, 22016, 48, 64, 8, 128, 32000),
}


@pytest.mark.parametrize("name", [p.name for p in load_profiles() if p.device.kind == "cuda"])
def test_a_gpus_budget_binds_for_the_model_that_its_file_names(name: str) -> None:
    profile, text = load_profile(name), " ".join(profile_text(name).replace("#", " ").split())
    (model,) = [model for model in MODELS if f"workload below: {model} for" in text]
    space = profile_space(MODELS[model], profile)
    whole, smallest = (
        served_memory(MODELS[model], subnet, profile) for subnet in (space.full, space.smallest)
    )
    assert smallest.total <= profile.budgets.memory_bytes < whole.total
    assert f"it takes {whole.total / 2**30:.1f} GiB" in text
    assert f"search space {smallest.total / 2**30:.1f}:" in text
    assert f"{model} for {profile.workload.concurrency} request" in text
    assert profile.device.matrix_tflops and profile.device.compute_capability


def test_numerics_that_the_card_has_no_kernels_for_are_refused_by_name() -> None:
    b200, a100 = (profile_text(name) for name in ("b200-180g", "a100-40g"))
    assert load_profile("b200-180g").numerics == "fp8"
    with pytest.raises(InputError, match=r"no INT8 kernels for compute capability 10\.0: set fp8"):
        parse_profile(b200.replace('numerics = "fp8"', 'numerics = "int8"'), "mine")
    with pytest.raises(InputError, match=r"8\.0 has no FP8 units"):
        parse_profile(a100.replace('numerics = "int8"', 'numerics = "fp8"'), "mine")
    with pytest.raises(InputError, match="vLLM's: set engine"):
        parse_profile(GOOD.replace('name = "mine"', 'name = "mine"\nnumerics = "fp8"'), "mine")
    for name in ("l4-24g", "rtx-4090-24g", "h100-80g"):
        text = profile_text(name).replace('numerics = "int8"', 'numerics = "fp8"')
        assert parse_profile(text, "mine").numerics == "fp8"


def test_the_starter_profile_binds_for_the_starter_model() -> None:
    profile = load_profile("starter-cpu")
    space = SearchSpace.from_fractions(
        STARTER_SHAPE, profile.space.depth_fractions, profile.space.width_fractions
    )

    def ratio_and_fit(subnet: SubNetwork) -> tuple[float, bool]:
        needed = required_memory_bytes(STARTER_SHAPE, subnet, profile.workload, "int8")
        smaller = full / weight_bytes(STARTER_SHAPE, subnet, "int8")
        return smaller, needed.total <= profile.budgets.memory_bytes

    full = weight_bytes(STARTER_SHAPE, space.full, "int8")
    rng = np.random.default_rng(0)
    uniform = [ratio_and_fit(subnet) for subnet in space.uniform_subnetworks()]
    sampled = [ratio_and_fit(space.sample(rng)) for _ in range(500)]
    assert not ratio_and_fit(space.full)[1], "the budget must ask for pruning"
    assert min(smaller for smaller, fits in uniform + sampled if fits) >= 1.25
    assert min(smaller for smaller, fits in sampled if fits) < 1.32, "a needlessly tight budget"
    assert np.mean([fits for _, fits in sampled]) > 0.4, "a search needs room"


def test_names_ignore_case() -> None:
    assert load_profile("A100-40G") == load_profile("a100-40g")


def test_a_file_is_a_profile_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD, encoding="utf-8")
    profile = load_profile(str(path))
    assert profile.budgets.memory_bytes == 1.5 * 2**30
    assert profile.workload.label == "128+64x1"


def test_a_cache_in_int8_is_another_thing_to_measure() -> None:
    workload = load_profile("starter-cpu").workload
    assert workload.kv_cache == "int8"
    assert (workload.label, workload.key) == ("128+64x1", "128+64x1/kv-int8")
    assert workload.model_copy(update={"kv_cache": "fp32"}).key == "128+64x1"


def test_vllm_keeps_its_cache_its_own_way(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = GOOD.replace("[workload]", '[workload]\nkv_cache = "int8"')
    path.write_text(text, encoding="utf-8")
    assert load_profile(str(path)).workload.kv_cache == "int8"
    path.write_text(text.replace("[device]", 'engine = "vllm"\n[device]', 1), encoding="utf-8")
    with pytest.raises(InputError, match=r"kv_cache is for ONNX Runtime.*leave it out"):
        load_profile(str(path))


def test_overrides_replace_single_budgets() -> None:
    profile = load_profile("laptop-cpu")
    changed = profile.with_overrides(tpot_ms=50.0, ttft_ms=None)
    assert changed.budgets.tpot_ms == 50
    assert changed.budgets.ttft_ms == profile.budgets.ttft_ms


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_budget_flag_that_is_no_budget(value: float) -> None:
    with pytest.raises(InputError, match=r"'laptop-cpu'.*budgets\.tpot_ms"):
        load_profile("laptop-cpu").with_overrides(tpot_ms=value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("ttft_ms = 100", "ttft_ms = -100", r"mine\.toml: budgets\.ttft_ms: .*greater than 0 \(got -100\)"),
        ("ttft_ms = 100\n", "", r"mine\.toml: budgets\.ttft_ms is missing"),
        ("ttft_ms = 100", 'ttft_ms = "100"', r"mine\.toml: budgets\.ttft_ms: .*valid number"),
        ("ttft_ms = 100", "ttft_ms = true", r"budgets\.ttft_ms"),
        ("ttft_ms = 100", "ttft_ms = 100\nttf_ms = 1", r"budgets\.ttf_ms is not a key.*did you mean ttft_ms"),
        ("[workload]", "color = 3\n[workload]", r"budgets\.color is not a key .*one of memory_gib"),
        ('kind = "cpu"', 'kind = "tpu"', r"device\.kind.*'cpu' or 'cuda'"),
        ("memory_gib = 1.5", "memory_gib = 9", r"budgets\.memory_gib \(9\) is more than the device has"),
        ('name = "mine"', 'name = "../mine"', r"mine\.toml: name"),
        ("prompt_tokens = 128", "prompt_tokens = 0", r"workload\.prompt_tokens"),
        ("[workload]", "[space]\nwidth_fractions = []\n[workload]", r"space\.width_fractions"),
        ("[workload]", "[space]\nwidth_fractions = [1.2]\n[workload]", r"space\.width_fractions\.0"),
        ("ttft_ms = 100", f"ttft_ms = 1{'0' * 400}", r"budgets\.ttft_ms"),
        ("[budgets]", "[budgets", r"mine\.toml is not valid TOML"),
    ],
)
def test_faults_are_named_with_file_and_field(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert old in GOOD
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=said) as caught:
        load_profile(str(path))
    assert "\n" not in str(caught.value).strip() or "TOML" in str(caught.value)


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(InputError, match="did you mean laptop-cpu"):
        load_profile("laptop")
    with pytest.raises(InputError, match=r"one of .*starter-cpu"):
        load_profile("zzz")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no profile file"):
        load_profile(str(tmp_path / "none.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        load_profile(str(tmp_path / "folder.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load_profile(str(tmp_path / "binary.toml"))


@given(st.text(max_size=200))
def test_any_text_is_a_profile_or_an_input_error(text: str) -> None:
    try:
        assert isinstance(parse_profile(text, "here"), Profile)
    except InputError as error:
        assert str(error).startswith("here")


_scalar = st.one_of(st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}))


@given(
    st.sampled_from(["name", "device.kind", "device.memory_gib", "budgets.memory_gib", "budgets.tpot_ms"]),
    _scalar,
)
def test_any_value_in_a_field_is_valid_or_named(field: str, value: object) -> None:
    data = tomllib.loads(GOOD)
    *tables, key = field.split(".")
    target = data
    for table in tables:
        target = target[table]
    target[key] = value
    try:
        profile = Profile.model_validate(data)
    except ValueError as error:
        assert key in str(error)
    else:
        assert profile.budgets.memory_gib > 0 and profile.budgets.tpot_ms > 0
        assert Profile.model_validate(profile.model_dump()) == profile


positive = st.floats(min_value=1e-3, max_value=1e6, allow_nan=False)


@given(budget=positive, ttft=positive, tpot=positive, prompt=st.integers(1, 10**6))
def test_what_is_written_is_read(budget: float, ttft: float, tpot: float, prompt: int) -> None:
    text = (
        f'name = "p"\n[device]\nkind = "cuda"\nmemory_gib = {budget!r}\n'
        f"[budgets]\nmemory_gib = {budget!r}\nttft_ms = {ttft!r}\ntpot_ms = {tpot!r}\n"
        f"[workload]\nprompt_tokens = {prompt}\noutput_tokens = 1\n"
    )
    profile = parse_profile(text, "here")
    assert (profile.budgets.memory_gib, profile.budgets.ttft_ms, profile.budgets.tpot_ms) == (
        budget,
        ttft,
        tpot,
    )
    assert profile.workload.prompt_tokens == prompt


@pytest.mark.parametrize(
    ("numerics", "bits", "layers", "outer"),
    [
        ("int8", "", (8,), (8,)),
        ("int4", "", (4,), (4,)),
        ("int8", "bits = [4, 8]", (4, 8), (4, 8)),
        ("int8", "bits = [4, 8]\nouter_bits = [8]", (4, 8), (8,)),
    ],
)
def test_bits_follow_the_numerics_unless_they_are_given(
    numerics: str, bits: str, layers: tuple[int, ...], outer: int
) -> None:
    text = f'numerics = "{numerics}"{GOOD}[space]\n{bits}'
    profile = parse_profile(text, "mine").with_overrides(tpot_ms=20)
    assert (profile.layer_bits, profile.outer_bits) == (layers, outer)
    assert Profile.model_validate(profile.model_dump(mode="json")) == profile


def test_int4_with_layers_of_eight_bits_is_refused() -> None:
    with pytest.raises(InputError, match=r"leave space\.bits out"):
        parse_profile(f'numerics = "int4"{GOOD}[space]\nbits = [4, 8]', "mine")
