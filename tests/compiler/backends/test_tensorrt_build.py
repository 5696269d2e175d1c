"""Building engines with TensorRT-RTX, without a GPU: what is written, what is refused, how a dead worker is told."""

import hashlib
import json
from pathlib import Path

import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from planish.compiler.backends.tensorrt import EngineBuild, build_engines, process
from planish.compiler.backends.tensorrt.job import Job
from planish.compiler.backends.tensorrt.lowering import lower_to_tensorrt
from planish.compiler.backends.tensorrt.process import run_job
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.errors import EngineBuildError, MissingExtraError
from planish.compiler.export.float_model import save_model
from planish.compiler.export.portable import portable_model
from planish.compiler.progress import Silent
from planish.compiler.quantize.codes import quantize_checkpoint
from planish.passes.scheme import Scheme
from tests.tiny import write_tiny

CONTEXT = 32
LAYERS = 2


class Recorder(Silent):
    """Remembers the steps of every stage."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}

    def step(self, stage: str, done: int, total: int) -> None:
        assert done <= total
        self.steps.setdefault(stage, []).append(done)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    folder = tmp_path_factory.mktemp("portable")
    checkpoint, scheme = open_checkpoint(write_tiny(folder / "checkpoint")), Scheme.parse("w3a3k3v3")
    model, _ = portable_model(checkpoint, scheme, quantize_checkpoint(checkpoint, scheme, folder / "codes"))
    return model


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def build(portable: ir.Model, recorder: Recorder, tmp_path_factory: pytest.TempPathFactory) -> EngineBuild:
    folder = tmp_path_factory.mktemp("engines") / "rtx"
    return build_engines(
        portable, folder, flavour="rtx", sms=(89, 86), max_batch=3, max_prompt=8, max_context=CONTEXT, progress=recorder
    )


@pytest.mark.trt
def test_the_folder_holds_engine_model_and_record_and_nothing_else(build: EngineBuild) -> None:
    names = {path.name for path in build.folder.iterdir()}
    assert names == {"model.engine", "model.onnx", "model.onnx.data", "engine.json"}
    record = json.loads((build.folder / "engine.json").read_text())
    for file in (record["engine"], *record["onnx"]):
        content = (build.folder / file["file"]).read_bytes()
        assert file["bytes"] == len(content) > 0
        assert file["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.trt
def test_the_record_says_what_was_built(build: EngineBuild) -> None:
    import tensorrt_rtx

    record = build.record
    assert (record.flavour, record.tensorrt, record.sms) == ("rtx", tensorrt_rtx.__version__, (86, 89))
    assert record.inputs["input_ids"].min == (1, 1)
    assert record.inputs["input_ids"].max == (3, 8)
    cache = record.inputs["past_key_values.1.value"]
    assert (cache.dtype, cache.min, cache.max) == ("float16", (1, 2, CONTEXT, 16), (3, 2, CONTEXT, 16))
    assert record.inputs["num_logits_to_keep"].is_shape
    assert record.outputs["logits"].dtype == "float32"
    assert len(record.outputs) == 1 + 2 * LAYERS
    assert record.build_seconds > 0


@pytest.mark.trt
def test_what_fell_back_is_named(build: EngineBuild) -> None:
    said = {fallback.what: fallback.instead for fallback in build.record.fallbacks}
    assert "fake-quantised" in said["low-bit KV cache"]
    assert "4 bits" in said["3-bit weight codes"]
    assert len(said) == 3


@pytest.mark.trt
def test_progress_only_goes_forward_and_ends_at_all(build: EngineBuild, recorder: Recorder) -> None:
    percents = recorder.steps["build rtx engine"]
    assert percents == sorted(set(percents))
    assert percents[-1] == 100
    assert len(percents) > 3
    assert recorder.steps["lower to rtx"][-1] == max(recorder.steps["lower to rtx"])


@pytest.mark.trt
def test_the_cache_is_updated_in_place_and_attention_is_fused(portable: ir.Model, tmp_path: Path) -> None:
    import tensorrt_rtx as trt

    path = save_model(lower_to_tensorrt(portable, CONTEXT), tmp_path)
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse_from_file(str(path))
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert kinds.count(trt.LayerType.KV_CACHE_UPDATE) == 2 * LAYERS
    assert kinds.count(trt.LayerType.ATTENTION_INPUT) == LAYERS
    # Four products to a layer and the head, each with its weight in codes.
    assert kinds.count(trt.LayerType.DEQUANTIZE) == 4 * LAYERS + 1


@pytest.mark.trt
def test_an_sm_that_the_package_does_not_know(portable: ir.Model, tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match=r"cannot build for SM 90; it builds for 75, .*120"):
        build_engines(portable, tmp_path / "rtx", flavour="rtx", sms=(86, 90), max_context=CONTEXT)
    assert list((tmp_path / "rtx").iterdir()) == []


@pytest.mark.trt
def test_a_failed_build_keeps_the_engine_that_was_there(portable: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text("older")
    with pytest.raises(EngineBuildError):
        build_engines(portable, tmp_path, flavour="rtx", sms=(), max_context=CONTEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["engine.json"]


def job(folder: Path, text: str) -> Job:
    """Return the job of building an ONNX model given as text, its nodes named after their outputs."""
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.name = node.output[0]
    path = folder / "model.onnx"
    onnx.save(model, path)
    return Job(flavour="rtx", model=str(path), engine=str(folder / "e"), sms=(86,), max_batch=1, max_prompt=1)


@pytest.mark.trt
def test_every_refused_op_is_named_before_anything_is_built(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "planish": 1]>
    g (float[N, 8] x) => (float[N, 8] y) {
        a = Abs (x)
        codes, scale, zero = DynamicQuantizeLinear (a)
        b = planish.PlanishUnknown (a)
        y = Add (a, b)
    }"""
    recorder = Recorder()
    with pytest.raises(EngineBuildError) as caught:
        run_job(job(tmp_path, text), recorder)
    message = str(caught.value)
    assert "cannot parse 2 part(s)" in message
    assert "codes (DynamicQuantizeLinear): TensorRT has no such op" in message
    assert "b (PlanishUnknown): neither an op that TensorRT knows nor a registered plugin" in message
    assert not recorder.steps


