"""Compare a bundle with the float model in speed and memory, side by side on this machine."""

import dataclasses
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from planish.compiler import errors
from planish.compiler.bundle.bundle import Bundle
from planish.compiler.errors import ComparisonError, DiskFullError, PlanishError, TextError
from planish.compiler.measure.bench_worker import WARM_UP
from planish.compiler.runtime.provider import Provider
from planish.compiler.runtime.runnable import ENGINES, Runnable

__all__ = ["DECODE_TOKENS", "Benchmark", "Side", "bench", "measure_sides", "prompt_length"]

#: Told after each repeat: (repeats done, repeats in all) -> None
Progress = Callable[[int, int], None]

#: Of a prompt, where the model's context holds them.
_TOKENS = 512
#: New tokens that are timed behind it.
DECODE_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Side:
    """What was measured of one model: medians over the repeats.

    Attributes:
        prefill: prompt tokens per second, all at once, logits for the last only.
        decode: new tokens per second, one at a time behind that prompt.
        resident_mib: resident memory of the process after that, in MiB; that of a GPU is not counted.
        peak_mib: the most it ever had, loading included, in MiB; likewise.
        load_seconds: time until the model was loaded.
    """

    prefill: float
    decode: float
    resident_mib: float
    peak_mib: float
    load_seconds: float


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A bundle against the float model of the same checkpoint.

    Attributes:
        bundle: the bundle.
        against: the float model, in ONNX Runtime on the CPU.
        threads: of ONNX Runtime.
        tokens: length of the prompt.
        runs_on: what ran the bundle; see `Runnable`.
    """

    bundle: Side
    against: Side
    threads: int
    tokens: int
    runs_on: str

    def to_dict(self) -> dict[str, Any]:
        """Return the ratios, and both sides, as a dictionary for JSON.

        Speedups are bundle / float, memory_ratio is bundle / float of the resident memory.
        """
        return {
            "prefill_speedup": self.bundle.prefill / self.against.prefill,
            "decode_speedup": self.bundle.decode / self.against.decode,
            "memory_ratio": self.bundle.resident_mib / self.against.resident_mib,
            "bundle": dataclasses.asdict(self.bundle),
            "float": dataclasses.asdict(self.against),
            "threads": self.threads,
            "tokens": self.tokens,
            "runs_on": self.runs_on,
        }


def bench(
    bundle: Bundle,
    *,
    target: str | None = None,
    provider: Provider | str = Provider.CPU,
    threads: int = 2,
    tokens: int | None = None,
    decode_tokens: int = DECODE_TOKENS,
    repeats: int = 5,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure `bundle` against the float32 export of its checkpoint.

    The float model is exported from the recipe's checkpoint into a temporary folder and runs on the CPU. Each repeat
    measures both sides, each in a process of its own that has the machine to itself; so slow phases of the machine hit
    both.

    Args:
        bundle: the bundle.
        target: what of it to run; see `Bundle.load`.
        provider: where ONNX Runtime runs it.
        threads: threads of ONNX Runtime.
        tokens: length of the prompt, and so of the context of the first new token; None is 512, or what fits.
        decode_tokens: how many new tokens are timed.
        repeats: how often both sides are measured.
        progress: is told after each repeat.

    Raises:
        ComparisonError: if the bundle is a float export.
        TextError: if prompt and new tokens are more than the model's context, or that of its engine.
        DiskFullError: if the float model does not fit into the folder for temporary files.
        PlanishError: if the checkpoint is no longer where the recipe says, or a side cannot be measured.
    """
    runnable, context = bundle.runnable(target, provider), bundle.manifest.max_context
    if target in ENGINES:
        context = min(context, bundle.engine(target).max_context)
    tokens = prompt_length(context, decode_tokens, tokens)
    with tempfile.TemporaryDirectory(prefix="planish-bench-") as scratch:
        models = {"bundle": runnable, "float": Runnable(_export(bundle, Path(scratch)))}
        sides = measure_sides(
            models, threads=threads, tokens=tokens, decode_tokens=decode_tokens, repeats=repeats, progress=progress
        )
    return Benchmark(sides["bundle"], sides["float"], threads, tokens, runnable.runs_on)


