"""The flatten stage in a compile: verified against the oracle, resumed after a kill, never mixed with other runs."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.inspection import inspect
from planish.compiler.calibrate.text import calibration_tokens
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.errors import CalibrationError, OutputFolderError, PlanError
from planish.compiler.learn import flatten_block
from planish.compiler.learn.flattening import held_out_sequences
from planish.compiler.learn.transforms.candidates import kind_of
from planish.compiler.pipeline import flatten as flatten_module
from planish.compiler.pipeline.compile import compile_model
from planish.compiler.progress import Silent
from planish.compiler.select.plan_file import load_transforms
from planish.compiler.select.site_choice import read_choices
from planish.passes.transforms import SITES
from tests.tiny import VARIANTS, write_tiny

SCHEME = "w4a4k4v4"
KILLED = 9


class Heard(Silent):
    """Remembers what a compile said, and which steps it made."""

    def __init__(self, stop_at: tuple[str, int] | None = None) -> None:
        self.messages: list[str] = []
        self.steps: list[tuple[str, int]] = []
        self._stop_at = stop_at

    def say(self, message: str) -> None:
        self.messages.append(message)

    def step(self, stage: str, done: int, total: int) -> None:
        self.steps.append((stage, done))
        if (stage, done) == self._stop_at:
            raise KeyboardInterrupt


@pytest.fixture
def few(text: Path) -> dict[str, Any]:
    """Calibration that takes no time."""
    return {"dataset": str(text), "nsamples": 6, "seqlen": 32, "polish": 0, "scheme": SCHEME}


def contents(bundle: Bundle) -> dict[str, bytes]:
    """Return the files that flattening decides."""
    names = ("model.onnx", "model.onnx.data", "plan.json", "plan.safetensors", "engines/ort/model.onnx.data")
    return {name: (bundle.path / name).read_bytes() for name in names}


def divergence_from_transformers(model: Path, bundle: Bundle, settings: dict[str, Any]) -> float:
    """Return KL(float || bundle) per token, nats, on the sequences that flattening holds out."""
    tokens = calibration_tokens(settings["dataset"], open_checkpoint(model), nsamples=6, seqlen=32, seed=0)
    ids = tokens[-held_out_sequences(6) :]
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(model)(torch.from_numpy(ids)).logits.double().log_softmax(-1)
    session = bundle.session()
    logits = torch.from_numpy(session.run(ids, session.empty_cache(len(ids)))[0])
    found = logits.reshape(expected.shape).double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def report(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle.path / "report" / "report.json").read_text())
    return found


@pytest.mark.parametrize(
    ("variant", "scheme", "select"),
    [
        ("gqa", "w3a3k3v3", "measured"),
        ("mqa", "w3a3k3v2", "fixed:affine"),
        ("head_dim", "w4a4k4v4", "fixed:affine"),
        ("attention_bias", "w4a4k4v4g32", "kurtosis"),
        ("mlp_bias", "w4a8kv8", "fixed:rotation"),
        ("gqa", "w4a4k4v4", "fixed:rotation:smooth"),
        ("tied", "w3a3k3v3", "fixed:affine"),
        ("untied", "w3a16", "measured:0.5"),
        ("rope_dynamic", "w2a16g32", "fixed:affine"),
    ],
)
def test_the_compiled_model_is_the_oracles(
    variant: str, scheme: str, select: str, tmp_path: Path, few: dict[str, Any]
) -> None:
    model = write_tiny(tmp_path / "model", **VARIANTS[variant])
    made = compile_model(model, tmp_path / "out", **{**few, "scheme": scheme, "select": select})
    found = report(made)
    assert found["verification"]["logits_error"] < 1e-5
    assert max(found["passes"].values()) < 1e-5
    assert len(found["passes"]) >= 5
    config = open_checkpoint(model).config
    choices = read_choices(made.path / "plan.json", config, open_checkpoint(model).fingerprint())
    transforms = load_transforms(made.path, config)
    assert [transforms.layers[each.layer][each.site].kind for each in choices] == [each.kind for each in choices]
    # Folded scales, and what runs online: every linear reads what was chosen for its site.
    assert any(each.kind != "identity" for each in choices)
    assert all(each.error is not None for each in choices if each.site not in ("key", "value"))


def test_a_killed_compile_goes_on_behind_the_last_block(tmp_path: Path, few: dict[str, Any]) -> None:
    model, out = write_tiny(tmp_path / "model", num_hidden_layers=3), tmp_path / "out"
    settings = {**few, "select": "measured", "polish": 1}
    program = f"""
import os
from planish.compiler import compile_model
from planish.compiler.progress import Silent

class Killed(Silent):
    def step(self, stage, done, total):
        if (stage, done) == ("flatten", 2):
            os._exit({KILLED})

