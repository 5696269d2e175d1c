"""The search for kinds: it mixes what branches compute, and finds the better one of each group where it is planted."""

import dataclasses

import pytest
import torch
from torch import Tensor

from planish.compiler.learn.block import Angles, Block, run_block
from planish.compiler.learn.gradient import search as module
from planish.compiler.learn.gradient.block_loss import residual_loss, rounded_to_nearest
from planish.compiler.learn.gradient.search import Branch, Search, search_block, search_kinds
from planish.compiler.learn.streams import Streams
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.select.forms import SITE_GROUPS
from planish.compiler.select.kurtosis import GROUPS
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Kind, Site
from tests.learning import SEQ, block_of, factors_of, float_outputs, streams_of

SCHEME = Scheme.parse("w4a4k4v4")
CLIPS: dict[Site, float] = dict.fromkeys(SITES, 0.8)
KINDS: tuple[Kind, ...] = ("rotation", "affine")


@pytest.fixture(scope="module")
def given() -> tuple[Block, Streams, Tensor]:
    block = block_of()
    streams = streams_of(block)
    return block, streams, float_outputs(block, streams)


def spoiled(factors: dict[Site, Factors], group: str) -> dict[Site, Factors]:
    """Return factors that leave a few channels of the inputs of `group` far louder than the rest."""
    found = dict(factors)
    for site in SITE_GROUPS[group]:  # type: ignore[index]
        scale = found[site].scale
        if scale is not None:
            loud = torch.ones_like(scale)
            loud[:3] = 300
            found[site] = Factors("identity", scale.abs() * loud)
    return found


@pytest.mark.parametrize("attn", KINDS)
def test_finds_the_branch_that_is_better(given: tuple[Block, Streams, Tensor], attn: Kind) -> None:
    block, streams, outputs = given
    good = factors_of(block, streams, "rotation")
    other: Kind = "affine" if attn == "rotation" else "rotation"
    branches = {attn: Branch(spoiled(good, "ffn"), CLIPS), other: Branch(spoiled(good, "attn"), CLIPS)}
    found = search_kinds(block, branches, streams, outputs, SCHEME, Search(epochs=8))
    assert found.kinds == {"attn": attn, "ffn": other}
    assert found.fallback is None
    for group in GROUPS:
        evidence, chosen = found.evidence[group], found.kinds[group]
        dropped = next(kind for kind in KINDS if kind != chosen)
        assert evidence[f"pi of {chosen}"] + evidence[f"pi of {dropped}"] == pytest.approx(1, abs=1e-5)
        assert evidence[f"pi of {chosen}"] > 0.6
        assert evidence[f"loss of {chosen}"] < evidence[f"loss of {dropped}"]


def test_mixes_outputs_of_groups(given: tuple[Block, Streams, Tensor]) -> None:
    block, streams, _ = given
    x, angles = streams.seen[:2], Angles.of(block.config, SEQ)
    hooks = [rounded_to_nearest(block, factors_of(block, streams, kind), CLIPS, SCHEME) for kind in KINDS]
    alone = [run_block(block.config, each, x, angles) for each in hooks]
    pure = torch.eye(2)
    for index, expected in enumerate(alone):
        mixed = module._MixedHooks(hooks, dict.fromkeys(GROUPS, pure[index]))
        torch.testing.assert_close(run_block(block.config, mixed, x, angles), expected, rtol=1e-4, atol=1e-4)
    # With the first group decided, the second sees the same input in both branches, and its outputs mix linearly.
    ends = [
        run_block(block.config, module._MixedHooks(hooks, {"attn": pure[0], "ffn": share}), x, angles) for share in pure
    ]
    share = torch.tensor([0.3, 0.7])
    found = run_block(block.config, module._MixedHooks(hooks, {"attn": pure[0], "ffn": share}), x, angles)
    assert not torch.allclose(ends[0], ends[1], atol=0.1)
    torch.testing.assert_close(found, 0.3 * ends[0] + 0.7 * ends[1], rtol=1e-4, atol=1e-4)


def test_entropy_sharpens_the_choice(given: tuple[Block, Streams, Tensor]) -> None:
    block, streams, outputs = given

    def largest(entropy: float) -> float:
        found = search_block(block, streams, outputs, SCHEME, Search(epochs=3, choice_rate=0.1, entropy=entropy))
        return min(max(found.evidence[group][f"pi of {kind}"] for kind in KINDS) for group in GROUPS)

    assert largest(10.0) > largest(0.0) + 0.05


def test_takes_rotations_where_nothing_can_be_learned(
    given: tuple[Block, Streams, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, streams, outputs = given
    monkeypatch.setattr(module, "residual_loss", lambda found, expected: residual_loss(found, expected) * torch.nan)
    found = search_block(block, streams, outputs, SCHEME, Search(epochs=1))
    assert found.kinds == dict.fromkeys(GROUPS, "rotation")
    assert found.fallback is not None
    assert "not finite at step 1 of" in found.fallback


def test_repeats_itself(given: tuple[Block, Streams, Tensor]) -> None:
    block, streams, outputs = given
    first, second = (search_block(block, streams, outputs, SCHEME, Search(epochs=1)) for _ in range(2))
    assert dataclasses.asdict(first) == dataclasses.asdict(second)
