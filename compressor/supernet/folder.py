"""The super-network on disk: a Hugging Face folder with ``supernet.json`` beside the weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compressor import models
from compressor.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

INFO_NAME = "supernet.json"


@dataclass(frozen=True)
class SupernetInfo:
    """What the weights alone don't tell. ``drop_order``: layers, the first to go first."""

    drop_order: tuple[int, ...]
    ordering: str
    weights_hash: str


def save_supernet(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drop_order: tuple[int, ...],
    ordering: str,
    folder: Path,
) -> SupernetInfo:
    """Write the super-network, neurons sorted already; ``supernet.json`` comes last, so it marks success."""
    info_path = folder / INFO_NAME
    info_path.unlink(missing_ok=True)
    with models.quiet_progress():
        model.save_pretrained(folder)
        models.save_tokenizer(tokenizer, folder)
    return write_info(folder, tuple(drop_order), ordering)


def write_info(folder: Path, drop_order: tuple[int, ...], ordering: str) -> SupernetInfo:
    """Mark a model folder as a whole super-network with this order of layers and neurons."""
    info_path = folder / INFO_NAME
    info = SupernetInfo(drop_order, ordering, weights_hash(folder))
    scratch = info_path.with_suffix(".tmp")
    scratch.write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
    scratch.replace(info_path)
    return info


def load_supernet(
    folder: Path, dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, SupernetInfo]:
    """The super-network in evaluation mode, its tokenizer, and what ``supernet.json`` says."""
    info = read_info(folder)
    loaded = models.load(models.resolve(str(folder)), dtype)
    return loaded.model, loaded.tokenizer, info


def read_info(folder: Path) -> SupernetInfo:
    """Raises ``InputError`` where the folder holds no finished super-network."""
    path = folder / INFO_NAME
    if not path.is_file():
        raise InputError(f"{folder} holds no super-network (no {INFO_NAME}): let the run finish that stage")
    data = json.loads(path.read_text(encoding="utf-8"))
    return SupernetInfo(tuple(data["drop_order"]), data["ordering"], data["weights_hash"])


def weights_hash(folder: Path) -> str:
    """sha256 (hex) over every tensor of the folder's safetensors: name, dtype, shape and bytes."""
    from safetensors import safe_open

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stream:
            tensors.update(dict.fromkeys(stream.keys(), path))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        with safe_open(tensors[name], framework="pt") as stream:
            tensor = stream.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