compile_model({str(model)!r}, {str(out)!r}, progress=Killed(), **{settings!r})
"""
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, check=False)
    assert done.returncode == KILLED
    # Codes that will be polished are not yet those of the bundle.
    codes = out.with_name("out.partial") / "flatten" / "codes"
    written = {path.name: path.stat().st_mtime_ns for path in codes.glob("*.safetensors")}
    assert set(written) == {"model.layers.0.safetensors", "model.layers.1.safetensors"}
    heard = Heard()
    resumed = compile_model(model, out, progress=heard, **settings)
    assert any("resuming" in message for message in heard.messages)
    assert [step for step in heard.steps if step[0] == "flatten"] == [("flatten", 3)]
    fresh = compile_model(model, tmp_path / "fresh", **settings)
    assert contents(resumed) == contents(fresh)


def test_other_text_starts_anew(tiny: Path, text: Path, tmp_path: Path, few: dict[str, Any]) -> None:
    own = tmp_path / "text.txt"
    own.write_text(text.read_text(encoding="utf-8"), encoding="utf-8")
    settings = {**few, "select": "fixed:affine", "dataset": str(own)}
    with pytest.raises(KeyboardInterrupt):
        compile_model(tiny, tmp_path / "out", progress=Heard(stop_at=("flatten", 1)), **settings)
    # The same file, with other words in it.
    own.write_text(own.read_text(encoding="utf-8").replace("the hen", "a tin"), encoding="utf-8")
    heard = Heard()
    made = compile_model(tiny, tmp_path / "out", progress=heard, **settings)
    assert any("starting anew" in message for message in heard.messages)
    assert contents(made) == contents(compile_model(tiny, tmp_path / "fresh", **settings))


@pytest.mark.parametrize("change", [{"seed": 5}, {"nsamples": 7}, {"select": "kurtosis"}])
def test_other_settings_leave_what_is_unfinished(
    change: dict[str, Any], tiny: Path, tmp_path: Path, few: dict[str, Any]
) -> None:
    settings = {**few, "select": "fixed:affine"}
    with pytest.raises(KeyboardInterrupt):
        compile_model(tiny, tmp_path / "out", progress=Heard(stop_at=("flatten", 1)), **settings)
    ((name, value),) = change.items()
    with pytest.raises(
        OutputFolderError, match=f"other settings: {name} .*, not {value}. Finish it by its own command"
    ):
        compile_model(tiny, tmp_path / "out", **{**settings, **change})
    heard = Heard()
    compile_model(tiny, tmp_path / "out", progress=heard, **settings)
    assert [step for step in heard.steps if step[0] == "flatten"] == [("flatten", 2)]


def test_a_plan_makes_the_same_model_again(tiny: Path, tmp_path: Path, few: dict[str, Any]) -> None:
    first = compile_model(tiny, tmp_path / "first", select="measured", **few)
    plan = tmp_path / "plan.json"
    plan.write_bytes((first.path / "plan.json").read_bytes())
    again = compile_model(tiny, tmp_path / "again", plan=plan, **few)
    assert contents(again)["model.onnx.data"] == contents(first)["model.onnx.data"]
    made = json.loads((again.path / "plan.json").read_text())["transforms"]
    assert made["policy"] == "plan:plan.json"
    # The recipe names it by a path that holds from anywhere, so it makes the bundle again.
    repeated = compile_model(None, tmp_path / "repeated", recipe=again.path / "recipe.yaml")
    assert contents(repeated) == contents(again)


def test_a_plan_edited_by_hand_is_followed(tiny: Path, tmp_path: Path, few: dict[str, Any]) -> None:
    first = compile_model(tiny, tmp_path / "first", select="fixed:rotation", **few)
    content = json.loads((first.path / "plan.json").read_text())
    for entry in content["transforms"]["sites"]:
        if (entry["layer"], entry["site"]) == (1, "ffn_out"):
            entry |= {"form": "kronecker", "kind": "affine"}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(content))
    made = compile_model(tiny, tmp_path / "edited", plan=plan, **few)
    transforms = load_transforms(made.path, made.config)
    assert [layer.ffn_out.kind for layer in transforms.layers] == ["rotation", "affine"]
    assert report(made)["verification"]["logits_error"] < 1e-5

    plan.write_text(json.dumps({"transforms": {**content["transforms"], "sites": []}}))
    with pytest.raises(PlanError, match="layer 0, site attn_in: there is no entry for it"):
        compile_model(tiny, tmp_path / "out", plan=plan, **few)
    assert not (tmp_path / "out.partial").exists()


def test_the_default_length_shrinks_to_the_context(tiny: Path, tmp_path: Path, few: dict[str, Any], text: Path) -> None:
    settings = {**few, "dataset": str(text), "nsamples": 4, "select": "fixed:rotation", "num_layers": 1}
    del settings["seqlen"]
    with pytest.raises(KeyboardInterrupt):
        compile_model(tiny, tmp_path / "out", progress=Heard(stop_at=("flatten", 1)), **settings)
    assert np.load(tmp_path / "out.partial" / "flatten" / "calibration.npy").shape == (4, 256)
    with pytest.raises(CalibrationError, match="longer than the model's context of 256"):
        compile_model(tiny, tmp_path / "other", **settings, seqlen=257)
    assert not (tmp_path / "other.partial").exists()


@pytest.mark.parametrize("select", ["measured:0", "fixed:affine"])
@pytest.mark.parametrize("variant", ["gqa", "tied", "attention_bias"])
def test_on_a_rotated_residual_stream(variant: str, select: str, tmp_path: Path, few: dict[str, Any]) -> None:
    model = write_tiny(tmp_path / "model", **VARIANTS[variant])
    settings = {**few, "select": select, "residual_rotation": True, "polish": 1}
    made = compile_model(model, tmp_path / "out", **settings)
    found = report(made)
    assert found["verification"]["logits_error"] < 1e-5
    assert "FoldResidualRotationPass" in found["passes"]
    assert load_transforms(made.path, open_checkpoint(model).config).residual is not None
    plan = json.loads((made.path / "plan.json").read_text())
    if select == "measured:0":
        assert all(each["cost_flops"] == 0 for each in plan["transforms"]["sites"])
    # What it is held against is the model as it came, which would be compiled in its place.
    straight = compile_model(model, tmp_path / "straight", **{**settings, "residual_rotation": False})
    other = json.loads((straight.path / "plan.json").read_text())
    for measured in ("held_out_divergence", "held_out_cross_entropy"):
        found, expected = (each["transforms"][measured]["rounded to nearest"] for each in (plan, other))
        assert found == pytest.approx(expected, rel=5e-3)
    # The recipe repeats it.
    again = compile_model(None, tmp_path / "again", recipe=made.path / "recipe.yaml")
    assert contents(again) == contents(made)


def test_a_block_that_fell_back_to_rotations_says_so_in_the_plan(
    tiny: Path, tmp_path: Path, few: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_factors, calls = flatten_block.fit_factors, []

    def singular_at_first(*arguments: Any) -> Any:
        factors, scales = fit_factors(*arguments)
        if not calls:
            right = factors["attn_in"].right.clone()
            right[..., 0] = 0
            factors["attn_in"] = dataclasses.replace(factors["attn_in"], right=right)
        calls.append(arguments)
        return factors, scales

    monkeypatch.setattr(flatten_block, "fit_factors", singular_at_first)
    made = compile_model(tiny, tmp_path / "out", **few, select="fixed:affine", refine=1)
    transforms = load_transforms(made.path, open_checkpoint(tiny).config)
    for each in json.loads((made.path / "plan.json").read_text())["transforms"]["sites"]:
        stored = transforms.layers[each["layer"]][each["site"]].kind
        assert each["kind"] == stored
        assert kind_of(each["form"]) == stored
        assert stored == ("rotation" if each["layer"] == 0 or each["site"] == "attn_out" else "affine")


@pytest.mark.parametrize("variant", ["tied", "gqa"])
def test_the_scale_of_lm_head_is_in_its_norm_and_in_its_codes(
    variant: str, tmp_path: Path, few: dict[str, Any]
) -> None:
    model = write_tiny(tmp_path / "model", **VARIANTS[variant])
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][[3, 8]] *= 20
    save_file(tensors, path, {"format": "pt"})
    settings = {**few, "scheme": "w8a8k8v8", "select": "fixed:affine", "polish": 1}
    made = compile_model(model, tmp_path / "out", **settings)
    head = json.loads((made.path / "plan.json").read_text())["transforms"]["lm_head"]
    assert head["scaled"]
    assert head["error"] < head["error_before"]
    assert "FoldHeadScalePass" in report(made)["passes"]
    scale = load_transforms(made.path, open_checkpoint(model).config).head
    assert scale is not None
    assert scale[[3, 8]].max() < 0.5 * np.median(scale)
    assert divergence_from_transformers(model, made, settings) < 5e-2
    whole = compile_model(model, tmp_path / "float", **settings, lm_head="w8a16")
    assert load_transforms(whole.path, open_checkpoint(model).config).head is None


@pytest.mark.parametrize("select", ["auto", "fixed:affine"])
def test_what_loses_to_rounding_to_nearest(
    select: str, tiny: Path, tmp_path: Path, few: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not kept unless it was asked for by name, and is said in either case."""
    divergence = {"rounded to nearest": 0.25, "flattened": 0.5}
    monkeypatch.setattr(flatten_module, "_held_out", lambda *_: (divergence, {"float": 1.0, "flattened": 1.5}))
    heard = Heard()
    made = compile_model(tiny, tmp_path / "out", progress=heard, **{**few, "select": select})
    words = "flattened, the model is 0.5 nats per held-out token from the float one, and only 0.25 rounded to nearest"
    assert any(words in message for message in heard.messages)
    plan = json.loads((made.path / "plan.json").read_text())
    if select != "auto":
        assert "fallback" not in plan
        assert plan["transforms"]["held_out_divergence"] == {"rounded to nearest": 0.25, "flattened": 0.5}
        return
    assert words in plan["fallback"]
    assert words in (made.path / "report" / "report.html").read_text()
    plain = compile_model(tiny, tmp_path / "plain", scheme=SCHEME, select="none")
    name = "engines/ort/model.onnx.data"
    assert (made.path / name).read_bytes() == (plain.path / name).read_bytes()
    assert not (made.path / "plan.safetensors").exists()


