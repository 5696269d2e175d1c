"""What is deployed with: ONNX Runtime alone and the Triton model answer, configuration and trtexec's command fit."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from planish.compiler.backends.tensorrt import build_engines
from planish.compiler.bundle.bundle import Bundle
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.export.float_model import float_model
from planish.plugins.native import find_compiler
from planish.plugins.tensorrt.build import cuda_headers
from tests.fixed_cache import plain_session
from tests.plugin_host import need_headers, tensorrt_headers
from tests.tiny import cut_and_padded, write_tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
TRITON = EXAMPLES / "triton" / "planish"

#: Fields of Triton's ModelConfig that config.pbtxt uses -> those of the message in them, None for a value.
FIELDS: dict[str, Any] = {
    "name": None,
    "backend": None,
    "max_batch_size": None,
    "input": {"name": None, "data_type": None, "dims": None, "optional": None},
    "output": {"name": None, "data_type": None, "dims": None},
    "model_transaction_policy": {"decoupled": None},
    "instance_group": {"count": None, "kind": None},
    "parameters": {"key": None, "value": {"string_value": None}},
}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(text: str) -> dict[str, list[Any]]:
    """Return the fields of a protobuf text, each with all its values; messages are parsed likewise."""
    tokens = re.findall(r'"[^"]*"|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.sub(r"#.*", "", text))

    def message() -> dict[str, list[Any]]:
        fields: dict[str, list[Any]] = {}
        while tokens and tokens[0] != "}":
            name = tokens.pop(0)
            if tokens[0] == ":":
                tokens.pop(0)
            fields.setdefault(name, []).extend(values())
        return fields

    def values() -> list[Any]:
        token = tokens.pop(0)
        if token == "{":
            inside = message()
            assert tokens.pop(0) == "}"
            return [inside]
        if token != "[":
            return [token]
        found: list[Any] = []
        while tokens[0] != "]":
            found += values()
            if tokens[0] == ",":
                tokens.pop(0)
        tokens.pop(0)
        return found

    parsed = message()
    assert not tokens
    return parsed


def check_fields(found: dict[str, list[Any]], known: dict[str, Any]) -> None:
    assert set(found) <= set(known)
    for name, values in found.items():
        for value in values:
            assert isinstance(value, dict) == isinstance(known[name], dict)
            if isinstance(value, dict):
                check_fields(value, known[name])


def test_the_configuration_has_fields_of_triton() -> None:
    found = parse((TRITON / "config.pbtxt").read_text())
    check_fields(found, FIELDS)
    assert found["name"] == ['"planish"']
    assert [each["name"] for each in found["input"]] == [
        ['"prompt"'], ['"max_new_tokens"'], ['"temperature"'], ['"chat"']
    ]  # fmt: skip


def test_the_configuration_is_one_of_tritons_schema() -> None:
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")
    from google.protobuf import text_format

    config = text_format.Parse((TRITON / "config.pbtxt").read_text(), schema.ModelConfig())
    assert (config.name, config.backend, config.model_transaction_policy.decoupled) == ("planish", "python", True)
    assert [schema.DataType.Name(each.data_type) for each in config.input] == [
        "TYPE_STRING", "TYPE_INT32", "TYPE_FP32", "TYPE_BOOL"
    ]  # fmt: skip
    assert config.parameters["bundle"].string_value == "/models/bundle"


@pytest.mark.parametrize("prompt", ["the hen", "the hen and the tin man's otter"])
def test_plain_onnx_runtime_writes_what_transformers_writes(
    prompt: str, float_bundle: Bundle, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(float_bundle.path, tmp_path / "bundle")
    cut_and_padded(folder)
    load(EXAMPLES / "plain_onnxruntime" / "run.py").main(folder, prompt, new_tokens=6)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    made = LlamaForCausalLM.from_pretrained(tiny).generate(
        **tokenizer(prompt, return_tensors="pt"), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert capsys.readouterr().out == tokenizer.decode(made[0], skip_special_tokens=True) + "\n"


class Sender:
    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.flags = 0

    def send(self, response: Any = None, flags: int = 0) -> None:
        self.sent += [] if response is None else [response]
        self.flags |= flags


class Request:
    def __init__(self, cancelled: bool = False, **inputs: Any) -> None:
        self.inputs, self.sender, self.cancelled = inputs, Sender(), cancelled

    def get_response_sender(self) -> Sender:
        return self.sender

    def is_cancelled(self) -> bool:
        return self.cancelled


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> Any:
    """The model, loaded by a backend that stands for Triton's."""

    def tensor(name: str, array: Any) -> Any:
        return SimpleNamespace(name=name, as_numpy=lambda: array)

    def given(request: Request, name: str) -> Any:
        return tensor(name, np.array([request.inputs[name]])) if name in request.inputs else None

    backend = SimpleNamespace(
        Tensor=tensor,
        TritonError=str,
        InferenceResponse=lambda tensors=(), error=None: SimpleNamespace(tensors=tensors, error=error),
        get_input_tensor_by_name=given,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    model = load(TRITON / "1" / "model.py").TritonPythonModel()
    parameters = {"bundle": {"string_value": str(bundle.path)}}
    model.initialize({"model_config": json.dumps({"parameters": parameters})})
    return model


def test_the_model_streams_text(triton: Any, bundle: Bundle) -> None:
    request = Request(prompt=np.bytes_(b"the thin"), max_new_tokens=np.int32(6))
    triton.execute([request])
    pieces = [response.tensors[0].as_numpy()[0].decode() for response in request.sender.sent]
    assert "".join(pieces) == "".join(bundle.generate("the thin", max_new_tokens=6))
    assert len(pieces) > 1
    assert request.sender.flags == 1


def test_what_planish_refuses_is_the_error_of_the_response(triton: Any) -> None:
    wrong, right = Request(prompt=np.bytes_(b"")), Request(prompt=np.bytes_(b"a"), max_new_tokens=np.int32(2))
    triton.execute([wrong, right])
    assert wrong.sender.sent[0].error
    assert (wrong.sender.flags, right.sender.flags) == (1, 1)
    assert right.sender.sent[0].error is None


def test_a_cancelled_request_ends(triton: Any) -> None:
    request = Request(cancelled=True, prompt=np.bytes_(b"the"), max_new_tokens=np.int32(6))
    triton.execute([request])
    assert request.sender.sent == []
    assert request.sender.flags == 1


def test_the_command_of_trtexec(tmp_path: Path) -> None:
    def given(dtype: str, least: list[int], most: list[int], is_shape: bool = False) -> dict[str, Any]:
        return {"dtype": dtype, "min": least, "opt": least, "max": most, "is_shape": is_shape}

    record = {
        "plugins": {"library": {"file": "libplanish_plugins.so"}},
        "inputs": {
            "input_ids": given("int64", [1, 1], [4, 512]),
            "past_lengths": given("int32", [1], [4]),
            "new_lengths": given("int32", [1], [4]),
            "position_ids": given("int64", [1, 1], [4, 512]),
            "past_key_values.0.key": given("int32", [1, 3, 32, 6], [4, 3, 32, 6]),
            "num_logits_to_keep": given("int64", [0], [512], is_shape=True),
        },
    }
    (tmp_path / "engine.json").write_text(json.dumps(record))
    smoke = load(EXAMPLES / "trtexec" / "smoke.py")
    with pytest.raises(SystemExit, match=r"libplanish_plugins\.so is missing\. Compile it here, and give --plugins"):
        smoke.command(tmp_path)
    (tmp_path / "libplanish_plugins.so").touch()
    line = smoke.command(tmp_path, save=True)
    assert line[0] == "trtexec"
    assert f"--saveEngine={tmp_path}/model.engine" in line
    assert f"--dynamicPlugins={tmp_path}/libplanish_plugins.so" in line
    assert "--preview=+aliasedPluginIO1003" in line
    assert (
        "--maxShapes=input_ids:4x512,past_lengths:4,new_lengths:4,position_ids:4x512,"
        "past_key_values.0.key:4x3x32x6,num_logits_to_keep:512"
    ) in line
    written = {path.stem: path.read_bytes() for path in (tmp_path / "smoke").iterdir()}
    assert set(written) == set(record["inputs"])
    assert np.frombuffer(written["position_ids"], np.int64).tolist() == [0, 1, 2, 3]
    assert np.frombuffer(written["new_lengths"], np.int32).tolist() == [4]
    assert np.frombuffer(written["num_logits_to_keep"], np.int64).tolist() == [1]
    assert np.frombuffer(written["past_lengths"], np.int32).tolist() == [0]
    assert len(written["past_key_values.0.key"]) == 4 * 3 * 32 * 6
    assert f"--dynamicPlugins={EXAMPLES}/trtexec/smoke.py" in smoke.command(tmp_path, EXAMPLES / "trtexec" / "smoke.py")


def test_the_command_of_trtexec_without_plugins(tmp_path: Path) -> None:
    folder = tmp_path / "tensorrt"
    portable = float_model(open_checkpoint(write_tiny(tmp_path / "checkpoint")))
    record = build_engines(portable, folder, flavour="tensorrt", tensorrt_version="10.3", max_context=32).record
    line = load(EXAMPLES / "trtexec" / "smoke.py").command(folder)
    assert not any(part.startswith(("--dynamicPlugins", "--preview", "--saveEngine")) for part in line)
    inputs = {path.stem: path.read_bytes() for path in (folder / "smoke").iterdir()}
    assert set(inputs) == set(record.inputs)
    assert np.frombuffer(inputs["attention_mask"], np.int64).tolist() == [1] * 4 + [0] * 28
    assert np.frombuffer(inputs["write_indices"], np.int64).tolist() == [0]
    assert len(inputs["past_key_values.1.value"]) == 2 * 2 * 32 * 16
    limits = {"max_context": 32, "max_prompt": 2}
    build_engines(portable, folder, flavour="tensorrt", tensorrt_version="10.3", **limits)  # type: ignore[arg-type]
    assert "input_ids:1x2" in next(
        part for part in load(EXAMPLES / "trtexec" / "smoke.py").command(folder) if part.startswith("--shapes=")
    )
    # What trtexec is given is a step that the model takes.
    dtypes = {name: np.dtype(each.dtype) for name, each in record.inputs.items()}
    shapes = {name: [int(n) for n in shape.split("x")] for name, shape in
              (part.split(":") for part in line[-5].removeprefix("--shapes=").split(","))}  # fmt: skip
    shapes["num_logits_to_keep"] = []
    feeds = {name: np.frombuffer(content, dtypes[name]).reshape(shapes[name]) for name, content in inputs.items()}
    logits = plain_session(folder / "model.onnx").run(["logits"], feeds)[0]
    assert logits.shape == (1, 1, 272)
    assert np.isfinite(logits).all()


def test_the_example_in_cpp_compiles() -> None:
    need_headers()
    includes = [part for folder in (tensorrt_headers(), cuda_headers()) for part in ("-isystem", str(folder))]
    source = EXAMPLES / "tensorrt_cpp" / "generate.cpp"
    command = [find_compiler(), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", *includes, str(source)]
    subprocess.run(command, check=True)
