"""LLaMA-like models whose layers have MLPs of different widths.

This file travels with such a model's weights, so it imports nothing but transformers (5, or 4.57). The
configuration's ``intermediate_sizes`` gives each layer's width; ``intermediate_size`` is the widest.
``per_layer_config`` says the same in transformers' own words, which its models do not read yet.
"""

# mypy: disable-error-code="misc"
import copy
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def resize_mlps(model: Any, config: Any) -> None:
    """Give each layer an MLP of its own width, of the layer's own class."""
    for layer, width in zip(model.model.layers, config.intermediate_sizes, strict=True):
        if width != config.intermediate_size:
            layer_config = copy.copy(config)
            layer_config.intermediate_size = width
            layer.mlp = type(layer.mlp)(layer_config)


class PerLayerWidths:
    """Mixed in before a configuration class: keeps transformers 5 from guarding ``intermediate_size``."""

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("per_layer_config", None)
        super().__post_init__(**kwargs)


class ElasticLlamaConfig(PerLayerWidths, LlamaConfig):
    model_type = "elastic_llama"
    intermediate_sizes: list[int] | None = None


class ElasticMistralConfig(PerLayerWidths, MistralConfig):
    model_type = "elastic_mistral"
    intermediate_sizes: list[int] | None = None


class ElasticQwen2Config(PerLayerWidths, Qwen2Config):
    model_type = "elastic_qwen2"
    intermediate_sizes: list[int] | None = None


class ElasticQwen3Config(PerLayerWidths, Qwen3Config):
    model_type = "elastic_qwen3"
    intermediate_sizes: list[int] | None = None


class ElasticLlamaForCausalLM(LlamaForCausalLM):
    config_class = ElasticLlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        resize_mlps(self, config)


class ElasticMistralForCausalLM(MistralForCausalLM):
    config_class = ElasticMistralConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        resize_mlps(self, config)


class ElasticQwen2ForCausalLM(Qwen2ForCausalLM):
    config_class = ElasticQwen2Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        resize_mlps(self, config)


class ElasticQwen3ForCausalLM(Qwen3ForCausalLM):
    config_class = ElasticQwen3Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        resize_mlps(self, config)
