"""What can go wrong with calibration, selection and plans, through the command line: one line, and its exit code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.pipeline.compile import compile_model
from tests.command import Run
from tests.high_impact import WIDE
from tests.tiny import write_tiny


@pytest.fixture
def compiled(run: Run, tiny: Path, text: Path, tmp_path: Path) -> Callable[..., Any]:
    """Compiles with little calibration and the options given; the last of two equal options wins."""

    def compiled(*options: object, model: Path = tiny) -> Any:
        few = ("--dataset", text, "--nsamples", 6, "--seqlen", 32, "--polish", 0)
        return run("compile", model, "--scheme", "w4a4k4v4", *few, *options, "-o", tmp_path / "out")

    return compiled


def refused(done: Any, code: int, message: str) -> None:
    assert (done.code, message in done.err) == (code, True), (done.code, done.err)
    assert done.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--select", "best"], 25, "'best' is not a selection policy"),
        (["--select", "fixed"], 25, "needs one kind"),
        (["--select", "measured:lots"], 25, "'lots' is not a number"),
        (["--select", "kurtosis:topm=3,1"], 25, "ask for 0 to 2"),
        (["--select", "search:all"], 25, "the policy search has no option 'all'"),
        (["--scheme", "w16a16k4v4", "--select", "kurtosis"], 25, "leaves linears in floating point"),
        (["--nsamples", "3"], 24, "3 calibration sequences are too few"),
        (["--nsamples", "0"], 24, "hold nothing"),
        (["--seqlen", "257"], 24, "longer than the model's context of 256"),
        (["--seqlen", "8"], 24, "too short to stand for text"),
        (["--nsamples", "5000"], 24, "5000 were asked for"),
        (["--seed", "-1"], 24, "is negative"),
        (["--dataset", "nowhere.txt"], 24, "'nowhere.txt' does not exist"),
        (["--device", "gpu"], 28, "'gpu' is not a device. Give cpu, cuda, or cuda:N"),
        (["--device", "cuda:99"], 28, "The device cuda:99 was asked for, and"),
        (["--plan", "nowhere.json"], 26, "nowhere.json cannot be read"),
        (["--plan", "plan.json", "--select", "measured"], 25, "Leave out --plan or --select"),
    ],
)
def test_bad_options(compiled: Callable[..., Any], tmp_path: Path, options: list[str], code: int, message: str) -> None:
    refused(compiled(*options), code, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no text"), ("the hen", "were asked for"), ("北京是中国的首都。" * 400, "does not suit the tokenizer")],
)
def test_bad_texts(compiled: Callable[..., Any], tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(content, encoding="utf-8")
    refused(compiled("--dataset", path, "--select", "fixed:rotation"), 24, message)


@pytest.mark.parametrize("select", ["fixed:affine", "measured"])
def test_a_model_that_overflows(compiled: Callable[..., Any], tiny: Path, tmp_path: Path, select: str) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for module in ("q_proj", "k_proj", "v_proj"):
        tensors[f"model.layers.1.self_attn.{module}.weight"][:, 5] = 0
    tensors["model.layers.1.input_layernorm.weight"][5] = 1e22
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    message = "Decoder block 1 cannot be flattened: what flows at attn_in is too large for float32"
    refused(compiled("--select", select, model=model), 24, message)


def test_dead_channels_compile(compiled: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = 0
    tensors["model.layers.0.mlp.up_proj.weight"][7] = 0
    tensors["model.layers.1.self_attn.o_proj.weight"][:] = 0
    tensors["model.layers.1.mlp.down_proj.weight"][:] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    done = compiled(model=model)
    assert done.code == 0, done.err


@pytest.fixture(scope="module")
def planned(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with a plan."""
    settings = {"dataset": str(text), "nsamples": 6, "seqlen": 32, "polish": 0, "select": "fixed:rotation"}
    return compile_model(tiny, tmp_path_factory.mktemp("planned") / "out", scheme="w4a4k4v4", **settings)


