"""The flatten stage of a compile: calibration text, choice of transforms, and the flattened blocks."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from planish.compiler.calibrate.settings import CalibrationSettings
from planish.compiler.calibrate.text import calibration_tokens
from planish.compiler.checkpoint import Checkpoint
from planish.compiler.learn.candidates import kind_of
from planish.compiler.learn.flattening import flatten_checkpoint, read_evidence
from planish.compiler.learn.transformed import TransformedCheckpoint
from planish.compiler.progress import Progress
from planish.compiler.quantize.codes import CodesOnDisk
from planish.compiler.select.choose_forms import choose_forms
from planish.compiler.select.forms import online_flops
from planish.compiler.select.policy import SelectionPolicy
from planish.compiler.select.site_choice import SiteChoice, transforms_entry
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Transforms

__all__ = ["Flattening", "flatten"]

_TOKENS = "calibration.npy"


@dataclasses.dataclass(frozen=True)
class Flattening:
    """What the stage made.

    Attributes:
        checkpoint: the checkpoint with everything folded that folds.
        transforms: what runs online, and the clips.
        plan: the `transforms` entry of plan.json.
    """

    checkpoint: TransformedCheckpoint
    transforms: Transforms
    plan: dict[str, Any]


def flatten(
    checkpoint: Checkpoint,
    scheme: Scheme,
    policy: SelectionPolicy,
    settings: CalibrationSettings,
    folder: Path,
    codes: CodesOnDisk,
    progress: Progress,
) -> Flattening:
    """Flatten `checkpoint` for `scheme`, working in `folder`; see `flatten_checkpoint` for what a killed run keeps."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = _tokens(checkpoint, settings, folder / _TOKENS, progress)
    chosen = choose_forms(checkpoint, scheme, policy, tokens, folder, progress)
    transforms = flatten_checkpoint(
        checkpoint,
        scheme,
        [each.forms for each in chosen],
        tokens,
        folder,
        codes,
        seed=settings.seed,
        progress=lambda done, total: progress.step("flatten", done, total),
    )
    measured = read_evidence(folder, len(chosen))
    choices = [
        SiteChoice(
            layer=layer,
            site=site,
            form=each.forms[site],
            kind=kind_of(each.forms[site]),
            cost_flops=online_flops(site, transforms.layers[layer][site], checkpoint.config),
            error=measured[layer].get(site, {}).get("error"),
            evidence={**each.evidence.get(site, {}), **measured[layer].get(site, {})},
        )
        for layer, each in enumerate(chosen)
        for site in SITES
    ]
    entry = transforms_entry(choices, policy, checkpoint.config, checkpoint.fingerprint())
    return Flattening(TransformedCheckpoint(checkpoint, transforms), transforms, entry)


def _tokens(checkpoint: Checkpoint, settings: CalibrationSettings, path: Path, progress: Progress) -> Any:
    if path.exists():
        return np.load(path)
    tokens = calibration_tokens(
        settings.dataset,
        checkpoint,
        nsamples=settings.nsamples,
        seqlen=min(settings.seqlen, checkpoint.config.max_context),
        seed=settings.seed,
        progress=progress,
    )
    unfinished = path.with_suffix(".part.npy")
    np.save(unfinished, tokens)
    unfinished.rename(path)
    return tokens
