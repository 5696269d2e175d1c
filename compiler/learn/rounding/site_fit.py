"""Fit and round the linears of one site to what they will really see there."""

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from planish.compiler.learn.block import SITE_MODULES, Angles, Block, run_block
from planish.compiler.learn.low_bit import LowBitHooks, Reached, round_inputs
from planish.compiler.learn.rounding.clips import search_clip
from planish.compiler.learn.rounding.gptq import compensate
from planish.compiler.learn.rounding.segments import Parts, Rounding, assemble, round_segments
from planish.compiler.learn.streams import Sequences, Streams
from planish.compiler.learn.transforms.site_moments import RESIDUAL_SITES, residual_weights
from planish.compiler.quantize.arithmetic import channels_of, dequantize_weight, quantize_weight
from planish.passes.high_impact import Channels, HighImpact, Segment, segments
from planish.passes.scheme import LinearFormat
from planish.passes.transforms import Site

__all__ = ["FittedSite", "HighCount", "SiteFit", "Steps"]

#: Ridges tried for the least-squares step before rounding, as shares of the Hessian's mean diagonal.
_RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
#: Rows on which clips are searched.
_CLIP_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Steps:
    """What is done besides the transforms; all of it, unless the worth of a step is to be measured.

    Attributes:
        clips: search how much of their range grids span; otherwise all of it.
        fit: move weights to where they make up for the rounding of their inputs.
        rounding: how weights are rounded.
    """

    clips: bool = True
    fit: bool = True
    rounding: Rounding = "gptq"


@dataclasses.dataclass(frozen=True)
class HighCount:
    """How many channels of a site are high-impact ones. Which ones is found when its transform is there.

    Attributes:
        bits: of their weight codes.
        count: how many.
        row_weights: what an error of each output of the site's linears, stacked, counts, float32 [out]; None is alike.
        by_rounding: whether it counts how far weights are from what they are rounded to.
    """

    bits: int
    count: int
    row_weights: Tensor | None = None
    by_rounding: bool = True


@dataclasses.dataclass(frozen=True)
class FittedSite:
    """The linears of a site, stacked.

    Attributes:
        clip: of the grid of their inputs, high-impact channels excepted.
        high: the high-impact channels, with their clip; None is none.
        parts: the codes, by segment.
        weight: float32 [out, in], what the codes stand for.
        evidence: what was measured.
    """

    clip: float
    high: HighImpact | None
    parts: Parts
    weight: Tensor
    evidence: dict[str, float]


