"""What is streamed agrees with numpy and torch.quantile on all data at once, however it is split."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from planish.compiler.calibrate import statistics
from planish.compiler.calibrate.statistics import Magnitudes, QuantileSketch
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


def magnitudes_of(parts: Sequence[Tensor], first: Sequence[Tensor]) -> Magnitudes:
    magnitudes = Magnitudes(parts[0].shape[1])
    for part, of_part in zip(parts, first, strict=True):
        magnitudes.update(part, first=of_part)
    return magnitudes


def test_magnitudes_are_those_of_all_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_ENTRIES", 24 * 100)
    x = activations()
    first = torch.arange(len(x)) % 500 == 0
    magnitudes = magnitudes_of(in_parts(x), in_parts(first))
    whole = x.numpy().astype(np.float64)
    assert magnitudes.tokens == len(x)
    assert np.array_equal(magnitudes.max_abs.numpy(), np.abs(x.numpy()).max(0))
    rest = x.numpy()[~first.numpy()]
    assert np.array_equal(magnitudes.max_abs_rest.numpy(), np.abs(rest).max(0))
    assert magnitudes.max_abs[11] == 2e4 > magnitudes.max_abs_rest[11]
    assert magnitudes.rms == pytest.approx(np.sqrt((whole**2).mean()), rel=1e-11)
    crests = np.abs(whole).max(1) / np.sqrt((whole**2).mean(1))
    assert magnitudes.crest == pytest.approx(crests.mean(), rel=1e-7)
    assert magnitudes.excess_kurtosis == pytest.approx(kurtosis(whole), rel=1e-11)


def test_crest_of_known_tokens() -> None:
    magnitudes = Magnitudes(4)
    # Equal magnitudes, one channel alone, and a token of zeros, which has no crest.
    magnitudes.update(torch.tensor([[1.0, -1, 1, -1], [0, 0, 5, 0], [0, 0, 0, 0]]))
    assert magnitudes.crest == pytest.approx((1 + 2) / 2)


def kurtosis(x: npt.NDArray[np.float64]) -> float:
    """The definition, over all entries, in the longest floats there are."""
    off = x.astype(np.longdouble) - x.astype(np.longdouble).mean()
    return float((off**4).mean() / (off**2).mean() ** 2 - 3)


def test_kurtosis_is_stable_far_from_zero() -> None:
    # Sums of plain fourth powers, 1e16 each, would leave nothing of a deviation of 1; the parts' means differ.
    x = np.random.default_rng(0).laplace(size=(400, 6)) + 1e4 + np.arange(400)[:, None] / 100
    magnitudes = Magnitudes(6)
    for part in np.array_split(x, 7):
        magnitudes.update(torch.from_numpy(part))
    assert magnitudes.excess_kurtosis == pytest.approx(kurtosis(x), rel=1e-8)


def test_kurtosis_of_nothing() -> None:
    magnitudes = Magnitudes(2)
    assert math.isnan(magnitudes.excess_kurtosis)
    assert math.isnan(magnitudes.crest)
    assert math.isnan(magnitudes.rms)
    magnitudes.update(torch.full((5, 2), 3.0))
    assert math.isnan(magnitudes.excess_kurtosis)


def test_a_sequence_of_first_tokens_has_no_rest() -> None:
    magnitudes = Magnitudes(2)
    magnitudes.update(torch.ones(1, 2), first=torch.tensor([True]))
    assert magnitudes.max_abs_rest.tolist() == [0, 0]


@pytest.mark.parametrize("kind", [QuantileSketch, Magnitudes])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(kind: type[QuantileSketch] | type[Magnitudes], bad: float) -> None:
    x = torch.ones(4, 3)
    x[2, 1] = bad
    with pytest.raises(CalibrationError, match="activations of 1 of 3 channels are not finite"):
        kind(3).update(x)


@pytest.mark.parametrize("kind", [QuantileSketch, Magnitudes])
@pytest.mark.parametrize("shape", [(4, 2), (2, 4, 3), (3,)])
def test_wrong_shapes(kind: type[QuantileSketch] | type[Magnitudes], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"not \[tokens, 3\]"):
        kind(3).update(torch.ones(shape))


def test_wrong_first_tokens() -> None:
    with pytest.raises(ValueError, match="for 4 tokens"):
        Magnitudes(3).update(torch.ones(4, 3), first=torch.zeros(5, dtype=torch.bool))


def test_misuse() -> None:
    sketch = QuantileSketch(2)
    with pytest.raises(ValueError, match="no token"):
        sketch.quantile(0.5)
    with pytest.raises(ValueError, match="from 0 to 1"):
        sketch.quantile(1.5)
