"""What calls of the kernels' C interfaces on PyTorch tensors share: types, addresses, checks, streams."""

import contextlib
import ctypes
from collections.abc import Mapping, Sequence

import torch

from planish.plugins.kernel_library import call

__all__ = [
    "DEVICE",
    "TYPES",
    "address",
    "check_devices",
    "check_on_gpu",
    "check_tensor",
    "check_together",
    "launch",
    "on_device_of",
]

#: Where tensors must be.
DEVICE = "cuda"
_ALIGNMENT = 16
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


def check_on_gpu(name: str, tensor: torch.Tensor, verb: str = "is") -> None:
    """Check that a tensor is where kernels take it.

    Raises:
        ValueError: if it is not.
    """
    if tensor.device.type != DEVICE:
        raise ValueError(f"{name} {verb} on {tensor.device}; kernels take tensors on {DEVICE}")


def check_tensor(
    name: str, tensor: torch.Tensor | None, dtypes: Sequence[torch.dtype], shape: Sequence[int | str]
) -> None:
    """Check a tensor, if there is one; a name in `shape` stands for any size from 1 on.

    Raises:
        ValueError: if it has another type or shape, or is not contiguous.
    """
    if tensor is None:
        return
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, and must be {' or '.join(map(str, dtypes))}")
    fits = tensor.dim() == len(shape) and all(
        size == wanted or (isinstance(wanted, str) and size > 0)
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} is {list(tensor.shape)}, and must be [{', '.join(map(str, shape))}]")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: call .contiguous()")


def check_together(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Check that all tensors that there are are on one GPU.

    Raises:
        ValueError: naming the first that is not.
    """
    there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, device = next((name, tensor.device) for name, tensor in there.items())
    for name, tensor in there.items():
        check_on_gpu(name, tensor)
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, and {first} on {device}")


def check_devices(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Check that all tensors are on one GPU and begin where a 128-bit load can.

    Raises:
        ValueError: naming the first that is not, or does not.
    """
    check_together(tensors)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() % _ALIGNMENT:
            raise ValueError(
                f"{name} begins {tensor.data_ptr() % _ALIGNMENT} bytes behind a multiple of {_ALIGNMENT}: clone it"
            )