@dataclasses.dataclass
class SiteFit:
    """One site of a block whose sites in front of it are done.

    Attributes:
        folded: the block, transforms folded in.
        streams: its inputs.
        outputs: of the float block.
        angles: of the positions.
        hooks: run the folded block with all sites in front on their grids.
        site: which one.
        steps: what is done.
        high: its high-impact channels, or how many there are; None is none.
    """

    folded: Block
    streams: Streams
    outputs: Sequences
    angles: Angles
    hooks: LowBitHooks
    site: Site
    steps: Steps
    high: HighImpact | HighCount | None = None

    def run(self, form: LinearFormat) -> FittedSite:
        """Fit and round the linears of the site to `form`, and to more bits where channels are high-impact ones.

        Before they are rounded, the weights are moved to where they best make up for the rounding of their inputs.
        What went wrong in earlier blocks is left alone: making up for that too suits the text it is fitted to and
        hardly any other (measured: docs/measurements.md).
        """
        weight = torch.cat([self.folded.weight(module) for module in SITE_MODULES[self.site]])
        clip, high = self._grids(weight, form)
        parts = segments(form, high, clip)
        hessian, cross = self._moments(weight, parts)
        candidates = {0.0: weight}
        if self.steps.fit:
            candidates |= compensate(weight, hessian, cross, _RIDGES)
        errors = self._held_out_errors(weight, parts, candidates)
        ridge = min(errors, key=lambda r: errors[r])
        fitted = candidates[ridge]
        # GPTQ needs the memory.
        del candidates, cross
        unseen = hessian
        if high is not None or self.steps.rounding == "adaround":
            unseen, _ = self._moments(weight, parts, held_out=True)
        rounded = round_segments(fitted, parts, hessian, unseen, self.steps.rounding)
        best = assemble(rounded, parts)
        evidence = {
            "clip": clip,
            **({"high_clip": high.clip} if high is not None else {}),
            "ridge": ridge,
            "error_before": errors[0.0],
            "error_fitted": errors[ridge],
            "error": self._held_out_errors(weight, parts, {ridge: best})[ridge],
        }
        return FittedSite(clip, high, rounded, best, evidence)

    def _grids(self, weight: Tensor, form: LinearFormat) -> tuple[float, HighImpact | None]:
        """Return the clip of the site, and the high-impact channels with theirs."""
        first, token_weights = next(self._inputs())
        high = self.high
        if isinstance(high, HighCount):
            moment = (token_weights[:, None] * first.square()).mean(0)
            high = HighImpact(high.bits, _ranked(weight, moment, high, form), high.count)
        if not self.steps.clips:
            return 1.0, high
        x, token_weights = first[:_CLIP_ROWS], token_weights[:_CLIP_ROWS]
        *above, clip = (
            search_clip(channels_of(x, each), channels_of(weight, each), each.format, token_weights)
            for each in segments(form, None if high is None else dataclasses.replace(high, clip=1.0))
        )
        if high is not None:
            (high,) = (dataclasses.replace(high, clip=each) for each in above)
        return clip, high

    def _moments(self, weight: Tensor, parts: tuple[Segment, ...], held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Return Xq^T Xq and X^T Xq, of the inputs X and the same on their grids, tokens weighted, float64 [n, n]."""
        n = weight.shape[1]
        hessian, cross = (torch.zeros(n, n, dtype=torch.float64, device=weight.device) for _ in range(2))
        for x, token_weights in self._inputs(held_out):
            rounded = round_inputs(x, parts)
            weighted = rounded * token_weights[:, None]
            hessian += weighted.T @ rounded
            cross += x.T @ weighted
        return hessian, cross

    def _held_out_errors(
        self, weight: Tensor, parts: tuple[Segment, ...], candidates: Mapping[float, Tensor]
    ) -> dict[float, float]:
        """Return by ridge what putting a candidate, and grids, for `weight` costs on held-out text, relative."""
        lost, norm = dict.fromkeys(candidates, 0.0), 0.0
        for x, token_weights in self._inputs(held_out=True):
            y, rounded = x @ weight.T, round_inputs(x, parts)
            norm += float((token_weights[:, None] * y.square()).sum())
            for ridge, candidate in candidates.items():
                made = rounded @ candidate.T
                lost[ridge] += float((token_weights[:, None] * (made - y).square()).sum())
        return {ridge: each / max(norm, 1e-30) for ridge, each in lost.items()}

    def _inputs(self, held_out: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what comes to the site, transformed and not yet rounded, [tokens, n], and the tokens' weights."""
        for part in self.streams.batches(held_out=held_out):
            self.hooks.stop = self.site
            try:
                run_block(self.folded.config, self.hooks, self.streams.seen[part], self.angles)
            except Reached as reached:
                x = reached.x.flatten(0, -2)
            finally:
                self.hooks.stop = None
            weighs = self.site in RESIDUAL_SITES
            yield x, residual_weights(self.outputs[part]) if weighs else torch.ones(len(x), device=x.device)


def _ranked(weight: Tensor, moment: Tensor, high: HighCount, form: LinearFormat) -> Channels:
    """Return the input channels of a weight, those that matter most first, int64 [in].

    That is by what their rounding costs, sum_i f_i E[x_j^2] (W_ij - Q_ij)^2, the Fisher information in the factors
    that K-FAC (arXiv 1503.05671) takes it apart into: f of outputs, which no transform of the inputs changes (what
    changes rows makes it approximate), and E[x^2] of inputs as they are now. Without the rounding it is the sum of
    the information itself, sum_i f_i E[x_j^2], and f multiplies all channels alike.

    Args:
        weight: float32 [out, in].
        moment: E[x^2], float32 [in].
        high: what counts.
        form: what the weight is rounded to.
    """
    if not high.by_rounding:
        return torch.argsort(moment, descending=True, stable=True).cpu().numpy()
    lost = (weight - dequantize_weight(quantize_weight(weight, form))).square()
    if high.row_weights is not None:
        lost = lost * high.row_weights.to(lost)[:, None]
    return torch.argsort(moment * lost.sum(0), descending=True, stable=True).cpu().numpy()
