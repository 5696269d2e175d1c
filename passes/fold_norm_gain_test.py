"""Folding norm gains: ones remain, and the logits."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from planish.passes.blocks import GraphError
from planish.passes.fold_norm_gain import FoldNormGainPass
from planish.passes.merge_linears import MergeLinearsPass
from planish.passes.untie_embeddings import UntieEmbeddingsPass
from tests.flattening import assert_same_logits, graph_of, initializer, weights_of
from tests.tiny import VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_stay(variant: str, tmp_path: Path) -> None:
    assert_same_logits(variant, [FoldNormGainPass()], tmp_path, before=[UntieEmbeddingsPass()])


def test_gains_are_one_and_in_the_weights() -> None:
    model, (_, weights) = graph_of("gqa"), weights_of("gqa")
    FoldNormGainPass()(model)
    norms = [name for name in weights if "norm" in name]
    assert len(norms) == 5
    for name in norms:
        np.testing.assert_array_equal(initializer(model, name), np.ones(64, np.float32))
    up, head = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"
    gain = weights["model.layers.1.post_attention_layernorm.weight"].astype(np.float64)
    np.testing.assert_array_equal(initializer(model, up), (weights[up] * gain).T.astype(np.float32))
    gain = weights["model.norm.weight"].astype(np.float64)
    np.testing.assert_array_equal(initializer(model, head), (weights[head] * gain).astype(np.float32))
    # What does not read a norm is as it was.
    down = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(initializer(model, down), weights[down].T)
    assert not FoldNormGainPass()(model).modified


def test_a_tied_model_is_refused() -> None:
    with pytest.raises(GraphError, match=r"embed_tokens.*UntieEmbeddingsPass"):
        FoldNormGainPass()(model := graph_of("tied"))
    weights = weights_of("tied")[1]
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        np.testing.assert_array_equal(initializer(model, name), weights[name])


def test_other_readers_of_a_norm_are_refused() -> None:
    model = graph_of("gqa")
    norm = next(node for node in model.graph if node.name == "model.layers.1.input_layernorm")
    model.graph.insert_after(norm, ir.node("Neg", [norm.outputs[0]], name="other"))
    with pytest.raises(GraphError, match=r"'other' reads 'model\.layers\.1\.input_layernorm'"):
        FoldNormGainPass()(model)


def test_merged_linears_are_refused() -> None:
    model = graph_of("gqa")
    MergeLinearsPass()(model)
    with pytest.raises(GraphError, match="before MergeLinearsPass"):
        FoldNormGainPass()(model)
