"""Training data as token ids: of files and the hub by ``rows``, or what the model writes itself.

Short examples are packed end to end into rows of one length, so that no step computes padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.events import Listener, Message, ignore
from compressor.supernet.losses import IGNORED
from compressor.supernet.rows import Piece, read_pieces
from compressor.supernet.sampling import leading_ids, sample_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Examples", "load_training_data", "sample_text"]


@dataclass(frozen=True)
class Examples:
    """Token ids (examples, length) and labels of the same shape; ``IGNORED`` labels do not count."""

    ids: Tensor
    labels: Tensor

    @classmethod
    def of_text(cls, ids: Tensor) -> Examples:
        """Every token counts."""
        return cls(ids, ids)

    @property
    def learnable(self) -> Tensor:
        """(examples,) whether anything in a row counts; the first token is nobody's next one."""
        return (self.labels[:, 1:] != IGNORED).any(dim=1)

    def some(self, count: int, seed: int) -> Examples:
        """``count`` rows, drawn without repeats; all of them where there are no more."""
        if count >= len(self.ids):
            return self
        chosen = torch.randperm(len(self.ids), generator=torch.Generator().manual_seed(seed))[:count]
        return Examples(self.ids[chosen], self.labels[chosen])

    def split(self, held_out: int) -> tuple[Examples, Examples]:
        """(all but the last ``held_out`` rows, those)."""
        cut = len(self.ids) - held_out
        return Examples(self.ids[:cut], self.labels[:cut]), Examples(self.ids[cut:], self.labels[cut:])


def load_training_data(
    source: str, tokenizer: PreTrainedTokenizerBase, max_len: int, listener: Listener = ignore
) -> Examples:
    """Rows of ``max_len`` tokens from a file or the hub; of Alpaca rows only the response counts.

    See ``rows.read_pieces`` for what is read. Raises ``InputError`` where that is broken or too short.
    """
    return _pack(source, read_pieces(source, listener), tokenizer, max_len, listener)


def _pack(source: str, pieces: list[Piece], tokenizer: Any, max_len: int, listener: Listener) -> Examples:
    """All pieces end to end, each closed by the end-of-sequence token if there is one, cut into rows."""
    ids: list[int] = []
    labels: list[int] = []
    begin, end = leading_ids(tokenizer), tokenizer.eos_token_id
    if end is None:
        listener(
            Message(
                f"the model's tokenizer has no end token: it cannot learn from {source} to end", "warning"
            )
        )
    for piece in pieces:
        prompt = [*begin, *_encoded(tokenizer, piece.prompt)] if piece.prompt else []
        response = _encoded(tokenizer, piece.response) + ([] if end is None else [end])
        response = response if prompt else begin + response
        ids += prompt + response
        labels += [IGNORED] * len(prompt) + response
    rows = len(ids) // max_len
    if rows == 0:
        raise InputError(f"{source} holds {len(ids)} tokens, fewer than one row of {max_len}: give more text")
    shape = (rows, max_len)
    cut = rows * max_len
    return Examples(torch.tensor(ids[:cut]).view(shape), torch.tensor(labels[:cut]).view(shape))


def _encoded(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
