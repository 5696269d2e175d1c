"""Models for parsers of older TensorRTs have ops that these take, and compute what the others do."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from planish.compiler.backends.tensorrt import build, build_engines, check_engine
from planish.compiler.backends.tensorrt.engine_json import EngineRecord
from planish.compiler.backends.tensorrt.lowering import lower_to_tensorrt
from planish.compiler.backends.tensorrt.parser_versions import (
    SINCE,
    Version,
    check_ops,
    opset_for,
    read_version,
    spelled_out_for,
)
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.errors import EngineBuildError, EngineMismatchError
from planish.compiler.export.float_model import save_model
from planish.compiler.export.portable import portable_model
from planish.compiler.quantize.codes import quantize_checkpoint
from planish.passes.lower_kv_cache_to_tensorrt import LowerKvCacheToTensorrtPass
from planish.passes.lower_linears_to_tensorrt import LowerLinearsToTensorrtPass
from planish.passes.lower_opset import LowerOpsetPass
from planish.passes.scheme import Scheme
from planish.passes.spell_out_for_tensorrt import SPELLABLE, SpellOutForTensorrtPass
from planish.plugins.ops import DOMAIN, OPSET
from tests.fixed_cache import FixedCacheModel
from tests.onnx_run import range_error
from tests.tiny import VARIANTS, write_tiny

Array = npt.NDArray[Any]
CONTEXT, BATCH, LENGTH = 16, 2, 9
#: Prefill, a second chunk, and then token by token.
SIZES = [4, 3, 1, 1]
JETSON: Version = (10, 3)


def tiny(folder: Path, scheme: str, **overrides: Any) -> ir.Model:
    checkpoint, parsed = open_checkpoint(write_tiny(folder / "checkpoint", **overrides)), Scheme.parse(scheme)
    codes = quantize_checkpoint(checkpoint, parsed, folder / "codes")
    return portable_model(checkpoint, parsed, codes)[0]


def run(model: ir.Model, folder: Path, **given: Any) -> Array:
    ids = np.random.default_rng(0).integers(3, 272, (BATCH, LENGTH))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    logits = FixedCacheModel(save_model(model, folder), BATCH, **given).in_chunks(ids, SIZES, mask)
    real: Array = logits[mask.astype(bool)]
    return real


def ops(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph if node.domain == ""}


@pytest.mark.parametrize(
    ("scheme", "variant"),
    [
        *(("w8a16", name) for name in sorted(VARIANTS)),
        ("w3a3k3v3", "gqa"), ("w4a4k4v4g32", "gqa"), ("w2a16g16", "mqa"), ("w16a16", "mha"),
    ],
)  # fmt: skip
def test_in_float32_the_logits_are_the_same(scheme: str, variant: str, tmp_path: Path) -> None:
    lowered = ir.passes.Sequential(
        LowerLinearsToTensorrtPass(),
        LowerKvCacheToTensorrtPass(CONTEXT),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
    )(tiny(tmp_path, scheme, **VARIANTS[variant])).model
    expected = run(lowered, tmp_path / "newest", garbage=1e4)
    older = ir.passes.Sequential(SpellOutForTensorrtPass(SPELLABLE), LowerOpsetPass(21))(lowered).model
    assert not ops(older) & SPELLABLE
    assert range_error(run(older, tmp_path / "older", garbage=1e4), expected) < 1e-5


@pytest.mark.parametrize(("scheme", "bound"), [("w16a16", 2e-3), ("w2a16g16", 4e-3), ("w4a8k8v8", 0.03)])
def test_in_float16_the_logits_are_near_and_norms_stay_in_float32(scheme: str, bound: float, tmp_path: Path) -> None:
    portable = tiny(tmp_path, scheme)
    expected = run(lower_to_tensorrt(portable, CONTEXT), tmp_path / "newest", float16=True)
    older = lower_to_tensorrt(portable, CONTEXT, JETSON)
    assert range_error(run(older, tmp_path / "older", float16=True), expected) < bound
    inferred = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "older" / "model.onnx"), data_prop=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    for node in inferred.graph.node:
        if node.op_type in ("ReduceMean", "Sqrt", "Softmax", "Cos", "Sin"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT
        if node.op_type in ("MatMul", "ScatterND"):
            assert types.get(node.output[0], onnx.TensorProto.FLOAT16) == onnx.TensorProto.FLOAT16
    caches = [value for value in older.graph.inputs if str(value.name).startswith("past_key_values")]
    assert {value.dtype for value in caches} == {ir.DataType.FLOAT16}


@pytest.mark.parametrize(
    ("version", "left", "opset"),
    [
        ((10, 0), set(), 21),
        (JETSON, set(), 21),
        ((10, 14), {"Attention"}, 23),
        ((10, 15), SPELLABLE, OPSET),
        ((11, 4), SPELLABLE, OPSET),
    ],
)
def test_every_version_gets_what_its_parser_takes(version: Version, left: set[str], opset: int, tmp_path: Path) -> None:
    lowered = lower_to_tensorrt(tiny(tmp_path, "w3a3k3v3"), CONTEXT, version)
    check_ops(lowered, version)
    assert ops(lowered) & SPELLABLE == left == SPELLABLE - spelled_out_for(version)
    assert lowered.graph.opset_imports == {"": opset}
    assert opset_for(version) == opset
    assert lowered.ir_version == {21: 10, 23: 11, OPSET: 11}[opset]
    # Parsers before 10.7 prefer functions to plugins; none is left to them.
    assert not lowered.functions
    onnx.checker.check_model(str(save_model(lowered, tmp_path / "lowered")), full_check=True)


@pytest.mark.trt
def test_a_newer_parser_takes_a_model_for_an_older_one(tmp_path: Path) -> None:
    import tensorrt_rtx as trt

    path = save_model(lower_to_tensorrt(tiny(tmp_path, "w3a3k3v3"), CONTEXT, JETSON), tmp_path / "lowered")
    network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    assert trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR)).parse_from_file(str(path))
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert (kinds.count(trt.LayerType.SCATTER), kinds.count(trt.LayerType.SOFTMAX)) == (4, 2)
    # Every width that a product has is known before it runs.
    outputs = {network.get_output(i).name: tuple(network.get_output(i).shape) for i in range(network.num_outputs)}
    assert outputs["logits"] == (-1, -1, 272)
    products = [network.get_layer(i) for i in range(network.num_layers)]
    widths = {layer.get_output(0).shape[-1] for layer in products if layer.type == trt.LayerType.MATRIX_MULTIPLY}
    assert -1 not in widths


def test_a_version_is_read_with_or_without_its_build() -> None:
    assert read_version("10.3.0.30") == read_version("10.3") == JETSON


def test_what_a_parser_lacks_is_listed_before_it_is_asked(tmp_path: Path) -> None:
    lowered = lower_to_tensorrt(tiny(tmp_path, "w3a3k3v3"), CONTEXT)
    with pytest.raises(EngineBuildError) as raised:
        check_ops(lowered, JETSON)
    assert str(raised.value).splitlines() == [
        "The parser of TensorRT 10.3 does not take 4 op(s) of the model:",
        "  Attention, 2 node(s): from TensorRT 10.14 on",
        "  RMSNormalization, 5 node(s): from TensorRT 10.15 on",
        "  RotaryEmbedding, 4 node(s): from TensorRT 10.15 on",
        "  TensorScatter, 4 node(s): from TensorRT 10.15 on",
        "Use TensorRT 10.15 or later.",
    ]
    lowered.graph.node(0).op_type = "MatMulInteger"
    with pytest.raises(EngineBuildError, match=r"MatMulInteger, 1 node\(s\): in no version that planish knows of"):
        check_ops(lowered, (11, 4))


def test_every_op_of_lowered_models_is_in_the_table(tmp_path: Path) -> None:
    found = set[str]()
    for i, scheme in enumerate(("w3a3k3v3", "w4a4k4v4g32", "w2a16g16", "w16a16")):
        portable = tiny(tmp_path / str(i), scheme, attention_bias=True)
        for version in (None, JETSON):
            found |= ops(lower_to_tensorrt(portable, CONTEXT, version))
    assert found <= set(SINCE)


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without TensorRT, a GPU, and a plugin library."""

    def none(*_: object) -> None:
        raise AssertionError("nothing is built here")

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.delenv("PLANISH_PLUGINS", raising=False)
    for name in ("first_device", "run_job"):
        monkeypatch.setattr(build, name, none)


