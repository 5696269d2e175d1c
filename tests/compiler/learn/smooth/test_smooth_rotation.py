"""Smooth rotation: rules against formulas in numpy, gradients against differences, choices on made-up outliers."""

import itertools
import json
import math
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from planish.compiler.errors import CalibrationError
from planish.compiler.learn.smooth import learned_scales
from planish.compiler.learn.smooth.error import Tokens, output_errors, summed_up
from planish.compiler.learn.smooth.learned_scales import (
    Learning,
    learn_scale,
    straight_through_errors,
    weight_shares,
)
from planish.compiler.learn.smooth.rules import ALPHAS, QUANTILES, max_rule, promising_quantile_rules
from planish.compiler.learn.smooth.smooth_rotation import Policy, SmoothRotation, smooth_rotation
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.hadamard import hadamard_transform
from planish.compiler.quantize.arithmetic import quantize_weight
from planish.passes.scheme import LinearFormat

Matrix = npt.NDArray[np.float64]

W4A4 = LinearFormat(4, 4)
N, OUT = 48, 24
FAST = Learning(steps=60, tokens=64)


def weights(seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(OUT, N)).astype(np.float32))


def sequences(count: int = 8, length: int = 32, massive: float = 0, seed: int = 2) -> Tensor:
    """Return inputs whose channels differ in size; `massive` is added to one channel of each sequence's first token."""
    generator = np.random.default_rng(seed)
    x = generator.standard_t(4, size=(count, length, N)) * np.exp(generator.normal(size=N))
    x[:, 0, 7] += massive
    return torch.from_numpy(x.astype(np.float32))


def rotation() -> Factors:
    return Factors.of(hadamard_transform(N, 0))


def tokens(x: Tensor, weight: Tensor) -> Tokens:
    return Tokens.of(x, weight, torch.ones(x.shape[:2]))


def by_policy(found: SmoothRotation) -> dict[str, float]:
    return {candidate.policy: candidate.error.weighted for candidate in found.candidates}


# Rules


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_max_rule_is_smoothrots(alpha: float) -> None:
    """Written as its repository has it (utils/smooth.py, smooth_act), but for |w|: x / s, columns of W times s."""
    x, w = sequences(massive=50).flatten(0, 1), weights()
    w[:, 3], x[:, 5] = 0, 0
    act_scales, weight_scales = x.abs().amax(0).numpy(), np.maximum(w.abs().amax(0).numpy(), 1e-5)
    s = np.maximum(act_scales**alpha / weight_scales ** (1 - alpha), 1e-5)
    np.testing.assert_allclose(max_rule(x.abs().amax(0), w.abs().amax(0), alpha).numpy(), 1 / s, rtol=1e-5)


def test_max_candidate_is_smoothrots_up_to_a_factor() -> None:
    x, w = sequences(massive=50), weights()
    found = next(c for c in smooth_rotation(x, w, W4A4, seed=0, learning=FAST).candidates if c.policy == "max")
    seen = x[:6].flatten(0, 1).numpy()
    expected = np.sqrt(np.abs(w.numpy()).max(0) / np.abs(seen).max(0))
    np.testing.assert_allclose(found.scale.numpy(), expected / np.exp(np.log(expected).mean()), rtol=1e-5)
    assert (found.alpha, found.q) == (0.5, 1.0)


def test_quantile_rules_against_numpy() -> None:
    """Every rule is there once, and is what numpy's quantile gives; the order is that of the prediction."""
    x, w = sequences(massive=50).flatten(0, 1), weights()
    moments = x.double().square().mean(0), w.double().square().mean(0)
    rules = promising_quantile_rules(x, w, moments, 1000)
    assert {rule[:2] for rule in rules} == {(alpha, q) for alpha in ALPHAS for q in QUANTILES}
    assert len(rules) == len(ALPHAS) * len(QUANTILES)
    predicted = []
    for alpha, q, scale in rules:
        s = np.quantile(np.abs(x.numpy()), q, axis=0) ** alpha / np.abs(w.numpy()).max(0) ** (1 - alpha)
        np.testing.assert_allclose(scale.numpy(), 1 / s, rtol=6e-3)
        transformed = x.numpy() * scale.numpy(), w.numpy() / scale.numpy()
        predicted.append(float((transformed[0] ** 2).sum() * (transformed[1] ** 2).sum()))
    assert all(one <= other * (1 + 1e-4) for one, other in itertools.pairwise(predicted))
    assert [rule[:2] for rule in promising_quantile_rules(x, w, moments, 3)] == [rule[:2] for rule in rules[:3]]


