"""Measure several models on the same text, tasks and machine."""

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.float_bundle import export_bundle
from planish.compiler.bundle.inspection import inspect
from planish.compiler.checkpoint import Checkpoint
from planish.compiler.errors import ComparisonError
from planish.compiler.harness.tasks import TaskScores, load_tasks, mean_score, score_tasks
from planish.compiler.measure.bench import Side, measure_sides, prompt_length
from planish.compiler.measure.evaluation import Evaluation, evaluate_windows
from planish.compiler.measure.subject import (
    Subject,
    check_same_tokens,
    check_same_vocabulary,
    float_subject,
    is_bundle,
    open_subject,
)
from planish.compiler.measure.texts import Text, cut_windows
from planish.compiler.progress import Progress
from planish.compiler.runtime.provider import Provider
from planish.compiler.runtime.runnable import Runnable

__all__ = ["Compared", "Comparison", "TaskSettings", "compare_models"]


@dataclasses.dataclass(frozen=True)
class Compared:
    """What is known of one model.

    Attributes:
        name: what was given: the folder of a bundle, or a checkpoint.
        format: the scheme of a bundle, or the type in which a checkpoint stores its weights.
        weight_bytes: what its weights take: the portable model of a bundle, the tensors of a checkpoint.
        average_bits: stored bits per weight of the decoder blocks' linears, scales counted.
        evaluations: perplexity and divergence on each text.
        scores: task -> scores.
        speed: prefill, decode, memory; of a checkpoint those of its float32 export. None if it was not measured.
    """

    name: str
    format: str
    weight_bytes: int
    average_bits: float
    evaluations: list[Evaluation]
    scores: dict[str, TaskScores]
    speed: Side | None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as a dictionary for JSON."""
        mean = mean_score(self.scores)
        return {**dataclasses.asdict(self), "mean_score": None if mean is None else dataclasses.asdict(mean)}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Models side by side.

    Attributes:
        models: in the order in which they were given.
        texts: what they were evaluated on.
        reference: the model that divergence is measured from; None without one.
    """

    models: list[Compared]
    texts: list[str]
    reference: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as a dictionary for JSON."""
        return {"texts": self.texts, "reference": self.reference, "models": [each.to_dict() for each in self.models]}


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """Which tasks to score; see `load_tasks` and `score_tasks`.

    Attributes:
        names: of the tasks.
        data: the folder of local examples; None reads from the Hub.
        limit: how many examples of each; None is all.
        answers: the folder in which answers are kept; None is the cache of planish.
    """

    names: Sequence[str]
    data: Path | None = None
    limit: int | None = None
    answers: Path | None = None


def compare_models(
    sources: Sequence[str],
    texts: Sequence[Text],
    progress: Progress,
    *,
    seqlen: int | None = None,
    windows: int | None = None,
    divergence: bool = True,
    against: str | None = None,
    tasks: TaskSettings | None = None,
    speed: bool = True,
    threads: int | None = None,
    target: str | None = None,
    provider: Provider | str = Provider.CPU,
) -> Comparison:
    """Measure models side by side. All are in memory while they are evaluated; speed is measured when they are not.

    Args:
        sources: two or more bundles and checkpoints.
        texts: what to evaluate on, one or more.
        progress: is told how far the run is.
        seqlen: tokens in a window of each text; None is what is usual for it, or the shortest context, which may be
            that of the reference.
        windows: how many windows of each text; None is what is usual for it.
        divergence: measure the divergence from the reference.
        against: the reference; None is the first checkpoint among the models, or else the float model of the first
            bundle.
        tasks: what to score; None is nothing.
        speed: measure prefill and decode.
        threads: of the models; None is one per core for evaluating, 2 for speed.
        target: of the bundles, what to run; see `Bundle.load`.
        provider: of the bundles, where ONNX Runtime runs them.

    Raises:
        ComparisonError: if there is one model only, two have different tokenizers, or there is no reference, or none
            with as many logits as the models.
        PlanishError: as `open_subject`, `cut_windows`, `load_tasks` and `measure_sides` do.
    """
    if len(sources) < 2:
        raise ComparisonError("One model alone has nothing to compare with. Give two or more.")
    runnables = {source: _runnable(source, target, provider) for source in sources if is_bundle(source)}
    loaded = load_tasks(tasks.names, tasks.data, progress) if tasks else {}
    subjects = [
        open_subject(source, threads=threads, target=target, provider=provider)
        if source in runnables
        else open_subject(source, threads=threads)
        for source in sources
    ]
    reference = _reference(subjects, against, threads) if divergence else None
    prompt = prompt_length(min(subject.max_context for subject in subjects)) if speed else 0
    read, cuts = [*subjects, *([reference] if reference else [])], []
    context = min(subject.max_context for subject in read)
    for text in texts:
        check_same_tokens(read, text)
        cuts.append(cut_windows(subjects[0].tokenizer, text, *text.sizes(seqlen, windows, context)))
    if reference:
        check_same_vocabulary(read)
    evaluations = [
        evaluate_windows([subject.model for subject in subjects], cut, reference.model if reference else None, progress)
        for cut in cuts
    ]
    scores = _score(sources, subjects, loaded, tasks, progress) if tasks else [{} for _ in subjects]
    described = [_describe(subject.origin) for subject in subjects]
    name_of_reference = reference.name if reference else None
    # Speed is that of a machine with nothing else in memory.
    del subjects, reference, read
    sides = _speeds(sources, runnables, threads, prompt, progress) if speed else {}
    models = [
        Compared(source, *described[place], [each[place] for each in evaluations], scores[place], sides.get(str(place)))
        for place, source in enumerate(sources)
    ]
    return Comparison(models, [text.name for text in texts], name_of_reference)


def _reference(subjects: list[Subject], against: str | None, threads: int | None) -> Subject:
    if against is not None:
        return open_subject(against, threads=threads)
    for subject in subjects:
        if isinstance(subject.origin, Checkpoint):
            return subject
    first = subjects[0].origin
    assert isinstance(first, Bundle)
    return float_subject(first, threads)


def _score(
    sources: Sequence[str], subjects: Sequence[Subject], loaded: dict[str, Any], tasks: TaskSettings, progress: Progress
) -> list[dict[str, TaskScores]]:
    scores = []
    for source, subject in zip(sources, subjects, strict=True):
        progress.say(f"tasks: {source}")
        scores.append(score_tasks(subject, loaded, progress, limit=tasks.limit, answers=tasks.answers))
    return scores


def _describe(origin: Bundle | Checkpoint) -> tuple[str, int, float]:
    """Return the format, the bytes of the weights, and the bits per weight of the decoder blocks' linears."""
    if isinstance(origin, Bundle):
        found = inspect(origin)
        return found.scheme, found.sizes["portable"], found.average_bits
    sizes = {name: prod(origin.shape(name)) for name in origin.names()}
    stored = {name: 8 * origin.dtype(name).itemsize for name in sizes}
    linears = [name for name in sizes if name.startswith("model.layers.") and len(origin.shape(name)) == 2]
    bits = sum(sizes[name] * stored[name] for name in linears) / sum(sizes[name] for name in linears)
    types = sorted({origin.dtype(name).name for name in linears})
    return "/".join(types), sum(sizes[name] * stored[name] for name in sizes) // 8, bits


def _runnable(source: str, target: str | None, provider: Provider | str) -> Runnable:
    """Return what is measured of a bundle; that it cannot run here is said before anything is read."""
    return Bundle.open(source, verify=False).runnable(target, provider)


def _speeds(
    sources: Sequence[str], runnables: Mapping[str, Runnable], threads: int | None, prompt: int, progress: Progress
) -> dict[str, Side]:
    """Return the speed of each model by its place among `sources`; checkpoints are exported in float32 for it."""
    with tempfile.TemporaryDirectory(prefix="planish-compare-") as scratch:
        models = {}
        for place, source in enumerate(sources):
            models[str(place)] = (
                runnables.get(source) or export_bundle(source, Path(scratch) / str(place), progress=progress).runnable()
            )
        return measure_sides(
            models, threads=threads or 2, tokens=prompt, progress=functools.partial(progress.step, "speed")
        )
