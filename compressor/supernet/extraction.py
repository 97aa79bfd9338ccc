"""Sub-networks on their own: extracted from the super-network as ordinary Hugging Face models.

One width throughout gives a plain model of the same family; different widths need the modelling file
``modeling_elastic.py``, which is saved beside the weights.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import init_empty_weights
from torch import Tensor

from compressor.models import quiet_progress, save_tokenizer
from compressor.space import SubNetwork
from compressor.supernet import modeling_elastic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (modeling_elastic.ElasticLlamaConfig, modeling_elastic.ElasticLlamaForCausalLM),
    "mistral": (modeling_elastic.ElasticMistralConfig, modeling_elastic.ElasticMistralForCausalLM),
    "qwen2": (modeling_elastic.ElasticQwen2Config, modeling_elastic.ElasticQwen2ForCausalLM),
    "qwen3": (modeling_elastic.ElasticQwen3Config, modeling_elastic.ElasticQwen3ForCausalLM),
}


def extract(model: PreTrainedModel, subnet: SubNetwork) -> PreTrainedModel:
    """A standalone copy of one sub-network of ``model``, which must not have one activated.

    Raises ``ValueError`` if the sub-network does not fit the model.
    """
    if subnet.layers[-1] >= model.config.num_hidden_layers:
        raise ValueError("the model has fewer layers than the sub-network names: reset it first")
    config = _config(model.config, subnet)
    uniform = len(set(subnet.widths)) == 1
    cls = type(model) if uniform else _CLASSES[model.config.model_type][1]
    with init_empty_weights(include_buffers=False):
        extracted: PreTrainedModel = cls(config)
    extracted.load_state_dict(_sliced_state(model, subnet), assign=True, strict=False)
    extracted.tie_weights()
    extracted.generation_config = copy.deepcopy(model.generation_config)
    return extracted.eval()


def save_subnetwork(
    model: PreTrainedModel, subnet: SubNetwork, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Path:
    """Write a sub-network as a Hugging Face folder; returns the folder.

    ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` loads it (without that flag
    if the sub-network has one width).
    """
    extracted = extract(model, subnet)
    family = model.config.model_type
    if extracted.config.model_type != family:
        config_class, model_class = _CLASSES[family]
        config_class.register_for_auto_class()
        model_class.register_for_auto_class("AutoModelForCausalLM")
    with quiet_progress():
        extracted.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
    return folder


def _config(config: Any, subnet: SubNetwork) -> Any:
    settings = config.to_dict()
    for name in ("architectures", "model_type", "auto_map", "transformers_version"):
        settings.pop(name, None)
    settings["num_hidden_layers"] = subnet.depth
    settings["intermediate_size"] = max(subnet.widths)
    if settings.get("layer_types") is not None:
        settings["layer_types"] = [settings["layer_types"][i] for i in subnet.layers]
    if len(set(subnet.widths)) == 1:
        return type(config)(**settings)
    return _CLASSES[config.model_type][0](intermediate_sizes=list(subnet.widths), **settings)


def _sliced_state(model: PreTrainedModel, subnet: SubNetwork) -> dict[str, Tensor]:
    """The sub-network's tensors under their new names, copied."""
    position = {str(layer): new for new, layer in enumerate(subnet.layers)}
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            if layer not in position:
                continue
            width = subnet.widths[position[layer]]
            state[f"model.layers.{position[layer]}.{rest}"] = _slice(rest, tensor, width).clone()
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            state[name] = tensor.clone()
    return state


def _slice(name: str, tensor: Tensor, width: int) -> Tensor:
    """The part of a layer's tensor that the first ``width`` neurons use."""
    if name.startswith(("mlp.gate_proj", "mlp.up_proj")):
        return tensor[:width]
    if name == "mlp.down_proj.weight":
        return tensor[:, :width].contiguous()
    return tensor
