"""A run from its request to its verdict, and what can be asked of it afterwards."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compressor import device
from compressor.cluster import Cluster, joined
from compressor.engines import verify_package
from compressor.engines.host import require_free_gpu, require_free_memory
from compressor.engines.rounding import RoundedWeights
from compressor.errors import InputError, RunConflictError
from compressor.evaluation.agreement import AgreementText
from compressor.evaluation.racing import Raced
from compressor.evaluation.score import Score
from compressor.evaluation.shared_layers import SharedLayers
from compressor.events import Listener, RunFinished, StageFinished, StageProgress, StageStarted
from compressor.ledger import open_ledger
from compressor.measurement import Measurement
from compressor.pipeline.accuracy import AccuracyTask, check_tasks, make_accuracy_task
from compressor.pipeline.aside import Aside, free_gpu
from compressor.pipeline.base import compute_device, compute_dtype, load_base, load_to_compute
from compressor.pipeline.candidates import Evaluator, Terms, known_outcomes
from compressor.pipeline.context import Context, Result, logged, run_stage
from compressor.pipeline.deliver import package
from compressor.pipeline.failures import CIRCUMSTANCE
from compressor.pipeline.needs import ROUND
from compressor.pipeline.plan import Plan, make_plan
from compressor.pipeline.prepare import export_tuned, prepare
from compressor.pipeline.racing import rivals
from compressor.pipeline.references import ReferenceSet
from compressor.pipeline.report_data import collect, known_comparisons
from compressor.pipeline.rounding import lossy_bits, rounding_of
from compressor.pipeline.searching import make_problem, search
from compressor.pipeline.targets import Target, check_target, make_target
from compressor.pipeline.tuning import tune_alone, tuned_stage, tuning_inputs
from compressor.pipeline.verdict import Verdict
from compressor.pipeline.winner import FINAL_SECONDS_FACTOR, Finalist, decide, finish, winner_of
from compressor.report.data import ReportData
from compressor.report.html import report as write_page
from compressor.request import RunRequest, stored_request
from compressor.runfolder import RunFolder, Weights, write_json
from compressor.search.front import pareto_front
from compressor.search.problem import Outcome, Problem
from compressor.space import Numerics, SearchSpace, SubNetwork
from compressor.supernet.elastic import Elastic
from compressor.supernet.folder import SupernetInfo, load_supernet, read_info

PICKS: Mapping[str, Callable[[Outcome], float]] = {
    "best": lambda outcome: outcome.values["accuracy"],
    "smallest": lambda outcome: -outcome.values["weight_bytes"],
    "fastest": lambda outcome: outcome.values["throughput_tok_s"],
}
"""Rules to pick from the front by: the one of which this is largest."""


class Workshop:
    """What evaluating in this run needs, loaded when first used."""

    def __init__(
        self,
        context: Context,
        plan: Plan,
        info: SupernetInfo,
        space: SearchSpace,
        weights: Weights | None = None,
    ) -> None:
        self.context = context
        self.plan = plan
        self.info = info
        self.space = space
        self.weights = weights or context.folder.searched
        self.text = AgreementText.load(context.folder.text)

    @cached_property
    def supernet(self) -> Elastic:
        """What sub-networks are scored in: with its weights as they are, or rounded where that sets them
        apart, as 4 bits do and 8 don't."""
        model, _, _ = load_supernet(self.weights.supernet, compute_dtype(self.context))
        model.to(compute_device())
        if not self._rounds:
            return Elastic(model)
        return Elastic(
            model,
            RoundedWeights(
                model, self.space.bits, self.space.outer_bits, rounding_of(self.context, self.weights)
            ).choose,
        )

    @cached_property
    def aside(self) -> Aside:
        """The super-network's way off the GPU, for as long as vLLM measures there."""
        self.supernet.reset()
        return Aside(self.supernet.model)

    @property
    def alternates(self) -> bool:
        """Whether scoring and measuring take turns on the GPU, for which both together are too large."""
        return not self.plan.choices.keeps_both

    @cached_property
    def shared(self) -> SharedLayers:
        """What this search's sub-networks begin with, computed once."""
        return SharedLayers(self.supernet.model, lambda: self.supernet.active)

    @property
    def _rounds(self) -> bool:
        return bool(lossy_bits(self.space))

    @property
    def _score_numerics(self) -> Numerics:
        if self._rounds:
            return self.context.request.profile.numerics
        return "fp32" if compute_dtype(self.context) == torch.float32 else "bf16"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.context.folder.supernet)

    @cached_property
    def target(self) -> Target:
        return make_target(self.context, self.space.full, self.weights)

    @cached_property
    def task(self) -> AccuracyTask:
        length = self.plan.shape.max_position_embeddings
        return make_accuracy_task(self.context.request, self.text, self.tokenizer, length)

    @cached_property
    def terms(self) -> Terms:
        profile = self.context.request.profile
        terms = Terms(
            shape=self.plan.shape,
            weights=self.info.weights_hash,
            task_key=self.task.key("search"),
            score_numerics=self._score_numerics,
            numerics=profile.numerics,
            device=self.context.device_label,
            engine=profile.engine,
            workload=profile.workload,
            racing=self.context.request.races,
        )
        free = self.weights == self.context.folder.unpruned
        return terms.of_unpruned(terms.weights) if free else terms

    @cached_property
    def unpruned(self) -> Workshop:
        """The same with the model's own weights, as anybody has them for free."""
        return self.of(self.context.folder.unpruned)

    def bench_of(self, outcome: Outcome) -> Workshop:
        """What an outcome is evaluated with."""
        return self.unpruned if outcome.free else self

    @property
    def evaluator(self) -> Evaluator:
        race = self._race if self.terms.racing else None
        return Evaluator(
            self.context.ledger, self.terms, self._score, self._bench, race, make_room=self.put_away
        )

    @property
    def problem(self) -> Problem:
        return make_problem(self.context.request.profile, self.space, self.terms)

    @property
    def references(self) -> ReferenceSet:
        seconds = FINAL_SECONDS_FACTOR * self.context.request.effort.bench_seconds
        base = str(self.context.folder.result("base")["weights"])
        whole = SubNetwork(self.space.full.layers, self.space.full.widths)
        return ReferenceSet(self.context, self.target, self.task, whole, base, seconds)

    def put_away(self) -> None:
        """Free the memory that scoring and measuring hold; what they need is loaded again when asked for."""
        for name in ("aside", "supernet", "shared"):
            self.__dict__.pop(name, None)
        if "unpruned" in self.__dict__:
            self.unpruned.put_away()
        self.close()
        free_gpu()

    def of(self, weights: Weights) -> Workshop:
        """The same with other weights of the super-network; its task is not tokenized again."""
        other = Workshop(self.context, self.plan, read_info(weights.supernet), self.space, weights)
        other.task = self.task
        return other

    def picked(self, pick: str) -> Outcome:
        """What was evaluated of the sub-network that ``pick`` names: ``winner``, a rule, or its digest.

        Raises ``InputError``."""
        rivals = known_outcomes(self.context.ledger, self.unpruned.terms)
        outcomes = [*known_outcomes(self.context.ledger, self.terms), *rivals]
        front = pareto_front(self.problem, outcomes)
        if pick in PICKS and front:
            return max(front, key=PICKS[pick])
        digest = winner_of(self.context.folder).digest if pick == "winner" else pick
        named = [outcome for outcome in outcomes if outcome.subnet.digest == digest]
        if named:  # of the unpruned model's own weights and the super-network's, those that are better
            return max(named, key=lambda outcome: outcome.values.get("accuracy", 0.0))
        raise InputError(
            f"the run has no sub-network '{pick}': use winner, {', '.join(PICKS)}, or a digest of "
            "`compress replan`"
        )

    def close(self) -> None:
        if "unpruned" in self.__dict__:
            self.unpruned.close()
        self.target.close()

    def _score(self, subnet: SubNetwork) -> Score:
        self._take_gpu()
        with self.supernet.activated(subnet) as model:
            return self.task.score_model(model, "search", self.shared)

    def _race(self, subnet: SubNetwork) -> Raced:
        against = rivals(self.context.ledger, self.terms, self.problem, subnet)
        self._take_gpu()
        with self.supernet.activated(subnet) as model:
            return self.task.race_model(model, against, "search", self.shared)

    def _bench(self, subnet: SubNetwork) -> Measurement:
        if self.context.measures_on_this_cpu:
            require_free_memory(self.terms.memory_bytes(subnet))
        elif self.context.cluster is None:
            self._leave_gpu()
            require_free_gpu(self.terms.memory_bytes(subnet))
        return self.target.bench(subnet)

    def _take_gpu(self) -> None:
        """Bring the super-network back, if it left."""
        if "aside" in self.__dict__:
            self.aside.back()

    def _leave_gpu(self) -> None:
        """Let the super-network leave, where both don't fit; its rounded copies are rather made anew."""
        if not self.alternates or "supernet" not in self.__dict__:
            return
        self.__dict__.pop("shared", None)
        if self._rounds:
            for name in ("aside", "supernet"):
                self.__dict__.pop(name, None)
            free_gpu()
        else:
            self.aside.leave()


