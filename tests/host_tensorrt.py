"""A TensorRT that is not there: an engine is an ONNX model, run on the host with memory of a `HostGpu`.

It builds and runs what planish hands over, and refuses what TensorRT would: shapes beyond the profile, tensors that are
not bound, memory of the wrong side, caches whose outputs do not lie where the engine writes them.
"""

import ctypes
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from planish.compiler.backends.tensorrt import build
from planish.compiler.backends.tensorrt.engine_json import InputRecord, OutputRecord
from planish.compiler.backends.tensorrt.flavour import FLAVOURS
from planish.compiler.backends.tensorrt.job import Built, Job
from planish.compiler.backends.tensorrt.shapes import profile
from planish.compiler.progress import Progress
from tests.fixed_cache import plain_session
from tests.host_gpu import STREAM, HostGpu
from tests.plugin_interpreter import plugin_evaluator

__all__ = ["HostContext", "HostEngine", "HostTensorrt"]

Array = npt.NDArray[Any]
Compute = Callable[[list[str], dict[str, Array]], list[Array]]

_PAST, _PRESENT, _LENGTHS, _KEEP = "past_key_values", "present", "past_lengths", "num_logits_to_keep"
#: numpy's name of a dtype -> TensorRT's.
_TYPES = {"float16": "HALF", "float32": "FLOAT"}


@dataclasses.dataclass
class HostTensorrt:
    """TensorRT's Python package.

    Attributes:
        gpu: what runs engines.
        in_place: whether TensorRT writes caches where they lie; plugins always do.
        can_be_asked: whether engines can say which outputs lie where an input lies; those of old versions cannot.
        version: of the package.
        loaded: plugin libraries that the registry was given.
        shapes: of each run so far, name of the input -> its shape.
    """

    gpu: HostGpu
    in_place: bool = True
    can_be_asked: bool = True
    version: str = "11.1.0.106"
    loaded: list[str] = dataclasses.field(default_factory=list)
    shapes: list[dict[str, tuple[int, ...]]] = dataclasses.field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch, flavour: str) -> "HostTensorrt":
        """Be the package of a flavour in this process, for building and for running."""
        module: Any = ModuleType(FLAVOURS[flavour].module)
        module.__version__, module.ILogger = self.version, _Logger
        module.ComputeCapability = SimpleNamespace(__members__={"SM86": 86, "SM89": 89, "SM120": 120})
        module.Runtime = lambda logger: SimpleNamespace(
            deserialize_cuda_engine=lambda content: self._deserialize(content, logger)
        )
        module.get_plugin_registry = lambda: SimpleNamespace(
            get_creator=lambda *_: self.loaded or None, load_library=lambda path: self.loaded.append(path) or path
        )
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(build, "run_job", self._build)
        return self

    def _build(self, job: Job, _: Progress) -> Built:
        model = onnx.load(job.model)
        limits = {"max_batch": str(job.max_batch), "max_prompt": str(job.max_prompt)}
        onnx.helper.set_model_props(model, limits)
        Path(job.engine).write_bytes(model.SerializeToString())
        outputs = {
            value.name: OutputRecord(dtype=_dtype(value).name, shape=_shape(value)) for value in model.graph.output
        }
        inputs = _profile(model)
        return Built(version=self.version, sms=(self.gpu.sm,), inputs=inputs, outputs=outputs, seconds=1.0)

    def _deserialize(self, content: bytes, logger: "_Logger") -> "HostEngine | None":
        try:
            model = onnx.load_model_from_string(content)
        except Exception:
            logger.log(_Logger.INFO, "reading")
            logger.log(_Logger.ERROR, "the magic tag does not match")
            return None
        return HostEngine(self, model) if self.can_be_asked else _OldEngine(self, model)


class _Logger:
    WARNING, ERROR, INTERNAL_ERROR, INFO = "warning", "error", "internal error", "info"

    def log(self, severity: str, text: str) -> None:
        raise NotImplementedError


