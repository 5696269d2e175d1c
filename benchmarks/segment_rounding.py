"""The output error of one linear with high-impact channels, by how its two segments are rounded, and of uniform groups.

    python benchmarks/segment_rounding.py --dataset CALIBRATION [--layer 10] [--module mlp.down_proj] [--share 0.1]

Behind a transform in closed form. Channels are ranked by `moment`, which needs no gradient. Errors are relative to the
output, on sequences that neither rounding nor the choice of what is kept has seen; bits count scales and the order.
"""

import argparse
import json
import time
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from rounding import moments

from planish.compiler.calibrate.text import calibration_tokens
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.learn.block import SITE_MODULES, read_block
from planish.compiler.learn.precision import fast_products
from planish.compiler.learn.rounding.row_errors import row_errors
from planish.compiler.learn.rounding.segments import Rounding, assemble, round_segments
from planish.compiler.learn.transforms.candidates import closed_form
from planish.compiler.quantize.arithmetic import dequantize_weight, quantize_weight
from planish.compiler.select.channel_split import ChannelSplit
from planish.passes.high_impact import CHANNEL_STEP, HighImpact, Segment, segments
from planish.passes.scheme import LinearFormat


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument(
        "--module", default="mlp.down_proj", choices=[m for each in SITE_MODULES.values() for m in each]
    )
    parser.add_argument("--form", default="blocks64", help="of the transform")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--high", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model)
    tokens = calibration_tokens(arguments.dataset, checkpoint, nsamples=arguments.nsamples, seqlen=arguments.seqlen)
    with fast_products():
        H, held_out, test = moments(checkpoint, arguments.layer, arguments.module, tokens)
    weight = read_block(checkpoint, arguments.layer).weight(arguments.module)
    map_ = closed_form(arguments.form, H, weight.double().T @ weight.double(), 0)
    P = map_.apply(torch.eye(len(H)).double())
    H, held_out, test = (P.T @ each @ P for each in (H, held_out, test))
    weight = map_.apply_to_weight(weight.double()).float()

    form, n = LinearFormat(arguments.bits, 16), len(H)
    lost = (weight - dequantize_weight(quantize_weight(weight, form))).square().sum(0)
    order = torch.argsort(H.diagonal() * lost, descending=True)
    count = max(1, round(arguments.share * n / CHANNEL_STEP)) * CHANNEL_STEP
    parts = segments(form, HighImpact(arguments.high, order.numpy(), count))
    shape = weight.shape[0], n
    stored = ChannelSplit.of(form, arguments.high).stored_bits(shape, count) / weight.numel()
    ways: dict[str, tuple[float, tuple[Segment, ...], Rounding]] = {
        f"segments, {rounding}": (stored, parts, rounding) for rounding in get_args(Rounding)
    }
    for group in (None, 128, 64, 32):
        uniform = LinearFormat(arguments.bits, 16, group)
        ways[f"{uniform}, gptq"] = uniform.average_bits(n), segments(uniform, None), "gptq"
    found = []
    for name, (bits, way, rounding) in ways.items():
        started = time.process_time()
        error = (weight - assemble(round_segments(weight, way, H, held_out, rounding), way)).double()
        seconds = time.process_time() - started
        relative = float(row_errors(error, test).sum() / row_errors(weight.double(), test).sum())
        found.append({"way": name, "bits": bits, "error": relative, "seconds": seconds})
    table = Table("way", "bits", "test error", "CPU s", title=f"layer {arguments.layer} {arguments.module}")
    for row in found:
        table.add_row(row["way"], f"{row['bits']:.3f}", f"{row['error']:.5f}", f"{row['seconds']:.1f}")
    Console().print(table)
    if arguments.json:
        print(json.dumps(vars(arguments) | {"found": found}))


if __name__ == "__main__":
    main()
