"""vLLM's LLaMA-like models with an MLP width for each layer.

The configuration's ``intermediate_sizes`` gives the widths. Everything else is vLLM's own model, so
quantization, tensor and pipeline parallelism and compilation work as they do there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import maybe_prefix


class PerLayerWidths:
    """Mixed in before a model class of vLLM: gives each layer an MLP of its own width.

    All MLPs are first built at the narrowest width, so that building never holds more memory than the
    finished model has.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        config = vllm_config.model_config.hf_config
        widths = config.intermediate_sizes
        with _intermediate_size(config, min(widths)):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
        for index in range(self.model.start_layer, self.model.end_layer):
            if widths[index] != min(widths):
                layer = self.model.layers[index]
                name = maybe_prefix(prefix, f"model.layers.{index}.mlp")
                layer.mlp = _rebuilt(layer.mlp, widths[index], vllm_config, name)


class ElasticLlamaForCausalLM(PerLayerWidths, LlamaForCausalLM):
    pass


class ElasticMistralForCausalLM(PerLayerWidths, MistralForCausalLM):
    pass


class ElasticQwen2ForCausalLM(PerLayerWidths, Qwen2ForCausalLM):
    pass


class ElasticQwen3ForCausalLM(PerLayerWidths, Qwen3ForCausalLM):
    pass


@contextmanager
def _intermediate_size(config: Any, width: int) -> Iterator[None]:
    widest = config.intermediate_size
    config.intermediate_size = width
    try:
        yield
    finally:
        config.intermediate_size = widest


def _rebuilt(mlp: Any, width: int, vllm_config: VllmConfig, prefix: str) -> Any:
    """An MLP of the same class and settings in another width."""
    config = vllm_config.model_config.hf_config
    biased = {"bias": True} if getattr(config, "mlp_bias", False) else {}
    return type(mlp)(
        hidden_size=config.hidden_size,
        intermediate_size=width,
        hidden_act=config.hidden_act,
        quant_config=vllm_config.quant_config,
        prefix=prefix,
        **biased,
    )
