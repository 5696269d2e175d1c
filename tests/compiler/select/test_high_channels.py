"""Which channels are chosen: numbers within the budget, those first that matter most, and what is refused."""

import itertools
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.errors import SelectionError
from planish.compiler.learn.block import Angles, FloatHooks, read_block, run_block
from planish.compiler.learn.transforms.transformed_hooks import TransformedHooks, factors_of_layer
from planish.compiler.progress import Silent
from planish.compiler.select.channel_split import ChannelSplit
from planish.compiler.select.fitted_transforms import fit_transforms
from planish.compiler.select.forms import forms_of_groups
from planish.compiler.select.high_channels import (
    ChosenChannels,
    HighPolicy,
    check_high_policy,
    choose_channels,
    numbers_to_try,
)
from planish.compiler.select.ratios import average_bits
from planish.compiler.select.sensitivity import Score, measure_sensitivity
from planish.passes.high_impact import SUFFIXES
from planish.passes.scheme import LinearFormat, Scheme
from planish.passes.transforms import Transforms
from tests.high_impact import WIDE
from tests.tiny import write_tiny

IDS = np.random.default_rng(8).integers(3, 272, (6, 16))
FORM = LinearFormat(2, 16)
SHAPES = {"attn_in": (320, 192), "attn_out": (192, 192), "ffn_in": (656, 192), "ffn_out": (192, 328)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny(tmp_path_factory.mktemp("checkpoint") / "wide", **WIDE))


