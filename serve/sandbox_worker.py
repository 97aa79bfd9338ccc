"""``python -m serve.sandbox_worker``: the process for work on strangers' input that may take for ever.

Reads requests from standard input and writes replies to standard output, each a length and a marshalled
value. A request that takes more processor time than allowed ends the process, whatever it is doing; so
does one that takes too much memory, if Python can't say so first. The parent starts another (sandbox.py).
"""

from __future__ import annotations

import contextlib
import gc
import json
import marshal
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from compressor.chat_template import ChatTemplates, TemplateRefusalError, read_templates
from compressor.grammar import Form, build, open_vocabulary

MEMORY_BYTES = 2 << 30
MAX_VALUES = 250_000  # of a JSON text: more would hold up whoever takes them over
MAX_PROMPT = 16 << 20  # characters
MASK_SECONDS = 0.05
NICENESS = 10
PROBED_TOKENS = 4


class RefusedError(Exception):
    """What the sender must change."""


def main() -> int:
    """Answer until standard input ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    _confine()
    handlers = _handlers(folder)
    gc.disable()  # values come and go whole
    while frame := _read(source):
        kind, payload = marshal.loads(frame)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
        reply = _answer(handlers[kind], payload)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(sink, marshal.dumps(reply))
        if len(frame) > 1 << 16:
            gc.collect()
    return 0


def _answer(handler: Callable[[Any], Any], payload: Any) -> tuple[bool, Any]:
    try:
        return True, handler(payload)
    except (RefusedError, TemplateRefusalError) as error:
        return False, str(error)
    except RecursionError:
        return False, "it is nested too deeply"
    except MemoryError:
        return False, "it takes too much memory"


def _confine() -> None:
    """Less to run with than the server has: it goes first, and Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        os.nice(NICENESS)


def _handlers(folder: Path) -> dict[str, Callable[[Any], Any]]:
    templates: list[ChatTemplates | None] = []
    vocabularies: list[Any] = []

    def render(payload: dict[str, Any]) -> str:
        if not templates:
            templates.append(read_templates(folder))
        if templates[0] is None:
            raise RefusedError("there is no chat template")
        text = templates[0].render(**payload)
        if len(text) > MAX_PROMPT:
            raise RefusedError(f"it renders more than {MAX_PROMPT} characters")
        return text

    def compile_grammar(payload: tuple[Form, str, int, list[int]]) -> None:
        form, text, vocabulary, ends = payload
        if not vocabularies:
            vocabularies.append(open_vocabulary(folder / "tokenizer.json", vocabulary, ends))
        _prove_grammar(vocabularies[0], form, text)

    return {"json": read_json, "render": render, "grammar": compile_grammar}


def read_json(raw: bytes) -> Any:
    """A JSON text's value. Raises ``RefusedError`` for what is none, or holds too many values."""
    try:
        value = json.loads(raw)
    except ValueError:
        raise RefusedError("the body is not valid JSON") from None
    except RecursionError:
        raise RefusedError("the body is nested too deeply") from None
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_VALUES and _values(value) > MAX_VALUES:
        raise RefusedError(f"the body holds more than {MAX_VALUES} JSON values: send less")
    return value


def _values(value: Any) -> int:
    """How many values a value holds, itself included; counted no further than needed."""
    count, unseen = 0, [value]
    while unseen and count <= MAX_VALUES:
        item = unseen.pop()
        count += 1
        if isinstance(item, dict):
            unseen.extend(item.values())
        elif isinstance(item, list):
            unseen.extend(item)
    return count


def _prove_grammar(vocabulary: Any, form: Form, text: str) -> None:
    """Compile a grammar and follow it for a few tokens. Raises ``RefusedError``."""
    try:
        matcher = build(vocabulary, form, text)
    except ValueError as error:
        raise RefusedError(str(error)) from None
    for _ in range(PROBED_TOKENS):
        began = time.process_time()
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise RefusedError("it is too complex")
        if time.process_time() - began > MASK_SECONDS:
            raise RefusedError("it is too complex: it allows too much at once")
        token = next((8 * index + _lowest_bit(byte) for index, byte in enumerate(mask) if byte), None)
        if token is None or matcher.is_stopped():
            return
        if not matcher.consume_token(token):
            raise RefusedError("it is too complex")


def _lowest_bit(byte: int) -> int:
    return (byte & -byte).bit_length() - 1


def _read(source: BinaryIO) -> bytes:
    head = source.read(4)
    return source.read(int.from_bytes(head, "little")) if len(head) == 4 else b""


def _write(sink: BinaryIO, frame: bytes) -> None:
    sink.write(len(frame).to_bytes(4, "little") + frame)
    sink.flush()


if __name__ == "__main__":
    sys.exit(main())
