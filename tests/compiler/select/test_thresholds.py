"""Thresholds that fit measured errors, and what they are compared with."""

import math

import numpy as np
import pytest

from planish.compiler.select.kurtosis import Group, KurtosisRule, select_by_kurtosis
from planish.compiler.select.thresholds import calibrate_threshold

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("group", ["attn", "ffn"])
def test_no_threshold_is_better(group: Group) -> None:
    for _ in range(20):
        s = RNG.integers(0, 6, 9) / 2
        affine, rotation = RNG.uniform(size=(2, 9))
        found = calibrate_threshold(group, s, affine, rotation)
        # Through the rule itself, over a grid finer than the statistic.
        errors = {}
        for threshold in [*np.arange(-1.0, 4.0, 0.1), found.threshold]:
            rule = KurtosisRule("raw", threshold, threshold)
            chosen = [c.kind for c in select_by_kurtosis({"attn": s, "ffn": s}, rule) if c.group == group]
            errors[threshold] = sum(a if k == "affine" else r for k, a, r in zip(chosen, affine, rotation, strict=True))
            if threshold == found.threshold:
                assert chosen.count("affine") == found.affine
        assert found.error == pytest.approx(min(errors.values()))
        assert found.error == pytest.approx(errors[found.threshold])
        assert found.oracle <= found.error <= min(found.all_affine, found.all_rotation) + 1e-12


def test_a_rule_that_fits_is_as_good_as_the_oracle() -> None:
    s, affine, rotation = [0.0, 1.0, 2.0, 3.0], [4, 4, 1, 1], [2, 3, 3, 4]
    found = calibrate_threshold("attn", s, affine, rotation)
    assert (found.threshold, found.affine, found.error, found.oracle) == (1.5, 2, 7, 7)
    assert (found.all_affine, found.all_rotation, found.regret) == (10, 12, 0)
    # Gains are -2, -1, 2, 3: the same order as the statistic.
    assert found.tau == pytest.approx(1)
    assert found.agrees


def test_the_ffn_is_the_other_way_round() -> None:
    s, affine, rotation = [0.0, 1.0, 2.0, 3.0], [4, 4, 1, 1], [2, 3, 3, 4]
    found = calibrate_threshold("ffn", s, affine, rotation)
    # Best is to put the threshold above all: affine everywhere, 10 against an oracle of 7.
    assert (found.threshold, found.affine, found.error) == (4, 4, 10)
    assert found.regret == pytest.approx(3 / 7)
    assert found.tau == pytest.approx(1)
    assert not found.agrees
    opposite = calibrate_threshold("ffn", s, rotation, affine)
    assert (opposite.threshold, opposite.affine, opposite.agrees) == (1.5, 2, True)


def test_a_statistic_that_says_nothing() -> None:
    found = calibrate_threshold("attn", [2.0, 2.0], [1, 2], [2, 0.5])
    assert (found.threshold, found.error, found.oracle) == (3, 2.5, 1.5)
    assert math.isnan(found.tau)
    assert not found.agrees


def test_regret_without_error() -> None:
    assert calibrate_threshold("attn", [1, 2], [0, 0], [1, 1]).regret == 0
    assert calibrate_threshold("attn", [1, 2], [0, 1], [1, 0]).regret == math.inf


@pytest.mark.parametrize(
    ("s", "affine", "rotation", "message"),
    [
        ([1, 2], [1], [1, 2], "as many errors as layers"),
        ([], [], [], "as many errors as layers"),
        ([1, 2], [1, np.inf], [1, 2], "finite"),
    ],
)
def test_numbers_that_do_not_fit(s: list[float], affine: list[float], rotation: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate_threshold("ffn", s, affine, rotation)
