"""recipe.yaml: everything that decides what a compile makes, so that it can be repeated."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from planish.compiler.backends.tensorrt.plugin_choice import PluginChoice
from planish.compiler.calibrate.settings import SELF, CalibrationSettings
from planish.compiler.checkpoint.files import write_text
from planish.compiler.errors import CalibrationError, RecipeError, SelectionError
from planish.compiler.learn.device import device_kind
from planish.compiler.learn.rounding.segments import Rounding
from planish.compiler.pipeline.recipe_file import RecipeFile
from planish.compiler.select.high_channels import HighPolicy
from planish.compiler.select.overrides import SiteOverride
from planish.compiler.select.policy import SelectionPolicy
from planish.compiler.select.sensitivity import Score
from planish.passes.scheme import LinearFormat, Scheme

__all__ = ["OF_ENGINES", "OF_TARGET", "TARGETS", "Recipe", "Target"]

Target = Literal["ort", "rtx", "tensorrt"]
TARGETS: tuple[Target, ...] = ("ort", "rtx", "tensorrt")
#: Tokens in a calibration sequence, where the model was made for as many.
_SEQLEN = 512
#: Budget up to which high-impact channels of 2-bit weights have 3 bits.
_FEW_BITS = 2.5
#: Settings that nothing but building engines depends on.
OF_ENGINES = {"max_batch_size", "max_input_len", "sms", "plugins", "tensorrt_version"}
#: Of these, what one target alone has.
OF_TARGET: dict[str, Target] = {"sms": "rtx", "plugins": "tensorrt", "tensorrt_version": "tensorrt"}


class Recipe(BaseModel):
    """The settings of one compile."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str
    """A checkpoint folder, a GGUF file, a Hub id, or smollm2."""
    scheme: str
    """Bits per tensor role, such as w4a4k4v4."""
    lm_head: str | None = None
    """Format of the output projection, such as w8a8; None is the default of `Scheme.parse`."""
    select: str = "auto"
    """The policy that picks a transform per site, see `SelectionPolicy.parse`; `none` rounds to nearest without
    any, `auto` is `none` for float linears, and for others `measured` within a tenth of their FLOPs, or what
    `fixed:affine` costs if that is more.
    """
    plan: str | None = None
    """A plan.json whose transforms are made instead of choosing any; for the same model."""
    high_impact: str | None = None
    """A folder with a plan.safetensors, such as a bundle, whose high-impact channels keep more bits; None takes
    those of the plan, if that has any.
    """
    overrides: dict[str, SiteOverride] = Field(default_factory=dict)
    r"""Regular expression -> what the sites or linears whose whole names it matches get instead of what the policy
    and the scheme say, such as `model.layers.(0|1)\..*: {kind: rotation, bits: 4}`.
    """
    avg_bits: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Stored bits per weight of the decoder blocks' linears, scales and orders of channels counted, that
    high-impact channels may use up; None chooses none.
    """
    hic_policy: Literal["solved", "fixed"] | None = None
    """`solved`, numbers of high-impact channels of least loss together, or `fixed`, the same share at all sites;
    None is `solved`.
    """
    hic_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the channels of every site that are high-impact ones, instead of a budget."""
    hic_bits: Literal[3, 4, 8] | None = None
    """Of the weights of high-impact channels; None is 4, or 8 where the scheme has 4, or 3 where a scheme of 2 that
    leaves activations in floating point has a budget of at most 2.5.
    """
    hic_candidates: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)] | None = None
    """Shares that `solved` tries; None is some around what the budget allows."""
    hic_score: Score = "damage"
    """What ranks channels: `damage`, `moment`, or `fisher`, the score of arXiv 2511.17801; see `Score`."""
    hic_weighting: bool = True
    """Whether a block's loss counts by how much the model's loss depends on its output."""
    round: Rounding = "gptq"
    """How weights are rounded: `gptq`, `adaround` (of high-impact channels, with learned clips of the others), or
    `nearest`.
    """
    residual_rotation: bool = False
    """Rotate the residual stream, folded into the weights at no cost at run time, before transforms are chosen and
    fitted.
    """
    dataset: str = SELF
    """Calibration text, as the three settings below; see `CalibrationSettings`."""
    nsamples: int = 16
    """Calibration sequences."""
    seqlen: int | None = None
    """Tokens in each; None is 512, or what the model was made for where that is less."""
    seed: int = 0
    """Of all random choices."""
    refine: NonNegativeInt = 0
    """Epochs for which the transforms of each block are learned by gradient descent, from their closed forms."""
    polish: NonNegativeInt | None = None
    """Epochs for which norms, scales and clips of the whole model are learned last, see `polish`; None is 4 where
    the model is small enough.
    """
    device: str = "cpu"
    """What learns and calibrates: `cpu`, `cuda`, or `cuda:N`."""
    verify_passes: bool = True
    """Run the float graph after every pass that flattens, and stop where the logits move."""
    targets: Annotated[
        tuple[Target, ...], Field(min_length=1), AfterValidator(lambda each: tuple(dict.fromkeys(each)))
    ] = ("ort",)
    """What to lower to; `ort` is integer products in ONNX Runtime, `rtx` and `tensorrt` are engines."""
    num_layers: PositiveInt | None = None
    """Keep only this many of the first decoder blocks; None keeps all."""
    max_context: PositiveInt | None = None
    """Tokens of prompt and answer together; None is what the model was made for, and for engines, whose cache has
    a fixed size, 2048 at most.
    """
    max_batch_size: PositiveInt | None = None
    """Sequences that an engine takes at once; None is the default of `build_engines`."""
    max_input_len: PositiveInt | None = None
    """Prompt tokens that an engine takes at once; None is the default of `build_engines`."""
    sms: tuple[PositiveInt, ...] | None = None
    """GPU generations to build engines for, such as 89; None is the default of `build_engines`."""
    plugins: PluginChoice = "auto"
    """Whether the target `tensorrt` has planish's plugins: `auto`, where $PLANISH_PLUGINS names a library; `none`, or
    `require`. Other targets take none.
    """
    tensorrt_version: Annotated[str, Field(pattern=r"^\d+\.\d+(\.\d+)*$")] | None = None
    """The TensorRT of another machine, such as 10.3, to lower the target `tensorrt` for: no engine is built, and
    TensorRT need not be installed. None builds an engine with the one that is.
    """

    @classmethod
    def read(cls, path: Path | None = None, **given: Any) -> "Recipe":
        """Read a recipe file; what is `given` and not None wins over it.

        Raises:
            RecipeError: if the file cannot be read, or a setting is unknown, missing or wrong; the message names it.
        """
        given = {name: value for name, value in given.items() if value is not None}
        file = None if path is None else RecipeFile(path)
        try:
            return cls(**({} if file is None else file.settings) | given)
        except ValidationError as error:
            # A list without a wrong entry counts as too short besides, which only its entry is to blame for.
            inner = {problem["loc"][:1] for problem in error.errors() if len(problem["loc"]) > 1}
            problems = [each for each in error.errors() if len(each["loc"]) > 1 or each["loc"] not in inner]
            raise RecipeError("; ".join(_describe(problem, file, given) for problem in problems)) from error

    def parsed_scheme(self) -> Scheme:
        """Return the scheme.

        Raises:
            SchemeError: if it cannot be read or built.
        """
        return Scheme.parse(self.scheme, self.lm_head)

    def parsed_policy(self) -> SelectionPolicy:
        """Return the selection policy; `auto` is `none` where linears stay in floating point.

        Raises:
            SelectionError: if it cannot be read, contradicts a plan, or needs low-bit linears and the
                scheme has none.
        """
        policy = SelectionPolicy.parse(self.select)
        if self.plan is not None:
            if policy.name != "auto":
                raise SelectionError(
                    f"The plan {self.plan} says which transform stands where, and so does the policy {policy}. "
                    "Leave out --plan or --select."
                )
            policy = SelectionPolicy("plan", plan=Path(self.plan))
        policy = dataclasses.replace(policy, overrides=self.overrides)
        if self.parsed_scheme().linear.is_float:
            if policy.name in ("auto", "none") and not (self.residual_rotation or self.overrides):
                return SelectionPolicy("none")
            raise SelectionError(
                f"The policy {policy} flattens what linears round, and {self.scheme} leaves linears in floating "
                "point. Leave out --select, --plan, --residual-rotation and overrides, or give the linears low bits."
            )
        if policy.name == "none" and any(each.kind or each.form for each in self.overrides.values()):
            raise SelectionError(
                "The recipe overrides transforms, and the policy none makes none. Leave out the overrides, or give "
                "--select fixed:rotation or another policy."
            )
        if policy.name == "none" and self.residual_rotation:
            raise SelectionError(
                "A rotation of the residual stream is what transforms stand on, and the policy none makes none. "
                "Leave out --residual-rotation, or give --select measured:0, which allows nothing that runs online."
            )
        return policy

    def parsed_high_policy(self) -> HighPolicy | None:
        """Return how high-impact channels are chosen; None is not at all.

        Raises:
            SelectionError: if settings contradict each other, or ask for channels where nothing is flattened.
        """
        if self.avg_bits is None and self.hic_ratio is None:
            others = self.hic_policy, self.hic_bits, self.hic_candidates, self.hic_score != "damage"
            if any(others) or not self.hic_weighting:
                raise SelectionError(
                    "High-impact channels need a number: give --avg-bits, or --hic-ratio, or leave out the other "
                    "settings of theirs."
                )
            return None
        if self.avg_bits is not None and self.hic_ratio is not None:
            raise SelectionError(
                "A budget of bits and a ratio both say how many channels are high. Leave out --avg-bits or --hic-ratio."
            )
        if self.hic_ratio is not None and self.hic_policy == "solved":
            raise SelectionError("A ratio leaves nothing to solve. Give --avg-bits instead, or leave out --hic-policy.")
        fixed = self.hic_ratio is not None or self.hic_policy == "fixed"
        if fixed and (self.hic_candidates or not self.hic_weighting):
            raise SelectionError(
                "Candidates and weights of blocks are what the policy solved goes by, and a share that is fixed tries "
                "nothing. Leave out --hic-candidates and --no-hic-weighting, or give --avg-bits alone."
            )
        if self.high_impact is not None:
            raise SelectionError(
                f"{self.high_impact} says which channels are high. Leave it out, or --avg-bits and --hic-ratio."
            )
        linear = self.parsed_scheme().linear
        if linear.is_float or self.parsed_policy().name == "none":
            raise SelectionError(
                "High-impact channels are chosen behind transforms, and nothing is flattened here. Give the linears "
                "low bits, and --select another policy, such as measured:0, which allows nothing that runs online."
            )
        if any(each.bits is not None or each.activation_bits is not None for each in self.overrides.values()):
            raise SelectionError(
                "The bits of some sites are given by overrides, and a budget or ratio decides about all of them. Leave "
                "out bits and activation_bits of the overrides, or --avg-bits and --hic-ratio."
            )
        return HighPolicy(
            bits=self.hic_bits or _high_bits(linear, self.avg_bits),
            average=self.avg_bits,
            share=self.hic_ratio,
            name="fixed" if self.hic_ratio is not None else self.hic_policy or "solved",
            candidates=self.hic_candidates,
            score=self.hic_score,
            weighted=self.hic_weighting,
        )

    @property
    def leaves_policy_open(self) -> bool:
        """Whether the compiler may choose how, and whether, to flatten."""
        return self.plan is None and SelectionPolicy.parse(self.select).name == "auto"

    def calibration(self, context: int | None = None) -> CalibrationSettings:
        """Return what to calibrate on, for a model made for `context` tokens; None where that is not known yet.

        Raises:
            CalibrationError: if there is no such text, or a number is out of range, or the sequences that were asked
                for are longer than the model's context.
        """
        seqlen = self.seqlen
        if seqlen is None:
            seqlen = min(_SEQLEN, context or _SEQLEN)
        elif context is not None and seqlen > context:
            raise CalibrationError(
                f"Calibration sequences of {seqlen} tokens are longer than the model's context of {context}. "
                f"Ask for {context} tokens or fewer (--seqlen)."
            )
        return CalibrationSettings(dataset=self.dataset, nsamples=self.nsamples, seqlen=seqlen, seed=self.seed)

    def decisive_settings(self) -> dict[str, Any]:
        """Return the settings, for JSON, that a run must share with another to go on with what that one left.

        Those that only lowering depends on are left out: `engine_settings` has them.

        Raises:
            DeviceError: if the device is not spelled right.
        """
        # Processors and GPUs round products each in their own way, and a model made half on either would be one that no
        # run makes by itself. So the kind of device counts; which GPU it is does not.
        settings = self.model_dump(mode="json", exclude={"targets", *OF_ENGINES})
        return {**settings, "device": device_kind(self.device)}

    def engine_settings(self, target: Target) -> dict[str, Any]:
        """Return the settings, for JSON, on which lowering to `target` depends and nothing else does."""
        if target == "ort":
            return {}
        others = {name for name, only in OF_TARGET.items() if only != target}
        return self.model_dump(mode="json", include=OF_ENGINES - others)

    def write(self, path: Path) -> None:
        """Write the recipe as YAML; settings that are not set are left out."""
        settings = self.model_dump(mode="json", exclude_none=True)
        write_text(path, yaml.safe_dump(settings, sort_keys=False, default_flow_style=False, allow_unicode=True))


