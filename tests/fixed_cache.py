"""Run a model in its TensorRT form, with a cache of fixed length, on ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from tests.onnx_run import positions

__all__ = ["FixedCacheModel", "plain_session"]

Array = npt.NDArray[Any]

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def plain_session(model: Path | onnx.ModelProto) -> ort.InferenceSession:
    """Load a model and run it node by node as it is written.

    Optimised, ONNX Runtime would fuse DequantizeLinear and MatMul into a product that rounds activations to 8 bits.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class FixedCacheModel:
    """A decoder whose caches are written at write_indices; keeps the caches between calls.

    Attributes:
        caches: name of the input -> the cache, [batch, kv_heads, context, head_dim].
    """

    def __init__(self, path: Path, batch: int, garbage: float = 0.0) -> None:
        self._session = plain_session(path)
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self.context = int(self._inputs["attention_mask"].shape[1])
        self.caches: dict[str, Array] = {
            name: np.full([batch, *value.shape[1:]], garbage, _DTYPES[value.type])
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
        names = [value.name for value in self._session.get_outputs()]
        made = dict(zip(names, self._session.run(names, feeds), strict=True))
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
