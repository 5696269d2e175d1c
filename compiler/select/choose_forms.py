"""Choose the form of the transform at every site, by the policy that was asked for."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.errors import SelectionError
from planish.compiler.learn.gradient.search import Searched
from planish.compiler.learn.transforms.candidates import Form
from planish.compiler.progress import Progress
from planish.compiler.select.budget import Candidate, choose
from planish.compiler.select.forms import MEASURED_FORMS, SITE_GROUPS, form_of, forms_of_groups
from planish.compiler.select.kurtosis import Group, KurtosisRule, read_kurtosis, select_by_kurtosis
from planish.compiler.select.measure_forms import FormErrors, measure_forms
from planish.compiler.select.overrides import SiteOverride, resolve_overrides
from planish.compiler.select.policy import DEFAULT_BUDGET, SelectionPolicy, linear_flops
from planish.compiler.select.search_forms import search_forms
from planish.compiler.select.site_choice import read_choices
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Site

__all__ = ["ChosenForms", "choose_forms", "forms_by_kurtosis", "forms_of_plan", "forms_within_budget"]


@dataclasses.dataclass(frozen=True)
class ChosenForms:
    """The forms of one block.

    Attributes:
        forms: by site.
        evidence: by site, the numbers that the choice rests on.
    """

    forms: dict[Site, Form]
    evidence: dict[Site, dict[str, float]] = dataclasses.field(default_factory=dict)


def choose_forms(
    checkpoint: Checkpoint,
    scheme: Scheme,
    policy: SelectionPolicy,
    token_ids: npt.NDArray[np.int64],
    folder: Path,
    progress: Progress,
    seed: int = 0,
    device: torch.device | None = None,
) -> list[ChosenForms]:
    """Return the forms of every block.

    Args:
        checkpoint: the float model.
        scheme: what errors are measured under.
        policy: any but `none`.
        token_ids: calibration sequences, int64 [sequences, seq].
        folder: to keep measurements in, so that a killed run need not repeat them.
        progress: is told about long work.
        seed: of the search.
        device: what is measured is computed there; None is the CPU.

    Raises:
        CalibrationError: if what flows through the model is not finite, or there are too few sequences.
        PlanError: if the plan cannot be read or does not fit the model.
        SelectionError: if no choice fulfils the policy, or an override names nothing.
    """
    overrides = resolve_overrides(policy.overrides, checkpoint.config.num_hidden_layers)
    chosen = _by_policy(checkpoint, scheme, policy, token_ids, folder, progress, seed, device)
    if policy.plan is None:
        chosen = [dataclasses.replace(each, forms={**each.forms, **_useless(scheme)}) for each in chosen]
    return [_overridden(each, of_layer) for each, of_layer in zip(chosen, overrides, strict=True)]


def _useless(scheme: Scheme) -> dict[Site, Form]:
    """Return identities where nothing is rounded behind a map that runs online: at keys of a float cache."""
    return {} if scheme.quantizes_cache else {"key": "identity"}


def _overridden(chosen: ChosenForms, overrides: Mapping[Site, SiteOverride]) -> ChosenForms:
    forms = {site: form for site, each in overrides.items() if (form := each.form_at(site)) is not None}
    evidence: dict[Site, dict[str, float]] = {
        site: {**chosen.evidence.get(site, {}), "overridden by the recipe": 1.0} for site in forms
    }
    return ChosenForms({**chosen.forms, **forms}, {**chosen.evidence, **evidence})


def _by_policy(
    checkpoint: Checkpoint,
    scheme: Scheme,
    policy: SelectionPolicy,
    token_ids: npt.NDArray[np.int64],
    folder: Path,
    progress: Progress,
    seed: int,
    device: torch.device | None,
) -> list[ChosenForms]:
    layers = checkpoint.config.num_hidden_layers
    if policy.plan is not None:
        return forms_of_plan(policy.plan, checkpoint)
    if policy.kind is not None:
        forms = forms_of_groups({"attn": policy.kind, "ffn": policy.kind})
        if policy.smooth:
            forms["ffn_out"] = "smooth"
        return [ChosenForms(forms)] * layers
    if policy.rule is not None:
        statistics = read_kurtosis(checkpoint, policy.rule, lambda done, total: progress.step("kurtosis", done, total))
        return forms_by_kurtosis(statistics, policy.rule)
    if policy.name in ("measured", "auto"):
        errors = measure_forms(checkpoint, scheme, token_ids, folder, progress, device)
        budget = DEFAULT_BUDGET if policy.budget is None else policy.budget
        flops = round(budget * linear_flops(checkpoint.config))
        # What `fixed:affine` costs, the default may cost too: so the best choice is never worse than that one.
        return forms_within_budget(errors, max(flops, _affine_cost(errors, scheme)) if policy.name == "auto" else flops)
    if policy.name == "search":
        searched = search_forms(
            checkpoint,
            scheme,
            token_ids,
            folder,
            seed,
            lambda done, total: progress.step("search", done, total),
            device,
        )
        return [_of_search(each) for each in searched]
    raise SelectionError(f"The policy {policy} chooses no transforms.")


def forms_of_plan(path: Path, checkpoint: Checkpoint) -> list[ChosenForms]:
    """Return the forms that a plan.json names.

    Raises:
        PlanError: if it cannot be read, is of another model, or does not fit together.
    """
    chosen: list[dict[Site, Form]] = [{} for _ in range(checkpoint.config.num_hidden_layers)]
    for choice in read_choices(path, checkpoint.config, checkpoint.fingerprint()):
        chosen[choice.layer][choice.site] = choice.form
    return [ChosenForms(forms) for forms in chosen]


def forms_by_kurtosis(statistics: Mapping[Group, npt.ArrayLike], rule: KurtosisRule) -> list[ChosenForms]:
    """Return the forms of the kinds that `select_by_kurtosis` gives."""
    choices, chosen = select_by_kurtosis(statistics, rule), []
    for layer in range(len(choices) // len(SITE_GROUPS)):
        of_group = {choice.group: choice for choice in choices if choice.layer == layer}
        evidence: dict[Site, dict[str, float]] = {
            site: {"kurtosis": of_group[group].kurtosis, "z": of_group[group].z}
            for group, sites in SITE_GROUPS.items()
            for site in sites
        }
        chosen.append(
            ChosenForms(forms_of_groups({group: choice.kind for group, choice in of_group.items()}), evidence)
        )
    return chosen


def forms_within_budget(errors: Sequence[FormErrors], budget: int) -> list[ChosenForms]:
    """Return the forms of least error together whose FLOPs per token are within `budget`; see `choose`."""
    candidates = [
        [Candidate(of_layer.flops[site][form], of_layer.errors[site][form]) for form in MEASURED_FORMS[site]]
        for of_layer in errors
        for site in SITES
    ]
    picked = iter(choose(candidates, budget))
    return [
        ChosenForms(
            {site: MEASURED_FORMS[site][next(picked)] for site in SITES},
            {site: _evidence(of_layer.errors[site]) for site in SITES},
        )
        for of_layer in errors
    ]


def _affine_cost(errors: Sequence[FormErrors], scheme: Scheme) -> int:
    sites = [site for site in SITES if site not in _useless(scheme)]
    return sum(of_layer.flops[site][form_of(site, "affine")] for of_layer in errors for site in sites)


def _of_search(found: Searched) -> ChosenForms:
    fallback = {"fell back to a rotation": 1.0} if found.fallback else {}
    evidence = {
        site: {**found.evidence.get(group, {}), **fallback} for group, sites in SITE_GROUPS.items() for site in sites
    }
    return ChosenForms(forms_of_groups(found.kinds), evidence)


def _evidence(errors: Mapping[Form, float]) -> dict[str, float]:
    """Return the errors under their names; what has none, because its numbers diverged, is named as well."""
    return {
        **{f"error of {form}": error for form, error in errors.items() if math.isfinite(error)},
        **{f"diverged: {form}": 1.0 for form, error in errors.items() if not math.isfinite(error)},
    }