def execute(path: Path, request: RunRequest, listener: Listener) -> Verdict:
    """Do the run, or what is left of it. Raises ``CompressorError``; what was paid for is kept."""
    machine = device.detect()
    plan = make_plan(request, machine, path)
    request = plan.request
    check_target(request)
    check_tasks(request)
    folder = RunFolder.create_or_update(path, request.model_dump(mode="json"))
    with (
        folder.locked(),
        open_ledger(folder.ledger) as ledger,
        logged(listener, folder.events) as logging,
        target_cluster(request) as cluster,
    ):
        context = Context(folder, request, ledger, machine, logging, cluster)
        context.say(plan.summary())
        for warning in plan.warnings:
            context.warn(warning)
        if again := ledger.forget_failed(CIRCUMSTANCE):
            context.say(f"{again} evaluations that failed by circumstance are asked for again")
        info, space = prepare(context, plan)
        with closing(Workshop(context, plan, info, space)) as workshop:
            _pay_references(workshop)
            rivals = free_rivals(workshop)
            outcomes = [*rivals, *_search(workshop)]
            finalist = _package(workshop, outcomes)
        data = collect(
            context, plan, workshop.problem, workshop.task, outcomes, workshop.references, finalist
        )
        verdict = Verdict(folder.path, data)
        _report(context, verdict)
        logging(RunFinished(str(folder.path), verdict.to_dict()))
    return verdict