class _OldEngine:
    """The methods of ICudaEngine that planish calls in every version."""

    def __init__(self, trt: HostTensorrt, model: onnx.ModelProto) -> None:
        self.trt, self.model = trt, model
        self.profile = _profile(model)
        self.has_plugins = _LENGTHS in self.profile

    def create_execution_context(self) -> "HostContext":
        return HostContext(self)


class HostEngine(_OldEngine):
    """The same, of the versions that tell aliases, if not those of plugins."""

    def get_aliased_input_tensor(self, name: str) -> str | None:
        aliased = name.startswith(_PRESENT) and self.trt.in_place and not self.has_plugins
        return name.replace(_PRESENT, _PAST, 1) if aliased else None


class HostContext:
    """The methods of IExecutionContext that planish calls."""

    def __init__(self, engine: _OldEngine) -> None:
        self._engine, self._trt = engine, engine.trt
        self._outputs = {value.name: value for value in engine.model.graph.output}
        self._run: Compute = (
            plugin_evaluator(engine.model).run if engine.has_plugins else plain_session(engine.model).run
        )
        self._shapes = {
            name: each.min for name, each in engine.profile.items() if each.is_shape or each.min == each.max
        }
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        given = self._engine.profile[name]
        fits = len(shape) == len(given.min) and all(
            low <= dim <= high for low, dim, high in zip(given.min, shape, given.max, strict=True)
        )
        self._shapes[name] = shape
        return fits

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self._engine.profile or name in self._outputs
        self._addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.profile if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "logits"
        batch, tokens = self._shapes["input_ids"]
        return (batch, min(int(self._keep()) or tokens, tokens), _shape(self._outputs[name])[-1])

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        # Values on the host are read now, memory of the GPU when the stream comes to it.
        feeds = {_KEEP: self._keep()}
        logits = self.get_tensor_shape("logits")
        memory = {
            name: self._memory(name, _dtype(value), self._shapes[value.name])
            for value in self._engine.model.graph.input
            if (name := value.name) != _KEEP
        }
        made = {
            name: self._memory(name, _dtype(value), logits if name == "logits" else self._shapes[_past(name)])
            for name, value in self._outputs.items()
        }
        for name in made.keys() - {"logits"}:
            same = self._addresses[name] == self._addresses[_past(name)]
            assert same == (self._trt.in_place or self._engine.has_plugins), name
        self._trt.shapes.append({name: array.shape for name, array in memory.items()})

        def work() -> None:
            inputs = {name: array.copy() for name, array in memory.items()}
            for name, array in zip(made, self._run([*made], {**inputs, **feeds}), strict=True):
                assert (array.dtype, array.shape) == (made[name].dtype, made[name].shape), name
                made[name][...] = array

        self._trt.gpu.queue.append(work)
        return True

    def _keep(self) -> npt.NDArray[np.int64]:
        address = self._addresses[_KEEP]
        assert not self._trt.gpu.holds(address)
        return np.array(ctypes.c_int64.from_address(address).value)

    def _memory(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        size = int(np.prod(shape)) * dtype.itemsize
        return self._trt.gpu.view(self._addresses[name], size).view(dtype).reshape(shape)


def _past(present: str) -> str:
    return present.replace(_PRESENT, _PAST, 1)


def _profile(model: onnx.ModelProto) -> dict[str, InputRecord]:
    """Return the profile that planish makes of the parsed model."""
    limits = {each.key: int(each.value) for each in model.metadata_props}
    tensors = [
        SimpleNamespace(
            name=value.name,
            shape=_shape(value),
            is_shape_tensor=not _shape(value),
            dtype=SimpleNamespace(name=_TYPES.get(_dtype(value).name, _dtype(value).name.upper())),
        )
        for value in model.graph.input
    ]
    network = SimpleNamespace(num_inputs=len(tensors), get_input=lambda i: tensors[i])
    return profile(network, limits["max_batch"], limits["max_prompt"])


def _dtype(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim)
