"""What goes wrong at a command line is said in one message that names the remedy, and nothing is ignored in silence."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.pipeline.recipe import Recipe
from tests.command import Run
from tests.tiny import write_tiny


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        (["compile"], ["[auto]", "[solved]", "[gptq]", "[off]", "[self]", "[16]", "[cpu]", "[on]", "[ort]"]),
        (["inspect"], ["[self]"]),
        (["eval"], ["[the Hub]", "[all]", "[~/.cache/planish]"]),
        (["study", "selection"], ["[self]", "[cpu]"]),
        (["doctor"], ["[auto]", "[ort]"]),
    ],
)
def test_help_shows_defaults(run: Run, command: list[str], defaults: list[str]) -> None:
    shown = " ".join(run(*command, "--help").out.split())
    assert [each for each in defaults if each not in shown] == []


def test_help_lists_the_commands_in_whole_sentences(run: Run) -> None:
    _, _, commands = run("--help").out.partition("Commands:")
    assert len(commands.splitlines()) > 9
    assert all(line.endswith(".") and not line.endswith("..") for line in commands.split("\n") if line.strip())


def test_wrong_usage_is_one_sentence(run: Run) -> None:
    refused = run("bench", "bundle", "--tokens", 0)
    assert refused.err.splitlines()[-1].startswith("Error: Invalid value for '--tokens'")


@pytest.mark.parametrize("command", ["compile", "export"])
def test_a_bundle_is_no_checkpoint(run: Run, bundle: Bundle, tmp_path: Path, command: str) -> None:
    scheme = ("--scheme", "w4a4") if command == "compile" else ()
    refused = run(command, bundle.path, *scheme, "-o", tmp_path / "out")
    assert (refused.code, "is a bundle" in refused.err) == (10, True), refused.err


def test_an_empty_name_is_no_checkpoint(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a script passes whose variable is not set; the current folder is not meant, even where it is a checkpoint.
    monkeypatch.chdir(tiny)
    refused = run("compile", "", "--scheme", "w4a4", "-o", tmp_path / "out")
    assert (refused.code, "an empty name" in refused.err) == (10, True), refused.err


def test_an_unknown_target_is_one_problem(run: Run, bundle: Bundle) -> None:
    refused = run("build", bundle.path, "--target", "tpu")
    assert refused.code == 19
    assert refused.err == "error: 'targets.0' is 'tpu': Input should be 'ort', 'rtx' or 'tensorrt'\n"


@pytest.mark.parametrize(
    "option",
    [
        ("--sm", 89),
        ("--max-batch-size", 2),
        ("--max-input-len", 8),
        ("--plugins", "require"),
        ("--tensorrt-version", "10.3"),
    ],
)
def test_settings_of_engines_without_one(
    run: Run, tiny: Path, bundle: Bundle, tmp_path: Path, option: tuple[str, object]
) -> None:
    compiled = run("compile", tiny, "--scheme", "w4a4", "--select", "none", *option, "-o", tmp_path / "out")
    assert (compiled.code, "is a setting of engines" in compiled.err) == (19, True), compiled.err
    built = run("build", bundle.path, "--target", "ort", *option)
    assert (built.code, "is a setting of engines" in built.err) == (19, True), built.err


@pytest.mark.parametrize(
    ("target", "option"),
    [
        ("rtx", ("--plugins", "require")),
        ("rtx", ("--tensorrt-version", "10.3")),
        ("tensorrt", ("--sm", 89, "--tensorrt-version", "10.3")),
    ],
)
def test_settings_of_the_other_engine(
    run: Run, tiny: Path, bundle: Bundle, tmp_path: Path, target: str, option: tuple[object, ...]
) -> None:
    compiled = run(
        "compile", tiny, "--scheme", "w4a4", "--select", "none", "--target", target, *option, "-o", tmp_path / "out"
    )
    assert (compiled.code, f"does nothing for {target}" in compiled.err) == (19, True), compiled.err
    built = run("build", bundle.path, "--target", target, *option)
    assert (built.code, f"does nothing for {target}" in built.err) == (19, True), built.err


def test_a_build_of_two_targets(run: Run, bundle: Bundle) -> None:
    refused = run("build", bundle.path, "--target", "ort", "--target", "rtx")
    assert (refused.code, "one target" in refused.err) == (2, True), refused.err


@pytest.mark.parametrize(
    "option",
    [
        ("--dataset", "self"),
        ("--nsamples", 16),
        ("--seqlen", 32),
        ("--seed", 0),
        ("--round", "nearest"),
        ("--refine", 0),
        ("--polish", 0),
        ("--device", "cpu"),
        ("--no-verify-passes",),
    ],
)
@pytest.mark.parametrize("flat", [("w4a4", "--select", "none"), ("w16a16k4v4",)])
def test_settings_of_flattening_where_nothing_is_flattened(
    run: Run, tiny: Path, tmp_path: Path, flat: tuple[str, ...], option: tuple[object, ...]
) -> None:
    refused = run("compile", tiny, "--scheme", *flat, *option, "-o", tmp_path / "out")
    assert (refused.code, "is a setting of flattening" in refused.err) == (25, True), refused.err
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_serves_without_its_flattening_too(run: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny}\nscheme: w4a4\ndataset: {text}\nnsamples: 4\nselect: fixed:affine\n")
    made = run("compile", "--recipe", recipe, "--select", "none", "-o", tmp_path / "out")
    assert made.code == 0, made.err


@pytest.mark.parametrize(
    ("command", "option", "missing"),
    [
        (["eval", "--text"], ["--limit", 5], "--tasks"),
        (["eval", "--text"], ["--answers", "kept"], "--tasks"),
        (["eval", "--text"], ["--task-data", "kept"], "--tasks"),
        (["eval", "--tasks", "piqa"], ["--windows", 5], "--text or --dataset"),
        (["eval", "--tasks", "piqa"], ["--seqlen", 64], "--text or --dataset"),
        (["compare", "--text"], ["--limit", 5], "--tasks"),
        (["compare", "--text"], ["--no-kl", "--against", "smollm2"], "--kl"),
        (["generate"], ["--top-p", 0.9], "--temperature"),
        (["generate"], ["--seed", 0], "--temperature"),
        (["study", "selection", "--scheme", "w4a4"], ["--windows", 5], "--perplexity"),
        (["study", "selection", "--scheme", "w4a4"], ["--polish", 0], "--perplexity"),
    ],
)
def test_options_that_would_do_nothing(
    run: Run, bundle: Bundle, text: Path, command: list[str], option: list[object], missing: str
) -> None:
    read = [text] if command[-1] == "--text" else []
    others = {"compare": [bundle.path], "generate": ["a prompt"]}.get(command[0], [])
    refused = run(*command, *read, bundle.path, *others, *option)
    assert (refused.code, f"does nothing without {missing}" in " ".join(refused.err.split())) == (2, True), refused.err


@pytest.mark.parametrize("option", ["--plot", "--report"])
def test_a_comparison_looks_where_it_shall_write(
    run: Run, bundle: Bundle, text: Path, tmp_path: Path, option: str
) -> None:
    refused = run(
        "compare",
        bundle.path,
        bundle.path,
        "--text",
        text,
        option,
        tmp_path / "none" / ("page.html" if option == "--report" else "plot.svg"),
    )
    assert (refused.code, option in refused.err) == (2, True), refused.err


def test_a_study_looks_at_the_text_first(run: Run, tiny: Path, tmp_path: Path) -> None:
    asked = ("--perplexity", tmp_path / "nothing.txt", "-o", tmp_path / "out")
    refused = run("study", "selection", tiny, "--scheme", "w4a4", *asked)
    assert (refused.code, "nothing.txt" in refused.err, (tmp_path / "out").exists()) == (20, True, False), refused.err


def test_a_context_beyond_the_model(run: Run, tiny: Path, bundle: Bundle, tmp_path: Path) -> None:
    compiled = run(
        "compile", tiny, "--scheme", "w4a4", "--select", "none", "--max-context", 257, "-o", tmp_path / "out"
    )
    assert (compiled.code, "beyond the model's 256" in compiled.err) == (19, True), compiled.err
    built = run("build", bundle.path, "--target", "rtx", "--max-context", 257)
    assert (built.code, "beyond the model's 256" in built.err) == (19, True), built.err


def test_a_target_that_is_not_there_can_be_added(run: Run, bundle: Bundle, text: Path) -> None:
    refused = run("eval", bundle.path, "--text", text, "--target", "rtx")
    assert refused.code == 17
    assert f"planish build {bundle.path} --target rtx" in refused.err


def test_texts_that_are_too_short(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("ten tokens")
    refused = run("eval", bundle.path, "--text", few)
    assert refused.code == 20
    assert "0 windows of 256 fit, 20 were asked for. Ask for shorter ones (--seqlen), or give more text" in refused.err


def test_bench_of_a_float_export_or_beyond_the_context(run: Run, bundle: Bundle, float_bundle: Bundle) -> None:
    refused = run("bench", float_bundle.path)
    assert (refused.code, "is a float export itself" in refused.err) == (31, True), refused.err
    refused = run("bench", bundle.path, "--tokens", 250)
    assert (refused.code, "Ask for a prompt of 1 to 222 tokens" in refused.err) == (20, True), refused.err


def test_a_cache_that_is_larger_than_float16(run: Run, float_bundle: Bundle) -> None:
    assert "2.00 x larger than float16" in run("inspect", float_bundle.path).out


def test_a_study_of_one_layer(run: Run, text: Path, tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "one", num_hidden_layers=1)
    few = ("--dataset", text, "--nsamples", 4, "--seqlen", 32)
    studied = run("study", "selection", model, "--scheme", "w3a3", *few, "--json")
    assert studied.code == 0, studied.err
    assert re.search("ffn of heavy tails .* cannot be tested: there is one layer", studied.err)
    json.dumps(studied.json, allow_nan=False)


def test_json_is_ascii_and_text_is_written_in_any_encoding(bundle: Bundle) -> None:
    command = [sys.executable, "-c", "from planish.compiler.cli import main; main()", "generate", str(bundle.path), "é"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for flags in ([], ["--json"]):
        done = subprocess.run(
            [*command, "--max-new-tokens", "8", *flags], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"] == "".join(bundle.generate("é", max_new_tokens=8))


def test_a_prompt_that_is_not_utf8(run: Run, bundle: Bundle) -> None:
    refused = run("generate", bundle.path, os.fsdecode(b"caf\xe9"))
    assert (refused.code, "is not in UTF-8" in refused.err) == (20, True), refused.err


def test_a_full_disk_behind_stdout(bundle: Bundle) -> None:
    command = [sys.executable, "-c", "from planish.compiler.cli import main; main()", "inspect", str(bundle.path)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("content", "message"), [("{{", "cannot be read as JSON"), ('{"eos_token_id": "x"}', "is 'x'")]
)
def test_a_bad_generation_config_is_found_before_the_work(
    run: Run, tiny: Path, tmp_path: Path, content: str, message: str
) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "generation_config.json").write_text(content)
    refused = run("compile", model, "--scheme", "w4a4", "--select", "none", "-o", tmp_path / "out")
    assert (refused.code, message in refused.err) == (10, True), refused.err


def test_weights_that_overflow(run: Run, tiny: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 3] = 1e30
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused = run("compile", model, "--scheme", "w4a8", "--select", "none", "-o", tmp_path / "out")
    assert (refused.code, "What layer 0 puts out is too large" in refused.err) == (10, True), refused.err


def test_high_impact_channels_of_a_folder_without_any(run: Run, tiny: Path, tmp_path: Path) -> None:
    refused = run("compile", tiny, "--scheme", "w3a3", "--high-impact", tiny, "-o", tmp_path / "out")
    assert (refused.code, f"{tiny} holds no plan.safetensors" in refused.err) == (26, True), refused.err


def test_a_share_of_too_few_channels(run: Run, tiny: Path, tmp_path: Path) -> None:
    refused = run("compile", tiny, "--scheme", "w3a3", "--hic-ratio", 0.5, "-o", tmp_path / "out")
    assert (refused.code, "The 64 channels at attn_in are too few" in refused.err) == (25, True), refused.err


def test_recipes_whose_mistakes_are_of_yaml(run: Run, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {tiny}\n\tscheme: w4a4\n")
    refused = run("compile", "--recipe", path, "-o", tmp_path / "out")
    assert (refused.code, len(refused.err.splitlines())) == (19, 1), refused.err
    path.write_text(f"model: {tiny}\nscheme: w4a4\ntargets: ort\n")
    refused = run("compile", "--recipe", path, "-o", tmp_path / "out")
    assert (refused.code, "'targets' is 'ort': Input should be a list, such as [ort]" in refused.err) == (19, True)


def test_a_target_named_twice_is_one(tiny: Path) -> None:
    assert Recipe(model=str(tiny), scheme="w4a4", targets=("ort", "rtx", "ort")).targets == ("ort", "rtx")


def test_sites_stay_whole_in_a_narrow_terminal(run: Run, flattened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = run("inspect", flattened.path).out.splitlines()
    assert {"attn_in", "attn_out", "ffn_in", "ffn_out", "key", "value"} <= {line.partition(" ")[0] for line in lines}
