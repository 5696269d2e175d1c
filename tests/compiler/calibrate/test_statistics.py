"""What is streamed agrees with numpy and torch.quantile on all data at once, however it is split."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from planish.compiler.calibrate import statistics
from planish.compiler.calibrate.statistics import Moments, QuantileSketch
from planish.compiler.errors import CalibrationError

#: What the documentation of QuantileSketch promises, relative.
BOUND = 0.0046


def activations(tokens: int = 3000, width: int = 24) -> Tensor:
    """Channels of very different sizes and means, heavy tails, exact zeros, a massive first token."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=random) * torch.logspace(-4, 3, width) + torch.linspace(-2, 2, width)
    x[::100, 3] *= 1000
    x[torch.rand(tokens, generator=random) < 0.3, 5] = 0
    x[:, 7] = 0
    x[0, 11] = 2e4
    return x


def in_parts(x: Tensor, sizes: Sequence[int] = (1, 0, 517, 2, 1200)) -> list[Tensor]:
    return list(x.split([*sizes, len(x) - sum(sizes)]))


@pytest.mark.parametrize("q", [0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0])
def test_quantiles_are_within_the_bound(q: float) -> None:
    x = activations()
    sketch = QuantileSketch(x.shape[1])
    for part in in_parts(x):
        sketch.update(part)
    expected = x.abs().quantile(q, dim=0)
    torch.testing.assert_close(sketch.quantile(q), expected, rtol=BOUND, atol=1e-8)
    if q == 1:
        assert torch.equal(sketch.quantile(q), expected)


def test_the_bound_holds_over_the_whole_range_and_is_not_loose() -> None:
    # One value per channel between two others, so that the median is that value and no interpolation hides an error.
    values = torch.logspace(-7.99, 7.99, 2_000, dtype=torch.float64).float()
    sketch = QuantileSketch(len(values))
    sketch.update(torch.stack([values, values / 2, values * 2]))
    error = (sketch.quantile(0.5) / values - 1).abs().max().item()
    assert 0.9 * BOUND < error < BOUND


def test_values_out_of_range() -> None:
    sketch = QuantileSketch(2)
    sketch.update(torch.tensor([[1e-9, 3e9], [-5e-9, 1e9], [2e-9, -2e9]]))
    low, high = sketch.quantile(0.5).tolist()
    assert low == 0
    assert high == pytest.approx(9.9e7, rel=0.01)
    assert sketch.quantile(1).tolist() == pytest.approx([5e-9, 3e9])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats(dtype: torch.dtype) -> None:
    x = activations(500)[:, 8:16].to(dtype)
    sketch = QuantileSketch(8)
    sketch.update(x)
    torch.testing.assert_close(sketch.quantile(0.9), x.float().abs().quantile(0.9, dim=0), rtol=BOUND, atol=1e-8)


def test_tokens_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations()
    whole = QuantileSketch(x.shape[1])
    whole.update(x)
    expected = whole.quantile(0.37)
    monkeypatch.setattr(statistics, "_ENTRIES", 24 * 7 + 3)
    parts = QuantileSketch(x.shape[1])
    parts.update(x)
    assert torch.equal(parts.quantile(0.37), expected)


def test_sketches_merge() -> None:
    x = activations()
    whole, one, other = (QuantileSketch(x.shape[1]) for _ in range(3))
    whole.update(x)
    one.update(x[:700])
    other.update(x[700:])
    one.merge(other)
    assert one.tokens == len(x)
    for q in (0.3, 0.999, 1.0):
        assert torch.equal(one.quantile(q), whole.quantile(q))


