"""The client of the Triton example against a gRPC server that stands for Triton, with the real model behind it."""

import concurrent.futures
import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from planish.compiler.bundle.bundle import Bundle
from tests.compiler.test_deploy_examples import EXAMPLES, TRITON, load

triton = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
grpc = pytest.importorskip("grpc", reason="tritonclient[grpc] is not installed")


class Backend:
    """What Triton's Python backend gives to a model, and the request that is being answered."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    TritonError = str

    def Tensor(self, name: str, array: Any) -> Any:  # noqa: N802
        return SimpleNamespace(name=name, as_numpy=lambda: array)

    def InferenceResponse(self, tensors: Any = (), error: Any = None) -> Any:  # noqa: N802
        return SimpleNamespace(tensors=tensors, error=error)

    def get_input_tensor_by_name(self, request: Any, name: str) -> Any:
        return self.Tensor(name, request.inputs[name]) if name in request.inputs else None


class Request:
    """A request of the wire, and what is sent for it."""

    def __init__(self, request: Any) -> None:
        self.responses: list[Any] = []
        read = {"BYTES": triton.deserialize_bytes_tensor, "INT32": np.dtype(np.int32), "BOOL": np.dtype(np.bool_)}
        self.inputs = {}
        for about, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            how = read[about.datatype]
            self.inputs[about.name] = np.frombuffer(raw, how) if isinstance(how, np.dtype) else how(raw)

    def get_response_sender(self) -> Any:
        return SimpleNamespace(send=lambda response=None, flags=0: self.responses.append((response, flags)))

    def is_cancelled(self) -> bool:
        return False


@pytest.fixture
def url(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Backend())
    model = load(TRITON / "1" / "model.py").TritonPythonModel()
    model.initialize({"model_config": json.dumps({"parameters": {"bundle": {"string_value": str(bundle.path)}}})})

    class Service(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc, name-defined]
        def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
            return service_pb2.ModelReadyResponse(ready=request.name == "planish")

        def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
            for message in requests:
                assert message.model_name == "planish"
                request = Request(message)
                model.execute([request])
                for response, flags in request.responses:
                    if response is not None and response.error:
                        yield service_pb2.ModelStreamInferResponse(error_message=response.error)
                        continue
                    made = service_pb2.ModelInferResponse(model_name="planish")
                    for tensor in () if response is None else response.tensors:
                        raw = triton.serialize_byte_tensor(tensor.as_numpy()).item()
                        made.outputs.add(name=tensor.name, datatype="BYTES", shape=[1])
                        made.raw_output_contents.append(raw)
                    made.parameters["triton_final_response"].bool_param = bool(flags)
                    yield service_pb2.ModelStreamInferResponse(infer_response=made)

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    yield f"localhost:{port}"
    server.stop(None)


def run(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    client = load(EXAMPLES / "triton" / "client.py")
    monkeypatch.setattr(sys, "argv", ["client.py", *arguments, "--url", url])
    client.main()
    return capsys.readouterr().out


def test_the_answer_is_printed(
    url: str, bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(url, capsys, monkeypatch, "the thin", "--max-new-tokens", "6")
    assert found == "".join(bundle.generate("the thin", max_new_tokens=6)) + "\n"


def test_no_server(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="error: failed to connect"):
        run("localhost:1", capsys, monkeypatch, "the thin")


def test_a_refusal_is_planishs(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="error: The prompt has no tokens"):
        run(url, capsys, monkeypatch, "")
