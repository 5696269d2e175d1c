"""The linears of SmolLM2 with compiled weights give what the portable model gives, layer by layer."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.pipeline.compile import compile_recipe
from planish.compiler.pipeline.recipe import Recipe
from planish.compiler.progress import Silent
from planish.plugins.kernel_weights import KernelLinear, kernel_linears
from planish.plugins.linear_ops import DeviceWeight, linear
from planish.plugins.token_ops import QuantizedTokens, TokenSegment, best_order, quantize_tokens
from tests.kernel_reference import natural_codes, quantized
from tests.onnx_run import session

Array = npt.NDArray[Any]
TEXT = "The quick brown fox jumps over the lazy dog, and every dog in the village begins to bark at once."


@dataclasses.dataclass(frozen=True)
class Probed:
    """One linear of the model and what flows through it.

    Attributes:
        linear: its weight, in kernel layout.
        x: float32 [tokens, k], in front of the transform that is behind the norm, if there is one.
        factors: "right" and "left" of that transform.
        clip: of the activations.
        codes: uint8 [tokens, k].
        scale: float32 [tokens].
        y: float32 [tokens, rows].
    """

    linear: KernelLinear
    x: Array
    factors: dict[str, Array]
    clip: float
    codes: Array
    scale: Array
    y: Array


def probed(bundle: Bundle, tokens: int) -> Iterator[Probed]:
    """Run the portable model on a text and yield every linear that has a kernel."""
    path = bundle.path / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    makers = {name: node for node in model.graph.node for name in node.output}
    weights = {each.name: each for each in model.graph.initializer}
    linears = {each.name: each for each in kernel_linears(path) if each.weight is not None}
    nodes = [node for node in model.graph.node if node.op_type.startswith("PlanishMatMul") and node.input[2] in linears]
    assert len(nodes) == len(linears) > 0

    def array(name: str) -> Array:
        tensor = weights[name]
        load_external_data_for_tensor(tensor, str(bundle.path))
        return numpy_helper.to_array(tensor)

    wanted: dict[str, int] = {}
    sites = []
    for node in nodes:
        quantiser = makers[node.input[0]]
        maker = makers.get(quantiser.input[0])
        transform = maker if maker is not None and maker.op_type.startswith("PlanishTransform") else None
        x = quantiser.input[0] if transform is None else transform.input[0]
        sites.append((node, quantiser, transform, x))
        wanted |= {x: onnx.TensorProto.FLOAT, node.input[0]: onnx.TensorProto.UINT8}
        wanted |= {node.input[1]: onnx.TensorProto.FLOAT, node.output[0]: onnx.TensorProto.FLOAT}
    for name, kind in wanted.items():
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    probe = path.with_name("probe.onnx")
    onnx.save(model, probe)
    ids = np.asarray(bundle.tokenizer.encode(TEXT * 4)[:tokens])[None]
    run = session(probe)
    found = dict(zip(wanted, run.run(list(wanted), feeds_of(run, ids)), strict=True))
    for node, quantiser, transform, x in sites:
        factors = {}
        if transform is not None:
            names = (["right"] if "Right" in transform.op_type or "Rows" in transform.op_type else []) + (
                ["left"] if "Left" in transform.op_type else []
            )
            factors = {name: array(each) for name, each in zip(names, transform.input[1:], strict=True)}
        (clip,) = (each.f for each in quantiser.attribute if each.name == "clip")
        yield Probed(
            linears[node.input[2]], found[x][0], factors, clip, found[node.input[0]][0],
            found[node.input[1]][0, :, 0], found[node.output[0]][0],
        )  # fmt: skip


def feeds_of(run: Any, ids: Array) -> dict[str, Array]:
    """Return the inputs of a model for one sequence behind an empty cache."""
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
    sizes = {"batch": 1, "past": 0}
    feeds: dict[str, Array] = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1])[None],
    }
    for each in run.get_inputs():
        if each.name.startswith("past_key_values."):
            feeds[each.name] = np.zeros([sizes.get(size, size) for size in each.shape], types[each.type])
    return feeds


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Bundle]:
    """Bundles that tests have compiled, by policy and layers."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 12, 40])
@pytest.mark.parametrize("policy", ["none", "fixed:affine"], ids=["none", "affine"])
def test_linears_give_the_portable_models_activations(
    policy: str,
    tokens: int,
    device: torch.device,
    bundles: dict[tuple[str, int], Bundle],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    layers = 30 if device.type == "cuda" else 1
    if (policy, layers) not in bundles:
        recipe = Recipe.read(None, model="smollm2", scheme="w3a3k3v3", select=policy, num_layers=layers)
        out: Path = tmp_path_factory.mktemp("bundles") / "bundle"
        bundles[policy, layers] = compile_recipe(recipe, out, Silent())
    checked = 0
    for each in probed(bundles[policy, layers], tokens):
        checked += 1
        assert each.linear.weight is not None
        assert each.linear.scale is not None
        weight = DeviceWeight.of(each.linear.weight, each.linear.scale, device)
        segments = [TokenSegment(weight.channels, each.linear.activation_bits, weight.bits, each.clip)]
        order = best_order(tokens, each.linear.activation_bits, device)
        factors = {name: torch.from_numpy(np.array(factor)).to(device) for name, factor in each.factors.items()}
        x = torch.from_numpy(np.array(each.x)).to(device)
        made = quantize_tokens(x, segments, order=order, **factors)
        codes = natural_codes(made, 0)[:, : weight.channels].numpy()
        np.testing.assert_allclose(made.scales[:, 0].cpu().numpy(), each.scale, rtol=1e-5)
        # Behind a transform a value between two codes may go either way, and never farther.
        apart = np.abs(codes - each.codes.astype(np.int64))
        assert apart.max() <= (1 if factors else 0)
        assert (apart > 0).mean() < 1e-3
        y = linear(with_codes_of(made, each), weight, dtype=torch.float32).cpu().numpy()
        np.testing.assert_allclose(y, each.y, rtol=1e-3, atol=1e-3 * np.abs(each.y).max())
    assert checked == 4 * layers


def with_codes_of(made: QuantizedTokens, portable: Probed) -> QuantizedTokens:
    """Return the portable model's own codes and scales, stored as those of `made`."""
    codes = torch.from_numpy(portable.codes.astype(np.int64))
    scales = torch.from_numpy(portable.scale[:, None].copy())
    return quantized([codes], scales, list(made.segments), made.order, made.codes.device)
