"""Times of calls in CUDA graphs, and the ceilings of the card."""

import statistics
from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu.shapes import Ceilings

__all__ = ["REPEATS", "measure_ceilings", "microseconds"]

#: Replays of a graph, of whose times the median counts.
REPEATS = 50
_WARM_UP = 5
_SIDE = 8192


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Return the median time of a call: all are captured into one graph, which is replayed."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for repeat in range(_WARM_UP + REPEATS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat >= _WARM_UP:
            times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times) / len(calls)


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
