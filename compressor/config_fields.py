"""Every field of a model's ``config.json``: used, known to be without effect, or refused by name.

What nobody here knows might make the model another one, so it is refused: an allow-list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from compressor.errors import InputError

Verdict = Literal["used", "harmless", "refused"]
Config = Mapping[str, Any]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor")
ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", *LLAMA3_KEYS),
    "yarn": (
        *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        *("finetuned",),
    ),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}
"""Kinds of rotary scaling that are followed, and what each may say besides its base and trained length."""

USED = frozenset(
    {
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias"),
        *("max_position_embeddings", "rms_norm_eps", "rope_theta", "max_window_layers"),
        *("use_sliding_window", "bos_token_id", "pad_token_id"),
    }
)
_NOTES = frozenset(
    {
        *("architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path"),
        *("_commit_hash", "use_cache", "initializer_range", "attention_dropout", "hidden_dropout"),
        *("resid_pdrop", "embd_pdrop", "pretraining_tp", "output_attentions", "output_hidden_states"),
        *("return_dict", "use_return_dict", "torchscript", "tokenizer_class", "unsloth_fixed"),
        *("unsloth_version", "_attn_implementation", "attn_implementation", "_flash_attn_2_enabled"),
        *("_attn_implementation_autoset", "keys_to_ignore_at_inference"),
        *("gradient_checkpointing", "id2label", "label2id", "num_labels", "task_specific_params"),
        *("finetuning_task", "prefix", "max_sequence_length", "model_max_length", "tokenizer_padding_side"),
        *("tokenizer_model_max_length", "use_bfloat16", "tf_legacy_loss", "neftune_alpha"),
        *("onnx_export", "eos_token", "bos_token", "pad_token", "unk_token", "unk_token_id"),
        *("mlp_dropout", "ffn_dropout", "emb_dropout", "tie_last_hidden_states", "_sliding_window_pattern"),
        *("is_llama_config", "license", "model_name", "transformers.js_config", "is_decoder"),
        *("pruned_heads", "sep_token_id", "decoder_start_token_id", "cross_attention_hidden_size"),
    }
)
_GENERATION = frozenset(
    {
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
        *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
        *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
        *("num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id"),
        *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
        *("suppress_tokens", "begin_suppress_tokens", "max_new_tokens", "generation_config"),
    }
)
"""Habits of generation, which transformers reads from ``generation_config.json`` alone."""
HARMLESS = _NOTES | _GENERATION


def alien(where: str, family: str) -> InputError:
    return InputError(
        f"{where} is not LLaMA-like (it is '{family}'): choose a model of {', '.join(FAMILIES)}"
    )


def check_config(where: str, config: Config) -> None:
    """Raise ``InputError`` naming the first field of a ``config.json`` that cannot be followed."""
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise alien(where, family)
    for name in config:
        try:
            verdict, reason = judge(name, config)
        except (TypeError, ValueError, AttributeError):
            verdict, reason = (
                "refused",
                f"is of another form than expected ({config[name]!r}): correct it there",
            )
        if verdict == "refused":
            raise InputError(f"{where}: in its config.json {name} {reason}")


def judge(name: str, config: Config) -> tuple[Verdict, str]:
    """What becomes of one field of a configuration, and why it is refused."""
    value = config[name]
    if name in _CHECKED:
        reason = _CHECKED[name](value, config)
        return ("refused", reason) if reason else ("used", "")
    if name in USED:
        return "used", ""
    if name in HARMLESS or value is None or value is False or value in ("", [], {}):
        return "harmless", ""
    return "refused", (
        f"is unknown here (it says {str(value)[:60]!r}): if the model does not depend on it, remove it "
        "there; else choose another model"
    )


def uniform_window(config: Config) -> int | None:
    """The window that every layer's attention has, tokens; None for none.

    Raises ``InputError`` for one on some layers only, which no single graph has.
    """
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return None
    family = config.get("model_type")
    layers = int(config.get("num_hidden_layers") or 0)
    kinds = config.get("layer_types")
    if not kinds:
        kept = 0 if family in ("llama", "mistral") else int(config.get("max_window_layers", 28))
        kinds = ["full_attention" if layer < kept else "sliding_attention" for layer in range(layers)]
    windowed = {kind == "sliding_attention" for kind in kinds}
    if int(window) >= int(config.get("max_position_embeddings") or 2048) or True not in windowed:
        return None
    if False in windowed:
        raise InputError(_MIXED)
    return int(window)


_MIXED = (
    "asks for attention over a window on some layers and over everything on others, which packages cannot "
    "say: choose another model"
)


def _check_type(value: Any, config: Config) -> str:
    del config
    if value in FAMILIES:
        return ""
    return f"is '{value}', which is not LLaMA-like: choose a model of {', '.join(FAMILIES)}"


def _check_activation(value: Any, config: Config) -> str:
    del config
    if value in ("silu", "swish", None):
        return ""
    return f"is '{value}': models here have silu between their MLP's halves; choose another model"


def _check_windows(value: Any, config: Config) -> str:
    if not value:
        return ""
    try:
        window = uniform_window(config)
    except InputError as error:
        return str(error)
    if window is not None and config.get("model_type") == "llama":
        return (
            f"is {window}, but Llama's attention has no window: set it to null there, or choose another model"
        )
    return ""


def _check_layers(value: Any, config: Config) -> str:
    if not value:
        return ""
    unknown = sorted({str(kind) for kind in value} - {"full_attention", "sliding_attention"})
    if unknown:
        return f"has layers of the kind '{unknown[0]}', which is unknown here: choose another model"
    if len(value) != config.get("num_hidden_layers", len(value)):
        return (
            f"names {len(value)} layers of {config.get('num_hidden_layers')}: fetch the configuration again"
        )
    sliding = "sliding_attention" in value
    if sliding and not config.get("sliding_window"):
        return "has layers with a window, and sliding_window says no width: fetch the configuration again"
    if config.get("model_type") == "mistral" and not sliding and config.get("sliding_window"):
        return "says that no layer has the window of sliding_window: set sliding_window to null there"
    return _check_windows(config.get("sliding_window"), config)


def _check_rope(value: Any, config: Config) -> str:
    if not value:
        return ""
    if not isinstance(value, Mapping):
        return "is no table of rotary settings: fetch the configuration again"
    kind = str(value.get("rope_type", value.get("type", "default")))
    if any(isinstance(entry, Mapping) for entry in value.values()):
        return "differs by layer, which is unknown here: choose another model"
    if kind not in ROPE_KEYS:
        length = config.get("max_position_embeddings", 2048)
        remedy = f"; remove it there to compress the model for contexts of {length} tokens" * (
            kind == "dynamic"
        )
        return (
            f"scales rotary embeddings the '{kind}' way, which is unknown here: choose another model{remedy}"
        )
    known = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor"}
    for name, entry in value.items():
        if name not in known and name not in ROPE_KEYS[kind] and entry not in (None, False):
            return f"says '{name}', which '{kind}' scaling here does not know: choose another model"
    if float(value.get("partial_rotary_factor") or 1.0) != 1.0:
        return _PARTIAL
    if kind == "longrope" and value.get("short_factor") != value.get("long_factor"):
        return (
            "scales rotary embeddings by the length of the text, which packages cannot: choose another model"
        )
    return ""


_PARTIAL = "turns a part of each head only, which is unknown here: choose another model"


def _check_partial(value: Any, config: Config) -> str:
    del config
    return "" if value in (None, 1, 1.0) else _PARTIAL


def _check_quantization(value: Any, config: Config) -> str:
    del config
    if not value:
        return ""
    named = value.get("quant_method", value.get("quant_algo", "")) if isinstance(value, Mapping) else ""
    method = f" ({named})" if named else ""
    return (
        f"says that the weights are quantized{method}: name the model it was made from, in bf16, fp16 or "
        "fp32, or a GGUF file of it"
    )


def _check_code(value: Any, config: Config) -> str:
    del config
    if not isinstance(value, Mapping) or not any("Model" in str(name) for name in value):
        return ""
    return (
        "names code of the model's own, which is not run here: if the model is an ordinary one of its "
        "family, remove the field there; else choose another model"
    )


def _check_ends(value: Any, config: Config) -> str:
    size = config.get("vocab_size")
    ends = value if isinstance(value, list) else [value]
    wrong = [end for end in ends if end is not None and (not isinstance(end, int) or isinstance(end, bool))]
    wrong += [end for end in ends if isinstance(end, int) and isinstance(size, int) and not 0 <= end < size]
    return f"is {wrong[0]}, none of the {size} tokens: correct it there" if wrong else ""


def _never(what: str) -> Callable[[Any, Config], str]:
    def check(value: Any, config: Config) -> str:
        del config
        return "" if value in (None, False, 0, [], {}) else f"{what}: choose another model"

    return check


def _one(what: str) -> Callable[[Any, Config], str]:
    def check(value: Any, config: Config) -> str:
        del config
        return "" if value in (None, 1, 1.0) else f"{what}: choose another model"

    return check


_CHECKED: Mapping[str, Callable[[Any, Config], str]] = {
    "model_type": _check_type,
    "hidden_act": _check_activation,
    "sliding_window": _check_windows,
    "layer_types": _check_layers,
    "rope_scaling": _check_rope,
    "rope_parameters": _check_rope,
    "partial_rotary_factor": _check_partial,
    "eos_token_id": _check_ends,
    "quantization_config": _check_quantization,
    "quantization": _check_quantization,
    "compression_config": _check_quantization,
    "auto_map": _check_code,
    "is_encoder_decoder": _never("says that the model has an encoder"),
    "add_cross_attention": _never("gives the model attention to another text"),
    "chunk_size_feed_forward": _never("cuts the text for the MLP"),
    "num_local_experts": _never("gives the MLP experts"),
    "num_experts": _never("gives the MLP experts"),
    "num_experts_per_tok": _never("gives the MLP experts"),
    "no_rope_layers": _never("leaves some layers without rotary embeddings"),
    "no_rope_layer_interval": _never("leaves some layers without rotary embeddings"),
    "original_max_position_embeddings": _never("scales rotary embeddings by the length of the text"),
    "per_layer_config": _never("makes some layers different"),
    "vision_config": _never("gives the model eyes"),
    "problem_type": _never("makes the model a classifier"),
    "embedding_multiplier": _one("scales the embeddings"),
    "residual_multiplier": _one("scales the layers' outputs"),
    "logits_scaling": _one("scales the logits"),
    "logit_scale": _one("scales the logits"),
    "attention_multiplier": _never("scales the attention"),
    "final_logit_softcapping": _never("bends the logits"),
    "attn_logit_softcapping": _never("bends the attention"),
    "clip_qkv": _never("cuts off queries and keys"),
}
"""Fields that must say what every model of these families does; what is wrong with them, or nothing."""
