"""The flatten stage of a compile: calibration text, choice of transforms, and the flattened blocks."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planish.compiler.calibrate.settings import CalibrationSettings
from planish.compiler.calibrate.text import calibration_tokens
from planish.compiler.checkpoint import Checkpoint
from planish.compiler.checkpoint.files import write_json
from planish.compiler.learn.flattening import flatten_checkpoint, held_out_sequences, read_evidence
from planish.compiler.learn.gradient.refine import Refinement
from planish.compiler.learn.head_scale import head_scale
from planish.compiler.learn.polish.next_token import Head, rounded_to_nearest_outputs
from planish.compiler.learn.polish.polish import polish
from planish.compiler.learn.rounding.segments import Rounding
from planish.compiler.learn.rounding.site_fit import Steps
from planish.compiler.learn.stream_files import StreamFiles
from planish.compiler.learn.transforms.candidates import Form, kind_of
from planish.compiler.learn.transforms.rotated import RotatedCheckpoint
from planish.compiler.learn.transforms.transformed import TransformedCheckpoint
from planish.compiler.pipeline.high_impact import HighChannels, place_high_channels, unranked
from planish.compiler.pipeline.loud_sites import loudest_sites
from planish.compiler.progress import Progress
from planish.compiler.quantize.codes import CodesOnDisk
from planish.compiler.report.run_record import LoudSite
from planish.compiler.select.choose_forms import choose_forms
from planish.compiler.select.forms import form_of, online_flops
from planish.compiler.select.policy import SelectionPolicy
from planish.compiler.select.site_choice import HighChoice, SiteChoice, transforms_entry
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Site, Transforms

__all__ = ["FlattenSettings", "Flattening", "calibration_on_disk", "check_calibration", "flatten"]

_TOKENS, _CODES, _HELD_OUT = "calibration.npy", "codes", "held_out.json"
_FLOAT, _NEAREST = "float", "rounded to nearest"


@dataclasses.dataclass(frozen=True)
class Flattening:
    """What the stage made.

    Attributes:
        checkpoint: the float model with everything folded that folds.
        transforms: what runs online, and the clips.
        plan: the `transforms` entry of plan.json.
        codes: of the decoder blocks.
        rounded: the checkpoint as it was when its weights were rounded, and their codes: polishing moves gains and the
            scales of codes afterwards.
        lost_to_nearest: in words, if on the held-out sequences the model comes out further from the float one than
            with nothing flattened and all weights rounded to nearest; else None.
        loud: the sites of the loudest outliers, channel by channel.
    """

    checkpoint: TransformedCheckpoint
    transforms: Transforms
    plan: dict[str, Any]
    codes: CodesOnDisk
    rounded: tuple[Checkpoint, CodesOnDisk]
    lost_to_nearest: str | None
    loud: tuple[LoudSite, ...]


def check_calibration(settings: CalibrationSettings) -> None:
    """Check that there are sequences to fit to and others to measure on, before any are made.

    Raises:
        CalibrationError: if there are too few.
    """
    held_out_sequences(settings.nsamples)


@dataclasses.dataclass(frozen=True)
class FlattenSettings:
    """What a compile asks of the stage.

    Attributes:
        policy: chooses the transforms.
        calibration: the text, and the seed of everything.
        high: the high-impact channels.
        rounding: of the weights.
        refine_epochs: of the transforms of each block.
        polish_epochs: of the whole model.
    """

    policy: SelectionPolicy
    calibration: CalibrationSettings
    high: HighChannels
    rounding: Rounding = "gptq"
    refine_epochs: int = 0
    polish_epochs: int = 0


@dataclasses.dataclass(frozen=True)
class _Task:
    """What the steps of the stage share."""

    checkpoint: Checkpoint
    scheme: Scheme
    tokens: npt.NDArray[np.int64]
    seed: int
    folder: Path
    progress: Progress
    device: torch.device


def flatten(
    checkpoint: Checkpoint,
    scheme: Scheme,
    settings: FlattenSettings,
    folder: Path,
    codes_folder: Path,
    progress: Progress,
    device: torch.device,
) -> Flattening:
    """Flatten `checkpoint` for `scheme`, working in `folder`; refine each block and polish the whole for some epochs.

    All of it is computed on `device`, which holds a block and a batch, and the whole model only while that writes the
    text or is polished. See `flatten_checkpoint` and `polish` for what a killed run keeps. How many
    channels are high is chosen before blocks are flattened, and which ones then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seed = settings.calibration.seed
    tokens = calibration_on_disk(checkpoint, settings.calibration, folder, progress, device)
    task = _Task(checkpoint, scheme, tokens, seed, folder, progress, device)
    chosen = choose_forms(checkpoint, scheme, settings.policy, tokens, folder, progress, seed, device)
    forms = [each.forms for each in chosen]
    placed, choice = place_high_channels(
        settings.high, checkpoint, scheme, forms, tokens, folder, seed, progress, device
    )
    codes_folder.mkdir(exist_ok=True)
    first_folder = folder / _CODES if settings.polish_epochs else codes_folder
    first_folder.mkdir(exist_ok=True)
    refine_epochs = settings.refine_epochs
    transforms = flatten_checkpoint(
        checkpoint,
        scheme,
        forms,
        tokens,
        folder,
        CodesOnDisk(first_folder, checkpoint, scheme, unranked(placed, checkpoint.config).high),
        seed=seed,
        steps=Steps(rounding=settings.rounding),
        refinement=Refinement(epochs=refine_epochs, seed=seed) if refine_epochs else None,
        high=placed,
        device=device,
        progress=lambda done, total: progress.step("flatten", done, total),
    )
    # Which channels are high is known by now.
    rounded, codes = (CodesOnDisk(each, checkpoint, scheme, transforms.high) for each in (first_folder, codes_folder))
    measured = read_evidence(folder, len(chosen))
    choices = [
        SiteChoice(
            layer=layer,
            site=site,
            form=form,
            kind=kind_of(form),
            cost_flops=online_flops(site, transforms.layers[layer][site], checkpoint.config),
            error=measured[layer].get(site, {}).get("error"),
            evidence={**each.evidence.get(site, {}), **measured[layer].get(site, {})},
            high=_high_choice(transforms, layer, site),
        )
        for layer, each in enumerate(chosen)
        for site in SITES
        for form in [_form_made(transforms, layer, site, each.forms[site])]
    ]
    entry = transforms_entry(choices, settings.policy, checkpoint.config, checkpoint.fingerprint())
    if choice:
        entry["high_impact"] = choice
    if refine_epochs:
        entry["refinement"] = [each["refinement"] for each in measured]
    if not (scheme.lm_head.is_float or scheme.lm_head.weight_only):
        transforms, entry["lm_head"] = _scale_head(task, transforms)
    before = TransformedCheckpoint(checkpoint, transforms), rounded
    divergence, cross_entropy = _held_out(task)
    progress.step("compare", 1, 1)
    if settings.polish_epochs:
        transforms, entry["polish"] = _polish(task, transforms, rounded, settings.polish_epochs, codes)
        divergence["flattened and polished"] = entry["polish"].pop("kept_divergence")
        cross_entropy["flattened and polished"] = entry["polish"].pop("held_out_cross_entropy")
    entry["held_out_divergence"], entry["held_out_cross_entropy"] = divergence, cross_entropy
    made = TransformedCheckpoint(checkpoint, transforms)
    if isinstance(checkpoint, RotatedCheckpoint):
        transforms = dataclasses.replace(transforms, residual=checkpoint.rotation)
    lost, loud = _loss_to_nearest(divergence), loudest_sites(measured, folder)
    return Flattening(made, transforms, entry, codes, before, lost, loud)


