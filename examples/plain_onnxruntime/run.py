"""Greedy text from a bundle's portable model with nothing but onnxruntime, tokenizers and numpy: no planish."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


def main(bundle: Path, prompt: str, new_tokens: int = 24) -> None:
    """Print `prompt` and the tokens that follow it."""
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    # The file may say how its writer cut and padded batches.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    options = ort.SessionOptions()
    # Without VNNI, products of unsigned by signed 8-bit codes saturate unless a slower kernel is asked for.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(str(bundle / "model.onnx"), options)
    # The cache starts empty. Its inputs say what they hold: packed bytes, and float16 scales and zeros.
    cache = {
        i.name: np.zeros([1 if d == "batch" else 0 if d == "past" else d for d in i.shape], DTYPES[i.type])
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    ids = tokenizer.encode(prompt).ids
    seen, step = len(ids), np.array([ids])
    for _ in range(new_tokens):
        logits, *present = session.run(
            None,
            {
                "input_ids": step,
                "attention_mask": np.ones((1, seen), np.int64),
                "position_ids": np.arange(seen - step.shape[1], seen)[None],
                "num_logits_to_keep": np.array(1),
                **cache,
            },
        )
        # Outputs come in the order of the inputs they replace.
        cache = dict(zip(cache, present, strict=True))
        step = logits[:, -1:].argmax(-1)
        ids.append(int(step[0, 0]))
        seen += 1
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    main(Path(sys.argv[1]), " ".join(sys.argv[2:]) or "The capital of France is")