def prompt_length(context: int, decode_tokens: int = DECODE_TOKENS, asked: int | None = None) -> int:
    """Return how many tokens the prompt of a benchmark has: as many as were asked for, or 512, or what fits.

    Args:
        context: of the model, in tokens.
        decode_tokens: how many new tokens are timed behind it; those of the warm-up come before them.
        asked: how many were asked for.

    Raises:
        TextError: if they do not fit.
    """
    new = WARM_UP + decode_tokens
    longest = context - new
    tokens = min(_TOKENS, longest) if asked is None else asked
    if not 0 < tokens <= longest:
        remedy = f"Ask for a prompt of 1 to {longest} tokens (--tokens)." if longest > 0 else "Nothing can be timed."
        raise TextError(
            f"A prompt of {max(tokens, 1)} tokens and {new} new ones do not fit into the model's context of {context}. "
            f"{remedy}"
        )
    return tokens


def measure_sides(
    models: Mapping[str, Runnable],
    *,
    threads: int = 2,
    tokens: int = 512,
    decode_tokens: int = DECODE_TOKENS,
    repeats: int = 5,
    progress: Progress | None = None,
) -> dict[str, Side]:
    """Measure several models in turn, `repeats` times, each time in a process of its own.

    Args:
        models: name -> a model that planish wrote, and what runs it.
        threads: threads of ONNX Runtime.
        tokens: length of the prompt.
        decode_tokens: how many new tokens are timed.
        repeats: how often all are measured.
        progress: is told after each repeat.

    Raises:
        PlanishError: if one cannot be measured; it is of the class, and has the exit code, of what went wrong.
    """
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for repeat in range(repeats):
        for name, model in models.items():
            measured[name].append(_measure(model, threads, tokens, decode_tokens))
        if progress:
            progress(repeat + 1, repeats)
    return {
        name: Side(**{field: statistics.median(run[field] for run in runs) for field in runs[0]})
        for name, runs in measured.items()
    }


def _export(bundle: Bundle, folder: Path) -> Path:
    from planish.compiler.bundle.layout import RECIPE_FILE
    from planish.compiler.checkpoint.first_layers import open_first_layers
    from planish.compiler.export.float_model import float_model, save_model
    from planish.compiler.pipeline.recipe import Recipe
    from planish.compiler.pipeline.work_folder import check_space, clear_errors

    if not (bundle.path / RECIPE_FILE).is_file():
        raise ComparisonError(
            f"{bundle.path} has no {RECIPE_FILE}: it is a float export itself. Give a bundle that was compiled."
        )
    recipe = Recipe.read(bundle.path / RECIPE_FILE)
    checkpoint = open_first_layers(recipe.model, recipe.num_layers)
    try:
        with clear_errors(folder):
            check_space(folder, 4 * sum(prod(checkpoint.shape(name)) for name in checkpoint.names()))
            return save_model(float_model(checkpoint), folder)
    except DiskFullError as error:
        # Its own advice is for a compile, which keeps what it made and has an output folder.
        raise DiskFullError(
            f"The float model does not fit into {folder.parent}, the folder for temporary files. Free some space, "
            "or set TMPDIR to a folder on another disk."
        ) from error


def _measure(runnable: Runnable, threads: int, tokens: int, decode_tokens: int) -> dict[str, float]:
    arguments = [str(runnable.model), runnable.runs_on, str(threads), str(tokens), str(decode_tokens)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "planish.compiler.measure.bench_worker", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        killer = signal.Signals(-done.returncode).name
        raise PlanishError(
            f"{runnable.model} could not be measured: {killer} ended the process that ran it. Where that is SIGKILL, "
            "memory was too small for the model; measure fewer tokens, or free some."
        )
    if done.returncode:
        message = f"{runnable.model} could not be measured: {done.stderr.strip().rpartition(chr(10))[2]}"
        raise _class_of(done.returncode)(message)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _class_of(exit_code: int) -> type[PlanishError]:
    """Return the error that has an exit code; one that was not foreseen, such as that of a kill, is a PlanishError."""
    known: list[type[PlanishError]] = [getattr(errors, name) for name in errors.__all__]
    return next((each for each in known if each.exit_code == exit_code), PlanishError)
