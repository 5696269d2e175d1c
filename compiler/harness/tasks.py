"""Zero-shot scores on tasks of lm-evaluation-harness: its prompts and metrics, examples from files or from the Hub."""

import contextlib
import dataclasses
import io
import logging
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np

from planish.compiler.errors import TaskError
from planish.compiler.harness.answers import Answers
from planish.compiler.harness.examples import LOCAL_TASKS, read_examples
from planish.compiler.measure.subject import Subject
from planish.compiler.optional import require
from planish.compiler.pipeline.work_folder import code_fingerprint
from planish.compiler.progress import Progress
from planish.plugins.native import cache_folder

__all__ = ["Score", "TaskScores", "load_tasks", "mean_score", "score_tasks"]

#: Seeds that the harness's own command sets before it reads examples, of random and NumPy, and those of the solved
#: examples that stand in front of a question.
_SEED, _NUMPY_SEED, _SHOTS_SEED = 0, 1234, 1234
#: What papers report of a task, the first that it has; all of them shares of examples, which a mean is taken of.
_ACCURACIES = ("acc_norm", "acc", "exact_match")

#: Folders of the harness that hold the tasks of `LOCAL_TASKS`; reading all its 14 000 tasks takes ten seconds.
_FOLDERS = ("piqa", "hellaswag", "arc", "winogrande", "lambada", "super_glue/boolq", "openbookqa")


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric over the examples of a task.

    Attributes:
        value: the metric.
        stderr: its standard error: of a mean, the deviation of the examples over the root of their number; of a
            perplexity, that of the mean log-likelihood times the perplexity; None for other metrics.
        better: which values are.
    """

    value: float
    stderr: float | None
    better: Literal["higher", "lower"] = "higher"


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """What a model scores on a task.

    Attributes:
        examples: how many were asked.
        version: of the task, in the harness.
        metrics: by the harness's names, such as acc and acc_norm.
    """

    examples: int
    version: Any
    metrics: dict[str, Score]

    @property
    def main(self) -> str:
        """The metric that papers report: accuracy normalised by the length of the choices where there is one."""
        return next(name for name in (*_ACCURACIES, *self.metrics) if name in self.metrics)


def load_tasks(names: Sequence[str], data: Path | None, progress: Progress) -> dict[str, Any]:
    """Return the harness's tasks by name, their examples read.

    Args:
        names: of tasks, groups or tags of the harness.
        data: a folder with a file NAME.jsonl for each, see `read_examples`; None reads from the Hub.
        progress: is told what is read.

    Raises:
        MissingExtraError: if lm_eval is not installed.
        TaskError: if a name is unknown, or examples cannot be read.
    """
    require("lm_eval")
    known = all(name in LOCAL_TASKS for name in names)
    if data is not None and not known:
        odd = ", ".join(name for name in names if name not in LOCAL_TASKS)
        raise TaskError(
            f"Examples in files are read for the tasks {', '.join(LOCAL_TASKS)}, not for {odd}. "
            "Check the spelling, or leave out --task-data to read from the Hub."
        )
    # Tasks draw or shuffle examples as they are read.
    random.seed(_SEED)
    np.random.seed(_NUMPY_SEED)  # noqa: NPY002  the generator that tasks use
    with _quiet_harness():
        manager = _manager(known)
        _check_names(names, manager.all_tasks)
        if data is not None:
            spec = [_with_examples(manager, name, read_examples(data, name)) for name in names]
            return dict(manager.load([{"group": "planish", "task": spec}])["tasks"])
        progress.say(f"examples from the Hub: {', '.join(names)}")
        try:
            tasks = dict(manager.load(list(names))["tasks"])
        except Exception as error:  # the data sets' loaders raise errors of many packages
            raise TaskError(
                f"The examples of {', '.join(names)} cannot be read from the Hub ({error}). Connect to the network, or "
                "give a folder of .jsonl files by --task-data."
            ) from error
    _check_askable(tasks)
    return tasks


def score_tasks(
    subject: Subject,
    tasks: dict[str, Any],
    progress: Progress,
    *,
    limit: int | None = None,
    answers: Path | None = None,
) -> dict[str, TaskScores]:
    """Ask a model the examples of tasks, and score its answers as the harness does.

    How many solved examples stand in front is the task's own setting: none in those of `LOCAL_TASKS`.

    Args:
        subject: the model.
        tasks: as `load_tasks` returns them.
        progress: is told how far the run is.
        limit: how many examples of each task, from the first; None is all.
        answers: the folder in which answers are kept, so that a killed run goes on; None is the cache of planish.

    Returns:
        Task -> its scores.

    Raises:
        TaskError: if a task asks what cannot be answered.
        OutputFolderError: if answers cannot be kept.
    """
    from lm_eval.evaluator import evaluate

    from planish.compiler.harness.harness_model import HarnessModel

    settings = {"model": subject.fingerprint, "context": str(subject.max_context), "code": code_fingerprint()}
    for task in tasks.values():
        task.set_fewshot_seed(_SHOTS_SEED)
    with Answers.hold(answers or cache_folder() / "answers", settings) as kept, _same_draws(), _quiet_harness():
        model = HarnessModel(subject, kept, progress)
        # The bootstrap of standard errors prints to stdout and starts processes; closed forms follow below.
        found = evaluate(model, {"tasks": tasks}, limit=limit, bootstrap_iters=0)
    return {
        name: TaskScores(
            examples=found["n-samples"][name]["effective"],
            version=found["versions"].get(name),
            metrics=_metrics(task, found["results"][name], found["samples"][name]),
        )
        for name, task in tasks.items()
    }


def mean_score(scores: dict[str, TaskScores]) -> Score | None:
    """Return the mean over tasks of the accuracy that papers report, and its standard error.

    None is that of no task, and of tasks among which one has a metric that is no accuracy.
    """
    main = [each.metrics[each.main] for each in scores.values() if each.main in _ACCURACIES]
    if not main or len(main) < len(scores):
        return None
    errors = [each.stderr for each in main if each.stderr is not None]
    stderr = math.hypot(*errors) / len(main) if len(errors) == len(main) else None
    return Score(statistics.fmean(each.value for each in main), stderr)


def _manager(known: bool) -> Any:
    from lm_eval import tasks

    if not known:
        return tasks.TaskManager()
    root = Path(tasks.__file__).parent
    return tasks.TaskManager(include_defaults=False, include_path=[root / folder for folder in _FOLDERS])


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = dict.fromkeys(get_close_matches(name, [*LOCAL_TASKS, *known], n=3))
            advice = f"Did you mean {' or '.join(near)}?" if near else f"It has {', '.join(LOCAL_TASKS)} and others."
            raise TaskError(f"lm-evaluation-harness has no task '{name}'. {advice}")


def _check_askable(tasks: dict[str, Any]) -> None:
    """Refuse tasks that the harness would refuse later, in words about options that planish does not have."""
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise TaskError(f"The task {name} runs programs that the model writes, which planish does not do.")
        if getattr(task, "MULTIMODAL", False):
            raise TaskError(f"The task {name} asks about images or sounds, and the model reads text.")


def _with_examples(manager: Any, name: str, examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what makes the harness's task `name` read `examples`, in the place of the split it is scored on."""
    from datasets import Dataset

    held = Dataset.from_list(examples)
    config = manager.task_index[name].cfg
    split = config.get("test_split") or config["validation_split"]
    splits = {"training_split": None, "validation_split": None, "test_split": split}
    return {"task": name, "custom_dataset": lambda **_: {split: held}, **splits}


