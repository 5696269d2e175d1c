"""Transforms against dense matrices, and what they refuse to be."""

from typing import Any

import numpy as np
import pytest

from planish.passes.transforms import SITES, LayerTransforms, Transform, Transforms, orthogonal, site_of
from tests.flattening import FORMS, random_transform

M, K = 5, 7
N = M * K


def block_diag(blocks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    m, k, _ = blocks.shape
    result = np.zeros((m * k, m * k))
    for i, block in enumerate(blocks):
        result[i * k : (i + 1) * k, i * k : (i + 1) * k] = block
    return result


def dense(transform: Transform) -> np.ndarray[Any, Any]:
    """Return diag(scale) P from blocks and a Kronecker product."""
    P = np.eye(N)
    if transform.scale is not None:
        P = P @ np.diag(transform.scale.astype(np.float64))
    if transform.right is not None:
        P = P @ block_diag(np.broadcast_to(transform.right.astype(np.float64), (M, K, K)))
    if transform.left is not None:
        P = P @ np.kron(transform.left.astype(np.float64), np.eye(K))
    return P


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_dense_matrix(form: str) -> None:
    rng = np.random.default_rng(4)
    transform = random_transform(rng, form, M, K)
    assert transform.grid == ((1, N) if form == "scale" else (M, K))
    P = dense(transform)
    np.testing.assert_allclose(transform.matrix(), P, atol=1e-13)
    x, W = rng.standard_normal((2, 3, N)), rng.standard_normal((4, N))
    np.testing.assert_allclose(transform.apply(x), x @ P, atol=1e-12)
    np.testing.assert_allclose(transform.apply_to_weight(W), W @ np.linalg.inv(P).T, atol=1e-12)
    np.testing.assert_allclose(transform.apply(x) @ transform.apply_to_weight(W).T, x @ W.T, atol=1e-12)
    # A single row, as a bias is.
    np.testing.assert_allclose(transform.apply(x[0, 0]), x[0, 0] @ P, atol=1e-12)


@pytest.mark.parametrize("form", [form for form in FORMS if "scale" not in form])
def test_inverse_factors_undo_it_left_first(form: str) -> None:
    transform = random_transform(np.random.default_rng(5), form, M, K)
    right, left = transform.inverse_factors()
    undo = np.eye(N)
    if left is not None:
        undo = undo @ np.kron(left, np.eye(K))
    if right is not None:
        undo = undo @ block_diag(np.broadcast_to(right, (M, K, K)))
    np.testing.assert_allclose(dense(transform) @ undo, np.eye(N), atol=1e-12)


def test_a_dense_map_is_one_row() -> None:
    right = np.random.default_rng(6).standard_normal((1, 6, 6)).astype(np.float32)
    transform = Transform(6, "affine", right=right)
    assert transform.grid == (1, 6)
    np.testing.assert_allclose(transform.matrix(), right[0])


@pytest.mark.parametrize("shared", [True, False])
def test_query_heads_of_a_group_share_the_map(shared: bool) -> None:
    heads = Transform(3 * 4, right=np.random.default_rng(7).standard_normal((1 if shared else 3, 4, 4)))
    of_queries = heads.for_query_heads(2)
    assert heads.right is not None
    blocks = np.broadcast_to(heads.right.astype(np.float64), (3, 4, 4))
    np.testing.assert_allclose(of_queries.matrix(), block_diag(np.repeat(blocks, 2, axis=0)), atol=1e-12)


def test_flops_count_factors_only() -> None:
    ones = np.ones
    assert Transform(12, scale=ones(12)).flops == 0
    assert Transform(12, right=ones((1, 4, 4))).flops == Transform(12, right=ones((3, 4, 4))).flops == 2 * 12 * 4
    assert Transform(12, right=ones((1, 4, 4)), left=ones((3, 3))).flops == 2 * 12 * (4 + 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": np.ones(5)}, "as many channel scales"),
        ({"scale": np.array([1, 1, 0, 1, 1, 1])}, "none of them 0"),
        ({"right": np.ones((2, 3))}, "right factor of shape"),
        ({"left": np.ones((2, 3))}, "left factor of shape"),
        ({"right": np.ones((1, 4, 4))}, "cannot be read as"),
        ({"right": np.ones((1, 3, 3)), "left": np.ones((3, 3))}, "left factor of 3 rows"),
        ({"right": np.ones((3, 3, 3))}, "3 right factors for 2 rows"),
        ({"left": np.full((2, 2), np.nan)}, "NaN"),
    ],
)
def test_what_a_transform_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transform(6, **arguments)


def identity_layer(**sites: Any) -> LayerTransforms:
    return LayerTransforms(**{site: Transform(6) for site in SITES} | sites)


def test_what_the_sites_cannot_hold() -> None:
    for site in ("key", "value"):
        for part in ({"scale": np.ones(6)}, {"left": np.eye(2)}):
            with pytest.raises(ValueError, match=f"site {site} maps each head alone"):
                identity_layer(**{site: Transform(6, **part)})
    with pytest.raises(ValueError, match="attn_out has no channel scale"):
        identity_layer(attn_out=Transform(6, scale=np.ones(6)))


def test_a_residual_map_is_orthogonal() -> None:
    Q = np.linalg.qr(np.random.default_rng(8).standard_normal((40, 40)))[0]
    assert Transforms((), Q).residual is not None
    for wrong in (Q * 1.01, Q[:, :-1], np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="residual map"):
            Transforms((), wrong)
    rounded = Q.astype(np.float32)
    restored = orthogonal(rounded)
    assert np.abs(rounded.T.astype(np.float64) @ rounded - np.eye(40)).max() > 1e-9
    np.testing.assert_allclose(restored.T @ restored, np.eye(40), atol=1e-14)
    U, _, Vt = np.linalg.svd(rounded.astype(np.float64))
    np.testing.assert_allclose(restored, U @ Vt, atol=1e-13)


@pytest.mark.parametrize("wrong", [np.ones((2, 3)), np.array([1.0, 0.0]), np.array([1.0, np.nan])])
def test_the_scale_of_lm_head_is_finite_and_not_zero(wrong: np.ndarray) -> None:
    assert Transforms((), head=np.array([1.0, -2.0])).head is not None
    with pytest.raises(ValueError, match="scale of lm_head"):
        Transforms((), head=wrong)


def test_sites_and_clips_of_modules() -> None:
    assert site_of("model.layers.3.self_attn.q_proj") == site_of("model.layers.11.self_attn.v_proj") == "attn_in"
    assert site_of("model.layers.3.self_attn.o_proj") == "attn_out"
    assert site_of("model.layers.0.mlp.up_proj") == "ffn_in"
    assert site_of("model.layers.0.mlp.down_proj") == "ffn_out"
    assert site_of("lm_head") is None
    assert site_of("model.layers.0.mlp") is None
    transforms = Transforms((identity_layer(), identity_layer(clips={"ffn_out": 0.7})))
    assert transforms.clip("model.layers.1.mlp.down_proj") == 0.7
    assert transforms.clip("model.layers.0.mlp.down_proj") == transforms.clip("lm_head") == 1
    assert len(transforms.first(1).layers) == 1
