"""Which score of a channel tells what rounding it costs: loss of a model with a few channels of it in low bits.

    python benchmarks/channel_damage.py --dataset CALIBRATION --text HELD_OUT [--axis out] [--share 0.1] [--json]

First, the channels that a score puts at the top or bottom of every group of linears that share an input, or some taken
at random, are rounded in all blocks at once, the rest of the model in floating point. Then each of these groups is
rounded as a whole, in some blocks, one at a time: the rank correlation says whether the sum of a group's scores tells
its damage.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import kendalltau, spearmanr
from torch import Tensor

from planish.compiler.calibrate.text import calibration_tokens
from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.learn.block import Angles, Block, FloatHooks, read_block, run_block
from planish.compiler.learn.precision import fast_products
from planish.compiler.progress import progress_for
from planish.compiler.quantize.arithmetic import dequantize_weight, quantize_weight
from planish.compiler.select.channel_split import Axis
from planish.compiler.select.pair_losses import BY_SITE
from planish.compiler.select.sensitivity import BlockSensitivity, Score, channel_order, measure_sensitivity
from planish.passes.scheme import LinearFormat

SCORES = get_args(Score)

#: By block and group, its weights on the grid.
Lows = Sequence[Mapping[str, Tensor]]


class Model:
    """The float model on some windows of text, any of its weights replaced.

    Attributes:
        blocks: all of them.
        loss: mean cross entropy of the next token, in nats.
    """

    def __init__(self, checkpoint: Checkpoint, windows: Tensor) -> None:
        def read(name: str) -> Tensor:
            return torch.from_numpy(checkpoint.tensor(name).astype(np.float32))

        config = checkpoint.config
        self.blocks = [read_block(checkpoint, layer) for layer in range(config.num_hidden_layers)]
        self._windows, self._config = windows, config
        self._angles = Angles.of(config, windows.shape[1])
        self._gain = read("model.norm.weight")
        table = read("model.embed_tokens.weight")
        self._head = table if config.tie_word_embeddings else read("lm_head.weight")
        self._inputs = [table[windows]]
        for block in self.blocks[:-1]:
            self._inputs.append(run_block(config, FloatHooks(block), self._inputs[-1], self._angles))
        self.loss = self.loss_with({})

    def loss_with(self, replaced: Mapping[int, Block]) -> float:
        """Return the loss with some of the blocks replaced, computed from the first of them on."""
        first = min(replaced, default=len(self.blocks) - 1)
        x = self._inputs[first]
        for layer in range(first, len(self.blocks)):
            x = run_block(self._config, FloatHooks(replaced.get(layer, self.blocks[layer])), x, self._angles)
        x = self._gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._config.rms_norm_eps))
        losses = [
            torch.nn.functional.cross_entropy(h[:-1] @ self._head.T, ids[1:])
            for h, ids in zip(x, self._windows, strict=True)
        ]
        return float(torch.stack(losses).mean())


def rounded_groups(block: Block, form: LinearFormat) -> dict[str, Tensor]:
    """Return the weights of each group, one below the other, on the grid of `form`."""
    wholes = {group: torch.cat([block.weight(module) for module in modules]) for group, modules in BY_SITE.items()}
    return {group: dequantize_weight(quantize_weight(whole, form)) for group, whole in wholes.items()}


def mixed(block: Block, low: Mapping[str, Tensor], chosen: Mapping[str, Tensor], axis: Axis) -> Block:
    """Return a block with the `chosen` channels of some groups taken from `low`."""
    tensors = dict(block.tensors)
    for group, channels in chosen.items():
        modules = BY_SITE[group]
        index = (slice(None), channels) if axis == "in" else channels
        whole = torch.cat([block.weight(module) for module in modules])
        whole[index] = low[group][index]
        parts = whole.split([len(block.weight(module)) for module in modules])
        tensors |= {f"{module}.weight": part for module, part in zip(modules, parts, strict=True)}
    return dataclasses.replace(block, tensors=tensors)


def increase_of_some_channels(
    model: Model, low: Lows, sensitivity: Sequence[BlockSensitivity], axis: Axis, share: float
) -> dict[str, float]:
    """Return how much the loss rises with the top, random or bottom channels of every group rounded."""
    generator = torch.Generator().manual_seed(0)

    def loss(which: str, score: Score) -> float:
        replaced = {}
        for layer, (block, each) in enumerate(zip(model.blocks, sensitivity, strict=True)):
            chosen = {}
            for group, modules in BY_SITE.items():
                order = channel_order(each, modules, axis, score)
                if which == "random":
                    order = torch.randperm(len(order), generator=generator)
                count = round(share * len(order))
                chosen[group] = order[-count:] if which == "bottom" else order[:count]
            replaced[layer] = mixed(block, low[layer], chosen, axis)
        return model.loss_with(replaced) - model.loss

    found = {f"{which} by {score}": loss(which, score) for score in SCORES for which in ("top", "bottom")}
    return found | {"random": loss("random", SCORES[0])}


def increase_of_groups(
    model: Model, low: Lows, sensitivity: Sequence[BlockSensitivity], layers: Sequence[int]
) -> list[dict[str, float | str | int]]:
    """Return how much the loss rises with one group of one block rounded, and what each score says of it."""
    rows = []
    for layer in track(layers, console=Console(stderr=True)):
        block = model.blocks[layer]
        for group, modules in BY_SITE.items():
            whole = torch.cat([block.weight(module) for module in modules])
            replaced = mixed(block, low[layer], {group: torch.arange(whole.shape[1])}, "in")
            lost = (low[layer][group] - whole).square().sum()
            scores = {
                score: sum(float(sensitivity[layer].scores[module][score]["in"].sum()) for module in modules)
                for score in SCORES
            }
            increase = model.loss_with({layer: replaced}) - model.loss
            rows.append({"layer": layer, "group": group, "increase": increase, "(W-Q)^2": float(lost), **scores})
    return rows


def correlations(rows: Sequence[Mapping[str, float | str | int]]) -> dict[str, dict[str, float]]:
    """Return by score the rank correlations of its sums with the increases of the loss."""
    increases = [row["increase"] for row in rows]
    found = {}
    for score in ("(W-Q)^2", *SCORES):
        sums = [row[score] for row in rows]
        found[score] = {
            "Spearman": float(spearmanr(sums, increases).statistic),
            "Kendall": float(kendalltau(sums, increases).statistic),
        }
    return found


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dataset", required=True, help="text that scores are measured on")
    parser.add_argument("--text", required=True, help="text that the loss is measured on")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--axis", choices=get_args(Axis), default="in")
    parser.add_argument("--share", type=float, default=0.1, help="of the channels, to round at a time")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=8, help="in how many blocks groups are rounded one at a time")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    checkpoint, form = open_checkpoint(arguments.model), LinearFormat(arguments.bits, 16)
    tokens, windows = (
        calibration_tokens(text, checkpoint, nsamples=count, seqlen=arguments.seqlen)
        for text, count in ((arguments.dataset, arguments.nsamples), (arguments.text, arguments.windows))
    )
    with tempfile.TemporaryDirectory() as folder, progress_for() as progress:
        sensitivity = measure_sensitivity(checkpoint, tokens, form, Path(folder), progress)
    with torch.no_grad(), fast_products():
        model = Model(checkpoint, torch.from_numpy(windows))
        low = [rounded_groups(block, form) for block in model.blocks]
        some = increase_of_some_channels(model, low, sensitivity, arguments.axis, arguments.share)
        layers = np.linspace(0, len(model.blocks) - 1, arguments.blocks).round().astype(int).tolist()
        groups = increase_of_groups(model, low, sensitivity, layers)
    table = Table("channels rounded", "loss increase", title=f"float loss {model.loss:.4f}")
    for name, increase in some.items():
        table.add_row(name, f"{increase:+.4f}")
    ranks = Table("score", "Spearman", "Kendall", title=f"{len(groups)} groups, one at a time")
    for name, found in correlations(groups).items():
        ranks.add_row(name, *(f"{value:+.2f}" for value in found.values()))
    for each in (table, ranks):
        Console().print(each)
    if arguments.json:
        report = {"loss": model.loss, "some": some, "groups": groups, "correlations": correlations(groups)}
        print(json.dumps(vars(arguments) | report))


if __name__ == "__main__":
    main()
