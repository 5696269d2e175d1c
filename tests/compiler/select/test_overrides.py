"""Which sites an expression names, and what is refused."""

import re

import pytest
from pydantic import ValidationError

from planish.compiler.errors import SelectionError
from planish.compiler.select.overrides import SiteOverride, resolve_overrides
from planish.passes.transforms import SITES

ROTATION, BLOCKS = SiteOverride(kind="rotation"), SiteOverride(form="blocks64")


def test_layers_sites_and_linears_can_be_named() -> None:
    whole, by_site, by_linear = (
        resolve_overrides({expression: ROTATION}, 3)
        for expression in (r"model\.layers\.(0|2)\..*", r".*\.ffn_out", r"model\.layers\.1\.mlp\.down_proj")
    )
    assert whole == [dict.fromkeys(SITES, ROTATION), {}, dict.fromkeys(SITES, ROTATION)]
    assert by_site == [{"ffn_out": ROTATION}] * 3
    assert by_linear == [{}, {"ffn_out": ROTATION}, {}]
    (together,) = resolve_overrides({r".*\.(q|k|v)_proj": BLOCKS, r".*\.mlp\..*": ROTATION}, 1)
    assert together == {"attn_in": BLOCKS, "ffn_in": ROTATION, "ffn_out": ROTATION}


def test_kinds_stand_for_forms() -> None:
    assert ROTATION.form_at("ffn_out") == "rotation"
    assert SiteOverride(kind="affine").form_at("key") == "dense"
    assert SiteOverride(kind="identity").form_at("key") == "identity"
    assert BLOCKS.form_at("attn_in") == "blocks64"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.layers.7.*": ROTATION}, "names no site of the 3 layers"),
        ({"ffn_out": ROTATION}, "matched as a whole"),
        ({"(": ROTATION}, "no regular expression"),
        ({r".*\.q_proj": ROTATION}, "and not self_attn.k_proj, which reads the same input"),
        ({r".*\.key": BLOCKS}, "key takes identity, rotation, dense, hadamard, and not blocks64"),
        ({r".*\.(key|value)": SiteOverride(bits=4)}, "names keys and values alone"),
        ({r".*\.ffn_.*": ROTATION, r".*\.ffn_out": BLOCKS}, "both name ffn_out of layer 0, and contradict"),
    ],
)
def test_what_makes_no_sense(overrides: dict[str, SiteOverride], message: str) -> None:
    with pytest.raises(SelectionError, match=re.escape(message)):
        resolve_overrides(overrides, 3)


def test_two_that_agree_may_overlap() -> None:
    assert resolve_overrides({r".*\.ffn_.*": ROTATION, r".*\.ffn_out": ROTATION}, 1) == [
        {"ffn_in": ROTATION, "ffn_out": ROTATION}
    ]


def test_an_override_says_something_and_does_not_contradict_itself() -> None:
    with pytest.raises(ValidationError, match="says nothing"):
        SiteOverride()
    with pytest.raises(ValidationError, match="blocks64 is of the kind affine, not rotation"):
        SiteOverride(kind="rotation", form="blocks64")
