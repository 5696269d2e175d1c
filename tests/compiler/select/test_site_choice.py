"""The choices in plan.json: what is written is read, and what was edited into nonsense is refused by name."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.errors import PlanError
from planish.compiler.learn.transforms.candidates import Form, kind_of
from planish.compiler.select.policy import SelectionPolicy
from planish.compiler.select.site_choice import HighChoice, SiteChoice, read_choices, transforms_entry
from planish.passes.transforms import SITES, Site

CONFIG = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
FORMS: dict[Site, Form] = {
    "attn_in": "kronecker",
    "attn_out": "hadamard",
    "ffn_in": "rotation",
    "ffn_out": "blocks32",
    "key": "dense",
    "value": "identity",
}


def some_choices() -> list[SiteChoice]:
    return [
        SiteChoice(
            layer=layer,
            site=site,
            form=FORMS[site],
            kind=kind_of(FORMS[site]),
            cost_flops=100 * layer + number,
            error=None if site == "value" else 0.1 / 3 + layer,
            evidence={"kurtosis": -0.25, "z": 7} if site == "attn_in" else {},
        )
        for layer in range(2)
        for number, site in enumerate(SITES)
    ]


def write(path: Path, edit: Callable[[dict[str, Any]], Any] = lambda entry: None) -> Path:
    """Write a plan.json whose `transforms` went through `edit`."""
    entry = transforms_entry(some_choices(), SelectionPolicy.parse("measured:0.2"), CONFIG, "abc")
    edit(entry)
    path.write_text(json.dumps({"scheme": "w4a4k4v4", "transforms": entry}))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "plan.json")
    assert read_choices(path, CONFIG, "abc") == tuple(some_choices())
    entry = json.loads(path.read_text())["transforms"]
    assert entry["policy"] == "measured:0.2"
    assert entry["model"]["fingerprint"] == "abc"
    assert entry["sites"][0] == {
        "layer": 0,
        "site": "attn_in",
        "form": "kronecker",
        "kind": "affine",
        "cost_flops": 0,
        "error": 0.1 / 3,
        "evidence": {"kurtosis": -0.25, "z": 7.0},
    }


def test_high_impact_channels_are_named_where_there_are_some(tmp_path: Path) -> None:
    choices = some_choices()
    choices[3] = choices[3].model_copy(update={"high": HighChoice(bits=4, count=128)})
    entry = transforms_entry(choices, SelectionPolicy("none"), CONFIG, "abc")
    assert ["high" in each for each in entry["sites"]] == [i == 3 for i in range(12)]
    assert entry["sites"][3]["high"] == {"bits": 4, "count": 128}
    (tmp_path / "plan.json").write_text(json.dumps({"transforms": entry}))
    assert read_choices(tmp_path / "plan.json", CONFIG, "abc") == tuple(choices)


def test_the_order_of_entries_does_not_count(tmp_path: Path) -> None:
    path = write(tmp_path / "plan.json", lambda entry: entry["sites"].reverse())
    assert read_choices(path, CONFIG, "abc") == tuple(some_choices())


def test_a_form_and_its_kind_are_edited_together(tmp_path: Path) -> None:
    def edit(entry: dict[str, Any]) -> None:
        entry["sites"][8] |= {"form": "dense", "kind": "affine"}

    found = read_choices(write(tmp_path / "plan.json", edit), CONFIG, "abc")
    assert (found[8].layer, found[8].site, found[8].form) == (1, "ffn_in", "dense")


def put(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    """Edit the entry of layer 1, site ffn_in."""
    return lambda entry: entry["sites"][8].update(fields)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put(form="hadamrad"), "layer 1, site ffn_in: 'form' is 'hadamrad'"),
        (
            put(form="dense"),
            "layer 1, site ffn_in: 'form' and 'kind': the form dense is of the kind affine, not rotation",
        ),
        (put(kind="shear"), "layer 1, site ffn_in: 'kind' is 'shear'"),
        (put(site="ffn"), "layer 1, site ffn: 'site' is 'ffn'"),
        (put(layer=-1), "layer -1, site ffn_in: 'layer' is -1"),
        (put(layer=2), "layer 2, site ffn_in: the model has only 2 layers"),
        (put(layer=0), "layer 0, site ffn_in: there are two entries"),
        (put(layer=True), "'layer' is True"),
        (put(cost_flops=1.5), "layer 1, site ffn_in: 'cost_flops' is 1.5"),
        (put(cost_flops=-1), "'cost_flops' is -1"),
        (put(error="low"), "'error' is 'low'"),
        (put(error=float("nan")), "'error' is nan"),
        (put(error=-1.0), "'error' is -1.0"),
        (put(evidence={"z": "high"}), "'evidence.z' is 'high'"),
        (put(evidence={"z": float("inf")}), "'evidence.z' is inf"),
        (put(high={"bits": 5, "count": 64}), "layer 1, site ffn_in: 'high.bits' is 5: Input should be 3, 4 or 8"),
        (
            put(high={"bits": 4, "count": 65}),
            "layer 1, site ffn_in: 'high.count' is 65: Input should be a multiple of 64",
        ),
        (put(high={"bits": 4, "count": -64}), "'high.count' is -64"),
        (put(high={"bits": 4}), "layer 1, site ffn_in: 'high.count' is missing"),
        (put(high=True), "layer 1, site ffn_in: 'high' is True"),
        (put(colour="red"), "layer 1, site ffn_in: unknown field 'colour'; the fields are layer, site, form"),
        (lambda entry: entry["sites"][8].pop("form"), "layer 1, site ffn_in: 'form' is missing"),
        (lambda entry: entry["sites"].pop(8), "layer 1, site ffn_in: there is no entry"),
        (lambda entry: entry["sites"].insert(3, "x"), "entry 3 of 'sites'"),
        (lambda entry: entry.pop("sites"), "no list 'sites'"),
        (lambda entry: entry.pop("model"), "does not say in 'model'"),
    ],
)
def test_a_plan_edited_into_nonsense(edit: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "plan.json", edit)
    with pytest.raises(PlanError) as caught:
        read_choices(path, CONFIG, "abc")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 26


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 3), ("hidden_size", 20), ("intermediate_size", 32), ("num_key_value_heads", 4)],
)
def test_a_plan_of_a_model_of_another_shape(field: str, value: int, tmp_path: Path) -> None:
    path, other = write(tmp_path / "plan.json"), dataclasses.replace(CONFIG, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=f"another model: its {field} is {getattr(CONFIG, field)}, .* {value}"):
        read_choices(path, other, "def")


def test_a_plan_of_other_weights(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="another model: its fingerprint is 'abc', and that of this one 'def'"):
        read_choices(write(tmp_path / "plan.json"), CONFIG, "def")


@pytest.mark.parametrize("content", ["", '{"transforms": {"sites": [', "[]", '{"linears": []}', '{"transforms": 3}'])
def test_a_file_that_is_no_plan(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(PlanError, match=r"cannot be read as JSON|has no 'transforms'"):
        read_choices(tmp_path / "plan.json", CONFIG, "abc")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan\.json cannot be read"):
        read_choices(tmp_path / "plan.json", CONFIG, "abc")


def test_an_incomplete_choice_is_not_written() -> None:
    with pytest.raises(PlanError, match="layer 1, site value: there is no entry"):
        transforms_entry(some_choices()[:-1], SelectionPolicy("none"), CONFIG, "abc")
