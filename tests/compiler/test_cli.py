"""Every command does its work and prints one JSON line; every bad input has its message and exit code."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from planish.compiler import errors
from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.layout import MANIFEST_FILE
from planish.compiler.pipeline import compilation
from planish.compiler.pipeline import compile as pipeline
from planish.passes.scheme import SchemeError
from planish.plugins.errors import PlanishError
from tests.command import Run

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return shutil.copytree(bundle.path, tmp_path / "bundle")


def test_compile_inspect_eval_generate(run: Run, tiny: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    few = ("--dataset", text, "--nsamples", 6, "--seqlen", 32)
    compiled = run("compile", tiny, "--scheme", "w3a3k3v3", "--lm-head", "w8a8", "-o", out, "--json", *few)
    assert compiled.code == 0, compiled.err
    assert "portable model" in compiled.err
    assert compiled.json["output"] == str(out)

    inspected = run("inspect", out, "--json").json
    assert inspected["linears"] == 14
    assert inspected["skipped"] == 0
    assert inspected["kv_bytes_per_token"] == 2 * 2 * 2 * (16 * 3 // 8 + 4)

    evaluated = run("eval", out, "--text", text, "--seqlen", 32, "--windows", 2, "--threads", 1, "--json")
    assert set(evaluated.json) >= {"perplexity", "tokens", "seconds"}
    assert evaluated.json["tokens"] == 62
    assert f"{evaluated.json['perplexity']:.4f}" in evaluated.err

    generated = run("generate", out, "the hen", "--max-new-tokens", 6, "--threads", 1, "--json")
    assert generated.json["text"] in generated.err


def test_people_read_stdout(run: Run, bundle: Bundle) -> None:
    inspected = run("inspect", bundle.path)
    assert "14 quantised, 0 in floating point" in inspected.out
    assert inspected.err == ""
    plain, chat = (run("generate", bundle.path, "the", "--max-new-tokens", 5, *flag) for flag in ([], ["--chat"]))
    assert plain.out.strip()
    assert plain.out != chat.out
    drawn = [
        run("generate", bundle.path, "the", "--max-new-tokens", 9, "--temperature", 2, "--top-p", 0.9, "--seed", seed)
        for seed in (1, 1, 2)
    ]
    assert drawn[0].out == drawn[1].out != drawn[2].out


def test_a_checkpoint_is_evaluated_in_float(run: Run, tiny: Path, float_bundle: Bundle, text: Path) -> None:
    options = ("--text", text, "--seqlen", 32, "--windows", 2, "--json")
    of_model, of_export = (run("eval", path, *options).json for path in (tiny, float_bundle.path))
    assert of_model["perplexity"] == pytest.approx(of_export["perplexity"], rel=1e-5)


def test_export(run: Run, tiny: Path, tmp_path: Path) -> None:
    exported = run("export", tiny, "-o", tmp_path / "float", "--num-layers", 1, "--json")
    assert exported.code == 0, exported.err
    assert Path(exported.json["model"]).is_file()
    assert run("inspect", tmp_path / "float", "--json").json["skipped"] == 7


def test_recipe_and_flags(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = run("compile", "--recipe", bundle.path / "recipe.yaml", "--num-layers", 1, "-o", out, "--json")
    assert made.code == 0, made.err
    assert (made.json["scheme"], made.json["layers"]) == ("w4a8k8v8", 1)


def test_bench(run: Run, bundle: Bundle) -> None:
    measured = run("bench", bundle.path, "--against", "float", "--tokens", 16, "--repeats", 1, "--threads", 1, "--json")
    assert measured.code == 0, measured.err
    found = measured.json
    for ratio, field in (
        ("prefill_speedup", "prefill"),
        ("decode_speedup", "decode"),
        ("memory_ratio", "resident_mib"),
    ):
        assert found[ratio] == pytest.approx(found["bundle"][field] / found["float"][field])
    assert 10 < found["bundle"]["resident_mib"] <= found["bundle"]["peak_mib"] * 1.01


def test_doctor(run: Run) -> None:
    found = run("doctor", "--json")
    assert found.json["packages"]["onnxruntime"]
    assert found.json["python"].startswith("3.")
    for extra in found.json["missing_extras"]:
        assert f"pip install 'planish[{extra}]'" in found.err


def test_version_and_help(run: Run) -> None:
    assert run("--version").out.startswith("planish ")
    shown = run("--help").out
    for command in ("compile", "export", "eval", "compare", "generate", "bench", "inspect", "doctor"):
        assert command in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile", "m"],
        ["nonsense"],
        ["compile", "m", "-o", "out", "--num-layers", "0"],
        ["generate", "b", "hi", "--top-p", "2"],
        ["bench", "b", "--against", "nothing"],
        ["--log-level", "loud", "doctor"],
    ],
)
def test_wrong_usage_is_2(run: Run, arguments: list[str]) -> None:
    assert run(*arguments).code == 2


def damage_weights(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def set_nan(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"][3] = np.nan


def change_config(model: Path, **values: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (lambda m: (m / WEIGHTS).unlink(), 10, "holds no weights"),
        (lambda m: os.truncate(m / WEIGHTS, 2000), 10, "is truncated"),
        (lambda m: damage_weights(m, lambda t: t.pop("model.norm.weight")), 10, "lacks model.norm.weight"),
        (lambda m: change_config(m, intermediate_size=161), 10, "disagrees with config.json"),
        (lambda m: damage_weights(m, set_nan), 11, "model.norm.weight holds nan at [3]"),
        (lambda m: change_config(m, architectures=["GPT2LMHeadModel"], model_type="gpt2"), 3, "GPT2LMHeadModel"),
        (lambda m: (m / "tokenizer.json").unlink(), 14, "holds no tokenizer"),
    ],
)
def test_bad_checkpoints(
    run: Run, model: Path, tmp_path: Path, damage: Callable[[Path], Any], code: int, message: str
) -> None:
    damage(model)
    done = run("compile", model, "--scheme", "w4a8", "--select", "none", "-o", tmp_path / "out")
    assert done.code == code
    assert done.err.splitlines()[-1].startswith("error: ")
    assert message in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--scheme", "w5a4"], 18, "5-bit weights"),
        (["--scheme", "four bits"], 18, "is not a scheme"),
        (["--scheme", "w4a4", "--target", "tpu"], 19, "'tpu'"),
        ([], 19, "'scheme' is missing"),
        (["--scheme", "w4a4", "--num-layers", "3"], 3, "Cannot keep 3 layers"),
        (["--recipe", "no.yaml"], 19, "no.yaml cannot be read"),
    ],
)
def test_bad_settings(run: Run, tiny: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    done = run("compile", tiny, *arguments, "-o", tmp_path / "out")
    assert (done.code, message in done.err) == (code, True), done.err


def test_bad_outputs(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("compile", tiny, "--scheme", "w4a8", "--select", "none", "-o")
    (tmp_path / "file").touch()
    not_empty = run(*options, tmp_path)
    assert (not_empty.code, "is not empty" in not_empty.err) == (12, True)
    below_file = run(*options, tmp_path / "file" / "out")
    assert (below_file.code, "cannot be written" in below_file.err) == (12, True)
    monkeypatch.setattr(pipeline, "estimate", lambda *_: SimpleNamespace(disk=1 << 60))
    full = run(*options, tmp_path / "out")
    assert (full.code, "MB free and the compile needs" in full.err) == (13, True)


def test_missing_extra(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    done = run("compile", tiny, "--scheme", "w4a8", "--target", "tensorrt", "-o", tmp_path / "out")
    assert (done.code, "planish[tensorrt]" in done.err) == (5, True)


def test_failed_verification(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise errors.AccuracyError("Layer 3 drifts first")

    monkeypatch.setattr(compilation, "verify", fail)
    done = run("compile", tiny, "--scheme", "w4a8", "--select", "none", "-o", tmp_path / "out")
    assert (done.code, "Layer 3 drifts first" in done.err) == (4, True)
    assert not (tmp_path / "out").exists()


def test_interrupt(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compilation, "verify", interrupt)
        done = run("compile", tiny, "--scheme", "w4a8", "--select", "none", "-o", tmp_path / "out")
    assert (done.code, "run the same command again to resume" in done.err) == (130, True)
    again = run("compile", tiny, "--scheme", "w4a8", "--select", "none", "-o", tmp_path / "out")
    assert (again.code, "resuming" in again.err) == (0, True)


def test_bad_bundles(run: Run, copy: Path, text: Path, tmp_path: Path) -> None:
    manifest = json.loads((copy / MANIFEST_FILE).read_text())
    foreign = tmp_path / "foreign.onnx"
    onnx.save(onnx.ModelProto(producer_name="someone"), foreign)
    for command in (["inspect", foreign], ["generate", foreign, "hi"], ["eval", foreign, "--text", text]):
        done = run(*command)
        assert (done.code, "not a bundle that planish wrote" in done.err) == (17, True)

    (copy / MANIFEST_FILE).write_text(json.dumps({**manifest, "format_version": 99}))
    newer = run("generate", copy, "hi")
    assert (newer.code, "bundle format 99" in newer.err) == (15, True)

    (copy / MANIFEST_FILE).write_text(json.dumps(manifest))
    with (copy / "model.onnx.data").open("r+b") as file:
        file.write(b"\xff\xff\xff\xff")
    corrupt = run("inspect", copy)
    assert (corrupt.code, "model.onnx.data" in corrupt.err) == (16, True)


def test_bad_texts_and_prompts(run: Run, bundle: Bundle, text: Path) -> None:
    beyond = run("eval", bundle.path, "--text", text, "--seqlen", 256, "--windows", 10000)
    assert (beyond.code, "10000 were asked for" in beyond.err) == (20, True)
    missing = run("eval", bundle.path, "--text", "no.txt")
    assert (missing.code, "no.txt cannot be read" in missing.err) == (20, True)
    long = run("generate", bundle.path, "x" * 300)
    assert (long.code, "no room for an answer" in long.err) == (20, True)


def test_exit_codes_are_distinct() -> None:
    classes = [getattr(errors, name) for name in errors.__all__] + [SchemeError]
    codes = {error: error.exit_code for error in classes if error is not PlanishError}
    assert len(set(codes.values())) == len(codes)
    assert not set(codes.values()) & {0, 1, 2, 130}
