"""What every stage of a run is given, and how a stage is run once and then remembered."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compressor import cpu, device
from compressor.cluster import Cluster
from compressor.device import Machine
from compressor.engines.apart import bench_apart
from compressor.events import Event, Listener, Message, StageFinished, StageStarted
from compressor.ledger import Ledger
from compressor.measurement import Measurement
from compressor.request import RunRequest
from compressor.runfolder import RunFolder

Result = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """One run: its folder, request, ledger, machine and listener, and the cluster if that measures."""

    folder: RunFolder
    request: RunRequest
    ledger: Ledger
    machine: Machine
    listener: Listener
    cluster: Cluster | None = None

    @cached_property
    def device_label(self) -> str:
        """What figures are filed under: the device that measures, this machine or a node of the cluster."""
        return self.cluster.device() if self.cluster else device.label(self.request.profile, self.machine)

    @property
    def measures_on_this_cpu(self) -> bool:
        return self.cluster is None and self.request.profile.device.kind == "cpu"

    @property
    def narrow(self) -> bool:
        """Whether INT8 weights for vLLM stay within 7 bits, for the device that serves."""
        return self.request.profile.device.kind == "cpu" and cpu.saturates(self.machine.isa)

    @property
    def bench(self) -> Callable[..., Measurement]:
        """``apart.bench_apart``, or the same on a node of the cluster."""
        return self.cluster.bench if self.cluster else bench_apart

    def say(self, text: str) -> None:
        self.listener(Message(text))

    def warn(self, text: str) -> None:
        self.listener(Message(text, "warning"))


def run_stage(
    context: Context,
    stage: str,
    title: str,
    inputs: Mapping[str, Any],
    work: Callable[[], Result],
    total: int = 0,
    unit: str = "steps",
) -> Result:
    """Do the stage, or skip it if it finished before with the same inputs; its result either way."""
    context.listener(StageStarted(stage, title, total, unit))
    if context.folder.is_done(stage, inputs):
        context.listener(StageFinished(stage, 0.0, skipped=True))
        return context.folder.result(stage)
    began = time.monotonic()
    result = work()
    context.folder.mark_done(stage, inputs, result)
    context.listener(StageFinished(stage, time.monotonic() - began))
    return result


@contextmanager
def logged(listener: Listener, path: Path) -> Iterator[Listener]:
    """A listener that also writes every event as a JSON line, for whoever attaches to the run."""
    with path.open("a", encoding="utf-8", buffering=1) as stream:

        def listen(event: Event) -> None:
            stream.write(json.dumps({**event.to_dict(), "time": time.time()}) + "\n")
            listener(event)

        yield listen
