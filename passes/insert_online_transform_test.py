"""Online transforms with their inverses: more ops, the same logits."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from planish.passes.blocks import GraphError
from planish.passes.insert_online_transform import INVERSE, InsertOnlineTransformPass
from planish.passes.transforms import Transform, Transforms
from tests.flattening import FORMS, assert_same_logits, config_of, graph_of, random_transforms
from tests.tiny import VARIANTS

MATRICES = [form for form in FORMS if form != "scale"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str, tmp_path: Path) -> None:
    assert_same_logits(variant, [InsertOnlineTransformPass(random_transforms(config_of(variant)))], tmp_path)


@pytest.mark.parametrize("form", MATRICES)
def test_every_form(form: str, tmp_path: Path) -> None:
    assert_same_logits("untied", [InsertOnlineTransformPass(random_transforms(config_of("untied"), form))], tmp_path)


def test_ops_names_and_marks() -> None:
    model = graph_of("gqa")
    InsertOnlineTransformPass(random_transforms(config_of("gqa"), "rows left"))(model)
    nodes = {str(node.name): node for node in model.graph if node.domain == "planish"}
    sites = [f"model.layers.{i}.{site}" for i in range(2) for site in ("attn_in", "attn_out", "ffn_in", "ffn_out")]
    assert sorted(nodes) == sorted(
        f"{site}.{part}" for site in sites for part in ("transform", "inverse_left", "inverse_right")
    )
    for site in sites:
        online = nodes[f"{site}.transform"]
        assert online.op_type == "PlanishTransformRowsLeft"
        assert [value.name for value in online.inputs[1:] if value] == [
            f"{site}.transform.right",
            f"{site}.transform.left",
        ]
        assert INVERSE not in online.metadata_props
        # The inverse undoes the factor that was applied last first.
        assert nodes[f"{site}.inverse_left"].inputs[0] is online.outputs[0]
        assert nodes[f"{site}.inverse_right"].inputs[0] is nodes[f"{site}.inverse_left"].outputs[0]
        for part, op in (("left", "Left"), ("right", "Rows")):
            inverse = nodes[f"{site}.inverse_{part}"]
            assert inverse.op_type == f"PlanishTransform{op}"
            assert inverse.metadata_props[INVERSE] == f"{site}.transform"
    readers = [use.node.name for use in nodes["model.layers.0.attn_in.inverse_right"].outputs[0].uses()]
    assert readers == [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert {name for _, name, _ in model.functions} == {f"PlanishTransform{op}" for op in ("RowsLeft", "Rows", "Left")}


def test_scales_alone_insert_nothing() -> None:
    transforms = random_transforms(config_of("gqa"), "scale")
    assert InsertOnlineTransformPass(transforms)(graph_of("gqa")).modified is False


def test_what_it_needs() -> None:
    model, transforms = graph_of("gqa"), random_transforms(config_of("gqa"))
    InsertOnlineTransformPass(transforms)(model)
    with pytest.raises(GraphError, match="before online transforms are inserted"):
        InsertOnlineTransformPass(transforms)(model)
    wrong = dataclasses.replace(transforms.layers[1], ffn_out=Transform(64, left=np.eye(4)))
    with pytest.raises(
        GraphError, match=r"layers\.1\.mlp\.down_proj' has 160 input channels, and its transform has 64"
    ):
        InsertOnlineTransformPass(Transforms((transforms.layers[0], wrong)))(graph_of("gqa"))
