"""Tasks by name, from local data to an accuracy that lm-eval itself would report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import compressor.evaluation.evaluator as evaluator_module
from compressor.errors import InputError
from compressor.evaluation.evaluator import TaskEvaluator
from compressor.evaluation.score import Items
from compressor.evaluation.scorer import PackedLM, score_by_logits
from compressor.evaluation.tasks import check_names, load_tasks


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "name", ["arc_easy", "winogrande", "truthfulqa_mc1", "truthfulqa_mc2", "mmlu_anatomy"]
)
def test_accuracy_is_what_lm_eval_reports(
    name: str, model: PreTrainedModel, tokenizer: Any, data_dir: Path
) -> None:
    shots = 1 if name == "mmlu_anatomy" else None
    evaluator = TaskEvaluator(name, tokenizer, data_dir, shots, limit=5, max_length=512)
    score = evaluator.score(model, "report")
    task = load_tasks(name, "report", data_dir, shots)[0].task
    theirs = lm_eval.simple_evaluate(
        PackedLM(model, tokenizer, max_length=512), tasks=[task], limit=5, bootstrap_iters=0
    )
    assert score.value == pytest.approx(theirs["results"][name]["acc,none"])
    assert score.n == len(Items.unpack(score.items).values) == 5


def test_an_engines_logits_give_the_same_score(
    model: PreTrainedModel, tokenizer: Any, data_dir: Path
) -> None:
    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(ids)[None]).logits[0].numpy()

    evaluator = TaskEvaluator("arc_easy", tokenizer, data_dir, limit=6)

    def likelihoods(encoded, *, greedy=True):
        assert greedy in (True, False)
        return score_by_logits(encoded, logits)

    found = evaluator.score_artefact(likelihoods, "search")
    assert found.value == evaluator.score(model, "search").value


def test_groups_weigh_their_tasks_by_size_and_names_alike(data_dir: Path) -> None:
    tasks = load_tasks("mmlu,arc_easy", "report", data_dir)
    weights = {task.name: task.weight for task in tasks}
    assert len(tasks) == 58
    assert weights.pop("arc_easy") == 1
    assert sum(weights.values()) == pytest.approx(1)
    sizes = {task.name: len(task.rows) for task in tasks}
    assert weights["mmlu_professional_law"] / weights["mmlu_anatomy"] == pytest.approx(
        sizes["mmlu_professional_law"] / sizes["mmlu_anatomy"]
    )


def test_the_papers_tasks_have_the_papers_settings(data_dir: Path) -> None:
    tasks = {task.name: task for task in load_tasks("paper", "report", data_dir, limit=5)}
    assert len(tasks) == 4 + 57
    assert tasks["mmlu_anatomy"].num_fewshot == 5
    assert tasks["arc_challenge"].num_fewshot == tasks["truthfulqa_mc1"].num_fewshot == 0


def test_few_shot_examples_come_from_what_the_search_may_see(data_dir: Path) -> None:
    task = load_tasks("winogrande", "search", data_dir, num_fewshot=2)[0].task
    seen = {doc["sentence"] for doc in task.fewshot_docs()}
    reported = {doc["sentence"] for doc in load_tasks("winogrande", "report", data_dir)[0].task.eval_docs}
    assert not seen & reported
    doc = task.eval_docs[0]
    context = task.fewshot_context(doc, 2)[0]
    assert context.count("\n\n") == 2
    ending = doc["sentence"].split("_")[1].strip()
    assert ending not in context


def test_a_fixed_shot_count_is_left_alone(data_dir: Path) -> None:
    assert load_tasks("truthfulqa_mc1", "report", data_dir, num_fewshot=5)[0].num_fewshot == 0


def test_a_race_that_runs_to_the_end_equals_a_full_evaluation(
    model: PreTrainedModel, tokenizer: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator_module, "RUNG_TOKENS", {"cpu": 64})
    evaluator = TaskEvaluator("arc_easy", tokenizer, data_dir, limit=24)
    whole = evaluator.score(model, "search")
    raced = evaluator.race(model, [whole.items], "search")
    assert raced.dominated_by is None
    again, first = Items.unpack(raced.score.items), Items.unpack(whole.items)
    assert np.array_equal(again.values, first.values)
    assert again.loglikelihoods is not None and first.loglikelihoods is not None
    np.testing.assert_allclose(again.loglikelihoods, first.loglikelihoods, atol=1e-3)
    perfect = Items(np.ones(24), first.names, first.strata, first.weights).pack()
    stopped = evaluator.race(model, [whole.items, perfect], "search")
    assert stopped.dominated_by == 1
    assert stopped.saved > 0


def test_in_bf16_what_is_raced_and_what_has_no_rivals_is_computed_alike(
    tiny_model_folder: Path, tokenizer: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator_module, "RUNG_TOKENS", {"cpu": 64})
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.bfloat16).eval()
    evaluator = TaskEvaluator("arc_easy", tokenizer, data_dir, limit=40)
    alone = evaluator.race(model, [])
    beside = evaluator.race(model, [alone.score.items])
    assert alone.score.items == beside.score.items
    assert alone.evaluated == beside.evaluated == 40


def test_a_race_over_few_tokens_is_one_rung(model: PreTrainedModel, tokenizer: Any, data_dir: Path) -> None:
    evaluator = TaskEvaluator("arc_easy", tokenizer, data_dir, limit=16)
    perfect = Items(np.ones(16), ("arc_easy",)).pack()
    assert evaluator.prepare("search").plan().packing.tokens < 2 * evaluator_module.RUNG_TOKENS["cpu"]
    raced = evaluator.race(model, [perfect])
    assert raced.dominated_by is None and raced.evaluated == 16
    assert raced.score == evaluator.score(model, "search")


def test_keys_tell_every_setting_apart(tokenizer: Any, data_dir: Path) -> None:
    evaluators = [
        TaskEvaluator("arc_easy", tokenizer, data_dir),
        TaskEvaluator("arc_easy", tokenizer, data_dir, num_fewshot=1),
        TaskEvaluator("arc_easy", tokenizer, data_dir, limit=10),
        TaskEvaluator("arc_easy,winogrande", tokenizer, data_dir),
        TaskEvaluator("arc_easy", tokenizer, data_dir, seed=5),
    ]
    keys = [evaluator.key(split) for evaluator in evaluators for split in ("search", "report")]
    assert len(set(keys)) == len(keys)


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown task 'arc_esay': did you mean .*arc_easy"):
        check_names("arc_esay")


@pytest.mark.parametrize(
    ("name", "message"),
    [("gsm8k", "generate_until"), ("wikitext", "loglikelihood_rolling")],
)
def test_tasks_without_an_accuracy_are_refused(name: str, message: str, data_dir: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_tasks(name, "search", data_dir)


def test_no_task_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no task named"):
        check_names(" , ")
    with pytest.raises(InputError, match="no folder"):
        load_tasks("arc_easy", "search", tmp_path / "absent")


def test_a_task_of_ones_own_data_names_a_missing_field(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "piqa").mkdir()
    good = {"goal": "open it", "sol1": "pull", "sol2": "push", "label": 0}
    rows = [good, {**good, "goal": None}, {k: v for k, v in good.items() if k != "goal"}]
    (tmp_path / "piqa" / "validation.jsonl").write_text("\n".join(map(json.dumps, [good, good])))
    evaluator = TaskEvaluator("piqa", tokenizer, tmp_path)
    assert evaluator.prepare("search").num_items == 1
    (tmp_path / "piqa" / "validation.jsonl").write_text("\n".join(map(json.dumps, [rows[2], rows[2]])))
    with pytest.raises(InputError, match="'goal'"):
        TaskEvaluator("piqa", tokenizer, tmp_path).prepare("search")


def test_a_gold_out_of_range_is_named(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "piqa").mkdir()
    row = {"goal": "open it", "sol1": "pull", "sol2": "push", "label": 7}
    (tmp_path / "piqa" / "validation.jsonl").write_text(
        "\n".join([json.dumps({**row, "label": 0})] * 2 + [json.dumps(row)] * 2)
    )
    with pytest.raises(InputError, match=r"item 1: gold 7 is none of its 2 choices"):
        TaskEvaluator("piqa", tokenizer, tmp_path).prepare("search")
