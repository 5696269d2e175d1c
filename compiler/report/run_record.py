"""What only the run of a compile knows of itself: everything else in a report can be read from the bundle."""

import dataclasses
import json
import platform
from importlib.metadata import version
from typing import Any

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.layout import REPORT_FILE

__all__ = ["LoudSite", "RunRecord", "versions"]

#: Distributions that decide what a compile makes.
_PACKAGES = ("planish", "torch", "numpy", "onnx", "onnx-ir", "onnxruntime", "tokenizers")


@dataclasses.dataclass(frozen=True)
class LoudSite:
    """|x| of the channels of one site, as multiples of the RMS of a token, before flattening and after.

    Attributes:
        layer: index of the decoder block.
        site: which place in it.
        channels: how many there are.
        pooled: how many neighbours each number below stands for, as the largest of them.
        before: by the names of `PROFILE` (compiler/learn/site_statistics.py), a number per channel or group of them.
        after: the same behind the transform.
    """

    layer: int
    site: str
    channels: int
    pooled: int
    before: dict[str, list[float]]
    after: dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a compile found and spent.

    Attributes:
        verification: the fields of `Verification`; empty where nothing was verified.
        passes: how far each pass that flattens moved the logits; empty where none ran or none was verified.
        stages: see `StageClock`.
        loud: see `loudest_sites`; empty where nothing was flattened.
        versions: of what compiled.
    """

    verification: dict[str, Any] = dataclasses.field(default_factory=dict)
    passes: dict[str, float] = dataclasses.field(default_factory=dict)
    stages: list[Any] = dataclasses.field(default_factory=list)
    loud: list[LoudSite] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, bundle: Bundle) -> "RunRecord":
        """Read it back from the report of a bundle; it is empty where the bundle has none."""
        path = bundle.path / REPORT_FILE
        if not path.is_file():
            return cls()
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = {field.name: found[field.name] for field in dataclasses.fields(cls) if field.name in found}
        return cls(**{**kept, "loud": [LoudSite(**each) for each in kept.get("loud", [])]})


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compile."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
