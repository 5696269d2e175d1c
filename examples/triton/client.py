"""Ask a Triton Inference Server that serves this folder for text, and print it as it comes.

    python client.py "The capital of France is" [--url localhost:8001] [--max-new-tokens 128] [--chat]

Needs tritonclient[grpc] and nothing of planish. Its protobuf is older than that of onnx: give it its own environment.
"""

import argparse
import queue
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tritonclient.grpc as triton


def inputs_of(prompt: str, max_new_tokens: int, chat: bool) -> list[Any]:
    """Return the inputs of a request, as config.pbtxt names them."""
    given = [
        ("prompt", "BYTES", np.array([prompt.encode()], np.object_)),
        ("max_new_tokens", "INT32", np.array([max_new_tokens], np.int32)),
        ("chat", "BOOL", np.array([chat], np.bool_)),
    ]
    inputs = []
    for name, dtype, array in given:
        inputs.append(triton.InferInput(name, list(array.shape), dtype))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def pieces(client: Any, inputs: list[Any]) -> Iterator[str]:
    """Yield the pieces of the answer; a response without outputs is the last.

    Raises:
        triton.InferenceServerException: if the server refuses the request; the message is planish's.
    """
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer("planish", inputs, enable_empty_final_response=True)
    while True:
        result, error = answers.get()
        if error is not None:
            raise error
        if result.get_response().parameters["triton_final_response"].bool_param:
            return
        yield result.as_numpy("text")[0].decode()


def main() -> None:
    """Print the answer, piece by piece."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--url", default="localhost:8001", help="of the server's gRPC")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    given = parser.parse_args()
    try:
        with triton.InferenceServerClient(given.url) as client:
            if not client.is_model_ready("planish"):
                sys.exit(f"error: the server at {given.url} has no model planish that is ready; its log says why")
            for piece in pieces(client, inputs_of(given.prompt, given.max_new_tokens, given.chat)):
                print(piece, end="", flush=True)
    except triton.InferenceServerException as error:
        sys.exit(f"error: {error.message()}")
    print()


if __name__ == "__main__":
    main()
