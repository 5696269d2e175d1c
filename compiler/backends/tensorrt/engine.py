"""An engine that TensorRT has loaded: its tensors bound to memory, and run."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy.typing as npt

from planish.compiler.backends.tensorrt.engine_json import EngineRecord
from planish.compiler.backends.tensorrt.flavour import flavour_of
from planish.compiler.backends.tensorrt.gpu import Gpu
from planish.compiler.backends.tensorrt.plugin_registry import load_plugins
from planish.compiler.errors import DeviceError, EngineMismatchError
from planish.plugins.ops import DOMAIN

__all__ = ["Engine"]

#: Lines of TensorRT's log that an error repeats.
_LINES = 8


class Engine:
    """An engine and what runs it, one call after the other on the stream of a GPU."""

    def __init__(self, folder: Path, record: EngineRecord, gpu: Gpu) -> None:
        """Load the engine in `folder`, whose record `check_engine` has returned.

        Raises:
            MissingExtraError: if its TensorRT is not installed.
            EngineBuildError: if TensorRT does not take the plugin library.
            EngineMismatchError: if TensorRT does not take the engine; the message has its own words.
        """
        assert record.engine is not None, "check_engine refuses records without an engine"
        self._gpu, self._flavour = gpu, flavour_of(record.flavour)
        trt = self._flavour.load()
        self._log: deque[str] = deque(maxlen=_LINES)
        self._logger = _logger(trt, self._log)
        _register_plugins(trt, folder, record)
        self._runtime = trt.Runtime(self._logger)
        engine = self._runtime.deserialize_cuda_engine((folder / record.engine.file).read_bytes())
        context = engine.create_execution_context() if engine is not None else None
        if context is None:
            raise EngineMismatchError(
                f"{self._flavour.title} {trt.__version__} does not load {folder / record.engine.file}. Build it again "
                f"with 'planish build --target {record.flavour}'.{self._words()}"
            )
        self._engine, self._context = engine, context
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def aliased_input(self, output: str) -> str | None:
        """Return the input whose memory an output must have; None where TensorRT says of none.

        TensorRT before 10.15 cannot be asked, and has none but those of plugins; those no TensorRT tells of.
        """
        ask = getattr(self._engine, "get_aliased_input_tensor", None)
        return ask(output) if ask is not None else None

    def bind(self, name: str, address: int, shape: Sequence[int] | None = None) -> None:
        """Let a tensor lie in memory of the GPU.

        Args:
            name: an input or output.
            address: where; it stays bound until it is bound anew.
            shape: of an input.

        Raises:
            DeviceError: if TensorRT refuses it.
        """
        if shape is not None and self._shapes.get(name) != tuple(shape):
            if not self._context.set_input_shape(name, tuple(shape)):
                raise DeviceError(f"{self._flavour.title} refuses {name} of shape {list(shape)}.{self._words()}")
            self._shapes[name] = tuple(shape)
        if self._addresses.get(name) != address:
            if not self._context.set_tensor_address(name, address):
                raise DeviceError(f"{self._flavour.title} refuses the memory of {name}.{self._words()}")
            self._addresses[name] = address

    def bind_value(self, name: str, value: npt.NDArray[Any]) -> None:
        """Let an input that sets a shape be `value`, on the host, which must stay there until the run is done.

        Raises:
            DeviceError: if TensorRT refuses it.
        """
        # Never left out where the address is the old one: another number there is another shape.
        if not self._context.set_tensor_address(name, value.ctypes.data):
            raise DeviceError(f"{self._flavour.title} refuses {value} for {name}.{self._words()}")

    def shape_of(self, output: str) -> tuple[int, ...]:
        """Return the shape that an output will have, all inputs being bound.

        Raises:
            DeviceError: if the inputs do not go together.
        """
        try:
            lacking = self._context.infer_shapes()
        except RuntimeError as error:
            raise DeviceError(f"{self._flavour.title} finds no shape for {output}: {error}{self._words()}") from error
        if lacking:
            raise DeviceError(f"{self._flavour.title} lacks the shape of {', '.join(lacking)}.{self._words()}")
        return tuple(self._context.get_tensor_shape(output))

    def start(self) -> None:
        """Run; outputs are there after the next `Gpu.synchronize`.

        Raises:
            DeviceError: if the engine does not start.
        """
        if not self._context.execute_async_v3(self._gpu.stream):
            raise DeviceError(f"The engine failed on the {self._gpu.device.name}.{self._words()}")

    def _words(self) -> str:
        return "".join(f"\n  {line}" for line in self._log)


def _logger(trt: ModuleType, log: "deque[str]") -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.WARNING, trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                log.append(text)

    return Logger()


def _register_plugins(trt: ModuleType, folder: Path, record: EngineRecord) -> None:
    """Load the plugin library of an engine, unless the registry has its plugins from another engine's copy of it."""
    if record.plugins is None:
        return
    registry = trt.get_plugin_registry()
    versions = record.plugins.versions.items()
    if any(registry.get_creator(name, version, DOMAIN) is None for name, version in versions):
        assert record.plugins.library is not None, "an engine with plugins has their library beside it"
        load_plugins(trt, folder / record.plugins.library.file)