def test_the_default_is_closer_than_rounding_to_nearest(tiny: Path, tmp_path: Path, few: dict[str, Any]) -> None:
    """Whatever it does: measured on the held-out text by the compiled models and transformers, not by what chose."""
    flattened = compile_model(tiny, tmp_path / "auto", **{**few, "scheme": "w3a3k3v3", "polish": 2})
    rounded = compile_model(tiny, tmp_path / "none", scheme="w3a3k3v3", select="none")
    found = {
        select: divergence_from_transformers(tiny, made, few)
        for select, made in (("auto", flattened), ("none", rounded))
    }
    assert found["auto"] <= found["none"] * 1.02


def test_a_recipe_overrides_single_sites(tiny: Path, tmp_path: Path, few: dict[str, Any]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: m\nscheme: w4a4\nselect: fixed:rotation\noverrides:\n"
        "  model.layers.1.mlp.down_proj: {kind: affine, bits: 8}\n  .*.key: {form: identity}\n"
    )
    bundle = compile_model(tiny, tmp_path / "out", recipe=path, **few)
    entries = json.loads((bundle.path / "plan.json").read_text())["transforms"]["sites"]
    forms = {(entry["layer"], entry["site"]): entry["form"] for entry in entries}
    changed = {(0, "key"): "identity", (1, "key"): "identity", (1, "ffn_out"): "blocks128"}
    assert forms == {(layer, site): changed.get((layer, site), "rotation") for layer in (0, 1) for site in SITES}
    marked = {(each["layer"], each["site"]) for each in entries if "overridden by the recipe" in each["evidence"]}
    assert marked == set(changed)
    linears = json.loads((bundle.path / "plan.json").read_text())["linears"]
    formats = {each["module"]: each["format"] for each in linears}
    assert formats.pop("model.layers.1.mlp.down_proj") == "w8a4"
    assert formats.pop("lm_head") == "w8a8"
    assert set(formats.values()) == {"w4a4"}
    assert report(bundle)["verification"]["logits_error"] < 1e-3
    again = compile_model(None, tmp_path / "again", recipe=bundle.path / "recipe.yaml")
    assert contents(again) == contents(bundle)


