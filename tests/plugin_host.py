"""The TensorRT plugin library without TensorRT: compiled with emulated kernels, and driven as TensorRT drives it."""

import ctypes
import dataclasses
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from planish.plugins.native import find_compiler
from planish.plugins.ops import DOMAIN
from planish.plugins.tensorrt.build import build_plugins, cuda_headers, tensorrt_headers
from planish.plugins.tensorrt.contract import Contract

__all__ = ["Host", "Plugin", "load_host", "need_headers"]

Array = npt.NDArray[Any]
Typed = tuple[str, Sequence[int]]

_SOURCES = Path(__file__).parent / "plugins" / "tensorrt"
#: nvinfer1::DataType and nvinfer1::PluginFieldType.
_TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "bfloat16": 7}
_FIELDS = {"int": 5, "float": 1}
_ROW = 9
#: Bytes behind a workspace, which no call may touch.
_BEHIND = 4096


def need_headers() -> None:
    """Skip the test where the library cannot be compiled."""
    if tensorrt_headers() is None:
        pytest.skip("TENSORRT_INCLUDE_DIR names no headers of TensorRT")
    if cuda_headers() is None:
        pytest.skip("there are no headers of CUDA: no nvcc is found")
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake")


@functools.cache
def load_host() -> "Host":
    """Compile library and host into a folder of this process, and load both."""
    folder = Path(tempfile.mkdtemp(prefix="planish-host-"))
    headers, cuda = tensorrt_headers(), cuda_headers()
    assert headers is not None
    assert cuda is not None
    emulated = {
        "PLANISH_EMULATED_KERNELS": _SOURCES / "emulated_kernels.cpp",
        "CUDA_INCLUDE_DIR": cuda,
        "CMAKE_BUILD_TYPE": "Debug",
    }
    library = build_plugins(folder / "library", headers, emulated)
    host = folder / "host.so"
    includes = ["-isystem", str(headers), "-isystem", str(cuda)]
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(
        [find_compiler(), *flags, *includes, str(_SOURCES / "host.cpp"), "-o", str(host), "-ldl"], check=True
    )
    try:
        return Host(host, library)
    finally:
        shutil.rmtree(folder)


class Host:
    """The host.

    Attributes:
        library: the plugin library, as ctypes has it.
    """

    def __init__(self, host: Path, library: Path) -> None:
        self._host = ctypes.CDLL(str(host))
        for name in ("load", "creator", "create", "restore", "clone", "attach"):
            getattr(self._host, f"host_{name}").restype = ctypes.c_void_p
        for name in ("said", "field_names"):
            getattr(self._host, f"host_{name}").restype = ctypes.c_char_p
        self._host.host_workspace.restype = ctypes.c_int64
        self._loaded = ctypes.c_void_p(self.call("load", os.fsencode(library)))
        assert self._loaded, self.said()
        self.library = ctypes.CDLL(str(library))

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of host.cpp."""
        return getattr(self._host, f"host_{name}")(*arguments)

    def said(self) -> str:
        """Return what plugins have logged since this was asked last."""
        said: bytes = self.call("said")
        return said.decode()

    def creator(
        self, contract: Contract, version: str | None = None, namespace: str = DOMAIN
    ) -> ctypes.c_void_p | None:
        """Return the creator of a plugin, or None if the library has none."""
        names = [each.encode() for each in (contract.name, version or contract.version, namespace)]
        found = self.call("creator", self._loaded, *names)
        return ctypes.c_void_p(found) if found else None

    def field_names(self, contract: Contract) -> list[str]:
        """Return the attributes that the library has for a plugin."""
        names: bytes = self.call("field_names", self.creator(contract))
        return names.decode().split(",")[:-1]

    def create(
        self, contract: Contract, attributes: Mapping[str, float], kinds: Mapping[str, str] | None = None
    ) -> "Plugin | None":
        """Return a plugin, or None if it is refused; `kinds` are field types other than the contract's."""
        types = {each.name: each.kind for each in contract.attributes} | dict(kinds or {})
        names = list(attributes)
        numbers = b"".join(
            np.array(value, np.int32 if types[name] == "int" else np.float32).tobytes()
            for name, value in attributes.items()
        )
        made = self.call(
            "create",
            self.creator(contract),
            len(names),
            (ctypes.c_char_p * len(names))(*(name.encode() for name in names)),
            (ctypes.c_int32 * len(names))(*(_FIELDS[types[name]] for name in names)),
            numbers,
        )
        return Plugin(self, contract, made) if made else None


