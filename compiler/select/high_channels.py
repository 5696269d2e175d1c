"""Choose how many input channels of every site keep more bits, all together within a budget of bits.

Channels are those behind the transforms of the float model (`fitted_transforms.py`). Its Fisher information ranks them,
`pair_losses.py` measures what numbers of them cost each block, and `ratios.py` solves for the numbers of all blocks
together (arXiv 2511.17801). Which channels they are is found again when a block is flattened
(`learn/rounding/site_fit.py`).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.errors import SelectionError
from planish.compiler.learn.block import SITE_MODULES
from planish.compiler.learn.flattening import FEWEST_SEQUENCES, held_out_sequences
from planish.compiler.learn.rounding.site_fit import HighCount
from planish.compiler.progress import Progress
from planish.compiler.select.channel_split import ChannelSplit
from planish.compiler.select.pair_losses import BY_SITE, PairLosses, group_shapes, measure_pair_losses
from planish.compiler.select.ratios import (
    Counts,
    Shapes,
    average_bits,
    choose_counts,
    counts_of_share,
    fixed_counts,
)
from planish.compiler.select.sensitivity import BlockSensitivity, Score, channel_order, measure_sensitivity
from planish.passes.scheme import LinearFormat
from planish.passes.transforms import Site, Transforms

__all__ = [
    "SEQUENCES",
    "ChosenChannels",
    "HighPolicy",
    "check_high_policy",
    "choose_channels",
    "high_counts",
    "numbers_to_try",
]

#: Sequences that sensitivity and losses are measured on: enough to tell channels, and numbers of them, apart.
SEQUENCES = 8
#: Losses are measured on one token of so many: all choices on the same ones, so that they compare.
_EVERY = 4
#: Shares tried, as multiples of the one that the budget allows all sites alike.
_MULTIPLES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


@dataclasses.dataclass(frozen=True)
class HighPolicy:
    """How high-impact channels are chosen.

    Attributes:
        bits: of their weight codes.
        average: the budget, stored bits per weight of the decoder blocks' linears, all counted; None where `share` is
            given.
        share: of the channels of every site; None where `average` is given.
        name: `solved`, numbers of least loss together, or `fixed`, one share for all sites.
        candidates: shares tried by `solved`; None is some around what the budget allows.
        score: what ranks channels; see `Score`.
        weighted: whether the loss of a block counts by how much the model's loss depends on its output.
    """

    bits: int
    average: float | None = None
    share: float | None = None
    name: Literal["solved", "fixed"] = "solved"
    candidates: tuple[float, ...] | None = None
    score: Score = "damage"
    weighted: bool = True


@dataclasses.dataclass(frozen=True)
class ChosenChannels:
    """What was chosen.

    Attributes:
        high: by layer, how many channels of each site there are that has any.
        evidence: what plan.json holds of it under `high_impact`.
    """

    high: list[dict[Site, HighCount]]
    evidence: dict[str, Any]


def check_high_policy(policy: HighPolicy, checkpoint: Checkpoint, form: LinearFormat) -> None:
    """Check that a policy can be fulfilled, before anything is measured.

    Args:
        policy: to check.
        checkpoint: gives the shapes of the linears.
        form: of the linears.

    Raises:
        SelectionError: if the high bits are not above those of the scheme, the budget is below what the low bits take
            or above what the high ones could, or a share or candidate cannot be met in whole steps.
    """
    split, shapes = ChannelSplit.of(form, policy.bits), group_shapes(checkpoint, BY_SITE)
    if policy.share is not None:
        counts_of_share(shapes, split, policy.share)
    if policy.average is None:
        return
    fixed_counts(shapes, split, policy.average)
    most = average_bits([{name: split.most(split.channels(shape)) for name, shape in shapes.items()}], shapes, split)
    if policy.average > most:
        raise SelectionError(
            f"{policy.average:g} bits per weight are more than high-impact channels of {policy.bits} bits could use: "
            f"with as many as there can be it takes {most:.3f}. Give fewer bits, or --hic-bits more."
        )
    if policy.name == "solved":
        for name, counts in numbers_to_try(policy, shapes, split).items():
            split.check_counts(counts, split.channels(shapes[name]))


def choose_channels(
    policy: HighPolicy,
    checkpoint: Checkpoint,
    form: LinearFormat,
    transforms: Transforms,
    token_ids: npt.NDArray[np.int64],
    folder: Path,
    progress: Progress,
    device: torch.device | None = None,
) -> ChosenChannels:
    """Return how many channels of every block are high; what was measured is kept in `folder`, block by block.

    Args:
        policy: how.
        checkpoint: the float model.
        form: of the linears.
        transforms: behind which the channels are.
        token_ids: calibration sequences, int64 [sequences, seq].
        folder: of this model, these transforms and these tokens alone.
        progress: is told how far the run is.
        device: where a block and a batch are; None is the CPU.

    Raises:
        CalibrationError: if activations, gradients or losses are not finite.
        SelectionError: see `check_high_policy`.
    """
    split, shapes = ChannelSplit.of(form, policy.bits), group_shapes(checkpoint, BY_SITE)
    # What is held out of the flattening stays out here too, unless too few sequences would be left.
    fitted = len(token_ids) - held_out_sequences(len(token_ids))
    tokens = token_ids[: max(FEWEST_SEQUENCES, min(SEQUENCES, fitted))]
    sensitivity = measure_sensitivity(checkpoint, tokens, form, folder, progress, transforms, device)
    losses: list[PairLosses] = []
    block_weights = [each.output_weight if policy.weighted else 1.0 for each in sensitivity]
    if policy.share is not None:
        counts = [counts_of_share(shapes, split, policy.share)] * len(sensitivity)
    elif policy.average is None:
        raise SelectionError("High-impact channels have neither a budget nor a share. Give --avg-bits or --hic-ratio.")
    elif policy.name == "fixed":
        counts = [fixed_counts(shapes, split, policy.average)] * len(sensitivity)
    else:
        losses = measure_pair_losses(
            checkpoint,
            split,
            [
                {name: channel_order(each, modules, "in", policy.score) for name, modules in BY_SITE.items()}
                for each in sensitivity
            ],
            numbers_to_try(policy, shapes, split),
            tokens,
            folder,
            progress,
            transforms=transforms,
            every=_EVERY,
            device=device,
        )
        counts = choose_counts(losses, shapes, split, policy.average, block_weights)
    stored = average_bits(counts, shapes, split) - _folded_orders(counts, shapes, split, transforms)
    progress.say(f"high-impact channels: {stored:.3f} bits per weight")
    evidence = {
        **{name: value for name, value in dataclasses.asdict(policy).items() if value is not None},
        "stored_bits": round(stored, 4),
        "block_weights": block_weights,
        "counts": counts,
        "losses": [dataclasses.asdict(each) for each in losses],
    }
    return ChosenChannels(high_counts(counts, sensitivity, policy), evidence)


def high_counts(
    counts: Sequence[Counts], sensitivity: Sequence[BlockSensitivity], policy: HighPolicy
) -> list[dict[Site, HighCount]]:
    """Return by block how many channels of each site are high, and by what they will be ranked."""
    found = []
    for of_layer, block in zip(counts, sensitivity, strict=True):
        sites: dict[Site, HighCount] = {}
        for site, modules in SITE_MODULES.items():
            if of_layer[site]:
                rows = [block.scores[module]["fisher"]["out"] for module in modules]
                weights = torch.cat(rows) if policy.score == "damage" else None
                sites[site] = HighCount(policy.bits, of_layer[site], weights, policy.score != "fisher")
        found.append(sites)
    return found


def numbers_to_try(policy: HighPolicy, shapes: Shapes, split: ChannelSplit) -> dict[str, list[int]]:
    """Return by group the numbers of high channels that losses are measured for, ascending, 0 among them."""
    assert policy.average is not None
    shares = policy.candidates
    if shares is None:
        fixed = fixed_counts(shapes, split, policy.average)
        even = max(count / split.channels(shapes[name]) for name, count in fixed.items())
        shares = tuple(multiple * even for multiple in _MULTIPLES)
    numbers = {}
    for name, shape in shapes.items():
        n = split.channels(shape)
        tried = {min(split.most(n), round(share * n / split.step) * split.step) for share in shares}
        # The fewest there can be: a share may be too small for a step at every width.
        numbers[name] = sorted({0, min(split.step, split.most(n)), *tried})
    return numbers


def _folded_orders(counts: Sequence[Counts], shapes: Shapes, split: ChannelSplit, transforms: Transforms) -> float:
    """Return the bits per weight that orders at `ffn_out` do not take, where FoldChannelOrderPass folds them away."""
    width, weights = shapes["ffn_out"][1], sum(rows * inputs for rows, inputs in shapes.values())
    online = [each.ffn_out.right is not None or each.ffn_out.left is not None for each in transforms.layers]
    folded = sum(bool(of_layer["ffn_out"]) and not runs for of_layer, runs in zip(counts, online, strict=True))
    return split.index_bits * width * folded / (len(counts) * weights)
