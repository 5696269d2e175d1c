"""Commands that run a bundle's engine: ONNX Runtime's figures where there is a GPU, one error where there is none."""

import json
import shutil
from pathlib import Path

import pytest

from planish.compiler.backends.tensorrt import lowering
from planish.compiler.bundle.bundle import Bundle
from planish.compiler.errors import TextError
from planish.compiler.measure import bench as bench_module
from planish.compiler.measure.bench_worker import WARM_UP
from planish.compiler.measure.bench_worker import main as measure
from planish.compiler.measure.subject import open_subject
from planish.compiler.pipeline.build import build_target
from tests.command import Run
from tests.engines import StaysFloat32
from tests.host_gpu import HostGpu
from tests.host_tensorrt import HostTensorrt

FEW = ("--seqlen", 32, "--windows", 2)
LIMITS = {"max_context": 48, "max_batch_size": 2, "max_input_len": 16}


@pytest.fixture(scope="module")
def with_engine(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine, in float32, so that nothing but the order of sums differs."""
    path = shutil.copytree(bundle.path, tmp_path_factory.mktemp("engine") / "bundle")
    with pytest.MonkeyPatch.context() as monkeypatch:
        HostTensorrt(HostGpu().install(monkeypatch)).install(monkeypatch, "rtx")
        monkeypatch.setattr(lowering, "Float16Pass", StaysFloat32)
        build_target(path, "rtx", sms=(89,), **LIMITS)  # type: ignore[arg-type]
    return path


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> HostGpu:
    return HostTensorrt(HostGpu().install(monkeypatch)).install(monkeypatch, "rtx").gpu


def test_eval(run: Run, with_engine: Path, text: Path, gpu: HostGpu) -> None:
    done = run("eval", with_engine, "--text", text, *FEW, "--target", "rtx", "--json")
    assert done.code == 0, done.err
    expected = run("eval", with_engine, "--text", text, *FEW, "--threads", 1, "--json")
    assert done.json["perplexity"] == pytest.approx(expected.json["perplexity"], rel=1e-3)
    assert done.json["runs_on"] == "TensorRT-RTX 11.1.0.106, Host GPU (SM 89)"
    assert "run by TensorRT-RTX 11.1.0.106, Host GPU (SM 89)" in done.err
    assert "run by" not in expected.err
    assert expected.json["runs_on"].startswith("ONNX Runtime")
    # Everything is given back.
    assert gpu.used == 0


def test_the_context_is_that_of_the_engine(with_engine: Path, text: Path, run: Run, gpu: HostGpu) -> None:
    subject = open_subject(with_engine, target="rtx")
    assert subject.max_context == 48
    assert subject.fingerprint != open_subject(with_engine, target="ort", threads=1).fingerprint
    beyond = run("eval", with_engine, "--text", text, "--seqlen", 49, "--target", "rtx")
    assert (beyond.code, "longer than the model's context" in beyond.err) == (20, True)
    with pytest.raises(TextError, match="the model sees 48"):
        list(Bundle.open(with_engine).generate("x" * 60, target="rtx"))


def test_generate(run: Run, with_engine: Path, gpu: HostGpu) -> None:
    prompt = ("the hen and the tin man", "--max-new-tokens", 6, "--json")
    done = run("generate", with_engine, *prompt, "--target", "rtx")
    assert done.code == 0, done.err
    assert done.json["text"] == run("generate", with_engine, *prompt, "--threads", 1).json["text"]


def test_compare(run: Run, with_engine: Path, tiny: Path, text: Path, gpu: HostGpu) -> None:
    done = run("compare", with_engine, tiny, "--text", text, *FEW, "--no-speed", "--target", "rtx", "--json")
    assert done.code == 0, done.err
    alone = run("eval", with_engine, "--text", text, *FEW, "--threads", 1, "--kl", "--json").json
    assert done.json["models"][0]["evaluations"][0]["kl"] == pytest.approx(alone["kl"], rel=1e-2)


def test_speed(with_engine: Path, gpu: HostGpu) -> None:
    runnable = Bundle.open(with_engine).runnable("rtx")
    assert runnable.runs_on == "rtx"
    found = measure(runnable, 1, 16, 3)
    assert min(found["prefill"], found["decode"], found["load_seconds"]) > 0


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "BUNDLE", "--text", "TEXT"],
        ["generate", "BUNDLE", "hi"],
        ["bench", "BUNDLE"],
        ["compare", "MODEL", "BUNDLE", "--text", "TEXT"],
    ],
)
def test_no_gpu(
    command: list[str], run: Run, with_engine: Path, text: Path, gpu: HostGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a GPU the float model is not exported, nor a checkpoint read.
    monkeypatch.setattr(bench_module, "_export", None)
    gpu.cuInit = lambda _: 100  # type: ignore[method-assign]
    paths = {"BUNDLE": with_engine, "MODEL": Path("none"), "TEXT": text}
    arguments = [paths.get(each, each) for each in command]
    done = run(*arguments, "--target", "rtx")
    assert (done.code, done.out) == (22, "")
    (line,) = done.err.splitlines()
    assert line.startswith(
        "error: This engine was built for SM 89 with TensorRT-RTX 11.1.0.106. This machine has an NVIDIA"
    )
    without = run(*arguments, "--target", "tensorrt")
    assert (without.code, "was compiled for ort, rtx, not for tensorrt" in without.err) == (17, True)
    for provider in ("--target", "rtx", "--provider", "cuda"), ("--target", "tpu"), ("--provider", "tpu"):
        assert run(*arguments, *provider).code == 2
    cuda = run(*arguments, "--provider", "cuda")
    assert (cuda.code, "onnxruntime-gpu" in cuda.err, cuda.out) == (5, True, "")


def test_bench_says_what_ran(run: Run, with_engine: Path, gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(runnable: object, _: int, tokens: int, new: int) -> dict[str, float]:
        asked.append((runnable.runs_on, tokens + WARM_UP + new))  # type: ignore[attr-defined]
        return dict.fromkeys(("prefill", "decode", "resident_mib", "peak_mib", "load_seconds"), 1.0)

    monkeypatch.setattr(bench_module, "_measure", measured)
    done = run("bench", with_engine, "--target", "rtx", "--repeats", 1, "--json")
    assert done.code == 0, done.err
    # As many tokens as the engine takes, which is fewer than the model does.
    assert asked == [("rtx", 48), ("cpu", 48)]
    assert done.json["runs_on"] == "rtx"
    assert "bundle on rtx and float" in done.err
    assert json.loads(done.out)["decode_speedup"] == 1
    beyond = run("bench", with_engine, "--target", "rtx", "--tokens", 15)
    assert (beyond.code, "context of 48. Ask for a prompt of 1 to 14 tokens" in beyond.err) == (20, True)
