"""Quantising linears: every one is replaced or named."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.export.float_model import float_model, save_model
from planish.compiler.quantize.codes import CodesOnDisk, quantize_checkpoint
from planish.passes.codes import PackedWeight
from planish.passes.merge_linears import MODULES, MergeLinearsPass
from planish.passes.quantize_linears import QuantizeLinearsPass
from planish.passes.scheme import Scheme
from planish.plugins.packing import packed_size
from tests.onnx_run import CachedModel, range_error
from tests.tiny import VARIANTS, write_tiny

QKV = "model.layers.0.self_attn.qkv_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny(tmp_path_factory.mktemp("tiny")))


def products(model: ir.Model, prefix: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type.startswith(prefix)]


def modules_of(nodes: list[ir.Node]) -> list[str]:
    return [module for node in nodes for module in node.metadata_props[MODULES].split(",")]


def every_linear(checkpoint: Checkpoint) -> list[str]:
    names = [name.removesuffix(".weight") for name in checkpoint.names() if name.endswith("_proj.weight")]
    return sorted([*names, "lm_head"])


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("variant", ["gqa", "tied", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize(
    ("spelling", "op"),
    [("w4a4", "PlanishMatMul4"), ("w3a8g32", "PlanishMatMul3"), ("w2a16g32", "PlanishWeightOnlyMatMul2")],
)
def test_every_linear_is_replaced(merge: bool, variant: str, spelling: str, op: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path, **VARIANTS[variant]))
    scheme = Scheme.parse(spelling, lm_head="w8a16" if "a16" in spelling else "w8a8")
    model = float_model(checkpoint)
    if merge:
        MergeLinearsPass()(model)
    quantize = QuantizeLinearsPass(scheme, quantize_checkpoint(checkpoint, scheme, tmp_path / "codes"))
    assert quantize(model).modified
    assert quantize.left_float == []
    assert not [node.name for node in model.graph if node.op_type == "MatMul"]
    assert len(products(model, op)) == (8 if merge else 14)
    head = products(model, op[:-1] + "8")
    assert modules_of(head) == ["lm_head"]
    assert sorted(modules_of([*products(model, op), *head])) == every_linear(checkpoint)
    activations = products(model, "PlanishQuantizeActivation")
    assert len(activations) == (0 if scheme.linear.weight_only else len(products(model, op)) + 1)


def test_merging_first_changes_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Codes and scales are per output channel, so merged products give each output as before."""
    scheme = Scheme.parse("w4a8g32")
    codes = quantize_checkpoint(checkpoint, scheme, tmp_path / "codes")
    ids, logits = np.random.default_rng(0).integers(3, 272, (1, 8)), []
    for passes in ([MergeLinearsPass()], []):
        model = float_model(checkpoint)
        for each in (*passes, QuantizeLinearsPass(scheme, codes)):
            each(model)
        logits.append(CachedModel(save_model(model, tmp_path / str(len(logits))))(ids).logits)
    assert range_error(*logits) < 1e-6