def target_cluster(request: RunRequest) -> AbstractContextManager[Cluster | None]:
    """The nodes of the profile's device, where the run measures on another machine."""
    return joined(request.cluster, request.profile.name) if request.cluster else nullcontext()


def _pay_references(workshop: Workshop) -> None:
    """Measure and score the unpruned model in bf16 and in the engine's quantized numerics."""
    context, references = workshop.context, workshop.references
    total = len(references.forms)
    inputs = {
        "base": references.weights,
        "task": [workshop.task.key(split) for split in workshop.task.splits],
        "workload": context.request.profile.workload.model_dump(),
        "device": context.device_label,
    }

    def work() -> Result:
        paying = references.pay(partial(load_base, context), partial(load_to_compute, context))
        for done, name in enumerate(paying):
            context.listener(StageProgress("references", done, total, name))
        return {}

    run_stage(context, "references", "Measuring the unpruned model", inputs, work, total, "references")


def free_rivals(workshop: Workshop) -> list[Outcome]:
    """The unpruned model in each number of bits that meets the memory budget, evaluated as sub-networks are:
    what a search must beat, and the winner where it doesn't."""
    own, problem = workshop.unpruned, workshop.problem
    found = [own.evaluator(subnet) for subnet in workshop.space.free if problem.allows(subnet)]
    own.put_away()
    return found


def _search(workshop: Workshop) -> list[Outcome]:
    context = workshop.context
    budget = context.request.effort.evaluations
    context.listener(StageStarted("search", "Searching sub-networks", budget, "sub-networks"))
    began = time.monotonic()
    together = ROUND if workshop.alternates else 1
    outcomes = search(context, workshop.problem, workshop.evaluator, together)
    context.folder.mark_done("search", {"evaluations": budget}, {"terms": workshop.terms.to_dict()})
    context.listener(StageFinished("search", time.monotonic() - began))
    return outcomes


def _package(workshop: Workshop, outcomes: list[Outcome]) -> Finalist:
    """Choose, measure again, score on unseen items, write and verify the package."""
    context, plan = workshop.context, workshop.plan
    context.listener(StageStarted("package", "Packaging the winner"))
    began = time.monotonic()
    finalist, choice = decide(context, workshop.bench_of, outcomes)
    workshop = workshop.bench_of(finalist.outcome)
    if choice.winner is not None and context.request.effort.winner_minutes:
        workshop, finalist = _tuned_alone(workshop, finalist)
    free = finalist.subnet.digest if finalist.outcome.free else None
    inputs = {"subnet": finalist.subnet.digest, "terms": workshop.terms.to_dict()}
    current = context.folder.is_done("package", inputs) and context.folder.package.is_dir()
    if not current:
        package(context, plan, workshop.target, workshop.task, finalist, context.folder.package)
        for line in verify_package(context.folder.package):
            context.say(line)
        result = {"divergence_nats": finalist.divergence_nats, "free": free}
        context.folder.mark_done("package", inputs, result)
    context.listener(StageFinished("package", time.monotonic() - began, skipped=current))
    return finalist


