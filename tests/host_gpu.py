"""A GPU that is not there: stands for the CUDA driver, with memory of the host.

As on a GPU, what a stream is told waits: here until it is synchronised, so whoever forgets that finds nothing done.
Memory that was never written holds NaN, and an address outside what was allocated ends the test.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

__all__ = ["STREAM", "HostGpu"]

#: The handle of the one stream.
STREAM = 0x5EED

_OUT_OF_MEMORY, _MAJOR, _MINOR = 2, 75, 76


class HostGpu:
    """The functions of libcuda.so.1 that planish calls, and what a test asks of the GPU.

    Attributes:
        sm: compute capability times ten.
        total: bytes of memory.
        queue: what the stream was told and has not done.
        copies: copies from memory of the GPU to memory of the GPU so far.
    """

    def __init__(self, sm: int = 89, total: int = 1 << 28) -> None:
        self.sm, self.total = sm, total
        self.queue: list[Callable[[], None]] = []
        self.copies = 0
        self._memory: dict[int, Any] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "HostGpu":
        """Be the driver of this process."""
        real = ctypes.CDLL
        monkeypatch.setattr(ctypes, "CDLL", lambda name, *more: self if name == "libcuda.so.1" else real(name, *more))
        return self

    @property
    def used(self) -> int:
        """Bytes that are allocated."""
        return sum(map(len, self._memory.values()))

    def holds(self, address: int) -> bool:
        return any(start <= address < start + len(memory) for start, memory in self._memory.items())

    def view(self, address: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return memory of the GPU, which must be inside of one allocation."""
        for start, memory in self._memory.items():
            if start <= address and address + nbytes <= start + len(memory):
                return np.frombuffer(memory, np.uint8, nbytes, address - start)
        raise AssertionError(f"an illegal access of {nbytes} bytes at {address:#x}")

    def cuInit(self, _: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGet(self, device: Any, _: int) -> int:  # noqa: N802
        device._obj.value = 0
        return 0

    def cuDeviceGetName(self, buffer: Any, _size: int, _device: Any) -> int:  # noqa: N802
        buffer.value = b"Host GPU"
        return 0

    def cuDeviceGetAttribute(self, result: Any, which: int, _: Any) -> int:  # noqa: N802
        result._obj.value = {_MAJOR: self.sm // 10, _MINOR: self.sm % 10}[which]
        return 0

    def cuDriverGetVersion(self, result: Any) -> int:  # noqa: N802
        result._obj.value = 13020
        return 0

    def cuGetErrorName(self, code: int, spelled: Any) -> int:  # noqa: N802
        spelled._obj.value = f"CUDA_ERROR_{code}".encode()
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, _: Any) -> int:  # noqa: N802
        context._obj.value = 1
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:  # noqa: N802
        assert context.value == 1
        return 0

    def cuStreamCreate(self, stream: Any, flags: Any) -> int:  # noqa: N802
        assert flags.value == 1
        stream._obj.value = STREAM
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:  # noqa: N802
        assert stream.value == STREAM
        waiting, self.queue = self.queue, []
        for work in waiting:
            work()
        return 0

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:  # noqa: N802
        if self.used + size.value > self.total:
            return _OUT_OF_MEMORY
        memory = (ctypes.c_ubyte * size.value)()
        ctypes.memset(memory, 0xFF, size.value)
        address._obj.value = ctypes.addressof(memory)
        self._memory[address._obj.value] = memory
        return 0

    def cuMemFree_v2(self, address: Any) -> int:  # noqa: N802
        self.cuStreamSynchronize(ctypes.c_void_p(STREAM))
        del self._memory[address.value]
        return 0

    def cuMemsetD8Async(self, address: Any, value: Any, size: Any, stream: Any) -> int:  # noqa: N802
        assert stream.value == STREAM
        to = self.view(address.value, size.value)
        self.queue.append(lambda: to.fill(value.value))
        return 0

    def cuMemcpyHtoDAsync_v2(self, address: Any, host: Any, size: Any, stream: Any) -> int:  # noqa: N802
        assert stream.value == STREAM
        to = self.view(address.value, size.value)
        self.queue.append(lambda: ctypes.memmove(to.ctypes.data, host, size.value))
        return 0

    def cuMemcpyDtoHAsync_v2(self, host: Any, address: Any, size: Any, stream: Any) -> int:  # noqa: N802
        assert stream.value == STREAM
        source = self.view(address.value, size.value)
        self.queue.append(lambda: ctypes.memmove(host, source.ctypes.data, size.value))
        return 0

    def cuMemcpyDtoDAsync_v2(self, address: Any, start: Any, size: Any, stream: Any) -> int:  # noqa: N802
        assert stream.value == STREAM
        to, source = self.view(address.value, size.value), self.view(start.value, size.value)
        self.copies += 1
        self.queue.append(lambda: ctypes.memmove(to.ctypes.data, source.ctypes.data, size.value))
        return 0
