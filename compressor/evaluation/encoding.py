"""Requests become token sequences with scored positions, exactly as lm-eval's own model makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 2048
_UNSET_LENGTH = 10**9
"""Tokenizers without a limit of their own say about 1e30."""


@dataclass(frozen=True)
class Encoded:
    """A sequence whose last ``scored`` tokens are to be scored, each given all before it."""

    ids: tuple[int, ...]
    scored: int
    truncated: bool = False

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: the last token is only predicted."""
        return self.ids[:-1]


@dataclass(frozen=True)
class Encoder:
    """Tokenizes as lm-eval's HFLM does, for a model that takes ``max_length`` tokens."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int = DEFAULT_MAX_LENGTH

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Of (context, continuation) pairs. Raises ``InputError`` on an empty continuation."""
        split = [_move_spaces(context, continuation) for context, continuation in pairs]
        contexts = list(dict.fromkeys(context for context, _ in split if context))
        context_ids = dict(zip(contexts, self._tokens(contexts), strict=True))
        whole_ids = self._tokens([context + continuation for context, continuation in split])
        encoded = []
        for (context, continuation), whole in zip(split, whole_ids, strict=True):
            if not continuation:
                raise InputError(f"an empty choice cannot be scored (after {context[-60:]!r}): give it text")
            encoded.append(self._pair(context_ids.get(context), whole, continuation))
        return encoded

    def encode_rolling(self, text: str) -> list[Encoded]:
        """A whole text as windows of ``max_length``, every token scored once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = get_rolling_token_windows(
            token_list=self._tokens([text])[0],
            prefix_token=self.prefix_token,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [
            Encoded((*context, *scored), len(scored))
            for context, scored in map(make_disjoint_window, windows)
        ]

    @property
    def prefix_token(self) -> int:
        """What stands before a text without context: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        token = bos if bos is not None else self.tokenizer.eos_token_id
        if not isinstance(token, int):
            raise InputError("the tokenizer has neither BOS nor EOS: a text without context needs one")
        return token

    def _pair(self, context: list[int] | None, whole: list[int], continuation: str) -> Encoded:
        if context is None:
            scored = self.tokenizer.encode(continuation, add_special_tokens=False)
            whole = scored if scored[0] == self.prefix_token else [self.prefix_token, *scored]
            context = whole[:1]
        scored_count = len(whole) - len(context)
        if scored_count < 1:
            raise InputError(
                f"the choice {continuation!r} has no tokens of its own after its context: reword it"
            )
        kept = tuple(whole[-(self.max_length + 1) :])
        return Encoded(kept, min(scored_count, len(kept) - 1), len(kept) < len(whole))

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; special tokens are added except where the text brings its own."""
        mark = self.tokenizer.decode([self.prefix_token])
        marked = [bool(mark) and text.startswith(mark) for text in texts]
        encoded: list[list[int]] = self.tokenizer(list(texts))["input_ids"] if texts else []
        for i in (i for i, has_mark in enumerate(marked) if has_mark):
            encoded[i] = self.tokenizer.encode(texts[i], add_special_tokens=False)
        return encoded


def max_length_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest input of a model in tokens: its positions, or its sliding window where that is shorter."""
    config: Any = model.config
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    known += [tokenizer.model_max_length] if tokenizer.model_max_length < _UNSET_LENGTH else []
    return min(known, default=DEFAULT_MAX_LENGTH)


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Spaces that end the context belong to the continuation, so that word boundaries stay."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation
