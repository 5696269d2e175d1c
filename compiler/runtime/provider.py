"""Where ONNX Runtime executes operators: on the CPU, or by CUDA on a GPU."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import onnxruntime as ort

from planish.compiler.errors import DeviceError, MissingExtraError

__all__ = ["Provider", "check_provider", "check_started"]

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class Provider(StrEnum):
    """An execution provider of ONNX Runtime."""

    CPU = "cpu"
    CUDA = "cuda"

    @property
    def names(self) -> list[str]:
        """ONNX Runtime's names: this one, and what takes the operators that it lacks."""
        return [_CPU] if self is Provider.CPU else [_CUDA, _CPU]

    @property
    def place(self) -> Any:
        """The OrtDevice that its tensors are on."""
        return ort.OrtDevice.make(self.value, 0)._get_c_device()


def check_provider(provider: Provider) -> None:
    """Check that the installed ONNX Runtime has a provider, and let it find its libraries.

    Raises:
        MissingExtraError: if it does not; the message has the commands that install one.
    """
    if provider.names[0] not in ort.get_available_providers():
        raise MissingExtraError(
            "The installed ONNX Runtime has no CUDA. Its package for GPUs takes the place of the other one: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]>=1.31,<2'"
        )
    if provider is Provider.CUDA:
        # Libraries that pip installed are not where the loader looks.
        ort.preload_dlls()


def check_started(provider: Provider, running: Sequence[str]) -> None:
    """Check that a session runs by the provider that it was asked for: ONNX Runtime would go on without.

    Args:
        provider: what was asked for.
        running: what the session has.

    Raises:
        DeviceError: if it does not.
    """
    if provider.names[0] not in running:
        raise DeviceError(
            "ONNX Runtime has CUDA and cannot start it here: there is no NVIDIA GPU, or its driver, CUDA or cuDNN is "
            "missing or too old. Look at nvidia-smi; or leave out --provider cuda."
        )
