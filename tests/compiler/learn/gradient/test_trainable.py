"""The trainable block: its grids are those of the arithmetic, its gradients those of finite differences."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from planish.compiler.learn.block import MODULES, Angles, Block, FloatHooks, run_block
from planish.compiler.learn.gradient import trainable as module
from planish.compiler.learn.gradient.trainable import (
    Trainable,
    round_activation_through,
    round_cached_through,
    round_to_grid,
)
from planish.compiler.learn.low_bit import LowBitHooks
from planish.compiler.learn.transforms.fold import fold_block
from planish.compiler.quantize.arithmetic import (
    QuantizedWeight,
    dequantize_kv,
    dequantize_weight,
    quantize_activation,
    quantize_kv,
    quantize_weight,
)
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Kind
from tests.learning import SEQ, block_of, factors_of, streams_of

KINDS: tuple[Kind, ...] = ("rotation", "affine")
CLIPS = dict(zip(SITES, (0.6, 0.7, 0.65, 0.8, 0.9, 0.85), strict=True))


@pytest.fixture(scope="module")
def block() -> Block:
    return block_of()


def started(block: Block, kind: Kind, scheme: str, moved: float = 0.0) -> Trainable:
    """Return a trainable block, its parameters moved at random by about `moved`."""
    found = Trainable(block, factors_of(block, streams_of(block), kind), CLIPS, Scheme.parse(scheme))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for each in (*found.transform_parameters(), *found.clip_parameters()):
            each += moved * torch.randn(each.shape, generator=generator)
    found.fit_weight_scales()
    return found


def run(block: Block, trainable: Trainable, x: Tensor) -> Tensor:
    return run_block(block.config, trainable.hooks(), x, Angles.of(block.config, SEQ))


def rows(*shape: int) -> Tensor:
    """Return rows of very different sizes, one of them of zeros and one constant."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[0])[:, None]
    x[1], x[2] = 0, 1.7
    return x


@pytest.mark.parametrize("clip", [1.0, 0.65])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grids_are_those_of_the_arithmetic(bits: int, clip: float) -> None:
    x = rows(40, 24)
    codes, scale = quantize_activation(x, bits, clip)
    expected = (codes.float() - (1 << bits - 1)) * scale
    assert torch.equal(round_activation_through(x, bits, torch.tensor(clip)), expected)
    assert torch.equal(round_cached_through(x, bits, torch.tensor(clip)), dequantize_kv(*quantize_kv(x, bits, clip)))


@pytest.mark.parametrize("scheme", ["w3a3k3v3", "w4a4k4v4g32", "w2a16g64", "w16a16"])
def test_weights_start_as_they_would_be_rounded(block: Block, scheme: str) -> None:
    # The last group of down_proj, which has 160 inputs, is half of one at g64.
    trainable = started(block, "affine", scheme)
    folded, hooks = fold_block(block, trainable.factors()), trainable.hooks()
    for name in MODULES:
        weight, form = folded.weight(name), Scheme.parse(scheme).linear
        expected = weight if form.is_float else dequantize_weight(quantize_weight(weight, form))
        assert torch.equal(hooks.weights[name], expected)


