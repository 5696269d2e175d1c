"""Merging linears: fewer products, the same logits."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.export.float_model import float_model, save_model
from planish.passes.builder import Builder
from planish.passes.merge_linears import MODULES, MergeLinearsPass, linear_modules
from tests.onnx_run import CachedModel, range_error
from tests.tiny import VARIANTS, write_tiny

QKV, GATE_UP = "model.layers.1.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("variant", ["gqa", "mha", "mqa", "head_dim", "attention_bias", "mlp_bias", "untied"])
def test_logits_stay(variant: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path, **VARIANTS[variant]))
    ids = np.random.default_rng(0).integers(3, 272, (2, 20))
    model = float_model(checkpoint)
    before = CachedModel(save_model(model, tmp_path / "before")).in_chunks(ids, [12, 1, 7])
    assert MergeLinearsPass()(model).modified
    after = CachedModel(save_model(model, tmp_path / "after")).in_chunks(ids, [12, 1, 7])
    assert range_error(after, before) < 1e-5


def test_seven_products_become_four(checkpoint: Checkpoint) -> None:
    model = float_model(checkpoint)
    # Seven in each of two blocks, and lm_head, whose weight is transposed in the graph.
    assert sum(node.op_type == "MatMul" for node in model.graph) == 15
    MergeLinearsPass()(model)
    products = {str(node.name): node for node in model.graph if node.op_type == "MatMul"}
    assert len(products) == 9
    assert linear_modules(products[QKV]) == [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    assert linear_modules(products[GATE_UP]) == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    assert products[QKV].metadata_props[MODULES].count(",") == 2


def test_nothing_more_to_merge(checkpoint: Checkpoint) -> None:
    model = float_model(checkpoint)
    MergeLinearsPass()(model)
    nodes = [node.name for node in model.graph]
    assert not MergeLinearsPass()(model).modified
    assert [node.name for node in model.graph] == nodes


def test_weights_are_side_by_side(checkpoint: Checkpoint) -> None:
    model = float_model(checkpoint)
    MergeLinearsPass()(model)
    merged = model.graph.initializers[f"{QKV}.weight"].const_value
    assert merged is not None
    expected = [checkpoint.tensor(f"model.layers.1.self_attn.{part}_proj.weight").T for part in "qkv"]
    np.testing.assert_array_equal(merged.numpy(), np.concatenate(expected, 1))
    # The parts are gone, so that no weight is written twice.
    names = set(model.graph.initializers)
    assert not any(f"self_attn.{part}_proj.weight" in name for name in names for part in "qkv")
    assert "model.layers.1.self_attn.o_proj.weight" in names
    assert "model.layers.1.mlp.down_proj.weight" in names


def test_no_weight_is_read(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(name: str) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(checkpoint, "_read", read)
    MergeLinearsPass()(float_model(checkpoint))


def product(weight_name: str, is_initializer: bool = True) -> ir.Node:
    build = Builder()
    weight = ir.Value(name=weight_name)
    if is_initializer:
        weight = build.initializer(np.zeros((2, 2), np.float32), weight_name)
        ir.Graph([], [], nodes=[], initializers=[weight], name="g")
    build.op("MatMul", [ir.Value(name="x"), weight], "y")
    return build.nodes[0]


def test_linear_modules_of_other_nodes() -> None:
    assert linear_modules(product("a.b.weight")) == ["a.b"]
    assert linear_modules(product("a.b.table")) == []
    assert linear_modules(product("a.b.weight", is_initializer=False)) == []
    other = product("a.b.weight")
    other.op_type = "Gemm"
    assert linear_modules(other) == []
    other.op_type, other.domain = "MatMul", "com.microsoft"
    assert linear_modules(other) == []
