"""Compile a checkpoint to a bundle: settings are checked, the work folder is held, and the stages run in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.checkpoint.first_layers import open_first_layers
from planish.compiler.errors import SelectionError
from planish.compiler.learn.device import open_device
from planish.compiler.pipeline.compilation import Compilation
from planish.compiler.pipeline.estimate import Work, estimate
from planish.compiler.pipeline.flatten import check_calibration
from planish.compiler.pipeline.high_impact import high_channels, high_impact_fingerprint
from planish.compiler.pipeline.recipe import OF_ENGINES, Recipe
from planish.compiler.pipeline.stages import StageClock
from planish.compiler.pipeline.targets import check_context, check_engine_settings, check_targets
from planish.compiler.pipeline.work_folder import WorkFolder, check_output, check_space, clear_errors, code_fingerprint
from planish.compiler.progress import Progress, Silent
from planish.compiler.select.choose_forms import forms_of_plan
from planish.compiler.select.overrides import override_scheme, resolve_overrides

__all__ = ["compile_model", "compile_recipe"]

#: Settings that nothing but flattening depends on.
_OF_FLATTENING = (
    "round",
    "dataset",
    "nsamples",
    "seqlen",
    "seed",
    "refine",
    "polish",
    "device",
    "verify_passes",
)


def compile_model(
    model: str | Path | None,
    out: str | Path,
    *,
    scheme: str | None = None,
    lm_head: str | None = None,
    select: str | None = None,
    plan: str | Path | None = None,
    high_impact: str | Path | None = None,
    avg_bits: float | None = None,
    hic_policy: str | None = None,
    hic_ratio: float | None = None,
    hic_bits: int | None = None,
    hic_score: str | None = None,
    hic_candidates: Sequence[float | str] | None = None,
    hic_weighting: bool | None = None,
    round: str | None = None,
    residual_rotation: bool | None = None,
    dataset: str | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    seed: int | None = None,
    refine: int | None = None,
    polish: int | None = None,
    device: str | None = None,
    verify_passes: bool | None = None,
    targets: Sequence[str] | None = None,
    num_layers: int | None = None,
    max_context: int | None = None,
    max_batch_size: int | None = None,
    max_input_len: int | None = None,
    sms: Sequence[int] | None = None,
    plugins: str | None = None,
    tensorrt_version: str | None = None,
    recipe: str | Path | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Compile a LLaMA checkpoint to a bundle.

    The work is done in `OUT.partial` and renamed at the end. A run that was killed goes on there when the same call is
    made again.

    Args:
        model: a checkpoint folder, a GGUF file, a Hub id, or `smollm2`; None takes the recipe's.
        out: the output folder, new or empty.
        scheme: bits per tensor role, such as w4a4k4v4.
        recipe: a recipe file. Every other setting that is given wins over it.
        lm_head: as all further settings, see `Recipe`.
        select: see `Recipe`.
        plan: see `Recipe`.
        high_impact: see `Recipe`.
        avg_bits: see `Recipe`.
        hic_policy: see `Recipe`.
        hic_ratio: see `Recipe`.
        hic_bits: see `Recipe`.
        hic_score: see `Recipe`.
        hic_candidates: see `Recipe`; numbers as text are read.
        hic_weighting: see `Recipe`.
        round: see `Recipe`.
        residual_rotation: see `Recipe`.
        dataset: see `Recipe`.
        nsamples: see `Recipe`.
        seqlen: see `Recipe`.
        seed: see `Recipe`.
        refine: see `Recipe`.
        polish: see `Recipe`.
        device: see `Recipe`.
        verify_passes: see `Recipe`.
        targets: see `Recipe`.
        num_layers: see `Recipe`.
        max_context: see `Recipe`.
        max_batch_size: see `Recipe`.
        max_input_len: see `Recipe`.
        sms: see `Recipe`.
        plugins: see `Recipe`.
        tensorrt_version: see `Recipe`.
        progress: is told how far the run is; None says nothing.

    Raises:
        PlanishError: one of its subclasses in `planish.compiler.errors`; the message says what to do.

    Example:
        >>> bundle = compile_model(checkpoint, out, scheme="w4a8k8v8")
        >>> bundle.manifest.targets
        ('ort',)
    """
    given: dict[str, Any] = {
        "model": None if model is None else str(model),
        "scheme": scheme,
        "lm_head": lm_head,
        "select": select,
        "plan": None if plan is None else str(plan),
        "high_impact": None if high_impact is None else str(high_impact),
        "avg_bits": avg_bits,
        "hic_policy": hic_policy,
        "hic_ratio": hic_ratio,
        "hic_bits": hic_bits,
        "hic_score": hic_score,
        "hic_candidates": hic_candidates,
        "hic_weighting": hic_weighting,
        "round": round,
        "residual_rotation": residual_rotation,
        "dataset": dataset,
        "nsamples": nsamples,
        "seqlen": seqlen,
        "seed": seed,
        "refine": refine,
        "polish": polish,
        "device": device,
        "verify_passes": verify_passes,
        "targets": None if targets is None else tuple(targets),
        "num_layers": num_layers,
        "max_context": max_context,
        "max_batch_size": max_batch_size,
        "max_input_len": max_input_len,
        "sms": None if sms is None else tuple(sms),
        "plugins": plugins,
        "tensorrt_version": tensorrt_version,
    }
    settings = Recipe.read(None if recipe is None else Path(recipe), **given)
    check_engine_settings(settings.targets, **{name: value for name, value in given.items() if name in OF_ENGINES})
    _check_flattening_settings(settings, {name: given[name] for name in _OF_FLATTENING})
    return compile_recipe(settings, Path(out), progress or Silent())


