"""Prompts are the harness's own, scores and standard errors too; a killed run goes on; bad requests are named."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from planish.compiler.errors import MissingExtraError, TaskError
from planish.compiler.harness import scoring, tasks
from planish.compiler.harness.examples import LOCAL_TASKS
from planish.compiler.harness.tasks import Score, TaskScores, load_tasks, mean_score, score_tasks
from planish.compiler.measure.subject import Subject
from planish.compiler.progress import Silent
from tests.task_examples import EXAMPLES, Write

pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra 'eval')")

#: The first request of each task, and its choice of the answer that is right, spelled out.
PROMPTS = {
    "piqa": ("Question: Keep the hen number 0 in\nAnswer:", " shut the door"),
    "hellaswag": ("Roof shingle removal: A man is sitting on a roof. He", " is using wrap."),
    "arc_easy": ("Question: Who ran in?\nAnswer:", " a hen"),
    "arc_challenge": ("Question: Who ran out?\nAnswer:", " a hen"),
    "winogrande": ("The hen saw the otter, so the hen", " ran."),
    "lambada_openai": ("the hen and the tin man's otter ran", " in"),
    "boolq": ("An otter is no hen.\nQuestion: is an otter a hen?\nAnswer:", " no"),
    "openbookqa": ("What swims is", " a hen"),
}
TARGETS = {"piqa": 0, "hellaswag": 3, "arc_easy": 1, "arc_challenge": 3, "boolq": 0, "openbookqa": 3}


class Counting:
    """Counts runs, and may end like a killed process."""

    def __init__(self, model: Any, deadly: int | None = None) -> None:
        self._model, self._deadly, self.runs, self.limits = model, deadly, 0, model.limits

    def run(self, *arguments: Any, **options: Any) -> Any:
        self.runs += 1
        if self.runs == self._deadly:
            raise KeyboardInterrupt
        return self._model.run(*arguments, **options)


@pytest.mark.parametrize("task", LOCAL_TASKS)
def test_prompts_are_the_harness_s(write: Write, task: str) -> None:
    (loaded,) = load_tasks([task], write(task, *EXAMPLES[task]), Silent()).values()
    loaded.build_all_requests(limit=1)
    assert loaded.instances[0].args == PROMPTS[task]
    assert len(loaded.eval_docs) == len(EXAMPLES[task])
    if task in TARGETS:
        assert loaded.doc_to_target(loaded.eval_docs[0]) == TARGETS[task]


def test_scores_and_standard_errors(of_bundle: Subject, write: Write, tmp_path: Path) -> None:
    from lm_eval.evaluator import evaluate

    from planish.compiler.harness.answers import Answers
    from planish.compiler.harness.harness_model import HarnessModel

    names = ["piqa", "lambada_openai"]
    texts = [{"text": f"the hen and the {name} ran in"} for name in ("man", "otter", "inn", "tin man")]
    write("lambada_openai", *texts)
    loaded = load_tasks(names, write("piqa", *EXAMPLES["piqa"]), Silent())
    found = score_tasks(of_bundle, loaded, Silent(), answers=tmp_path / "answers")
    assert {name: scores.examples for name, scores in found.items()} == {"piqa": 5, "lambada_openai": 4}

    with Answers.hold(tmp_path / "others", {}) as answers:
        model = HarnessModel(of_bundle, answers, Silent())
        only_means = {"tasks": {"piqa": load_tasks(["piqa"], tmp_path / "examples", Silent())["piqa"]}}
        expected = evaluate(model, only_means)["results"]["piqa"]
    for metric, score in found["piqa"].metrics.items():
        assert score.value == pytest.approx(expected[f"{metric},none"])
        assert score.stderr == pytest.approx(expected[f"{metric}_stderr,none"])
    assert set(found["piqa"].metrics) == {"acc", "acc_norm"}
    assert found["piqa"].main == "acc_norm"

    # The delta method, against the spread of perplexities of resampled examples.
    perplexity = found["lambada_openai"].metrics["perplexity"]
    loaded["lambada_openai"].apply_filters()
    lls = np.array([each.filtered_resps["none"][0] for each in loaded["lambada_openai"].instances])
    assert perplexity.value == pytest.approx(np.exp(-lls.mean()))
    near = lls.mean() + (lls - lls.mean()) / 100
    resampled = np.random.default_rng(0).choice(near, (20000, len(near))).mean(1)
    spread = np.exp(-resampled).std() * 100 * np.sqrt(len(near) / (len(near) - 1))
    assert perplexity.stderr == pytest.approx(spread, rel=0.03)


def test_limit_takes_the_first_examples(of_bundle: Subject, write: Write, tmp_path: Path) -> None:
    loaded = load_tasks(["piqa"], write("piqa", *EXAMPLES["piqa"]), Silent())
    found = score_tasks(of_bundle, loaded, Silent(), limit=2, answers=tmp_path)
    assert found["piqa"].examples == 2
    again = score_tasks(of_bundle, loaded, Silent(), answers=tmp_path)
    assert again["piqa"].examples == 5


def test_a_killed_run_goes_on(
    of_bundle: Subject, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_CONTEXT_TOKENS", 1)
    data = write("piqa", *EXAMPLES["piqa"])

    def score(model: Any, answers: Path) -> dict[str, TaskScores]:
        loaded = load_tasks(["piqa"], data, Silent())
        return score_tasks(replace(of_bundle, model=model), loaded, Silent(), answers=answers)

    whole = Counting(of_bundle.model)
    expected = score(whole, tmp_path / "whole")
    assert whole.runs == 2 * 5
    with pytest.raises(KeyboardInterrupt):
        score(Counting(of_bundle.model, deadly=6), tmp_path / "killed")
    rest = Counting(of_bundle.model)
    assert score(rest, tmp_path / "killed") == expected
    # Two contexts were finished; the third was in its second run.
    assert rest.runs == 2 * 3
    other = Counting(of_bundle.model)
    loaded = load_tasks(["piqa"], data, Silent())
    score_tasks(replace(of_bundle, model=other, fingerprint="other"), loaded, Silent(), answers=tmp_path / "killed")
    assert other.runs == 2 * 5


def test_mean_of_the_metrics_that_papers_report() -> None:
    scores = {
        "a": TaskScores(9, 1.0, {"acc": Score(0.1, 0.1), "acc_norm": Score(0.5, 0.03)}),
        "b": TaskScores(9, 1.0, {"perplexity": Score(9.0, 1.0), "acc": Score(0.7, 0.04)}),
    }
    assert mean_score(scores) == Score(pytest.approx(0.6), pytest.approx(0.025))
    alone = {"c": TaskScores(1, 1.0, {"acc": Score(1.0, None)})}
    assert mean_score(alone) == Score(1.0, None)

    assert mean_score({}) is None
    assert mean_score({**scores, "d": TaskScores(9, 1.0, {"word_perplexity": Score(25.0, 1.0, "lower")})}) is None


def of_config(**settings: Any) -> Any:
    """A task of the harness that asks for three texts."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    asked = Dataset.from_list([{"q": f"the hen {number}", "a": " in"} for number in range(3)])
    usual = {
        "task": "texts",
        "dataset_path": "none",
        "custom_dataset": lambda **_: {"train": asked, "test": asked},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 3},
    }
    return ConfigurableTask(config=usual | settings)