def edited(bundle: Bundle, folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    content = json.loads((bundle.path / "plan.json").read_text())
    edit(content["transforms"])
    path = folder / "plan.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda entry: entry["sites"][0].update(form="magic"), "layer 0, site attn_in: 'form' is 'magic'"),
        (lambda entry: entry["sites"][0].update(kind="affine"), "is of the kind rotation, not affine"),
        (lambda entry: entry["sites"][1].update(form="dense", kind="affine"), "attn_out takes identity, rotation"),
        (lambda entry: entry["sites"].pop(), "layer 1, site value: there is no entry"),
        (lambda entry: entry["sites"][3].update(layer=7), "layer 7, site ffn_out: the model has only 2 layers"),
        (lambda entry: entry["sites"][3].update(site="elsewhere"), "'site' is 'elsewhere'"),
        (lambda entry: entry.pop("model"), "does not say in 'model'"),
    ],
)
def test_plans_edited_into_nonsense(
    compiled: Callable[..., Any], planned: Bundle, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    refused(compiled("--plan", edited(planned, tmp_path, edit)), 26, message)


def test_a_plan_of_another_model(compiled: Callable[..., Any], planned: Bundle, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "model", seed=1)
    refused(compiled("--plan", planned.path / "plan.json", model=other), 26, "made for another model: its fingerprint")
    deeper = write_tiny(tmp_path / "deeper", num_hidden_layers=3)
    refused(compiled("--plan", planned.path / "plan.json", model=deeper), 26, "its num_hidden_layers is 2")


def test_a_bundle_without_transforms_has_no_plan(compiled: Callable[..., Any], bundle: Bundle) -> None:
    refused(compiled("--plan", bundle.path / "plan.json"), 26, "it is not a plan that chose any")


def test_a_study_of_selection(run: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    few = ("--dataset", text, "--nsamples", 6, "--seqlen", 32, "--polish", 0)
    options = ("--scheme", "w3a3k3v3", *few, "-o", tmp_path / "study", "--perplexity", text, "--windows", 2)
    options += ("--search",)
    done = run("study", "selection", tiny, *options, "--json")
    assert done.code == 0, done.err
    found = done.json
    policies = [each["policy"] for each in found["policies"]]
    assert policies[:2] == ["fixed:rotation", "fixed:affine"]
    assert policies[-2:] == ["measured:0.1", "search"]
    assert set(found["perplexity"]) == {"none", *policies}
    assert all(perplexity > 1 for perplexity in found["perplexity"].values())
    for sentence in found["verdict"]:
        assert sentence in done.err
    # A second run reads what the first one kept.
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*.json")}
    assert run("study", "selection", tiny, *options, "--json").json == found
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*.json")} == kept


def test_a_study_needs_low_bits_and_a_place_for_bundles(run: Run, tiny: Path, text: Path) -> None:
    refused(run("study", "selection", tiny, "--scheme", "w16a16"), 25, "there is nothing to select")
    refused(run("study", "selection", tiny, "--scheme", "w4a4", "--device", "cuda:99"), 28, "cuda:99 was asked for")
    done = run("study", "selection", tiny, "--scheme", "w4a4", "--perplexity", text)
    assert (done.code, "give --output" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--avg-bits", "2.1"], 25, "2.1 bits per weight are too few: the low format alone takes 2.1"),
        (["--avg-bits", "3.9"], 25, "more than high-impact channels of 4 bits could use"),
        (["--avg-bits", "0"], 19, "'avg_bits' is 0.0"),
        (["--avg-bits", "3", "--hic-bits", "5"], 19, "'hic_bits' is 5"),
        (["--avg-bits", "3", "--hic-policy", "guessed"], 19, "'hic_policy' is 'guessed'"),
        (["--avg-bits", "3", "--round", "up"], 19, "'round' is 'up'"),
        (["--hic-ratio", "0.1"], 25, "A share of 0.1 of the 192 channels at attn_in cannot be high"),
        (["--hic-ratio", "0.4", "--avg-bits", "3"], 25, "Leave out --avg-bits or --hic-ratio"),
        (["--hic-ratio", "0.4", "--hic-policy", "solved"], 25, "A ratio leaves nothing to solve"),
        (["--hic-bits", "4"], 25, "High-impact channels need a number"),
        (["--hic-score", "fisher"], 25, "High-impact channels need a number"),
        (["--no-hic-weighting"], 25, "High-impact channels need a number"),
        (["--avg-bits", "3", "--hic-score", "loud"], 19, "'hic_score' is 'loud'"),
        (["--avg-bits", "3", "--hic-candidates", "0,few"], 19, "'hic_candidates.1' is 'few'"),
        (["--hic-ratio", "0.4", "--hic-candidates", "0.1"], 25, "a share that is fixed tries nothing"),
        (["--avg-bits", "3", "--hic-policy", "fixed", "--no-hic-weighting"], 25, "a share that is fixed tries nothing"),
        (["--avg-bits", "3", "--select", "none"], 25, "nothing is flattened here"),
        (["--avg-bits", "4.5", "--scheme", "w4a16", "--hic-bits", "4"], 25, "no gain where weights have 4"),
        (["--avg-bits", "3", "--scheme", "w16a16k4v4"], 25, "nothing is flattened here"),
        (["--round", "adaround"], 25, "AdaRound is for high-impact channels"),
        (["--avg-bits", "3", "--high-impact", "out"], 25, "says which channels are high"),
    ],
)
def test_impossible_high_impact_channels(
    compiled: Callable[..., Any], wide: Path, tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    refused(compiled("--scheme", "w2a16", *options, model=wide), code, message)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with room for several steps of channels."""
    return write_tiny(tmp_path_factory.mktemp("wide") / "model", **WIDE)


def test_orders_that_do_not_match_the_checkpoint(compiled: Callable[..., Any], wide: Path, tmp_path: Path) -> None:
    done = compiled("--scheme", "w2a16", "--select", "fixed:affine", "--hic-ratio", 0.34, model=wide)
    assert done.code == 0, done.err
    made = (tmp_path / "out").rename(tmp_path / "made")
    other = write_tiny(tmp_path / "other", **{**WIDE, "hidden_size": 256, "num_attention_heads": 8})
    refused(compiled("--scheme", "w2a16", "--high-impact", made, model=other), 26, "layer 0, site attn_in")
    tensors = load_file(made / "plan.safetensors")
    with safe_open(made / "plan.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    tensors["layers.1.ffn_out.order"][0] = tensors["layers.1.ffn_out.order"][1]
    save_file(tensors, made / "plan.safetensors", metadata=metadata)
    refused(compiled("--scheme", "w2a16", "--high-impact", made, model=wide), 26, "layer 1, site ffn_out: the order")


def test_high_impact_channels_by_the_command(
    run: Run, compiled: Callable[..., Any], wide: Path, tmp_path: Path
) -> None:
    done = compiled("--scheme", "w2a16", "--avg-bits", 3.1, "--hic-policy", "fixed", "--json", model=wide)
    assert done.code == 0, done.err
    assert 3.0 < done.json["average_bits"] <= 3.1
    again = run("inspect", tmp_path / "out", "--json")
    assert again.json["average_bits"] == done.json["average_bits"]


def test_the_score_of_the_paper_by_the_command(
    run: Run, compiled: Callable[..., Any], wide: Path, tmp_path: Path
) -> None:
    how = ("--hic-score", "fisher", "--hic-candidates", "0,0.34", "--no-hic-weighting")
    done = compiled("--scheme", "w2a16", "--select", "fixed:affine", "--avg-bits", 3.1, *how, model=wide)
    assert done.code == 0, done.err
    found = run("inspect", tmp_path / "out", "--json").json
    policy = found["high_impact"]["policy"]
    assert (policy["score"], policy["candidates"], policy["weighted"]) == ("fisher", [0.0, 0.34], False)
    assert {each["weight"] for each in found["high_impact"]["losses"]} == {1.0}
    assert found["high_impact"]["losses"][0]["counts"]["attn_in"] == [0, 64]
    assert found["recipe"]["hic_score"] == "fisher"
