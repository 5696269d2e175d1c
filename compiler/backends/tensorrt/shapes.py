"""The optimisation profile: which shapes an engine takes, and which it is tuned for."""

from typing import Any

from planish.compiler.backends.tensorrt.engine_json import InputRecord

__all__ = ["dtype_name", "profile"]

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
    inputs = {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        dtype = dtype_name(tensor)
        if tensor.is_shape_tensor:
            inputs[tensor.name] = InputRecord(dtype=dtype, min=(0,), opt=(1,), max=(max_prompt,), is_shape=True)
            continue
        least, most = (1, 1), (max_batch, max_prompt)
        low, high = ([d if d >= 0 else size[axis] for axis, d in enumerate(tensor.shape)] for size in (least, most))
        tuned = [d if d >= 0 else _TUNED for d in tensor.shape]
        inputs[tensor.name] = InputRecord(dtype=dtype, min=tuple(low), opt=tuple(tuned), max=tuple(high))
    return inputs
