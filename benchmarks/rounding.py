"""The output error of one linear by how its weight is rounded, all from the same second moment of its inputs.

    python benchmarks/rounding.py --dataset CALIBRATION [--layer 10] [--module self_attn.q_proj] [--json]

Errors are relative to the output, on sequences that neither the rounding nor the choice of what is kept has seen.
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from planish.compiler.calibrate.text import calibration_tokens
from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.learn.block import SITE_MODULES, Angles, Block, FloatHooks, read_block, run_block
from planish.compiler.learn.precision import fast_products
from planish.compiler.learn.rounding.adaround import adaround
from planish.compiler.learn.rounding.gptq import gptq
from planish.compiler.learn.rounding.row_errors import row_errors
from planish.compiler.learn.rounding.segments import round_segments
from planish.compiler.learn.rounding.weight_clips import learn_clips
from planish.compiler.quantize.arithmetic import QuantizedWeight, dequantize_weight, quantize_weight
from planish.passes.high_impact import segments
from planish.passes.scheme import LinearFormat

PARTS = ("fitted", "held out", "test")


class Recorder(FloatHooks):
    """The float block, keeping what one linear reads."""

    def __init__(self, block: Block, module: str) -> None:
        super().__init__(block)
        self._module = module
        self.seen: Tensor

    def linear(self, module: str, x: Tensor) -> Tensor:
        """Return the output of a linear."""
        if module == self._module:
            self.seen = x
        return super().linear(module, x)


@torch.no_grad()
def moments(checkpoint: Checkpoint, layer: int, module: str, tokens: np.ndarray) -> list[Tensor]:
    """Return E[x^T x] over three quarters of the sequences, an eighth, and another eighth, float64."""
    x = torch.from_numpy(checkpoint.tensor("model.embed_tokens.weight").astype(np.float32))[torch.from_numpy(tokens)]
    angles = Angles.of(checkpoint.config, tokens.shape[1])
    for i in range(layer):
        x = run_block(checkpoint.config, FloatHooks(read_block(checkpoint, i)), x, angles)
    hooks = Recorder(read_block(checkpoint, layer), module)
    run_block(checkpoint.config, hooks, x, angles)
    eighth = max(1, len(tokens) // 8)
    parts = hooks.seen.split([len(tokens) - 2 * eighth, eighth, eighth])
    return [rows.T @ rows / len(rows) for rows in (part.flatten(0, -2).double() for part in parts)]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument(
        "--module", default="self_attn.q_proj", choices=[m for each in SITE_MODULES.values() for m in each]
    )
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--group", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model)
    tokens = calibration_tokens(arguments.dataset, checkpoint, nsamples=arguments.nsamples, seqlen=arguments.seqlen)
    with fast_products():
        H, held_out, test = moments(checkpoint, arguments.layer, arguments.module, tokens)
    weight = read_block(checkpoint, arguments.layer).weight(arguments.module)
    found = []
    for bits in (2, 3, 4):
        form = LinearFormat(bits, 16, arguments.group)
        nearest = quantize_weight(weight, form)
        clipped = learn_clips(weight, H, held_out, form)
        ways: dict[str, Callable[[], QuantizedWeight]] = {
            "nearest": lambda form=form: quantize_weight(weight, form),
            "clips": lambda form=form: learn_clips(weight, H, held_out, form),
            "AdaRound": lambda start=nearest: adaround(weight, start, H, held_out),
            "clips + AdaRound": lambda start=clipped: adaround(weight, start, H, held_out),
            "GPTQ": lambda form=form: gptq(weight, H, form),
            "GPTQ + descent": lambda form=form: round_segments(weight, segments(form, None), H, held_out, "gptq")[0],
        }
        for name, way in ways.items():
            started = time.process_time()
            error = weight - dequantize_weight(way())
            seconds = time.process_time() - started
            errors = [
                float(row_errors(error.double(), each).sum() / row_errors(weight.double(), each).sum())
                for each in (H, held_out, test)
            ]
            found.append({"bits": bits, "way": name, **dict(zip(PARTS, errors, strict=True)), "seconds": seconds})
    table = Table("bits", "way", *PARTS, "CPU s", title=f"layer {arguments.layer} {arguments.module}")
    for row in found:
        table.add_row(str(row["bits"]), row["way"], *(f"{row[part]:.5f}" for part in PARTS), f"{row['seconds']:.1f}")
    Console().print(table)
    if arguments.json:
        print(json.dumps(vars(arguments) | {"found": found}))


if __name__ == "__main__":
    main()