@pytest.mark.usefixtures("no_tensorrt")
def test_a_model_for_the_tensorrt_of_another_machine(tmp_path: Path) -> None:
    folder, portable = tmp_path / "tensorrt", tiny(tmp_path, "w3a3k3v3")
    made = build_engines(portable, folder, flavour="tensorrt", tensorrt_version="10.3", max_batch=2, max_context=32)
    assert {path.name for path in folder.iterdir()} == {"engine.json", "model.onnx", "model.onnx.data"}
    record = EngineRecord.read(folder)
    assert record == made.record
    assert (record.tensorrt, record.engine, record.plugins, record.sms) == ("10.3", None, None, ())
    said = {each.what: each for each in record.fallbacks}
    spelled = said["Attention, RMSNormalization, RotaryEmbedding, TensorScatter"]
    assert spelled.instead == "spelled out in older ops; the cache is copied at every step"
    assert spelled.why == "the parser of TensorRT 10.3 does not know them"
    assert record.inputs["input_ids"].model_dump() == {
        "dtype": "int64", "min": (1, 1), "opt": (1, 1), "max": (2, 32), "is_shape": False
    }  # fmt: skip
    cache = record.inputs["past_key_values.0.key"]
    assert (cache.dtype, cache.min, cache.max) == ("float16", (1, 2, 32, 16), (2, 2, 32, 16))
    assert record.inputs["num_logits_to_keep"].is_shape
    assert record.outputs["logits"].shape == (-1, -1, 272)
    with pytest.raises(EngineMismatchError, match=r"holds a model for TensorRT 10\.3, and no engine is built of it"):
        check_engine(folder, "tensorrt")


@pytest.mark.usefixtures("no_tensorrt")
def test_a_model_with_plugins_for_another_machine(tmp_path: Path) -> None:
    heads = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    folder, portable = tmp_path / "tensorrt", tiny(tmp_path, "w3a3k3v3", **heads)
    given: dict[str, Any] = {"flavour": "tensorrt", "max_context": 40}
    record = build_engines(portable, folder, plugins="require", tensorrt_version="10.3.0", **given).record
    assert record.plugins is not None
    assert record.plugins.library is None
    assert set(record.plugins.versions) >= {"PlanishLinear", "PlanishKvAttend"}
    assert (record.plugins_asked, record.max_context) == ("require", 48)
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    assert {(each.domain, each.version) for each in proto.opset_import} == {("", 21), (DOMAIN, 1)}
    assert "RMSNormalization, RotaryEmbedding" in {each.what for each in record.fallbacks}
    with pytest.raises(EngineBuildError, match=r"Plugins of planish need TensorRT 10\.3 or later, .* for 10\.2\."):
        build_engines(portable, folder, plugins="require", tensorrt_version="10.2", **given)
    # What was there stays.
    assert json.loads((folder / "engine.json").read_text())["tensorrt"] == "10.3.0"
    assert build_engines(portable, folder, tensorrt_version="10.3", **given).record.plugins is None