@pytest.mark.trt
def test_an_input_that_the_parser_would_ignore_is_an_error(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 24]>
    g (float16[1, 2, 8, 16] q, float16[1, 2, 8, 16] k, int64[1] seqlen) => (float16[1, 2, 8, 16] y) {
        y = Attention <is_causal = 1> (q, k, k, , , , seqlen)
    }"""
    with pytest.raises(EngineBuildError, match=r"would ignore part of the model:\s+.*seqlen"):
        run_job(job(tmp_path, text), Silent())


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("os.abort()", "TensorRT-RTX was ended by SIGABRT while building"),
        ("sys.exit(9)", "TensorRT-RTX ended with status 9 while building"),
    ],
)
def test_a_worker_that_dies_is_an_error_with_its_last_words(
    body: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = 'print("terminate called", file=sys.stderr, flush=True)'
    (tmp_path / "dying_worker.py").write_text(f"import os, sys\nsys.stdin.read()\n{last}\n{body}\n")
    monkeypatch.setattr(process, "WORKER", "dying_worker")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EngineBuildError, match=told) as caught:
        run_job(Job(flavour="rtx", model="m", engine="e", sms=(86,), max_batch=1, max_prompt=1), Silent())
    assert str(caught.value).endswith("terminate called")


def test_an_unknown_flavour(portable: ir.Model, tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match="'jetson' is not a TensorRT target; use one of: rtx, tensorrt"):
        build_engines(portable, tmp_path, flavour="jetson")


def test_a_missing_package_names_its_extra(portable: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"planish\[tensorrt\]"):
        build_engines(portable, tmp_path, flavour="tensorrt")


@pytest.mark.slow
@pytest.mark.trt
def test_low_bit_smollm2_is_little_more_than_half_the_float16_engine(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("smollm2")
    bytes_of = {}
    for text in ("w3a3k3v3", "w16a16k16v16"):
        scheme, folder = Scheme.parse(text), tmp_path / text
        model, _ = portable_model(checkpoint, scheme, quantize_checkpoint(checkpoint, scheme, folder / "codes"))
        built = build_engines(model, folder / "rtx", flavour="rtx", max_context=2048)
        assert built.record.sms == (86, 89, 120)
        bytes_of[text] = built.engine.stat().st_size
    # The embedding (57 MB of float16) and the 8-bit head (28 MB) are no smaller at fewer bits; the rest is 4 x smaller.
    assert bytes_of["w3a3k3v3"] < 0.55 * bytes_of["w16a16k16v16"]
