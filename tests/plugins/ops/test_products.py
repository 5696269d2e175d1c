"""The ops that compute with codes, run by ONNX Runtime: integer and weight-only products, attention."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
import torch

from planish.compiler.quantize import arithmetic
from planish.passes.scheme import LinearFormat
from planish.plugins import packing
from planish.plugins.ops import attend, matmul, weight_only_matmul
from tests.onnx_run import op_model, run_op, session

Array = npt.NDArray[Any]
Generator = np.random.Generator

#: Input channels and group: K not a multiple of 8, shorter last groups, and SmolLM2's 576 by 128.
SHAPES = [(37, None), (64, None), (576, None), (64, 16), (100, 32), (7, 16), (576, 128)]


@pytest.fixture
def rng() -> Generator:
    return np.random.default_rng(11)


def weight_of(rng: Generator, k: int, group: int | None, bits: int, outputs: int = 19) -> arithmetic.QuantizedWeight:
    """A weight with random codes, rows of extreme ones, and scales as they are stored."""
    codes = rng.integers(0, 1 << bits, (outputs, k), np.uint8)
    codes[0], codes[1], codes[2] = 0, (1 << bits) - 1, 1 << bits - 1
    scale = rng.uniform(0.01, 0.1, (LinearFormat(bits, 8, group).groups(k), outputs))
    scale = scale.astype(np.float32 if group is None else np.float16).astype(np.float32)
    return arithmetic.QuantizedWeight(torch.from_numpy(codes), torch.from_numpy(scale), bits, group or k)


def stored(weight: arithmetic.QuantizedWeight, group: int | None) -> dict[str, Array]:
    scale = weight.scale.numpy().astype(np.float32 if group is None else np.float16)
    return {"weight": packing.pack(weight.codes.numpy(), weight.bits), "weight_scale": scale}


def activation_codes(rng: Generator, k: int, bits: int) -> Array:
    """Random codes, with one token of the lowest and one of the highest."""
    codes = rng.integers(0, 1 << bits, (2, 5, k), np.uint8)
    codes[0, 0], codes[0, 1] = 0, (1 << bits) - 1
    return codes


def accumulators(codes: Array, weight: arithmetic.QuantizedWeight, activation_bits: int) -> Array:
    """Return the exact sums, int64 [groups, tokens, outputs]."""
    x = codes.reshape(-1, codes.shape[-1]).astype(np.int64) - (1 << activation_bits - 1)
    w = weight.codes.numpy().astype(np.int64) - (1 << weight.bits - 1)
    starts = range(0, x.shape[1], weight.group)
    return np.stack([x[:, i : i + weight.group] @ w[:, i : i + weight.group].T for i in starts])


def test_accumulators_by_hand() -> None:
    weight = arithmetic.QuantizedWeight(torch.tensor([[8, 15, 0]], dtype=torch.uint8), torch.ones(1, 1), 4, 3)
    assert accumulators(np.array([[[3, 0, 7]]]), weight, 3).tolist() == [[[(-4) * 7 + 3 * -8]]]


@pytest.mark.parametrize("bits", packing.PACKED_BITS)
@pytest.mark.parametrize("activation_bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("k", "group"), SHAPES)
def test_integer_sums_are_exact(rng: Generator, bits: int, activation_bits: int, k: int, group: int | None) -> None:
    """The int32 sums inside the function body, ONNX Runtime's and the oracle's, against int64."""
    weight, codes = weight_of(rng, k, group, bits), activation_codes(rng, k, activation_bits)
    inputs = {"codes": codes, "scale": np.ones((2, 5, 1), np.float32), **stored(weight, group)}
    model = op_model(matmul(bits), inputs, k=k, group=group or k, activation_bits=activation_bits)
    common.InlinePass()(model)
    (product,) = (node for node in model.graph if node.op_type == "MatMulInteger")
    product.outputs[0].type = ir.TensorType(ir.DataType.INT32)
    model.graph.outputs.append(product.outputs[0])
    _, sums = session(ir.to_proto(model)).run(None, inputs)
    assert sums.dtype == np.int32
    expected = accumulators(codes, weight, activation_bits)
    np.testing.assert_array_equal(sums, expected)
    oracle = [
        arithmetic.integer_matmul(part, weight_part, activation_bits, bits).numpy().reshape(10, -1)
        for part, weight_part in zip(
            torch.from_numpy(codes).split(weight.group, -1), weight.codes.split(weight.group, -1), strict=True
        )
    ]
    np.testing.assert_array_equal(np.stack(oracle), expected)


def test_integer_sums_that_float32_would_round() -> None:
    """8192 channels of the lowest codes sum to 2^27: the oracle must not take the float32 way."""
    codes = torch.zeros(1, 8192, dtype=torch.uint8)
    codes[0, 0] = 129
    weight = torch.zeros(2, 8192, dtype=torch.uint8)
    weight[1, 0] = 129
    assert arithmetic.integer_matmul(codes, weight, 8, 8).tolist() == [[8191 * 128 * 128 - 128, 8191 * 128 * 128 + 1]]


@pytest.mark.parametrize("bits", packing.PACKED_BITS)
@pytest.mark.parametrize("activation_bits", [2, 4, 8])
@pytest.mark.parametrize(("k", "group"), SHAPES)
def test_matmul_equals_the_oracle(rng: Generator, bits: int, activation_bits: int, k: int, group: int | None) -> None:
    weight, x = weight_of(rng, k, group, bits), rng.standard_normal((2, 5, k)).astype(np.float32)
    x[1, 2] = 0
    form = LinearFormat(bits, activation_bits, group)
    codes, scale = arithmetic.quantize_activation(torch.from_numpy(x), activation_bits)
    inputs = {"codes": codes.numpy(), "scale": scale.numpy(), **stored(weight, group)}
    (y,) = run_op(matmul(bits), inputs, k=k, group=group or k, activation_bits=activation_bits)
    expected = arithmetic.low_bit_linear(torch.from_numpy(x), weight, form).numpy()
    if form.groups(k) == 1:
        np.testing.assert_array_equal(y, expected)
    else:
        # Groups are added in another order, at most 7 roundings of partial sums.
        magnitude = np.abs(accumulators(codes.numpy(), weight, activation_bits)) * weight.scale.numpy()[:, None]
        bound = 2.0**-21 * magnitude.sum(0).reshape(y.shape) * scale.numpy()
        assert (np.abs(y - expected) <= bound).all()
    assert not y[1, 2].any()


@pytest.mark.parametrize("bits", packing.PACKED_BITS)
@pytest.mark.parametrize(("k", "group"), SHAPES)
def test_weight_only_matmul_equals_float64(rng: Generator, bits: int, k: int, group: int | None) -> None:
    weight, x = weight_of(rng, k, group, bits), rng.standard_normal((2, 5, k)).astype(np.float32)
    (y,) = run_op(weight_only_matmul(bits), {"x": x, **stored(weight, group)}, k=k, group=group or k)
    w = weight.codes.numpy().astype(np.float64) - (1 << bits - 1)
    w *= np.repeat(weight.scale.numpy().astype(np.float64), weight.group, 0)[:k].T
    expected = x.astype(np.float64) @ w.T
    magnitude = np.abs(x.astype(np.float64)) @ np.abs(w).T
    assert (np.abs(y - expected) <= 1e-6 * magnitude + 1e-12).all()
    oracle = arithmetic.low_bit_linear(torch.from_numpy(x), weight, LinearFormat(bits, 16, group)).numpy()
    assert (np.abs(oracle - expected) <= 1e-6 * magnitude + 1e-12).all()


# Attention


def attention_float64(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """Return softmax(q k / sqrt(d) + mask) v of [batch, heads, ...] arrays."""
    scores = query @ key.swapaxes(2, 3) / np.sqrt(query.shape[-1]) + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value


def cached(rng: Generator, bits: int, heads: int, total: int, head_dim: int) -> tuple[Array, Array, Array]:
    """Return packed codes, their float16 scales, and the float64 numbers they stand for."""
    codes = rng.integers(0, 1 << bits, (2, heads, total, head_dim), np.uint8)
    scale = (rng.uniform(0.5, 4.0, (2, heads, total, 2)) / (1 << bits)).astype(np.float16)
    scale[..., 1] -= np.float16(scale[..., 0] * (1 << bits - 1))
    exact = scale.astype(np.float64)
    return packing.pack(codes, bits), scale, codes * exact[..., :1] + exact[..., 1:]


@pytest.mark.parametrize("key_bits", packing.PACKED_BITS)
@pytest.mark.parametrize("value_bits", packing.PACKED_BITS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("sequence", [1, 7])
def test_attend_equals_float64(
    rng: Generator, key_bits: int, value_bits: int, heads: int, kv_heads: int, sequence: int
) -> None:
    total, head_dim = 23, 24
    query = rng.standard_normal((2, sequence, heads * head_dim)).astype(np.float32)
    key, key_scale, key_float = cached(rng, key_bits, kv_heads, total, head_dim)
    value, value_scale, value_float = cached(rng, value_bits, kv_heads, total, head_dim)
    slots = np.arange(total)
    seen = np.broadcast_to(slots <= slots[total - sequence :, None], (2, 1, sequence, total)).copy()
    seen[1, :, :, :4] = False
    mask = np.where(seen, 0, -np.inf).astype(np.float32)
    (y,) = run_op(
        attend(key_bits, value_bits),
        {
            "query": query,
            "key": key,
            "key_scale": key_scale,
            "value": value,
            "value_scale": value_scale,
            "mask": mask,
        },
        heads=heads,
        head_dim=head_dim,
    )
    by_head = query.astype(np.float64).reshape(2, sequence, heads, head_dim).swapaxes(1, 2)
    repeated = (np.repeat(array, heads // kv_heads, 1) for array in (key_float, value_float))
    expected = attention_float64(by_head, *repeated, mask).swapaxes(1, 2).reshape(y.shape)
    assert np.abs(y - expected).max() <= 2e-6 * np.abs(value_float).max()


def test_every_op_has_a_name_of_its_own() -> None:
    ops = [matmul(4), matmul(3), weight_only_matmul(4), attend(4, 4), attend(4, 3), attend(3, 4)]
    functions = [function for op in ops for function in op.functions()]
    names = {function.name for function in functions}
    assert len({ir.to_proto(function).SerializeToString() for function in functions}) == len(names) == 8
    assert all(name.startswith("Planish") for name in names)
