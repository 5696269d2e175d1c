"""All flattening passes in their order."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
import torch

from planish.compiler.backends.ort import lower_to_ort
from planish.compiler.backends.tensorrt.lowering import lower_to_tensorrt
from planish.compiler.backends.tensorrt.preflight import refused_nodes
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.export.float_model import float_model, save_model
from planish.compiler.quantize.arithmetic import quantize_weight
from planish.passes.codes import PackedWeight
from planish.passes.flatten import flatten_passes
from planish.passes.fold_channel_scale import FoldChannelScalePass
from planish.passes.fold_transform_into_weights import FoldTransformIntoWeightsPass
from planish.passes.insert_online_transform import InsertOnlineTransformPass
from planish.passes.merge_linears import MergeLinearsPass
from planish.passes.quantize_kv_cache import QuantizeKvCachePass
from planish.passes.quantize_linears import QuantizeLinearsPass
from planish.passes.scheme import Scheme
from planish.passes.sequence import run_passes
from planish.passes.untie_embeddings import UntieEmbeddingsPass
from planish.plugins.packing import pack
from tests.fixed_cache import FixedCacheModel
from tests.flattening import FORMS, assert_same_logits, config_of, graph_of, initializer, random_transforms
from tests.onnx_run import CachedModel, range_error
from tests.tiny import VARIANTS, write_tiny


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_stay(variant: str, head: bool, residual: bool, tmp_path: Path) -> None:
    transforms = random_transforms(config_of(variant), residual=residual, head=head)
    passes = flatten_passes(transforms)
    if (residual or head) and variant != "tied":
        passes = passes[1:]  # nothing to untie
    assert_same_logits(variant, passes, tmp_path)


def test_order() -> None:
    def names(residual: bool, head: bool = False) -> list[str]:
        transforms = random_transforms(config_of("gqa"), residual=residual, head=head)
        return [type(each).__name__ for each in flatten_passes(transforms)]

    local = ["FoldValueMap", "FoldChannelScale", "InsertOnlineTransform", "FoldTransformIntoWeights", "InsertKeyMap"]
    assert names(False) == [f"{name}Pass" for name in local]
    assert names(True) == [
        f"{name}Pass" for name in ("UntieEmbeddings", "FoldNormGain", "FoldResidualRotation", *local)
    ]
    assert names(False, head=True) == [f"{name}Pass" for name in ("UntieEmbeddings", "FoldHeadScale", *local)]
    assert names(True, head=True)[2:4] == ["FoldResidualRotationPass", "FoldHeadScalePass"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, tmp_path: Path) -> None:
    transforms = random_transforms(config_of("attention_bias"), form, residual=True)
    idle: tuple[type[ir.passes.PassBase], ...] = (UntieEmbeddingsPass,)
    if "scale" not in form:
        idle += (FoldChannelScalePass,)
    if form == "scale":
        idle += (InsertOnlineTransformPass, FoldTransformIntoWeightsPass)
    passes = [each for each in flatten_passes(transforms) if not isinstance(each, idle)]
    assert_same_logits("attention_bias", passes, tmp_path)


def test_nothing_is_read_and_weights_keep_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path))
    model = float_model(checkpoint)
    before = {name: str(value.shape) for name, value in model.graph.initializers.items()}
    reads: list[str] = []
    read = checkpoint._read
    monkeypatch.setattr(checkpoint, "_read", lambda name: reads.append(name) or read(name))  # type: ignore[func-returns-value]
    run_passes(model, flatten_passes(random_transforms(checkpoint.config, residual=True, head=True)))
    # Gains are looked at, to see whether they are one; matrices are not.
    assert not [name for name in reads if "norm" not in name]
    reads.clear()
    after = {name: str(value.shape) for name, value in model.graph.initializers.items()}
    assert before.items() <= after.items()
    save_model(model, tmp_path / "model")
    matrices = [name for name in reads if "norm" not in name]
    assert sorted(matrices) == sorted(name for name in checkpoint.names() if "norm" not in name)


# Quantised and lowered


class FoldedCodes:
    """The codes of the weights of a flattened graph."""

    def __init__(self, model: ir.Model, scheme: Scheme) -> None:
        self._weights = {
            name: initializer(model, name) for name in model.graph.initializers if name.endswith(".weight")
        }
        self._scheme = scheme

    def out_features(self, module: str) -> int:
        return self._rows(module).shape[0]

    def read(self, module: str) -> PackedWeight:
        form = self._scheme.lm_head if module == "lm_head" else self._scheme.linear
        quantized = quantize_weight(torch.from_numpy(self._rows(module)), form)
        return PackedWeight(pack(quantized.codes.numpy(), form.weight_bits), quantized.scale.numpy())

    def _rows(self, module: str) -> npt.NDArray[np.float32]:
        weight = self._weights[f"{module}.weight"]
        return np.ascontiguousarray(weight if module == "lm_head" else weight.T)


def quantized(variant: str) -> tuple[ir.Model, ir.Model]:
    """Return the float graph of a variant, and the flattened one in eight bits, with clips."""
    transforms = random_transforms(config_of(variant), residual=True, head=True)
    model, scheme = run_passes(graph_of(variant), flatten_passes(transforms)), Scheme.parse("w8a8k8v8")
    quantize = QuantizeLinearsPass(scheme, FoldedCodes(model, scheme), transforms.clip)
    passes = [MergeLinearsPass(), quantize, QuantizeKvCachePass(scheme), common.RemoveUnusedNodesPass()]
    return graph_of(variant), run_passes(model, passes)


IDS = np.random.default_rng(1).integers(3, 272, (2, 9))
SIZES = [6, 1, 2]


@pytest.mark.parametrize("variant", ["gqa", "attention_bias", "tied"])
def test_quantised_and_lowered(variant: str, tmp_path: Path) -> None:
    before, model = quantized(variant)
    expected = CachedModel(save_model(before, tmp_path / "float")).in_chunks(IDS, SIZES)
    online = [node.op_type for node in model.graph if node.op_type.startswith("PlanishTransform")]
    assert len(online) == 2 * (4 + 2)
    inputs = {str(node.outputs[0].name): node for node in model.graph if node.op_type == "PlanishQuantizeActivation"}
    clips = {name: round(node.attributes.get_float("clip"), 3) for name, node in inputs.items()}
    assert sorted(set(clips.values())) == [0.97, 0.99, 1]
    portable = CachedModel(save_model(model, tmp_path / "portable")).in_chunks(IDS, SIZES)
    engine = FixedCacheModel(save_model(lower_to_tensorrt(model, 16), tmp_path / "tensorrt"), len(IDS))
    tensorrt = engine.in_chunks(IDS, SIZES, np.ones_like(IDS))
    lowered = lower_to_ort(model)
    assert not model.functions
    integers = CachedModel(save_model(lowered, tmp_path / "ort")).in_chunks(IDS, SIZES)
    for found in (portable, integers, tensorrt):
        assert np.sqrt(np.mean((found - expected) ** 2)) < 0.15 * expected.std()
    # Among themselves they round the same numbers, but for ties; float16 is what TensorRT computes in.
    assert range_error(integers, portable) < 1e-2
    assert range_error(tensorrt, portable) < 5e-2


@pytest.mark.trt
def test_tensorrt_parses_it(tmp_path: Path) -> None:
    import tensorrt_rtx as trt

    path = save_model(lower_to_tensorrt(quantized("gqa")[1], 16), tmp_path)
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), refused_nodes(parser)
