"""A run's front in LLM.int8, the INT8 of the paper (LLaMA-NAS, figure 5 and table 5): before and after.

Decoder linears become INT8 through bitsandbytes (Dettmers et al., arXiv 2208.07339), embeddings and head stay
in bf16. Sub-networks are scored on items that the search never saw.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from compressor.engines.hf_folder import write_hf_folder
from compressor.errors import InputError
from compressor.events import Listener, StageFinished, StageProgress, StageStarted
from compressor.ledger import Key, Row
from compressor.models import quiet_progress
from compressor.pipeline.aside import free_gpu
from compressor.pipeline.base import compute_device
from compressor.pipeline.candidates import known_outcomes
from compressor.pipeline.run import Workshop, reopened
from compressor.runfolder import write_json
from compressor.search.front import pareto_front
from compressor.space import SubNetwork
from compressor.supernet.folder import read_info

FORMS = {"bf16": "bf16-plain", "LLM.int8": "llm-int8"}
"""Of a sub-network, with the numerics that the ledger files its score under."""
SPLIT = "report"
RESULT, PLOT = "llm-int8.json", "llm-int8.png"


@dataclass(frozen=True)
class Taken:
    """Bytes of a form's weights and scales; accuracy on unseen items with its 95% interval."""

    weight_bytes: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class BeforeAndAfter:
    """A sub-network of the front in bf16 and in LLM.int8."""

    subnet: SubNetwork
    before: Taken
    after: Taken


def rescore(run: Path, listener: Listener) -> list[BeforeAndAfter]:
    """Score the front of a finished run before and after LLM.int8, each sub-network once; the largest first.

    Leaves ``llm-int8.json`` in the run's folder and a plot beside its report. Raises ``InputError`` where
    the run has no front yet.
    """
    with reopened(run, listener) as workshop:
        front = pareto_front(workshop.problem, known_outcomes(workshop.context.ledger, workshop.terms))
        if not front:
            raise InputError(f"{run} has no front yet: `compress --run {run} --resume` goes on with it")
        subnets = [outcome.subnet for outcome in front]
        listener(StageStarted("llm-int8", "Scoring the front in LLM.int8", len(subnets), "sub-networks"))
        found = []
        for number, subnet in enumerate(subnets):
            found.append(BeforeAndAfter(subnet, *(_taken(workshop, subnet, form) for form in FORMS)))
            listener(StageProgress("llm-int8", number + 1, len(subnets)))
        listener(StageFinished("llm-int8", 0.0))
        name = workshop.task.name
    found.sort(key=lambda one: -one.before.weight_bytes)
    write_json(run / RESULT, {"task": name, "rows": json.loads(json.dumps([asdict(one) for one in found]))})
    _plot(found, name, run / "report" / PLOT)
    return found


def table(found: list[BeforeAndAfter]) -> Table:
    """A row a sub-network, as the paper's table 5."""
    columns = ("layers", "mean width", "bf16", "LLM.int8", "accuracy in bf16", "in LLM.int8", "change")
    shown = Table(*columns, title="The front before and after LLM.int8", title_justify="left")
    for one in found:
        before, after = one.before, one.after
        shown.add_row(
            str(one.subnet.depth),
            f"{np.mean(one.subnet.widths):.0f}",
            f"{before.weight_bytes / 1e6:.1f} MB",
            f"{after.weight_bytes / 1e6:.1f} MB",
            f"{before.accuracy:.1%} ({before.low:.1%} to {before.high:.1%})",
            f"{after.accuracy:.1%} ({after.low:.1%} to {after.high:.1%})",
            f"{after.accuracy - before.accuracy:+.1%}",
        )
    return shown


def _taken(workshop: Workshop, subnet: SubNetwork, form: str) -> Taken:
    """From the ledger, or by loading and scoring the form now."""
    context, task = workshop.context, workshop.task
    supernet = context.folder.weights_of(subnet.digest).supernet
    key = Key(subnet.digest, read_info(supernet).weights_hash, task.key(SPLIT), FORMS[form])
    row = context.ledger.get(key)
    if row is None:
        model = _load(supernet, subnet, context.folder.path / "llm-int8-scratch", form)
        score = task.score_model(model, SPLIT)
        details = {"weight_bytes": stored_bytes(model)}
        row = context.ledger.put(Row(key, subnet, score.metrics(), details=details, items=score.items))
        del model
        free_gpu()
    figures = (row.metrics[name] for name in ("accuracy", "accuracy_low", "accuracy_high"))
    return Taken(int(str(row.details["weight_bytes"])), *figures)


def _load(supernet: Path, subnet: SubNetwork, folder: Path, form: str) -> PreTrainedModel:
    """The sub-network alone, loaded as anybody loads a Hugging Face folder."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of its fp16 at every matrix
    shutil.rmtree(folder, ignore_errors=True)
    try:
        write_hf_folder(supernet, subnet, folder, {})
        settings = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)} if form != "bf16" else {}
        with quiet_progress():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder,
                trust_remote_code=True,
                dtype=torch.bfloat16,
                device_map={"": compute_device()},
                **settings,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return model.eval()


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights and scales, those that two modules share once."""
    held = {t.data_ptr(): t.nbytes for t in model.state_dict().values() if isinstance(t, torch.Tensor)}
    return sum(held.values())


def _plot(found: list[BeforeAndAfter], task: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for label, taken, marker in (
        ("bf16", [one.before for one in found], "o"),
        ("LLM.int8", [one.after for one in found], "s"),
    ):
        spread = np.array([[t.accuracy - t.low, t.high - t.accuracy] for t in taken]).T.clip(0)
        sizes = [t.weight_bytes / 1e6 for t in taken]
        axes.errorbar(sizes, [t.accuracy for t in taken], spread, fmt=marker, capsize=2, label=label)
    axes.set(xlabel="weights, MB", ylabel=f"{task} on unseen items")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
