"""Whether this machine has an NVIDIA GPU, without its driver or PyTorch being asked."""

from pathlib import Path

__all__ = ["gpu_is_here"]

#: Device files: any card that is handed to a container, WSL2's, and Jetson's.
_DEVICES = ("nvidia[0-9]*", "dxg", "nvhost-gpu", "nvgpu")


def gpu_is_here(devices: Path = Path("/dev")) -> bool:
    """Return whether there is a device file of a GPU."""
    return any(any(devices.glob(pattern)) for pattern in _DEVICES)
