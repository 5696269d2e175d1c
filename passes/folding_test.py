"""Folded tensors: nothing read early, maps composed in float64, one cast."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from planish.passes import folding
from planish.passes.blocks import GraphError
from planish.passes.builder import Builder
from planish.passes.folding import FoldedTensor, fold

Array = npt.NDArray[Any]


class Source(ir.LazyTensor):
    """A tensor that counts how often it is read."""

    def __init__(self, array: Array) -> None:
        super().__init__(self._read, ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape), name="source")
        self.array, self.reads = array, 0

    def _read(self) -> ir.TensorProtocol:
        self.reads += 1
        return ir.Tensor(self.array)


def weight(array: Array) -> tuple[ir.Value, Source]:
    build, source = Builder(), Source(array)
    value = build.initializer(source, "a.weight")
    ir.Graph([], [], nodes=[ir.node("Neg", [value], name="reader")], initializers=[value], name="g")
    return value, source


def read(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


def test_maps_are_composed_in_order_and_cast_once() -> None:
    rng = np.random.default_rng(0)
    W, A, B = rng.standard_normal((6, 9)).astype(np.float32), rng.standard_normal((6, 6)), rng.standard_normal((9, 9))
    value, source = weight(W)
    fold(value, 0, lambda x: x @ A)
    fold(value, 1, lambda x: x @ B)
    fold(value, 0, lambda x: x + 1)
    assert source.reads == 0
    expected = A.T @ W.astype(np.float64) @ B + 1
    np.testing.assert_array_equal(read(value), expected.astype(np.float32))
    assert source.reads == 1
    assert isinstance(value.const_value, FoldedTensor)
    assert value.const_value.source is source  # one layer, however many folds
    assert (value.name, value.const_value.name, value.dtype) == ("a.weight", "a.weight", ir.DataType.FLOAT)


def test_there_and_back_loses_nothing() -> None:
    """1/3 and 3 in float32 would leave a rounding in some entries; float64 leaves none after the cast."""
    W = np.random.default_rng(1).standard_normal((50, 40)).astype(np.float32)
    value, _ = weight(W)
    fold(value, 0, lambda x: x / 3)
    fold(value, 1, lambda x: x * 3)
    np.testing.assert_array_equal(read(value), W)
    assert not np.array_equal(W / np.float32(3) * np.float32(3), W)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_chunks_make_no_difference(axis: int, dtype: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    W = np.random.default_rng(2).standard_normal((23, 17)).astype(dtype)
    P = np.random.default_rng(3).standard_normal((W.shape[axis],) * 2)
    seen: list[int] = []

    def product(x: Array) -> Array:
        assert x.dtype == np.float64
        seen.append(x.shape[0])
        return x @ P

    monkeypatch.setattr(folding, "_CHUNK", 5 * W.shape[axis])
    value, _ = weight(W)
    fold(value, axis, product)
    exact = W.astype(np.float64)
    expected = exact @ P if axis else P.T @ exact
    found = read(value)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected.astype(dtype), rtol=2 * np.finfo(dtype).eps, atol=1e-13)
    assert max(seen) == 5
    assert sum(seen) == W.shape[1 - axis]


def test_a_bias() -> None:
    value, _ = weight(np.arange(4, dtype=np.float32))
    fold(value, 0, lambda x: x[..., ::-1])
    assert read(value).tolist() == [3, 2, 1, 0]


def test_a_copy_under_another_name() -> None:
    source = Source(np.ones((2, 3), np.float32))
    copy = FoldedTensor(source, (), "b")
    assert source.reads == 0
    assert copy.name == "b"
    np.testing.assert_array_equal(copy.numpy(), source.array)


def test_what_cannot_be_folded_into() -> None:
    value, _ = weight(np.ones((2, 2), np.float32))
    ir.node("Abs", [value], name="other")
    with pytest.raises(GraphError, match=r"'a\.weight' is read by reader and other.*UntieEmbeddingsPass"):
        fold(value, 0, lambda x: x)
    with pytest.raises(GraphError, match="'x' is not an initializer"):
        fold(ir.Value(name="x"), 0, lambda x: x)
