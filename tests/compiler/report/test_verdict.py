"""What a report says in words follows from what was verified and measured."""

from typing import Any

import pytest

from planish.compiler.report.notices import notices
from planish.compiler.report.verdict import judge

VERIFIED = {"tokens": 48, "logits_error": 6e-7, "roundings": 1000, "followed": 0, "unfollowed_error": 0.0}


def row(model: str, perplexity: float | None, divergence: float | None) -> dict[str, Any]:
    return {"model": model, "cross_entropy": None, "perplexity": perplexity, "divergence": divergence}


def facts(**given: Any) -> dict[str, Any]:
    """Facts of a compile of which nothing need be said."""
    site = {"layer": 0, "site": "attn_in", "diverged": [], "evidence": {"ridge": 1.0}}
    return {
        "verification": VERIFIED,
        "held_out": [row("float", 20.0, 0.0), row("rounded to nearest", 900.0, 5.0), row("flattened", 21.0, 0.1)],
        "fallback": None,
        "sites": [{**site, "sqnr_db": 20.0, "sqnr_unflattened_db": 10.0}],
        "choice": {"policy": "auto"},
        "polish": {"epochs": 2, "held_out_divergence": [0.3, 0.1, 0.2, 0.15]},
        "left_float": [],
        "passes": {"FoldValueMapPass": 1e-7},
        "engines": {},
        **given,
    }


@pytest.mark.parametrize(
    ("perplexity", "grade"), [(20.0, "close"), (22.0, "close"), (22.1, "lossy"), (30.0, "lossy"), (30.1, "damaged")]
)
def test_the_grade_is_that_of_the_model_that_was_made(perplexity: float, grade: str) -> None:
    rows = [*facts()["held_out"], row("flattened and polished", perplexity, 0.1)]
    found = judge(facts(held_out=rows))
    assert found["grade"] == grade
    assert f"perplexity is {perplexity:g}: {perplexity / 20:.3g} times the float model's 20." in found["sentences"][1]
    assert "it would be 900." in found["sentences"][2]


def test_what_fell_back_is_judged_by_what_it_fell_back_to() -> None:
    found = judge(facts(fallback="nothing is flattened: it lost"))
    assert found["grade"] == "damaged"
    assert "perplexity is 900" in found["sentences"][1]
    assert len(found["sentences"]) == 2


@pytest.mark.parametrize("rows", [[], [row("float", 20.0, 0.0), row("flattened", None, 9.0)]])
def test_what_was_not_measured_is_not_praised(rows: list[dict[str, Any]]) -> None:
    found = judge(facts(held_out=rows))
    assert found["grade"] == "unmeasured"
    assert "planish eval" in found["sentences"][1]


def test_what_was_not_verified_is_said() -> None:
    assert "Nothing was verified" in judge(facts(verification={}))["sentences"][0]


def test_all_went_as_asked() -> None:
    assert notices(facts()) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"fallback": "nothing is flattened: it lost"}, "Flattening fell back: nothing is flattened: it lost."),
        ({"polish": None}, "The model was not polished."),
        ({"polish": {"held_out_divergence": [0.1, 0.2, 0.05, 0.2]}}, "Polishing was undone: it got no better"),
        ({"polish": {"held_out_divergence": [0.1, None, None]}}, "Polishing was undone"),
        ({"left_float": [{"module": "lm_head", "reason": "so"}]}, "1 linear is in floating point: so."),
        ({"verification": {**VERIFIED, "followed": 7}}, "7 of 1000 roundings lay between two codes"),
        ({"verification": {**VERIFIED, "unfollowed_error": 0.2}}, "they move a logit by up to 20% of the range"),
        ({"passes": {}}, "were not verified one by one"),
        (
            {"engines": {"rtx": {"fallbacks": [{"what": "a cache", "instead": "floats", "why": "it is so"}]}}},
            "Engine rtx: a cache: floats, because it is so.",
        ),
    ],
)
def test_nothing_is_silent(given: dict[str, Any], words: str) -> None:
    (said,) = notices(facts(**given))
    assert words in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"diverged": ["dense"]}, "The form dense diverged at 1 site"),
        ({"evidence": {"fell back to a rotation": 1.0}}, "The search fell back to rotations at 1 site."),
        ({"sqnr_db": 9.0}, "did not lower the error at 1 site: attn_in of layer 0."),
        ({"evidence": {"ridge": 0.0}}, "At 1 site weights stay as they were"),
    ],
)
def test_what_went_wrong_at_a_site_is_said(given: dict[str, Any], words: str) -> None:
    site = {**facts()["sites"][0], **given}
    (said,) = notices(facts(sites=[site]))
    assert words in said
