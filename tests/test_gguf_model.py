"""GGUF files of every family that is read: same logits as the model they were written from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from gguf import GGUFWriter

from compressor import gguf_model, models
from compressor.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied-wide-heads": ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, "head_dim": 16}),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_model(case: str) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    family, changes = CASES[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | changes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def write_gguf(model: PreTrainedModel, path: Path, pre: str = "smollm", **changes: Any) -> Path:
    """The model as llama.cpp's converter lays it out: q and k rows interleaved for llama."""
    config = model.config
    writer = GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(models.shape_of_config(config).head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    letters = byte_letters()
    writer.add_token_list([*letters, "<s>", "</s>", "Hi", *(f"<unused{i}>" for i in range(41))])
    writer.add_token_types([1] * 256 + [3, 3, 1] + [3] * 41)
    writer.add_token_merges(["H i"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(bool(changes.get("add_bos")))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        writer.add_tensor(gguf_name(name), interleaved(config, name, tensor).contiguous().numpy())
    if changes.get("extra_tensor"):
        writer.add_tensor(changes["extra_tensor"], torch.zeros(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def interleaved(config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    if config.model_type != "llama" or part not in heads:
        return tensor
    return tensor.view(heads[part], 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte, the vocabulary of a byte-level BPE without merges."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_gguf_file_gives_the_models_logits(case: str, tmp_path: Path) -> None:
    model = make_model(case)
    source = models.resolve(str(write_gguf(model, tmp_path / "model.gguf")))
    assert models.read_shape(source) == models.shape_of_config(model.config)
    loaded = models.load(source, torch.float32)
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(loaded.model(ids).logits, model(ids).logits, atol=1e-5)
    assert loaded.model.generation_config.eos_token_id == 257


def test_a_gguf_model_saves_and_loads_as_a_folder(tmp_path: Path) -> None:
    source = models.resolve(str(write_gguf(make_model("llama"), tmp_path / "model.gguf")))
    loaded = models.load(models.resolve(str(models.to_folder(source, tmp_path / "folder"))))
    original = models.load(source)
    for name, tensor in original.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])
    text = "Hello 123 wörld</s>"
    assert loaded.tokenizer(text)["input_ids"] == original.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_first_token_is_put_only_where_the_file_asks(tmp_path: Path, add_bos: bool) -> None:
    source = models.resolve(str(write_gguf(make_model("llama"), tmp_path / "model.gguf", add_bos=add_bos)))
    ids = models.load(source).tokenizer("Hi!")["input_ids"]
    assert ids == [256] * add_bos + [258, ord("!")]


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "default"])
def test_every_known_way_to_split_loses_nothing(tmp_path: Path, pre: str) -> None:
    tokenizer = gguf_model.load_tokenizer(write_gguf(make_model("llama"), tmp_path / "model.gguf", pre))
    text = "It's  12345\n\n\tcafé 日本!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_an_unknown_way_to_split_is_refused(tmp_path: Path) -> None:
    path = write_gguf(make_model("llama"), tmp_path / "model.gguf", "tekken")
    with pytest.raises(InputError, match="'tekken' way"):
        models.resolve(str(path))


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_inp.weight", "blk.0.attn_q.bias", "rope.weight"])
def test_a_tensor_that_belongs_nowhere_is_named(tmp_path: Path, name: str) -> None:
    path = write_gguf(make_model("llama"), tmp_path / "model.gguf", extra_tensor=name)
    with pytest.raises(InputError, match=name):
        models.resolve(str(path))


def test_another_architecture_is_not_llama_like(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match="'gpt2'"):
        models.resolve(str(path))
