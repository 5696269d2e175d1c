"""Compare the selection policies on one model by errors that were measured, and hold the kurtosis rule against them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.errors import SelectionError
from planish.compiler.json_numbers import finite
from planish.compiler.learn.transforms.candidates import kind_of
from planish.compiler.select.choose_forms import ChosenForms, forms_by_kurtosis, forms_within_budget
from planish.compiler.select.forms import SITE_GROUPS, form_of, forms_of_groups
from planish.compiler.select.kurtosis import GROUPS, KINDS, Group, KurtosisRule, robust_z
from planish.compiler.select.measure_forms import FormErrors
from planish.compiler.select.policy import DEFAULT_BUDGET, SelectionPolicy, linear_flops
from planish.compiler.select.thresholds import Calibration, calibrate_threshold, kendall_tau
from planish.passes.transforms import Kind

__all__ = ["GroupStudy", "PolicyStudy", "SelectionStudy", "study_selection"]

Values = npt.NDArray[np.float64]

_KINDS: tuple[Kind, ...] = ("rotation", "affine")
#: Above this p-value an order is taken for chance.
_CHANCE = 0.05


@dataclasses.dataclass(frozen=True)
class PolicyStudy:
    """What one policy chooses, and what that costs. Errors are sums over layers and sites.

    Attributes:
        policy: as `--select` spells it.
        kinds: by group, the kind in each layer; a group whose sites are of several kinds is `mixed`.
        error: on held-out text.
        regret: how much worse that is than the better kind in every layer and group, relative; a policy that chooses
            site by site, and among more forms, may be better, which is below 0.
        cost: FLOPs per token of the online transforms, as a share of those of the linears.
    """

    policy: str
    kinds: dict[Group, list[str]]
    error: float
    regret: float
    cost: float


@dataclasses.dataclass(frozen=True)
class GroupStudy:
    """What tells in a group of linears where affine transforms gain over rotations.

    Attributes:
        kurtosis: excess kurtosis by layer.
        gain: what an affine transform gains over a rotation by layer, rotation error less affine error.
        calibration: of the kurtosis rule: the best threshold for z-scores, Kendall's tau and whether its sign is the
            one that the rule assumes.
        rho_tau: Kendall's tau between the gain and what second moments predict, the logarithm of rho; NaN where either
            is constant.
    """

    kurtosis: list[float]
    gain: list[float]
    calibration: Calibration
    rho_tau: float


@dataclasses.dataclass(frozen=True)
class SelectionStudy:
    """What `study_selection` found.

    Attributes:
        policies: one for each policy.
        groups: by group.
        verdict: whether the rule that attention of heavy tails asks for affine maps and an FFN of heavy tails for
            rotations holds on this model, a sentence for each group.
    """

    policies: list[PolicyStudy]
    groups: dict[Group, GroupStudy]
    verdict: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary for JSON; what is not a number is None."""
        content: dict[str, Any] = finite(dataclasses.asdict(self))
        return content


def study_selection(
    config: LlamaConfig,
    errors: Sequence[FormErrors],
    kurtosis: Mapping[Group, npt.ArrayLike],
    searched: Sequence[ChosenForms] | None = None,
) -> SelectionStudy:
    """Compare fixed, kurtosis and measured policies, and the search where it was run.

    Args:
        config: of the model.
        errors: of every form at every site, by layer; see `measure_forms`.
        kurtosis: of both groups by layer; see `read_kurtosis`.
        searched: what the policy `search` chose, by layer.

    Raises:
        SelectionError: if a rotation or an affine form of some site has no finite error.
    """
    by_kind = {kind: _group_errors(errors, kind) for kind in _KINDS}
    groups = {group: _group(group, errors, kurtosis[group], by_kind) for group in GROUPS}
    best = sum(group.calibration.oracle for group in groups.values())
    flops = linear_flops(config)

    def study(policy: SelectionPolicy, chosen: Sequence[ChosenForms]) -> PolicyStudy:
        pairs = list(zip(errors, chosen, strict=True))
        error = sum(found.errors[site][form] for found, each in pairs for site, form in each.forms.items())
        cost = sum(found.flops[site][form] for found, each in pairs for site, form in each.forms.items())
        kinds = {group: [_kind_of_group(each, group) for each in chosen] for group in GROUPS}
        return PolicyStudy(str(policy), kinds, error, (error - best) / best if best else 0.0, cost / flops)

    by_policy = {
        SelectionPolicy("fixed", kind=kind): [ChosenForms(forms_of_groups({"attn": kind, "ffn": kind}))] * len(errors)
        for kind in _KINDS
    }
    by_policy |= {SelectionPolicy("kurtosis", rule=rule): forms_by_kurtosis(kurtosis, rule) for rule in _rules(groups)}
    budget = round(DEFAULT_BUDGET * flops)
    by_policy[SelectionPolicy("measured", budget=DEFAULT_BUDGET)] = forms_within_budget(errors, budget)
    if searched is not None:
        by_policy[SelectionPolicy("search")] = list(searched)
    policies = [study(policy, chosen) for policy, chosen in by_policy.items()]
    return SelectionStudy(policies, groups, [_verdict(group, found) for group, found in groups.items()])


