"""The high-impact channels that a compile is told of: those of a plan, or of a folder with a plan.safetensors."""

import hashlib
from pathlib import Path
from typing import Any

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.errors import PlanError, SelectionError
from planish.compiler.pipeline.recipe import Recipe
from planish.compiler.select.plan_file import MATRICES_FILE, load_transforms, site_widths
from planish.compiler.select.site_choice import read_choices
from planish.passes.high_impact import HighImpact, segments
from planish.passes.scheme import Scheme
from planish.passes.transforms import HighImpacts, LayerTransforms, Transform, Transforms

__all__ = ["high_impact_fingerprint", "read_high_impact", "untransformed"]


def read_high_impact(recipe: Recipe, checkpoint: Checkpoint, scheme: Scheme) -> HighImpacts:
    """Return the high-impact channels of the sites that have any.

    `recipe.high_impact` names the folder; without it they are those of `recipe.plan`, bits and count from plan.json and
    the order from the plan.safetensors beside it.

    Raises:
        PlanError: if a file cannot be read or is of another model, if an order is no permutation, a count no multiple
            of `CHANNEL_STEP` or not below the width of its site, or if the bits are not above those of the scheme; the
            message names the layer and the site.
        SelectionError: if there are any, and polishing is asked for.
    """
    found: HighImpacts = {}
    if recipe.high_impact is not None:
        source = Path(recipe.high_impact) / MATRICES_FILE
        stored = load_transforms(source.parent, checkpoint.config).layers
        found = {layer: dict(each.high) for layer, each in enumerate(stored)}
    elif recipe.plan is not None:
        source = Path(recipe.plan)
        found = _of_plan(source, checkpoint)
    found = {layer: {site: high for site, high in sites.items() if high.count} for layer, sites in found.items()}
    for layer, sites in found.items():
        for site, high in sites.items():
            try:
                segments(scheme.linear, high)
            except ValueError as error:
                raise PlanError(
                    f"{source}: layer {layer}, site {site}: {error} ({scheme}). Give them more, or none."
                ) from error
    found = {layer: sites for layer, sites in found.items() if sites}
    if found and recipe.polish:
        raise SelectionError(
            "Models with high-impact channels cannot be polished yet. Leave out --polish, or the high-impact channels."
        )
    return found


def _of_plan(path: Path, checkpoint: Checkpoint) -> HighImpacts:
    choices = read_choices(path, checkpoint.config, checkpoint.fingerprint())
    chosen = [(each.layer, each.site, each.high) for each in choices if each.high is not None]
    found: HighImpacts = {}
    if not chosen:
        return found
    stored = load_transforms(path.parent, checkpoint.config).layers
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
