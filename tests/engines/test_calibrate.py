"""A whole model rounded on text: nearer to itself than by the nearest values, and kept beside its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.engines.calibrate import calibrated
from compressor.engines.onnx_export import export
from compressor.engines.rounding import EMBED, HEAD, RoundedWeights, Rounding, rounding_file
from compressor.errors import InputError
from compressor.space import SubNetwork
from tests.conftest import make_tiny_model

LAYERS = (0, 1, 2, 3)
FOUR = SubNetwork(LAYERS, (128,) * 4, (4,) * 4, (4, 4))


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergence(model: PreTrainedModel, expected: Tensor, ids: Tensor) -> float:
    with torch.no_grad():
        found = model(ids).logits.log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def text(model: PreTrainedModel, seed: int, sequences: int = 12) -> Tensor:
    """What the model writes itself: inputs that lie where it puts them."""
    ids = torch.randint(512, (sequences, 1), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    return model.generate(ids, do_sample=True, max_new_tokens=95, min_new_tokens=95, pad_token_id=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_keeps_closer_to_itself_on_other_text(tmp_path: Path, tied: bool) -> None:
    folder = make_tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    model = load(folder)
    learnt, unseen = text(model, 1), text(model, 2)
    with torch.no_grad():
        expected = model(unseen).logits.log_softmax(-1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rounding = calibrated(model, learnt)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    found = []
    for kept in (rounding, Rounding()):
        RoundedWeights(rounded := load(folder), (4,), (4,), kept).choose(FOUR)
        found.append(divergence(rounded, expected, unseen))
    assert found[0] < 0.9 * found[1]
    assert ((HEAD, 4) in dict(rounding.items())) != tied and (EMBED, 4) in dict(rounding.items())


def test_what_is_kept_beside_the_weights_is_what_an_export_holds(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    model = load(folder)
    plain = export(folder, tmp_path / "plain", (4, 8))
    rounding = calibrated(model, text(model, 1))
    rounding.save(folder)
    again = Rounding.load(folder)
    assert {key: m.values(64).sum() for key, m in again.items()} == {
        key: m.values(64).sum() for key, m in rounding.items()
    }
    exported = export(folder, tmp_path / "export", (4, 8))
    assert exported.weights_hash != plain.weights_hash
    ref = exported.tensors(FOUR)["layers.0.o.weight"]
    kept = dict(rounding.items())["model.layers.0.self_attn.o_proj", 4]
    assert (exported.read(ref) == kept.integers.numpy()).all()
    rounding_file(folder).write_bytes(b"damaged")
    with pytest.raises(InputError, match="damaged"):
        Rounding.load(folder)


def test_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    model = load(make_tiny_model(tmp_path / "model"))
    with pytest.raises(InputError, match="too few to round weights by"):
        calibrated(model, torch.zeros((2, 8), dtype=torch.long))


def test_nothing_is_rounded_where_no_bits_lose_anything(tmp_path: Path) -> None:
    model = load(make_tiny_model(tmp_path / "model"))
    assert len(calibrated(model, torch.zeros((1, 8), dtype=torch.long), (8,))) == 0
