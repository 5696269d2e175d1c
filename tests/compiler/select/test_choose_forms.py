"""From policies to forms: each follows its rule, and what has diverged is named and never chosen."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.errors import PlanError, SelectionError
from planish.compiler.learn.transforms.candidates import Form, kind_of
from planish.compiler.progress import Silent
from planish.compiler.select import choose_forms as module
from planish.compiler.select.choose_forms import choose_forms, forms_within_budget
from planish.compiler.select.forms import MEASURED_FORMS, SITE_GROUPS
from planish.compiler.select.kurtosis import KurtosisRule
from planish.compiler.select.measure_forms import FormErrors
from planish.compiler.select.policy import SelectionPolicy, linear_flops
from planish.compiler.select.site_choice import SiteChoice, transforms_entry
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Site

IDS = np.zeros((4, 16), np.int64)


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


def chosen(checkpoint: Checkpoint, policy: SelectionPolicy, folder: Path) -> list[dict[Site, Form]]:
    made = choose_forms(checkpoint, Scheme.parse("w4a4k4v4"), policy, IDS, folder, Silent())
    return [each.forms for each in made]


def some_errors(layers: int = 2) -> list[FormErrors]:
    """Return errors in which the dearest form is the best, by a different amount at every site."""
    rng, found = np.random.default_rng(0), []
    for _ in range(layers):
        errors: dict[Site, dict[Form, float]] = {}
        flops: dict[Site, dict[Form, int]] = {}
        for site in SITES:
            forms = MEASURED_FORMS[site]
            errors[site] = dict(zip(forms, sorted(rng.random(len(forms)).tolist(), reverse=True), strict=True))
            flops[site] = {form: 100 * number for number, form in enumerate(forms)}
        found.append(FormErrors(errors, flops, {}))
    return found


def test_fixed_is_the_same_everywhere(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rotations = chosen(checkpoint, SelectionPolicy.parse("fixed:rotation"), tmp_path)
    assert rotations == [dict.fromkeys(SITES, "rotation")] * 2
    affine = chosen(checkpoint, SelectionPolicy.parse("fixed:affine"), tmp_path)
    # Mixing heads is a rotation in both: the affine part of that site is the value map.
    assert {site: kind_of(form) for site, form in affine[0].items()} == {
        **dict.fromkeys(SITES, "affine"),
        "attn_out": "rotation",
    }


@pytest.mark.parametrize("policy", ["fixed:affine", "fixed:rotation", "kurtosis"])
def test_keys_of_a_float_cache_have_no_map(policy: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """It would run online in front of nothing that is rounded; the value map folds, and helps what is behind it."""
    made = choose_forms(checkpoint, Scheme.parse("w4a4"), SelectionPolicy.parse(policy), IDS, tmp_path, Silent())
    assert all(each.forms["key"] == "identity" for each in made)
    assert all(each.forms["value"] != "identity" for each in made)


def test_kurtosis_decides_groups(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_kurtosis", lambda *_: {"attn": [5.0, 1.0], "ffn": [5.0, 1.0]})
    policy = SelectionPolicy("kurtosis", rule=KurtosisRule("raw", 2.0, 0.2))
    made = choose_forms(checkpoint, Scheme.parse("w4a4"), policy, IDS, tmp_path, Silent())
    kinds = [{group: kind_of(each.forms[sites[0]]) for group, sites in SITE_GROUPS.items()} for each in made]
    assert kinds == [{"attn": "affine", "ffn": "rotation"}, {"attn": "rotation", "ffn": "rotation"}]
    assert made[0].evidence["ffn_out"] == {"kurtosis": 5.0, "z": pytest.approx(0.6745, abs=1e-3)}


def test_all_the_budget_buys_is_the_best_form_of_every_site() -> None:
    errors = some_errors()
    best = [each.forms for each in forms_within_budget(errors, 10**9)]
    assert best == [{site: min(e.errors[site], key=e.errors[site].__getitem__) for site in SITES} for e in errors]
    none = [each.forms for each in forms_within_budget(errors, 0)]
    assert none == [dict.fromkeys(SITES, "identity")] * 2
    some = forms_within_budget(errors, 700)
    assert 0 < sum(e.flops[s][c.forms[s]] for e, c in zip(errors, some, strict=True) for s in SITES) <= 700


def test_what_diverged_is_named_and_not_chosen() -> None:
    errors = some_errors()
    errors[0].errors["ffn_in"]["dense"] = math.inf
    errors[1].errors["key"] |= {"dense": math.nan, "rotation": math.inf}
    first, second = forms_within_budget(errors, 10**9)
    assert first.forms["ffn_in"] == "blocks128"
    assert second.forms["key"] == "identity"
    assert first.evidence["ffn_in"]["diverged: dense"] == 1
    assert "error of dense" not in first.evidence["ffn_in"]
    assert all(math.isfinite(n) for each in (first, second) for e in each.evidence.values() for n in e.values())
    # plan.json takes the evidence as it is.
    SiteChoice(layer=0, site="ffn_in", form="blocks128", kind="affine", cost_flops=0, evidence=first.evidence["ffn_in"])
    errors[0].errors["attn_in"] = dict.fromkeys(MEASURED_FORMS["attn_in"], math.inf)
    with pytest.raises(SelectionError, match="none has a finite error"):
        forms_within_budget(errors, 10**9)


def test_measured_has_a_budget_of_the_linears_flops(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = some_errors()
    monkeypatch.setattr(module, "measure_forms", lambda *_: errors)
    share = 700 / linear_flops(checkpoint.config)
    found = chosen(checkpoint, SelectionPolicy("measured", budget=share), tmp_path)
    assert found == [each.forms for each in forms_within_budget(errors, 700)]


def test_a_plan_is_followed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    forms: list[dict[Site, Form]] = [dict.fromkeys(SITES, "identity"), dict.fromkeys(SITES, "rotation")]
    forms[0]["ffn_out"] = "blocks32"
    choices = [
        SiteChoice(layer=layer, site=site, form=form, kind=kind_of(form), cost_flops=0)
        for layer, of_layer in enumerate(forms)
        for site, form in of_layer.items()
    ]
    policy = SelectionPolicy.parse("kurtosis")
    entry = transforms_entry(choices, policy, checkpoint.config, checkpoint.fingerprint())
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"transforms": entry}))
    assert chosen(checkpoint, SelectionPolicy("plan", plan=path), tmp_path) == forms
    path.write_text(json.dumps({"transforms": {**entry, "model": {**entry["model"], "fingerprint": "another"}}}))
    with pytest.raises(PlanError, match="made for another model: its fingerprint"):
        chosen(checkpoint, SelectionPolicy("plan", plan=path), tmp_path)


def test_forms_that_a_site_does_not_take() -> None:
    choice = SiteChoice(layer=0, site="attn_out", form="rotation", kind="rotation", cost_flops=0)
    with pytest.raises(ValueError, match="attn_out takes identity, rotation, hadamard, and not dense"):
        SiteChoice(**{**choice.model_dump(), "form": "dense", "kind": "affine"})


def test_the_default_is_never_worse_than_a_fixed_kind(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the errors that were measured, even where the usual budget would not buy the fixed kind."""
    errors = some_errors()
    monkeypatch.setattr(module, "measure_forms", lambda *_: errors)
    monkeypatch.setattr(module, "DEFAULT_BUDGET", 0.0)

    def lost(forms: list[dict[Site, Form]]) -> float:
        return sum(each.errors[site][made[site]] for each, made in zip(errors, forms, strict=True) for site in SITES)

    auto = chosen(checkpoint, SelectionPolicy.parse("auto"), tmp_path)
    for kind in ("affine", "rotation"):
        assert lost(auto) <= lost(chosen(checkpoint, SelectionPolicy.parse(f"fixed:{kind}"), tmp_path))
    assert lost(chosen(checkpoint, SelectionPolicy.parse("measured:0"), tmp_path)) > lost(auto)
