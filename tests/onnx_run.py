"""Run models and single ops in ONNX Runtime, and say how far results lie apart."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

from planish.plugins.ops import DOMAIN, OPSET, Op

__all__ = ["CachedModel", "Step", "greedy", "op_model", "positions", "range_error", "run_op", "session"]

Array = npt.NDArray[Any]
Cache = dict[str, Array]

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}


def session(model: Path | onnx.ModelProto) -> ort.InferenceSession:
    """Load a model, on one thread: test workers share the cores."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def positions(mask: Array) -> Array:
    """Return the position of every token of a left-padded batch; padding gets 0."""
    return np.maximum(mask.cumsum(1) - 1, 0)


class Step(NamedTuple):
    """What one call of a model gives."""

    logits: Array
    cache: Cache


class CachedModel:
    """A decoder with its cache inputs and outputs tied together."""

    def __init__(self, path: Path) -> None:
        self.session = session(path)
        self.cache_inputs = {
            value.name: (value.shape, _DTYPES[value.type])
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def empty_cache(self, batch: int) -> Cache:
        """Return the cache before the first token."""
        sizes = {"batch": batch, "past": 0}
        return {
            name: np.zeros([sizes.get(dim, dim) for dim in shape], dtype)
            for name, (shape, dtype) in self.cache_inputs.items()
        }

    def __call__(
        self, ids: Array, mask: Array | None = None, cache: Cache | None = None, keep: int | None = None
    ) -> Step:
        """Run int64 `ids` [batch, sequence] behind `cache`; `mask` is int64 [batch, past + sequence]."""
        cache = cache or self.empty_cache(len(ids))
        past = next(iter(cache.values())).shape[2]
        mask = np.ones((len(ids), past + ids.shape[1]), np.int64) if mask is None else mask
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)[:, past:], **cache}
        if keep is not None:
            feeds["num_logits_to_keep"] = np.array(keep)
        names = [value.name for value in self.session.get_outputs()]
        made = dict(zip(names, self.session.run(names, feeds), strict=True))
        logits = made.pop("logits")
        return Step(logits, {name.replace("present.", "past_key_values."): value for name, value in made.items()})

    def in_chunks(self, ids: Array, sizes: list[int], mask: Array | None = None) -> Array:
        """Return the logits of `ids`, fed in chunks of `sizes` tokens with the cache carried over."""
        mask = np.ones_like(ids) if mask is None else mask
        cache, logits, start = None, [], 0
        for size in sizes:
            end = start + size
            step = self(ids[:, start:end], mask[:, :end], cache)
            cache, start = step.cache, end
            logits.append(step.logits)
        assert start == ids.shape[1]
        return np.concatenate(logits, 1)


def greedy(model: CachedModel, ids: Array, mask: Array, tokens: int) -> Array:
    """Return the `tokens` tokens of highest logit that follow each row of a left-padded batch."""
    chosen: list[Array] = []
    cache: Cache | None = None
    for _ in range(tokens):
        logits, cache = model(ids, mask, cache, keep=1)
        ids = logits[:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
        chosen.append(ids)
    return np.concatenate(chosen, 1)


def range_error(found: Array, expected: Array) -> float:
    """Return the largest difference as a share of the range of what is expected."""
    return float(np.abs(found - expected).max() / (expected.max() - expected.min()))


def op_model(op: Op, inputs: Mapping[str, Array], **attributes: Any) -> ir.Model:
    """Return a model of one node, the op, with its functions; `inputs` give the types."""
    types = {name: ir.TensorType(ir.DataType.from_numpy(array.dtype)) for name, array in inputs.items()}
    values = [ir.Value(name=name, type=types[name], shape=ir.Shape([None] * inputs[name].ndim)) for name in inputs]
    node = ir.node(op.name, values, attributes, domain=DOMAIN, num_outputs=len(op.outputs))
    for name, value in zip(op.outputs, node.outputs, strict=True):
        value.name = name
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": OPSET, DOMAIN: 1}, name=op.name)
    return ir.Model(graph, ir_version=11, functions=op.functions())


def run_op(op: Op, inputs: Mapping[str, Array], **attributes: Any) -> list[Array]:
    """Run one planish op by its function body and return its outputs."""
    assert list(inputs) == list(op.inputs)
    model = ir.to_proto(op_model(op, inputs, **attributes))
    return session(model).run(None, dict(inputs))