# The error


def reference_error(x: Matrix, w: Matrix, scale: Matrix, form: LinearFormat) -> Matrix:
    """Return the error of each token in float64, activations by their definition; weight scales as they are found."""
    transform = hadamard_transform(N, 0)
    seen, turned = transform.apply(x * scale), transform.apply_to_weight(w / scale)
    zero = 1 << form.weight_bits - 1
    weight_scale = quantize_weight(torch.from_numpy(turned).float(), form).scale.numpy().T.astype(np.float64)
    weight_scale = np.repeat(weight_scale, form.group or N, 1)[:, :N]
    rounded = np.clip(np.round(turned / weight_scale), -zero, zero - 1) * weight_scale
    if form.activation_bits < 16:
        zero = 1 << form.activation_bits - 1
        step = np.abs(seen).max(1, keepdims=True) * form.clip / (zero - 1)
        seen = np.clip(np.round(seen / step), -zero, zero - 1) * step
    return np.asarray(((seen @ rounded.T - x @ w.T) ** 2).sum(1))


@pytest.mark.parametrize(
    "form", [W4A4, LinearFormat(3, 3, clip=0.7), LinearFormat(4, 8, group=32), LinearFormat(3, 16)], ids=str
)
def test_error_against_float64(form: LinearFormat) -> None:
    x, w = sequences(massive=20), weights()
    scale = torch.from_numpy(np.exp(np.random.default_rng(0).normal(size=N)).astype(np.float32))
    found = output_errors(tokens(x, w), w, scale, rotation(), form).numpy()
    expected = reference_error(x.flatten(0, 1).double().numpy(), w.double().numpy(), scale.double().numpy(), form)
    # A value halfway between two codes may go either way, so a few tokens may differ.
    assert np.mean(np.abs(found / expected - 1) > 1e-3) < 0.02
    np.testing.assert_allclose(found.mean(), expected.mean(), rtol=1e-2)


def test_means_of_the_error() -> None:
    x, w = sequences(count=2, length=3), weights()
    counted = Tokens.of(x, w, torch.tensor([[1.0, 0, 0], [0, 3, 0]]))
    error = summed_up(torch.tensor([1.0, 2, 3, 10, 20, 30]), counted)
    assert error.weighted == pytest.approx((1 * 1 + 3 * 20) / 4)
    assert error.mean == pytest.approx(66 / 6)
    assert error.without_first == pytest.approx(55 / 4)


# Learning