@pytest.mark.parametrize(("select", "polish", "refine"), [("none", 0, 0), ("measured", 1, 0), ("fixed:affine", 0, 1)])
def test_bits_of_single_layers(
    select: str, polish: int, refine: int, tiny: Path, tmp_path: Path, few: dict[str, Any]
) -> None:
    """The oracle, which the compile is verified against, knows of formats only by their codes."""
    path = tmp_path / "recipe.yaml"
    path.write_text("overrides:\n  model.layers.0..*: {bits: 8, activation_bits: 8}\n  .*1.attn_in: {bits: 2}\n")
    settings = {**few, "select": select, "polish": polish, "refine": refine}
    if select == "none":
        settings = {"select": select, "scheme": SCHEME}
    bundle = compile_model(tiny, tmp_path / "out", recipe=path, targets=("ort", "rtx"), max_context=32, **settings)
    linears = json.loads((bundle.path / "plan.json").read_text())["linears"]
    formats = {each["module"]: each["format"] for each in linears}
    assert {form for module, form in formats.items() if ".0." in module} == {"w8a8"}
    assert formats["model.layers.1.self_attn.k_proj"] == "w2a4"
    assert formats["model.layers.1.self_attn.o_proj"] == "w4a4"
    transforms = json.loads((bundle.path / "plan.json").read_text()).get("transforms", {})
    assert len(transforms.get("refinement", ())) == (2 if refine else 0)
    plain = compile_model(tiny, tmp_path / "plain", **settings)
    assert inspect(bundle).average_bits > inspect(plain).average_bits + 1
    if select == "none":
        better = [divergence_from_transformers(tiny, each, few) for each in (bundle, plain)]
        assert better[0] < 0.5 * better[1]