def _high_bits(linear: LinearFormat, average: float | None) -> int:
    """Return the bits of high-impact channels beside a format.

    With a quarter of a bit to spend, more channels of 3 bits beat fewer of 4 in a 2-bit model (docs/high_impact.md).
    The kernels that multiply 2-bit codes of activations take high channels of 4 bits alone.
    """
    if linear.weight_bits >= 4:
        return 8
    few = average is not None and average <= _FEW_BITS
    return 3 if linear.weight_bits == 2 and linear.weight_only and few else 4


def _describe(problem: Any, file: RecipeFile | None, given: Mapping[str, Any]) -> str:
    """Put one problem that pydantic found into a sentence that names the setting, and its line in the file."""
    loc = problem["loc"]
    key, where = ".".join(str(part) for part in loc), ""
    if file is not None and loc and loc[0] not in given:
        where = f"{file.place(loc)}: "
    if problem["type"] == "extra_forbidden":
        fields = Recipe.model_fields if len(loc) == 1 else SiteOverride.model_fields
        return f"{where}unknown setting '{key}'; the settings are {', '.join(fields)}"
    if problem["type"] == "missing":
        return f"{where}'{key}' is missing; every compile needs a model and a scheme"
    return f"{where}'{key}' is {problem['input']!r}: {_words(problem)}"


def _words(problem: Any) -> str:
    # What YAML calls a list is a tuple in a recipe, which does not change.
    return str(problem["msg"]).removeprefix("Value error, ").replace("a valid tuple", "a list, such as [ort]")
