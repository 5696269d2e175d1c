"""The channel scale of lm_head: in the last norm and in lm_head, the logits what they were."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from planish.passes.blocks import GraphError
from planish.passes.fold_head_scale import FoldHeadScalePass
from planish.passes.untie_embeddings import UntieEmbeddingsPass
from tests.flattening import assert_same_logits, config_of, graph_of, initializer, random_transforms, weights_of
from tests.tiny import VARIANTS


def fold_into(variant: str) -> FoldHeadScalePass:
    scale = random_transforms(config_of(variant), head=True).head
    assert scale is not None
    return FoldHeadScalePass(scale)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_stay(variant: str, tmp_path: Path) -> None:
    assert_same_logits(variant, [fold_into(variant)], tmp_path, before=[UntieEmbeddingsPass()])


def test_where_the_scale_goes() -> None:
    model, (config, weights) = graph_of("gqa"), weights_of("gqa")
    scale = random_transforms(config, head=True).head
    fold_into("gqa")(model)
    expected = {
        "model.norm.weight": lambda w: w * scale,
        "lm_head.weight": lambda w: w / scale,
        "model.embed_tokens.weight": lambda w: w,
    }
    for name, made in expected.items():
        np.testing.assert_allclose(initializer(model, name), made(weights[name]), rtol=1e-6)


def test_a_tied_model_is_refused() -> None:
    with pytest.raises(GraphError, match=r"embed_tokens.*UntieEmbeddingsPass"):
        fold_into("tied")(model := graph_of("tied"))
    np.testing.assert_array_equal(initializer(model, "model.norm.weight"), weights_of("tied")[1]["model.norm.weight"])


def test_other_readers_of_the_norm_are_refused() -> None:
    model = graph_of("gqa")
    norm = next(node for node in model.graph if node.name == "model.norm")
    model.graph.insert_after(norm, ir.node("Neg", [norm.outputs[0]], name="other"))
    with pytest.raises(GraphError, match="'other' reads"):
        fold_into("gqa")(model)


def test_a_scale_of_another_width_is_refused() -> None:
    with pytest.raises(GraphError, match=r"has the shape \[64\], and the scale of lm_head \(3,\)"):
        FoldHeadScalePass(np.ones(3, np.float32))(graph_of("gqa"))