@pytest.mark.parametrize(
    "form", [W4A4, LinearFormat(3, 3, clip=0.7), LinearFormat(4, 4, group=32), LinearFormat(4, 16)], ids=str
)
def test_straight_through_is_the_arithmetic(form: LinearFormat) -> None:
    x, w = sequences(massive=20), weights()
    scale, seen = torch.linspace(0.5, 2, N), tokens(sequences(massive=20), weights())
    shares = weight_shares(w, scale, rotation(), form)
    found = straight_through_errors(x.flatten(0, 1), seen.y, w, scale, rotation(), form, shares)
    expected = output_errors(seen, w, scale, rotation(), form)
    assert float(((found / expected - 1).abs() > 1e-3).float().mean()) < 0.02
    torch.testing.assert_close(found.mean(), expected.mean(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("form", [W4A4, LinearFormat(3, 3, clip=0.7), LinearFormat(4, 4, group=16)], ids=str)
def test_straight_through_gradient(form: LinearFormat) -> None:
    """Against differences of the smooth function that keeps every rounding's remainder, and what was cut off, fixed.

    That is what passing the gradient straight through means; scales of tokens and rows move with the channel scale.
    """
    x, w = sequences(count=2, length=8, massive=20).flatten(0, 1).double(), weights().double()
    y, turn, start = x @ w.T, rotation(), torch.linspace(0.7, 1.4, N, dtype=torch.float64)
    shares = weight_shares(w, start, turn, form).double()
    group = form.group or N
    matrix = hadamard_transform(N, 0).matrix()

    def sides(scale: Matrix) -> list[tuple[Matrix, Matrix, int]]:
        """Return the values of each side with the step of each row."""
        seen = (x.numpy() * scale) @ matrix
        rows = ((w.numpy() / scale) @ np.linalg.inv(matrix).T).reshape(-1, group)
        highest = (1 << form.weight_bits - 1) - 1
        return [
            (seen, np.abs(seen).max(1, keepdims=True) * form.clip / highest, form.activation_bits),
            (rows, np.abs(rows).max(1, keepdims=True) / highest * shares.numpy(), form.weight_bits),
        ]

    frozen = []
    for values, step, bits in sides(start.numpy()):
        zero = 1 << bits - 1
        nearest = np.round(values / step)
        frozen.append((nearest - values / step, np.clip(nearest, -zero, zero - 1), nearest))

    def surrogate(scale: Matrix) -> float:
        rounded = []
        for (values, step, _), (rest, code, nearest) in zip(sides(scale), frozen, strict=True):
            rounded.append(np.where(code == nearest, values / step + rest, code) * step)
        return float(((rounded[0] @ rounded[1].reshape(OUT, N).T - y.numpy()) ** 2).sum())

    scale = start.clone().requires_grad_()
    error = straight_through_errors(x, y, w, scale, turn, form, shares).sum()
    assert error.item() == pytest.approx(surrogate(start.numpy()), rel=1e-5)
    (gradient,) = torch.autograd.grad(error, scale)
    for channel in (0, 7, 20, N - 1):
        step = np.zeros(N)
        step[channel] = 1e-6
        slope = (surrogate(start.numpy() + step) - surrogate(start.numpy() - step)) / 2e-6
        assert float(gradient[channel]) == pytest.approx(slope, rel=1e-3, abs=1e-4 * float(gradient.abs().max()))


def learn(learning: Learning, start: Tensor | None = None, seed: int = 0) -> tuple[Tensor, float, float]:
    """Return the learned scale, and its error on the held-out tokens after that of its start."""
    x, w = sequences(count=12, massive=50), weights()
    start = torch.ones(N) if start is None else start
    train, held_out = tokens(x[:8], w), tokens(x[8:], w)
    scale = learn_scale(start, train, held_out, w, rotation(), W4A4, seed=seed, learning=learning)
    before, after = (
        summed_up(output_errors(held_out, w, s, rotation(), W4A4), held_out).weighted for s in (start, scale)
    )
    return scale, before, after


def test_learning_helps_and_stays_in_its_region() -> None:
    scale, before, after = learn(Learning(steps=150, tokens=64, rate=0.05))
    assert after < 0.7 * before
    assert float(scale.log().abs().max()) <= math.log(4) + 1e-5
    assert abs(float(scale.log().mean())) < 0.02


def test_the_bound_binds() -> None:
    scale, before, after = learn(Learning(steps=100, tokens=64, rate=0.05, bound=0.1))
    assert after < before
    assert float(scale.log().abs().max()) == pytest.approx(0.1, abs=1e-5)


def test_never_worse_than_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate that throws it about, the start is given back; and with no steps."""
    monkeypatch.setattr(learned_scales, "_LOOK", 5)
    good, _, reached = learn(Learning(steps=150, tokens=64, rate=0.05))
    for learning in (Learning(steps=20, tokens=4, rate=3.0), Learning(steps=0)):
        scale, before, after = learn(learning, start=good)
        assert before == reached
        assert after <= before
        assert torch.equal(scale, good)


def test_learning_repeats() -> None:
    assert torch.equal(learn(FAST)[0], learn(FAST)[0])
    assert not torch.equal(learn(FAST)[0], learn(FAST, seed=1)[0])


def test_nothing_to_learn_from_silence() -> None:
    silent, w = tokens(torch.zeros(2, 4, N), weights()), weights()
    start = torch.linspace(0.5, 2, N)
    assert torch.equal(learn_scale(start, silent, silent, w, rotation(), W4A4, seed=0, learning=FAST), start)


# Choosing


@pytest.mark.parametrize("massive", [0.0, 30.0, 1000.0])
def test_the_least_error_is_chosen(massive: float) -> None:
    found = smooth_rotation(sequences(massive=massive), weights(), W4A4, seed=0, learning=FAST)
    errors = by_policy(found)
    assert set(errors) == set(get_args(Policy))
    assert found.chosen.error.weighted == min(errors.values())
    assert errors["quantile"] <= errors["max"]
    assert errors["quantile_learned"] <= errors["quantile"]
    assert errors["rms_learned"] <= errors["rms"]
    assert found.chosen.error.weighted < 0.95 * errors["max"]


def test_rare_massive_tokens() -> None:
    """One token in 256 is massive: a quantile below that does not see it and explodes; the search is not misled."""
    x, w = sequences(count=16, length=256, massive=3000), weights()
    found = smooth_rotation(x, w, W4A4, seed=0, learning=Learning(steps=0))
    held_out = tokens(x[12:], w)
    blind = np.quantile(np.abs(x[:12].flatten(0, 1).numpy()), 0.99, axis=0)
    scale = max_rule(torch.from_numpy(blind).float(), w.abs().amax(0), 0.5)
    exploded = summed_up(output_errors(held_out, w, scale, rotation(), W4A4), held_out).mean
    errors = by_policy(found)
    assert exploded > 5 * errors["max"]
    assert errors["quantile"] <= errors["max"]
    assert errors["ones"] > errors["max"]


def test_held_out_sequences_are_held_out() -> None:
    """Rules do not look at them: with others in their place, the scales stay and the errors change."""
    x, w = sequences(), weights()
    other = torch.cat([x[:6], 3 * sequences(seed=9)[6:]])
    once, again = (smooth_rotation(each, w, W4A4, seed=0, learning=Learning(steps=0)) for each in (x, other))
    for policy in ("max", "rms"):
        one, two = (next(c for c in found.candidates if c.policy == policy) for found in (once, again))
        assert torch.equal(one.scale, two.scale)
        assert one.error != two.error


def test_token_weights_count() -> None:
    """Without weight, massive first tokens do not matter, and a better scale for the others is found."""
    x, w = sequences(massive=3000), weights()
    counts = torch.ones(x.shape[:2])
    counts[:, 0] = 0
    weighted = smooth_rotation(x, w, W4A4, seed=0, learning=FAST, token_weights=counts).chosen.error
    fair = smooth_rotation(x, w, W4A4, seed=0, learning=FAST).chosen.error
    assert weighted.weighted == pytest.approx(weighted.without_first, rel=1e-6)
    assert weighted.without_first < 0.9 * fair.without_first
    assert weighted.mean > fair.mean


def test_transform_holds_the_scale_and_the_rotation() -> None:
    x, w = sequences(), weights()
    found = smooth_rotation(x, w, W4A4, seed=5, learning=FAST)
    scale = found.chosen.scale.double().numpy()
    rows = x[0].double().numpy()
    expected = hadamard_transform(N, 5).apply(rows * scale)
    np.testing.assert_allclose(found.transform.apply(rows), expected, rtol=1e-5, atol=1e-5)
    folded = found.transform.apply(rows) @ found.transform.apply_to_weight(w.double().numpy()).T
    np.testing.assert_allclose(folded, rows @ w.double().numpy().T, rtol=1e-5, atol=1e-4)


def test_evidence_can_be_written() -> None:
    found = smooth_rotation(sequences(), weights(), W4A4, seed=0, learning=FAST)
    evidence = json.loads(json.dumps([candidate.to_dict() for candidate in found.candidates]))
    assert [each["policy"] for each in evidence] == list(get_args(Policy))
    assert all(each["weighted"] == each["mean"] > 0 for each in evidence)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite(bad: float) -> None:
    x = sequences()
    x[1, 2, 3] = bad
    with pytest.raises(CalibrationError, match="not finite"):
        smooth_rotation(x, weights(), W4A4, seed=0)


def test_one_sequence() -> None:
    with pytest.raises(CalibrationError, match="two or more sequences"):
        smooth_rotation(sequences(count=1), weights(), W4A4, seed=0)


def test_wrong_shapes() -> None:
    x, w = sequences(), weights()
    with pytest.raises(ValueError, match="sequences, seq, n"):
        smooth_rotation(x[0], w, W4A4, seed=0)
    with pytest.raises(ValueError, match="sequences, seq, n"):
        smooth_rotation(x[..., :-1], w, W4A4, seed=0)
    with pytest.raises(ValueError, match="rounded"):
        smooth_rotation(x, w, LinearFormat(16, 16), seed=0)
    for counts in (torch.ones(3), -torch.ones(x.shape[:2]), torch.zeros(x.shape[:2])):
        with pytest.raises(ValueError, match="token weights"):
            smooth_rotation(x, w, W4A4, seed=0, token_weights=counts)
