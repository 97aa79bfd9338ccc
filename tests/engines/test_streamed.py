"""A sub-network's logits without the whole model in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from compressor.engines.streamed import streamed_logits
from compressor.errors import InputError
from compressor.space import SubNetwork
from compressor.supernet.elastic import Elastic
from tests.conftest import make_tiny_model
from tests.engines.reference import logits
from tests.supernet.conftest import FAMILIES, make_model

IDS = np.arange(10, 50, dtype=np.int64)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2-sliding"])
@pytest.mark.parametrize(
    "subnet", [SubNetwork((0, 2), (32, 64)), SubNetwork((0, 1, 2), (64,) * 3)], ids=["cut", "whole"]
)
def test_logits_are_those_of_the_sub_network(tmp_path: Path, family: str, subnet: SubNetwork) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    with Elastic(model).activated(subnet) as active:
        expected = logits(active, IDS[None])[0]
    np.testing.assert_allclose(streamed_logits(tmp_path, subnet, IDS), expected, atol=1e-5)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        streamed_logits(folder, SubNetwork((0,), (64,)), IDS)
