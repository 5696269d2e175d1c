"""What calls of the kernels' C interfaces on PyTorch tensors share: types, addresses, streams."""

import contextlib
import ctypes

import torch

from planish.plugins.kernel_library import call

__all__ = ["TYPES", "address", "launch", "on_device_of"]

#: The C interfaces' numbers of the types of numbers that come in and go out.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def address(tensor: torch.Tensor | None) -> int | None:
    """Return where a tensor's data begin; None, the null pointer, where there is no tensor."""
    return None if tensor is None else tensor.data_ptr()


def on_device_of(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return what makes a GPU the current one; nothing for the CPU, where the kernels are emulated in tests."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launch(library: ctypes.CDLL, name: str, task: ctypes.Structure, device: torch.device) -> None:
    """Enqueue a kernel on the current stream of `device`.

    Raises:
        ValueError: if the library refuses the task; the message is the library's.
        KernelError: if the kernel cannot be launched.
    """
    with on_device_of(device):
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        call(library, name, ctypes.byref(task), stream)
