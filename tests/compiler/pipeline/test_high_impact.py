"""High-impact channels in a compile: what reaches the bundle, what repeats it, and what is refused beforehand."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.inspection import inspect
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.errors import PlanError
from planish.compiler.pipeline.compile import compile_model
from planish.compiler.pipeline.high_impact import untransformed
from planish.compiler.select.plan_file import load_transforms, save_transforms
from planish.passes.high_impact import HighImpact
from planish.passes.scheme import Scheme
from planish.passes.transforms import HighImpacts
from tests.high_impact import WIDE, random_high_impact
from tests.tiny import write_tiny

#: Input channels, output channels and site of the seven linears of a block.
LINEARS = [
    *((192, n, "attn_in") for n in (192, 64, 64)),
    (192, 192, "attn_out"),
    *((192, 328, "ffn_in"),) * 2,
    (328, 192, "ffn_out"),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("checkpoint") / "wide", **WIDE)


def write_high(model: Path, folder: Path, edit: Callable[[HighImpacts], Any] = lambda high: None) -> Path:
    """Write a plan.safetensors with random high-impact channels that went through `edit`, and return its folder."""
    identity = untransformed(open_checkpoint(model).config)
    high = random_high_impact(identity)
    edit(high)
    folder.mkdir()
    save_transforms(identity.with_high(high), folder)
    return folder


def expected_bits(spelling: str, high: HighImpacts) -> float:
    """Return the stored bits per weight of all linears: both segments, their scales, and orders that are not folded."""
    form, stored, weights = Scheme.parse(spelling).linear, 0.0, 0
    for layer in range(2):
        for k, n, site in LINEARS:
            count = high[layer][site].count if site in high[layer] else 0  # type: ignore[index]
            above = dataclasses.replace(form, weight_bits=4)
            stored += (
                form.average_bits(k - count) * (k - count) + (above.average_bits(count) * count if count else 0)
            ) * n
            weights += k * n
        # Hidden units of the FFN are permuted for nothing.
        stored += sum(32 * len(each.order) for site, each in high[layer].items() if site != "ffn_out")
    return stored / weights


def models_of(bundle: Bundle) -> dict[str, bytes]:
    names = ("model.onnx", "model.onnx.data", "engines/ort/model.onnx", "engines/ort/model.onnx.data")
    return {name: (bundle.path / name).read_bytes() for name in names}


def plan_of(bundle: Bundle) -> Any:
    return json.loads((bundle.path / "plan.json").read_text())


@pytest.mark.parametrize("spelling", ["w3a3k3v3", "w2a16g64"])
def test_rounded_to_nearest(spelling: str, wide: Path, tmp_path: Path) -> None:
    given = write_high(wide, tmp_path / "given")
    made = compile_model(wide, tmp_path / "out", scheme=spelling, select="none", high_impact=given)
    config = open_checkpoint(wide).config
    high = random_high_impact(untransformed(config))
    report = json.loads((made.path / "report" / "report.json").read_text())
    assert report["verification"]["logits_error"] < 1e-5
    found = inspect(made)
    assert found.average_bits == pytest.approx(expected_bits(spelling, high), rel=1e-6)
    assert (found.linears, found.skipped) == (14, 0)
    entries = {entry["module"]: entry for entry in plan_of(made)["linears"]}
    assert entries["model.layers.0.self_attn.k_proj"]["high"] == {"bits": 4, "count": 64}
    assert entries["model.layers.1.mlp.down_proj"]["high"] == {"bits": 4, "count": 128}
    assert "high" not in entries["model.layers.0.mlp.up_proj"]
    kept = load_transforms(made.path, config)
    for layer, sites in high.items():
        assert set(kept.layers[layer].high) == set(sites)
        for site, each in sites.items():
            np.testing.assert_array_equal(kept.layers[layer].high[site].order, each.order)
    # More bits for a third of the channels and more leave less of the error.
    plain = compile_model(wide, tmp_path / "plain", scheme=spelling, select="none")
    before = {entry["module"]: entry["weight_sqnr_db"] for entry in plan_of(plain)["linears"]}
    for module, entry in entries.items():
        assert ("high" in entry) == (entry["weight_sqnr_db"] > before[module] + 0.5)
    again = compile_model(None, tmp_path / "again", recipe=made.path / "recipe.yaml", high_impact=made.path)
    assert models_of(again) == models_of(made)


def test_none_of_them_changes_nothing(wide: Path, tmp_path: Path) -> None:
    def none(high: HighImpacts) -> None:
        for sites in high.values():
            sites.update({site: dataclasses.replace(each, count=0) for site, each in sites.items()})

    given = write_high(wide, tmp_path / "given", none)
    settings: dict[str, Any] = {"scheme": "w3a3k3v3", "select": "none"}
    made = compile_model(wide, tmp_path / "out", high_impact=given, **settings)
    plain = compile_model(wide, tmp_path / "plain", **settings)
    assert models_of(made) == models_of(plain)
    assert plan_of(made) == plan_of(plain)
    assert not (made.path / "plan.safetensors").exists()


def test_flattened(wide: Path, text: Path, tmp_path: Path) -> None:
    """With transforms, whose channels they are; a plan of such a bundle makes it again, and can be edited."""
    few: dict[str, Any] = {"dataset": str(text), "nsamples": 6, "seqlen": 32, "scheme": "w3a3k3v3"}
    given = write_high(wide, tmp_path / "given")
    made = compile_model(wide, tmp_path / "out", select="fixed:affine", high_impact=given, **few)
    report = json.loads((made.path / "report" / "report.json").read_text())
    assert report["verification"]["logits_error"] < 1e-5
    sites = plan_of(made)["transforms"]["sites"]
    with_high = {(each["layer"], each["site"]): each["high"] for each in sites if "high" in each}
    assert with_high[0, "ffn_out"] == {"bits": 4, "count": 128}
    assert len(with_high) == 7
    again = compile_model(wide, tmp_path / "again", plan=made.path / "plan.json", **few)
    assert models_of(again) == models_of(made)

    edited = tmp_path / "edited"
    edited.mkdir()
    (edited / "plan.safetensors").write_bytes((made.path / "plan.safetensors").read_bytes())
    plan = plan_of(made)
    for each in plan["transforms"]["sites"]:
        if "high" in each:
            each["high"] = {"bits": 8, "count": 64}
    (edited / "plan.json").write_text(json.dumps(plan))
    other = compile_model(wide, tmp_path / "other", plan=edited / "plan.json", **few)
    assert {entry["high"]["bits"] for entry in plan_of(other)["linears"] if "high" in entry} == {8}
    kept, before = (load_transforms(each.path, open_checkpoint(wide).config).layers[1].high for each in (other, made))
    np.testing.assert_array_equal(kept["ffn_out"].order, before["ffn_out"].order)
    assert kept["ffn_out"].count == 64


def test_impossible_ones_are_refused_before_work_begins(wide: Path, tmp_path: Path) -> None:
    given = write_high(wide, tmp_path / "given")

    def refused(error: type[Exception], message: str, **settings: Any) -> None:
        with pytest.raises(error, match=message):
            compile_model(wide, tmp_path / "out", **{"scheme": "w3a3", "high_impact": given, **settings})
        assert [path.name for path in tmp_path.iterdir()] == ["given"]

    refused(
        PlanError, r"layer 0, site attn_in: .*4 bits are no gain where weights have 4 \(w4a4k16v16\)", scheme="w4a4"
    )
    refused(PlanError, "no gain where weights stay in floating point", scheme="w16a16k4v4")
    refused(PlanError, r"holds no plan\.safetensors", high_impact=tmp_path)


def test_a_plan_whose_order_is_missing(wide: Path, text: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {"dataset": str(text), "nsamples": 6, "seqlen": 32, "polish": 0, "scheme": "w3a3"}
    made = compile_model(wide, tmp_path / "out", select="fixed:rotation", num_layers=1, **few)
    plan = plan_of(made)
    plan["transforms"]["sites"][2]["high"] = {"bits": 4, "count": 64}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "plan.safetensors").write_bytes((made.path / "plan.safetensors").read_bytes())
    with pytest.raises(PlanError, match=r"layer 0, site ffn_in: plan\.safetensors beside it says of no channel"):
        compile_model(wide, tmp_path / "again", plan=tmp_path / "plan.json", num_layers=1, **few)

    # A count that is no longer below the width of its site.
    config = open_checkpoint(wide).config.with_num_layers(1)
    stored = load_transforms(made.path, config)
    high = HighImpact(4, np.random.default_rng(1).permutation(192), 64)
    save_transforms(stored.with_high({0: {"ffn_in": high}}), tmp_path)
    plan["transforms"]["sites"][2]["high"]["count"] = 192
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PlanError, match="layer 0, site ffn_in: 192 high-impact channels of 192 cannot be"):
        compile_model(wide, tmp_path / "again", plan=tmp_path / "plan.json", num_layers=1, **few)