def test_gradient_of_rounding() -> None:
    # The straight-through estimator is the derivative of rounding with the residual of the code held fixed.
    low, high, step = -4, 3, 1e-6
    x = 4 * torch.randn(10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = torch.linspace(0.5, 3, 10, dtype=torch.float64)[:, None]
    frozen = np.round((x / scale).numpy()) - (x / scale).numpy()

    def surrogate(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        nearest = x / scale + frozen
        return np.where((nearest > high + 0.5) | (nearest < low - 0.5), np.clip(nearest, low, high), nearest) * scale

    upstream = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x.requires_grad_(), scale.requires_grad_()
    round_to_grid(x, scale, low, high).backward(upstream)
    X, S, U = x.detach().numpy(), scale.detach().numpy(), upstream.numpy()
    np.testing.assert_allclose(round_to_grid(x, scale, low, high).detach(), surrogate(X, S), rtol=1e-12)
    slopes = [(surrogate(X + dx, S + ds) - surrogate(X - dx, S - ds)) / (2 * step) for dx, ds in ((step, 0), (0, step))]
    assert (X > 4 * S).any()
    assert (X < -5 * S).any()
    np.testing.assert_allclose(x.grad, U * slopes[0], atol=1e-7)
    np.testing.assert_allclose(scale.grad, (U * slopes[1]).sum(1, keepdims=True), atol=1e-7)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute all that is float32 in float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_block(block: Block, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    # With rounding taken out, what is left is clipping, whose derivative is exact almost everywhere.
    monkeypatch.setattr(module, "_nearest", lambda steps: steps)
    monkeypatch.setattr(module, "_to_half", lambda x: x)
    double = Block(block.config, {name: each.double() for name, each in block.tensors.items()})
    trainable = started(double, kind, "w3a3k3v3", moved=0.02)
    x = streams_of(double).seen[:2].double()
    target = run_block(double.config, FloatHooks(double), x, Angles.of(double.config, SEQ))

    def loss() -> Tensor:
        lost: Tensor = (run(double, trainable, x) - target)[:, 1:].square().mean()
        return lost

    parameters = [*trainable.transform_parameters(), *trainable.clip_parameters()]
    step = 1e-6
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss(), parameters), strict=True):
        length = float(gradient.norm())
        assert length > 0
        direction = gradient / length
        with torch.no_grad():
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        np.testing.assert_allclose(float(above - below) / (2 * step), length, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_that_moved_still_cancel(block: Block, kind: Kind) -> None:
    trainable = started(block, kind, "w16a16", moved=0.05)
    x = streams_of(block).target[:2]
    expected = run_block(block.config, FloatHooks(block), x, Angles.of(block.config, SEQ))
    torch.testing.assert_close(run(block, trainable, x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    start = factors_of(block, streams_of(block), kind)
    for site, factors in trainable.factors().items():
        for before, after in ((start[site].right, factors.right), (start[site].left, factors.left)):
            if before is None or after is None:
                assert before is after
                continue
            assert not torch.allclose(before, after, atol=0.01)
            if factors.kind == "rotation":
                eye = torch.eye(after.shape[-1])
                torch.testing.assert_close(after.mT @ after, eye.expand_as(after), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_starts_where_it_was_told(block: Block, kind: Kind) -> None:
    start, trainable = factors_of(block, streams_of(block), kind), started(block, kind, "w3a3k3v3")
    for site, factors in trainable.factors().items():
        for part in ("scale", "right", "left"):
            before, after = getattr(start[site], part), getattr(factors, part)
            assert (before is None) == (after is None)
            if before is not None:
                torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
                assert torch.equal(after.sign(), before.sign())
    assert trainable.clips() == pytest.approx(CLIPS, abs=1e-6)
    assert set(started(block, kind, "w4a16").clips()) == set()


@pytest.mark.parametrize("scheme", ["w3a3k3v3", "w4a4k3v2g32", "w3a8k4v4"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_handed_over_reproduces_the_block(block: Block, kind: Kind, scheme: str) -> None:
    trainable, grids = started(block, kind, scheme, moved=0.03), Scheme.parse(scheme)
    factors = trainable.factors()
    folded = fold_block(block, factors)
    hooks = LowBitHooks(folded, factors, grids)
    hooks.clips = trainable.clips()
    for name, multiplier in trainable.weight_scale_multipliers().items():
        weight, form = folded.weight(name), grids.linear
        scale = quantize_weight(weight, form).scale * multiplier
        scale = scale if form.group is None else scale.half().float()
        group, zero = form.group or weight.shape[1], 1 << form.weight_bits - 1
        codes = (weight / scale.T.repeat_interleave(group, 1)[:, : weight.shape[1]]).round().clamp(-zero, zero - 1)
        hooks.weights[name] = dequantize_weight(
            QuantizedWeight((codes + zero).to(torch.uint8), scale, form.weight_bits, group)
        )
    x = streams_of(block).seen[:2]
    expected = run_block(block.config, hooks, x, Angles.of(block.config, SEQ))
    torch.testing.assert_close(run(block, trainable, x), expected, rtol=1e-4, atol=1e-4)
