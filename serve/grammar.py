"""Grammars that generated text must obey: any JSON object, a JSON schema, a tool's call.

Each is compiled in the sandbox first, where that can be ended; what passes there is compiled here, in a
thread that leaves the interpreter to others, and kept for the next request that asks for it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.grammar import AVAILABLE, Form, build, open_vocabulary, tagged
from serve.errors import bad_request
from serve.sandbox import RefusalError, Sandbox
from serve.threads import background

KEPT = 64  # grammars, compiled or found wanting
MAX_CHARACTERS = 1 << 20  # of a schema
SLOW_MASK_SECONDS = 0.001  # from which on the next mask is computed while the model computes


class Grammars:
    """Grammars over one model's vocabulary."""

    def __init__(
        self, tokenizer: Path, vocabulary: int, eos_tokens: frozenset[int], sandbox: Sandbox
    ) -> None:
        self._size = vocabulary
        self._ends = sorted(eos_tokens)
        self._sandbox = sandbox
        self._vocabulary = open_vocabulary(tokenizer, vocabulary, self._ends) if AVAILABLE else None
        self._known: OrderedDict[tuple[Form, str], Any] = OrderedDict()  # a matcher, or what is wrong
        self._turn = asyncio.Lock()
        self._threads = background("grammars", 1)

    async def json_schema(
        self, schema: Mapping[str, Any], count: int, param: str = "response_format"
    ) -> list[GrammarConstraint]:
        """``count`` constraints to JSON of this schema. Raises ``ApiError`` if it can't be obeyed."""
        return await self._constraints("json", json.dumps(schema), count, "the JSON schema", param)

    async def tagged_json(
        self, schema: Mapping[str, Any], before: str, after: str, count: int, param: str = "tools"
    ) -> list[GrammarConstraint]:
        """The same between two fixed strings."""
        text = tagged(schema, before, after)
        return await self._constraints("tagged", text, count, "the tools' parameters", param)

    async def _constraints(
        self, form: Form, text: str, count: int, name: str, param: str
    ) -> list[GrammarConstraint]:
        if self._vocabulary is None:
            raise bad_request("this server has no grammar library: pip install llguidance", param)
        if len(text) > MAX_CHARACTERS:
            raise bad_request(f"{name} can't be obeyed: more than {MAX_CHARACTERS} characters", param)
        if (form, text) not in self._known:
            async with self._turn:
                if (form, text) not in self._known:
                    self._keep((form, text), await self._compile(form, text))
        self._known.move_to_end((form, text))
        matcher = self._known[form, text]
        if isinstance(matcher, str):
            raise bad_request(f"{name} can't be obeyed: {matcher}", param)
        return [
            GrammarConstraint(matcher.deep_copy(), self._vocabulary.vocab_size, self._size, self._threads)
            for _ in range(count)
        ]

    async def _compile(self, form: Form, text: str) -> Any:
        """A matcher, or why there is none."""
        try:
            await self._sandbox.ask("grammar", (form, text, self._size, self._ends))
        except RefusalError as error:
            return str(error)
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, build, self._vocabulary, form, text)
        except ValueError as error:
            return str(error)

    def _keep(self, key: tuple[Form, str], matcher: Any) -> None:
        self._known[key] = matcher
        while len(self._known) > KEPT:
            self._known.popitem(last=False)


class GrammarConstraint:
    """What may come next in one sequence."""

    def __init__(self, matcher: Any, known: int, vocabulary: int, threads: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._mask = np.full((known + 31) // 32, -1, np.int32)
        self._vocabulary = vocabulary
        self._threads = threads
        self._coming: Future[None] | None = None
        self._slow = False

    def forbidden(self) -> npt.NDArray[np.bool_]:
        """True for tokens that would break the grammar, [vocabulary]. Raises ``ApiError`` where it has
        become too complex to follow."""
        if self._coming is not None:
            self._coming.result()
            self._coming = None
        else:
            self._fill()
        self._check()
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._vocabulary]
        return bits == 0

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()
        if self._slow:
            self._coming = self._threads.submit(self._fill)

    def _fill(self) -> None:
        began = time.monotonic()
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._slow = time.monotonic() - began > SLOW_MASK_SECONDS

    def _check(self) -> None:
        if self._matcher.is_error():
            raise bad_request(
                "the text can't be held to this schema any longer, it is too complex: simplify it",
                "response_format",
            )
