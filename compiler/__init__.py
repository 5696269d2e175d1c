"""The compiler: from a LLaMA checkpoint to a bundle that runs.

The names below are the public Python API. They are imported when they are first used, so that running a bundle never
imports what only compiling needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planish.compiler.bundle.bundle import Bundle
    from planish.compiler.bundle.inspection import Inspection, inspect
    from planish.compiler.checkpoint import open_checkpoint
    from planish.compiler.export.float_model import export_float
    from planish.compiler.measure.evaluation import Evaluation, evaluate
    from planish.compiler.pipeline.build import build_target
    from planish.compiler.pipeline.compile import compile_model
    from planish.compiler.runtime.generate import Sampling
    from planish.passes.scheme import Scheme

__all__ = [
    "Bundle",
    "Evaluation",
    "Inspection",
    "Sampling",
    "Scheme",
    "build_target",
    "compile_model",
    "evaluate",
    "export_float",
    "inspect",
    "open_checkpoint",
]

_MODULE_OF = {
    "Bundle": "planish.compiler.bundle.bundle",
    "Evaluation": "planish.compiler.measure.evaluation",
    "Inspection": "planish.compiler.bundle.inspection",
    "Sampling": "planish.compiler.runtime.generate",
    "Scheme": "planish.passes.scheme",
    "build_target": "planish.compiler.pipeline.build",
    "compile_model": "planish.compiler.pipeline.compile",
    "evaluate": "planish.compiler.measure.evaluation",
    "export_float": "planish.compiler.export.float_model",
    "inspect": "planish.compiler.bundle.inspection",
    "open_checkpoint": "planish.compiler.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
