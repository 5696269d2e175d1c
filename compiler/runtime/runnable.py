"""A model file and what runs it: ONNX Runtime on the CPU or by CUDA, or TensorRT."""

import dataclasses
from pathlib import Path

from planish.compiler.runtime.language_model import LanguageModel
from planish.compiler.runtime.provider import Provider
from planish.compiler.runtime.session import Session

__all__ = ["ENGINES", "Runnable"]

#: Targets that TensorRT runs.
ENGINES = ("rtx", "tensorrt")


@dataclasses.dataclass(frozen=True)
class Runnable:
    """A model that can be loaded, here or in another process.

    Attributes:
        model: the ONNX file; of an engine the one that it was built from, beside which it lies.
        runs_on: 'cpu' or 'cuda' for ONNX Runtime, 'rtx' or 'tensorrt' for the engine.
    """

    model: Path
    runs_on: str = Provider.CPU

    def load(self, threads: int | None = None) -> LanguageModel:
        """Load it.

        Args:
            threads: of ONNX Runtime; None is one per core. Engines have none.

        Raises:
            PlanishError: as `Session` and `EngineSession` do.
        """
        if self.runs_on not in ENGINES:
            return Session(self.model, threads, self.runs_on)
        from planish.compiler.runtime.engine_session import EngineSession

        return EngineSession(self.model.parent, self.runs_on)
