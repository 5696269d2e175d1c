"""Verify that graph passes leave the logits alone: run the float graph before the first pass and after every one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.errors import AccuracyError
from planish.compiler.export.decoder import build_decoder
from planish.compiler.export.streaming import CheckpointTensor
from planish.passes.flatten import flatten_passes
from planish.passes.merge_linears import MergeLinearsPass
from planish.passes.transforms import Transforms

__all__ = ["PASS_TOLERANCE", "PassDrift", "verify_flattening", "verify_passes"]

#: Largest difference of a logit, as a share of the range of the logits, that float32 arithmetic may make.
PASS_TOLERANCE = 1e-4
#: Tokens of the vocabulary that `verify_flattening` keeps.
_VOCABULARY = 256
#: The input: one row is padded on the left; after the prefill two calls go through the cache.
_STEPS = (9, 1, 2)
_PADDING = 3
#: Initializers of more elements than this are fed to ONNX Runtime as they are, not written into the model.
_LARGE = 1024
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class PassDrift:
    """How far the logits are, after a pass, from those before the first one.

    Attributes:
        name: of the pass.
        drift: largest difference of a logit over the range of the logits.
    """

    name: str
    drift: float


def verify_flattening(checkpoint: Checkpoint, transforms: Transforms, layers: int = 2) -> tuple[PassDrift, ...]:
    """Verify what `transforms` do to the first `layers` blocks of `checkpoint`, and the merging of linears.

    It takes the time and memory of those blocks and of a few rows of the vocabulary, whatever the size of the model;
    nothing is written to disk.

    Raises:
        AccuracyError: naming the first pass that changes what the model computes.
    """
    layers = min(layers, checkpoint.config.num_hidden_layers)
    passes = [*flatten_passes(transforms.first(layers)), MergeLinearsPass()]
    return verify_passes(_first_blocks(checkpoint, layers), passes)


def verify_passes(model: ir.Model, passes: Sequence[ir.passes.PassBase]) -> tuple[PassDrift, ...]:
    """Run `passes` on a float decoder graph, and after each of them the graph on random tokens, padded and cached.

    Args:
        model: float32, its weights lazy or not; it is consumed.
        passes: each of them to leave the logits as they are.

    Returns:
        The drift after each pass.

    Raises:
        AccuracyError: naming the first pass after which the logits differ by more than `PASS_TOLERANCE`.
    """
    runner = _Runner()
    expected = runner.logits(model)
    span = float(expected.max() - expected.min())
    drifts = []
    for each in passes:
        model = each(model).model
        drift = float(np.abs(runner.logits(model) - expected).max()) / span
        name = type(each).__name__
        if not drift <= PASS_TOLERANCE:
            raise AccuracyError(
                f"{name} changes what the model computes: the logits move by {drift:.2g} of their range "
                f"(bound {PASS_TOLERANCE:g}). If the transforms are close to singular, compile with others; "
                "otherwise please report it with the recipe."
            )
        drifts.append(PassDrift(name, drift))
    return tuple(drifts)


class _Runner:
    """Runs a graph whose weights are in memory; one that no pass touched since the last run is not read again."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[ir.TensorProtocol, Array]] = {}

    def logits(self, model: ir.Model) -> Array:
        """Return the logits of the real tokens, float32 [tokens, vocab], prefilled and decoded."""
        inputs = {str(value.name): value for value in model.graph.inputs}
        outputs = [str(value.name) for value in model.graph.outputs]
        ids = np.random.default_rng(0).integers(0, _sizes(model.graph.outputs[0])[2], (2, sum(_STEPS)))
        mask = np.ones_like(ids)
        mask[1, :_PADDING] = 0
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        caches = {name: _sizes(value) for name, value in inputs.items() if name.startswith("past_key_values.")}
        state = {name: np.zeros((len(ids), heads, 0, n), np.float32) for name, (_, heads, _, n) in caches.items()}
        session, weights = self._load(model)
        logits, start = [], 0
        for step in _STEPS:
            end = start + step
            tokens = {
                "input_ids": ids[:, start:end],
                "attention_mask": mask[:, :end],
                "position_ids": positions[:, start:end],
            }
            made = dict(zip(outputs, session.run(outputs, {**tokens, **state, **weights}), strict=True))
            logits.append(made.pop("logits"))
            state = {name.replace("present.", "past_key_values."): value for name, value in made.items()}
            start = end
        real: Array = np.concatenate(logits, axis=1)[mask == 1]
        return real

    def _load(self, model: ir.Model) -> tuple[ort.InferenceSession, dict[str, Array]]:
        """Return a session whose large weights are inputs, and those weights."""
        shell = model.clone()
        weights = {}
        for name, value in list(shell.graph.initializers.items()):
            tensor = value.const_value
            assert tensor is not None
            if tensor.size > _LARGE:
                weights[name] = self._array(name, tensor)
                del shell.graph.initializers[name]
                value.const_value = None
                shell.graph.inputs.append(value)
        self._read = {name: each for name, each in self._read.items() if name in weights}
        options = ort.SessionOptions()
        options.log_severity_level = 3
        model_bytes = ir.to_proto(shell).SerializeToString()
        return ort.InferenceSession(model_bytes, options, providers=["CPUExecutionProvider"]), weights

    def _array(self, name: str, tensor: ir.TensorProtocol) -> Array:
        known = self._read.get(name)
        if known is None or known[0] is not tensor:
            self._read[name] = (tensor, tensor.numpy())
        return self._read[name][1]


def _sizes(value: ir.Value) -> list[int]:
    """Return the fixed sizes of `value`, 0 where they are not fixed."""
    return [size if isinstance(size, int) else 0 for size in value.shape or []]


def _first_blocks(checkpoint: Checkpoint, layers: int) -> ir.Model:
    """Return the float graph of the first blocks of a checkpoint, for the first tokens of its vocabulary."""
    tokens = min(_VOCABULARY, checkpoint.config.vocab_size)

    def weight(name: str, transpose: bool) -> ir.TensorProtocol:
        if name not in _TABLES:
            return CheckpointTensor(checkpoint, name, transpose=transpose)

        def read() -> ir.TensorProtocol:
            return ir.Tensor(checkpoint.tensor(name)[:tokens].astype(np.float32))

        shape = ir.Shape([tokens, checkpoint.config.hidden_size])
        return ir.LazyTensor(read, ir.DataType.FLOAT, shape, cache=True, name=name)

    config = dataclasses.replace(checkpoint.config.with_num_layers(layers), vocab_size=tokens)
    return build_decoder(config, weight)
