"""The stages of a compile, in order, each resumed where a killed run left it."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.layout import MODEL_FILE, PLAN_FILE, RECIPE_FILE, engine_folder
from planish.compiler.bundle.manifest import Manifest
from planish.compiler.calibrate.settings import SELF, CalibrationSettings
from planish.compiler.checkpoint import Checkpoint
from planish.compiler.checkpoint.files import write_json
from planish.compiler.export.float_model import save_model
from planish.compiler.export.portable import portable_model
from planish.compiler.learn.device import clear_memory_errors, open_device
from planish.compiler.learn.transforms.rotated import RotatedCheckpoint
from planish.compiler.pipeline.estimate import unasked_polish
from planish.compiler.pipeline.flatten import Flattening, FlattenSettings, flatten
from planish.compiler.pipeline.high_impact import HighChannels, untransformed
from planish.compiler.pipeline.plan import make_plan
from planish.compiler.pipeline.recipe import TARGETS, Recipe
from planish.compiler.pipeline.stages import StageClock
from planish.compiler.pipeline.targets import lower
from planish.compiler.pipeline.work_folder import WorkFolder
from planish.compiler.quantize.codes import CodesOnDisk, quantize_checkpoint
from planish.compiler.report.run_record import LoudSite, RunRecord, versions
from planish.compiler.report.write import write_report
from planish.compiler.runtime.tokenizer import Tokenizer
from planish.compiler.select.plan_file import save_transforms
from planish.compiler.verify.passes import PassDrift, verify_flattening
from planish.compiler.verify.verification import verify
from planish.passes.formats import LM_HEAD
from planish.passes.high_impact import HighImpactOf
from planish.passes.scheme import Scheme

__all__ = ["Compilation"]

_T = TypeVar("_T")

#: What the finished model is compared with the oracle on.
_SAMPLE = (
    "The planisher's hammer is polished and its face almost flat. Each blow overlaps the last, so that the sheet, "
    "raised and hollow from earlier work, becomes even: 3 passes, perhaps 40 minutes, and no mark left to see."
)
_SAMPLE_TOKENS = 48


@dataclasses.dataclass
class Compilation:
    """One compile: what its stages share.

    Attributes:
        checkpoint: the model.
        scheme: its formats, with the overrides of the policy.
        recipe: what was asked for.
        calibration: which text, where something is flattened.
        high: the high-impact channels.
        work: where everything is kept until it is published.
        progress: is told how far the run is.
        drifts: how far each pass moved the logits.
        loud: the sites with the largest activations.
        fallback: why nothing was flattened after all, and what was measured of it.
    """

    checkpoint: Checkpoint
    scheme: Scheme
    recipe: Recipe
    calibration: CalibrationSettings
    high: HighChannels
    work: WorkFolder
    progress: StageClock
    drifts: tuple[PassDrift, ...] = ()
    loud: tuple[LoudSite, ...] = ()
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
        self._stage("portable model", bundle, lambda: save_model(model, bundle, self._steps("portable model")), {})
        for target in set(TARGETS).difference(targets):
            # A run before may have lowered to it, until its target was corrected.
            shutil.rmtree(engine_folder(bundle, target), ignore_errors=True)
        for target in targets:
            self._stage(
                f"lower to {target}",
                engine_folder(bundle, target),
                partial(self._lower, target),
                self.recipe.engine_settings(target),
            )
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
        folder = engine_folder(bundle, target)
        # With other settings of engines there may be other files.
        shutil.rmtree(folder, ignore_errors=True)
        lower(target, bundle / MODEL_FILE, folder, self.recipe, longest, self.progress)

    def _stage(self, name: str, folder: Path, make: Callable[[], object], settings: Mapping[str, Any]) -> None:
        """Make the files in `folder`, unless a run before finished that with equal `settings` of the stage alone."""
        if self.work.finished(name, settings):
            self.progress.say(f"{name}: kept from the run before")
            return
        self.work.begin(name)
        self._timed(name, make)
        self.work.finish(name, settings, folder)

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
        paths = {
            name: str(Path(path).resolve())
            for name, path in given.items()
            # Text is read from files; a folder with the name of a data set, or `self`, is another matter.
            if path and (Path(path).is_file() if name == "dataset" else Path(path).exists())
            if (name, path) != ("dataset", SELF)
        }
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
