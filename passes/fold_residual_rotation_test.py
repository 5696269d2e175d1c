"""Rotating the residual stream: another stream, the same logits."""

from pathlib import Path

import numpy as np
import pytest

from planish.passes.blocks import GraphError
from planish.passes.fold_norm_gain import FoldNormGainPass
from planish.passes.fold_residual_rotation import FoldResidualRotationPass
from planish.passes.transforms import Array
from planish.passes.untie_embeddings import UntieEmbeddingsPass
from tests.flattening import assert_same_logits, config_of, graph_of, initializer, weights_of
from tests.tiny import VARIANTS


def rotation(n: int) -> Array:
    return np.linalg.qr(np.random.default_rng(2).standard_normal((n, n)))[0].astype(np.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_stay(variant: str, tmp_path: Path) -> None:
    before = [UntieEmbeddingsPass(), FoldNormGainPass()]
    rotate = FoldResidualRotationPass(rotation(config_of(variant).hidden_size))
    assert_same_logits(variant, [rotate], tmp_path, before=before)


def test_weights_are_rotated() -> None:
    model, (_, weights) = graph_of("mlp_bias"), weights_of("mlp_bias")
    R = rotation(64).astype(np.float64)
    FoldNormGainPass()(model)
    FoldResidualRotationPass(rotation(64))(model)
    embed, down, bias = (
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.down_proj.bias",
    )
    np.testing.assert_allclose(initializer(model, embed), weights[embed] @ R, atol=1e-6)
    np.testing.assert_allclose(initializer(model, down), weights[down].T @ R, atol=1e-6)
    np.testing.assert_allclose(initializer(model, bias), weights[bias] @ R, atol=1e-6)


def test_what_it_needs() -> None:
    with pytest.raises(GraphError, match=r"input_layernorm' is not one\. Run FoldNormGainPass"):
        FoldResidualRotationPass(rotation(64))(graph_of("gqa"))
    with pytest.raises(GraphError, match="64 channels, and its rotation has 72"):
        FoldResidualRotationPass(rotation(72))(graph_of("gqa"))
    model = graph_of("tied")
    for name, value in model.graph.initializers.items():
        if "norm" in name and value.const_value is not None:
            value.const_value.numpy()[:] = 1
    with pytest.raises(GraphError, match="UntieEmbeddingsPass"):
        FoldResidualRotationPass(rotation(64))(model)
