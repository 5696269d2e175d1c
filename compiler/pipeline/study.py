"""Compare the selection policies on a checkpoint: measure once, and if asked for compile and evaluate with each."""

import hashlib
import json
import re
from pathlib import Path

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.calibrate.settings import CalibrationSettings
from planish.compiler.checkpoint import Checkpoint
from planish.compiler.checkpoint.first_layers import open_first_layers
from planish.compiler.errors import SelectionError
from planish.compiler.learn.device import clear_memory_errors, open_device
from planish.compiler.measure.evaluation import evaluate
from planish.compiler.pipeline.compile import compile_recipe
from planish.compiler.pipeline.flatten import calibration_on_disk, check_calibration
from planish.compiler.pipeline.recipe import Recipe
from planish.compiler.pipeline.work_folder import code_fingerprint
from planish.compiler.progress import Progress
from planish.compiler.select.choose_forms import choose_forms
from planish.compiler.select.kurtosis import KurtosisRule, read_kurtosis
from planish.compiler.select.measure_forms import measure_forms
from planish.compiler.select.policy import SelectionPolicy
from planish.compiler.select.study import SelectionStudy, study_selection

__all__ = ["measure_perplexities", "study_checkpoint"]


def study_checkpoint(recipe: Recipe, folder: Path, progress: Progress, search: bool = False) -> SelectionStudy:
    """Measure what every form costs on the model of `recipe`, and compare the policies by it; `search` if wanted.

    What is measured is kept in `folder`, apart for each set of settings: a killed run goes on, and two never mix.

    Raises:
        SelectionError: if the scheme leaves linears in floating point.
        CalibrationError: if the calibration text cannot be used, or what flows through the model is not finite.
        DeviceError: if the recipe's device is not there, or its memory is too small.
    """
    scheme = recipe.parsed_scheme()
    if scheme.linear.is_float:
        raise SelectionError(f"{scheme} leaves linears in floating point: there is nothing to select. Give them bits.")
    recipe.calibration()
    device = open_device(recipe.device)
    checkpoint = open_first_layers(recipe.model, recipe.num_layers)
    settings = recipe.calibration(checkpoint.config.max_context)
    check_calibration(settings)
    work = _apart(folder, "measured", recipe, checkpoint, settings)
    with clear_memory_errors(device):
        tokens = calibration_on_disk(checkpoint, settings, work, progress, device)
        errors = measure_forms(checkpoint, scheme, tokens, work, progress, device)
    kurtosis = read_kurtosis(checkpoint, KurtosisRule(), lambda done, total: progress.step("kurtosis", done, total))
    searched = None
    if search:
        policy = SelectionPolicy.parse("search")
        searched = choose_forms(checkpoint, scheme, policy, tokens, work, progress, settings.seed, device)
    return study_selection(checkpoint.config, errors, kurtosis, searched)


def measure_perplexities(
    recipe: Recipe, study: SelectionStudy, text: Path, windows: int, folder: Path, progress: Progress
) -> dict[str, float]:
    """Return the perplexity of each policy of `study` on the first windows of `text`, compiling a bundle with each.

    Bundles are kept in `folder`: of a run that was killed those that are whole are not compiled again.

    Raises:
        PlanishError: as `compile_model` and `evaluate` do.
    """
    checkpoint = open_first_layers(recipe.model, recipe.num_layers)
    settings = recipe.calibration(checkpoint.config.max_context)
    found = {}
    for policy in ("none", *(each.policy for each in study.policies)):
        chosen = recipe.model_copy(update={"select": policy})
        out = _apart(folder, re.sub(r"[^\w.=-]+", "-", policy), chosen, checkpoint, settings)
        progress.say(f"{policy}: {out}")
        bundle = Bundle.open(out) if any(out.iterdir()) else compile_recipe(chosen, out, progress)
        evaluated = evaluate(bundle.session(), bundle.tokenizer, text, seqlen=settings.seqlen, windows=windows)
        found[policy] = evaluated.perplexity
    return found


def _apart(folder: Path, name: str, recipe: Recipe, checkpoint: Checkpoint, settings: CalibrationSettings) -> Path:
    """Return a folder in `folder` that only runs with equal settings use, made if need be."""
    content = {
        "recipe": recipe.decisive_settings(),
        "checkpoint": checkpoint.fingerprint(),
        "calibration": settings.fingerprint(),
        "code": code_fingerprint(),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path = folder / f"{name}-{digest[:12]}"
    path.mkdir(parents=True, exist_ok=True)
    return path