def _rules(groups: Mapping[Group, GroupStudy]) -> list[KurtosisRule]:
    """Return the rules compared: both readings of the paper, then the best that thresholds and ranks can do here."""
    fitted = {group: groups[group].calibration.threshold for group in GROUPS}
    gains = {group: np.array(groups[group].gain) for group in GROUPS}
    ranks = int((gains["attn"] > 0).sum()), int((gains["ffn"] <= 0).sum())
    return [
        KurtosisRule("z"),
        KurtosisRule("raw"),
        KurtosisRule("z", fitted["attn"], fitted["ffn"]),
        KurtosisRule("topm", *ranks),
    ]


def _group_errors(errors: Sequence[FormErrors], kind: Kind) -> dict[Group, Values]:
    """Return the error of each group by layer where all its sites have the form of a kind, [layers]."""
    found = {}
    for group, sites in SITE_GROUPS.items():
        found[group] = np.array([sum(each.errors[site][form_of(site, kind)] for site in sites) for each in errors])
        if not np.isfinite(found[group]).all():
            layer = int(np.flatnonzero(~np.isfinite(found[group]))[0])
            raise SelectionError(
                f"The {kind} transforms of {group} in layer {layer} give NaN or infinity, so nothing can be compared "
                "with them. Calibrate on other text, or leave the scheme more bits."
            )
    return found


def _group(
    group: Group, errors: Sequence[FormErrors], kurtosis: npt.ArrayLike, by_kind: Mapping[Kind, Mapping[Group, Values]]
) -> GroupStudy:
    affine, rotation = by_kind["affine"][group], by_kind["rotation"][group]
    predicted = [
        sum(
            math.log(each.rho[site][form_of(site, "affine")] / each.rho[site][form_of(site, "rotation")])
            for site in SITE_GROUPS[group]
            if each.rho.get(site)
        )
        for each in errors
    ]
    return GroupStudy(
        np.asarray(kurtosis, np.float64).tolist(),
        (rotation - affine).tolist(),
        calibrate_threshold(group, robust_z(kurtosis), affine, rotation),
        kendall_tau(predicted, rotation - affine)[0],
    )


def _kind_of_group(chosen: ChosenForms, group: Group) -> str:
    """Return the kind of a group's sites; attn_out does not count, where every kind mixes heads by a rotation."""
    kinds = {kind_of(chosen.forms[site]) for site in SITE_GROUPS[group] if site != "attn_out"}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def _verdict(group: Group, found: GroupStudy) -> str:
    high = KINDS[group][0]
    rule = f"The rule that {group} of heavy tails asks for {high} transforms"
    tau = found.calibration.tau
    if len(found.kurtosis) < 2:
        return f"{rule} cannot be tested: there is one layer."
    if math.isnan(tau):
        return f"{rule} cannot be tested: kurtosis, or what affine transforms gain, is the same in all layers."
    p_value = found.calibration.p_value
    agreement = f"Kendall's tau between kurtosis and the gain of affine transforms is {tau:+.2f} (p = {p_value:.2g})"
    if p_value > _CHANCE:
        return f"{rule} finds no support on this model: {agreement}, which chance gives as well."
    if found.calibration.agrees:
        return f"{rule} has the right sign on this model: {agreement}."
    return f"{rule} does not hold on this model: {agreement}, and the rule needs the opposite sign."
