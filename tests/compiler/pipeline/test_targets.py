"""Settings of engines that cannot work are refused before any work is done."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planish.compiler.errors import PlanishError
from planish.compiler.pipeline.compile import compile_model
from planish.compiler.pipeline.recipe import Recipe
from planish.compiler.pipeline.targets import check_targets

#: In the place of TensorRT-RTX.
PACKAGE = SimpleNamespace(
    __version__="1.7.1", ComputeCapability=SimpleNamespace(__members__={"NONE": 0, "CURRENT": 1, "SM86": 2, "SM120": 3})
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["tensorrt"], "tensorrt_version": "9.3"}, r"is 9\.3, and .* from 10\.0 on"),
        ({"targets": ["tensorrt"], "tensorrt_version": "10.2", "plugins": "require"}, r"need TensorRT 10\.3 or later"),
        ({"targets": ["rtx"], "sms": [86, 7]}, r"'sms' is \[86, 7\], and TensorRT-RTX 1\.7\.1 builds for 86, 120\."),
        ({"targets": ["rtx"], "sms": []}, r"'sms' is \[\]"),
    ],
)
def test_impossible_settings(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", PACKAGE)
    with pytest.raises(PlanishError, match=message):
        compile_model(tiny, tmp_path / "out", scheme="w4a8", select="none", **settings)
    assert list(tmp_path.iterdir()) == []


def test_possible_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", PACKAGE)
    for settings in ({"sms": (86, 120)}, {"tensorrt_version": "10.0"}, {"tensorrt_version": "12.1"}):
        check_targets(
            Recipe(model="a", scheme="w4a8", targets=("rtx", "tensorrt"), **{"tensorrt_version": "10.3"} | settings)
        )
