"""`planish inspect` shows the facts of the report, and finds the outliers that were put into a checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.stats import kurtosis

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.pipeline.compile import compile_model
from tests.command import Run


@pytest.fixture
def facts(flattened: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((flattened.path / "report" / "report.json").read_text(encoding="utf-8"))
    return found


def test_one_screen_says_what_the_report_says(run: Run, flattened: Bundle, facts: dict[str, Any]) -> None:
    shown = run("inspect", flattened.path).out
    assert facts["verdict"]["title"] in shown
    for words in ("rounded to nearest", "flattened and polished", "KL from float", "compiled in", "attn_out"):
        assert words in shown
    for notice in facts["notices"]:
        assert notice in shown
    assert len(shown.splitlines()) < 60
    found = run("inspect", flattened.path, "--json").json
    # The report's own size is not known while it is written.
    assert {**found, "sizes": facts["sizes"]} == {**facts, "runs_here": {}}


def test_overrides_are_named(run: Run, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny}\nscheme: w4a8k8v8\nselect: none\noverrides:\n"
        "  .*.mlp.down_proj: {bits: 8}\n  model.layers.1.attn_in: {bits: 8, activation_bits: 4}\n"
    )
    made = compile_model(None, tmp_path / "out", recipe=path)
    shown = run("inspect", made.path).out
    assert "w8a8 at ffn_out of layers 0-1; w8a4 at attn_in of layer 1" in shown
    assert ".*.mlp.down_proj: bits 8; model.layers.1.attn_in: bits 8, activation_bits 4" in shown
    found = run("inspect", made.path, "--json").json["formats"]
    assert {each["site"]: each["layers"] for each in found} == {"ffn_out": [0, 1], "attn_in": [1]}
    page = (made.path / "report" / "report.html").read_text(encoding="utf-8")
    assert "w8a8 at ffn_out of layers 0-1; w8a4 at attn_in of layer 1" in page


def test_one_layer(run: Run, flattened: Bundle, facts: dict[str, Any]) -> None:
    shown = run("inspect", flattened.path, "--layer", 1).out
    for words in ("layer 1: sites", "ffn_out", "crest", "mlp.down_proj", "w4a4"):
        assert words in shown
    found = run("inspect", flattened.path, "--layer", 1, "--json").json
    assert [each["site"] for each in found["sites"]] == ["attn_in", "attn_out", "ffn_in", "ffn_out", "key", "value"]
    assert found["sites"] == [each for each in facts["sites"] if each["layer"] == 1]
    assert len(found["linears"]) == 7


def test_one_layer_of_what_is_not_flattened(run: Run, bundle: Bundle, float_bundle: Bundle) -> None:
    assert "mlp.down_proj" in run("inspect", bundle.path, "--layer", 0).out
    assert "layer 0: in floating point" in run("inspect", float_bundle.path, "--layer", 0).out
    assert "32.000 linears" in run("inspect", float_bundle.path).out


def test_high_impact_channels(run: Run, high_impact: Bundle) -> None:
    shown = run("inspect", high_impact.path).out
    found = run("inspect", high_impact.path, "--json").json["high_impact"]
    rows = {line.split()[0]: line.split() for line in shown[shown.index("layer by layer") :].splitlines()[2:6]}
    for site, width in found["widths"].items():
        counts = [each["counts"][site] for each in found["layers"]]
        assert rows[site][2:5] == [str(min(counts)), str(max(counts)), str(width)]
        assert rows[site][-1] == "".join(str(10 * count // width) if count else "." for count in counts)
    shown = run("inspect", high_impact.path, "--layer", 1).out
    here = run("inspect", high_impact.path, "--layer", 1, "--json").json["high_impact"]
    assert here == {**found["layers"][1], "losses": found["losses"][1]}
    for site, count in here["counts"].items():
        assert f"{site} {count} of {found['widths'][site]}" in shown
        assert f"{count}: {here['losses']['alone'][site][here['losses']['counts'][site].index(count)]:.3g} (ch" in shown


def test_a_layer_that_is_not_there(run: Run, bundle: Bundle, tiny: Path) -> None:
    for command in (["inspect", bundle.path], ["inspect", tiny, "--outliers"]):
        refused = run(*command, "--layer", 2)
        assert refused.code == 2
        assert "the model has 2 layers, numbered from 0" in " ".join(refused.err.split())


def test_a_text_is_for_outliers_alone(run: Run, bundle: Bundle, text: Path) -> None:
    refused = run("inspect", bundle.path, "--dataset", text)
    assert (refused.code, "--outliers" in refused.err) == (2, True)


def test_outliers_are_found_where_they_are(run: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.post_attention_layernorm.weight"][7] *= 100
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 30
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    done = run("inspect", model, "--outliers", "--dataset", text, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["tokens"] == 4 * 256
    first, second = found["outliers"]
    # Of 64 channels one is a hundred times as loud: its crest is close to sqrt(64).
    assert 7 < second["sites"]["ffn_in"]["crest"] < 8 < 64
    assert second["sites"]["ffn_in"]["peak"] > 50 * first["sites"]["attn_in"]["peak"] / 10
    assert second["sites"]["ffn_in"]["kurtosis"] > 20 > abs(first["sites"]["ffn_in"]["kurtosis"])
    expected = kurtosis(weights["model.layers.0.mlp.up_proj.weight"].astype(np.float64), axis=None)
    assert first["weights"]["mlp.up_proj"] == pytest.approx(expected, rel=1e-6)
    assert first["groups"]["ffn"]["kurtosis"] > 100 * abs(second["groups"]["ffn"]["kurtosis"])
    shown = run("inspect", model, "--outliers", "--dataset", text, "--layer", 1).out
    loudest = shown[shown.index("the loudest sites") :].splitlines()[2]
    assert loudest.split()[:2] == ["1", "ffn_in"]


def test_outliers_of_bad_input(run: Run, tiny: Path, tmp_path: Path) -> None:
    missing = run("inspect", tiny, "--outliers", "--dataset", tmp_path / "none.txt")
    assert (missing.code, "does not exist" in missing.err) == (24, True)
    model = shutil.copytree(tiny, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][0] = 3e38
    weights["model.layers.1.self_attn.v_proj.weight"] *= 1e3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    overflow = run("inspect", model, "--outliers", "--dataset", _words(tmp_path))
    assert overflow.code == 24
    assert "block 1" in overflow.err


def _words(folder: Path) -> Path:
    path = folder / "words.txt"
    path.write_text("the hen and the tin man's otter ran in; " * 60, encoding="utf-8")
    return path
