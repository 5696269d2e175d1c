"""The two TensorRT packages that share one API: TensorRT-RTX (`rtx`) and TensorRT (`tensorrt`)."""

import dataclasses
import re
from importlib import metadata
from types import ModuleType

from planish.compiler.errors import EngineBuildError
from planish.compiler.optional import require

__all__ = ["FLAVOURS", "Flavour", "flavour_of"]


@dataclasses.dataclass(frozen=True)
class Flavour:
    """One of the packages.

    Attributes:
        target: the name of the planish target.
        module: the name of the Python module.
        title: the name for people.
        ahead_of_time: whether it builds without a GPU, for the SMs it is told.
    """

    target: str
    module: str
    title: str
    ahead_of_time: bool

    def load(self) -> ModuleType:
        """Import and return the package.

        Raises:
            MissingExtraError: if it is not installed.
        """
        return require(self.module)

    def cuda_major(self) -> int | None:
        """Return the CUDA major version the installed package is made for, which its distribution is named after."""
        for distribution in metadata.packages_distributions().get(self.module, []):
            if match := re.search(r"cu(\d+)", distribution):
                return int(match[1])
        return None


FLAVOURS = {
    "rtx": Flavour("rtx", "tensorrt_rtx", "TensorRT-RTX", ahead_of_time=True),
    "tensorrt": Flavour("tensorrt", "tensorrt", "TensorRT", ahead_of_time=False),
}


def flavour_of(target: str) -> Flavour:
    """Return the flavour called `target`.

    Raises:
        EngineBuildError: if there is none.
    """
    if target not in FLAVOURS:
        raise EngineBuildError(f"'{target}' is not a TensorRT target; use one of: {', '.join(FLAVOURS)}.")
    return FLAVOURS[target]
