"""Kurtosis of weights against scipy, and what follows from it in attention and in the FFN."""

from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats
from safetensors.numpy import load_file

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.errors import SelectionError
from planish.compiler.select import kurtosis as kurtosis_module
from planish.compiler.select.kurtosis import (
    Aggregate,
    KurtosisRule,
    excess_kurtosis,
    group_kurtosis,
    read_kurtosis,
    robust_z,
    select_by_kurtosis,
    weight_sums,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("entries", [1, 100, 1 << 20])
def test_a_weight_has_the_kurtosis_that_scipy_finds(
    dtype: npt.DTypeLike, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kurtosis_module, "_ENTRIES", entries)
    weight = (0.02 * RNG.standard_t(5, (37, 24)) + 0.1).astype(dtype)
    expected = scipy.stats.kurtosis(weight.astype(np.float64), axis=None)
    assert excess_kurtosis(weight_sums(weight)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_a_constant_weight_has_no_outliers(value: float) -> None:
    assert excess_kurtosis(weight_sums(np.full((30, 7), value, np.float32))) == 0


@pytest.mark.parametrize("aggregate", ["mean", "max", "concat"])
def test_linears_of_a_group_are_joined(aggregate: Aggregate) -> None:
    weights = [RNG.standard_t(df, (20, n)) * n for df, n in ((5, 16), (9, 40), (30, 8))]
    each = [scipy.stats.kurtosis(weight, axis=None) for weight in weights]
    whole = scipy.stats.kurtosis(np.concatenate([weight.ravel() for weight in weights]))
    expected = {"mean": np.mean(each), "max": np.max(each), "concat": whole}
    found = group_kurtosis([weight_sums(weight) for weight in weights], aggregate)
    assert found == pytest.approx(expected[aggregate], rel=1e-10)


@pytest.mark.parametrize("with_output", [False, True])
def test_the_groups_of_a_checkpoint(tiny: Path, with_output: bool) -> None:
    stored = load_file(tiny / "model.safetensors")
    members = {
        "attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        + (["self_attn.o_proj"] if with_output else []),
        "ffn": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    }
    steps: list[tuple[int, int]] = []
    found = read_kurtosis(
        open_checkpoint(tiny), KurtosisRule(with_output=with_output), lambda done, of: steps.append((done, of))
    )
    assert steps == [(1, 2), (2, 2)]
    assert list(found) == ["attn", "ffn"]
    for group, names in members.items():
        for layer in range(2):
            weights = [stored[f"model.layers.{layer}.{name}.weight"].astype(np.float64) for name in names]
            expected = np.mean([scipy.stats.kurtosis(weight, axis=None) for weight in weights])
            assert found[group][layer] == pytest.approx(expected, rel=1e-9)  # type: ignore[index]


def test_robust_z_of_equal_values_is_0() -> None:
    assert robust_z([1.7] * 5).tolist() == [0] * 5
    assert robust_z([3]).tolist() == [0]


def test_robust_z_with_one_outlier() -> None:
    # The median deviation is 0, so the mean one counts: 10 / 5 = 2.
    z = robust_z([0, 0, 10, 0, 0])
    assert z == pytest.approx([0, 0, 10 / (1.2533 * 2), 0, 0])
    # An outlier does not hide itself, as in a plain z-score, which is below sqrt(n - 1) = 2.4.
    assert robust_z([1, 2, 3, 4, 5, 6, 1000])[-1] > 300


def test_robust_z_is_that_of_the_normalised_median_deviation() -> None:
    values = RNG.standard_t(3, 33)
    expected = (values - np.median(values)) / scipy.stats.median_abs_deviation(values, scale="normal")
    np.testing.assert_allclose(robust_z(values), expected, rtol=1e-4)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf, 0], [[1.0, 2.0]]])
def test_robust_z_of_what_is_no_vector_of_numbers(values: list[float]) -> None:
    with pytest.raises(ValueError, match="a vector of finite values"):
        robust_z(values)


#: z-scores with the median 0.2 and a median deviation of 0.2 (0.2965 scaled): -0.67, -0.34, 0, 1.01, 33.
STATISTIC = [0.0, 0.1, 0.2, 0.5, 10.0]


def kinds(rule: KurtosisRule) -> dict[str, str]:
    choices = select_by_kurtosis({"attn": STATISTIC, "ffn": STATISTIC}, rule)
    assert [(choice.layer, choice.group) for choice in choices] == [(i, g) for i in range(5) for g in ("attn", "ffn")]
    return {group: "".join(choice.kind[0] for choice in choices if choice.group == group) for group in ("attn", "ffn")}


@pytest.mark.parametrize(
    ("rule", "attn", "ffn"),
    [
        (KurtosisRule(), "rrrra", "aaarr"),
        (KurtosisRule("z", 33.5, -0.5), "rrrrr", "arrrr"),
        (KurtosisRule("raw"), "rrrra", "aaarr"),
        (KurtosisRule("raw", 0.05, 0.05), "raaaa", "arrrr"),
        (KurtosisRule("topm", 2, 1), "rrraa", "aaaar"),
        (KurtosisRule("topm", 0, 5), "rrrrr", "rrrrr"),
    ],
)
def test_high_kurtosis_is_affine_in_attention_and_rotated_in_the_ffn(rule: KurtosisRule, attn: str, ffn: str) -> None:
    assert kinds(rule) == {"attn": attn, "ffn": ffn}


def test_the_evidence_is_with_the_choice() -> None:
    choices = select_by_kurtosis({"attn": STATISTIC, "ffn": [7.0] * 5})
    assert (choices[8].kurtosis, choices[8].z) == (10, pytest.approx(9.8 / (1.4826 * 0.2)))
    assert (choices[9].kurtosis, choices[9].z, choices[9].kind) == (7, 0, "affine")


def test_equal_ranks_go_to_the_first_layers() -> None:
    choices = select_by_kurtosis({"attn": [1, 1, 1], "ffn": [2, 2, 2]}, KurtosisRule("topm", 1, 2))
    assert [choice.kind[0] for choice in choices] == list("arrrra")


@pytest.mark.parametrize("rule", [KurtosisRule("topm", 6, 0), KurtosisRule("topm", 0, -1), KurtosisRule("topm", 0.5)])
def test_more_layers_than_there_are(rule: KurtosisRule) -> None:
    with pytest.raises(SelectionError, match="ask for 0 to 5"):
        select_by_kurtosis({"attn": STATISTIC, "ffn": STATISTIC}, rule)


def test_groups_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="shorter"):
        select_by_kurtosis({"attn": [1, 2], "ffn": [1]})