def test_solved_examples_are_drawn_as_the_harness_draws_them(of_bundle: Subject, tmp_path: Path) -> None:
    from datasets import Dataset
    from lm_eval import simple_evaluate

    from planish.compiler.harness.answers import Answers
    from planish.compiler.harness.harness_model import HarnessModel

    shots = Dataset.from_list([{"q": f"the otter {number}", "a": f" is {number}"} for number in range(40)])
    asked = Dataset.from_list([{"q": f"the hen {number}", "a": " in"} for number in range(3)])
    settings = {
        "custom_dataset": lambda **_: {"train": shots, "test": asked},
        "training_split": "train",
        "num_fewshot": 3,
        "metric_list": [{"metric": "exact_match"}],
    }
    prompts = []
    for _ in range(2):
        task = of_config(**settings)
        score_tasks(of_bundle, {"texts": task}, Silent(), answers=tmp_path / "ours")
        prompts.append([each.args[0] for each in task.instances])
    with Answers.hold(tmp_path / "theirs", {}) as kept:
        task = of_config(**settings)
        simple_evaluate(HarnessModel(of_bundle, kept, Silent()), tasks=[task], bootstrap_iters=0)
    assert prompts[0][0].count("the otter") == 3
    assert prompts == [[each.args[0] for each in task.instances]] * 2


def test_metrics_that_are_not_of_every_example(of_bundle: Subject, tmp_path: Path) -> None:
    def of_each(doc: Any, _: Any) -> dict[str, float]:
        return {"m": 1.0, "other": 0.5} if doc["q"].endswith("1") else {"m": 0.0, "some": float(doc["q"][-1])}

    metrics = [
        {"metric": "m", "aggregation": "mean", "higher_is_better": True},
        {"metric": "some", "aggregation": "mean", "higher_is_better": False},
    ]
    task = of_config(process_results=of_each, metric_list=metrics)
    (found,) = score_tasks(of_bundle, {"texts": task}, Silent(), answers=tmp_path).values()
    assert found.metrics["m"] == Score(pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert found.metrics["some"] == Score(1.0, pytest.approx(1.0), "lower")
    assert found.metrics["other"].value == 0.5


@pytest.mark.parametrize(("settings", "message"), [({"unsafe_code": True}, "runs programs that the model writes")])
def test_tasks_that_are_not_asked(settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = of_config(metric_list=[{"metric": "exact_match"}], **settings)
    manager = SimpleNamespace(all_tasks=["texts"], load=lambda _: {"tasks": {"texts": task}})
    monkeypatch.setattr(tasks, "_manager", lambda _: manager)
    with pytest.raises(TaskError, match=message):
        load_tasks(["texts"], None, Silent())


def test_one_example_has_no_standard_error(of_bundle: Subject, write: Write, tmp_path: Path) -> None:
    loaded = load_tasks(["arc_easy"], write("arc_easy", EXAMPLES["arc_easy"][0]), Silent())
    found = score_tasks(of_bundle, loaded, Silent(), answers=tmp_path)
    assert found["arc_easy"].metrics["acc"].stderr is None


@pytest.mark.parametrize(
    ("name", "message"),
    [("piqqa", "Did you mean piqa"), ("xyzzy quux", "has no task 'xyzzy quux'. It has piqa")],
)
def test_unknown_tasks(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    # Reading all tasks of the harness takes ten seconds.
    monkeypatch.setattr(tasks, "_manager", lambda _, few=tasks._manager: few(True))
    with pytest.raises(TaskError, match=message):
        load_tasks([name], None, Silent())


def test_tasks_without_local_examples(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="not for gsm8k"):
        load_tasks(["piqa", "gsm8k"], tmp_path, Silent())


def test_the_hub_is_out_of_reach() -> None:
    with pytest.raises(TaskError, match=r"examples of piqa cannot be read from the Hub.*--task-data"):
        load_tasks(["piqa"], None, Silent())


def test_the_harness_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"planish\[eval\]"):
        load_tasks(["piqa"], None, Silent())
