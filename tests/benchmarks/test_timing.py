"""Times are the GPU's own: whatever a host takes to ask for the next replay is not in them."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import timing
from benchmarks.gpu.shapes import ROTATED_BYTES, copies_for, rotated_bytes

#: Milliseconds that the host takes to ask for a replay, and the GPU for a call.
LAUNCH, CALL = 0.010, 0.002


class Card:
    """A GPU with a clock. What is asked for begins when it was asked for and all before is done."""

    def __init__(self) -> None:
        self.host = self.done = 0.0
        self.captured = 0
        self.capturing = False

    def call(self) -> None:
        self.captured += self.capturing

    def replay(self) -> None:
        self.host += LAUNCH
        self.done = max(self.done, self.host) + self.captured * CALL

    @contextlib.contextmanager
    def graph(self, _: object) -> Iterator[None]:
        self.capturing = True
        yield
        self.capturing = False

    def event(self, **_: object) -> Any:
        event = SimpleNamespace(at=0.0)

        def record() -> None:
            event.at = self.done = max(self.done, self.host)

        def synchronize() -> None:
            self.host = max(self.host, event.at)

        event.record, event.synchronize = record, synchronize
        event.elapsed_time = lambda other: other.at - event.at
        return event


@pytest.mark.parametrize("count", [1, 3, 100])
def test_launches_are_not_counted(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card()
    for name, stand_in in (
        ("synchronize", lambda: None), ("CUDAGraph", lambda: card), ("graph", card.graph), ("Event", card.event)
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    calls: list[Callable[[], object]] = [card.call] * count
    assert timing.microseconds(calls) == pytest.approx(1e3 * CALL)
    assert card.captured >= 64
    assert card.captured % count == 0


@pytest.mark.parametrize(("l2", "rotated"), [(50 << 20, 3 * (50 << 20)), (4 << 20, ROTATED_BYTES)])
def test_caches_larger_than_an_h100s(l2: int, rotated: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rotated_bytes.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=l2))
    assert rotated_bytes() == rotated
    assert copies_for(1e6) == rotated // 1_000_000 + 1
    rotated_bytes.cache_clear()
