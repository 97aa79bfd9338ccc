"""The super-network's folder: written whole, read back, hashed by what its weights are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from compressor import models
from compressor.errors import InputError
from compressor.supernet.folder import load_supernet, read_info, save_supernet, weights_hash


def test_a_saved_super_network_comes_back(tiny: models.LoadedModel, tmp_path: Path) -> None:
    info = save_supernet(tiny.model, tiny.tokenizer, (2, 1, 0, 3), "activation+greedy", tmp_path)
    model, tokenizer, read = load_supernet(tmp_path, torch.float32)
    assert read == info
    assert read.drop_order == (2, 1, 0, 3)
    assert json.loads((tmp_path / "supernet.json").read_text())["ordering"] == "activation+greedy"
    for name, tensor in tiny.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert tokenizer("Hello")["input_ids"] == tiny.tokenizer("Hello")["input_ids"]


def test_the_hash_follows_the_weights_not_the_files(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "copy")
    before = weights_hash(folder)
    (folder / "README.md").write_text("a card")
    assert weights_hash(folder) == before
    loaded = models.load(models.resolve(str(folder)))
    with torch.no_grad():
        loaded.model.model.norm.weight[0] += 1
    loaded.model.save_pretrained(folder)
    assert weights_hash(folder) != before


def test_an_unfinished_folder_is_no_super_network(tiny_model_folder: Path) -> None:
    with pytest.raises(InputError, match="holds no super-network"):
        read_info(tiny_model_folder)
