"""What each ingredient of flattening is worth: perplexity of one model with one thing changed at a time.

Every row flattens the whole model block after block and runs the scoring text through each block as soon as it is
flattened, in PyTorch on the grids of the compiled model; nothing is exported. Usage:

    python benchmarks/ablation.py smollm2 --dataset CALIBRATION --text SCORING [--jobs 2] [--keep FILE] [--json]
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
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
from planish.compiler.learn.flatten_block import flatten_block
from planish.compiler.learn.flattening import held_out_sequences
from planish.compiler.learn.gradient.refine import Refinement
from planish.compiler.learn.polish.next_token import Head
from planish.compiler.learn.precision import fast_products
from planish.compiler.learn.rounding.site_fit import Steps
from planish.compiler.learn.streams import Streams
from planish.compiler.learn.transforms.candidates import Form
from planish.compiler.learn.transforms.rotated import RotatedCheckpoint
from planish.compiler.measure.texts import read_text
from planish.compiler.progress import Silent
from planish.compiler.quantize.arithmetic import low_bit_linear, quantize_weight
from planish.compiler.runtime.tokenizer import Tokenizer
from planish.compiler.select.choose_forms import choose_forms
from planish.compiler.select.forms import forms_of_groups
from planish.compiler.select.policy import SelectionPolicy
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Site

Forms = dict[Site, Form]

_AFFINE: Forms = forms_of_groups({"attn": "affine", "ffn": "affine"})
_ROTATION: Forms = forms_of_groups({"attn": "rotation", "ffn": "rotation"})
_NONE: Forms = dict.fromkeys(SITES, "identity")
_HADAMARD: Forms = _ROTATION | dict.fromkeys(("attn_in", "ffn_in", "ffn_out"), "hadamard")
_ALL = Steps()
_NOTHING = Steps(clips=False, fit=False, rounding="nearest")


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to flatten.

    Attributes:
        forms: of the transforms, in every block, or a policy that chooses them.
        steps: what is done besides.
        refinement: of the transforms, if any.
        prefix: fit blocks to the inputs that the blocks quantised before give them; else to the float model's.
        rotated: rotate the residual stream first.
    """

    forms: Forms | str = dataclasses.field(default_factory=lambda: _AFFINE)
    steps: Steps = _ALL
    refinement: Refinement | None = None
    prefix: bool = True
    rotated: bool = False


def _linear_sites(form: Form) -> Forms:
    return _AFFINE | dict.fromkeys(("attn_in", "ffn_in", "ffn_out"), form)


ROWS: dict[str, Row] = {
    "nothing: round to nearest": Row(_NONE, _NOTHING),
    "hadamard, nothing else": Row(_HADAMARD, _NOTHING),
    "affine, nothing else": Row(_AFFINE, _NOTHING),
    "affine + clips": Row(_AFFINE, Steps(fit=False, rounding="nearest")),
    "affine + clips + gptq": Row(_AFFINE, Steps(fit=False)),
    "affine + clips + fit + gptq": Row(),
    "no clips": Row(steps=Steps(clips=False)),
    "fitted to float inputs": Row(prefix=False),
    "hadamard": Row(_HADAMARD),
    "rotation (RMS scale + hadamard)": Row(_ROTATION),
    "kronecker": Row(_linear_sites("kronecker")),
    "blocks of 32": Row(_linear_sites("blocks32")),
    "blocks of 128": Row(_linear_sites("blocks128")),
    "dense, blocks of 128 at ffn_out": Row(_linear_sites("dense") | {"ffn_out": "blocks128"}),
    "key map: rotation": Row(_AFFINE | {"key": "rotation"}),
    "key map: none": Row(_AFFINE | {"key": "identity"}),
    "value map: rotation": Row(_AFFINE | {"value": "rotation"}),
    "residual rotation below": Row(rotated=True),
    "selection: kurtosis": Row("kurtosis"),
    "selection: measured:0.1": Row("measured:0.1"),
    "refined, 3 epochs": Row(refinement=Refinement(epochs=3)),
    "refined on float inputs, 3 epochs": Row(refinement=Refinement(epochs=3, inputs="float")),
}


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What all rows share."""

    model: str
    scheme: str
    tokens: np.ndarray
    windows: Tensor

    def perplexity(self, row: str) -> float:
        """Return the perplexity of a row, or of the float model."""
        checkpoint = open_checkpoint(self.model)
        if row == "float":
            hidden = float_blocks(checkpoint, self.windows)
            return perplexity_of(checkpoint, Scheme.parse("w16a16"), self.windows, hidden)
        base = RotatedCheckpoint(checkpoint, 0) if ROWS[row].rotated else checkpoint
        scheme = Scheme.parse(self.scheme)
        return perplexity_of(base, scheme, self.windows, _flattened_blocks(base, scheme, ROWS[row], self))


def main() -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--scheme", default="w3a3k3v3")
    parser.add_argument("--dataset", required=True, help="calibration text")
    parser.add_argument("--text", required=True, help="scoring text")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of what is taken of the calibration text")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--rows", help="names of rows, separated by semicolons; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once, sharing the processors")
    parser.add_argument("--keep", type=Path, help="file to keep finished rows in, and to take them from")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model)
    tokens = calibration_tokens(
        arguments.dataset, checkpoint, nsamples=arguments.nsamples, seqlen=arguments.seqlen, seed=arguments.seed
    )
    windows = windows_of(checkpoint, arguments.text, arguments.seqlen, arguments.windows)
    setting = _Setting(arguments.model, arguments.scheme, tokens, windows)
    rows = ["float", *(arguments.rows.split(";") if arguments.rows else ROWS)]
    found = _run_rows(setting, rows, arguments.jobs, arguments.keep)
    table = Table("row", "perplexity", "x float")
    for row in rows:
        table.add_row(row, f"{found[row]:.2f}", f"{found[row] / found['float']:.3f}")
    Console().print(table)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "keep"}
        print(json.dumps(settings | {"perplexity": {row: found[row] for row in rows}}))


def _run_rows(setting: _Setting, rows: list[str], jobs: int, keep: Path | None) -> dict[str, float]:
    found: dict[str, float] = json.loads(keep.read_text()) if keep is not None and keep.exists() else {}
    console, started = Console(stderr=True), time.perf_counter()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        running = {pool.submit(setting.perplexity, row): row for row in rows if row not in found}
        for done in concurrent.futures.as_completed(running):
            row = running[done]
            found[row] = done.result()
            console.print(f"{row}: {found[row]:.2f} ({time.perf_counter() - started:.0f} s after the start)")
            if keep is not None:
                keep.write_text(json.dumps(found))
    return found


def windows_of(checkpoint: Checkpoint, text: str, seqlen: int, count: int) -> Tensor:
    """Return the first windows of a text, int64 [count, seqlen]."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write_sidecars(Path(folder))
        ids = np.asarray(Tokenizer(Path(folder)).encode(read_text(Path(text))))
    return torch.from_numpy(ids[: seqlen * count].reshape(count, seqlen))