def moments_of(parts: Sequence[Tensor], first: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> Moments:
    moments = Moments(parts[0].shape[1])
    for i, part in enumerate(parts):
        moments.update(part, first=first[i], weights=weights[i] if weights else None)
    return moments


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_moments_are_those_of_all_data(weighted: bool, merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_ENTRIES", 24 * 100)
    x = activations()
    first = torch.arange(len(x)) % 500 == 0
    weights = torch.rand(len(x), generator=torch.Generator().manual_seed(1)) if weighted else torch.ones(len(x))
    parts, firsts = in_parts(x), in_parts(first)
    given = in_parts(weights) if weighted else None
    if merged:
        moments = moments_of(parts[:3], firsts[:3], given and given[:3])
        moments.merge(moments_of(parts[3:], firsts[3:], given and given[3:]))
    else:
        moments = moments_of(parts, firsts, given)

    whole, w = x.numpy().astype(np.float64), weights.numpy().astype(np.float64)
    second = (whole * w[:, None]).T @ whole
    scale = np.sqrt(np.outer(second.diagonal(), second.diagonal()))
    assert np.abs(moments.second.numpy() - second).max() <= 1e-13 * scale.max()
    assert (np.abs(moments.second.numpy() - second) <= 1e-12 * scale).all()
    assert moments.weight == pytest.approx(w.sum(), rel=1e-12)
    assert moments.tokens == len(x)
    assert np.array_equal(moments.max_abs.numpy(), np.abs(x.numpy()).max(0))
    rest = x.numpy()[~first.numpy()]
    assert np.array_equal(moments.max_abs_rest.numpy(), np.abs(rest).max(0))
    assert moments.max_abs[11] == 2e4 > moments.max_abs_rest[11]
    assert moments.excess_kurtosis == pytest.approx(kurtosis(whole), rel=1e-11)


def kurtosis(x: npt.NDArray[np.float64]) -> float:
    """The definition, over all entries, in the longest floats there are."""
    off = x.astype(np.longdouble) - x.astype(np.longdouble).mean()
    return float((off**4).mean() / (off**2).mean() ** 2 - 3)


def test_kurtosis_is_stable_far_from_zero() -> None:
    # Sums of plain fourth powers, 1e16 each, would leave nothing of a deviation of 1; the parts' means differ.
    x = np.random.default_rng(0).laplace(size=(400, 6)) + 1e4 + np.arange(400)[:, None] / 100
    moments = Moments(6)
    for part in np.array_split(x, 7):
        moments.update(torch.from_numpy(part))
    assert moments.excess_kurtosis == pytest.approx(kurtosis(x), rel=1e-8)


def test_kurtosis_of_nothing() -> None:
    moments = Moments(2)
    assert math.isnan(moments.excess_kurtosis)
    moments.update(torch.full((5, 2), 3.0))
    assert math.isnan(moments.excess_kurtosis)


def test_a_sequence_of_first_tokens_has_no_rest() -> None:
    moments = Moments(2)
    moments.update(torch.ones(1, 2), first=torch.tensor([True]))
    assert moments.max_abs_rest.tolist() == [0, 0]


@pytest.mark.parametrize("kind", [QuantileSketch, Moments])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(kind: type[QuantileSketch] | type[Moments], bad: float) -> None:
    x = torch.ones(4, 3)
    x[2, 1] = bad
    with pytest.raises(CalibrationError, match="activations of 1 of 3 channels are not finite"):
        kind(3).update(x)


@pytest.mark.parametrize("kind", [QuantileSketch, Moments])
@pytest.mark.parametrize("shape", [(4, 2), (2, 4, 3), (3,)])
def test_wrong_shapes(kind: type[QuantileSketch] | type[Moments], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"not \[tokens, 3\]"):
        kind(3).update(torch.ones(shape))


@pytest.mark.parametrize(
    ("weights", "first", "message"),
    [
        (torch.ones(3), None, "for 4 tokens"),
        (None, torch.zeros(5, dtype=torch.bool), "for 4 tokens"),
        (torch.tensor([1.0, -1, 1, 1]), None, "not negative"),
        (torch.tensor([1.0, math.nan, 1, 1]), None, "finite"),
    ],
)
def test_wrong_weights(weights: Tensor | None, first: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Moments(3).update(torch.ones(4, 3), weights=weights, first=first)


def test_misuse() -> None:
    sketch = QuantileSketch(2)
    with pytest.raises(ValueError, match="no token"):
        sketch.quantile(0.5)
    with pytest.raises(ValueError, match="from 0 to 1"):
        sketch.quantile(1.5)
    with pytest.raises(ValueError, match="2 and 3 channels"):
        sketch.merge(QuantileSketch(3))
    with pytest.raises(ValueError, match="2 and 3 channels"):
        Moments(2).merge(Moments(3))
