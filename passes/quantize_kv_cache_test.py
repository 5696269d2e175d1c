"""Quantising the cache: what goes in and out of the graph, and how many bytes it is."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.export.float_model import float_model, save_model
from planish.passes.quantize_kv_cache import QuantizeKvCachePass
from planish.passes.scheme import Scheme, SchemeError
from tests.onnx_run import CachedModel, range_error
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Heads of 64 channels, as most models have."""
    return open_checkpoint(write_tiny(tmp_path_factory.mktemp("tiny"), head_dim=64))


def quantized(checkpoint: Checkpoint, spelling: str) -> ir.Model:
    model = float_model(checkpoint)
    assert QuantizeKvCachePass(Scheme.parse(spelling))(model).modified
    return model


def described(values: list[ir.Value]) -> dict[str, str]:
    return {str(value.name): f"{value.dtype} {value.shape}" for value in values}


def test_inputs_and_outputs(checkpoint: Checkpoint) -> None:
    graph = quantized(checkpoint, "w16a16k3v2").graph
    inputs, outputs = described(list(graph.inputs)), described(list(graph.outputs))
    cache = [f"{i}.{part}{kind}" for i in range(2) for part in ("key", "value") for kind in ("", "_scale")]
    assert list(inputs) == [
        *("input_ids", "attention_mask", "position_ids"),
        *(f"past_key_values.{name}" for name in cache),
        "num_logits_to_keep",
    ]
    assert list(outputs) == ["logits", *(f"present.{name}" for name in cache)]
    assert inputs["past_key_values.1.key"] == "UINT8 [batch,2,past,24]"
    assert inputs["past_key_values.1.value"] == "UINT8 [batch,2,past,16]"
    assert inputs["past_key_values.1.value_scale"] == "FLOAT16 [batch,2,past,2]"
    assert outputs["present.0.key"] == "UINT8 [batch,2,total,24]"
    assert outputs["present.0.key_scale"] == "FLOAT16 [batch,2,total,2]"


def test_attention_is_replaced(checkpoint: Checkpoint) -> None:
    model = quantized(checkpoint, "w16a16k4v8")
    ops = [node.op_type for node in model.graph]
    assert "Attention" not in ops
    assert ops.count("PlanishAppendKv4") == ops.count("PlanishAppendKv8") == ops.count("PlanishAttendK4V8") == 2
    functions = {name for _, name, _ in model.functions}
    assert {"PlanishAppendKv4", "PlanishAppendKv8", "PlanishAttendK4V8", "PlanishPack4", "PlanishUnpack8"} <= functions


def test_clips_of_layers_and_sides(checkpoint: Checkpoint) -> None:
    clips = {(0, "key"): 0.9, (0, "value"): 0.8, (1, "key"): 0.7, (1, "value"): 0.6}
    model = float_model(checkpoint)
    QuantizeKvCachePass(Scheme.parse("w16a16k4v8"), lambda layer, site: clips[layer, site])(model)
    appends = {node.outputs[0].name: node for node in model.graph if node.op_type.startswith("PlanishAppendKv")}
    found = {name: round(node.attributes.get_float("clip"), 6) for name, node in appends.items()}
    assert found == {f"present.{layer}.{site}": clip for (layer, site), clip in clips.items()}
    unclipped = [node for node in quantized(checkpoint, "w16a16k4v8").graph if node.op_type.startswith("PlanishAppend")]
    assert [node.attributes.get_float("clip") for node in unclipped] == [1.0] * 4


def test_a_float_cache_stays(checkpoint: Checkpoint) -> None:
    model = float_model(checkpoint)
    before = described(list(model.graph.inputs))
    assert not QuantizeKvCachePass(Scheme.parse("w4a4"))(model).modified
    assert described(list(model.graph.inputs)) == before
    assert not model.functions


def test_nothing_left_to_quantise(checkpoint: Checkpoint) -> None:
    model = quantized(checkpoint, "w16a16k4v4")
    assert not QuantizeKvCachePass(Scheme.parse("w16a16k4v4"))(model).modified


@pytest.mark.parametrize(
    ("spelling", "smaller"),
    [("w16a16k2v2", 6.3), ("w16a16k3v3", 4.5), ("w16a16k4v4", 3.5), ("w16a16k8v8", 1.8), ("w16a16k3v2", 5.3)],
)
def test_bytes_of_the_cache(spelling: str, smaller: float, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """What comes out of the running graph, scales and zeros counted, against the same in float16."""
    model = CachedModel(save_model(quantized(checkpoint, spelling), tmp_path))
    cache = model(np.arange(3, 43)[None]).cache
    stored = sum(array.nbytes for array in cache.values())
    in_float16 = 2 * (2 * 2 * 64 * 40) * 2  # keys and values: layers, KV heads, channels, tokens; two bytes
    assert in_float16 / stored >= smaller
    assert stored == 40 * Scheme.parse(spelling).kv_bytes_per_token(layers=2, kv_heads=2, head_dim=64)


@pytest.mark.parametrize(("spelling", "least", "most"), [("w16a16k8v8", 1e-5, 0.02), ("w16a16k3v3", 0.01, 0.6)])
def test_logits_move_by_the_rounding_of_the_cache(
    spelling: str, least: float, most: float, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    ids = np.random.default_rng(0).integers(3, 272, (2, 24))
    exact = CachedModel(save_model(float_model(checkpoint), tmp_path / "float"))(ids).logits
    model = CachedModel(save_model(quantized(checkpoint, spelling), tmp_path / "low"))
    found = model(ids).logits
    assert least < range_error(found, exact) < most
    # New tokens go through the cache too, so it makes no difference when they come.
    assert range_error(model.in_chunks(ids, [10, 1, 13]), found) < 0.05 * most


def test_earlier_tokens_stay_as_they_were_stored(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = CachedModel(save_model(quantized(checkpoint, "w16a16k3v4"), tmp_path))
    ids = np.random.default_rng(1).integers(3, 272, (2, 9))
    before = model(ids[:, :6]).cache
    after = model(ids[:, 6:], cache=before).cache
    for name, array in before.items():
        np.testing.assert_array_equal(after[name][:, :, :6], array)
        assert after[name].shape[2] == 9


def test_heads_that_fill_no_byte(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path, head_dim=12))
    with pytest.raises(SchemeError, match="heads of a multiple of 8 channels, and this model's have 12"):
        QuantizeKvCachePass(Scheme.parse("w16a16k4v4"))(float_model(checkpoint))