def _form_made(transforms: Transforms, layer: int, site: Site, chosen: Form) -> Form:
    """Return the form that stands at a site: the one that was chosen, unless refining fell back to rotations."""
    fell_back = kind_of(chosen) == "affine" and transforms.layers[layer][site].kind == "rotation"
    return form_of(site, "rotation") if fell_back else chosen


def _high_choice(transforms: Transforms, layer: int, site: Site) -> HighChoice | None:
    high = transforms.layers[layer].high.get(site)
    return None if high is None else HighChoice.model_validate({"bits": high.bits, "count": high.count})


def _scale_head(task: _Task, transforms: Transforms) -> tuple[Transforms, dict[str, Any]]:
    """Return the transforms with a channel scale in front of lm_head, and what plan.json says of it."""
    layers, held_out = task.checkpoint.config.num_hidden_layers, held_out_sequences(len(task.tokens))
    streams = StreamFiles(task.folder, held_out, task.device).open(layers)
    found = head_scale(Head.of(task.checkpoint, task.device), task.scheme.lm_head, streams)
    entry = {"scaled": found.scale is not None, "error_before": found.error_before, "error": found.error}
    return dataclasses.replace(transforms, head=found.scale), entry


def _held_out(task: _Task) -> tuple[dict[str, float], dict[str, float]]:
    """Return KL(float || low-bit) per held-out token, and the cross entropy of the tokens, both in nats.

    They are of the flattened model and of one rounded to nearest, the cross entropy of the float model as well. They
    are measured once and kept in the folder.
    """
    path, held_out = task.folder / _HELD_OUT, held_out_sequences(len(task.tokens))
    if not path.exists():
        streams = StreamFiles(task.folder, held_out).open(task.checkpoint.config.num_hidden_layers)
        head, ids = Head.of(task.checkpoint, task.device), task.tokens[-held_out:]
        outputs = {
            _FLOAT: streams.target[-held_out:],
            _NEAREST: _nearest_outputs(task, ids),
            "flattened": streams.seen[-held_out:],
        }
        found = {
            "divergence": {
                name: head.mean_divergence(each, outputs[_FLOAT]) for name, each in outputs.items() if name != _FLOAT
            },
            "cross_entropy": {name: head.mean_cross_entropy(each, ids) for name, each in outputs.items()},
        }
        write_json(path, found)
    kept: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    return kept["divergence"], kept["cross_entropy"]


