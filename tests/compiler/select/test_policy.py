"""Selection policies as they are spelled, and what a budget is a share of."""

from pathlib import Path

import pytest

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.errors import SelectionError
from planish.compiler.select.kurtosis import KurtosisRule
from planish.compiler.select.policy import SelectionPolicy, linear_flops


def kurtosis(*args: object, **options: object) -> SelectionPolicy:
    return SelectionPolicy("kurtosis", rule=KurtosisRule(*args, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "policy", "canonical"),
    [
        ("none", SelectionPolicy("none"), "none"),
        (" Auto ", SelectionPolicy("auto"), "auto"),
        ("search", SelectionPolicy("search"), "search"),
        ("fixed:rotation", SelectionPolicy("fixed", kind="rotation"), "fixed:rotation"),
        ("fixed:rotation:smooth", SelectionPolicy("fixed", kind="rotation", smooth=True), "fixed:rotation:smooth"),
        ("FIXED:affine", SelectionPolicy("fixed", kind="affine"), "fixed:affine"),
        ("measured", SelectionPolicy("measured", budget=0.1), "measured:0.1"),
        ("measured:0", SelectionPolicy("measured", budget=0), "measured:0"),
        ("measured:2.5e-2", SelectionPolicy("measured", budget=0.025), "measured:0.025"),
        ("kurtosis", kurtosis("z", 2.0, 0.2), "kurtosis:z=2,0.2"),
        ("kurtosis:raw", kurtosis("raw", 2.0, 0.2), "kurtosis:raw=2,0.2"),
        ("kurtosis:raw=3.5,-0.5", kurtosis("raw", 3.5, -0.5), "kurtosis:raw=3.5,-0.5"),
        ("kurtosis:topm=10,12", kurtosis("topm", 10, 12), "kurtosis:topm=10,12"),
        ("kurtosis:o:max", kurtosis(aggregate="max", with_output=True), "kurtosis:z=2,0.2:max:o"),
        ("kurtosis:concat:z=1,2", kurtosis("z", 1, 2, aggregate="concat"), "kurtosis:z=1,2:concat"),
    ],
)
def test_a_policy_is_read_and_written(text: str, policy: SelectionPolicy, canonical: str) -> None:
    assert SelectionPolicy.parse(text) == policy
    assert str(policy) == canonical
    assert SelectionPolicy.parse(canonical) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a selection policy"),
        ("kurt", "'kurt' is not a selection policy"),
        ("none:1", "the policy none has no option '1'"),
        ("search:fast", "no option 'fast'"),
        ("auto:", "no option ''"),
        ("fixed", "needs one kind"),
        ("fixed:identity", "needs one kind"),
        ("fixed:rotation:affine", "needs one kind"),
        ("fixed:affine:smooth", "needs one kind"),
        ("measured:much", "'much' is not a number"),
        ("measured:nan", "'nan' is not a number"),
        ("measured:-0.1", "budget of -0.1 is less than nothing"),
        ("measured:0.1:0.2", "no option '0.2'"),
        ("kurtosis:y", "no option 'y'"),
        ("kurtosis:max=2", "no option 'max=2'"),
        ("kurtosis:raw=", "'raw=' needs two numbers"),
        ("kurtosis:raw=1", "'raw=1' needs two numbers"),
        ("kurtosis:z=1,b", "'b' is not a number"),
        ("kurtosis:topm", "'topm' needs two counts"),
        ("kurtosis:topm=1.5,2", "'topm=1.5,2' needs two counts"),
        ("kurtosis:topm=1,-2", "needs two counts"),
        ("kurtosis:z:raw", "'raw' contradicts or repeats"),
        ("kurtosis:max:max", "'max' contradicts or repeats"),
    ],
)
def test_what_is_no_policy(text: str, message: str) -> None:
    with pytest.raises(SelectionError) as caught:
        SelectionPolicy.parse(text)
    assert message in str(caught.value)
    assert "Give one of: none, fixed:rotation[:smooth], fixed:affine, kurtosis" in str(caught.value)
    assert caught.value.exit_code == 25


def test_the_flops_of_the_linears(tiny: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny)
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 14
    assert linear_flops(open_checkpoint(tiny).config) == sum(2 * m.in_features * m.out_features for m in linears)
