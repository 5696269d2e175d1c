"""`planish eval` and `planish compare`: what they print, and the exit code of everything that can be wrong."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.harness import tasks
from tests.command import Run
from tests.task_examples import EXAMPLES
from tests.tiny import write_tiny

FEW = ("--seqlen", 32, "--windows", 2, "--threads", 1)
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed (extra 'eval')"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Answers are kept in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the examples of all tasks."""
    folder = tmp_path / "examples"
    folder.mkdir()
    for task, examples in EXAMPLES.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in examples), encoding="utf-8")
    return folder


@needs_harness
def test_eval_measures_all_at_once(run: Run, bundle: Bundle, text: Path, data: Path, cache: Path) -> None:
    names = ",".join(EXAMPLES)
    options = ("--text", text, *FEW, "--kl", "--tasks", names, "--task-data", data, "--limit", 3)
    done = run("eval", bundle.path, *options, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["kl"] > 0
    assert 0 < found["agreement"] <= 1
    assert set(found["tasks"]) == set(EXAMPLES)
    assert found["tasks"]["piqa"]["examples"] == 3
    assert set(found["tasks"]["piqa"]["metrics"]) == {"acc", "acc_norm"}
    assert found["tasks"]["winogrande"]["metrics"]["acc"]["stderr"] is None
    assert 0 <= found["mean_score"]["value"] <= 1
    assert f"KL divergence {found['kl']:.6f} nats" in done.err
    assert [path.suffix for path in (cache / "planish" / "answers").iterdir()] == [".jsonl"]

    again = run("eval", bundle.path, "--tasks", names, "--task-data", data, "--limit", 3)
    assert "requests were answered before" in again.err
    assert "lambada_openai" in again.out
    assert "perplexity" in again.out
    assert "KL divergence" not in again.out


#: Examples with every field that the data sets Rowan/hellaswag and EleutherAI/lambada_openai have.
HUB_LAYOUT: dict[str, list[dict[str, Any]]] = {
    "hellaswag": [
        {
            "ind": 24 + i,
            "activity_label": "Removing ice from car",
            "ctx_a": f"Then, the man number {i} writes over the snow covering the window of a car.",
            "ctx_b": "then" if i % 2 else "",
            "ctx": f"Then, the man number {i} writes over the snow covering the window of a car. then",
            "endings": [
                ", the man adds wax to the windshield and cuts it." * (i + 1),
                f" [substeps] the {i} hens ran in.",
                ", the man puts on a christmas coat [title] Knitted with netting.",
                ", the man continues removing the snow on his car.",
            ],
            "source_id": "activitynet~v_-1IBHYS3L-Y",
            "split": "val",
            "split_type": "indomain",
            "label": str(i % 4),
        }
        for i in range(6)
    ],
    "lambada_openai": [
        {"text": text}
        for text in (
            'the hen said, "café!"\n\nthe tin man heard the hen',
            "In my palm is a clear stone, and inside it is a small ivory statuette. the man ran out in",
            "her otter ran in  the inn",
        )
    ],
}


@needs_harness
def test_files_in_the_layout_of_the_hub(run: Run, tiny: Path, float_bundle: Bundle, tmp_path: Path) -> None:
    """The harness's own backend, and its own reader of the same files, give the same scores."""
    pytest.importorskip("accelerate", reason="lm_eval's backend for transformers needs it")
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    files = {}
    for task, examples in HUB_LAYOUT.items():
        files[task] = tmp_path / f"{task}.jsonl"
        files[task].write_text("".join(json.dumps(each) + "\n" for each in examples), encoding="utf-8")
    done = run("eval", float_bundle.path, "--tasks", ",".join(files), "--task-data", tmp_path, "--json")
    assert done.code == 0, done.err
    splits = {"hellaswag": ("validation_split", "validation"), "lambada_openai": ("test_split", "test")}
    specs = [
        {
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            "training_split": None,
            splits[task][0]: splits[task][1],
            "dataset_kwargs": {"data_files": {splits[task][1]: str(path)}, "cache_dir": str(tmp_path / "read")},
        }
        for task, path in files.items()
    ]
    theirs = HFLM(
        LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval(),
        tokenizer=AutoTokenizer.from_pretrained(tiny),
        batch_size=2,
        device="cpu",
    )
    read = tasks._manager(True).load([{"group": "all", "task": specs}])["tasks"]
    expected = evaluate(theirs, {"tasks": dict(read)}, bootstrap_iters=0)["results"]
    for task, names in (("hellaswag", ["acc", "acc_norm"]), ("lambada_openai", ["perplexity", "acc"])):
        assert done.json["tasks"][task]["examples"] == len(HUB_LAYOUT[task])
        for name in names:
            found = done.json["tasks"][task]["metrics"][name]["value"]
            assert found == pytest.approx(expected[task][f"{name},none"], rel=1e-4), (task, name)


def test_divergence_from_a_named_model(run: Run, bundle: Bundle, tiny: Path, text: Path) -> None:
    of_recipe = run("eval", bundle.path, "--text", text, *FEW, "--kl", "--json").json
    named = run("eval", bundle.path, "--text", text, *FEW, "--against", tiny, "--json").json
    assert named["kl"] == pytest.approx(of_recipe["kl"], rel=1e-6)
    itself = run("eval", tiny, "--text", text, *FEW, "--against", bundle.path, "--json").json
    assert itself["kl"] == pytest.approx(named["kl"], rel=0.5)


@needs_harness
def test_compare(run: Run, bundle: Bundle, tiny: Path, text: Path, data: Path, tmp_path: Path) -> None:
    chosen = ("--text", text, *FEW, "--tasks", "piqa,arc_easy", "--task-data", data)
    plot, report = tmp_path / "plot.svg", tmp_path / "compared.html"
    done = run("compare", tiny, bundle.path, *chosen, "--no-speed", "--plot", plot, "--report", report, "--json")
    assert done.code == 0, done.err
    full, low = done.json["models"]
    assert (low["format"], full["format"]) == ("w4a8k8v8", "float32")
    assert done.json["reference"] == "tiny"
    assert full["evaluations"][0]["kl"] == 0
    alone = run("eval", bundle.path, "--text", text, *FEW, "--kl", "--json").json
    for figure in ("perplexity", "kl", "agreement"):
        assert low["evaluations"][0][figure] == pytest.approx(alone[figure], rel=1e-9)
    assert low["weight_bytes"] < full["weight_bytes"]
    assert low["average_bits"] < 5 < full["average_bits"] == 32
    assert low["scores"]["piqa"]["examples"] == len(EXAMPLES["piqa"])
    assert low["speed"] is None
    texts = "".join(ElementTree.parse(plot).getroot().itertext())
    assert f"{low['evaluations'][0]['perplexity']:.3f}" in texts
    assert "prefill" not in texts
    assert "perplexity against stored bits" in texts
    page = report.read_text(encoding="utf-8")
    assert "http" not in page
    assert f"{low['evaluations'][0]['perplexity']:.3f}" in page
    score = low["scores"]["piqa"]["metrics"]["acc_norm"]
    assert f"{score['value']:.4f} ± {score['stderr']:.4f}" in page
    drawn = re.findall(r'data-plot="([^"]+)"', page)
    assert {"tradeoff", "perplexity", "piqa--acc-norm", "mean-of-the-tasks", "bits-per-weight"} <= {*drawn}
    assert "How fast they run" not in page
    shown = run("compare", bundle.path, tiny, "--text", text, *FEW, "--no-speed", "--no-kl")
    assert f"{low['evaluations'][0]['perplexity']:.3f}" in shown.out
    assert "KL" not in shown.out


def test_compare_on_two_texts(run: Run, bundle: Bundle, tiny: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    report = tmp_path / "compared.html"
    few = (*FEW, "--no-speed")
    done = run("compare", tiny, bundle.path, "--text", text, "--text", other, *few, "--report", report, "--json")
    assert done.code == 0, done.err
    assert done.json["texts"] == [str(text), str(other)]
    _, low = done.json["models"]
    alone = [run("eval", bundle.path, "--text", each, *FEW, "--kl", "--json").json for each in (text, other)]
    assert alone[0]["perplexity"] != pytest.approx(alone[1]["perplexity"], rel=1e-2)
    for found, expected in zip(low["evaluations"], alone, strict=True):
        for figure in ("perplexity", "kl", "agreement"):
            assert found[figure] == pytest.approx(expected[figure], rel=1e-9)
    page = report.read_text(encoding="utf-8")
    for each, expected in zip((text, other), alone, strict=True):
        assert f"perplexity on {each.name}" in page
        assert f"{expected['perplexity']:.3f}" in page


def test_compare_measures_speed(run: Run, bundle: Bundle, float_bundle: Bundle, text: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    done = run("compare", bundle.path, float_bundle.path, "--text", text, *FEW, "--plot", plot, "--json")
    assert done.code == 0, done.err
    assert done.json["reference"] == "tiny"
    for each in done.json["models"]:
        assert each["speed"]["prefill"] > each["speed"]["decode"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_models_of_different_tokenizers(run: Run, bundle: Bundle, text: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other")
    path = other / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = []
    path.write_text(json.dumps(content), encoding="utf-8")
    assert len(AutoTokenizer.from_pretrained(other)("the hen")["input_ids"]) == 7
    for command in (["compare", bundle.path, other], ["eval", bundle.path, "--against", other]):
        done = run(*command, "--text", text, *FEW)
        assert (done.code, "have different tokenizers" in done.err) == (31, True)


def test_models_of_other_numbers_of_logits(run: Run, bundle: Bundle, tiny: Path, text: Path, tmp_path: Path) -> None:
    padded = write_tiny(tmp_path / "padded", vocab_size=288)
    few = ("--text", text, *FEW)
    for command in (["compare", bundle.path, padded, "--no-speed"], ["eval", bundle.path, "--against", padded]):
        done = run(*command, *few)
        assert (done.code, "272 and 288 logits" in done.err) == (31, True), done.err
    # What is measured of each model alone does not need as many.
    done = run("compare", padded, bundle.path, "--no-kl", "--no-speed", *few, "--json")
    assert done.code == 0, done.err
    alone = run("eval", padded, *few, "--json").json
    assert done.json["models"][0]["evaluations"][0]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-9)


def test_windows_fit_into_the_context_of_the_reference(run: Run, bundle: Bundle, text: Path, tmp_path: Path) -> None:
    short = write_tiny(tmp_path / "short", max_position_embeddings=48)
    for command in (["eval", bundle.path], ["compare", bundle.path, bundle.path, "--no-speed"]):
        asked = (*command, "--against", short, "--text", text, "--windows", 2, "--threads", 1)
        done = run(*asked, "--json")
        assert done.code == 0, done.err
        found = done.json if command[0] == "eval" else done.json["models"][0]["evaluations"][0]
        assert found["seqlen"] == 48
        beyond = run(*asked, "--seqlen", 49)
        assert (beyond.code, "longer than the model's context of 48" in beyond.err) == (20, True)


def test_figures_beyond_what_json_holds(run: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    broken = write_tiny(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"] *= 1e5
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    done = run("eval", broken, "--text", text, *FEW, "--json")
    assert (done.code, "perplexity inf" in done.err) == (0, True)
    assert done.json["perplexity"] is None
    done = run("compare", tiny, broken, "--text", text, *FEW, "--no-speed", "--json")
    assert [each["evaluations"][0]["perplexity"] is None for each in done.json["models"]] == [False, True]
    # Python reads more than JSON.
    assert "Infinity" not in done.out


def test_nothing_to_compare_with(run: Run, bundle: Bundle, text: Path, tmp_path: Path) -> None:
    alone = run("compare", bundle.path, "--text", text)
    assert (alone.code, "Give two or more" in alone.err) == (31, True)
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    (copy / "recipe.yaml").write_text("model: gone/away/from/here\nscheme: w4a8\n")
    manifest = json.loads((copy / "planish.json").read_text())
    del manifest["files"]["recipe.yaml"]
    (copy / "planish.json").write_text(json.dumps(manifest))
    gone = run("eval", copy, "--text", text, *FEW, "--kl")
    assert (gone.code, "does not exist" in gone.err, "--against" in gone.err) == (31, True, True)


@needs_harness
def test_bad_tasks(run: Run, bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_manager", lambda _, few=tasks._manager: few(True))
    with (data / "piqa.jsonl").open("a") as file:
        file.write('{"goal": "g", "sol1": "a", "sol2": "b", "label": 7}\n')
    (data / "boolq.jsonl").write_text("\n")
    (data / "arc_easy.jsonl").unlink()
    for arguments, message in (
        (["piqa", "--task-data", data], "piqa.jsonl, line 6 is no example of piqa: 'label'"),
        (["boolq", "--task-data", data], "boolq.jsonl holds no examples"),
        (["arc_easy", "--task-data", data], "arc_easy cannot be read"),
        (["piqqa"], "no task 'piqqa'. Did you mean piqa"),
        (["piqa"], "cannot be read from the Hub"),
    ):
        done = run("eval", bundle.path, "--tasks", *arguments)
        assert (done.code, message in done.err) == (30, True), done.err


def test_bad_requests(run: Run, bundle: Bundle, tiny: Path, text: Path) -> None:
    for command in (
        ["eval", bundle.path],
        ["eval", bundle.path, "--text", text, "--dataset", "c4"],
        ["eval", bundle.path, "--text", text, "--target", "tpu"],
        ["eval", tiny, "--text", text, "--kl"],
        ["eval", bundle.path, "--tasks", "piqa", "--limit", 0],
        ["eval", bundle.path, "--tasks", "piqa", "--kl"],
        ["compare", bundle.path, tiny],
        ["compare", bundle.path, tiny, "--text", text, "--plot", "plot.pdf"],
        ["compare", bundle.path, tiny, "--text", text, "--report", "page.pdf"],
    ):
        assert run(*command).code == 2, command
    beyond = run("eval", bundle.path, "--text", text, "--seqlen", 257)
    assert (beyond.code, "longer than the model's context" in beyond.err) == (20, True)
    offline = run("eval", bundle.path, "--dataset", "wikitext2")
    assert (offline.code, "Connect to the network" in offline.err) == (20, True)
    engine = run("eval", bundle.path, "--text", text, "--target", "rtx")
    assert (engine.code, "not for rtx" in engine.err) == (17, True)