def _nearest_outputs(task: _Task, ids: npt.NDArray[np.int64]) -> Tensor:
    """Return what the last block puts out of the model that is compiled where flattening is dropped.

    That is the checkpoint as it came, whose residual stream is not rotated; the outputs are, as those beside them.
    """
    if not isinstance(task.checkpoint, RotatedCheckpoint):
        return rounded_to_nearest_outputs(task.checkpoint, task.scheme, ids, task.device)
    outputs = rounded_to_nearest_outputs(task.checkpoint.original, task.scheme, ids, task.device)
    return outputs @ torch.from_numpy(task.checkpoint.rotation)


def _loss_to_nearest(divergence: Mapping[str, float]) -> str | None:
    *_, (made, found) = divergence.items()
    if found <= divergence[_NEAREST]:
        return None
    return (
        f"{made}, the model is {found:.4g} nats per held-out token from the float one, and only "
        f"{divergence[_NEAREST]:.4g} {_NEAREST} with no transforms"
    )


def _polish(
    task: _Task, transforms: Transforms, rounded: CodesOnDisk, epochs: int, codes: CodesOnDisk
) -> tuple[Transforms, dict[str, Any]]:
    """Polish, write the codes with their new scales, and return the new transforms and what plan.json says of it."""
    layers = task.checkpoint.config.num_hidden_layers
    streams = StreamFiles(task.folder, held_out_sequences(len(task.tokens)), task.device).open(layers)
    polished = polish(
        task.checkpoint,
        task.scheme,
        transforms,
        rounded,
        task.tokens,
        streams.target,
        streams.held_out,
        epochs,
        task.folder,
        seed=task.seed,
        device=task.device,
        progress=lambda done, total: task.progress.step("polish", done, total),
    )
    codes.keep_scaled(rounded, polished.row_scales)
    return polished.transforms, {
        "epochs": epochs,
        # Of an epoch that diverged there is none; JSON has no infinity.
        "held_out_divergence": [each if math.isfinite(each) else None for each in polished.divergence],
        "kept_divergence": polished.kept,
        "held_out_cross_entropy": polished.cross_entropy,
    }


def calibration_on_disk(
    checkpoint: Checkpoint, settings: CalibrationSettings, folder: Path, progress: Progress, device: torch.device
) -> npt.NDArray[np.int64]:
    """Return the calibration sequences, int64 [nsamples, seqlen], which are made once and kept in `folder`."""
    path = folder / _TOKENS
    if path.exists():
        kept: npt.NDArray[np.int64] = np.load(path)
        return kept
    tokens = calibration_tokens(
        settings.dataset,
        checkpoint,
        nsamples=settings.nsamples,
        seqlen=settings.seqlen,
        seed=settings.seed,
        progress=progress,
        device=device,
        scratch=folder,
    )
    unfinished = path.with_suffix(".part.npy")
    np.save(unfinished, tokens)
    unfinished.rename(path)
    return tokens
