"""The high-impact channels of a compile: chosen by a policy, or those of a plan or a folder with plan.safetensors."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.errors import PlanError, SelectionError
from planish.compiler.learn.rounding.site_fit import HighCount
from planish.compiler.learn.transforms.candidates import Form
from planish.compiler.pipeline.recipe import Recipe
from planish.compiler.progress import Progress
from planish.compiler.select.fitted_transforms import fit_transforms
from planish.compiler.select.high_channels import HighPolicy, check_high_policy, choose_channels
from planish.compiler.select.plan_file import MATRICES_FILE, load_transforms, site_widths
from planish.compiler.select.site_choice import read_choices
from planish.passes.high_impact import HighImpact, segments
from planish.passes.scheme import Scheme
from planish.passes.transforms import HighImpacts, LayerTransforms, Site, Transform, Transforms

__all__ = [
    "HighChannels",
    "high_channels",
    "high_impact_fingerprint",
    "place_high_channels",
    "read_high_impact",
    "unranked",
    "untransformed",
]


@dataclasses.dataclass(frozen=True)
class HighChannels:
    """Where high-impact channels come from.

    Attributes:
        policy: chooses them; None takes what is given.
        given: by layer and site.
    """

    policy: HighPolicy | None
    given: HighImpacts

    @property
    def any(self) -> bool:
        """Whether there will be any."""
        return self.policy is not None or bool(self.given)


def high_channels(recipe: Recipe, checkpoint: Checkpoint, scheme: Scheme) -> HighChannels:
    """Return where the high-impact channels of a compile come from, checked before anything is made.

    Raises:
        PlanError: see `read_high_impact`.
        SelectionError: if settings contradict each other, cannot be fulfilled, or ask for AdaRound without such
            channels.
    """
    policy, given = recipe.parsed_high_policy(), read_high_impact(recipe, checkpoint, scheme)
    if policy is not None:
        if given:
            raise SelectionError(
                f"The plan {recipe.plan} says which channels are high. Take 'high' out of it, or leave out --avg-bits "
                "and --hic-ratio."
            )
        check_high_policy(policy, checkpoint, scheme.linear)
    found = HighChannels(policy, given)
    if recipe.round == "adaround" and not found.any:
        raise SelectionError(
            "AdaRound is for high-impact channels, and there are none. Give --avg-bits, or leave out --round."
        )
    return found


def place_high_channels(
    high: HighChannels,
    checkpoint: Checkpoint,
    scheme: Scheme,
    forms: Sequence[dict[Site, Form]],
    token_ids: npt.NDArray[np.int64],
    folder: Path,
    seed: int,
    progress: Progress,
    device: torch.device,
) -> tuple[list[Mapping[Site, HighImpact | HighCount]] | None, dict[str, Any]]:
    """Return by block the channels that were given, or how many a policy chooses, and what plan.json says of that.

    None is no high-impact channels anywhere.
    """
    layers = checkpoint.config.num_hidden_layers
    if high.policy is None:
        return ([high.given.get(layer, {}) for layer in range(layers)] if high.given else None), {}
    transforms, _ = fit_transforms(checkpoint, scheme, forms, token_ids, folder, progress, seed, device)
    chosen = choose_channels(high.policy, checkpoint, scheme.linear, transforms, token_ids, folder, progress, device)
    return [*chosen.high], chosen.evidence


def unranked(high: Sequence[Mapping[Site, HighImpact | HighCount]] | None, config: LlamaConfig) -> Transforms:
    """Return transforms that change nothing, whose high-impact channels have bits and numbers, and any order."""
    widths, found = site_widths(config), untransformed(config)
    if high is None:
        return found
    return found.with_high(
        {
            layer: {site: HighImpact(each.bits, np.arange(widths[site]), each.count) for site, each in of_layer.items()}
            for layer, of_layer in enumerate(high)
        }
    )


def read_high_impact(recipe: Recipe, checkpoint: Checkpoint, scheme: Scheme) -> HighImpacts:
    """Return the high-impact channels of the sites that have any.

    `recipe.high_impact` names the folder; without it they are those of `recipe.plan`, bits and count from plan.json and
    the order from the plan.safetensors beside it.

    Raises:
        PlanError: if a file cannot be read or is of another model, if an order is no permutation, a count no multiple
            of `CHANNEL_STEP` or not below the width of its site, or if the bits are not above those of the scheme; the
            message names the layer and the site.
    """
    found: HighImpacts = {}
    if recipe.high_impact is not None:
        source = Path(recipe.high_impact) / MATRICES_FILE
        stored = _stored(source.parent, checkpoint)
        found = {layer: dict(each.high) for layer, each in enumerate(stored)}
    elif recipe.plan is not None:
        source = Path(recipe.plan)
        found = _of_plan(source, checkpoint)
    found = {layer: {site: high for site, high in sites.items() if high.count} for layer, sites in found.items()}
    for layer, sites in found.items():
        for site, high in sites.items():
            try:
                segments(scheme.at(site, layer), high)
            except ValueError as error:
                raise PlanError(
                    f"{source}: layer {layer}, site {site}: {error} ({scheme}). Give them more, or none."
                ) from error
    return {layer: sites for layer, sites in found.items() if sites}


def _stored(folder: Path, checkpoint: Checkpoint) -> tuple[LayerTransforms, ...]:
    if not (folder / MATRICES_FILE).is_file():
        raise PlanError(
            f"{folder} holds no {MATRICES_FILE}, which says which channels have a high impact. Give a folder that has "
            "one, or take 'high' out of the plan."
        )
    return load_transforms(folder, checkpoint.config).layers


def _of_plan(path: Path, checkpoint: Checkpoint) -> HighImpacts:
    choices = read_choices(path, checkpoint.config, checkpoint.fingerprint())
    chosen = [(each.layer, each.site, each.high) for each in choices if each.high is not None]
    found: HighImpacts = {}
    if not chosen:
        return found
    stored = _stored(path.parent, checkpoint)
    for layer, site, choice in chosen:
        place = f"{path}: layer {layer}, site {site}"
        kept = stored[layer].high.get(site)
        if kept is None:
            raise PlanError(
                f"{place}: {MATRICES_FILE} beside it says of no channel there that it has a high impact. Take 'high' "
                f"out of the plan, or give the {MATRICES_FILE} that belongs to it."
            )
        try:
            high = HighImpact(choice.bits, kept.order, choice.count, kept.clip)
        except ValueError as error:
            raise PlanError(f"{place}: {error}. Correct 'high', or take it out.") from error
        found.setdefault(layer, {})[site] = high
    return found


def high_impact_fingerprint(high: HighImpacts) -> dict[str, Any]:
    """Return what tells these high-impact channels from others, for JSON."""
    return {
        f"{layer}.{site}": [each.bits, each.count, each.clip, hashlib.sha256(each.order.tobytes()).hexdigest()]
        for layer, sites in sorted(high.items())
        for site, each in sorted(sites.items())
    }


def untransformed(config: LlamaConfig) -> Transforms:
    """Return transforms of a model that change nothing."""
    identities = {site: Transform(width) for site, width in site_widths(config).items()}
    return Transforms((LayerTransforms(**identities, clips={}, high={}),) * config.num_hidden_layers)
