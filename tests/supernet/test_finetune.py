"""Fine-tuning: it learns, it resumes to the same losses, and it stops with the last good weights."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from compressor.errors import InputError, RunConflictError, TrainingError
from compressor.events import Event, Listener, LossReported, StageProgress, ignore
from compressor.models import shape_of_config
from compressor.space import SearchSpace
from compressor.supernet import checkpoint, targets
from compressor.supernet.data import Examples
from compressor.supernet.elastic import Elastic
from compressor.supernet.finetune import FinetuneConfig, discard_checkpoint, finetune
from compressor.supernet.losses import IGNORED, distillation
from compressor.supernet.targets import final_states

from .conftest import make_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORT = FinetuneConfig(steps=6, batch=4, lr=3e-3, super_every=2)
KEPT = FinetuneConfig(steps=8, batch=4, lr=3e-3, checkpoint_minutes=0)


class KilledError(Exception):
    pass


def make_text() -> Tensor:
    """Token ids (16, 12)."""
    return torch.randint(97, (16, 12), generator=torch.Generator().manual_seed(2))


def small_space(model: PreTrainedModel) -> SearchSpace:
    return SearchSpace(shape_of_config(model.config), (2, 3, 4), (16, 32, 64))


@pytest.fixture
def text() -> Tensor:
    return make_text()


@torch.no_grad()
def divergence(model: PreTrainedModel, space: SearchSpace, text: Tensor, wanted: Tensor) -> float:
    """Mean divergence of the smallest sub-network from the original's states ``wanted``."""
    with Elastic(model).activated(space.smallest):
        found = final_states(model, text)
    return float(distillation(found.flatten(0, 1), wanted.flatten(0, 1), model.lm_head.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sub_networks_learn_to_agree_with_the_original(
    model: PreTrainedModel, space: SearchSpace, text: Tensor, dtype: torch.dtype
) -> None:
    model.to(dtype)
    with torch.no_grad():
        wanted = final_states(model, text)
    before = divergence(model, space, text, wanted)
    finetune(Elastic(model), space, text, FinetuneConfig(steps=60, batch=8, lr=3e-3, sampling="small"))
    assert divergence(model, space, text, wanted) < 0.6 * before


def test_one_sub_network_alone_takes_every_step_and_nothing_beyond_it_changes(
    model: PreTrainedModel, space: SearchSpace, text: Tensor
) -> None:
    only = space.smallest
    with torch.no_grad():
        wanted = final_states(model, text)
    before, whole = divergence(model, space, text, wanted), make_model()
    curves: list[str] = []
    finetune(
        Elastic(model),
        space,
        text,
        FinetuneConfig(steps=20, batch=8, lr=3e-3, only=only),
        on_curve=lambda curve, _step, _loss: curves.append(curve),
    )
    assert curves == ["sub"] * 20
    assert divergence(model, space, text, wanted) < 0.8 * before
    layer: Any
    for index, (layer, untouched) in enumerate(zip(model.model.layers, whole.model.layers, strict=True)):
        first = only.widths[0] if index in only.layers else 0
        assert torch.equal(layer.mlp.up_proj.weight[first:], untouched.mlp.up_proj.weight[first:])
        assert index in only.layers or torch.equal(
            layer.self_attn.q_proj.weight, untouched.self_attn.q_proj.weight
        )


def test_steps_alternate_and_are_reported(model: PreTrainedModel, space: SearchSpace, text: Tensor) -> None:
    events: list[Event] = []
    curve: list[tuple[str, int, float]] = []
    result = finetune(Elastic(model), space, text, SHORT, events.append, lambda *point: curve.append(point))
    losses = [e for e in events if isinstance(e, LossReported)]
    assert [e.network for e in losses] == ["super", "sub"] * 3
    assert [(e.network, e.step, e.loss) for e in losses] == curve
    assert losses[0].loss == pytest.approx(0, abs=1e-5)
    assert [e.done for e in events if isinstance(e, StageProgress)] == [1, 2, 3, 4, 5, 6]
    assert (result.steps, result.tokens) == (6, 6 * 4 * 12)


def test_the_model_is_left_whole_and_its_head_untouched(
    model: PreTrainedModel, space: SearchSpace, text: Tensor
) -> None:
    head, mlp = model.lm_head.weight.clone(), model.model.layers[0].mlp.up_proj.weight.clone()
    finetune(Elastic(model), space, text, SHORT)
    assert torch.equal(head, model.lm_head.weight)
    assert not torch.equal(mlp, model.model.layers[0].mlp.up_proj.weight)
    assert len(model.model.layers) == 4
    assert not model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_cross_entropy_learns_the_labels_alone(
    model: PreTrainedModel, space: SearchSpace, text: Tensor
) -> None:
    labels = text.clone()
    labels[:, ::2] = IGNORED
    config = FinetuneConfig(steps=40, batch=8, lr=3e-3, loss="cross-entropy", train_embeddings=True)
    with torch.no_grad():
        before = float(model(text, labels=labels).loss)
    finetune(Elastic(model), space, Examples(text, labels), config)
    with torch.no_grad():
        assert float(model(text, labels=labels).loss) < before - 0.5


def test_a_sandwich_trains_the_largest_and_the_smallest(
    model: PreTrainedModel, space: SearchSpace, text: Tensor
) -> None:
    with torch.no_grad():
        wanted = final_states(model, text)
    before = divergence(model, space, text, wanted)
    events: list[Event] = []
    config = FinetuneConfig(steps=20, batch=8, lr=3e-3, recipe="sandwich")
    finetune(Elastic(model), space, text, config, events.append)
    assert divergence(model, space, text, wanted) < 0.6 * before
    kinds = [(e.step, e.network) for e in events if isinstance(e, LossReported)]
    assert kinds == [(step, network) for step in range(1, 21) for network in ("super", "sub")]


def test_the_super_network_can_teach_while_it_learns(
    model: PreTrainedModel, space: SearchSpace, text: Tensor
) -> None:
    config = FinetuneConfig(steps=40, batch=8, lr=3e-3, loss="both", teacher="super", super_every=2)
    with torch.no_grad():
        before = float(model(text, labels=text).loss)
    finetune(Elastic(model), space, text, config)
    with torch.no_grad(), Elastic(model).activated(space.smallest) as part:
        assert float(part(text, labels=text).loss) < before


def test_alpha_and_gamma_weigh_the_two_losses(space: SearchSpace, text: Tensor) -> None:
    def losses(**changes: Any) -> list[float]:
        events: list[Any] = []
        finetune(Elastic(make_model()), space, text, replace(SHORT, **changes), events.append)
        return [e.loss for e in events if isinstance(e, LossReported)]

    labels = losses(loss="cross-entropy")
    assert losses(loss="both", alpha=1.0, gamma=0.0) == labels
    assert losses(loss="both", alpha=0.0, gamma=1.0) == losses(loss="distill")
    with pytest.raises(InputError, match="alpha and gamma"):
        FinetuneConfig(alpha=0.0, gamma=0.0)


def test_rows_with_nothing_to_learn_take_no_step(space: SearchSpace, text: Tensor) -> None:
    labels = text.clone()
    labels[1:] = IGNORED
    labels[1:, 0] = text[1:, 0]  # a first token follows nothing
    events: list[Any] = []
    config = replace(SHORT, loss="cross-entropy")
    finetune(Elastic(make_model()), space, Examples(text, labels), config, events.append)
    assert all(e.loss > 0 for e in events if isinstance(e, LossReported))
    with pytest.raises(InputError, match="anything to learn"):
        finetune(Elastic(make_model()), space, Examples(text, torch.full_like(text, IGNORED)), config)


@pytest.mark.parametrize("changes", [{"accumulation": 4}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("loss", ["distill", "cross-entropy"])
def test_saving_memory_changes_no_loss(
    space: SearchSpace, text: Tensor, tmp_path: Path, changes: dict[str, Any], loss: Any
) -> None:
    labels = text.clone()
    labels[::3, :7] = IGNORED
    plain = FinetuneConfig(steps=4, batch=8, lr=3e-3, loss=loss)
    wanted = losses_of(make_model(), space, Examples(text, labels), plain, tmp_path / "a")
    thrifty = replace(plain, **changes)
    found = losses_of(make_model(), space, Examples(text, labels), thrifty, tmp_path / "b")
    if changes.get("accumulation") and loss == "distill":  # each part compares its own likely tokens
        assert found == {step: pytest.approx(value, rel=0.1, abs=1e-2) for step, value in wanted.items()}
    else:
        assert found == {step: pytest.approx(value, abs=1e-4) for step, value in wanted.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"minutes": math.nan}, "minutes must be above 0"),
        ({"batch": 8, "accumulation": 3}, "does not split"),
        ({"train_embeddings": True}, "don't train the embeddings"),
        ({"patience": 0}, "patience must be above 0"),
    ],
)
def test_a_wrong_setting_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FinetuneConfig(**changes)


def test_a_held_out_loss_that_stops_falling_ends_it(space: SearchSpace, text: Tensor) -> None:
    labels = text.clone()
    labels[-4:] = text[-4:].flip(1)  # what nothing in the training rows foretells
    curve: list[tuple[str, int, float]] = []
    config = FinetuneConfig(
        steps=400, batch=4, lr=1e-2, loss="cross-entropy", held_out=4, check_every=5, patience=3
    )
    result = finetune(
        Elastic(make_model()), space, Examples(text, labels), config, on_curve=lambda *p: curve.append(p)
    )
    checks = [(step, loss) for network, step, loss in curve if network == "held-out"]
    assert result.stopped_early
    assert result.steps == checks[-1][0] < 400
    assert min(checks, key=lambda check: check[1]) == checks[-4]


def test_time_ends_it(model: PreTrainedModel, space: SearchSpace, text: Tensor) -> None:
    config = FinetuneConfig(steps=10**6, minutes=0.02, batch=4)
    result = finetune(Elastic(model), space, text, config)
    assert 0 < result.steps < 10**5
    assert result.seconds < 10


def test_a_killed_run_resumes_to_the_same_losses(space: SearchSpace, text: Tensor, tmp_path: Path) -> None:
    straight = losses_of(make_model(), space, text, KEPT, tmp_path / "a")
    with pytest.raises(KilledError):
        losses_of(make_model(), space, text, KEPT, tmp_path / "b", kill_at=5)
    resumed = losses_of(make_model(), space, text, KEPT, tmp_path / "b")
    first = min(resumed)
    assert 1 <= first <= 5
    assert resumed == {step: pytest.approx(straight[step], abs=1e-5) for step in range(first, 9)}


def losses_of(
    model: PreTrainedModel,
    space: SearchSpace,
    text: Tensor | Examples,
    config: FinetuneConfig,
    folder: Path,
    kill_at: int = 0,
    also: Listener = ignore,
) -> dict[int, float]:
    seen: dict[int, float] = {}

    def listen(event: Event) -> None:
        also(event)
        if isinstance(event, LossReported):
            seen[event.step] = event.loss
            if event.step == kill_at:
                raise KilledError

    finetune(Elastic(model), space, text, config, listen, folder=folder)
    return seen


def test_a_checkpoint_of_another_tuning_is_refused(
    model: PreTrainedModel, space: SearchSpace, text: Tensor, tmp_path: Path
) -> None:
    config = FinetuneConfig(steps=2, batch=4, checkpoint_minutes=0)
    finetune(Elastic(model), space, text, config, folder=tmp_path)
    with pytest.raises(RunConflictError, match="another model, search space or fine-tuning"):
        finetune(Elastic(model), space, text.flip(0), config, folder=tmp_path)
    discard_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{}, {"train_embeddings": True}])
