"""Weights in two parts: what they hold, and how many bits they take."""

import pytest
import torch

from planish.compiler.errors import SelectionError
from planish.compiler.quantize.arithmetic import dequantize_weight, quantize_weight
from planish.compiler.select.channel_split import Axis, ChannelSplit
from planish.passes.scheme import LinearFormat

LOW, HIGH = LinearFormat(2, 16), LinearFormat(4, 16)


def weight(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("count", [0, 24, 40])
def test_every_channel_is_on_the_grid_of_its_part(axis: Axis, group: int | None, count: int) -> None:
    low, high = LinearFormat(2, 16, group), LinearFormat(4, 16, group)
    w, order = weight(48, 48), torch.randperm(48, generator=torch.Generator().manual_seed(1))
    found = ChannelSplit(low, high, axis, step=8).quantize(w, order, count).dequantize()
    for form, channels in ((high, order[:count]), (low, order[count:])):
        if not len(channels):
            continue
        part = w[:, channels] if axis == "in" else w[channels]
        expected = dequantize_weight(quantize_weight(part, form))
        torch.testing.assert_close(found[:, channels] if axis == "in" else found[channels], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("axis", "group", "count", "expected"),
    [
        # Codes, scales of both parts, order of channels.
        ("in", None, 64, 100 * (64 * 4 + 136 * 2) + 100 * 2 * 32 + 200 * 32),
        ("in", None, 0, 100 * 200 * 2 + 100 * 32),
        # 136 input channels are 3 groups of 64, the last one short.
        ("in", 64, 64, 100 * (64 * 4 + 136 * 2) + 100 * (1 + 3) * 16 + 200 * 32),
        ("out", None, 64, 200 * (64 * 4 + 36 * 2) + 100 * 32 + 100 * 32),
        ("out", 64, 64, 200 * (64 * 4 + 36 * 2) + 100 * 4 * 16 + 100 * 32),
    ],
)
def test_bits_are_counted(axis: Axis, group: int | None, count: int, expected: int) -> None:
    split = ChannelSplit(LinearFormat(2, 16, group), LinearFormat(4, 16, group), axis)
    assert split.stored_bits((100, 200), count) == expected


def test_an_order_that_is_folded_takes_nothing() -> None:
    split = ChannelSplit(LOW, HIGH, index_bits=0)
    assert ChannelSplit(LOW, HIGH).stored_bits((100, 200), 64) - split.stored_bits((100, 200), 64) == 32 * 200


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ([0, 65], r"65 of 600 channels cannot be high: take multiples of 64 from 0 to 576\."),
        ([-64, 0], "-64 of 600"),
        ([640], "640 of 600"),
        ([600], "600 of 600"),
        ([64, 64], "must grow"),
        ([64, 0], "must grow"),
        ([], "must grow"),
    ],
)
def test_impossible_counts_are_refused(counts: list[int], told: str) -> None:
    with pytest.raises(SelectionError, match=told):
        ChannelSplit(LOW, HIGH).check_counts(counts, 600)


def test_possible_counts_pass() -> None:
    ChannelSplit(LOW, HIGH).check_counts([0, 64, 576], 600)
    ChannelSplit(LOW, HIGH, step=8).check_counts([8], 16)


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(SelectionError, match="more bits"):
        ChannelSplit(HIGH, HIGH)
    with pytest.raises(SelectionError, match="more bits"):
        ChannelSplit(LOW, LinearFormat(16, 16))
    with pytest.raises(SelectionError, match="Steps of 0"):
        ChannelSplit(LOW, HIGH, step=0)
