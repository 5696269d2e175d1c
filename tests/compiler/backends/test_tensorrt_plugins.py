"""A model with plugin nodes, run by an interpreter of the plugins, is the portable model that ONNX Runtime runs."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from planish.compiler.backends.tensorrt.lowering import Plugged, lower_to_tensorrt, plug
from planish.compiler.backends.tensorrt.parser_versions import check_ops
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.export.float_model import save_model
from planish.compiler.export.portable import portable_model
from planish.compiler.learn.transforms.transformed import TransformedCheckpoint
from planish.compiler.quantize.codes import quantize_checkpoint
from planish.passes.lower_defaults_to_tensorrt import LowerDefaultsToTensorrtPass
from planish.passes.lower_linears_to_tensorrt import LowerLinearsToTensorrtPass
from planish.passes.scheme import Scheme
from planish.passes.transforms import Transforms
from planish.plugins.ops import DOMAIN
from tests.flattening import random_transforms
from tests.high_impact import random_high_impact
from tests.onnx_run import CachedModel, range_error
from tests.plugin_host import load_host, need_headers
from tests.plugin_interpreter import PluginModel, hosted_plugins
from tests.tiny import write_tiny

Array = npt.NDArray[Any]
CONTEXT = 32
#: Heads that the kernels have.
HEADS: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 328, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64,
}  # fmt: skip
COUNTS = [np.array([7, 4]), np.array([1, 1]), np.array([1, 0]), np.array([2, 3])]


@dataclasses.dataclass(frozen=True)
class Case:
    portable: Path
    plugged: Plugged

    def nodes(self, op: str) -> list[ir.Node]:
        return [node for node in self.plugged.model.graph if node.op_type == op]


def case(
    folder: Path, scheme: str, form: str = "", high: bool = False, lm_head: str | None = None, **overrides: Any
) -> Case:
    """Return a tiny model, portable and with plugin nodes; `form` says which transforms it has, "" is none."""
    checkpoint = open_checkpoint(write_tiny(folder / "checkpoint", **{**HEADS, **overrides}))
    parsed = Scheme.parse(scheme, lm_head)
    transforms: Transforms | None = random_transforms(checkpoint.config, form) if form else None
    if high:
        assert transforms is not None
        transforms = transforms.with_high(random_high_impact(transforms))
    if transforms is None:
        codes = quantize_checkpoint(checkpoint, parsed, folder / "codes")
    else:
        folded = TransformedCheckpoint(checkpoint, transforms)
        codes = quantize_checkpoint(folded, parsed, folder / "codes", None, transforms.high)
    model, _ = portable_model(checkpoint, parsed, codes, transforms)
    portable = save_model(model, folder / "portable")
    work = folder / "work"
    work.mkdir()
    return Case(portable, plug(portable, work, CONTEXT))


def in_float32(model: ir.Model, folder: Path) -> Path:
    passes = ir.passes.Sequential(
        LowerLinearsToTensorrtPass(),
        LowerDefaultsToTensorrtPass(),
        common.InlinePass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
    )
    return save_model(passes(model.clone()).model, folder)


def error(portable: Path, plugged: Path, plugins: Any = None) -> float:
    """Return how far the logits of two sequences of different lengths lie apart, as a share of their range."""
    ids = np.random.default_rng(0).integers(3, 272, (2, 16))
    ours, theirs, worst = PluginModel(plugged, 2, plugins), CachedModel(portable), 0.0
    caches: list[Any] = [None, None]
    seen = np.array([0, 0])
    for counts in COUNTS:
        tokens = np.full((2, counts.max()), 3)
        for b, count in enumerate(counts):
            tokens[b, :count] = ids[b, seen[b] : seen[b] + count]
        logits = ours(tokens, counts)
        for b, count in enumerate(counts):
            if count:
                mask = np.ones((1, seen[b] + count), np.int64)
                step = theirs(tokens[b : b + 1, :count], mask, caches[b])
                caches[b] = step.cache
                worst = max(worst, range_error(logits[b : b + 1, :count], step.logits))
        seen = seen + counts
    return worst


@pytest.mark.parametrize(
    ("scheme", "form", "high"),
    [
        ("w3a3k3v3", "", False),
        ("w2a4k4v2", "scale rows left", False),
        ("w4a8k8v8", "right left", False),
        ("w3a3k2v3", "right", False),
        ("w3a3k3v3", "left", False),
        ("w3a3k3v3", "scale rows left", True),
        ("w2a3k3v3", "scale", True),
    ],
)
def test_the_logits_are_those_of_the_portable_model(scheme: str, form: str, high: bool, tmp_path: Path) -> None:
    made = case(tmp_path, scheme, form, high)
    assert error(made.portable, in_float32(made.plugged.model, tmp_path / "lowered")) < 1e-5
    # Everything but lm_head, whose 8 bits have no kernel.
    assert {left.node for left in made.plugged.left_out} == {"lm_head.product"}
    assert "weights of 8 bits have no kernel" in made.plugged.left_out[0].why
    assert len(made.nodes("PlanishLinear")) == 8
    assert len(made.nodes("PlanishKvAppend")) == len(made.nodes("PlanishKvAttend")) == 2
    assert not any(
        node.op_type.startswith(("PlanishMatMul2", "PlanishMatMul3", "PlanishMatMul4"))
        for node in made.plugged.model.graph
    )


def test_transforms_and_high_impact_channels_are_part_of_a_plugin(tmp_path: Path) -> None:
    made = case(tmp_path, "w3a3k3v3", "scale rows left", high=True)
    tokens = {
        str(node.name).removesuffix(".input.quantized"): node.attributes for node in made.nodes("PlanishQuantizeTokens")
    }
    high = {name: attributes.get_int("high_channels") for name, attributes in tokens.items()}
    assert high["model.layers.0.self_attn.qkv_proj"] == 64
    assert high["model.layers.0.self_attn.o_proj"] == 128
    assert high["model.layers.0.mlp.gate_up_proj"] == 0
    assert all(attributes.get_int("has_left") == 1 for attributes in tokens.values())
    # The key map and its inverse on the queries are no linear's.
    left = {str(node.name) for node in made.plugged.model.graph if node.op_type.startswith("PlanishTransform")}
    assert all("key_map" in name or "query_map" in name for name in left)
    assert left


def test_norms_residuals_and_gates_are_part_of_a_plugin(tmp_path: Path) -> None:
    made = case(tmp_path, "w3a3k3v3", "scale rows left", high=True)
    fused = {
        str(node.name).removeprefix("model.layers.").removesuffix(".input.quantized"): tuple(
            node.attributes.get_int(name) for name in ("added", "normed")
        )
        for node in made.nodes("PlanishQuantizeTokens")
    }
    assert fused == {
        # Nothing is added to the embedding.
        "0.self_attn.qkv_proj": (0, 1), "0.self_attn.o_proj": (0, 0),
        "0.mlp.gate_up_proj": (1, 1), "0.mlp.down_proj": (0, 0),
        "1.self_attn.qkv_proj": (1, 1), "1.self_attn.o_proj": (0, 0),
        "1.mlp.gate_up_proj": (1, 1), "1.mlp.down_proj": (0, 0),
    }  # fmt: skip
    gated = {str(node.name) for node in made.nodes("PlanishLinear") if node.attributes.get_int("gated")}
    assert gated == {f"model.layers.{i}.mlp.gate_up_proj.product" for i in range(2)}
    left = {node.op_type: str(node.name) for node in made.plugged.model.graph}
    assert left["RMSNormalization"] == "model.norm"
    assert "Sigmoid" not in left


@pytest.mark.parametrize(
    ("overrides", "gated"),
    [({"mlp_bias": True}, 0), ({"intermediate_size": 332}, 0), ({"attention_bias": True}, 2)],
    ids=["a bias behind gate and up", "rows that do not come in sixteens", "a bias that is no residual"],
)
def test_what_no_kernel_takes_stays_outside(overrides: Any, gated: int, tmp_path: Path) -> None:
    made = case(tmp_path, "w4a8k8v8", **overrides)
    assert sum(node.attributes.get_int("gated") for node in made.nodes("PlanishLinear")) == gated
    assert sum(node.attributes.get_int("added") for node in made.nodes("PlanishQuantizeTokens")) == 3
    assert error(made.portable, in_float32(made.plugged.model, tmp_path / "lowered")) < 1e-5


@pytest.mark.parametrize(
    ("scheme", "form", "high"), [("w3a3k3v3", "scale rows left", True), ("w2a4k4v2", "right", False)]
)
def test_the_library_itself_gives_the_logits_of_the_portable_model(
    scheme: str, form: str, high: bool, tmp_path: Path
) -> None:
    need_headers()
    made = case(tmp_path, scheme, form, high)
    plugins = hosted_plugins(load_host())
    assert error(made.portable, in_float32(made.plugged.model, tmp_path / "lowered"), plugins) < 1e-5


def test_a_model_with_plugins_for_an_older_parser(tmp_path: Path) -> None:
    made = case(tmp_path, "w4a8k8v8", "rows left")
    older, newer = (lower_to_tensorrt(made.plugged.model, CONTEXT, version) for version in ((10, 3), None))
    check_ops(older, (10, 3))
    assert not older.functions
    paths = [save_model(model, tmp_path / name) for model, name in ((older, "older"), (newer, "newer"))]
    ids = np.random.default_rng(0).integers(3, 272, (2, 7))
    found, expected = (PluginModel(path, 2)(ids, np.array([7, 4])) for path in paths)
    assert range_error(found[0], expected[0]) < 1e-5
    assert range_error(found[1, :4], expected[1, :4]) < 1e-5
    types = {str(value.name): value.dtype for value in older.graph.inputs}
    assert types["past_key_values.0.key"] == ir.DataType.INT32


def test_in_float16_the_logits_are_near(tmp_path: Path) -> None:
    # Key maps and lm_head run in float16; what that costs a random model, which amplifies it through its codes.
    made = case(tmp_path, "w4a8k8v8", "rows left")
    lowered = lower_to_tensorrt(made.plugged.model, CONTEXT)
    assert not lowered.functions
    assert {node.op_type for node in lowered.graph if node.domain} == {
        "PlanishQuantizeTokens", "PlanishLinear", "PlanishKvAppend", "PlanishKvAttend",
    }  # fmt: skip
    types = {str(value.name): value.dtype for value in (*lowered.graph.inputs, *lowered.graph.outputs)}
    assert types["past_key_values.0.key"] == types["present.1.value"] == ir.DataType.INT32
    assert types["past_key_values.0.key_scale"] == types["present.1.value_scale"] == ir.DataType.FLOAT16
    assert types["logits"] == ir.DataType.FLOAT
    path = save_model(lowered, tmp_path / "lowered")
    assert error(made.portable, path) < 0.06
    # Untouched weights and repacked ones lie in one file.
    onnx.checker.check_model(str(path))


@pytest.mark.parametrize(
    ("overrides", "scheme", "why"),
    [
        ({"head_dim": 48}, "w3a3k3v3", "heads of 48 channels have no kernel; heads of 64, 96 and 128 channels have"),
    ],
)
def test_a_cache_without_a_kernel_is_left_out(overrides: Any, scheme: str, why: str, tmp_path: Path) -> None:
    made = case(tmp_path, scheme, **overrides)
    left = [each for each in made.plugged.left_out if "attended" in each.node]
    assert len(left) == 2
    assert why in left[0].why
    lowered = lower_to_tensorrt(made.plugged.model, CONTEXT)
    assert "attention_mask" in {value.name for value in lowered.graph.inputs}
    assert any(node.op_type == "TensorScatter" for node in lowered.graph)
    assert any(node.op_type == "PlanishLinear" for node in lowered.graph)


def test_grouped_scales_and_float_activations_are_left_out(tmp_path: Path) -> None:
    grouped = case(tmp_path / "grouped", "w4a4k4v4g32")
    assert {each.why for each in grouped.plugged.left_out if "layers" in each.node} == {
        "PlanishLinear: 6 weight scales to an output channel have no kernel; one has",
        "PlanishLinear: 11 weight scales to an output channel have no kernel; one has",
    }
    assert not grouped.nodes("PlanishLinear")
    floats = case(tmp_path / "floats", "w3a16k3v3")
    assert not floats.nodes("PlanishLinear")
    assert len(floats.nodes("PlanishKvAttend")) == 2


def test_the_portable_model_stays_as_it_was(tmp_path: Path) -> None:
    made = case(tmp_path, "w3a3k3v3")
    before = {path.name: path.read_bytes() for path in made.portable.parent.iterdir()}
    save_model(lower_to_tensorrt(made.plugged.model, CONTEXT), tmp_path / "lowered")
    assert {path.name: path.read_bytes() for path in made.portable.parent.iterdir()} == before
    assert {node.domain for node in made.plugged.model.graph} == {"", DOMAIN}