def _metrics(task: Any, results: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Score]:
    """Return the metrics of a task, by name; a filter other than the harness's default is part of the name."""
    aggregations, higher, metrics = task.aggregation(), task.higher_is_better(), {}
    for key, value in results.items():
        metric, _, of_filter = key.partition(",")
        if not of_filter or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        # A task may give a metric for some examples only; of one without an aggregation the harness takes the mean.
        values = [sample[metric] for sample in samples if sample["filter"] == of_filter and metric in sample]
        aggregation = getattr(aggregations[metric], "__name__", "") if metric in aggregations else "mean"
        name = metric if of_filter == "none" else f"{metric} ({of_filter})"
        better: Literal["higher", "lower"] = "higher" if higher.get(metric, True) else "lower"
        metrics[name] = Score(float(value), _stderr(aggregation, values, float(value)), better)
    return metrics


def _stderr(aggregation: str, values: list[Any], value: float) -> float | None:
    if len(values) < 2 or aggregation not in ("mean", "perplexity"):
        return None
    error = statistics.stdev(map(float, values)) / math.sqrt(len(values))
    return error if aggregation == "mean" else error * value


@contextlib.contextmanager
def _same_draws() -> Iterator[None]:
    """Leave the global generators as they were: what the next model is asked is drawn as it was for this one."""
    state, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(of_numpy)  # noqa: NPY002


@contextlib.contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keep the harness from logging what concerns its own command line, and from drawing bars of its own."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
