"""What every site got and why, as plan.json has it under `transforms`, to be read, diffed and edited."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError, model_validator

from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.errors import PlanError
from planish.compiler.learn.transforms.candidates import Form, kind_of
from planish.compiler.select.forms import SITE_FORMS
from planish.compiler.select.policy import SelectionPolicy
from planish.passes.high_impact import CHANNEL_STEP
from planish.passes.transforms import SITES, Kind, Site

__all__ = ["HighChoice", "SiteChoice", "read_choices", "transforms_entry"]

#: The numbers of config.json that decide how many transforms there are and how wide they are.
_SHAPE = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_REMEDY = "Correct it, or leave the plan out to have it made again."


class HighChoice(BaseModel):
    """How many channels of a site are high-impact ones, the first of the order in plan.safetensors.

    Attributes:
        bits: of their weight codes.
        count: how many.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bits: Literal[3, 4, 8]
    count: Annotated[NonNegativeInt, Field(multiple_of=CHANNEL_STEP)]


class SiteChoice(BaseModel):
    """What one site got.

    Attributes:
        layer: index of the decoder block.
        site: which place in it.
        form: the form of the transform.
        kind: the kind that this form is of.
        cost_flops: what the transform costs online, FLOPs per token; what folds into weights costs nothing.
        error: what it was chosen by, relative error on held-out text; None where nothing was measured.
        evidence: further numbers that the choice rests on, such as kurtosis and z.
        high: its high-impact channels; None is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    layer: NonNegativeInt
    site: Site
    form: Form
    kind: Kind
    cost_flops: NonNegativeInt
    error: Annotated[FiniteFloat, Field(ge=0)] | None = None
    evidence: dict[str, FiniteFloat] = Field(default_factory=dict)
    high: HighChoice | None = None

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if self.form not in SITE_FORMS[self.site]:
            raise ValueError(f"{self.site} takes {', '.join(SITE_FORMS[self.site])}, and not {self.form}")
        if self.kind != kind_of(self.form):
            raise ValueError(f"the form {self.form} is of the kind {kind_of(self.form)}, not {self.kind}")
        return self


def transforms_entry(
    choices: Sequence[SiteChoice], policy: SelectionPolicy, config: LlamaConfig, fingerprint: str
) -> dict[str, Any]:
    """Return what plan.json holds under `transforms`.

    Args:
        choices: one per site of every layer, in any order.
        policy: what made them.
        config: of the model.
        fingerprint: of the checkpoint.

    Raises:
        PlanError: if a site is missing, named twice, or not of this model.
    """
    ordered = _complete("the plan", choices, config)
    return {
        "policy": str(policy),
        "model": _identity(config, fingerprint),
        "sites": [choice.model_dump(mode="json", exclude=_absent(choice)) for choice in ordered],
    }


def _absent(choice: SiteChoice) -> set[str]:
    return {"high"} if choice.high is None else set()


def read_choices(path: Path, config: LlamaConfig, fingerprint: str) -> tuple[SiteChoice, ...]:
    """Read the choices of a plan.json, layer after layer and in the order of `SITES`.

    Raises:
        PlanError: if the file cannot be read, was made for another model, or an entry is wrong; the message names the
            layer, the site and the field.
    """
    entry = _read(path)
    _check_identity(path, entry.get("model"), _identity(config, fingerprint))
    sites = entry.get("sites")
    if not isinstance(sites, list):
        raise PlanError(f"{path}: 'transforms' has no list 'sites'. {_REMEDY}")
    return _complete(str(path), [_choice(path, number, raw) for number, raw in enumerate(sites)], config)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"The plan {path} cannot be read as JSON ({error}). {_REMEDY}") from error
    entry = plan.get("transforms") if isinstance(plan, dict) else None
    if not isinstance(entry, dict):
        raise PlanError(f"{path} has no 'transforms': it is not a plan that chose any. Give another, or leave it out.")
    return entry


def _identity(config: LlamaConfig, fingerprint: str) -> dict[str, Any]:
    return {"fingerprint": fingerprint} | {name: getattr(config, name) for name in _SHAPE}


def _check_identity(path: Path, found: Any, expected: Mapping[str, Any]) -> None:
    if not isinstance(found, dict):
        raise PlanError(f"{path}: 'transforms' does not say in 'model' what it was made for. {_REMEDY}")
    # The shape first: it says more than that a hash differs.
    for name in (*_SHAPE, "fingerprint"):
        if found.get(name) != expected[name]:
            raise PlanError(
                f"{path} was made for another model: its {name} is {found.get(name)!r}, "
                f"and that of this one {expected[name]!r}. Leave the plan out to have one made for this model."
            )


def _choice(path: Path, number: int, raw: Any) -> SiteChoice:
    try:
        return SiteChoice.model_validate(raw)
    except ValidationError as error:
        place = f"entry {number} of 'sites'"
        if isinstance(raw, dict):
            place = f"layer {raw.get('layer', '?')}, site {raw.get('site', '?')}"
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise PlanError(f"{path}: {place}: {problems}. {_REMEDY}") from error


def _describe(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":
        return f"'form' and 'kind': {problem['ctx']['error']}"
    if problem["type"] == "missing":
        return f"'{field}' is missing"
    if problem["type"] == "extra_forbidden":
        return f"unknown field '{field}'; the fields are {', '.join(SiteChoice.model_fields)}"
    return f"'{field}' is {problem['input']!r}: {problem['msg']}" if field else str(problem["msg"])


def _complete(source: str, choices: Sequence[SiteChoice], config: LlamaConfig) -> tuple[SiteChoice, ...]:
    """Return the choices in order, after checking that every site of every layer is there once."""
    layers = config.num_hidden_layers
    places: dict[tuple[int, Site], SiteChoice] = {}
    for choice in choices:
        place = f"layer {choice.layer}, site {choice.site}"
        if choice.layer >= layers:
            raise PlanError(f"{source}: {place}: the model has only {layers} layers, from 0. {_REMEDY}")
        if places.setdefault((choice.layer, choice.site), choice) is not choice:
            raise PlanError(f"{source}: {place}: there are two entries for it. {_REMEDY}")
    expected: list[tuple[int, Site]] = [(layer, site) for layer in range(layers) for site in SITES]
    for layer, site in expected:
        if (layer, site) not in places:
            raise PlanError(f"{source}: layer {layer}, site {site}: there is no entry for it. {_REMEDY}")
    return tuple(places[place] for place in expected)