def test_a_checkpoint_of_another_model_is_refused(
    space: SearchSpace, text: Tensor, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = replace(KEPT, loss="cross-entropy", **changes)
    finetune(Elastic(make_model()), space, text, config, folder=tmp_path)
    with pytest.raises(RunConflictError, match="another model"):
        finetune(Elastic(make_model(seed=1)), space, text, config, folder=tmp_path)


def test_a_damaged_checkpoint_is_named(
    model: PreTrainedModel, space: SearchSpace, text: Tensor, tmp_path: Path
) -> None:
    (tmp_path / checkpoint.NAME).write_bytes(b"not a checkpoint")
    with pytest.raises(RunConflictError, match="is damaged"):
        finetune(Elastic(model), space, text, SHORT, folder=tmp_path)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights(space: SearchSpace, text: Tensor) -> None:
    model = make_model()
    weight = model.model.layers[0].self_attn.q_proj.weight

    def break_at_three(event: Event) -> None:
        if isinstance(event, LossReported) and event.step == 3:
            with torch.no_grad():
                model.model.norm.weight[0] = math.nan

    good: list[Any] = []
    with pytest.raises(TrainingError, match="not finite at step 4"):
        finetune(
            Elastic(model),
            space,
            text,
            SHORT,
            lambda event: (good.append(weight.detach().clone()), break_at_three(event))[1],
        )
    assert torch.equal(weight, good[-1])


FULL_DISK = """
import resource, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import torch
from compressor.errors import TrainingError
from compressor.events import LossReported
from tests.supernet.test_finetune import KEPT, losses_of, make_model, make_text, small_space

def fill_the_disk(event):
    if isinstance(event, LossReported) and event.step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

torch.set_num_threads(1)
model = make_model()
try:
    losses_of(model, small_space(model), make_text(), KEPT, Path({folder!r}), also=fill_the_disk)
except TrainingError as error:
    sys.exit(str(error))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on the size of files")
def test_a_disk_that_fills_up_leaves_a_checkpoint_that_goes_on(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    program = FULL_DISK.format(root=root, folder=str(tmp_path / "b"))
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert "cannot write a checkpoint" in ended.stderr and "free disk space" in ended.stderr
    assert {path.name for path in (tmp_path / "b").iterdir()} == {checkpoint.NAME, targets.NAME}
    space = small_space(make_model())
    straight = losses_of(make_model(), space, make_text(), KEPT, tmp_path / "a")
    resumed = losses_of(make_model(), space, make_text(), KEPT, tmp_path / "b")
    assert resumed == {step: pytest.approx(straight[step], abs=1e-5) for step in range(4, 9)}


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    checkpoint.save_checkpoint(tmp_path, {"identity": "a", "step": 1})
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    (tmp_path / f"{checkpoint.NAME}.tmp").symlink_to(full)
    with pytest.raises(TrainingError, match="free disk space"):
        checkpoint.save_checkpoint(tmp_path, {"identity": "a", "step": 2})
    state = checkpoint.load_checkpoint(tmp_path, "a")
    assert state is not None
    assert state["step"] == 1
