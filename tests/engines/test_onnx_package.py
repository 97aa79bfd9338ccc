"""Packages: what stock onnxruntime-genai loads, whole or absent, and proved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from compressor.engines import verify_package
from compressor.engines.measure import measure_package
from compressor.engines.memory import package_bytes
from compressor.engines.onnx_package import DATA_FILE, GRAPH_FILE, write_package
from compressor.engines.onnx_store import Export
from compressor.engines.onnx_verify import check_logits, greedy, mean_kl, open_package
from compressor.engines.onnxruntime import OnnxRuntimeEngine
from compressor.engines.streamed import streamed_logits
from compressor.errors import InputError, PackageError, UnfitMachineError
from compressor.int8_cache import SCALES_FILE
from compressor.manifest import Accuracy, Speed, read_manifest, write_manifest
from compressor.profile import Workload
from compressor.space import SubNetwork
from tests.engines.reference import cut, logits

SUBNET = SubNetwork((0, 1, 3), (128, 64, 96), (8, 4, 8))
PROMPT = np.array([[5, 17, 301, 44, 9]])
WORKLOAD = Workload(prompt_tokens=16, output_tokens=4)
FIELDS = {
    "name": "tiny-test",
    "base_model": "tiny",
    "license": "apache-2.0",
    "accuracy": [Accuracy(task="agreement", value=0.8, low=0.7, high=0.9, items=100)],
    "speed": [
        Speed(
            workload="8+4x1",
            device="CPU",
            engine="onnxruntime",
            ttft_ms=1.5,
            tpot_ms=0.5,
            throughput_tok_s=900,
            peak_memory_bytes=1,
        )
    ],
}


@pytest.fixture(scope="module")
def package(tiny_export: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "package"
    write_package(tiny_export, SUBNET, folder, FIELDS)
    return folder


@pytest.mark.parametrize("fine_inputs", [(), ("head", "layers.0.qkv")], ids=["one pass", "two passes"])
def test_stock_genai_generates_what_our_loop_generates(
    tiny_export: Export, tmp_path: Path, fine_inputs: tuple[str, ...]
) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    write_package(tiny_export, SUBNET, tmp_path / "package", FIELDS, fine_inputs=fine_inputs)
    model = og.Model(str(tmp_path / "package"))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=25, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(PROMPT[0].astype(np.int32))
    while not generator.is_done() and len(generator.get_sequence(0)) < 25:
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)][PROMPT.shape[1] :]
    session, shape = open_package(tmp_path / "package", 1)
    assert greedy(session, shape, PROMPT, len(theirs)) == theirs
    assert len(theirs) >= 1


def test_the_data_file_is_what_was_predicted(package: Path, tiny_export: Export) -> None:
    predicted = package_bytes(tiny_export.shape, SUBNET)
    assert (package / DATA_FILE).stat().st_size == pytest.approx(predicted, rel=0.01)


def test_the_graph_takes_nothing_from_outside_the_package(package: Path) -> None:
    graph = onnx.load(str(package / GRAPH_FILE), load_external_data=False).graph
    locations = {e.value for t in graph.initializer for e in t.external_data if e.key == "location"}
    assert locations == {DATA_FILE}


def test_the_package_names_its_tokens_and_dimensions(package: Path) -> None:
    model = json.loads((package / "genai_config.json").read_text())["model"]
    generation = json.loads((package / "generation_config.json").read_text())
    assert model["eos_token_id"] == generation["eos_token_id"] == 2
    assert model["decoder"]["num_hidden_layers"] == 3
    config = json.loads((package / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_sizes"]) == (3, [128, 64, 96])


def test_the_manifest_and_the_card_say_what_it_is(package: Path) -> None:
    manifest = read_manifest(package)
    assert manifest.architecture.bits == [8, 4, 8]
    assert set(manifest.files) >= {GRAPH_FILE, DATA_FILE, "tokenizer.json", "README.md", "genai_config.json"}
    card = (package / "README.md").read_text()
    for part in ("base_model: tiny", "license: apache-2.0", "0.800", "1.5", "compress serve"):
        assert part in card


def test_verifying_speaks_and_finds_a_changed_byte(package: Path, tmp_path: Path) -> None:
    lines = list(verify_package(package))
    assert len(lines) == 9 and "->" in lines[-1]
    assert lines[3:5] == ["512 tokens have texts, of 512", "texts end with '<|im_end|>'"]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in package.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    data = bytearray((damaged / DATA_FILE).read_bytes())
    data[1000] ^= 1
    (damaged / DATA_FILE).write_bytes(data)
    with pytest.raises(PackageError, match=DATA_FILE):
        list(verify_package(damaged))


def test_an_existing_folder_is_refused(package: Path, tiny_export: Export) -> None:
    with pytest.raises(InputError, match="exists"):
        write_package(tiny_export, SUBNET, package, FIELDS)


def test_inputs_read_in_two_passes_travel_with_the_package(tiny_export: Export, tmp_path: Path) -> None:
    fine = ("head", "layers.0.qkv")
    engine = OnnxRuntimeEngine(tiny_export.folder, threads=1)
    engine.write(SUBNET, tmp_path / "package", {**FIELDS, "divergence_nats": 0.01}, fine_inputs=fine)
    manifest = read_manifest(tmp_path / "package")
    assert manifest.fine_inputs == list(fine) and manifest.divergence_nats == 0.01
    assert list(verify_package(tmp_path / "package"))
    session, shape = open_package(tmp_path / "package", 1)
    candidate = engine.build(SUBNET, fine_inputs=fine)
    assert greedy(session, shape, PROMPT, 12) == greedy(candidate.session, shape, PROMPT, 12)
    assert "0.010 nats" in (tmp_path / "package" / "README.md").read_text()


def test_scales_of_the_cache_travel_with_the_package_and_leave_its_graph_alone(
    package: Path, tiny_export: Export, tmp_path: Path
) -> None:
    narrow = OnnxRuntimeEngine(tiny_export.folder, threads=1, kv_cache="int8")
    narrow.write(SUBNET, tmp_path / "package", FIELDS)
    manifest = read_manifest(tmp_path / "package")
    assert manifest.kv_cache == "int8" and SCALES_FILE in manifest.files
    assert (tmp_path / "package" / GRAPH_FILE).read_bytes() == (package / GRAPH_FILE).read_bytes()
    assert read_manifest(package).kv_cache == "fp32" and not (package / SCALES_FILE).exists()
    assert list(verify_package(tmp_path / "package"))
    session, shape = open_package(tmp_path / "package", 1, kv_cache="int8")
    candidate = narrow.build(SUBNET)
    assert greedy(session, shape, PROMPT, 12) == greedy(candidate.session, shape, PROMPT, 12)
    measured = measure_package(tmp_path / "package", WORKLOAD, threads=1, max_seconds=0.1)
    assert measured.conditions["kv_cache"] == "int8"


def test_an_engine_older_than_the_package_is_told_so(package: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(package, newer)
    manifest = read_manifest(newer)
    write_manifest(newer, manifest.model_copy(update={"created_by": {"onnxruntime": "99.1.0"}}))
    with pytest.raises(UnfitMachineError, match=r"proved with onnxruntime 99\.1\.0, here is"):
        list(verify_package(newer))


def test_logits_are_held_against_the_sub_network(tiny_export: Export, tiny_model_folder: Path) -> None:
    eight = SubNetwork(SUBNET.layers, SUBNET.widths)
    engine = OnnxRuntimeEngine(tiny_export.folder, threads=1)
    ids = np.random.default_rng(1).integers(0, 512, 100)
    ours = engine.logits(engine.build(eight), ids)
    expected = logits(cut(tiny_model_folder, eight), ids[None])[0]
    assert 0 <= check_logits(expected, ours, "int8") < 0.02
    other = engine.logits(engine.build(SubNetwork((1, 2, 3), SUBNET.widths)), ids)
    with pytest.raises(PackageError, match="nats"):
        check_logits(expected, other, "int8")


@pytest.mark.parametrize("outer", [(8, 8), (4, 4)])
def test_few_bits_are_held_to_the_same_bound_by_what_their_rounded_weights_say(
    tiny_export: Export, tiny_model_folder: Path, outer: tuple[int, int]
) -> None:
    four = SubNetwork(SUBNET.layers, SUBNET.widths, (4, 4, 8), outer)
    ids = np.random.default_rng(1).integers(0, 512, 100)
    engine = OnnxRuntimeEngine(tiny_export.folder, threads=1)
    ours = engine.logits(engine.build(four), ids)
    expected = streamed_logits(tiny_model_folder, four, ids, rounded=True)
    assert check_logits(expected, ours, "int8") < 0.02
    assert mean_kl(streamed_logits(tiny_model_folder, four, ids), expected) > 0.01
