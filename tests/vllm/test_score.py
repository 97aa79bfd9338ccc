"""Choices scored in vLLM have the log-probabilities that the model itself gives them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from compressor.engines import vllm_score
from compressor.engines.vllm_package import write_package
from compressor.engines.vllm_score import Reader
from compressor.evaluation.encoding import Encoded
from compressor.pipeline.vllm_artefact import scored
from compressor.space import SubNetwork
from tests.vllm.conftest import FIELDS

pytestmark = pytest.mark.vllm

FULL = SubNetwork((0, 1, 2, 3), (128,) * 4)


@pytest.fixture(autouse=True, scope="module")
def _needs_vllm() -> None:
    pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def reader(supernet: Path, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp("score")
    write_package(supernet, FULL, folder / "p", FIELDS, numerics="fp32")
    return Reader(folder / "p", "fp32", FULL.to_dict(), Path(sys.executable), folder / "kept")


def requests() -> list[Encoded]:
    """Items of a shared beginning with four choices: of one word, or of several that begin alike."""
    draw = np.random.default_rng(0)
    start = draw.integers(3, 500, 40).tolist()
    found = []
    for item in range(6):
        context = [*start, *draw.integers(3, 500, 9).tolist()]
        word = int(draw.integers(3, 500))
        for choice in range(4):
            rest = [choice + 10] if item % 2 else [word, word + 1, *range(20, 24 + choice)]
            found.append(Encoded((*context, *rest), len(rest)))
    return found


def expected(supernet: Path, encoded: list[Encoded]) -> tuple[list[float], list[bool]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(supernet, dtype=torch.float32)
    values, greedy = [], []
    for request in encoded:
        with torch.inference_mode():
            rows = model(torch.tensor([request.inputs])).logits[0, -request.scored :].log_softmax(-1)
        own = torch.tensor(request.ids[-request.scored :])
        values.append(float(rows.gather(1, own[:, None]).sum()))
        greedy.append(bool((rows.argmax(-1) == own).all()))
    return values, greedy


@pytest.mark.parametrize("greedy", [False, True])
def test_choices_have_the_models_log_likelihoods(reader: Reader, supernet: Path, greedy: bool) -> None:
    encoded = requests()
    values, likeliest = expected(supernet, encoded)
    found = scored(reader, encoded, greedy)
    assert [value for value, _ in found] == pytest.approx(values, abs=2e-3)
    if greedy:
        assert [flag for _, flag in found] == likeliest


def test_what_was_read_before_a_kill_is_not_read_again(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_score.shutil, "rmtree", lambda _: None)
    encoded = requests()
    first = scored(reader, encoded, False)
    (kept,) = [folder for folder in reader.kept_in.iterdir() if any(folder.iterdir())]
    assert len(list(kept.iterdir())) == 1
    broken = Reader(reader.package, reader.numerics, reader.subnet, Path("/bin/true"), reader.kept_in)
    assert scored(broken, encoded, False) == first
