"""A planish bundle in Triton Inference Server's Python backend."""

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # what Triton gives to a model of its Python backend

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.runtime.generate import Sampling

__all__ = ["TritonPythonModel"]


class TritonPythonModel:
    """Opens the bundle that config.pbtxt names, and answers every request with pieces of text."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle and load its model: a bundle that is damaged stops the server, not a request."""
        parameters = json.loads(args["model_config"])["parameters"]
        self._bundle = Bundle.open(parameters["bundle"]["string_value"])
        self._bundle.session()

    def execute(self, requests: list[Any]) -> None:
        """Answer requests, one after the other."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                for piece in self._generate(request):
                    if request.is_cancelled():
                        break
                    text = pb_utils.Tensor("text", np.array([piece.encode()], np.object_))
                    sender.send(pb_utils.InferenceResponse([text]))
            except Exception as error:  # whatever it is, the client hears of it and the server goes on
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))))
            finally:
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _generate(self, request: Any) -> Any:
        return self._bundle.generate(
            _given(request, "prompt", b"").decode(),
            chat=bool(_given(request, "chat", False)),
            max_new_tokens=int(_given(request, "max_new_tokens", 128)),
            sampling=Sampling(temperature=float(_given(request, "temperature", 0.0))),
        )


def _given(request: Any, name: str, default: Any) -> Any:
    """Return the one element of an input, or `default` where a request has no such input."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy().reshape(-1)[0]
