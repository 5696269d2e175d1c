"""Taking inverses into weights: W P^-T, and only the online ops remain."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from planish.passes.blocks import GraphError
from planish.passes.fold_transform_into_weights import FoldTransformIntoWeightsPass
from planish.passes.insert_online_transform import INVERSE, InsertOnlineTransformPass
from planish.passes.merge_linears import MergeLinearsPass
from tests.flattening import FORMS, assert_same_logits, config_of, graph_of, initializer, random_transforms, weights_of
from tests.tiny import VARIANTS

MATRICES = [form for form in FORMS if form != "scale"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str, tmp_path: Path) -> None:
    insert = InsertOnlineTransformPass(random_transforms(config_of(variant)))
    assert_same_logits(variant, [insert, FoldTransformIntoWeightsPass()], tmp_path)


@pytest.mark.parametrize("form", MATRICES)
def test_every_form(form: str, tmp_path: Path) -> None:
    insert = InsertOnlineTransformPass(random_transforms(config_of("untied"), form))
    assert_same_logits("untied", [insert, FoldTransformIntoWeightsPass()], tmp_path)


@pytest.mark.parametrize("form", ["right", "rows left"])
def test_weights_and_what_is_left(form: str) -> None:
    transforms, (_, weights) = random_transforms(config_of("gqa"), form), weights_of("gqa")
    model = graph_of("gqa")
    InsertOnlineTransformPass(transforms)(model)
    FoldTransformIntoWeightsPass()(model)
    for site, module in (
        ("attn_in", "self_attn.v_proj"),
        ("attn_out", "self_attn.o_proj"),
        ("ffn_out", "mlp.down_proj"),
    ):
        name = f"model.layers.1.{module}.weight"
        P = transforms.layers[1][site].matrix()  # type: ignore[index]
        expected = np.linalg.solve(P, weights[name].T.astype(np.float64))  # P^-1 W^T
        np.testing.assert_allclose(initializer(model, name), expected, atol=1e-6)
    assert not [node.name for node in model.graph if INVERSE in node.metadata_props]
    assert not [name for name in model.graph.initializers if "inverse" in name]
    assert sum(node.domain == "planish" for node in model.graph) == 8
    assert not FoldTransformIntoWeightsPass()(model).modified
    # q, k, v read one value, so they still merge.
    assert MergeLinearsPass()(model).modified
    assert sum(node.op_type == "MatMul" for node in model.graph) == 9


def test_other_readers_are_refused() -> None:
    model = graph_of("gqa")
    InsertOnlineTransformPass(random_transforms(config_of("gqa"), "left"))(model)
    inverse = next(node for node in model.graph if node.name == "model.layers.0.ffn_in.inverse_left")
    model.graph.insert_after(inverse, ir.node("Neg", [inverse.outputs[0]], name="other"))
    with pytest.raises(GraphError, match=r"'other' reads the inverse 'model\.layers\.0\.ffn_in\.inverse_left'"):
        FoldTransformIntoWeightsPass()(model)
