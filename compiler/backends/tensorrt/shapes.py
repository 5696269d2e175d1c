"""The optimisation profile: which shapes an engine takes, and which it is tuned for."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from planish.compiler.backends.tensorrt.engine_json import InputRecord, OutputRecord

__all__ = ["dtype_name", "inputs_of", "outputs_of", "profile"]

#: Kernels are tuned for decoding: one new token of one sequence.
_TUNED = 1


def dtype_name(tensor: Any) -> str:
    """Return the name of a TensorRT tensor's dtype, as numpy calls it."""
    name: str = tensor.dtype.name.lower()
    return {"half": "float16", "float": "float32"}.get(name, name)


def profile(network: Any, max_batch: int, max_prompt: int) -> dict[str, InputRecord]:
    """Return the profile of a parsed network: batch 1 .. max_batch, new tokens 1 .. max_prompt, the rest fixed.

    Only the first two dimensions of an input are ever dynamic: the batch, and the new tokens of input_ids and
    position_ids. num_logits_to_keep is a value on the host.
    """
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    return {
        each.name: _input(dtype_name(each), each.shape, each.is_shape_tensor, max_batch, max_prompt) for each in tensors
    }


def inputs_of(model: ir.Model, max_batch: int, max_prompt: int) -> dict[str, InputRecord]:
    """Return the profile of a lowered model, which TensorRT would give for it; only its shape inputs are scalars."""
    found = {}
    for value in model.graph.inputs:
        dtype, shape = _described(value)
        found[str(value.name)] = _input(dtype, shape, not shape, max_batch, max_prompt)
    return found


def outputs_of(model: ir.Model) -> dict[str, OutputRecord]:
    """Return the outputs of a lowered model."""
    described = {str(value.name): _described(value) for value in model.graph.outputs}
    return {name: OutputRecord(dtype=dtype, shape=tuple(shape)) for name, (dtype, shape) in described.items()}


def _described(value: ir.Value) -> tuple[str, list[int]]:
    """Return dtype and shape, -1 where a size is not fixed, of an input or output, which has both."""
    assert value.dtype is not None
    assert value.shape is not None
    return value.dtype.numpy().name, [size if isinstance(size, int) else -1 for size in value.shape]


def _input(dtype: str, shape: Sequence[int], is_shape: bool, max_batch: int, max_prompt: int) -> InputRecord:
    if is_shape:
        return InputRecord(dtype=dtype, min=(0,), opt=(1,), max=(max_prompt,), is_shape=True)
    least, most = (1, 1), (max_batch, max_prompt)
    low, high = (tuple(d if d >= 0 else size[axis] for axis, d in enumerate(shape)) for size in (least, most))
    return InputRecord(dtype=dtype, min=low, opt=tuple(d if d >= 0 else _TUNED for d in shape), max=high)
