"""Channel counts within a budget of bits: against trying everything, and on sizes of real models."""

import itertools
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from planish.compiler.errors import SelectionError
from planish.compiler.select import ratios as module
from planish.compiler.select.channel_split import ChannelSplit
from planish.compiler.select.pair_losses import PairLosses
from planish.compiler.select.ratios import average_bits, bit_budget, choose_counts, counts_of_share, fixed_counts
from planish.passes.scheme import LinearFormat

SPLIT = ChannelSplit(LinearFormat(2, 16), LinearFormat(4, 16), step=8)
KERNEL = ChannelSplit(LinearFormat(2, 16), LinearFormat(4, 16))
SHAPES = {"attn_in": (24, 32), "attn_out": (32, 24), "ffn_out": (16, 40)}
SMOLLM2 = {"attn_in": (960, 576), "attn_out": (576, 576), "ffn_in": (3072, 576), "ffn_out": (576, 1536)}
LLAMA_7B = {
    **dict.fromkeys(("q", "k", "v", "o"), (4096, 4096)),
    **dict.fromkeys(("gate", "up"), (11008, 4096)),
    "down": (4096, 11008),
}


def random_losses(seed: int, counts: Mapping[str, list[int]], interaction: float = 0.5) -> PairLosses:
    """Return falling losses of each group, and interactions of either sign, so large relative to their sums."""
    rng = np.random.default_rng(seed)
    size = float(np.exp(rng.normal()))
    alone = {name: size * np.sort(rng.random(len(each)))[::-1] for name, each in counts.items()}
    together: dict[str, dict[str, list[list[float]]]] = {name: {} for name in counts}
    for first, second in itertools.combinations(counts, 2):
        sums = np.add.outer(alone[first], alone[second])
        together[first][second] = (sums * (1 + interaction * rng.normal(size=sums.shape))).tolist()
    return PairLosses(dict(counts), {name: each.tolist() for name, each in alone.items()}, together)


def loss_of(losses: PairLosses, chosen: Mapping[str, int]) -> float:
    index = {name: losses.counts[name].index(count) for name, count in chosen.items()}
    total = sum(losses.alone[name][i] for name, i in index.items())
    for first, second in itertools.combinations(index, 2):
        k, j = index[first], index[second]
        total += losses.together[first][second][k][j] - losses.alone[first][k] - losses.alone[second][j]
    return total


@pytest.mark.parametrize("seed", range(12))
def test_it_is_what_trying_everything_finds(seed: int) -> None:
    counts = {"attn_in": [0, 8, 32], "attn_out": [0, 16], "ffn_out": [0, 8, 24]}
    losses = [random_losses(2 * seed + block, counts) for block in range(2)]
    weights = [1.0, 3.0] if seed % 2 else None
    every = [dict(zip(counts, each, strict=True)) for each in itertools.product(*counts.values())]
    first_weight, second_weight = weights or (1.0, 1.0)

    def together(chosen: Sequence[Mapping[str, int]]) -> float:
        return first_weight * loss_of(losses[0], chosen[0]) + second_weight * loss_of(losses[1], chosen[1])

    for average in (3.2, 3.6, 4.1, 4.5, 5.5):
        found = choose_counts(losses, SHAPES, SPLIT, average, weights)
        pairs = [pair for pair in itertools.product(every, every) if average_bits(pair, SHAPES, SPLIT) <= average]
        assert 0 < len(pairs) < len(every) ** 2 or average == 5.5
        assert together(found) == pytest.approx(min(map(together, pairs)), rel=1e-12)
        assert average_bits(found, SHAPES, SPLIT) <= average


@pytest.mark.parametrize(
    ("shapes", "blocks", "tried", "average"),
    [
        (SMOLLM2, 30, (0, 64, 128, 192, 256, 320), 2.6),
        (SMOLLM2, 30, (0, 64, 128, 192, 256, 320), 2.3),
        (LLAMA_7B, 32, (0, 64, 192, 384, 768), 2.24),
        (LLAMA_7B, 32, (0, 64, 192, 384, 768), 2.1),
    ],
)
def test_realistic_sizes_use_the_budget_in_seconds(
    shapes: dict[str, tuple[int, int]], blocks: int, tried: tuple[int, ...], average: float
) -> None:
    counts = {name: [*tried] for name in shapes}
    losses = [random_losses(block, counts, interaction=0.02) for block in range(blocks)]
    started = time.process_time()
    chosen = choose_counts(losses, shapes, KERNEL, average)
    assert time.process_time() - started < 10
    assert average - 0.01 < average_bits(chosen, shapes, KERNEL) <= average


