"""Measure one model in a process of its own.

python -m planish.compiler.measure.bench_worker MODEL RUNS_ON THREADS TOKENS NEW
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from planish.compiler.errors import PlanishError
from planish.compiler.runtime.runnable import Runnable

__all__ = ["WARM_UP", "main"]

#: Prefills and decode steps before the clock starts: ONNX Runtime plans its memory in the first ones, and TensorRT-RTX
#: compiles its kernels. The steps take room in the context like those that are timed.
WARM_UP = 2
#: Prefills that are timed; the median counts.
_PREFILLS = 3


def main(runnable: Runnable, threads: int, tokens: int, new: int) -> dict[str, float]:
    """Measure a model; see `Side` in planish.compiler.measure.bench for what the numbers are."""
    started = time.perf_counter()
    session = runnable.load(threads)
    load_seconds = time.perf_counter() - started
    # What the tokens are does not change the work; small numbers exist in every vocabulary.
    prompt = np.random.default_rng(0).integers(3, 200, (1, tokens))
    prefills = []
    for _ in range(WARM_UP + _PREFILLS):
        started = time.perf_counter()
        _, cache = session.run(prompt, logits_to_keep=1)
        prefills.append(time.perf_counter() - started)
    steps = []
    for _ in range(WARM_UP + new):
        started = time.perf_counter()
        _, cache = session.run([[5]], cache, logits_to_keep=1)
        steps.append(time.perf_counter() - started)
    return {
        "prefill": tokens / float(np.median(prefills[WARM_UP:])),
        "decode": 1 / float(np.median(steps[WARM_UP:])),
        "resident_mib": psutil.Process().memory_info().rss / 2**20,
        "peak_mib": _peak_mib(),
        "load_seconds": load_seconds,
    }


def _peak_mib() -> float:
    # ru_maxrss would count the process that started this one: it is handed down through fork and exec.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM line")


if __name__ == "__main__":
    try:
        print(json.dumps(main(Runnable(Path(sys.argv[1]), sys.argv[2]), *map(int, sys.argv[3:6]))))
    except PlanishError as error:
        # The last line is what is told of a process that failed.
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(error.exit_code)
