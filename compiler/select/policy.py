"""The selection policy: how the transform of every site is picked, spelled `kurtosis:raw` or `measured:0.1`."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.checkpoint.tensors import expected_tensors
from planish.compiler.errors import SelectionError
from planish.compiler.select.kurtosis import Aggregate, KurtosisRule, Mode
from planish.compiler.select.overrides import SiteOverride
from planish.passes.transforms import Kind

__all__ = ["DEFAULT_BUDGET", "PolicyName", "SelectionPolicy", "linear_flops"]

PolicyName = Literal["none", "fixed", "kurtosis", "search", "measured", "plan", "auto"]

#: The budget of `measured`, as a share of the FLOPs of the model's linears.
DEFAULT_BUDGET = 0.1

_SPELLINGS = (
    "none, fixed:rotation[:smooth], fixed:affine, kurtosis[:z|:raw|:topm=ATTN,FFN][:mean|:max|:concat][:o], "
    "search, measured[:BUDGET], auto"
)
_FIXED: tuple[Kind, ...] = ("rotation", "affine")
_SMOOTH = "smooth"
#: Option of `kurtosis` that counts o_proj in.
_OUTPUT = "o"


@dataclasses.dataclass(frozen=True)
class SelectionPolicy:
    """A policy and its options.

    Attributes:
        name: `none` leaves every site as it is; `fixed` takes one kind everywhere; `kurtosis` follows the weights;
            `search` learns both kinds at once; `measured` takes the least error that was measured within a budget;
            `plan` takes the forms that a plan.json names, which no spelling gives; `auto` leaves it to the compiler.
        kind: of `fixed`, else None.
        smooth: of `fixed:rotation`: the channel scale at ffn_out is the one that `smooth_rotation` chooses.
        rule: of `kurtosis`, else None.
        budget: of `measured`, else None: what the online transforms may cost, as a share of `linear_flops`.
        plan: of `plan`, else None: the plan.json.
        overrides: by regular expression, what the sites it names get instead; see `resolve_overrides`.
    """

    name: PolicyName
    kind: Kind | None = None
    smooth: bool = False
    rule: KurtosisRule | None = None
    budget: float | None = None
    plan: Path | None = None
    overrides: Mapping[str, SiteOverride] = dataclasses.field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, text: str) -> "SelectionPolicy":
        """Return the policy that `text` spells: its name, and options behind colons.

        `kurtosis:z=2.5,0.3` and `kurtosis:raw=3,0.5` give the thresholds of attention and FFN, `kurtosis:topm=10,12`
        how many attention groups are affine and how many FFN groups are rotated; `max` and `concat` say how the
        linears of a group are joined, and `o` counts o_proj in. `measured:0.1` may add a tenth of the FLOPs.

        Raises:
            SelectionError: if the name or an option is unknown or out of range; the message lists what there is.

        Example:
            >>> str(SelectionPolicy.parse("measured"))
            'measured:0.1'
        """
        name, *options = text.strip().lower().split(":")
        if name not in _PARSERS:
            raise _refusal(text, f"'{name}' is not a selection policy")
        return _PARSERS[name](text, options)

    def __str__(self) -> str:
        options: list[str] = []
        if self.kind is not None:
            options = [self.kind, _SMOOTH] if self.smooth else [self.kind]
        elif self.budget is not None:
            options = [f"{self.budget:g}"]
        elif self.plan is not None:
            options = [self.plan.name]
        elif self.rule is not None:
            options = [f"{self.rule.mode}={self.rule.attn:g},{self.rule.ffn:g}"]
            options += [self.rule.aggregate] if self.rule.aggregate != KurtosisRule.aggregate else []
            options += [_OUTPUT] if self.rule.with_output else []
        return ":".join([self.name, *options])


def linear_flops(config: LlamaConfig) -> int:
    """Return the FLOPs per token of all linears of the decoder blocks; a multiplication and an addition are two.

    lm_head does not count: it is computed for few of the tokens.
    """
    weights = (shape for name, shape in expected_tensors(config).items() if name.endswith("_proj.weight"))
    return sum(2 * rows * columns for rows, columns in weights)


def _refusal(text: str, problem: str) -> SelectionError:
    where = "" if f"'{text}'" in problem else f" (in '{text}')"
    return SelectionError(f"{problem}{where}. Give one of: {_SPELLINGS}.")


def _plain(name: PolicyName) -> Callable[[str, list[str]], SelectionPolicy]:
    def parse(text: str, options: list[str]) -> SelectionPolicy:
        if options:
            raise _refusal(text, f"the policy {name} has no option '{options[0]}'")
        return SelectionPolicy(name)

    return parse


def _fixed(text: str, options: list[str]) -> SelectionPolicy:
    if options == ["rotation", _SMOOTH]:
        return SelectionPolicy("fixed", kind="rotation", smooth=True)
    for kind in _FIXED:
        if options == [kind]:
            return SelectionPolicy("fixed", kind=kind)
    raise _refusal(text, "the policy fixed needs one kind, rotation or affine")


def _measured(text: str, options: list[str]) -> SelectionPolicy:
    if len(options) > 1:
        raise _refusal(text, f"the policy measured has no option '{options[1]}'")
    budget = _number(text, options[0]) if options else DEFAULT_BUDGET
    if budget < 0:
        raise _refusal(text, f"a budget of {budget:g} is less than nothing")
    return SelectionPolicy("measured", budget=budget)


def _kurtosis(text: str, options: list[str]) -> SelectionPolicy:
    settings: dict[str, Any] = {}
    for option in options:
        found = _kurtosis_option(text, option)
        if settings.keys() & found.keys():
            raise _refusal(text, f"'{option}' contradicts or repeats another option")
        settings |= found
    return SelectionPolicy("kurtosis", rule=KurtosisRule(**settings))


def _kurtosis_option(text: str, option: str) -> dict[str, Any]:
    """Return the fields of a `KurtosisRule` that an option sets."""
    mode, equals, numbers = option.partition("=")
    if option in get_args(Aggregate):
        return {"aggregate": option}
    if option == _OUTPUT:
        return {"with_output": True}
    if mode not in get_args(Mode):
        raise _refusal(text, f"the policy kurtosis has no option '{option}'")
    if mode == "topm" and not re.fullmatch(r"\d+,\d+", numbers):
        raise _refusal(text, f"'{option}' needs two counts of layers, such as topm=10,12")
    if not equals:
        return {"mode": mode}
    parts = numbers.split(",")
    if len(parts) != 2:
        raise _refusal(text, f"'{option}' needs two numbers, of attention and of the FFN")
    return {"mode": mode, "attn": _number(text, parts[0]), "ffn": _number(text, parts[1])}


def _number(text: str, spelled: str) -> float:
    try:
        number = float(spelled)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _refusal(text, f"'{spelled}' is not a number")
    return number


_PARSERS: dict[str, Callable[[str, list[str]], SelectionPolicy]] = {
    "none": _plain("none"),
    "fixed": _fixed,
    "kurtosis": _kurtosis,
    "search": _plain("search"),
    "measured": _measured,
    "auto": _plain("auto"),
}
