"""Compile a checkpoint to a bundle: the stages, in order, each resumed where a killed run left it."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.layout import MODEL_FILE, PLAN_FILE, RECIPE_FILE, engine_folder
from planish.compiler.bundle.manifest import Manifest
from planish.compiler.calibrate.settings import CalibrationSettings
from planish.compiler.checkpoint import Checkpoint
from planish.compiler.checkpoint.files import write_json
from planish.compiler.checkpoint.first_layers import open_first_layers
from planish.compiler.export.float_model import save_model
from planish.compiler.export.portable import portable_model
from planish.compiler.learn.device import clear_memory_errors, open_device
from planish.compiler.learn.transforms.rotated import RotatedCheckpoint
from planish.compiler.pipeline.estimate import Work, estimate, unasked_polish
from planish.compiler.pipeline.flatten import Flattening, FlattenSettings, check_calibration, flatten
from planish.compiler.pipeline.high_impact import HighChannels, high_channels, high_impact_fingerprint, untransformed
from planish.compiler.pipeline.plan import make_plan
from planish.compiler.pipeline.recipe import Recipe
from planish.compiler.pipeline.stages import StageClock
from planish.compiler.pipeline.targets import check_context, check_engine_settings, check_targets, lower
from planish.compiler.pipeline.work_folder import WorkFolder, check_output, check_space, clear_errors, code_fingerprint
from planish.compiler.progress import Progress, Silent
from planish.compiler.quantize.codes import CodesOnDisk, quantize_checkpoint
from planish.compiler.report.run_record import LoudSite, RunRecord, versions
from planish.compiler.report.write import write_report
from planish.compiler.runtime.tokenizer import Tokenizer
from planish.compiler.select.choose_forms import forms_of_plan
from planish.compiler.select.overrides import override_scheme, resolve_overrides
from planish.compiler.select.plan_file import save_transforms
from planish.compiler.verify.passes import PassDrift, verify_flattening
from planish.compiler.verify.verification import verify
from planish.passes.formats import LM_HEAD
from planish.passes.high_impact import HighImpactOf
from planish.passes.scheme import Scheme

__all__ = ["compile_model", "compile_recipe"]

_T = TypeVar("_T")

#: What the finished model is compared with the oracle on.
_SAMPLE = (
    "The planisher's hammer is polished and its face almost flat. Each blow overlaps the last, so that the sheet, "
    "raised and hollow from earlier work, becomes even: 3 passes, perhaps 40 minutes, and no mark left to see."
)
_SAMPLE_TOKENS = 48


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
    settings = Recipe.read(
        None if recipe is None else Path(recipe),
        model=None if model is None else str(model),
        scheme=scheme,
        lm_head=lm_head,
        select=select,
        plan=None if plan is None else str(plan),
        high_impact=None if high_impact is None else str(high_impact),
        avg_bits=avg_bits,
        hic_policy=hic_policy,
        hic_ratio=hic_ratio,
        hic_bits=hic_bits,
        hic_score=hic_score,
        hic_candidates=hic_candidates,
        hic_weighting=hic_weighting,
        round=round,
        residual_rotation=residual_rotation,
        dataset=dataset,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        refine=refine,
        polish=polish,
        device=device,
        verify_passes=verify_passes,
        targets=None if targets is None else tuple(targets),
        num_layers=num_layers,
        max_context=max_context,
        max_batch_size=max_batch_size,
        max_input_len=max_input_len,
        sms=None if sms is None else tuple(sms),
        plugins=plugins,
        tensorrt_version=tensorrt_version,
    )
    check_engine_settings(settings.targets, max_batch_size=max_batch_size, max_input_len=max_input_len, sms=sms)
    return compile_recipe(settings, Path(out), progress or Silent())


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
        "recipe": recipe.decisive_settings(),
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
        _Compile(checkpoint, scheme, recipe, calibration, high, work, clock).run()
        work.publish()
    return Bundle.open(out, verify=False)


@dataclasses.dataclass
class _Compile:
    """One compile: what its stages share."""

    checkpoint: Checkpoint
    scheme: Scheme
    recipe: Recipe
    calibration: CalibrationSettings
    high: HighChannels
    work: WorkFolder
    progress: StageClock
    drifts: tuple[PassDrift, ...] = ()
    loud: tuple[LoudSite, ...] = ()
    #: Why nothing was flattened after all, and what was measured of it.
    fallback: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(self) -> None:
        """Run the stages."""
        bundle, targets = self.work.bundle, self.recipe.targets
        self.checkpoint.write_sidecars(bundle)
        # The graph first: what it cannot express is refused before the long work, and its weights are read when saved.
        untouched = untransformed(self.checkpoint.config).with_high(self.high.given)
        codes = CodesOnDisk(self.work.codes, self.checkpoint, self.scheme, untouched.high)
        transforms = untouched if self.high.given else None
        model, left_float = portable_model(self.checkpoint, self.scheme, codes, transforms)
        self.progress.note("open")
        flattening = self._flatten()
        checkpoint = self.checkpoint
        rounded: tuple[Checkpoint, CodesOnDisk] = checkpoint, codes
        if flattening is not None:
            checkpoint, transforms = flattening.checkpoint, flattening.transforms
            rounded, codes = flattening.rounded, flattening.codes
            model, left_float = portable_model(self.checkpoint, self.scheme, codes, transforms)
        nearest = self._timed("quantise", lambda: self._quantize(rounded[0], untouched.high))
        if not self.scheme.lm_head.is_float:
            for each in (codes, rounded[1]):
                each.share(LM_HEAD, nearest)
        self._stage("portable model", bundle, lambda: save_model(model, bundle, self._steps("portable model")))
        for target in targets:
            self._stage(f"lower to {target}", engine_folder(bundle, target), partial(self._lower, target))
        self.progress.say("verifying the logits against the PyTorch oracle")
        checked = engine_folder(bundle, "ort") if "ort" in targets else bundle
        tokens = Tokenizer(bundle).encode(_SAMPLE)[:_SAMPLE_TOKENS]
        verification = self._timed(
            "verify", lambda: verify(checkpoint, self.scheme, codes, checked / MODEL_FILE, tokens, transforms)
        )
        plan = self._timed(
            "plan", lambda: make_plan(rounded[0], self.scheme, rounded[1], left_float, self._steps("plan"))
        )
        if flattening is not None:
            plan["transforms"] = flattening.plan
        if transforms is not None:
            save_transforms(transforms, bundle)
        plan |= self.fallback
        write_json(bundle / PLAN_FILE, plan)
        self._repeatable_recipe().write(bundle / RECIPE_FILE)
        manifest = self._manifest()
        drifts = {each.name: each.drift for each in self.drifts}
        run = RunRecord(dataclasses.asdict(verification), drifts, self.progress.stages, list(self.loud), versions())
        write_report(Bundle(bundle, manifest), run)
        manifest.write(bundle)

    def _flatten(self) -> Flattening | None:
        policy, base = self.recipe.parsed_policy(), self.checkpoint
        if policy.name == "none":
            return None
        if self.recipe.residual_rotation:
            base = RotatedCheckpoint(base, self.calibration.seed)
        device = open_device(self.recipe.device)
        with clear_memory_errors(device):
            flattening = flatten(
                base,
                self.scheme,
                FlattenSettings(
                    policy,
                    self.calibration,
                    self.high,
                    self.recipe.round,
                    refine_epochs=self.recipe.refine,
                    polish_epochs=self._polish_epochs(),
                ),
                self.work.flatten,
                self.work.codes,
                self.progress,
                device,
            )
        if flattening.lost_to_nearest is not None:
            self.progress.say(f"flattening does not pay: {flattening.lost_to_nearest}")
            # Without transforms there are none of the channels that the bits were asked for.
            if self.recipe.leaves_policy_open and not self.high.any:
                measured = {name: value for name, value in flattening.plan.items() if name.startswith("held_out_")}
                self.fallback = {"fallback": f"nothing is flattened: {flattening.lost_to_nearest}", **measured}
                flattening.codes.drop()
                return None
        if self.recipe.verify_passes:
            self.progress.say("verifying the passes that flatten")
            self.drifts = verify_flattening(self.checkpoint, flattening.transforms)
            self.progress.note("verify passes")
        self.loud = flattening.loud
        return flattening

    def _polish_epochs(self) -> int:
        """Return how long to polish; None in the recipe is as long as it pays, if the model fits into memory."""
        if self.recipe.polish is not None:
            return self.recipe.polish
        epochs = unasked_polish(self.checkpoint.config)
        if not epochs:
            self.progress.say("not polished: the model is held in float32 for that; ask for it with --polish 4")
        return epochs

    def _quantize(self, checkpoint: Checkpoint, high: HighImpactOf) -> CodesOnDisk:
        def step(_: str, done: int, total: int) -> None:
            self.progress.step("quantise", done, total)

        return quantize_checkpoint(checkpoint, self.scheme, self.work.codes, step, high)

    def _lower(self, target: str) -> None:
        bundle, longest = self.work.bundle, self.checkpoint.config.max_context
        lower(target, bundle / MODEL_FILE, engine_folder(bundle, target), self.recipe, longest, self.progress)

    def _stage(self, name: str, folder: Path, make: Callable[[], object]) -> None:
        """Make the files in `folder`, unless a run before finished that."""
        if self.work.finished(name):
            self.progress.say(f"{name}: kept from the run before")
            return
        self._timed(name, make)
        self.work.finish(name, folder)

    def _timed(self, name: str, make: Callable[[], _T]) -> _T:
        made = make()
        self.progress.note(name)
        return made

    def _steps(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress.step(stage, done, total)

    def _max_context(self) -> int:
        return self.recipe.max_context or self.checkpoint.config.max_context

    def _repeatable_recipe(self) -> Recipe:
        """Return the recipe with paths that hold from any folder."""
        given = {name: getattr(self.recipe, name) for name in ("model", "dataset", "plan", "high_impact")}
        paths = {name: str(Path(path).resolve()) for name, path in given.items() if path and Path(path).exists()}
        return self.recipe.model_copy(update=paths)

    def _manifest(self) -> Manifest:
        return Manifest(
            planish_version=version("planish"),
            model=self.checkpoint.name,
            checkpoint=self.checkpoint.fingerprint(),
            scheme=str(self.scheme),
            lm_head=str(self.scheme.lm_head),
            targets=self.recipe.targets,
            max_context=self._max_context(),
        )