@dataclasses.dataclass
class Plugin:
    """A plugin that the library made, by its address."""

    host: Host
    contract: Contract
    address: int
    #: That of the last run, uint8, which found it full of 255.
    workspace: Array | None = None

    def _call(self, name: str, *arguments: Any) -> Any:
        return self.host.call(name, ctypes.c_void_p(self.address), *arguments)

    def another(self, way: str) -> "Plugin":
        """Return a plugin made from this one: by 'clone', 'attach', or 'restore', from what an engine stores."""
        if way == "restore":
            made = self.host.call("restore", self.host.creator(self.contract), ctypes.c_void_p(self.address))
        else:
            made = self._call(way)
        return Plugin(self.host, self.contract, made)

    def delete(self) -> None:
        self._call("delete")

    @property
    def outputs(self) -> int:
        count: int = self._call("outputs")
        return count

    def aliases(self) -> list[int]:
        return [self._call("aliased_input", i) for i in range(self.outputs)]

    def infer(self, inputs: Sequence[Typed]) -> list[tuple[str, tuple[int, ...]]] | None:
        """Return type and shape of the outputs, -1 where a size is not known, or None if the inputs are refused."""
        count = self.outputs
        shapes, types = (ctypes.c_int64 * (_ROW * count))(), (ctypes.c_int32 * count)()
        if self._call("infer", len(inputs), _rows(inputs), _numbers(inputs), count, shapes, types):
            return None
        names = {number: name for name, number in _TYPES.items()}
        rows = [shapes[_ROW * i : _ROW * (i + 1)] for i in range(count)]
        return [(names[types[i]], tuple(rows[i][1 : 1 + rows[i][0]])) for i in range(count)]

    def supports(self, position: int, dtypes: Sequence[str], inputs: int, format: int = 0) -> bool:
        types = (ctypes.c_int32 * len(dtypes))(*(_TYPES[dtype] for dtype in dtypes))
        return bool(self._call("supports", position, inputs, len(dtypes) - inputs, types, format))

    def configure(self, inputs: Sequence[Typed], outputs: Sequence[Typed]) -> bool:
        """Return whether the plugin takes tensors of these types and shapes on this GPU."""
        every = [*inputs, *outputs]
        return self._call("configure", len(inputs), len(outputs), _rows(every), _numbers(every)) == 0

    def run(self, inputs: Sequence[Array], aliased: bool = True) -> list[Array] | None:
        """Return the outputs of a call, or None if it fails; `aliased` lets outputs share the memory of inputs."""
        typed = [(str(array.dtype), array.shape) for array in inputs]
        made = self.infer(typed)
        if made is None:
            return None
        aliases = self.aliases() if aliased else [-1] * len(made)
        outputs = [
            inputs[alias] if alias >= 0 else np.full(shape, -1, dtype)
            for alias, (dtype, shape) in zip(aliases, made, strict=True)
        ]
        every = [*typed, *made]
        count = len(inputs), len(made)
        size = self._call("workspace", *count, _rows(every), _numbers(every))
        room = np.full(size + _BEHIND, 255, np.uint8)
        failed = self._call(
            "enqueue", *count, _rows(every), _numbers(every), _addresses(inputs), _addresses(outputs),
            ctypes.c_void_p(room.ctypes.data),
        )  # fmt: skip
        assert (room[size:] == 255).all()
        self.workspace = room[:size]
        return None if failed else outputs


def _rows(tensors: Sequence[Typed]) -> Any:
    rows = [[len(shape), *shape, *[0] * (_ROW - 1 - len(shape))] for _, shape in tensors]
    flat = [number for row in rows for number in row]
    return (ctypes.c_int64 * len(flat))(*flat)


def _numbers(tensors: Sequence[Typed]) -> Any:
    return (ctypes.c_int32 * len(tensors))(*(_TYPES[dtype] for dtype, _ in tensors))


def _addresses(arrays: Sequence[Array]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
