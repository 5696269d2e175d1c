"""Ask the CUDA driver, if there is one, which GPU is here."""

import ctypes
import dataclasses

from planish.compiler.errors import EngineMismatchError

__all__ = ["Device", "first_device"]

#: CUdevice_attribute values, from the CUDA driver API.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: as the driver calls it.
        sm: compute capability times ten, such as 89.
        cuda: the CUDA major version that the driver supports.
    """

    name: str
    sm: int
    cuda: int


def first_device() -> Device:
    """Return the GPU that CUDA would use.

    Raises:
        EngineMismatchError: if there is no driver or no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineMismatchError(
            "This machine has no NVIDIA driver (libcuda.so.1 is missing). TensorRT engines run on NVIDIA GPUs only; "
            "use the target 'ort' here."
        ) from error
    device = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        raise EngineMismatchError(
            "This machine has an NVIDIA driver but no GPU that it can use. Check the driver with nvidia-smi, and "
            "CUDA_VISIBLE_DEVICES; or use the target 'ort'."
        )
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    major, minor, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    driver.cuDriverGetVersion(ctypes.byref(version))
    # The driver counts versions as 1000 * major + 10 * minor.
    return Device(name.value.decode(), 10 * major.value + minor.value, version.value // 1000)
