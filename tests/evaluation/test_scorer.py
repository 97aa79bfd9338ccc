"""The scorer gives what lm-eval's own model gives, for whole models and activated sub-networks."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from compressor.errors import InputError
from compressor.evaluation import forward, head, schedule
from compressor.evaluation.scorer import LogitsLM, PackedLM

SENTENCE = "the cat sat on a mat while four dogs ran over seven hills and nobody saw them go"
WORDS = SENTENCE.split(" ")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def requests() -> list[Instance]:
    return make_requests(12)


def make_requests(items: int, seed: int = 0) -> list[Instance]:
    """Items with shared shots, several choices of unequal length, and empty contexts among them."""
    rng = random.Random(seed)
    shots = "Question: " + " ".join(rng.choices(WORDS, k=60)) + "\n\n"
    made = []
    for item in range(items):
        question = " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
        context = ["", shots + question + "\nAnswer:", "Question: " + question][item % 3]
        for _ in range(rng.randint(2, 5)):
            choice = " " + " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
            made.append(instance(context, choice, item))
    return made


def instance(context: str, choice: str, item: int = 0) -> Instance:
    return Instance("loglikelihood", {}, (context, choice), 0, ("task", item, 1))


def by_hflm(model: PreTrainedModel, tokenizer: Any, requests: list[Instance]) -> list[tuple[float, bool]]:
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    results: list[tuple[float, bool]] = lm.loglikelihood(requests, disable_tqdm=True)
    return results


def values_of(pairs: list[tuple[float, bool]]) -> np.ndarray[Any, Any]:
    return np.array([value for value, _ in pairs])


def assert_same(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]], atol: float = 1e-4) -> None:
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], atol=atol)
    assert [g for _, g in ours] == [g for _, g in theirs]


def test_equals_lm_evals_own_model(model: PreTrainedModel, tokenizer: Any, requests: list[Instance]) -> None:
    assert_same(PackedLM(model, tokenizer).loglikelihood(requests), by_hflm(model, tokenizer, requests))


def test_greedy_continuations_are_recognised(model: PreTrainedModel, tokenizer: Any) -> None:
    context = "the cat sat on"
    ids = tokenizer(context, return_tensors="pt")["input_ids"]
    chosen = model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1:]
    requests = [instance(context, tokenizer.decode(chosen)), instance(context, " seven")]
    ours = PackedLM(model, tokenizer).loglikelihood(requests)
    assert_same(ours, by_hflm(model, tokenizer, requests))


COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
FAMILIES = {
    "untied": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=False)),
    "biases": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True)),
    "llama3 rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **COMMON,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=32)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scored_alike(family: str, tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    requests = make_requests(6, seed=1)
    assert_same(PackedLM(model, tokenizer).loglikelihood(requests), by_hflm(model, tokenizer, requests))


def test_an_activated_sub_network_is_scored_like_the_extracted_one(
    tiny_model_folder: Path, tokenizer: Any, requests: list[Instance]
) -> None:
    from compressor.space import SubNetwork
    from compressor.supernet.elastic import Elastic
    from compressor.supernet.extraction import extract

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    subnet = SubNetwork((0, 2, 3), (64, 128, 96))
    lm = PackedLM(model, tokenizer)
    whole = lm.loglikelihood(requests)
    extracted = extract(model, subnet)
    with Elastic(model).activated(subnet):
        ours = lm.loglikelihood(requests)
        assert_same(ours, by_hflm(model, tokenizer, requests))
    assert_same(ours, PackedLM(extracted.float(), tokenizer).loglikelihood(requests))
    assert ours != whole
    assert lm.loglikelihood(requests) == whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_fp32_than_lm_evals_own(
    dtype: torch.dtype, model: PreTrainedModel, tokenizer: Any, requests: list[Instance]
) -> None:
    exact = np.array([x for x, _ in PackedLM(model, tokenizer).loglikelihood(requests)])
    half = copy.deepcopy(model).to(dtype)
    ours = np.array([x for x, _ in PackedLM(half, tokenizer).loglikelihood(requests)])
    theirs = np.array([x for x, _ in by_hflm(half, tokenizer, requests)])
    assert abs(ours - exact).max() < 0.5
    assert abs(ours - exact).mean() <= 1.5 * abs(theirs - exact).mean()


def test_bitsandbytes_int8_is_scored_through_its_own_layers(
    tiny_model_folder: Path, tokenizer: Any, requests: list[Instance]
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantized = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder,
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
    ).eval()
    kind = type(quantized.model.layers[0].mlp.gate_proj).__name__
    assert kind == "Linear8bitLt"
    ours = np.array([x for x, _ in PackedLM(quantized, tokenizer).loglikelihood(requests)])
    theirs = np.array([x for x, _ in by_hflm(quantized, tokenizer, requests)])
    # Activations are rounded to INT8, so a last bit anywhere can move one by a whole step: lm-eval's own
    # model, with its embeddings moved by one part in ten million, says how far that carries.
    embeddings = quantized.get_input_embeddings().weight
    exact, carried = embeddings.data, []
    for seed in range(4):
        noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed))
        embeddings.data = exact * (1 + 1e-7 * noise)
        moved = np.array([x for x, _ in by_hflm(quantized, tokenizer, requests)])
        carried.append(abs(moved - theirs).mean())
    assert abs(ours - theirs).mean() <= 1.5 * max(carried)
    assert abs(ours - theirs).max() < 0.2


def test_long_contexts_lose_tokens_on_the_left_and_are_counted(
    model: PreTrainedModel, tokenizer: Any
) -> None:
    long = " ".join(WORDS * 60)
    requests = [instance(long, " seven hills"), instance(long, " a mat"), instance("the", " cat")]
    lm = PackedLM(model, tokenizer)
    assert lm.encoder.max_length == 512
    assert_same(lm.loglikelihood(requests), by_hflm(model, tokenizer, requests))
    assert lm.truncated == 2


def test_fused_attention_gives_the_same(
    model: PreTrainedModel, tokenizer: Any, requests: list[Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = PackedLM(model, tokenizer).loglikelihood(requests)
    monkeypatch.setattr(forward, "LONG_ATTENTION", 0)
    assert_same(PackedLM(model, tokenizer).loglikelihood(requests), plain)


def test_rolling_windows_equal_lm_evals(model: PreTrainedModel, tokenizer: Any) -> None:
    texts = [" ".join(WORDS * 30), "nobody saw them"]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0, ("task", 0, 1)) for text in texts]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=128)
    theirs = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    ours = PackedLM(model, tokenizer, max_length=128).loglikelihood_rolling(requests)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_an_engine_is_scored_through_its_logits(
    model: PreTrainedModel, tokenizer: Any, requests: list[Instance]
) -> None:
    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(ids)[None]).logits[0].numpy()

    ours = LogitsLM(logits, tokenizer, 512).loglikelihood(requests)
    assert_same(ours, by_hflm(model, tokenizer, requests))


def test_top_tokens_are_the_first_largest() -> None:
    logits = torch.randint(0, 9, (50, 512)).bfloat16()
    assert torch.equal(head.top_tokens(logits), logits.argmax(-1))
    assert torch.equal(head.top_tokens(logits[:, :500]), logits[:, :500].argmax(-1))


def test_an_empty_choice_is_named(model: PreTrainedModel, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="empty choice"):
        PackedLM(model, tokenizer).loglikelihood([instance("the cat", "")])


def test_another_kind_of_model_is_refused(tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(InputError, match="LLaMA-like"):
        PackedLM(gpt2, tokenizer, max_length=64).loglikelihood([instance("the cat", " sat")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_do_not_depend_on_how_many_passes_run_side_by_side(
    tiny_model_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setitem(schedule.BLOCK_BYTES, "cpu", 40 * dtype.itemsize)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=dtype).eval()
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        found.append(PackedLM(model, tokenizer).loglikelihood(make_requests(30)))
    torch.set_num_threads(before)
    assert_same(found[1], found[0], 1e-5 if dtype == torch.float32 else 0.05)
    assert_same(found[2], found[0], 1e-5 if dtype == torch.float32 else 0.05)
