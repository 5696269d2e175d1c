"""The policy `search`: what was found at each block becomes forms and evidence, and is found once."""

from pathlib import Path

import numpy as np
import pytest

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.learn.gradient import search as search_module
from planish.compiler.learn.gradient.search import Search, Searched
from planish.compiler.progress import Silent
from planish.compiler.select import search_forms as module
from planish.compiler.select.choose_forms import ChosenForms, choose_forms
from planish.compiler.select.forms import SITE_GROUPS, forms_of_groups
from planish.compiler.select.kurtosis import GROUPS
from planish.compiler.select.policy import SelectionPolicy
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES

IDS = np.random.default_rng(8).integers(3, 272, (8, 24))


def chosen(tiny: Path, folder: Path, seed: int = 0) -> list[ChosenForms]:
    policy = SelectionPolicy.parse("search")
    return choose_forms(open_checkpoint(tiny), Scheme.parse("w3a3k3v3"), policy, IDS, folder, Silent(), seed)


def test_searches_every_block(tiny: Path, tmp_path: Path) -> None:
    made = chosen(tiny, tmp_path)
    assert len(made) == 2
    # Losses of a search that is shown what flows through the model; of one that is not they are beyond 1.
    losses = [each.evidence["attn_in"][f"loss of {kind}"] for each in made for kind in ("rotation", "affine")]
    assert min(losses) > 0
    assert max(losses) < 0.5
    for each in made:
        kinds = {}
        for group, sites in SITE_GROUPS.items():
            evidence = each.evidence[sites[0]]
            assert all(each.evidence[site] == evidence for site in sites)
            kinds[group] = max(("rotation", "affine"), key=lambda kind, e=evidence: e[f"pi of {kind}"])
            assert evidence["pi of rotation"] + evidence["pi of affine"] == pytest.approx(1, abs=1e-5)
        assert each.forms == forms_of_groups(kinds)


def test_goes_on_where_it_broke_off(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, search_block = [], module.search_block

    def searched(*args: object) -> Searched:
        settings = args[-1]
        assert isinstance(settings, Search)
        seeds.append(settings.seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return search_block(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "search_block", searched)
    with pytest.raises(KeyboardInterrupt):
        chosen(tiny, tmp_path, seed=5)
    made = chosen(tiny, tmp_path, seed=5)
    assert seeds == [5, 5, 5]  # the first block once
    assert len(made) == 2


def test_where_learning_broke_off_the_plan_says_so(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module.Descent, "step", lambda *_: False)
    for each in chosen(tiny, tmp_path):
        assert each.forms == forms_of_groups(dict.fromkeys(GROUPS, "rotation"))
        assert each.evidence == {site: {"fell back to a rotation": 1.0} for site in SITES}
