"""What each ingredient of flattening is worth: perplexity of one model with one thing changed at a time.

Every row flattens the whole model block after block and runs the scoring text through each block as soon as it is
flattened, in PyTorch on the grids of the compiled model; nothing is exported. Usage:

    python benchmarks/ablation.py smollm2 --scheme w3a3k3v3 --dataset CALIBRATION --text SCORING [--rows a,b] [--json]
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from planish.compiler.calibrate.text import calibration_tokens
from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.learn.block import Angles, FloatHooks, Hooks, read_block, run_block
from planish.compiler.learn.candidates import Form
from planish.compiler.learn.flatten_block import Steps, flatten_block
from planish.compiler.learn.flattening import held_out_sequences
from planish.compiler.learn.precision import fast_products
from planish.compiler.learn.streams import Streams
from planish.compiler.measure.evaluation import read_text
from planish.compiler.quantize.arithmetic import low_bit_linear, quantize_weight
from planish.compiler.runtime.tokenizer import Tokenizer
from planish.compiler.select.forms import forms_of_groups
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Site

Forms = dict[Site, Form]

_AFFINE: Forms = forms_of_groups({"attn": "affine", "ffn": "affine"})
_ROTATION: Forms = forms_of_groups({"attn": "rotation", "ffn": "rotation"})
_NONE: Forms = dict.fromkeys(SITES, "identity")
_HADAMARD: Forms = _ROTATION | dict.fromkeys(("attn_in", "ffn_in", "ffn_out"), "hadamard")


def _linear_sites(form: Form) -> Forms:
    return _AFFINE | dict.fromkeys(("attn_in", "ffn_in", "ffn_out"), form)


#: Row -> forms, and steps besides them.
ROWS: dict[str, tuple[Forms, Steps]] = {
    "nothing: round to nearest": (_NONE, Steps(clips=False, fit=False, gptq=False)),
    "hadamard, nothing else": (_HADAMARD, Steps(clips=False, fit=False, gptq=False)),
    "affine, nothing else": (_AFFINE, Steps(clips=False, fit=False, gptq=False)),
    "affine + clips": (_AFFINE, Steps(fit=False, gptq=False)),
    "affine + clips + gptq": (_AFFINE, Steps(fit=False)),
    "affine + clips + fit + gptq": (_AFFINE, Steps()),
    "no clips": (_AFFINE, Steps(clips=False)),
    "hadamard": (_HADAMARD, Steps()),
    "rotation (RMS scale + hadamard)": (_ROTATION, Steps()),
    "kronecker": (_linear_sites("kronecker"), Steps()),
    "blocks of 32": (_linear_sites("blocks32"), Steps()),
    "blocks of 128": (_linear_sites("blocks128"), Steps()),
    "dense, blocks of 128 at ffn_out": (_linear_sites("dense") | {"ffn_out": "blocks128"}, Steps()),
    "key map: rotation": (_AFFINE | {"key": "rotation"}, Steps()),
    "key map: none": (_AFFINE | {"key": "identity"}, Steps()),
    "value map: rotation": (_AFFINE | {"value": "rotation"}, Steps()),
}


def main() -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--scheme", default="w3a3k3v3")
    parser.add_argument("--dataset", required=True, help="calibration text")
    parser.add_argument("--text", required=True, help="scoring text")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--rows", help="names of rows, separated by semicolons; all by default")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model)
    tokens = calibration_tokens(
        arguments.dataset, checkpoint, nsamples=arguments.nsamples, seqlen=arguments.seqlen, seed=0
    )
    windows = _windows(checkpoint, arguments.text, arguments.seqlen, arguments.windows)
    rows = arguments.rows.split(";") if arguments.rows else list(ROWS)
    scheme = Scheme.parse(arguments.scheme)
    found = {"float": _perplexity(checkpoint, Scheme.parse("w16a16"), windows, _float_blocks(checkpoint, windows))}
    console = Console(stderr=True)
    for row in rows:
        started = time.perf_counter()
        hidden = _flattened_blocks(checkpoint, scheme, *ROWS[row], tokens, windows)
        found[row] = _perplexity(checkpoint, scheme, windows, hidden)
        console.print(f"{row}: {found[row]:.2f} ({time.perf_counter() - started:.0f} s)")
    table = Table("row", "perplexity", "x float")
    for row, value in found.items():
        table.add_row(row, f"{value:.2f}", f"{value / found['float']:.3f}")
    Console().print(table)
    if arguments.json:
        print(json.dumps(vars(arguments) | {"perplexity": found}))


def _windows(checkpoint: Checkpoint, text: str, seqlen: int, count: int) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write_sidecars(Path(folder))
        ids = np.asarray(Tokenizer(Path(folder)).encode(read_text(Path(text))))
    return torch.from_numpy(ids[: seqlen * count].reshape(count, seqlen))


def _embed(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    return torch.from_numpy(checkpoint.tensor("model.embed_tokens.weight").astype(np.float32))[ids]


@torch.no_grad()
def _float_blocks(checkpoint: Checkpoint, windows: Tensor) -> Tensor:
    x, angles = _embed(checkpoint, windows), Angles.of(checkpoint.config, windows.shape[1])
    for layer in range(checkpoint.config.num_hidden_layers):
        x = _run(FloatHooks(read_block(checkpoint, layer)), checkpoint, x, angles)
    return x


@torch.no_grad()
def _flattened_blocks(
    checkpoint: Checkpoint, scheme: Scheme, forms: Forms, steps: Steps, tokens: np.ndarray, windows: Tensor
) -> Tensor:
    config = checkpoint.config
    x, target = _embed(checkpoint, windows), _embed(checkpoint, torch.from_numpy(tokens))
    seen, held_out = target.clone(), held_out_sequences(len(tokens))
    angles, scored = (Angles.of(config, length) for length in (tokens.shape[1], windows.shape[1]))
    with fast_products():
        for layer in range(config.num_hidden_layers):
            block = read_block(checkpoint, layer)
            outputs = _run(FloatHooks(block), checkpoint, target, angles)
            flattened = flatten_block(block, Streams(target, seen, held_out), outputs, scheme, forms, layer, steps)
            seen = _run(flattened.hooks, checkpoint, seen, angles)
            x = _run(flattened.hooks, checkpoint, x, scored)
            target = outputs
    return x


def _run(hooks: Hooks, checkpoint: Checkpoint, x: Tensor, angles: Angles) -> Tensor:
    return torch.cat([run_block(checkpoint.config, hooks, part, angles) for part in x.split(4)])


@torch.no_grad()
def _perplexity(checkpoint: Checkpoint, scheme: Scheme, windows: Tensor, hidden: Tensor) -> float:
    gain = torch.from_numpy(checkpoint.tensor("model.norm.weight").astype(np.float32))
    tied = checkpoint.config.tie_word_embeddings
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    table = torch.from_numpy(checkpoint.tensor(name).astype(np.float32))
    head = None if scheme.lm_head.is_float else quantize_weight(table, scheme.lm_head)
    total = 0.0
    for x, ids in zip(hidden, windows, strict=True):
        h = gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + checkpoint.config.rms_norm_eps))
        logits = h @ table.T if head is None else low_bit_linear(h, head, scheme.lm_head)
        total += float(torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:]))
    return math.exp(min(total / len(windows), 700.0))


if __name__ == "__main__":
    main()
