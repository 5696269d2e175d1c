"""What a report says of high-impact channels is what the graph stores and what the choice was made by."""

import itertools
import json
from typing import Any

import pytest

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.inspection import inspect
from planish.compiler.report.high_channels import high_facts
from planish.compiler.report.write import render
from planish.compiler.select.pair_losses import PairLosses


def report_of(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle.path / "report" / "report.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def evidence(high_impact: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((high_impact.path / "plan.json").read_text(encoding="utf-8"))
    return dict(found["transforms"]["high_impact"])


def test_bits_are_those_that_are_stored(high_impact: Bundle, evidence: dict[str, Any]) -> None:
    found = report_of(high_impact)["high_impact"]
    assert (found["bits"], found["policy"]["average"]) == ([4], 3.2)
    assert [each["counts"] for each in found["layers"]] == evidence["counts"]
    stored = [each["stored_bits"] for each in found["layers"]]
    # All blocks have the same shape.
    assert sum(stored) / len(stored) == pytest.approx(inspect(high_impact).average_bits, rel=1e-12)
    for each in found["layers"]:
        assert each["low_bits"] + sum(each["added_bits"].values()) == pytest.approx(each["stored_bits"], rel=1e-12)
        for site, added in each["added_bits"].items():
            assert (added > 0) == (each["counts"][site] > 0)


def test_losses_are_those_that_were_minimised(high_impact: Bundle, evidence: dict[str, Any]) -> None:
    found = report_of(high_impact)["high_impact"]
    assert [each["weight"] for each in found["losses"]] == evidence["block_weights"]
    for row, of_layer, chosen in zip(found["losses"], evidence["losses"], evidence["counts"], strict=True):
        measured = PairLosses(**of_layer)
        for name, counts in (("none", dict.fromkeys(chosen, 0)), ("chosen", chosen)):
            places = {site: measured.counts[site].index(count) for site, count in counts.items()}
            error = sum(measured.alone[site][place] for site, place in places.items())
            for first, second in itertools.combinations(places, 2):
                error += measured.interaction(first, second)[places[first], places[second]]
            assert row[name] == pytest.approx(error, rel=1e-9)


def test_the_page_has_every_number(high_impact: Bundle) -> None:
    facts = report_of(high_impact)
    page = render(facts)
    assert "within 3.2 stored bits per weight" in page
    for each in facts["high_impact"]["layers"]:
        assert f'<td class="n">{each["stored_bits"]:.4g}' in page
    for each in facts["high_impact"]["losses"]:
        for error in itertools.chain([each["none"], each["chosen"]], *each["alone"].values()):
            assert f'<td class="n">{error:.4g}' in page


def test_channels_that_were_given_have_no_losses(high_impact: Bundle) -> None:
    facts = report_of(high_impact)
    plan = json.loads((high_impact.path / "plan.json").read_text(encoding="utf-8"))
    stored = {(each["layer"], site): 8 * 10**6 for each in facts["high_impact"]["layers"] for site in each["counts"]}
    given = high_facts(plan["linears"], stored, None)
    assert given is not None
    assert (given["policy"], given["losses"]) == (None, [])
    page = render({**facts, "high_impact": given})
    assert "They were given" in page
    assert "high-alone" not in page


def test_most_bundles_have_none(flattened: Bundle, bundle: Bundle) -> None:
    assert report_of(flattened)["high_impact"] is None
    assert report_of(bundle)["high_impact"] is None
