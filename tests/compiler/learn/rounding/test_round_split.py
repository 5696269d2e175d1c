"""Both parts of a weight rounded by what its outputs say, against both rounded to nearest."""

import pytest
import torch

from planish.compiler.learn.rounding.round_split import round_split
from planish.compiler.select.channel_split import Axis, ChannelSplit
from planish.passes.scheme import LinearFormat
from tests.rounding import error, moment, weights

ORDER = torch.randperm(32, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("count", [0, 8, 32])
def test_outputs_move_less_than_by_rounding_to_nearest(axis: Axis, count: int) -> None:
    w, H, held_out = weights(32, 32), moment(32, 1), moment(32, 2)
    split = ChannelSplit(LinearFormat(2, 16), LinearFormat(4, 16), axis, step=8)
    nearest, found = split.quantize(w, ORDER, count), round_split(w, ORDER, count, split, H, held_out)
    before, after = (float(error(w, each.dequantize(), held_out).sum()) for each in (nearest, found))
    assert after < 0.9 * before
    for part, expected in ((found.high, nearest.high), (found.low, nearest.low)):
        assert (part is None) == (expected is None)
        if part is not None and expected is not None:
            assert part.codes.shape == expected.codes.shape
            assert part.scale.shape == expected.scale.shape
            assert (part.bits, part.group) == (expected.bits, expected.group)
