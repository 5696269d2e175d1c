"""Compiles that choose high-impact channels themselves: bits that are counted, evidence, repetition, resumption."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.inspection import inspect
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.errors import PlanError
from planish.compiler.pipeline.compile import compile_model
from planish.compiler.progress import Silent
from planish.compiler.select.plan_file import load_transforms
from tests.high_impact import WIDE
from tests.tiny import write_tiny


@pytest.fixture
def few(text: Path) -> dict[str, Any]:
    """Calibration that takes no time."""
    return {"dataset": str(text), "nsamples": 6, "seqlen": 32, "polish": 0, "select": "fixed:affine"}


def plan_of(bundle: Bundle) -> Any:
    return json.loads((bundle.path / "plan.json").read_text())


def logits_error(bundle: Bundle) -> float:
    report = json.loads((bundle.path / "report" / "report.json").read_text())
    found: float = report["verification"]["logits_error"]
    return found


@pytest.mark.parametrize(
    ("spelling", "settings"),
    [
        ("w2a16", {"avg_bits": 3.2}),
        ("w2a16", {"avg_bits": 3.2, "round": "adaround"}),
        ("w2a16g64", {"avg_bits": 2.9, "hic_policy": "fixed", "hic_bits": 3, "round": "nearest"}),
        ("w2a16g128", {"hic_ratio": 0.3}),
        ("w3a16", {"avg_bits": 3.9, "polish": 1}),
        ("w3a3k3v3", {"avg_bits": 3.9, "polish": 1}),
        ("w3a3k3v3", {"avg_bits": 3.9, "select": "measured"}),
    ],
)
def test_bits_are_those_of_the_bundle(
    spelling: str, settings: dict[str, Any], wide_tiny: Path, few: dict[str, Any], tmp_path: Path
) -> None:
    made = compile_model(wide_tiny, tmp_path / "out", scheme=spelling, **{**few, **settings})
    assert logits_error(made) < 1e-5
    evidence = plan_of(made)["transforms"]["high_impact"]
    # plan.json keeps four places.
    assert inspect(made).average_bits == pytest.approx(evidence["stored_bits"], abs=1e-4)
    assert evidence["stored_bits"] <= settings.get("avg_bits", np.inf) + 1e-4
    kept = load_transforms(made.path, open_checkpoint(wide_tiny).config)
    for layer, counts in enumerate(evidence["counts"]):
        assert {site: high.count for site, high in kept.layers[layer].high.items()} == {
            site: count for site, count in counts.items() if count
        }
    assert any(layer.high for layer in kept.layers)
    sites = plan_of(made)["transforms"]["sites"]
    assert [each for each in sites if "high" in each]
    assert bool(evidence["losses"]) == ("avg_bits" in settings and settings.get("hic_policy") != "fixed")


def test_the_plan_makes_the_same_channels_again(wide_tiny: Path, few: dict[str, Any], tmp_path: Path) -> None:
    settings = {"scheme": "w2a16", "avg_bits": 3.2}
    made = compile_model(wide_tiny, tmp_path / "out", **few, **settings)
    again = compile_model(None, tmp_path / "again", recipe=made.path / "recipe.yaml")
    by_plan = compile_model(
        wide_tiny, tmp_path / "plan", scheme="w2a16", plan=made.path / "plan.json", **{**few, "select": None}
    )
    for other in (again, by_plan):
        for name in ("model.onnx.data", "plan.safetensors"):
            assert (other.path / name).read_bytes() == (made.path / name).read_bytes()
    assert "high_impact" not in plan_of(by_plan)["transforms"]


class Killed(Silent):
    """Ends a compile in the middle of a stage."""

    def __init__(self, stage: str) -> None:
        self._stage = stage

    def step(self, stage: str, done: int, total: int) -> None:
        if stage == self._stage:
            raise KeyboardInterrupt


def test_a_killed_choice_goes_on(wide_tiny: Path, few: dict[str, Any], tmp_path: Path) -> None:
    settings = {"scheme": "w2a16", "avg_bits": 3.2, "polish": 1}
    out = tmp_path / "out"
    work = tmp_path / "out.partial" / "flatten"
    kept = {"fit transforms": "fitted-0.json", "sensitivity of channels": "sensitivity-1.safetensors"}
    kept |= {"measure channel counts": "pairs-0.json", "flatten": "layer-0/evidence.json"}
    times: dict[str, int] = {}
    for stage, file in kept.items():
        with pytest.raises(KeyboardInterrupt):
            compile_model(wide_tiny, out, progress=Killed(stage), **{**few, **settings})
        times[file] = (work / file).stat().st_mtime_ns
        assert {name: (work / name).stat().st_mtime_ns for name in times} == times
    resumed = compile_model(wide_tiny, out, **{**few, **settings})
    fresh = compile_model(wide_tiny, tmp_path / "fresh", **{**few, **settings})
    assert (resumed.path / "model.onnx.data").read_bytes() == (fresh.path / "model.onnx.data").read_bytes()


def test_channels_of_another_checkpoint(wide_tiny: Path, few: dict[str, Any], tmp_path: Path) -> None:
    made = compile_model(wide_tiny, tmp_path / "out", scheme="w2a16", avg_bits=3.2, **few)
    other = write_tiny(tmp_path / "other", **{**WIDE, "hidden_size": 256, "num_attention_heads": 8})
    with pytest.raises(PlanError, match=r"layer 0, site attn_in"):
        compile_model(other, tmp_path / "again", scheme="w2a16", high_impact=made.path, **few)
