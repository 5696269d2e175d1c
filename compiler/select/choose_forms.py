"""Choose the form of the transform at every site, by the policy that was asked for."""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.learn.candidates import Form
from planish.compiler.progress import Progress
from planish.compiler.select.budget import Candidate, choose
from planish.compiler.select.forms import SITE_GROUPS, forms_of_groups
from planish.compiler.select.kurtosis import GROUPS, KurtosisRule, read_kurtosis, select_by_kurtosis
from planish.compiler.select.measure_forms import SITE_FORMS, FormErrors, measure_forms
from planish.compiler.select.policy import SelectionPolicy, linear_flops
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Site

__all__ = ["ChosenForms", "choose_forms"]


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
) -> list[ChosenForms]:
    """Return the forms of every block.

    Args:
        checkpoint: the float model.
        scheme: what errors are measured under.
        policy: any but `none`.
        token_ids: calibration sequences, int64 [sequences, seq].
        folder: to keep measurements in, so that a killed run need not repeat them.
        progress: is told about long work.
    """
    layers = checkpoint.config.num_hidden_layers
    if policy.name == "fixed":
        assert policy.kind is not None
        return [ChosenForms(forms_of_groups({"attn": policy.kind, "ffn": policy.kind}))] * layers
    if policy.name == "kurtosis":
        assert policy.rule is not None
        return _by_kurtosis(checkpoint, policy.rule, progress)
    assert policy.budget is not None
    errors = measure_forms(checkpoint, scheme, token_ids, folder, progress)
    return _within_budget(errors, round(policy.budget * linear_flops(checkpoint.config)))


def _by_kurtosis(checkpoint: Checkpoint, rule: KurtosisRule, progress: Progress) -> list[ChosenForms]:
    statistics = read_kurtosis(checkpoint, rule, lambda done, total: progress.step("kurtosis", done, total))
    choices = select_by_kurtosis(statistics, rule)
    chosen = []
    for layer in range(checkpoint.config.num_hidden_layers):
        of_layer = {choice.group: choice for choice in choices if choice.layer == layer}
        evidence = {
            site: {"kurtosis": of_layer[group].kurtosis, "z": of_layer[group].z}
            for group, sites in SITE_GROUPS.items()
            for site in sites
        }
        chosen.append(ChosenForms(forms_of_groups({g: of_layer[g].kind for g in GROUPS}), evidence))
    return chosen


def _within_budget(errors: list[FormErrors], budget: int) -> list[ChosenForms]:
    places = [(layer, site) for layer in range(len(errors)) for site in SITES]
    candidates = [
        [Candidate(errors[layer].flops[site][form], errors[layer].errors[site][form]) for form in SITE_FORMS[site]]
        for layer, site in places
    ]
    picked = iter(choose(candidates, budget))
    chosen = []
    for of_layer in errors:
        forms: dict[Site, Form] = {site: SITE_FORMS[site][next(picked)] for site in SITES}
        evidence = {
            site: {f"error of {form}": error for form, error in of_layer.errors[site].items()} for site in SITES
        }
        chosen.append(ChosenForms(forms, evidence))
    return chosen
