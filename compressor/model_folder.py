"""A Hugging Face folder read before it is loaded: configuration, weights, tokenizer, habits of generation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressor import config_fields
from compressor.errors import InputError
from compressor.space import ModelShape
from compressor.weight_files import check_weights, read_places

TOKENIZER_FILE = "tokenizer.json"


def check_folder(folder: Path, name: str = "") -> None:
    """Raise ``InputError`` for the first thing in a model's folder that would not be loaded exactly.

    Reads headers only. ``name`` is what the user calls it, the folder's path unless given.
    """
    from compressor.models import shape_of_config

    where = name or str(folder)
    config = read_json(folder / "config.json")
    config_fields.check_config(where, config)
    if (folder / "hf_quant_config.json").is_file():
        raise InputError(
            f"{where} is quantized (it has a hf_quant_config.json): name the model it was made from, in "
            "bf16, fp16 or fp32, or a GGUF file of it"
        )
    places = read_places(folder)
    shape = _shape(where, folder, shape_of_config)
    check_weights(folder, places, shape)
    _check_tokenizer(where, folder, config, shape)
    if (generation := folder / "generation_config.json").is_file():
        _check_generation(where, read_json(generation), shape)


def read_json(path: Path) -> dict[str, Any]:
    """An object in a model's folder. Raises ``InputError``."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise InputError(f"{path} begins with a byte order mark: save it as UTF-8 without one")
        value = json.loads(text)
    except (ValueError, OSError, RecursionError):
        raise InputError(f"{path} is not readable JSON: copy the model folder again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not readable JSON of the kind expected: copy the model folder again")
    return value


def _shape(where: str, folder: Path, shape_of_config: Any) -> ModelShape:
    from transformers import AutoConfig

    try:
        shape: ModelShape = shape_of_config(AutoConfig.from_pretrained(folder))
    except Exception as error:  # checks of the configuration's own class, of many kinds
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{where}: its config.json is not that of a model ({reason}): correct it") from None
    return shape


def _check_tokenizer(where: str, folder: Path, config: Mapping[str, Any], shape: ModelShape) -> None:
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return
        if (folder / "tokenizer.model").is_file():
            raise InputError(
                f"{where} has a tokenizer.model and no {TOKENIZER_FILE}: make one (pip install "
                "sentencepiece, then AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)), or copy "
                "it from the hub"
            )
        raise InputError(f"{where} has no tokenizer ({TOKENIZER_FILE}): copy the model folder again")
    outside = [(number, token) for number, token in _tokens(path) if number >= shape.vocab_size]
    padding = (config.get("pad_token_id"), shape.vocab_size)
    stranger = next((entry for entry in outside if entry[0] not in padding), None)
    if stranger is not None:
        raise InputError(
            f"{where}: its tokenizer has the token {stranger[1]!r} as number {stranger[0]}, its model "
            f"{shape.vocab_size} tokens (vocab_size): fetch both from the same place"
        )


def _tokens(path: Path) -> Iterator[tuple[int, str]]:
    description = read_json(path)
    try:
        vocabulary = description["model"]["vocab"]
        if isinstance(vocabulary, Mapping):
            yield from ((int(number), str(token)) for token, number in vocabulary.items())
        else:
            yield from ((number, str(entry[0])) for number, entry in enumerate(vocabulary))
        yield from (
            (int(entry["id"]), str(entry["content"])) for entry in description.get("added_tokens", ())
        )
    except (KeyError, TypeError, ValueError, IndexError):
        raise InputError(f"{path} is no tokenizer of a known form: copy the model folder again") from None


def _check_generation(where: str, generation: Mapping[str, Any], shape: ModelShape) -> None:
    ends = generation.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and not (isinstance(end, int) and 0 <= end < shape.vocab_size):
            raise InputError(
                f"{where}: in its generation_config.json eos_token_id is {end}, none of the model's "
                f"{shape.vocab_size} tokens: correct it there"
            )
