"""Fixtures of the super-network's tests: small random models of every family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from compressor import models
from compressor.space import SearchSpace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"tie_word_embeddings": False, "head_dim": 16, "sliding_window": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
}


def make_model(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random fp32 model of one of ``FAMILIES`` in evaluation mode; biases are not zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, changes = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **(SIZES | changes))
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(params=FAMILIES)
def family_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture
def space(model: PreTrainedModel) -> SearchSpace:
    return SearchSpace(models.shape_of_config(model.config), (2, 3, 4), (16, 32, 64))


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids (3, 12)."""
    return torch.randint(97, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """Tiny models run faster on one thread, and the same everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tiny_model_folder: Path) -> models.LoadedModel:
    """The tiny model with its tokenizer, fp32. Treat it as read-only."""
    return models.load(models.resolve(str(tiny_model_folder)), torch.float32)
