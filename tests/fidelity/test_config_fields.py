"""Every field of a configuration is used, without effect, or refused by name before weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config, SmolLM3Config

from compressor import models
from compressor.config_fields import judge
from compressor.errors import InputError

CLASSES = (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config, Phi3Config)
DEFAULT: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.model_type)
def test_every_field_of_transformers_own_classes_has_a_verdict(
    kind: type, capsys: pytest.CaptureFixture[str]
) -> None:
    config = kind()
    fields = config.to_dict()
    verdicts = {name: judge(name, fields) for name in sorted(fields)}
    with capsys.disabled():
        print(f"\n{config.model_type}")
        for name, (verdict, reason) in verdicts.items():
            print(f"  {name:<34}{verdict:<10}{reason}")
    unknown = [name for name, (_, reason) in verdicts.items() if "is unknown here (" in reason]
    assert not unknown
    refused = {name for name, (verdict, _) in verdicts.items() if verdict == "refused"}
    expected = {
        "smollm3": {"model_type", "no_rope_layer_interval", "no_rope_layers"},
        "phi3": {"model_type", "original_max_position_embeddings"},
    }
    assert refused == expected.get(config.model_type, set())


CHANGES: dict[str, tuple[dict[str, Any], str | None]] = {
    "relu": ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "swish is silu": ({"hidden_act": "swish"}, None),
    "gptq": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        r"quantized \(gptq\).*name the model",
    ),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, r"quantized \(awq\)"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"\(bitsandbytes\)"),
    "compressed-tensors": (
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        "compressed-tensors",
    ),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, r"quantized \(fp8\)"),
    "modelopt": ({"quantization_config": {"quant_algo": "FP8", "quant_method": "modelopt"}}, "modelopt"),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "quantization says"),
    "no quantization": ({"quantization_config": None}, None),
    "own code": ({"auto_map": {"AutoModelForCausalLM": "m.Own"}}, "auto_map names code"),
    "a window in a llama": ({"sliding_window": 16}, "Llama's attention has no window"),
    "a window longer than texts": ({"sliding_window": 4096}, None),
    "a window switched off": ({"sliding_window": 16, "use_sliding_window": False}, None),
    "mistral, a window everywhere": ({"model_type": "mistral", "sliding_window": 16}, None),
    "mistral, no window": ({"model_type": "mistral", "sliding_window": None}, None),
    "mistral, windows on some": (
        {
            "model_type": "mistral",
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "on some layers",
    ),
    "mistral, windows named and on none": (
        {"model_type": "mistral", "sliding_window": 16, "layer_types": ["full_attention"] * 4},
        "no layer has the window",
    ),
    "layers of another kind": (
        {"layer_types": ["linear_attention"] * 4},
        "'linear_attention', which is unknown",
    ),
    "layers miscounted": ({"layer_types": ["full_attention"] * 3}, "names 3 layers of 4"),
    "dynamic": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "'dynamic' way.*contexts of 512 tokens",
    ),
    "linear": ({"rope_parameters": {**DEFAULT, "rope_type": "linear", "factor": 2.0}}, None),
    "mrope": ({"rope_parameters": {**DEFAULT, "mrope_section": [1, 2]}}, "says 'mrope_section'"),
    "rope by layer": ({"rope_parameters": {"full_attention": DEFAULT}}, "differs by layer"),
    "rope in part": ({"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}}, "part of each head"),
    "rope in part, old": ({"partial_rotary_factor": 0.5}, "part of each head"),
    "rope by length": (
        {
            "rope_parameters": {
                **DEFAULT,
                "rope_type": "longrope",
                "short_factor": [1.0],
                "long_factor": [2.0],
            }
        },
        "by the length of the text",
    ),
    "experts": ({"num_local_experts": 8}, "gives the MLP experts"),
    "granite's factors": ({"embedding_multiplier": 12.0}, "scales the embeddings"),
    "softcap": ({"final_logit_softcapping": 30.0}, "bends the logits"),
    "an end that is no token": ({"eos_token_id": 512}, "eos_token_id is 512, none of the 512 tokens"),
    "nobody's field": ({"frobnicate": "much"}, "frobnicate is unknown here .*remove it there"),
    "nobody's field, off": ({"frobnicate": False}, None),
    "unsloth's note": ({"unsloth_fixed": True}, None),
    "transformers.js": ({"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}, None),
    "another family": ({"model_type": "gemma2"}, r"not LLaMA-like \(it is 'gemma2'\)"),
    "not a number": ({"hidden_size": "many"}, "config.json"),
    "not a number, read here": ({"sliding_window": "wide"}, "sliding_window is of another form"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_configuration_is_followed_or_refused(
    case: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    changes, message = CHANGES[case]
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    if message is None:
        assert models.resolve(str(folder)).kind == "folder"
        return
    with pytest.raises(InputError, match=message):
        models.resolve(str(folder))


QWEN: dict[str, Any] = {"model_type": "qwen2", "num_hidden_layers": 4, "max_position_embeddings": 512}
WINDOWS: dict[str, tuple[dict[str, Any], int | str | None]] = {
    "as Qwen2.5 is published": ({"use_sliding_window": False, "sliding_window": 131072}, None),
    "switched off": ({"use_sliding_window": False, "sliding_window": 16}, None),
    "on every layer": ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, 16),
    "on no layer": ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}, None),
    "on the upper layers": (
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
        "some layers",
    ),
    "on the upper layers, longer than texts": (
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 2},
        None,
    ),
    "named, all sliding": (
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"] * 4},
        16,
    ),
    "named, all full": (
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 4},
        None,
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_of_qwen_are_one_for_all_layers_or_refused(case: str) -> None:
    from compressor.config_fields import uniform_window

    changes, wanted = WINDOWS[case]
    if isinstance(wanted, str):
        with pytest.raises(InputError, match=wanted):
            uniform_window(QWEN | changes)
    else:
        assert uniform_window(QWEN | changes) == wanted
        assert (
            uniform_window(
                Qwen2Config(**{k: v for k, v in (QWEN | changes).items() if k != "model_type"}).to_dict()
            )
            == wanted
        )


@pytest.mark.parametrize("case", WINDOWS)
def test_a_graphs_window_is_that_of_the_models_layers(case: str) -> None:
    from compressor.engines.onnx_export import _constants

    changes, wanted = WINDOWS[case]
    settings = {name: value for name, value in (QWEN | changes).items() if name != "model_type"}
    if not isinstance(wanted, str):
        assert _constants(Qwen2Config(**settings), 1.0).local_window == (wanted or -1)