def test_a_larger_budget_is_never_worse() -> None:
    counts = {name: [0, 64, 128, 256] for name in SMOLLM2}
    losses = [random_losses(block, counts) for block in range(6)]
    reached = []
    for average in (2.2, 2.3, 2.5, 2.8, 3.5):
        chosen = choose_counts(losses, SMOLLM2, KERNEL, average)
        reached.append(sum(loss_of(*pair) for pair in zip(losses, chosen, strict=True)))
    assert reached == sorted(reached, reverse=True)


def test_the_least_budget_has_no_high_channels() -> None:
    counts = {name: [0, 64] for name in SMOLLM2}
    least = dict.fromkeys(SMOLLM2, 0)
    average = average_bits([least], SMOLLM2, KERNEL)
    losses = [random_losses(0, counts), random_losses(1, counts)]
    assert choose_counts(losses, SMOLLM2, KERNEL, average + 1e-9) == [least, least]
    with pytest.raises(SelectionError, match=f"it takes {average:.3f}"):
        choose_counts(losses, SMOLLM2, KERNEL, average - 0.01)


def test_a_weight_of_nothing_leaves_the_bits_to_others() -> None:
    counts = {"attn_out": [0, 64, 128]}
    losses = PairLosses(counts, {"attn_out": [3.0, 2.0, 1.0]}, {"attn_out": {}})
    shapes = {"attn_out": (576, 576)}
    average = average_bits([{"attn_out": 0}, {"attn_out": 128}], shapes, KERNEL)
    assert choose_counts([losses] * 2, shapes, KERNEL, average, [0.0, 1.0]) == [{"attn_out": 0}, {"attn_out": 128}]


def test_too_many_choices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_CHOICES", 15)
    with pytest.raises(SelectionError, match="Try fewer numbers"):
        choose_counts([random_losses(0, {name: [0, 64] for name in SMOLLM2})], SMOLLM2, KERNEL, 3)


@pytest.mark.parametrize("average", [2.11, 2.3, 2.5, 3.0, 4.05, 5.0])
def test_fixed_is_the_largest_share_that_fits(average: float) -> None:
    found = fixed_counts(SMOLLM2, KERNEL, average)
    channels = {name: KERNEL.channels(shape) for name, shape in SMOLLM2.items()}
    assert average_bits([found], SMOLLM2, KERNEL) <= average
    most = {name: KERNEL.most(n) for name, n in channels.items()}
    if found != most:
        # The next share is the least one above at which any group gets more.
        following = min((found[name] // 64 + 1) * 64 / n for name, n in channels.items() if found[name] < most[name])
        more = {name: min(most[name], int(following * n / 64 + 1e-9) * 64) for name, n in channels.items()}
        assert all(more[name] >= found[name] for name in channels)
        assert average_bits([more], SMOLLM2, KERNEL) > average


def test_fixed_at_the_ends() -> None:
    shapes = {"ffn_in": (100, 600)}
    assert fixed_counts(shapes, KERNEL, 16) == {"ffn_in": 576}
    assert fixed_counts(shapes, KERNEL, 2.06) == {"ffn_in": 0}
    with pytest.raises(SelectionError, match=r"takes 2\.053"):
        fixed_counts(shapes, KERNEL, 2)


def test_a_share_becomes_the_closest_steps() -> None:
    assert counts_of_share({"a": (10, 600), "b": (10, 1536)}, KERNEL, 0.15) == {"a": 64, "b": 256}
    with pytest.raises(SelectionError, match=r"600 channels at a cannot be high: .* Give a share of 0\.107 to 0\.960"):
        counts_of_share({"a": (10, 600)}, KERNEL, 0.05)


def test_budget() -> None:
    assert bit_budget(2.3, {"a": (10, 10), "b": (1, 5)}, 3) == 724