@pytest.mark.parametrize("spelling", ["w4a4", "w3a16g32", "w8a8"])
def test_names_shapes_and_types(spelling: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    scheme = Scheme.parse(spelling)
    form, codes = scheme.linear, quantize_checkpoint(checkpoint, scheme, tmp_path)
    model = float_model(checkpoint)
    MergeLinearsPass()(model)
    QuantizeLinearsPass(scheme, codes)(model)
    weight, scale = (model.graph.initializers[f"{QKV}.{part}"] for part in ("codes", "scale"))
    assert weight.dtype == ir.DataType.UINT8
    assert str(weight.shape) == f"[128,{packed_size(64, form.weight_bits)}]"
    assert scale.dtype == (ir.DataType.FLOAT if form.group is None else ir.DataType.FLOAT16)
    assert str(scale.shape) == f"[{form.groups(64)},128]"
    # What is declared is what is read, and the rows are those of q, k, v one after the other.
    for value in (weight, scale):
        assert value.const_value is not None
        array = value.const_value.numpy()
        assert (array.shape, array.dtype) == (value.const_value.shape.numpy(), value.const_value.dtype.numpy())
    parts = [codes.read(f"model.layers.0.self_attn.{part}_proj") for part in "qkv"]
    assert weight.const_value is not None
    np.testing.assert_array_equal(weight.const_value.numpy(), np.concatenate([part.packed for part in parts]))
    node = next(node for node in model.graph if node.name == f"{QKV}.product")
    assert node.attributes.get_int("k") == 64
    assert node.attributes.get_int("group") == (form.group or 64)
    if not form.weight_only:
        assert node.attributes.get_int("activation_bits") == form.activation_bits


def test_no_codes_are_read_while_rewriting(checkpoint: Checkpoint, tmp_path: Path) -> None:
    class Unread(CodesOnDisk):
        def read(self, module: str) -> PackedWeight:
            raise AssertionError(f"{module} was read")

    scheme = Scheme.parse("w4a4")
    QuantizeLinearsPass(scheme, Unread(tmp_path, checkpoint, scheme))(float_model(checkpoint))


def test_a_float_scheme_changes_nothing_and_names_all(checkpoint: Checkpoint, tmp_path: Path) -> None:
    scheme = Scheme.parse("w16a16k4v4")
    quantize = QuantizeLinearsPass(scheme, CodesOnDisk(tmp_path, checkpoint, scheme))
    model = float_model(checkpoint)
    before = [node.name for node in model.graph]
    assert not quantize(model).modified
    assert sorted(quantize.left_float) == every_linear(checkpoint)
    assert [node.name for node in model.graph] == before
    assert not model.functions


@pytest.mark.parametrize("tied", [True, False])
def test_a_float_head_stays_and_is_named(tied: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path, tie_word_embeddings=tied))
    scheme = Scheme.parse("w4a4", lm_head="w16a16")
    quantize = QuantizeLinearsPass(scheme, quantize_checkpoint(checkpoint, scheme, tmp_path / "codes"))
    model = float_model(checkpoint)
    quantize(model)
    assert quantize.left_float == ["lm_head"]
    assert [node.name for node in model.graph if node.op_type == "MatMul"] == ["logits"]


def test_a_head_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    scheme = Scheme.parse("w16a16", lm_head="w8a8")
    quantize = QuantizeLinearsPass(scheme, quantize_checkpoint(checkpoint, scheme, tmp_path))
    model = float_model(checkpoint)
    assert quantize(model).modified
    assert modules_of(products(model, "PlanishMatMul")) == ["lm_head"]
    assert sorted([*quantize.left_float, "lm_head"]) == every_linear(checkpoint)
    assert "logits" in [value.name for value in model.graph.outputs]


@pytest.mark.parametrize("merge", [True, False])
def test_clips_of_modules(merge: bool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Each grid spans what its module is given; lm_head asks as well."""
    scheme = Scheme.parse("w4a4")
    clips = {"self_attn.o_proj": 0.5, "mlp.gate_proj": 0.75, "mlp.up_proj": 0.75, "lm_head": 0.875}
    asked: list[str] = []

    def clip(module: str) -> float:
        asked.append(module)
        return clips.get(module.removeprefix("model.layers.1."), 1.0)

    model = float_model(checkpoint)
    if merge:
        MergeLinearsPass()(model)
    QuantizeLinearsPass(scheme, quantize_checkpoint(checkpoint, scheme, tmp_path), clip)(model)
    assert sorted(asked) == every_linear(checkpoint)
    for node in products(model, "PlanishMatMul"):
        (first, *_) = modules_of([node])
        quantize = node.inputs[0].producer() if node.inputs[0] else None
        assert quantize is not None
        expected = clips.get(first.removeprefix("model.layers.1."), 1.0)
        assert quantize.attributes.get_float("clip") == expected
