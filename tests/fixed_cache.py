"""Run a model in its TensorRT form, with a cache of fixed length, without TensorRT."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from tests.onnx_run import positions

__all__ = ["FixedCacheModel", "plain_session"]

Array = npt.NDArray[Any]


def plain_session(model: Path | onnx.ModelProto) -> ort.InferenceSession:
    """Load a model and run it node by node as it is written.

    Optimised, ONNX Runtime would fuse DequantizeLinear and MatMul into a product that rounds activations to 8 bits.
    It has few float16 kernels and drops the casts around those it lacks: to see float16 round, use onnx's evaluator.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class FixedCacheModel:
    """A decoder whose caches are written at write_indices; keeps the caches between calls.

    Args:
        path: the model.
        batch: sequences.
        garbage: what the empty cache holds.
        float16: run in numpy, which rounds every float16 result, and not in ONNX Runtime.

    Attributes:
        caches: name of the input -> the cache, [batch, kv_heads, context, head_dim].
    """

    def __init__(self, path: Path, batch: int, garbage: float = 0.0, *, float16: bool = False) -> None:
        onnx.checker.check_model(str(path))
        self._run = (ReferenceEvaluator(onnx.load(path)) if float16 else plain_session(path)).run
        graph = ir.load(path).graph
        self._outputs = [str(value.name) for value in graph.outputs]
        self._inputs = {str(value.name): value for value in graph.inputs}
        self.context = self._shape("attention_mask")[1]
        self.caches: dict[str, Array] = {
            name: np.full([batch, *self._shape(name)[1:]], garbage, value.dtype.numpy())  # type: ignore[union-attr]
            for name, value in self._inputs.items()
            if name.startswith("past_key_values.")
        }

    def __call__(self, ids: Array, mask: Array, past: int, keep: int = 0) -> Array:
        """Return the logits of `ids` [batch, sequence] behind `past` slots; `mask` is [batch, past + sequence]."""
        whole = np.zeros((len(ids), self.context), np.int64)
        whole[:, : mask.shape[1]] = mask
        feeds = {
            "input_ids": ids,
            "attention_mask": whole,
            "write_indices": np.full(len(ids), past, np.int64),
            "position_ids": positions(mask)[:, past:],
            "num_logits_to_keep": np.array(keep),
            **self.caches,
        }
        feeds = {name: value for name, value in feeds.items() if name in self._inputs}
        made = dict(zip(self._outputs, self._run(self._outputs, feeds), strict=True))
        logits: Array = made.pop("logits")
        self.caches = {name.replace("present.", "past_key_values."): value for name, value in made.items()}
        return logits

    def in_chunks(self, ids: Array, sizes: list[int], mask: Array) -> Array:
        """Return the logits of `ids`, fed in chunks of `sizes` tokens."""
        logits, start = [], 0
        for size in sizes:
            end = start + size
            logits.append(self(ids[:, start:end], mask[:, :end], start))
            start = end
        assert start == ids.shape[1]
        return np.concatenate(logits, 1)

    def _shape(self, name: str) -> list[int]:
        return [dim if isinstance(dim, int) else -1 for dim in self._inputs[name].shape or []]
