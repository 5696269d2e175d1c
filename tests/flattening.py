"""Random transforms, tiny float graphs in float32 and float64, and whether passes leave their logits alone."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.export.decoder import build_decoder
from planish.compiler.export.float_model import save_model
from planish.passes.sequence import run_passes
from planish.passes.transforms import LayerTransforms, Transform, Transforms
from tests.onnx_run import CachedModel, positions, range_error
from tests.tiny import VARIANTS, write_tiny

__all__ = [
    "FORMS",
    "assert_same_logits",
    "config_of",
    "graph_of",
    "initializer",
    "random_transforms",
    "run_float64",
    "weights_of",
]

Array = npt.NDArray[Any]

#: Which factors a random transform has.
FORMS = ("right", "rows", "left", "right left", "rows left", "scale", "scale rows left", "scale right")

IDS = np.random.default_rng(5).integers(3, 272, (2, 11))
MASK = np.ones_like(IDS)
MASK[1, :3] = 0
CHUNKS = (8, 1, 2)


@functools.cache
def weights_of(variant: str) -> tuple[LlamaConfig, dict[str, Array]]:
    """Return the config and the float32 tensors of a tiny checkpoint of a variant."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(write_tiny(Path(folder), **VARIANTS[variant]))
        return checkpoint.config, {name: checkpoint.tensor(name).copy() for name in checkpoint.names()}


def config_of(variant: str) -> LlamaConfig:
    """Return the config of a variant."""
    return weights_of(variant)[0]


def graph_of(variant: str, dtype: type[np.floating[Any]] = np.float32) -> ir.Model:
    """Return the float graph of a variant with weights, inputs and arithmetic of `dtype`."""
    config, weights = weights_of(variant)

    def weight(name: str, transpose: bool) -> ir.TensorProtocol:
        array = weights[name].astype(dtype)
        return ir.Tensor(np.ascontiguousarray(array.T if transpose else array), name=name)

    model = build_decoder(config, weight)
    if dtype == np.float64:
        _widen(model.graph)
    return model


def _widen(graph: ir.Graph) -> None:
    double = ir.TensorType(ir.DataType.DOUBLE)
    for node in graph:
        if node.op_type == "Cast" and node.attributes.get_int("to") == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.DOUBLE))
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT:
            value.type = double
            if value.const_value is not None:
                value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float64), name=value.name)


def random_matrix(rng: np.random.Generator, n: int, count: int | None = None) -> Array:
    """Return an invertible matrix of condition 4 at most, or `count` of them."""
    shape = (n, n) if count is None else (count, n, n)
    U, V = (np.linalg.qr(rng.standard_normal(shape))[0] for _ in range(2))
    return U * np.exp(rng.uniform(-0.7, 0.7, (*shape[:-2], 1, n))) @ V


def random_transform(rng: np.random.Generator, form: str, rows: int, columns: int) -> Transform:
    """Return a transform of rows x columns channels with the factors that `form` names."""
    parts = form.split()
    right = 1 if "right" in parts else rows if "rows" in parts else None
    return Transform(
        rows * columns,
        "affine",
        scale=np.exp(rng.uniform(-1, 1, rows * columns)) if "scale" in parts else None,
        right=None if right is None else random_matrix(rng, columns, right),
        left=random_matrix(rng, rows) if "left" in parts else None,
    )


def random_transforms(
    config: LlamaConfig, form: str = "scale rows left", residual: bool = False, head: bool = False
) -> Transforms:
    """Return transforms of every layer and site; `form` says which factors those between linears have.

    With `residual` the stream is rotated, with `head` the input of lm_head has a channel scale.
    """
    rng = np.random.default_rng(len(form))
    hidden, inner = (_grid(n) for n in (config.hidden_size, config.intermediate_size))
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    of_heads = "right" if form.endswith("right") else "rows"

    def layer() -> LayerTransforms:
        return LayerTransforms(
            attn_in=random_transform(rng, form, *hidden),
            attn_out=random_transform(rng, form.replace("scale", "").strip(), heads, config.head_dim),
            ffn_in=random_transform(rng, form, *hidden),
            ffn_out=random_transform(rng, form, *inner),
            key=random_transform(rng, of_heads, kv_heads, config.head_dim),
            value=random_transform(rng, of_heads, kv_heads, config.head_dim),
            clips={"attn_in": 0.99, "ffn_out": 0.97},
        )

    R = np.linalg.qr(rng.standard_normal((config.hidden_size, config.hidden_size)))[0]
    layers = tuple(layer() for _ in range(config.num_hidden_layers))
    scale = np.exp(rng.uniform(-1, 1, config.hidden_size))
    return Transforms(layers, R if residual else None, scale if head else None)


def _grid(n: int) -> tuple[int, int]:
    rows = max(m for m in range(1, int(n**0.5) + 1) if n % m == 0)
    return rows, n // rows


def initializer(model: ir.Model, name: str) -> Array:
    """Return what the initializer called `name` holds."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    assert tensor.name == name
    array: Array = tensor.numpy()
    assert (array.shape, array.dtype) == (tensor.shape.numpy(), tensor.dtype.numpy())
    return array


def assert_same_logits(
    variant: str,
    passes: Sequence[ir.passes.PassBase],
    folder: Path,
    *,
    before: Sequence[ir.passes.PassBase] = (),
) -> None:
    """Check that `passes` leave the logits of a padded batch, prefilled and decoded, as they are behind `before`.

    In float32 by ONNX Runtime, to 1e-4 of their range; in float64 by onnx's evaluator, to 1e-9.
    """
    for dtype, run, tolerance in ((np.float32, _in_ort, 1e-4), (np.float64, _in_float64, 1e-9)):
        model = run_passes(graph_of(variant, dtype), before)
        expected = run(model, folder / "before")
        for each in passes:
            assert each(model).modified
        found = run(model, folder / "after")
        assert found.dtype == expected.dtype == dtype
        error = range_error(found[MASK == 1], expected[MASK == 1])
        assert error < tolerance


def _in_float64(model: ir.Model, folder: Path) -> Array:
    return run_float64(model)[0]


def _in_ort(model: ir.Model, folder: Path) -> Array:
    return CachedModel(save_model(model, folder)).in_chunks(IDS, list(CHUNKS), MASK)


def run_float64(model: ir.Model) -> tuple[Array, dict[str, Array]]:
    """Return the logits of the padded batch and the cache behind it, by onnx's evaluator."""
    evaluator = ReferenceEvaluator(ir.to_proto(model))
    inputs = {str(value.name): value for value in model.graph.inputs}
    shapes = {name: list(value.shape or []) for name, value in inputs.items() if name.startswith("past")}
    cache = {name: np.zeros((len(IDS), shape[1], 0, shape[3])) for name, shape in shapes.items()}
    names, logits, start = [str(value.name) for value in model.graph.outputs], [], 0
    for size in CHUNKS:
        end = start + size
        feeds = {
            "input_ids": IDS[:, start:end],
            "attention_mask": MASK[:, :end],
            "position_ids": positions(MASK)[:, start:end],
            "num_logits_to_keep": np.array(0),
            **cache,
        }
        made = dict(zip(names, evaluator.run(names, feeds), strict=True))
        logits.append(made.pop("logits"))
        cache = {name.replace("present.", "past_key_values."): value for name, value in made.items()}
        start = end
    return np.concatenate(logits, 1), cache
