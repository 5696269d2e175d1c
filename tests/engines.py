"""Engines of a tiny model for a GPU that is not there, in every form that planish builds."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from planish.compiler.backends.tensorrt import build_engines, lowering
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.export.float_model import save_model
from planish.compiler.export.portable import portable_model
from planish.compiler.quantize.codes import quantize_checkpoint
from planish.compiler.runtime.engine_session import EngineSession
from planish.compiler.runtime.session import Session
from planish.passes.scheme import Scheme
from planish.plugins.native import build_library
from planish.plugins.tensorrt.plugins import LAYOUT, PLUGINS
from tests.host_gpu import HostGpu
from tests.host_tensorrt import HostTensorrt
from tests.tiny import write_tiny

__all__ = ["CONTEXT", "KINDS", "MAX_BATCH", "MAX_PROMPT", "Engine", "StaysFloat32", "build_engine", "open_engine"]

CONTEXT, MAX_BATCH, MAX_PROMPT = 32, 4, 8


@dataclasses.dataclass(frozen=True)
class Kind:
    """A form of engine.

    Attributes:
        flavour: what builds it.
        scheme: of the model.
        trt: settings of the TensorRT that is not there.
        float16: whether it is lowered to float16, as planish does; in float32 nothing but order differs.
        plugins: whether there is a plugin library.
        error: how far logits may be from those of ONNX Runtime, as a share of their range; of codes that float16
            rounds to neighbours as in test_tensorrt_lowering.py.
        model: of the checkpoint, what differs from the usual tiny one.
    """

    flavour: str
    scheme: str
    trt: dict[str, Any]
    float16: bool
    plugins: bool
    error: float
    model: dict[str, Any] = dataclasses.field(default_factory=dict)


#: Heads that the kernels of the plugins have.
_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64, "hidden_size": 192}

KINDS = {
    "rtx": Kind("rtx", "w16a16k16v16", {}, True, False, 2e-3),
    "float32": Kind("rtx", "w4a8k8v8", {}, False, False, 1e-5),
    "written apart": Kind("tensorrt", "w16a16k16v16", {"in_place": False}, True, False, 2e-3),
    "old": Kind("tensorrt", "w4a8k8v8", {"in_place": False, "can_be_asked": False}, False, False, 1e-5),
    "plugins": Kind("tensorrt", "w4a8k8v8", {}, False, True, 1e-5, _HEADS),
    "plugins, float16": Kind("tensorrt", "w8a16k8v8", {}, True, True, 0.03, _HEADS),
}


@dataclasses.dataclass
class Engine:
    """An engine and what it is compared with.

    Attributes:
        kind: its form.
        folder: of the engine.
        portable: the model it was built from.
        trt: what runs it.
    """

    kind: Kind
    folder: Path
    portable: Path
    trt: HostTensorrt

    def session(self) -> EngineSession:
        return EngineSession(self.folder, self.kind.flavour)

    def reference(self) -> Session:
        return Session(self.portable, threads=1)


def build_engine(name: str, folder: Path) -> None:
    """Build a model and its engine of a kind into `folder`."""
    kind = KINDS[name]
    checkpoint, scheme = open_checkpoint(write_tiny(folder / "checkpoint", **kind.model)), Scheme.parse(kind.scheme)
    model, _ = portable_model(checkpoint, scheme, quantize_checkpoint(checkpoint, scheme, folder / "codes"))
    portable = save_model(model, folder / "portable")
    limits = {"max_batch": MAX_BATCH, "max_prompt": MAX_PROMPT, "max_context": CONTEXT}
    with pytest.MonkeyPatch.context() as monkeypatch:
        trt = open_engine(name, folder, monkeypatch).trt
        monkeypatch.delenv("PLANISH_PLUGINS", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        if kind.plugins:
            monkeypatch.setenv("PLANISH_PLUGINS", str(_library(folder / "library", trt)))
        if not kind.float16:
            monkeypatch.setattr(lowering, "Float16Pass", StaysFloat32)
        build_engines(portable, folder / "engine", flavour=kind.flavour, **limits)


def open_engine(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Return the engine that was built into `folder`, and be its GPU and TensorRT while the test runs."""
    kind = KINDS[name]
    trt = HostTensorrt(HostGpu().install(monkeypatch), **kind.trt).install(monkeypatch, kind.flavour)
    return Engine(kind, folder / "engine", folder / "portable" / "model.onnx", trt)


class StaysFloat32(ir.passes.InPlacePass):
    """Stands where the lowering turns a model to float16."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, False)


def _library(folder: Path, trt: HostTensorrt) -> Path:
    """Compile a library that says it has the plugins; nothing more is asked of it."""
    says = {
        "tensorrt": [int(number) for number in trt.version.split(".")[:3]],
        "layout": LAYOUT,
        "sms": [trt.gpu.sm],
        "plugins": {contract.name: contract.version for contract in PLUGINS},
    }
    folder.mkdir()
    source = folder / "library.cpp"
    source.write_text(f'extern "C" const char* planish_plugins() {{ return {json.dumps(json.dumps(says))}; }}\n')
    return build_library(source, folder)
