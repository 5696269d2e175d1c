"""The GPU benchmark as far as a host goes: shapes, floors, rows, the table, and every call on small weights."""

import dataclasses
import json
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu import cases
from benchmarks.gpu.shapes import (
    LAYERS,
    ROTATED_BYTES,
    Ceilings,
    Shape,
    copies_for,
    floor,
    linear_bytes,
    rotated_bytes,
)
from planish.plugins import linear_ops, on_tensors, token_ops
from planish.plugins.kernel_library import Order
from tests.kernel_emulation import emulated_kernels

#: The public numbers of an H100.
H100 = Ceilings(3.35e12, 989e12, 1979e12, 1.0)
SMALL = (
    Shape("qkv", 128, 64, (8, 16)),
    Shape("o", 128, 64, (8, 16)),
    Shape("gate_up", 128, 96, (8, 16)),
    Shape("down", 192, 64, (12, 16)),
)


def test_widths_are_those_of_the_models() -> None:
    for model, hidden, kv, ffn in (("LLaMA-2-7B", 4096, 4096, 11008), ("LLaMA-3-8B", 4096, 1024, 14336)):
        found = {shape.name: (shape.channels, shape.rows) for shape in LAYERS[model]}
        assert found == {
            "qkv": (hidden, hidden + 2 * kv), "o": (hidden, hidden), "gate_up": (hidden, 2 * ffn), "down": (ffn, hidden)
        }  # fmt: skip
        for shape in LAYERS[model]:
            assert shape.factors[0] * shape.factors[1] == shape.channels


def test_floors() -> None:
    """By hand: bytes of 3-bit weights, and operations of a prompt, over an H100's peaks."""
    gate_up = LAYERS["LLaMA-3-8B"][2]
    weights = 4096 * 28672 * 3 / 8
    one = linear_bytes(gate_up, 1, 3, 8)
    assert one == weights + 4 * 28672 + 4096 + 2 * 28672
    assert floor(one, 2 * 4096 * 28672, H100, int8=True) == pytest.approx(1e6 * one / 3.35e12)
    assert floor(one, 2 * 4096 * 28672, H100, int8=True) == pytest.approx(13.2, abs=0.1)
    prompt = floor(linear_bytes(gate_up, 2048, 3, 8), 2 * 2048 * 4096 * 28672, H100, int8=True)
    assert prompt == pytest.approx(243, abs=1)
    assert floor(0, 2 * 2048 * 4096 * 28672, H100, int8=False) == pytest.approx(486, abs=1)
    assert linear_bytes(gate_up, 0, 16, 16) == 4096 * 28672 * 2


def test_weights_taking_turns_do_not_fit_into_l2() -> None:
    rotated = rotated_bytes()
    assert rotated >= ROTATED_BYTES > 100e6
    for size in (6e6, 44e6, 119e6, 500e6):
        assert copies_for(size) >= 2
        assert copies_for(size) * size > rotated


def test_every_goal_has_its_row() -> None:
    rows = {(case.name, case.tokens, case.what, case.peer): case.goal for case in cases.all_cases()}
    for model in LAYERS:
        for name, goal in (("gate_up", 4.0), ("down", 3.3), ("qkv", 2.5), ("o", 2.0)):
            assert rows[f"{model} {name}", 1, "w3a3", "torch.mm fp16"] == goal
            assert rows[f"{model} {name}", 1, "w3a3", "torch._weight_int4pack_mm"] == 1.2
            assert rows[f"{model} {name}", 2048, "w3a3", "torch.mm fp16"] == 1.5
            assert rows[f"{model} {name}", 1, "w3a3, 12.5% w4a4", "w3a3"] == pytest.approx(1 / 1.08)
        assert rows[f"{model} gate_up", 16, "w3a3", "torch.mm fp16"] == 3.5
        assert rows[f"{model} layer", 1, "w3a3 with prologues", "torch.mm fp16"] == 3.2
        for what in set(cases.TRANSFORMS) - {"quantise"}:
            assert rows[f"{model} qkv", 2048, what, "copy of the rows"] == pytest.approx(1 / 1.5)


def test_a_row_and_the_table() -> None:
    case = cases.linear_case("LLaMA-3-8B", LAYERS["LLaMA-3-8B"][2], 1, 4.0)
    met, missed = (benchmark.Row.of(case, ours, 80.0, H100) for ours in (20.0, 40.0))
    assert met.cells() == [
        "LLaMA-3-8B gate_up", "1", "w3a3", "20.0", "torch.mm fp16", "80.0", "4.00", "4.00 met", "13.2", "66%"
    ]  # fmt: skip
    assert missed.cells()[6:8] == ["2.00", "4.00 missed"]
    assert dataclasses.replace(met, goal=None).cells()[7] == ""
    console = Console(width=170)
    with console.capture() as captured:
        console.print(benchmark.table_of([met, missed], "NVIDIA H100", H100))
    shown = captured.get()
    assert "NVIDIA H100: 3.35 TB/s, 989 T float16/s, 1979 T int8/s" in shown
    assert "4.00 met" in shown
    assert "4.00 missed" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said() -> None:
    with pytest.raises(SystemExit, match=r"finds no GPU, and these are times on one\. .*; 2 rows are waiting"):
        benchmark.main(["--only", "8B o w3a3, 12.5% w4a4"])


def test_no_row() -> None:
    with pytest.raises(SystemExit, match="error: no row contains 'w9'"):
        benchmark.main(["--only", "w9"])


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Kernels emulated on the host, and few copies."""
    monkeypatch.setattr(on_tensors, "DEVICE", "cpu")
    for module in (token_ops, linear_ops):
        monkeypatch.setattr(module, "kernel_library", emulated_kernels)
    monkeypatch.setattr(cases, "copies_for", lambda size: 2)
    return torch.device("cpu")


def small_cases(tokens: int) -> Iterator[cases.Case]:
    for shape in SMALL:
        yield cases.linear_case("small", shape, tokens, None)
        yield cases.high_case("small", dataclasses.replace(shape, channels=shape.channels * 4), tokens)
        yield cases.weight_only_case("small", shape, tokens, 3)
        yield cases.weight_only_case("small", shape, tokens, 4)
        for what in cases.TRANSFORMS:
            yield cases.quantise_case("small", shape, tokens, what, None)
    yield cases.layer_case("small", SMALL, tokens, None)


@pytest.mark.parametrize("tokens", [1, 20])
def test_every_call_runs(tokens: int, host: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "microseconds", lambda calls: float(sum(call() is not None or 1 for call in calls)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    rows = [benchmark.measure(case, host, H100) for case in small_cases(tokens)]
    assert all(row.ours_us >= 2 and row.peer_us >= 2 and row.floor_us > 0 for row in rows)
    assert json.dumps([dataclasses.asdict(row) for row in rows])


def test_weights_of_the_right_size(host: torch.device) -> None:
    """Random words have the shape that packing gives."""
    for bits in (2, 3, 4):
        weight = cases.random_weight(33, 300, bits, host)
        assert weight.words.shape == (3, {2: 384, 3: 512, 4: 320}[bits] * 16 * bits // 32)
    assert cases.tokens_for(SMALL[0], 3, 64, host).order is Order.LANES