def _tuned_alone(workshop: Workshop, finalist: Finalist) -> tuple[Workshop, Finalist]:
    """The finalist after a fine-tuning of its own, where that makes it more accurate on the search's items
    and leaves it within the budgets; with the workshop of its weights."""
    context, subnet = workshop.context, finalist.subnet
    weights = tuned_weights(workshop, subnet)
    if weights is None:
        return workshop, finalist
    if context.request.profile.engine == "onnxruntime":
        export_tuned(context, workshop.space, subnet)
    own = workshop.of(weights)
    with closing(own):
        again = finish(context, own, replace(finalist.outcome, free=False), finalist)
    before, after = _accuracy(finalist), _accuracy(again)
    if again.within_budgets and after > before:
        context.say(f"tuned alone, the winner goes from {before:.1%} to {after:.1%} on the search's items")
        return own, replace(again, as_found=finalist.report_score)
    context.say("tuned alone, the winner is no better: it is packaged as it was found")
    shutil.rmtree(weights.supernet.parent, ignore_errors=True)
    return workshop, finalist


def tuned_weights(workshop: Workshop, subnet: SubNetwork) -> Weights | None:
    """A sub-network's weights after a fine-tuning of its own, done now unless it was; None where it was seen
    to bring nothing."""
    context = workshop.context
    minutes = context.request.effort.winner_minutes
    workshop.put_away()
    run_stage(
        context,
        tuned_stage(subnet),
        "Tuning the winner",
        {"weights": workshop.info.weights_hash, "minutes": minutes, "tuning": tuning_inputs(context)},
        lambda: tune_alone(context, workshop.plan, subnet, minutes, workshop.weights),
        context.request.effort.tuning_steps,
    )
    weights = context.folder.tuned_alone(subnet.digest)
    return weights if weights.supernet.is_dir() else None


def _accuracy(finalist: Finalist) -> float:
    """On the items of the search, for what is chosen by the others would not be unseen any more."""
    return float(finalist.search_score.metrics["accuracy"])


def _report(context: Context, verdict: Verdict) -> None:
    context.listener(StageStarted("report", "Writing the report"))
    began = time.monotonic()
    save_data(context.folder, verdict.data)
    write_page(verdict.data, context.folder.report)
    context.listener(StageFinished("report", time.monotonic() - began))


def save_data(folder: RunFolder, data: ReportData) -> None:
    """Write ``front.json``, from which the report can be made again."""
    write_json(folder.front, TypeAdapter(ReportData).dump_python(data, mode="json"))


def write_report(path: Path) -> Verdict:
    """The report of a finished run, its page written anew."""
    folder = RunFolder.open_existing(path)
    if not folder.front.is_file():
        raise InputError(f"{path} has no result yet: `compress --run {path} --resume` goes on with it")
    try:
        data = TypeAdapter(ReportData).validate_json(folder.front.read_bytes())
    except ValidationError as error:
        raise RunConflictError(
            f"{folder.front} is damaged ({error.error_count()} errors): `compress --run {path} --resume` "
            "writes it again"
        ) from None
    data = replace(data, comparisons=known_comparisons(folder))
    write_page(data, folder.report)
    return Verdict(path, data)


def package_pick(path: Path, pick: str, out: Path | None, listener: Listener) -> Path:
    """Package a sub-network of a finished run: see ``Workshop.picked``.

    Raises ``InputError`` for a pick that the run does not know, or a folder that exists.
    """
    target = out or path / f"package-{pick}"
    if target.exists():
        raise InputError(f"{target} exists: delete it, or choose another folder with --out")
    with reopened(path, listener) as workshop:
        context = workshop.context
        outcome = workshop.picked(pick)
        free = outcome.free and not context.folder.tuned_alone(outcome.subnet.digest).supernet.is_dir()
        digest = outcome.subnet.digest
        best = workshop.of(context.folder.unpruned if free else context.folder.weights_of(digest))
        with closing(best):
            finalist = finish(context, best, outcome)
            package(context, best.plan, best.target, best.task, finalist, target)
        for line in verify_package(target):
            context.say(line)
    return target


@contextmanager
def reopened(path: Path, listener: Listener) -> Iterator[Workshop]:
    """What evaluating in a finished run needs, with the run locked. Raises ``InputError``."""
    folder = RunFolder.open_existing(path)
    request = stored_request(folder)
    with folder.locked(), open_ledger(folder.ledger) as ledger, target_cluster(request) as cluster:
        machine = device.detect()
        context = Context(folder, request, ledger, machine, listener, cluster)
        plan = make_plan(request, machine, path)
        info = read_info(folder.supernet)
        space = replace(plan.space, drop_order=info.drop_order)
        with closing(Workshop(context, plan, info, space)) as workshop:
            yield workshop
