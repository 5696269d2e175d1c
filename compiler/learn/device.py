"""Where learning computes: the processor, or a GPU that PyTorch can use."""

import contextlib
import re
from collections.abc import Iterator

import torch

from planish.compiler.errors import DeviceError

__all__ = ["clear_memory_errors", "device_kind", "open_device"]

_SPELLING = re.compile(r"(cpu)|(cuda)(?::(\d+))?")


def device_kind(name: str) -> str:
    """Return `cpu` or `cuda` for a device spelled cpu, cuda or cuda:N.

    Raises:
        DeviceError: if it is spelled otherwise.
    """
    found = _SPELLING.fullmatch(name)
    if found is None:
        raise DeviceError(f"'{name}' is not a device. Give cpu, cuda, or cuda:N for the GPU of number N.")
    return found[1] or found[2]


def open_device(name: str) -> torch.device:
    """Return a device spelled cpu, cuda or cuda:N, which is seen to be there.

    Raises:
        DeviceError: if it is spelled otherwise, or PyTorch has no such GPU.
    """
    if device_kind(name) == "cpu":
        return torch.device("cpu")
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        raise DeviceError(
            f"The device {name} was asked for, and this PyTorch ({torch.__version__}) is built without CUDA. Install a "
            "CUDA build of PyTorch (https://pytorch.org/get-started/locally), or learn on the CPU: --device cpu."
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name)
    if (device.index or 0) >= count:
        found = f"{count} GPU{'' if count == 1 else 's'}, numbered from 0" if count else "no GPU that it can use"
        raise DeviceError(
            f"The device {name} was asked for, and PyTorch ({torch.__version__}) finds {found}. "
            "See what nvidia-smi lists and what CUDA_VISIBLE_DEVICES hides, or learn on the CPU: --device cpu."
        )
    return device


@contextlib.contextmanager
def clear_memory_errors(device: torch.device) -> Iterator[None]:
    """Turn PyTorch's error of a full GPU into a DeviceError.

    Raises:
        DeviceError: if the GPU's memory does not hold what is worked on.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceError(
            f"The memory of {device} is full. Give --device a GPU with more, calibrate on shorter sequences "
            "(--seqlen), leave out --refine and --polish, or learn on the CPU: --device cpu."
        ) from error
