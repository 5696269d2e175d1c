"""What learning a block starts from and is measured by: clips, the loss of its output, and how well factors invert."""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from planish.compiler.learn.block import MODULES, SITE_MODULES, Angles, Block, Hooks, formats_of, run_block
from planish.compiler.learn.low_bit import LowBitHooks, Reached
from planish.compiler.learn.rounding.clips import kv_clips, search_clip
from planish.compiler.learn.streams import Sequences, Streams
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.fold import fold_block
from planish.compiler.learn.transforms.site_moments import RESIDUAL_SITES, residual_weights
from planish.compiler.quantize.arithmetic import dequantize_weight, quantize_weight
from planish.passes.scheme import Scheme
from planish.passes.transforms import Site

__all__ = ["Conditioning", "conditioning", "held_out_loss", "residual_loss", "rounded_to_nearest", "starting_clips"]

#: Largest inverse error of a factor that is let pass.
_INVERSE_ERROR = 1e-3
#: Rows on which clips are searched, as `flatten_block` does.
_CLIP_ROWS = 1024


@torch.no_grad()
def starting_clips(
    block: Block,
    factors: Mapping[Site, Factors],
    streams: Streams,
    outputs: Sequences,
    scheme: Scheme,
) -> dict[Site, float]:
    """Return the clip of every site, found site after site on the first sequences, weights unrounded."""
    folded = fold_block(block, factors)
    hooks = LowBitHooks(folded, dict(factors), scheme)
    hooks.weights = {module: folded.weight(module) for module in MODULES}
    first = next(streams.batches())
    angles = Angles.of(block.config, streams.seen.shape[1], streams.seen.device)
    token_weights = residual_weights(outputs[first])
    hooks.clips |= kv_clips(block, streams.seen[first], angles, factors, scheme, token_weights)
    for site, modules in SITE_MODULES.items():
        hooks.stop = site
        try:
            run_block(block.config, hooks, streams.seen[first], angles)
        except Reached as reached:
            rows = reached.x.flatten(0, -2)[:_CLIP_ROWS]
        weights = token_weights if site in RESIDUAL_SITES else torch.ones(len(rows), device=rows.device)
        weight = torch.cat([folded.weight(module) for module in modules])
        hooks.clips[site] = search_clip(rows, weight, scheme.at(site), weights[:_CLIP_ROWS].to(rows))
    return hooks.clips


@torch.no_grad()
def rounded_to_nearest(
    block: Block, factors: Mapping[Site, Factors], clips: Mapping[Site, float], scheme: Scheme
) -> LowBitHooks:
    """Return hooks that run the block under given transforms and clips, its weights rounded to nearest."""
    folded = fold_block(block, factors)
    hooks = LowBitHooks(folded, dict(factors), scheme)
    hooks.clips = dict(clips)
    for module, form in formats_of(scheme).items():
        weight = folded.weight(module)
        hooks.weights[module] = weight if form.is_float else dequantize_weight(quantize_weight(weight, form))
    return hooks


def residual_loss(found: Tensor, expected: Tensor) -> Tensor:
    """Return the mean over tokens of ||found - expected||^2 / ||expected||^2, of block outputs [..., hidden]."""
    weights = residual_weights(expected)
    lost = (found - expected).flatten(0, -2).square().mean(-1)
    return (weights * lost).mean() / (weights * expected.flatten(0, -2).square().mean(-1)).mean()


@torch.no_grad()
def held_out_loss(block: Block, hooks: Hooks, streams: Streams, outputs: Sequences, angles: Angles) -> float:
    """Return the loss on the held-out sequences of the `seen` stream; infinite where it is not finite."""
    losses = []
    for part in streams.batches(held_out=True):
        loss = residual_loss(run_block(block.config, hooks, streams.seen[part], angles), outputs[part])
        losses.append((float(loss), part.stop - part.start))
    found = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    return found if math.isfinite(found) else math.inf


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """How well the factors of a block can be inverted.

    Attributes:
        inverse_error: largest ||P P^-1 - I|| (row sums), with P^-1 as float32 holds it.
        log10_condition: of the worst factor.
        problem: what is wrong, in words, or None.
    """

    inverse_error: float
    log10_condition: float
    problem: str | None

    def evidence(self) -> dict[str, float]:
        """Return the numbers by name."""
        return {"inverse_error": self.inverse_error, "log10_condition": self.log10_condition}


def conditioning(factors: Mapping[Site, Factors]) -> Conditioning:
    """Return how well `factors` can be inverted; FlatQuant's guard, a bound of 1e-3 on the inverse error."""
    worst_error = worst_condition = 0.0
    for site, each in factors.items():
        for part in (each.scale, each.right, each.left):
            if part is not None and not part.isfinite().all():
                return Conditioning(math.inf, math.inf, f"the transform at {site} holds NaN or infinity")
        for part in (each.right, each.left):
            if part is None:
                continue
            P = part.detach().double()
            condition = float(torch.linalg.cond(P).max())
            error = math.inf
            if math.isfinite(condition):
                eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
                error = float((P @ torch.linalg.inv(P).float().double() - eye).abs().sum(-1).max())
            worst_error, worst_condition = max(worst_error, error), max(worst_condition, math.log10(condition))
            if not error <= _INVERSE_ERROR:
                problem = f"the transform at {site} is close to singular (||P P^-1 - I|| = {error:.2g})"
                return Conditioning(worst_error, worst_condition, problem)
    return Conditioning(worst_error, worst_condition, None)
