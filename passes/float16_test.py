"""What the float16 pass converts, what it leaves, and what it refuses."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.export.float_model import float_model, save_model
from planish.passes.builder import Builder
from planish.passes.float16 import Float16Pass, Float16RangeError
from planish.passes.lower_kv_cache_to_tensorrt import LowerKvCacheToTensorrtPass
from tests.fixed_cache import FixedCacheModel
from tests.onnx_run import CachedModel, range_error
from tests.tiny import write_tiny


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=request.param))


def converted(checkpoint: Checkpoint) -> ir.Model:
    model = float_model(checkpoint)
    LowerKvCacheToTensorrtPass(16)(model)
    Float16Pass()(model)
    return model


def test_logits_stay_within_float16_rounding(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 272, (2, 9))
    expected = CachedModel(save_model(float_model(checkpoint), tmp_path / "float")).in_chunks(ids, [9])
    model = FixedCacheModel(save_model(converted(checkpoint), tmp_path / "half"), 2, float16=True)
    found = model.in_chunks(ids, [5, 1, 3], np.ones_like(ids))
    assert found.dtype == np.float32
    # 2^-11 is the rounding of one product; the random model amplifies it.
    assert 1e-6 < range_error(found, expected) < 2e-3


def test_products_attention_and_cache_are_float16_and_the_rest_is_not(checkpoint: Checkpoint) -> None:
    graph = converted(checkpoint).graph
    for node in graph:
        dtypes = {value.dtype for value in node.inputs if value is not None and value.dtype is not None}
        if node.op_type in ("MatMul", "Attention", "TensorScatter"):
            assert ir.DataType.FLOAT not in dtypes, node.name
        elif node.op_type in ("RMSNormalization", "RotaryEmbedding", "Add", "Mul", "Sigmoid"):
            assert ir.DataType.FLOAT16 not in dtypes, node.name
    caches = [value for value in [*graph.inputs, *graph.outputs] if value.shape is not None and len(value.shape) == 4]
    assert len(caches) == 8
    assert {value.dtype for value in caches} == {ir.DataType.FLOAT16}
    tables = {name: value.dtype for name, value in graph.initializers.items() if len(value.shape or []) == 2}
    assert set(tables.values()) == {ir.DataType.FLOAT16}
    assert sum("embed_tokens" in name for name in tables) == 1


def test_a_second_run_changes_nothing(checkpoint: Checkpoint) -> None:
    assert not Float16Pass()(converted(checkpoint)).modified


def product(weight: float) -> ir.Model:
    build = Builder()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 2]))
    y = build.op("MatMul", [x, build.initializer(np.full((2, 1), weight, np.float32), "w.weight")], "y")
    y.shape = ir.Shape([1, 1])
    graph = ir.Graph([x], [y], nodes=build.nodes, initializers=build.initializers, opset_imports={"": 24}, name="g")
    return ir.Model(graph, ir_version=11)


def test_a_weight_beyond_float16_is_named() -> None:
    model = Float16Pass()(product(70000.0)).model
    with pytest.raises(Float16RangeError, match=r"'w\.weight' holds 70000.*65504"):
        model.graph.initializers["w.weight.float16"].const_value.numpy()  # type: ignore[union-attr]


def test_an_output_that_became_float16_is_cast_back_under_its_name() -> None:
    model = Float16Pass()(product(0.5)).model
    graph_input = model.graph.inputs[0]
    dtype = np.float16 if graph_input.dtype == ir.DataType.FLOAT16 else np.float32
    (y,) = ReferenceEvaluator(ir.to_proto(model)).run(["y"], {"x": np.ones((1, 2), dtype)})
    assert y.dtype == np.float32
    assert y == 1
