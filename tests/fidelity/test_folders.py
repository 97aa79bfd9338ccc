"""Model folders: every tensor is loaded as it was meant, or the folder is refused in the first second."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor import models
from compressor.errors import InputError
from tests.conftest import make_tiny_model

Change = Callable[[Path], None]


@pytest.fixture(scope="session")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("untied") / "model", tie_word_embeddings=False)


def edit(name: str, **changes: Any) -> Change:
    """Change fields of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        path = folder / name
        value = json.loads(path.read_text()) if path.is_file() else {}
        value = {k: v for k, v in (value | changes).items() if v is not None}
        path.write_text(json.dumps(value))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        found = load_file(path)
        change(found)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, path, {"format": "pt"})

    return apply


def shards(index: bool, lose: str = "", twice: bool = False) -> Change:
    """Cut the weights into two files."""

    def change(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(found)
        halves = (names[::2], names[1::2] + names[:1] * twice)
        files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for file, half in zip(files, halves, strict=True):
            save_file({name: found[name].clone() for name in half}, folder / file, {"format": "pt"})
        if index:
            table = {name: file for file, half in zip(files, halves, strict=True) for name in half}
            (folder / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": table})
            )
        if lose:
            (folder / lose).unlink()

    return change


def pickled(head: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Change:
    def change(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if head is not None:
            found["lm_head.weight"] = head(found["model.embed_tokens.weight"])
        torch.save(found, folder / "pytorch_model.bin")

    return change


def remove(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return change


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def put(name: str, content: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def marked(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())

    return change


def extra_token(number: int) -> Change:
    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        value = json.loads(path.read_text())
        token = {**value["added_tokens"][0], "id": number, "content": "<added>"}
        value["added_tokens"].append(token)
        path.write_text(json.dumps(value))

    return change


GATE = "model.layers.0.mlp.gate_proj.weight"
EMBED = "model.embed_tokens.weight"

REFUSED: dict[str, tuple[Change, str]] = {
    "a head of its own, tied": (
        tensors(lambda t: t.update({"lm_head.weight": t[EMBED].flip(0)})),
        r"head \(lm_head\.weight\) of its own.*tie_word_embeddings",
    ),
    "the same, pickled": (pickled(lambda e: e.flip(0)), r"head \(lm_head\.weight\) of its own"),
    "an untied head missing": (
        edit("config.json", tie_word_embeddings=False),
        r"lacks the tensor lm_head\.weight.*tie_word_embeddings",
    ),
    "a tensor missing": (tensors(lambda t: t.pop(GATE)), "lacks the tensor model.layers.0.mlp.gate_proj"),
    "layers missing": (edit("config.json", num_hidden_layers=6), "lacks the tensor model.layers.4"),
    "layers too many": (edit("config.json", num_hidden_layers=3), "a tensor model.layers.3"),
    "a bias that nobody adds": (
        tensors(lambda t: t.update({"model.layers.0.mlp.gate_proj.bias": torch.ones(128)})),
        r"a tensor model\.layers\.0\.mlp\.gate_proj\.bias",
    ),
    "another width": (edit("config.json", intermediate_size=192), "has shape .128, 64."),
    "FP8": (
        tensors(lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)})),
        "quantized .it stores .*gate_proj.weight as F8_E4M3.*name the model it was made from",
    ),
    "FP8 with scales": (
        tensors(lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn), f"{GATE}_scale": torch.ones(1)})),
        "is quantized",
    ),
    "scales alone": (
        tensors(lambda t: t.update({"model.layers.0.mlp.gate_proj.weight_scale": torch.ones(1)})),
        "has a tensor .*weight_scale",
    ),
    "INT4 of GPTQ": (
        tensors(
            lambda t: t.update({"model.layers.0.mlp.gate_proj.qweight": torch.ones(8, 8, dtype=torch.int32)})
        ),
        "is quantized",
    ),
    "modelopt's own file": (put("hf_quant_config.json", b"{}"), r"hf_quant_config\.json"),
    "shards without an index": (shards(index=False), r"no model\.safetensors\.index\.json"),
    "a shard missing": (
        shards(index=True, lose="model-00002-of-00002.safetensors"),
        r"lacks model-00002-of-00002\.safetensors, one of its 2 files",
    ),
    "a tensor in two files": (shards(index=True, twice=True), "in two files"),
    "an index that is none": (
        both(shards(index=True), put("model.safetensors.index.json", b"[]")),
        "not a readable index",
    ),
    "training_args.bin alone": (
        both(remove("model.safetensors"), put("training_args.bin", b"x")),
        "holds no weights",
    ),
    "an adapter": (both(remove("config.json"), put("adapter_config.json", b"{}")), "merge the adapter"),
    "a pickle that is none": (
        both(remove("model.safetensors"), put("pytorch_model.bin", b"not a pickle")),
        "not a readable file of weights",
    ),
    "tokenizer.model alone": (
        both(remove("tokenizer.json"), put("tokenizer.model", b"x")),
        r"a tokenizer\.model and no tokenizer\.json.*sentencepiece",
    ),
    "no tokenizer": (remove("tokenizer.json"), "no tokenizer"),
    "a token that the model lacks": (extra_token(600), "token '<added>' as number 600, its model 512"),
    "a tokenizer that is none": (put("tokenizer.json", b"{}"), "no tokenizer of a known form"),
    "an end outside": (edit("generation_config.json", eos_token_id=[2, 900]), "eos_token_id is 900"),
    "a mark before config.json": (marked("config.json"), "byte order mark"),
    "generation_config.json broken": (put("generation_config.json", b"{,"), "not readable JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_another_model_is_refused(case: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    change(folder)
    with pytest.raises(InputError, match=message):
        models.resolve(str(folder))


FOLLOWED: dict[str, Change] = {
    "shards": shards(index=True),
    "pickled": pickled(),
    "pickled with its head": pickled(lambda embedding: embedding),
    "pickled with a copy of its head": pickled(lambda embedding: embedding.clone()),
    "a copy of the embedding as head": tensors(lambda t: t.update({"lm_head.weight": t[EMBED].clone()})),
    "stored frequencies": tensors(
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    ),
    "a pad id as large as the vocabulary": both(
        edit("config.json", pad_token_id=512), edit("generation_config.json", pad_token_id=512)
    ),
    "the same, with its token": both(edit("config.json", pad_token_id=512), extra_token(512)),
    "a pad id below zero": edit("config.json", pad_token_id=-1),
    "a temperature without sampling": edit("generation_config.json", temperature=0.9, top_p=0.6),
    "no generation_config.json": remove("generation_config.json"),
    "a class that splits another way": edit("tokenizer_config.json", tokenizer_class="LlamaTokenizerFast"),
    "consolidated weights beside": put("consolidated.safetensors", b"of another program"),
}


@pytest.mark.parametrize("case", FOLLOWED)
@torch.no_grad()
def test_what_can_be_meant_in_one_way_only_is_followed(
    case: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    FOLLOWED[case](folder)
    original = models.load(models.resolve(str(tiny_model_folder)))
    saved = models.to_folder(models.resolve(str(folder)), tmp_path / "saved")
    again = models.load(models.resolve(str(saved)))
    ids = torch.arange(3, 60)[None]
    assert torch.equal(again.model(ids).logits, original.model(ids).logits)
    text = "def f(x):  # it's  123\n\n\tcafé <|im_start|>user"
    assert again.tokenizer(text)["input_ids"] == original.tokenizer(text)["input_ids"]
    assert again.model.generation_config.eos_token_id == 2
    padding = again.model.generation_config.pad_token_id
    assert padding is not None and 0 <= padding < 512


def test_models_of_the_hubs_cache_are_read_like_folders(tiny_model_folder: Path, tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its environment as it is imported."""
    for name in ("whole", "broken"):
        repository = tmp_path / "hub" / f"models--somebody--{name}"
        snapshot = repository / "snapshots" / ("a" * 40)
        snapshot.parent.mkdir(parents=True)
        shutil.copytree(tiny_model_folder, snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
    tensors(lambda t: t.pop(GATE))(snapshot)
    script = """
from compressor import errors, models
loaded = models.load(models.resolve("somebody/whole"))
print(loaded.source.kind, loaded.source.revision[:4], len(loaded.tokenizer))
try:
    models.resolve("somebody/broken")
except errors.InputError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert "hub aaaa 512" in done.stdout, done.stderr
    assert "lacks the tensor model.layers.0.mlp.gate_proj" in done.stdout


def test_a_temperature_stays(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    edit("generation_config.json", temperature=0.9, top_p=0.6)(folder)
    saved = models.to_folder(models.resolve(str(folder)), tmp_path / "saved")
    kept = json.loads((saved / "generation_config.json").read_text())
    assert (kept["temperature"], kept["top_p"], kept["do_sample"]) == (0.9, 0.6, True)


def test_an_untied_head_is_loaded(untied_folder: Path) -> None:
    loaded = models.load(models.resolve(str(untied_folder))).model
    stored = load_file(untied_folder / "model.safetensors")
    assert torch.equal(loaded.lm_head.weight, stored["lm_head.weight"])
    assert not torch.equal(loaded.lm_head.weight, stored[EMBED])


def test_a_template_that_cannot_be_used_is_named(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no chats here') }}")
    with pytest.raises(InputError, match=r"chat template cannot be used \(no chats here"):
        models.load(models.resolve(str(folder)))


@pytest.mark.parametrize("form", ["list", "folder"])
def test_a_template_for_tools_is_kept(form: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    main = (folder / "chat_template.jinja").read_text()
    tools = main + "{% if tools %}{{ tools }}{% endif %}"
    if form == "list":
        (folder / "chat_template.jinja").unlink()
        named = [{"name": "default", "template": main}, {"name": "tool_use", "template": tools}]
        edit("tokenizer_config.json", chat_template=named)(folder)
    else:
        put("additional_chat_templates/tool_use.jinja", tools.encode())(folder)
    saved = models.to_folder(models.resolve(str(folder)), tmp_path / "saved")
    assert [path.name for path in saved.iterdir() if path.is_dir()] == []
    kept = {
        e["name"]: e["template"]
        for e in json.loads((saved / "tokenizer_config.json").read_text())["chat_template"]
    }
    assert kept == {"default": main, "tool_use": tools}
