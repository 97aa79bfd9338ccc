"""Exports: slices without copies, reuse, and damage named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.engines.onnx_export import export
from compressor.engines.onnx_store import Export, open_export
from compressor.engines.quantize import Quantized
from compressor.errors import InputError
from compressor.space import SubNetwork
from tests.conftest import make_tiny_model

NARROW = SubNetwork((1, 3), (96, 64))


def test_gate_and_up_of_a_narrower_layer_are_the_same_bytes(tiny_export: Export) -> None:
    full = tiny_export.tensors(SubNetwork((1, 3), (128, 128)))
    narrow = tiny_export.tensors(NARROW)
    for matrix in ("gate", "up"):
        wide, cut = full[f"layers.0.{matrix}.weight"], narrow[f"layers.0.{matrix}.weight"]
        assert (cut.file, cut.offset) == (wide.file, wide.offset)
        assert cut.dims == (96, *wide.dims[1:])


def test_a_narrower_down_projection_is_cut_at_whole_blocks(tiny_export: Export) -> None:
    full = tiny_export.tensors(SubNetwork((1, 3), (128, 128)))["layers.1.down.weight"]
    cut = tiny_export.tensors(NARROW)["layers.1.down.weight"]
    assert cut.file == "down-64.bin"
    assert np.array_equal(tiny_export.read(cut), tiny_export.read(full)[:, :1])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_cut_within_a_block_keeps_nothing_of_the_neurons_beyond(tiny_export: Export, bits: int) -> None:
    full, cut = (_down(tiny_export, bits, width) for width in (128, 81))
    values = cut.values(96 if bits == 4 else 128)
    assert torch.equal(values[:, :81], full.values(128)[:, :81])
    assert (values[:, 81:] == 0).all() and values.shape[1] > 81


def _down(exported: Export, bits: int, width: int) -> Quantized:
    refs = exported.tensors(SubNetwork((0,), (width,), (bits,)))
    parts = {
        part: torch.from_numpy(np.array(exported.read(refs[f"layers.0.down.{part}"])))
        for part in ("weight", "scales", "zeros")
        if f"layers.0.down.{part}" in refs
    }
    return Quantized(parts["weight"], parts["scales"], parts.get("zeros"), bits)


def test_a_second_sub_network_writes_nothing(tiny_export: Export) -> None:
    tiny_export.tensors(NARROW)
    before = {p: p.stat().st_mtime_ns for p in tiny_export.folder.iterdir()}
    open_export(tiny_export.folder).tensors(SubNetwork((0, 2), (64, 96)))
    assert {p: p.stat().st_mtime_ns for p in tiny_export.folder.iterdir()} == before


def test_an_export_of_the_same_weights_is_reused(tiny_model_folder: Path, tmp_path: Path) -> None:
    first = export(tiny_model_folder, tmp_path / "export")
    written = (first.folder / "weights.bin").stat().st_mtime_ns
    again = export(tiny_model_folder, tmp_path / "export")
    assert (again.folder / "weights.bin").stat().st_mtime_ns == written
    assert again.tensors(NARROW) == first.tensors(NARROW)


def test_an_export_of_another_model_is_not_overwritten(tiny_model_folder: Path, tmp_path: Path) -> None:
    export(tiny_model_folder, tmp_path / "export")
    other = make_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="other weights"):
        export(other, tmp_path / "export")


def test_bits_that_were_not_exported_are_named(tiny_model_folder: Path, tmp_path: Path) -> None:
    eight = export(tiny_model_folder, tmp_path / "export", (8,))
    with pytest.raises(InputError, match="4-bit"):
        eight.tensors(SubNetwork((0,), (128,), (4,)))


@pytest.mark.parametrize("damage", ["missing tensor", "cut short", "no weights"])
def test_a_damaged_model_leaves_no_export(tiny_model_folder: Path, tmp_path: Path, damage: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    weights = model / "model.safetensors"
    if damage == "missing tensor":
        tensors = load_file(weights)
        del tensors["model.layers.2.mlp.up_proj.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.unlink()
    named = {"missing tensor": "layers.2.mlp.up_proj", "cut short": "cut short", "no weights": "safetensors"}
    with pytest.raises(InputError, match=named[damage]):
        export(model, tmp_path / "export")
    assert not list(tmp_path.glob("export*"))


def test_a_folder_without_an_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished export"):
        open_export(tmp_path)


def test_an_export_cut_short_is_named(tiny_export: Export, tmp_path: Path) -> None:
    copy = tmp_path / "export"
    shutil.copytree(tiny_export.folder, copy)
    with (copy / "weights.bin").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(InputError, match=r"weights\.bin.*cut short"):
        open_export(copy)
