"""How many channels of each group of linears get the high bits, all together within a budget of bits.

What is minimised is sum_b w_b [ sum_l a_l(k_l) + sum_{l<m} C_lm(k_l, k_m) ] over blocks b and their groups l, m, the
quadratic program of arXiv 2511.17801, under one budget for the stored bits of all groups. Blocks share nothing but the
budget: so all choices of a block are enumerated, what others beat in bits and loss at once is dropped, and the rest is
a multiple-choice knapsack. Both steps are exact.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from planish.compiler.errors import SelectionError
from planish.compiler.select.budget import Candidate, choose, unbeaten
from planish.compiler.select.channel_split import ChannelSplit
from planish.compiler.select.pair_losses import PairLosses

__all__ = ["Counts", "Shapes", "average_bits", "bit_budget", "choose_counts", "counts_of_share", "fixed_counts"]

#: By group, the shape [out, in] of its weights, one below the other.
Shapes = Mapping[str, tuple[int, int]]
#: By group, how many of its channels are high.
Counts = dict[str, int]
_Number = TypeVar("_Number", np.int64, np.float64)

#: Most choices of a block that are enumerated: 8 bytes each, several times over.
_MOST_CHOICES = 10_000_000


def bit_budget(average: float, shapes: Shapes, blocks: int) -> int:
    """Return how many bits `blocks` blocks may take for `average` bits per weight."""
    return math.floor(average * blocks * _weights(shapes))


def average_bits(chosen: Sequence[Counts], shapes: Shapes, split: ChannelSplit) -> float:
    """Return the stored bits per weight of a choice: codes, scales and orders of channels."""
    return sum(_bits(each, shapes, split) for each in chosen) / (len(chosen) * _weights(shapes))


def choose_counts(
    losses: Sequence[PairLosses],
    shapes: Shapes,
    split: ChannelSplit,
    average: float,
    block_weights: Sequence[float] | None = None,
) -> list[Counts]:
    """Return how many channels of every group of every block are high: the least loss within the budget.

    Args:
        losses: measured at every block.
        shapes: of the groups.
        split: how channels are stored.
        average: the budget, in stored bits per weight of these groups, scales and orders of channels counted.
        block_weights: what multiplies the losses of each block, such as `BlockSensitivity.output_weight`; None is 1.

    Raises:
        SelectionError: if no choice is within the budget, or a block has too many choices.
    """
    tables = [_Choices.of(each, shapes, split) for each in losses]
    weights = [1.0] * len(tables) if block_weights is None else block_weights
    candidates = [
        [Candidate(cost, weight * loss) for cost, loss in zip(table.bits.tolist(), table.losses.tolist(), strict=True)]
        for table, weight in zip(tables, weights, strict=True)
    ]
    budget, least = bit_budget(average, shapes, len(tables)), sum(int(table.bits.min()) for table in tables)
    if least > budget:
        raise SelectionError(
            f"{average:g} bits per weight are too few: with the fewest high channels that were tried it takes "
            f"{least / (len(tables) * _weights(shapes)):.3f}. Give more bits, or try fewer high channels."
        )
    chosen = choose(candidates, budget)
    return [table.counts(index) for table, index in zip(tables, chosen, strict=True)]


def fixed_counts(shapes: Shapes, split: ChannelSplit, average: float) -> Counts:
    """Return the largest share of high channels that is the same in all groups and within the budget, as counts.

    Any share is tried, not only the candidates that losses were measured for: so this rule is not worse than another
    for leaving bits unused. A group takes the multiple of the step that is not above its share.

    Raises:
        SelectionError: if the low bits alone exceed the budget.
    """
    channels = {name: split.channels(shape) for name, shape in shapes.items()}
    shares = {count / n for n in channels.values() for count in range(0, split.most(n) + 1, split.step)}
    budget = bit_budget(average, shapes, 1)
    for share in sorted(shares, reverse=True):
        # The share is a quotient: what it makes of its own group again may fall short of the whole number by rounding.
        counts = {
            name: min(split.most(n), math.floor(share * n / split.step + 1e-9) * split.step)
            for name, n in channels.items()
        }
        if _bits(counts, shapes, split) <= budget:
            return counts
    raise SelectionError(
        f"{average:g} bits per weight are too few: the low format alone takes "
        f"{average_bits([dict.fromkeys(shapes, 0)], shapes, split):.3f}. Give more bits."
    )


def counts_of_share(shapes: Shapes, split: ChannelSplit, share: float) -> Counts:
    """Return by group the multiple of the step that is closest to a share of its channels.

    Raises:
        SelectionError: if that is none, or all, of the channels of a group.
    """
    counts = {}
    for name, shape in shapes.items():
        n = split.channels(shape)
        counts[name] = round(share * n / split.step) * split.step
        if not 0 < counts[name] <= split.most(n):
            if n <= split.step:
                raise SelectionError(
                    f"The {n} channels at {name} are too few for high ones among them, which are taken {split.step} at "
                    "a time. Leave out --hic-ratio."
                )
            raise SelectionError(
                f"A share of {share:g} of the {n} channels at {name} cannot be high: they are taken {split.step} at a "
                f"time, from {split.step} to {split.most(n)}. Give a share of {split.step / n:.3f} to "
                f"{split.most(n) / n:.3f}."
            )
    return counts


@dataclasses.dataclass(frozen=True)
class _Choices:
    """The choices of a block that no other beats in bits and loss at once.

    Attributes:
        bits: int64 [choices], ascending.
        losses: float64 [choices], descending.
        indices: by group, which candidate it takes, int64 [choices].
        tried: by group, its candidates.
    """

    bits: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]
    indices: dict[str, npt.NDArray[np.int64]]
    tried: dict[str, list[int]]

    @classmethod
    def of(cls, measured: PairLosses, shapes: Shapes, split: ChannelSplit) -> "_Choices":
        """Enumerate every choice, one axis of an array for each group."""
        tried = measured.counts
        sizes = [len(counts) for counts in tried.values()]
        if math.prod(sizes) > _MOST_CHOICES:
            raise SelectionError(
                f"{len(sizes)} groups with {sizes} numbers of high channels make {math.prod(sizes):.1e} choices in a "
                f"block; more than {_MOST_CHOICES:.0e} are not enumerated. Try fewer numbers, or form fewer groups."
            )
        bits, losses = np.zeros(sizes, np.int64), np.zeros(sizes, np.float64)
        for axis, (name, counts) in enumerate(tried.items()):
            cost = np.array([split.stored_bits(shapes[name], count) for count in counts], np.int64)
            bits += _along(cost, (axis,), len(sizes))
            losses += _along(np.asarray(measured.alone[name], np.float64), (axis,), len(sizes))
        for (i, first), (j, second) in itertools.combinations(enumerate(tried), 2):
            losses += _along(measured.interaction(first, second), (i, j), len(sizes))
        kept = unbeaten(bits.ravel(), losses.ravel())
        indices = np.unravel_index(kept, sizes)
        return cls(bits.ravel()[kept], losses.ravel()[kept], dict(zip(tried, indices, strict=True)), tried)

    def counts(self, choice: int) -> Counts:
        """Return how many channels of each group are high."""
        return {name: counts[self.indices[name][choice]] for name, counts in self.tried.items()}


def _along(values: npt.NDArray[_Number], axes: tuple[int, ...], ndim: int) -> npt.NDArray[_Number]:
    """Return `values` with its dimensions at `axes` of `ndim`, in this order, and 1 elsewhere."""
    shape = [1] * ndim
    for axis, size in zip(axes, values.shape, strict=True):
        shape[axis] = size
    return values.reshape(shape)


def _bits(counts: Counts, shapes: Shapes, split: ChannelSplit) -> int:
    return sum(split.stored_bits(shapes[name], count) for name, count in counts.items())


def _weights(shapes: Shapes) -> int:
    return sum(rows * inputs for rows, inputs in shapes.values())