def embed(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Return the embeddings of tokens, float32 [..., hidden]."""
    # As float16, which is what a low-bit model stores.
    table = checkpoint.tensor("model.embed_tokens.weight").astype(np.float16).astype(np.float32)
    return torch.from_numpy(table)[ids]


@torch.no_grad()
def float_blocks(checkpoint: Checkpoint, windows: Tensor) -> Tensor:
    """Return what the last block of the float model puts out for windows, float32 [count, seqlen, hidden]."""
    x, angles = embed(checkpoint, windows), Angles.of(checkpoint.config, windows.shape[1])
    for layer in range(checkpoint.config.num_hidden_layers):
        x = run_all(FloatHooks(read_block(checkpoint, layer)), checkpoint, x, angles)
    return x


@torch.no_grad()
def _flattened_blocks(checkpoint: Checkpoint, scheme: Scheme, row: Row, setting: _Setting) -> Tensor:
    config, tokens = checkpoint.config, setting.tokens
    x, target = embed(checkpoint, setting.windows), embed(checkpoint, torch.from_numpy(tokens))
    seen, held_out = target.clone(), held_out_sequences(len(tokens))
    angles, scored = (Angles.of(config, length) for length in (tokens.shape[1], setting.windows.shape[1]))
    forms = _forms(checkpoint, scheme, row, tokens)
    with fast_products():
        for layer in range(config.num_hidden_layers):
            block = read_block(checkpoint, layer)
            outputs = run_all(FloatHooks(block), checkpoint, target, angles)
            streams = Streams(target, seen if row.prefix else target, held_out)
            flattened = flatten_block(block, streams, outputs, scheme, forms[layer], layer, row.steps, row.refinement)
            seen = run_all(flattened.hooks, checkpoint, seen, angles)
            x = run_all(flattened.hooks, checkpoint, x, scored)
            target = outputs
    return x


def _forms(checkpoint: Checkpoint, scheme: Scheme, row: Row, tokens: np.ndarray) -> list[Forms]:
    if not isinstance(row.forms, str):
        return [row.forms] * checkpoint.config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        policy = SelectionPolicy.parse(row.forms)
        chosen = choose_forms(checkpoint, scheme, policy, tokens, Path(folder), Silent())
    return [each.forms for each in chosen]


def run_all(hooks: Hooks, checkpoint: Checkpoint, x: Tensor, angles: Angles) -> Tensor:
    """Return what a block makes of its inputs [sequences, seq, hidden], four sequences at a time."""
    return torch.cat([run_block(checkpoint.config, hooks, part, angles) for part in x.split(4)])


@torch.no_grad()
def perplexity_of(checkpoint: Checkpoint, scheme: Scheme, windows: Tensor, hidden: Tensor) -> float:
    """Return the perplexity of windows, given the outputs of the last block for them."""
    head = Head.of(checkpoint)
    rounded = None if scheme.lm_head.is_float else quantize_weight(head.weight, scheme.lm_head)
    total = 0.0
    for x, ids in zip(hidden, windows, strict=True):
        h = head.normalized(x)
        logits = h @ head.weight.T if rounded is None else low_bit_linear(h, rounded, scheme.lm_head)
        total += float(torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:]))
    return math.exp(min(total / len(windows), 700.0))


if __name__ == "__main__":
    main()
