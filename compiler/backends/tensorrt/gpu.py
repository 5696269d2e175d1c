"""Memory and a stream of the GPU, by the CUDA driver's own interface.

polygraphy's wrapper and cuda-python's runtime need libcudart, which neither the driver nor the packages of TensorRT
bring along: they link it statically. libcuda.so.1 is wherever there is a GPU. Names ending in _v2 are those that the
driver's header gives its functions (cuda.h of CUDA 12 and 13).
"""

import ctypes
from typing import Any

import numpy.typing as npt

from planish.compiler.backends.tensorrt.device import first_device
from planish.compiler.errors import DeviceError

__all__ = ["DeviceMemory", "Gpu"]

Array = npt.NDArray[Any]

#: CUDA_ERROR_OUT_OF_MEMORY and CU_STREAM_NON_BLOCKING, from the CUDA driver API.
_OUT_OF_MEMORY, _NON_BLOCKING = 2, 1


class Gpu:
    """The GPU that CUDA would use, and one stream of it: what is asked for is done in the order of the calls.

    Its context is the primary one, which TensorRT uses as well.

    Attributes:
        device: which GPU it is.
        stream: the handle of the stream.
    """

    def __init__(self) -> None:
        """Take the GPU.

        Raises:
            EngineMismatchError: if there is no driver or no GPU.
            DeviceError: if the GPU cannot be used.
        """
        self.device = first_device()
        self._driver = ctypes.CDLL("libcuda.so.1")
        device, self._context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cuDeviceGet", self._driver.cuDeviceGet(ctypes.byref(device), 0))
        retained = self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device)
        self._check("cuDevicePrimaryCtxRetain", retained)
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        self.stream = int(stream.value or 0)

    def allocate(self, nbytes: int) -> "DeviceMemory":
        """Return zeroed memory.

        Raises:
            DeviceError: if the GPU has no more.
        """
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        memory = DeviceMemory(self, address.value, nbytes)
        zero = ctypes.c_ubyte(0)
        self._call("cuMemsetD8Async", address, zero, ctypes.c_size_t(nbytes), ctypes.c_void_p(self.stream))
        return memory

    def free(self, address: int) -> None:
        """Give memory back, once everything that was asked for before is done."""
        # While the program ends the driver may be gone already, and the memory with it.
        self._driver.cuCtxSetCurrent(self._context)
        self._driver.cuMemFree_v2(ctypes.c_uint64(address))

    def upload(self, to: "DeviceMemory", array: Array) -> None:
        """Copy an array to the start of `to`; it must stay as it is until the next `synchronize`."""
        assert array.flags.c_contiguous
        assert array.nbytes <= to.nbytes
        host, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(to.address), host, size, ctypes.c_void_p(self.stream))

    def download(self, source: "DeviceMemory", array: Array) -> None:
        """Fill an array from the start of `source`; it is there after the next `synchronize`."""
        assert array.flags.c_contiguous
        assert array.nbytes <= source.nbytes
        host, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoHAsync_v2", host, ctypes.c_uint64(source.address), size, ctypes.c_void_p(self.stream))

    def copy(self, to: "DeviceMemory", at: int, source: "DeviceMemory", start: int, nbytes: int) -> None:
        """Copy `nbytes` from byte `start` of `source` to byte `at` of `to`."""
        assert at + nbytes <= to.nbytes
        assert start + nbytes <= source.nbytes
        ends = ctypes.c_uint64(to.address + at), ctypes.c_uint64(source.address + start)
        self._call("cuMemcpyDtoDAsync_v2", *ends, ctypes.c_size_t(nbytes), ctypes.c_void_p(self.stream))

    def synchronize(self) -> None:
        """Wait until all that was asked for is done.

        Raises:
            DeviceError: if any of it failed.
        """
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def _call(self, name: str, *arguments: Any) -> None:
        # A context is current to a thread, and sessions may be run by any.
        self._check("cuCtxSetCurrent", self._driver.cuCtxSetCurrent(self._context))
        self._check(name, getattr(self._driver, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code == _OUT_OF_MEMORY:
            raise DeviceError(
                f"The memory of the {self.device.name} is too small. Run fewer sequences at once, or build the engine "
                "with a smaller --max-context or --max-batch-size."
            )
        if code:
            spelled = ctypes.c_char_p()
            self._driver.cuGetErrorName(code, ctypes.byref(spelled))
            why = (spelled.value or b"an unknown error").decode()
            raise DeviceError(f"The {self.device.name} failed: {name} of the CUDA driver says {why} ({code}).")


class DeviceMemory:
    """Memory of a GPU, given back with the object.

    Attributes:
        address: where it begins, as the GPU sees it.
        nbytes: its size.
    """

    def __init__(self, gpu: Gpu, address: int, nbytes: int) -> None:
        """Use `Gpu.allocate`."""
        self._gpu, self.address, self.nbytes = gpu, address, nbytes

    def __del__(self) -> None:
        self._gpu.free(self.address)
