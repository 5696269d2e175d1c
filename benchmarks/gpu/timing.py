"""Times of calls in CUDA graphs, and the ceilings of the card."""

import itertools
import statistics
from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu.shapes import Ceilings

__all__ = ["REPEATS", "measure_ceilings", "microseconds"]

#: Replays of a graph, of whose times the median counts.
REPEATS = 50
_WARM_UP = 5
#: Calls in a graph, at least: so many that a replay takes longer than the host needs to ask for the next.
_CALLS = 64
_SIDE = 8192


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Return the median time of a call: all are captured into one graph by turns, which is replayed.

    Replays are asked for one behind the other and waited for once, so the GPU is never idle between them. Else an event
    in front of a replay is passed while the host still prepares the launch, and its time counts as the GPU's.
    """
    rounds = -(-_CALLS // len(calls))
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_WARM_UP + REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    marks[-1].synchronize()
    times = [before.elapsed_time(after) for before, after in itertools.pairwise(marks[_WARM_UP:])]
    return 1e3 * statistics.median(times) / (rounds * len(calls))


def measure_ceilings() -> Ceilings:
    """Measure what the card does at most."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = microseconds([lambda: target.copy_(source)])
    halves = torch.randn(_SIDE, _SIDE, device="cuda").half()
    bytes_ = torch.randint(-128, 128, (_SIDE, _SIDE), device="cuda").to(torch.int8)
    room, sums = torch.empty_like(halves), torch.empty(_SIDE, _SIDE, dtype=torch.int32, device="cuda")
    products = microseconds([lambda: torch.mm(halves, halves, out=room)] * 4)
    int_products = microseconds([lambda: torch._int_mm(bytes_, bytes_.T, out=sums)] * 4)
    one = torch.zeros(1, device="cuda")
    launch = microseconds([one.zero_] * 100)
    operations = 2 * _SIDE**3
    return Ceilings(2e6 * source.numel() / copy, 1e6 * operations / products, 1e6 * operations / int_products, launch)
