"""Refinement of one block: better on sequences held out, never worse than its start, and open about falling back."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from planish.compiler.learn.block import Angles, Block, FloatHooks, run_block
from planish.compiler.learn.gradient import refine as module
from planish.compiler.learn.gradient.block_loss import conditioning, held_out_loss, residual_loss, rounded_to_nearest
from planish.compiler.learn.gradient.refine import Descent, Refined, Refinement, refine
from planish.compiler.learn.gradient.trainable import Trainable
from planish.compiler.learn.streams import Streams
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.progress import Silent
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Site
from tests.learning import SEQ, block_of, factors_of, float_outputs, streams_of

SCHEME = Scheme.parse("w3a3k3v3")
CLIPS: dict[Site, float] = dict.fromkeys(SITES, 0.75)


@dataclasses.dataclass(frozen=True)
class Setting:
    block: Block
    streams: Streams
    outputs: Tensor
    factors: dict[Site, Factors]

    def refined(self, settings: Refinement, factors: dict[Site, Factors] | None = None) -> Refined:
        start = factors or self.factors
        return refine(self.block, start, self.streams, self.outputs, SCHEME, settings, clips=CLIPS)


@pytest.fixture(scope="module")
def setting() -> Setting:
    block = block_of()
    streams = streams_of(block)
    return Setting(block, streams, float_outputs(block, streams), factors_of(block, streams, "rotation"))


def same(found: dict[Site, Factors], expected: dict[Site, Factors]) -> bool:
    pairs = [
        (getattr(found[site], part), getattr(expected[site], part))
        for site in SITES
        for part in ("scale", "right", "left")
    ]
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)


def test_improves_and_returns_what_it_measured(setting: Setting) -> None:
    refined = setting.refined(Refinement(epochs=4, rate=2e-2))
    losses, kept = refined.evidence["held_out_losses"], refined.evidence["kept_epoch"]
    assert len(losses) == 5
    assert kept > 0
    assert losses[kept] == min(losses) < 0.95 * losses[0]
    assert "fallback" not in refined.evidence
    # By other means than those it was measured with: the weight scales put in as multiples of those of rounding.
    assert refined.weight_scale_multipliers is not None
    again = Trainable(setting.block, refined.factors, refined.clips, SCHEME)
    with torch.no_grad():
        for logs, each in zip(again._weight_logs.values(), refined.weight_scale_multipliers.values(), strict=True):
            logs += each.T.reshape(-1, 1).log()
    angles = Angles.of(setting.block.config, SEQ)
    found = run_block(setting.block.config, again.hooks(), setting.streams.seen[-2:], angles).detach().double().numpy()
    expected = (
        run_block(setting.block.config, FloatHooks(setting.block), setting.streams.seen[-2:], angles).double().numpy()
    )
    loss = (((found - expected) ** 2).sum(-1) / (expected**2).sum(-1)).mean()
    assert loss == pytest.approx(losses[kept], rel=0.02)


def test_is_never_worse_than_its_start(setting: Setting) -> None:
    refined = setting.refined(Refinement(epochs=2, rate=0.5, clip_rate=5.0))
    losses = refined.evidence["held_out_losses"]
    assert all(loss > losses[0] for loss in losses[1:])
    assert refined.evidence["kept_epoch"] == 0
    assert same(refined.factors, setting.factors)
    assert refined.clips == CLIPS
    assert refined.weight_scale_multipliers is None
    hooks = rounded_to_nearest(setting.block, refined.factors, refined.clips, SCHEME)
    angles = Angles.of(setting.block.config, SEQ)
    assert held_out_loss(setting.block, hooks, setting.streams, setting.outputs, angles) == pytest.approx(
        losses[0], rel=0.02
    )


def test_names_what_was_not_finite(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(found: Tensor, expected: Tensor) -> Tensor:
        calls.append(0)
        return residual_loss(found, expected) * (torch.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(module, "residual_loss", broken)
    refined = setting.refined(Refinement(epochs=4))
    assert refined.evidence["fallback"] == "the loss or its gradient is not finite in epoch 2; went back to epoch 1"
    assert len(refined.evidence["held_out_losses"]) == 2
    calls[:] = [0] * 4
    refined = setting.refined(Refinement(epochs=4))
    assert refined.evidence["fallback"] == "the loss or its gradient is not finite in epoch 1; went back to the start"
    assert same(refined.factors, setting.factors)


@pytest.mark.parametrize(
    ("first", "words"),
    # The first call is that of the start, then there is one for each of three steps, then that at the end of the epoch.
    [(2, "a transform became singular"), (5, "the transform at ffn_in is close to singular")],
)
def test_goes_back_when_a_transform_becomes_singular(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, first: int, words: str
) -> None:
    calls = []

    def collapsing(self: Trainable) -> dict[Site, Factors]:
        calls.append(0)
        found = as_they_are(self)
        right = found["ffn_in"].right
        assert right is not None
        return found | {"ffn_in": dataclasses.replace(found["ffn_in"], right=right * (0 if len(calls) >= first else 1))}

    as_they_are = Trainable.factors
    monkeypatch.setattr(Trainable, "factors", collapsing)
    refined = setting.refined(Refinement(epochs=1))
    assert refined.evidence["fallback"].startswith(words)
    assert refined.evidence["fallback"].endswith("in epoch 1; went back to the start")
    assert same(refined.factors, setting.factors)


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_a_start_that_cannot_be_inverted_becomes_a_rotation(setting: Setting, value: float) -> None:
    right = torch.eye(8)[None].clone()
    right[0, 0, 0] = value
    refined = setting.refined(Refinement(epochs=1), setting.factors | {"attn_in": Factors("affine", right=right)})
    assert {each.kind for each in refined.factors.values()} == {"rotation"}
    assert refined.evidence["fallback"].startswith("the transform at attn_in ")
    assert refined.evidence["fallback"].endswith("a rotation stands in for it")
    assert np.isfinite(refined.evidence["held_out_losses"]).all()


def test_reads_the_stream_it_is_told_to(setting: Setting) -> None:
    border = len(setting.streams.target) - setting.streams.held_out
    for inputs, spoiled in (("seen", "target"), ("float", "seen")):
        streams = Streams(setting.streams.target.clone(), setting.streams.seen.clone(), setting.streams.held_out)
        getattr(streams, spoiled)[:border] = torch.nan
        for each, words in ((inputs, None), ("mixed", "not finite")):
            found = dataclasses.replace(setting, streams=streams).refined(Refinement(epochs=1, inputs=each))  # type: ignore[arg-type]
            assert words in found.evidence["fallback"] if words else "fallback" not in found.evidence


def test_repeats_itself_and_tells_progress(setting: Setting) -> None:
    told = []

    class Telling(Silent):
        def step(self, stage: str, done: int, total: int) -> None:
            told.append((stage, done, total))

    given = (setting.block, setting.factors, setting.streams, setting.outputs, SCHEME, Refinement(epochs=2))
    first, second = (refine(*given, progress=Telling()) for _ in range(2))
    assert same(first.factors, second.factors)
    assert first.evidence == second.evidence
    assert told == [("refine", 1, 2), ("refine", 2, 2)] * 2


def test_residual_loss_is_the_mean_share_of_every_token() -> None:
    found, expected = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    expected[0, 0] *= 1000
    x, y = found.double().numpy(), expected.double().numpy()
    share = ((x - y) ** 2).sum(-1) / (y**2).sum(-1)
    assert float(residual_loss(found, expected)) == pytest.approx(share.mean(), rel=1e-5)


def test_conditioning_is_that_of_the_worst_factor() -> None:
    U, V = (np.linalg.qr(np.random.default_rng(seed).normal(size=(8, 8)))[0] for seed in (0, 1))

    def factors(smallest: float) -> dict[Site, Factors]:
        P = torch.from_numpy(U * np.geomspace(1, smallest, 8) @ V).float()
        return {"attn_in": Factors("rotation", right=torch.eye(4)[None]), "key": Factors("affine", right=P[None])}

    well = conditioning(factors(1e-3))
    assert well.problem is None
    assert well.log10_condition == pytest.approx(3, abs=1e-3)
    assert 0 < well.inverse_error < 1e-3
    badly = conditioning(factors(1e-7))
    assert badly.problem is not None
    assert "key" in badly.problem


def test_descent_follows_a_cosine_to_a_thousandth() -> None:
    # AdamW moves by its rate, whatever the size of a gradient that does not change; so steps add up to the rates.
    parameter = torch.zeros(1, requires_grad=True)
    descent, steps = Descent([([parameter], 0.1)], 10), []
    for _ in range(10):
        before = parameter.item()
        assert descent.step(1e-9 * (100 + parameter).sum())
        steps.append(before - parameter.item())
    expected = [0.1 * (1e-3 + (1 - 1e-3) * (1 + np.cos(np.pi * step / 10)) / 2) for step in range(10)]
    np.testing.assert_allclose(steps, expected, rtol=1e-3)
    assert not descent.step(parameter.sum() * torch.nan)
    assert np.isfinite(parameter.item())
