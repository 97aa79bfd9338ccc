"""Answers the wizard's questions in a process of its own, so that the screens never wait for torch.

``python -m tui.probe QUESTION JSON`` prints one JSON line: ``{"answer": ...}`` or ``{"error": ...}``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressor.device import Machine
from compressor.errors import CompressorError, InputError
from compressor.request import RunRequest
from tui import facts


class Probe:
    """Asks the questions. One process a question; a cancelled question's process is ended."""

    async def machine(self) -> Machine:
        return facts.machine_from_dict(await self._ask("machine", {}))

    async def model(self, source: str) -> facts.ModelFacts:
        """Raises ``InputError`` if there is no such model or it cannot be used."""
        return facts.model_from_dict(await self._ask("model", {"source": source}))

    async def plan(self, request: RunRequest, parent: Path) -> facts.PlanFacts:
        """Raises ``InputError`` with what stands in the run's way."""
        return facts.plan_from_dict(
            await self._ask("plan", {"request": request.model_dump(mode="json"), "parent": str(parent)})
        )

    async def _ask(self, question: str, details: dict[str, Any]) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "tui.probe", question, json.dumps(details)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            printed, complaints = await process.communicate()
        except asyncio.CancelledError:
            if process.returncode is None:
                process.kill()
                await process.wait()
            raise
        return understood(printed.decode(errors="replace"), complaints.decode(errors="replace"))


def understood(printed: str, complaints: str) -> dict[str, Any]:
    """The answer in what the process printed. Raises ``InputError`` with the message it gave instead."""
    try:
        reply = json.loads(printed.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = (complaints.strip().splitlines() or ["it printed nothing"])[-1]
        raise InputError(f"the check itself failed ({last}): try again, or run `compress doctor`") from None
    if "error" in reply:
        raise InputError(reply["error"])
    return dict(reply["answer"])


def main(arguments: list[str]) -> None:
    question, details = arguments
    reply: dict[str, Any]
    try:
        reply = {"answer": QUESTIONS[question](**json.loads(details))}
    except CompressorError as error:
        reply = {"error": " ".join(str(error).split())}
    print(json.dumps(reply))


def answer_machine() -> dict[str, Any]:
    from compressor import device

    return facts.to_dict(device.detect())


def answer_model(source: str) -> dict[str, Any]:
    from compressor import models
    from compressor.space import SearchSpace, parameter_count

    found = models.resolve(source)
    shape = models.read_shape(found)
    full = SearchSpace(shape, (shape.num_layers,), (shape.intermediate_size,)).full
    return facts.to_dict(
        facts.ModelFacts(found.name, found.kind, found.license, parameter_count(shape, full), shape)
    )


def answer_plan(request: dict[str, Any], parent: str) -> dict[str, Any]:
    from compressor import device
    from compressor.pipeline.plan import make_plan
    from compressor.space import parameter_count

    plan = make_plan(RunRequest.model_validate(request), device.detect(), Path(parent))
    return facts.to_dict(
        facts.PlanFacts(
            model=plan.source.name,
            layers=plan.shape.num_layers,
            parameters=parameter_count(plan.shape, plan.space.full),
            encodings=plan.space.num_encodings,
            distinct=plan.space.num_distinct,
            depths=plan.space.depths,
            widths=plan.space.widths,
            evaluations=plan.evaluations,
            stage_seconds=plan.stage_seconds,
            peak_memory_bytes=plan.peak_memory_bytes,
            disk_bytes=plan.disk_bytes,
            full_weight_bytes=plan.full_weight_bytes,
            full_memory_bytes=plan.full_memory.total,
            smallest_memory_bytes=plan.smallest_memory.total,
            warnings=plan.warnings,
        )
    )


QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "machine": answer_machine,
    "model": answer_model,
    "plan": answer_plan,
}

if __name__ == "__main__":
    main(sys.argv[1:])
