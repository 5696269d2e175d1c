"""What numbers of high channels cost a block: of every group of linears alone, and of every two of them together.

To second order the loss of a block is a(k) = dW_l^T H_ll dW_l / 2 of every group l with k high channels, and what two
groups do to each other, C(k, j) = dW_l^T H_lm dW_m; blocks do not act on each other (arXiv 2511.17801). Nothing of H is
computed: E(l, k) and E(l, k and m, j) are measured, a is the former, and C what the latter is beyond the sum of both.
Where activations are quantised, the inputs of a low-bit group are on their grids too.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.errors import CalibrationError
from planish.compiler.learn.block import (
    MODULES,
    SITE_MODULES,
    Angles,
    Block,
    Flow,
    enter_block,
    run_block,
    run_site,
)
from planish.compiler.learn.gradient.block_loss import residual_loss
from planish.compiler.learn.low_bit import Reached, round_inputs
from planish.compiler.learn.rounding.clips import search_clip
from planish.compiler.learn.streams import Sequences, Streams
from planish.compiler.learn.transforms.site_moments import RESIDUAL_SITES, residual_weights
from planish.compiler.learn.transforms.transformed_hooks import TransformedHooks, factors_of_layer
from planish.compiler.progress import Progress
from planish.compiler.quantize.arithmetic import channels_of
from planish.compiler.select.channel_split import ChannelSplit, SplitWeight
from planish.compiler.select.float_blocks import visit_float_blocks
from planish.passes.high_impact import Segment
from planish.passes.transforms import Site, Transforms

__all__ = ["BY_LINEAR", "BY_SITE", "Groups", "PairLosses", "group_shapes", "measure_pair_losses"]

#: Groups of linears whose channels are split alike, by name; those of a group read the same site.
Groups = Mapping[str, tuple[str, ...]]
#: The linears that share an input are a group, as a kernel that reorders the input once wants it.
BY_SITE: Groups = {str(site): modules for site, modules in SITE_MODULES.items()}
#: Every linear for itself.
BY_LINEAR: Groups = {module: (module,) for module in MODULES}

#: Which groups are low-bit, and with which of their candidates: none, one or two of them.
_Touched = tuple[tuple[str, int], ...]
#: Rows on which clips are searched.
_CLIP_ROWS = 256


@dataclasses.dataclass(frozen=True)
class PairLosses:
    """What was measured at one block: the mean over tokens of ||y' - y||^2 / ||y||^2 of its output, all else float.

    Attributes:
        counts: by group, the numbers of high channels tried, ascending.
        alone: by group, the loss with each of them.
        together: by two groups in the order of `counts`, the loss with each of the first's and each of the second's.
    """

    counts: dict[str, list[int]]
    alone: dict[str, list[float]]
    together: dict[str, dict[str, list[list[float]]]]

    def interaction(self, first: str, second: str) -> npt.NDArray[np.float64]:
        """Return C(k, j), what two groups cost beyond the sum of each alone, float64 [counts, counts]."""
        sums = np.add.outer(self.alone[first], self.alone[second])
        return np.asarray(self.together[first][second], np.float64) - sums


def group_shapes(checkpoint: Checkpoint, groups: Groups) -> dict[str, tuple[int, int]]:
    """Return the shape [out, in] of the weights of each group, one below the other; all blocks have the same."""
    found = {}
    for name, modules in groups.items():
        shapes = [checkpoint.shape(f"model.layers.0.{module}.weight") for module in modules]
        found[name] = sum(rows for rows, _ in shapes), shapes[0][1]
    return found


@torch.no_grad()
def measure_pair_losses(
    checkpoint: Checkpoint,
    split: ChannelSplit,
    orders: Sequence[Mapping[str, Tensor]],
    counts: Mapping[str, Sequence[int]],
    token_ids: npt.NDArray[np.int64],
    folder: Path,
    progress: Progress,
    groups: Groups = BY_SITE,
    transforms: Transforms | None = None,
    every: int = 1,
    device: torch.device | None = None,
) -> list[PairLosses]:
    """Return the losses at every block, on float inputs, keeping each block's in `folder`: a killed run goes on.

    Every part of a weight is rounded to nearest with scales of its own; where activations are quantised, clips are
    those of no high channels for the rest, and of the most for the others. A block is run from the first low-bit group
    on, and what two choices have in common is run once. Memory holds the codes of one block's candidates, a byte for
    each weight and candidate, and what flows through the block for four sequences.

    Args:
        checkpoint: the float model.
        split: how channels are stored.
        orders: by block and group, the channels, those that matter most first, int64; see `channel_order`. The high
            part is the first ones, so what is high with fewer is high with more.
        counts: by group, the numbers of high channels to try, ascending.
        token_ids: sequences to measure on, int64 [sequences, seq]; nothing is fitted to them, so all of them count.
        folder: of this checkpoint, these candidates and these tokens alone.
        progress: is told how far the run is.
        groups: the linears whose channels are split alike.
        transforms: behind which channels are; None is none.
        every: behind attention, where tokens are for themselves, go on with one token of so many.
        device: where a block and a batch are; None is the CPU.

    Raises:
        SelectionError: if a number of high channels is impossible.
        CalibrationError: if a block's output is not finite, rounded or not.
    """
    for name, shape in group_shapes(checkpoint, groups).items():
        split.check_counts(counts[name], split.channels(shape))
    angles = Angles.of(checkpoint.config, token_ids.shape[1], device)

    def visit(layer: int, block: Block, streams: Streams, outputs: Sequences) -> dict[str, Any]:
        hooks = TransformedHooks(block, factors_of_layer(transforms, layer, device))
        walk = _Walk(block, hooks, split, orders[layer], counts, groups, angles, every)
        if split.low.activation_bits < 8:
            walk.find_clips(streams, outputs)
        measured = walk.losses(streams, outputs)
        _check(measured)
        return dataclasses.asdict(_tables(measured, counts))

    found = visit_float_blocks(
        checkpoint,
        token_ids,
        folder,
        "pairs",
        visit,
        lambda done, total: progress.step("measure channel counts", done, total),
        device,
    )
    return [PairLosses(**each) for each in found]


def _check(measured: Mapping[_Touched, float]) -> None:
    if not all(math.isfinite(loss) for loss in measured.values()):
        raise CalibrationError("rounding its weights gives NaN or infinity")


def _tables(measured: Mapping[_Touched, float], counts: Mapping[str, Sequence[int]]) -> PairLosses:
    tried = {name: range(len(each)) for name, each in counts.items()}
    alone = {name: [measured[((name, k),)] for k in tried[name]] for name in tried}
    together: dict[str, dict[str, list[list[float]]]] = {name: {} for name in tried}
    for first, second in itertools.combinations(tried, 2):
        together[first][second] = [
            [_of_pair(measured, (first, k), (second, j)) for j in tried[second]] for k in tried[first]
        ]
    return PairLosses({name: [*each] for name, each in counts.items()}, alone, together)


def _of_pair(measured: Mapping[_Touched, float], first: tuple[str, int], second: tuple[str, int]) -> float:
    return measured[(first, second) if (first, second) in measured else (second, first)]


class _Walk:
    """Runs a block with every choice of one or two low-bit groups, from site to site, branching where they differ."""

    def __init__(
        self,
        block: Block,
        hooks: TransformedHooks,
        split: ChannelSplit,
        orders: Mapping[str, Tensor],
        counts: Mapping[str, Sequence[int]],
        groups: Groups,
        angles: Angles,
        every: int,
    ) -> None:
        self._block, self._hooks, self._groups, self._angles = block, hooks, groups, angles
        self._every = every
        self._at: dict[Site, list[str]] = {
            site: [name for name, modules in groups.items() if modules[0] in at_site]
            for site, at_site in SITE_MODULES.items()
        }
        self._candidates: dict[tuple[str, int], _Candidate] = {}
        for name, modules in groups.items():
            weight = torch.cat([hooks.weights[module] for module in modules])
            for index, count in enumerate(counts[name]):
                self._candidates[name, index] = _Candidate(
                    split.quantize(weight, orders[name], count), split.segments(orders[name], count)
                )
        self._choices: dict[str, range] = {name: range(len(each)) for name, each in counts.items()}

    def find_clips(self, streams: Streams, outputs: Sequences) -> None:
        """Search the clips of all candidates on some of the inputs; see `measure_pair_losses`."""
        first = next(streams.all_batches())
        for site, names in self._at.items():
            self._hooks.stop = site
            try:
                run_block(self._block.config, self._hooks, streams.target[first], self._angles)
            except Reached as reached:
                x = reached.x.flatten(0, -2)[:_CLIP_ROWS]
            finally:
                self._hooks.stop = None
            weighs = site in RESIDUAL_SITES
            counted = residual_weights(outputs[first])[:_CLIP_ROWS] if weighs else torch.ones(len(x), device=x.device)
            for name in names:
                weight = torch.cat([self._hooks.weights[module] for module in self._groups[name]])
                choices = [self._candidates[name, index] for index in self._choices[name]]
                *_, rest = choices[0].segments
                high, *others = choices[-1].segments
                clips = {
                    each.suffix: search_clip(channels_of(x, each), channels_of(weight, each), each.format, counted)
                    for each in ((high, rest) if others else (rest,))
                }
                for choice in choices:
                    choice.clip(clips)

    def losses(self, streams: Streams, outputs: Sequences) -> dict[_Touched, float]:
        """Return the loss of every choice, by its groups and their candidates in the order of the walk."""
        sums: dict[_Touched, float] = {}
        for part in streams.all_batches():
            flow = enter_block(self._block.config, self._hooks, streams.target[part])
            for touched, output in self._from([*SITE_MODULES], flow, ()):
                loss = float(residual_loss(output, outputs[part][:, :: self._every]))
                sums[touched] = sums.get(touched, 0.0) + loss * (part.stop - part.start) / len(outputs)
        return sums

    def _from(self, sites: list[Site], flow: Flow, touched: _Touched) -> Iterator[tuple[_Touched, Tensor]]:
        """Yield the outputs of every choice that goes on from `touched` at the remaining `sites`."""
        if not sites:
            yield touched, flow.residual
            return
        hooks = _Branches(self._block, self._hooks, self._groups, self._candidates)
        for added in self._choices_at(sites[0], len(touched)):
            if not touched and not added and len(sites) == 1:
                continue
            hooks.touched = dict(added)
            behind = run_site(self._block.config, hooks, sites[0], flow, self._angles)
            if sites[0] == "attn_in":
                behind = Flow(behind.residual[:, :: self._every], behind.x[:, :: self._every])
            yield from self._from(sites[1:], behind, (*touched, *added))

    def _choices_at(self, site: Site, taken: int) -> Iterator[_Touched]:
        for number in range(3 - taken):
            for names in itertools.combinations(self._at[site], number):
                yield from itertools.product(*([(name, index) for index in self._choices[name]] for name in names))


@dataclasses.dataclass
class _Candidate:
    """A group with one number of high channels.

    Attributes:
        weight: its codes.
        segments: of its input channels.
    """

    weight: SplitWeight
    segments: tuple[Segment, ...]

    def clip(self, clips: Mapping[str, float]) -> None:
        """Give the grid of each segment the clip under its suffix."""
        self.segments = tuple(
            dataclasses.replace(each, format=dataclasses.replace(each.format, clip=clips[each.suffix]))
            for each in self.segments
        )


class _Branches:
    """Hooks of a site whose groups are float or low-bit; the products of one input with each weight are computed once.

    Attributes:
        touched: the low-bit groups of the site, and their candidates.
    """

    def __init__(
        self,
        block: Block,
        hooks: TransformedHooks,
        groups: Groups,
        candidates: Mapping[tuple[str, int], _Candidate],
    ) -> None:
        self.touched: dict[str, int] = {}
        self._block, self._hooks = block, hooks
        self._group_of = {module: name for name, modules in groups.items() for module in modules}
        self._groups, self._candidates = groups, candidates
        self._products: dict[tuple[str, int | None], Tensor] = {}
        self.site, self.heads, self.gain = hooks.site, hooks.heads, hooks.gain

    def linear(self, module: str, x: Tensor) -> Tensor:
        """Return the output of a linear, bias included."""
        name = self._group_of[module]
        index = self.touched.get(name)
        if (module, index) not in self._products:
            self._add_products(name, index, x)
        return self._products[module, index]

    def _add_products(self, name: str, index: int | None, x: Tensor) -> None:
        modules = self._groups[name]
        if index is None:
            self._products |= {(module, None): self._hooks.linear(module, x) for module in modules}
            return
        candidate = self._candidates[name, index]
        rows = [len(self._block.weight(module)) for module in modules]
        weights = torch.split(candidate.weight.dequantize(), rows)
        x = round_inputs(x, candidate.segments)
        for module, weight in zip(modules, weights, strict=True):
            bias = self._block.tensors.get(f"{module}.bias")
            self._products[module, index] = torch.nn.functional.linear(x, weight, bias)
