"""Policies compared by planted errors: what each costs and regrets, and a verdict that says when the rule fails."""

import json
import math

import numpy as np
import pytest

from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.errors import SelectionError
from planish.compiler.learn.transforms.candidates import Form
from planish.compiler.select.choose_forms import ChosenForms
from planish.compiler.select.forms import MEASURED_FORMS, SITE_GROUPS, form_of, forms_of_groups
from planish.compiler.select.kurtosis import Group
from planish.compiler.select.measure_forms import FormErrors
from planish.compiler.select.study import SelectionStudy, study_selection
from planish.passes.transforms import SITES, Kind, Site

CONFIG = LlamaConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, head_dim=4
)
#: What an affine transform gains in each layer, and kurtoses in the same order.
GAINS = {"attn": [3.0, -1.0, 5.0, -2.0, 1.0], "ffn": [2.0, 4.0, -1.0, 1.0, -3.0]}
SAME_ORDER: dict[Group, list[float]] = {group: [10 + gain for gain in gains] for group, gains in GAINS.items()}


def planted(gains: dict[str, list[float]] = GAINS) -> list[FormErrors]:
    """Return errors whose groups gain as told, all at the first site; moments predict the gains."""
    found = []
    for layer in range(CONFIG.num_hidden_layers):
        errors: dict[Site, dict[Form, float]] = {site: dict.fromkeys(MEASURED_FORMS[site], 10.0) for site in SITES}
        flops: dict[Site, dict[Form, int]] = {site: dict.fromkeys(MEASURED_FORMS[site], 0) for site in SITES}
        rho: dict[Site, dict[Form, float]] = {site: dict.fromkeys(MEASURED_FORMS[site], 2.0) for site in ("ffn_in",)}
        rho["attn_in"] = dict.fromkeys(MEASURED_FORMS["attn_in"], 2.0)
        for group, sites in SITE_GROUPS.items():
            affine = form_of(sites[0], "affine")
            errors[sites[0]][affine] = 10 - gains[group][layer]
            flops[sites[0]][affine] = 64
            rho[sites[0]][affine] = 2 * math.exp(gains[group][layer])
        found.append(FormErrors(errors, flops, rho))
    return found


def by_policy(study: SelectionStudy) -> dict[str, float]:
    return {each.policy: each.regret for each in study.policies}


def test_errors_regrets_and_costs() -> None:
    study = study_selection(CONFIG, planted(), SAME_ORDER)
    rotation, affine, *_, measured = study.policies
    # 6 sites of 5 layers at 10 each; the better kind takes the gains that are above 0.
    gained = sum(max(gain, 0) for gains in GAINS.values() for gain in gains)
    assert (rotation.policy, rotation.error) == ("fixed:rotation", 300)
    assert (affine.policy, affine.error) == ("fixed:affine", 300 - sum(map(sum, GAINS.values())))
    assert rotation.regret == pytest.approx(gained / (300 - gained))
    assert rotation.cost == 0
    linears = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24) * 5
    assert affine.cost == pytest.approx(64 * 10 / linears)
    assert (measured.policy, measured.error) == ("measured:0.1", 300 - gained)
    assert measured.regret == pytest.approx(0)
    assert measured.kinds["ffn"][2] != "affine"


def test_kinds_by_layer() -> None:
    study = study_selection(CONFIG, planted(), SAME_ORDER)
    kinds = {each.policy: each.kinds for each in study.policies}
    assert kinds["fixed:affine"] == {"attn": ["affine"] * 5, "ffn": ["affine"] * 5}
    ranked: list[Kind] = ["affine", "rotation", "affine", "rotation", "affine"]
    assert kinds["kurtosis:topm=3,2"]["attn"] == ranked


def test_where_the_rule_holds_it_says_so() -> None:
    # High kurtosis where affine gains in attention, and where rotation gains in the FFN.
    opposite = {"attn": SAME_ORDER["attn"], "ffn": [10 - gain for gain in GAINS["ffn"]]}
    study = study_selection(CONFIG, planted(), opposite)
    assert study.groups["attn"].calibration.tau == pytest.approx(1)
    assert study.groups["ffn"].calibration.tau == pytest.approx(-1)
    assert all("has the right sign" in sentence for sentence in study.verdict)
    # Its best thresholds then choose as the oracle does, and so do its ranks.
    fitted = [regret for policy, regret in by_policy(study).items() if policy.startswith("kurtosis")][2:]
    assert fitted == [pytest.approx(0)] * 2


def test_where_the_rule_fails_it_says_so() -> None:
    study = study_selection(CONFIG, planted(), SAME_ORDER)
    attn, ffn = study.verdict
    assert "attn of heavy tails asks for affine transforms has the right sign" in attn
    assert "ffn of heavy tails asks for rotation transforms does not hold on this model" in ffn
    assert "+1.00" in ffn
    assert by_policy(study)["kurtosis:topm=3,2"] > 0


def test_chance_is_no_rule() -> None:
    # Nine of ten pairs of layers are in the order of the gains; of five layers that says little.
    order = {"attn": [4.0, 1.0, 5.0, 2.0, 3.0], "ffn": SAME_ORDER["ffn"]}
    attn, ffn = study_selection(CONFIG, planted(), order).verdict
    assert "finds no support on this model" in attn
    assert "+0.80 (p = 0.083)" in attn
    assert "does not hold" in ffn


def test_moments_predict_what_was_planted() -> None:
    study = study_selection(CONFIG, planted(), {group: [1.0] * 5 for group in ("attn", "ffn")})
    assert [group.rho_tau for group in study.groups.values()] == [pytest.approx(1)] * 2
    # Kurtosis that is the same everywhere orders nothing.
    assert all("cannot be tested" in sentence for sentence in study.verdict)
    content = json.loads(json.dumps(study.to_dict(), allow_nan=False))
    assert content["groups"]["attn"]["calibration"]["tau"] is None


def test_what_diverged_cannot_be_compared() -> None:
    errors = planted()
    errors[3].errors["ffn_out"][form_of("ffn_out", "affine")] = math.inf
    with pytest.raises(SelectionError, match="affine transforms of ffn in layer 3"):
        study_selection(CONFIG, errors, SAME_ORDER)


def test_random_errors_never_beat_the_oracle_by_kind() -> None:
    rng = np.random.default_rng(1)
    gains = {group: rng.normal(size=5).tolist() for group in ("attn", "ffn")}
    study = study_selection(CONFIG, planted(gains), {group: rng.normal(size=5) for group in ("attn", "ffn")})
    assert all(each.regret >= -1e-12 for each in study.policies)


def test_the_search_is_judged_like_the_others() -> None:
    errors = planted()
    chosen = [ChosenForms(forms_of_groups({"attn": "affine", "ffn": "rotation"}))] * len(errors)
    study = study_selection(CONFIG, errors, SAME_ORDER, chosen)
    found = study.policies[-1]
    assert found.policy == "search"
    assert found.kinds == {"attn": ["affine"] * 5, "ffn": ["rotation"] * 5}
    expected = sum(each.errors[site][form] for each in errors for site, form in chosen[0].forms.items())
    assert found.error == pytest.approx(expected)
    assert study.policies[:-1] == study_selection(CONFIG, errors, SAME_ORDER).policies