@pytest.fixture(scope="module")
def transforms(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Transforms:
    forms = [forms_of_groups({"attn": "affine", "ffn": "rotation"})] * 2
    scheme, folder = Scheme.parse("w2a16"), tmp_path_factory.mktemp("fit")
    return fit_transforms(checkpoint, scheme, forms, IDS, folder, Silent(), seed=1)[0]


def chosen(
    checkpoint: Checkpoint, transforms: Transforms, folder: Path, form: LinearFormat = FORM, **policy: Any
) -> ChosenChannels:
    settings = HighPolicy(4, **policy)
    check_high_policy(settings, checkpoint, form)
    return choose_channels(settings, checkpoint, form, transforms, IDS, folder, Silent())


def test_transforms_leave_the_blocks_as_they_were(checkpoint: Checkpoint, transforms: Transforms) -> None:
    angles = Angles.of(checkpoint.config, 16)
    x = torch.randn(2, 16, 192, generator=torch.Generator().manual_seed(1))
    for layer in range(2):
        block = read_block(checkpoint, layer)
        hooks = TransformedHooks(block, factors_of_layer(transforms, layer))
        expected = run_block(block.config, FloatHooks(block), x, angles)
        torch.testing.assert_close(run_block(block.config, hooks, x, angles), expected, rtol=1e-4, atol=1e-4)
        assert transforms.layers[layer].ffn_in.kind == "rotation"


@pytest.mark.parametrize("form", [FORM, LinearFormat(3, 3)], ids=str)
def test_solved_is_the_best_within_the_budget(
    form: LinearFormat, checkpoint: Checkpoint, transforms: Transforms, tmp_path: Path
) -> None:
    average = form.weight_bits + (0.9 if form.weight_bits == 2 else 0.65)
    found = chosen(checkpoint, transforms, tmp_path, form, average=average, candidates=(0.0, 0.34))
    evidence, split = found.evidence, ChannelSplit.of(form, 4)
    losses, weights = evidence["losses"], evidence["block_weights"]

    def loss(counts: tuple[dict[str, int], ...]) -> float:
        total = 0.0
        for weight, measured, of_layer in zip(weights, losses, counts, strict=True):
            index = {name: measured["counts"][name].index(count) for name, count in of_layer.items()}
            alone = {name: measured["alone"][name][i] for name, i in index.items()}
            total += weight * sum(alone.values())
            for a, b in itertools.combinations(index, 2):
                total += weight * (measured["together"][a][b][index[a]][index[b]] - alone[a] - alone[b])
        return total

    tried = [
        dict(zip(SHAPES, each, strict=True)) for each in itertools.product((0, 64), (0, 64), (0, 64), (0, 64, 128))
    ]
    within = [pair for pair in itertools.product(tried, tried) if average_bits(pair, SHAPES, split) <= average]
    assert 0 < len(within) < len(tried) ** 2
    assert loss(tuple(evidence["counts"])) == pytest.approx(min(map(loss, within)), rel=1e-9)
    assert evidence["stored_bits"] == round(average_bits(evidence["counts"], SHAPES, split), 4)


def test_numbers_come_with_what_rows_count(checkpoint: Checkpoint, transforms: Transforms, tmp_path: Path) -> None:
    found = chosen(checkpoint, transforms, tmp_path, share=1 / 3)
    assert [[each.count for each in of_layer.values()] for of_layer in found.high] == [[64, 64, 64, 128]] * 2
    sensitivity = measure_sensitivity(checkpoint, IDS, FORM, tmp_path, Silent(), transforms)
    gate, up = (sensitivity[1].scores[f"mlp.{name}_proj"]["fisher"]["out"] for name in ("gate", "up"))
    weights = found.high[1]["ffn_in"].row_weights
    assert weights is not None
    assert torch.equal(weights, torch.cat([gate, up]))
    alike = chosen(checkpoint, transforms, tmp_path, share=1 / 3, score="moment")
    assert all(each.row_weights is None for of_layer in alike.high for each in of_layer.values())
    by_score = {score: chosen(checkpoint, transforms, tmp_path, share=1 / 3, score=score) for score in get_args(Score)}
    counted = {
        score: {each.by_rounding for of_layer in found.high for each in of_layer.values()}
        for score, found in by_score.items()
    }
    assert counted == {"damage": {True}, "moment": {True}, "fisher": {False}}


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ({"average": 2.1}, r"2\.1 bits per weight are too few: the low format alone takes 2\.1"),
        ({"average": 3.9}, "3.9 bits per weight are more than high-impact channels of 4 bits could use"),
        ({"share": 0.1}, "A share of 0.1 of the 192 channels at attn_in cannot be high: they are taken 64 at a time"),
        ({"share": 0.9}, "Give a share of 0.333 to 0.667"),
    ],
)
def test_what_cannot_be_is_refused(policy: dict[str, float], told: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(SelectionError, match=told):
        check_high_policy(HighPolicy(4, **policy), checkpoint, FORM)


def test_bits_that_are_no_gain_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(SelectionError, match="4 bits are no gain where weights have 4"):
        check_high_policy(HighPolicy(4, 4.5), checkpoint, LinearFormat(4, 16))


def test_numbers_to_try_lie_around_the_budget() -> None:
    split = ChannelSplit.of(FORM, 4)
    shapes = {"attn_in": (960, 576), "ffn_out": (576, 1536)}
    # The budget allows a ninth of all channels: 64 of 576.
    assert numbers_to_try(HighPolicy(4, 2.35), shapes, split) == {
        "attn_in": [0, 64, 128, 192],
        "ffn_out": [0, 64, 192, 256, 320, 512],
    }
    given = numbers_to_try(HighPolicy(4, 2.3, candidates=(0.0, 0.5, 0.99)), shapes, split)
    assert given == {"attn_in": [0, 64, 256, 512], "ffn_out": [0, 64, 768, 1472]}


@pytest.mark.parametrize("axis", ["in", "out"])
def test_segments_of_a_split(axis: Any) -> None:
    split = ChannelSplit(LinearFormat(3, 3), LinearFormat(4, 4), axis, step=8)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    parts = split.segments(order, 8)
    if axis == "out":
        (part,) = parts
        assert (part.format, part.channels) == (split.low, None)
        return
    assert [part.suffix for part in parts] == [*SUFFIXES]
    assert [part.format for part in parts] == [split.high, split.low]
    np.testing.assert_array_equal(np.concatenate([part.channels for part in parts]), order.numpy())