def _check_flattening_settings(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Check that settings of flattening are given only where something is flattened, or raise `SelectionError`."""
    if recipe.parsed_policy().name != "none":
        return
    for name, value in given.items():
        if value is not None:
            raise SelectionError(
                f"'{name}' is a setting of flattening, and nothing is flattened here: not under --select none, and no "
                "linears in floating point. Leave it out, or choose another policy or scheme."
            )


def compile_recipe(recipe: Recipe, out: Path, progress: Progress) -> Bundle:
    """Compile as `recipe` says; see `compile_model`."""
    scheme, policy = recipe.parsed_scheme(), recipe.parsed_policy()
    # What is wrong with it is said before a checkpoint is fetched; how long sequences are depends on the model.
    recipe.calibration()
    recipe.parsed_high_policy()
    open_device(recipe.device)
    check_targets(recipe)
    check_output(out)
    checkpoint = open_first_layers(recipe.model, recipe.num_layers)
    checkpoint.check_tokenizer()
    check_context(recipe.max_context, checkpoint.config.max_context)
    calibration = recipe.calibration(checkpoint.config.max_context)
    settings: dict[str, Any] = {
        "recipe": {"command": "compile", **recipe.decisive_settings()},
        "checkpoint": checkpoint.fingerprint(),
        "code": code_fingerprint(),
    }
    if policy.name != "none":
        check_calibration(calibration)
        settings["calibration"] = calibration.fingerprint()
    scheme = override_scheme(scheme, resolve_overrides(policy.overrides, checkpoint.config.num_hidden_layers))
    if policy.plan is not None:
        settings["plan"] = [each.forms for each in forms_of_plan(policy.plan, checkpoint)]
    high = high_channels(recipe, checkpoint, scheme)
    if high.given:
        settings["high_impact"] = high_impact_fingerprint(high.given)
    with WorkFolder.hold(out, settings, progress) as work, clear_errors(out):
        check_space(work.path, estimate(checkpoint.config, scheme, Work.of(recipe, checkpoint.config)).disk)
        clock = StageClock(progress, work.noted(), work.note)
        Compilation(checkpoint, scheme, recipe, calibration, high, work, clock).run()
        work.publish()
    return Bundle.open(out, verify=False)
