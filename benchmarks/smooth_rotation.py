"""The output error of every down_proj behind channel scales and a Hadamard rotation, by the policy of the scales.

    python benchmarks/smooth_rotation.py --dataset wiki.txt

Policies choose and learn on the calibration windows alone; the errors are those on other windows of the same text.
Every policy has the same rotation and the same rounding: the reductions are against SmoothRot's max rule.
"""

import argparse
import json
import statistics
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from planish.compiler.calibrate.text import calibration_tokens
from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.learn.block import Angles, FloatHooks, read_block, run_block
from planish.compiler.learn.smooth.error import Tokens, output_errors, summed_up
from planish.compiler.learn.smooth.smooth_rotation import Policy, SmoothRotation, smooth_rotation
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.hadamard import hadamard_transform
from planish.passes.scheme import LinearFormat, Scheme
from planish.passes.transforms import Site

NAMES = {
    "ones": "H",
    "max": "max + H",
    "quantile": "quantile + H",
    "rms": "RMS + H",
    "rms_learned": "RMS, learned",
    "quantile_learned": "quantile, learned",
    "chosen": "chosen",
}
assert set(NAMES) == {*get_args(Policy), "chosen"}


class Recorder(FloatHooks):
    """The float block, keeping what down_proj reads."""

    ffn_out: Tensor

    def site(self, site: Site, x: Tensor) -> Tensor:
        """Return `x`."""
        if site == "ffn_out":
            self.ffn_out = x
        return x


def is_massive(x: Tensor) -> bool:
    """Return whether x holds massive activations: beyond 100 and 1000 times the median magnitude (arXiv 2402.17762)."""
    magnitude = x.abs().flatten()
    return float(magnitude.max()) > max(100.0, 1000 * float(magnitude.median()))


def measure(found: SmoothRotation, x: Tensor, weight: Tensor, form: LinearFormat) -> dict[str, dict[str, float]]:
    """Return the mean error per token, with and without first tokens, of each policy on x [sequences, seq, n]."""
    rotation = Factors.of(hadamard_transform(weight.shape[1], found.seed))
    tokens = Tokens.of(x, weight, torch.ones(x.shape[:2]))
    errors: dict[str, dict[str, float]] = {}
    for candidate in found.candidates:
        error = summed_up(output_errors(tokens, weight, candidate.scale, rotation, form), tokens)
        errors[candidate.policy] = {"all": error.mean, "without_first": error.without_first}
    return errors | {"chosen": errors[found.chosen.policy]}


def layers(checkpoint: Checkpoint, ids: Tensor, held_out: int, form: LinearFormat, seed: int) -> list[dict[str, Any]]:
    """Return the errors at ffn_out of every block; the last `held_out` windows are for measuring only."""
    x = torch.from_numpy(checkpoint.tensor("model.embed_tokens.weight")).float()[ids]
    angles = Angles.of(checkpoint.config, ids.shape[1])
    rows = []
    for layer in track(range(checkpoint.config.num_hidden_layers), console=Console(stderr=True)):
        block = read_block(checkpoint, layer)
        hooks = Recorder(block)
        outputs, inputs = [], []
        with torch.no_grad():
            for window in torch.split(x, 4):
                outputs.append(run_block(checkpoint.config, hooks, window, angles))
                inputs.append(hooks.ffn_out)
        x, ffn_out, weight = torch.cat(outputs), torch.cat(inputs), block.weight("mlp.down_proj")
        found = smooth_rotation(ffn_out[:-held_out], weight, form, seed=seed)
        rows.append(
            {
                "layer": layer,
                "massive": is_massive(ffn_out[:-held_out]),
                "errors": measure(found, ffn_out[-held_out:], weight, form),
                "candidates": [candidate.to_dict() for candidate in found.candidates],
            }
        )
    return rows


def reductions(rows: list[dict[str, Any]], tokens: str) -> dict[str, dict[str, float]]:
    """Return by policy the mean over sites of the reduction against the max rule, and that of the summed errors."""

    def error(row: dict[str, Any], policy: str) -> float:
        return float(row["errors"][policy][tokens])

    return {
        policy: {
            "mean_reduction": statistics.fmean(1 - error(row, policy) / error(row, "max") for row in rows),
            "reduction_of_mean": 1 - sum(error(r, policy) for r in rows) / sum(error(r, "max") for r in rows),
        }
        for policy in NAMES
    }


def print_table(report: dict[str, Any], title: str) -> None:
    """Print the error of the max rule and the change that each other policy makes to it."""
    table = Table(title=title)
    for column in ("layer", "error, max + H", *(NAMES[policy] for policy in NAMES if policy != "max"), "chosen is"):
        table.add_column(column, justify="right")

    def percent(value: float) -> str:
        return f"{-100 * value:+.1f} %"

    for row in report["layers"]:
        errors = row["errors"]
        at_max = errors["max"]["all"]
        best = min(row["candidates"], key=lambda candidate: float(candidate["weighted"]))
        changes = [percent(1 - errors[policy]["all"] / at_max) for policy in NAMES if policy != "max"]
        name = f"{row['layer']}{' massive' if row['massive'] else ''}"
        table.add_row(name, f"{at_max:.4g}", *changes, NAMES[best["policy"]])
    for kind, found in report["reductions"].items():
        for tokens, by_policy in found.items():
            for how in ("mean_reduction", "reduction_of_mean"):
                changes = [percent(by_policy[policy][how]) for policy in NAMES if policy != "max"]
                table.add_row(f"{kind} sites, {tokens}", how.replace("_", " "), *changes, "")
    Console(width=180).print(table)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dataset", required=True, help="text to calibrate and measure on")
    parser.add_argument("--scheme", default="w4a4", help="format of weights and activations")
    parser.add_argument("--nsamples", type=int, default=16, help="windows to choose and learn on")
    parser.add_argument("--held-out", type=int, default=8, help="other windows, to measure on")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    checkpoint = open_checkpoint(arguments.model)
    count = arguments.nsamples + arguments.held_out
    ids = calibration_tokens(
        arguments.dataset, checkpoint, nsamples=count, seqlen=arguments.seqlen, seed=arguments.seed
    )
    form = Scheme.parse(arguments.scheme).linear
    rows = layers(checkpoint, torch.from_numpy(ids), arguments.held_out, form, arguments.seed)
    kinds = {"all": rows, "massive": [row for row in rows if row["massive"]]}
    report = {
        "layers": rows,
        "reductions": {
            kind: {tokens: reductions(some, tokens) for tokens in ("all", "without_first")}
            for kind, some in kinds.items()
            if some
        },
    }
    if arguments.json:
        print(json.dumps(report))
        return
    print_table(report, f"{arguments.model}, {form}: {arguments.held_out} windows of {arguments.seqlen} held out")


if __name__ == "__main__":
    main()
