"""Flatten one decoder block in closed form: transforms from moments, clips by search, weights by GPTQ."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from planish.compiler.learn.before_after import BeforeAfter, compare_block
from planish.compiler.learn.block import SITE_MODULES, Angles, Block, run_block
from planish.compiler.learn.candidates import Form
from planish.compiler.learn.clips import kv_clips, search_clip
from planish.compiler.learn.factors import Factors
from planish.compiler.learn.fold import fold_block
from planish.compiler.learn.gptq import compensate, gptq
from planish.compiler.learn.low_bit import LowBitHooks, Reached, round_activation
from planish.compiler.learn.refine import Refinement, refine_block
from planish.compiler.learn.site_factors import closed_form_factors
from planish.compiler.learn.site_moments import RESIDUAL_SITES, gather_moments, residual_weights
from planish.compiler.learn.smooth_site import smooth_ffn_out
from planish.compiler.learn.streams import Sequences, Streams
from planish.compiler.quantize.arithmetic import QuantizedWeight, dequantize_weight, quantize_weight
from planish.passes.scheme import Scheme
from planish.passes.transforms import Site

__all__ = ["Flattened", "Steps", "flatten_block"]

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
        gptq: round weights by GPTQ; otherwise to nearest.
    """

    clips: bool = True
    fit: bool = True
    gptq: bool = True


@dataclasses.dataclass(frozen=True)
class Flattened:
    """One flattened block.

    Attributes:
        factors: by site.
        clips: by site.
        codes: by module within the block.
        hooks: run the block as it is now.
        evidence: by site, what was measured.
        compared: activations and errors of the block as it was and as it is.
        refinement: what refining the transforms did, if it was asked for; see `Refined.evidence`.
    """

    factors: dict[Site, Factors]
    clips: dict[Site, float]
    codes: dict[str, QuantizedWeight]
    hooks: LowBitHooks
    evidence: dict[Site, dict[str, float]]
    compared: BeforeAfter
    refinement: dict[str, Any] | None = None


def flatten_block(
    block: Block,
    streams: Streams,
    outputs: Sequences,
    scheme: Scheme,
    forms: dict[Site, Form],
    seed: int,
    steps: Steps | None = None,
    refinement: Refinement | None = None,
) -> Flattened:
    """Return `block` flattened for `scheme`, with the given form at every site; `outputs` are the float block's."""
    angles = Angles.of(block.config, streams.target.shape[1], streams.target.device)
    inputs = (streams.seen[part] for part in streams.batches())
    smooth = forms["ffn_out"] == "smooth"
    closed: dict[Site, Form] = {**forms, "ffn_out": "rotation"} if smooth else forms
    # The moments are not kept: they are several times as large as the block.
    factors = closed_form_factors(block, gather_moments(block, inputs, angles), closed, seed)
    scales: dict[str, float] = {}
    if smooth:
        factors["ffn_out"], scales = smooth_ffn_out(block, streams, outputs, angles, scheme, seed)
    refined = None
    if refinement is not None and refinement.epochs:
        refined = refine_block(block, factors, streams, outputs, scheme, refinement)
        factors = refined.factors
    folded = fold_block(block, factors)
    hooks = LowBitHooks(folded, factors, scheme)
    steps = steps or Steps()
    if steps.clips:
        first = next(streams.batches())
        token_weights = residual_weights(outputs[first])
        hooks.clips |= kv_clips(block, streams.seen[first], angles, factors, scheme, token_weights)
    codes: dict[str, QuantizedWeight] = {}
    evidence: dict[Site, dict[str, float]] = {}
    for site, modules in SITE_MODULES.items():
        hooks.clips[site], whole, evidence[site] = _SiteFit(folded, streams, outputs, angles, hooks, site, steps).run(
            scheme
        )
        for module, each in zip(modules, _split_rows(whole, [len(folded.weight(m)) for m in modules]), strict=True):
            codes[module], hooks.weights[module] = each, dequantize_weight(each)
    evidence["ffn_out"] |= scales
    compared = compare_block(block, hooks, factors, streams, outputs, angles, scheme)
    learned = None if refined is None else refined.evidence
    return Flattened(factors, hooks.clips, codes, hooks, evidence, compared, learned)


def _split_rows(weight: QuantizedWeight, sizes: list[int]) -> list[QuantizedWeight]:
    return [
        dataclasses.replace(weight, codes=codes, scale=scale.contiguous())
        for codes, scale in zip(torch.split(weight.codes, sizes), torch.split(weight.scale, sizes, dim=1), strict=True)
    ]


@dataclasses.dataclass
class _SiteFit:
    """Fits and rounds the linears of one site to what they will really see there."""

    folded: Block
    streams: Streams
    outputs: Sequences
    angles: Angles
    hooks: LowBitHooks
    site: Site
    steps: Steps

    def run(self, scheme: Scheme) -> tuple[float, QuantizedWeight, dict[str, float]]:
        """Return the clip, the site's linears, stacked and rounded, and the evidence.

        Before they are rounded, the weights are moved to where they best make up for the rounding of their inputs.
        What went wrong in earlier blocks is left alone: making up for that too suits the text it is fitted to and
        hardly any other (measured: docs/measurements.md).
        """
        form = scheme.linear
        weight = torch.cat([self.folded.weight(module) for module in SITE_MODULES[self.site]])
        first, token_weights = next(self._inputs())
        clip = search_clip(first[:_CLIP_ROWS], weight, form, token_weights[:_CLIP_ROWS]) if self.steps.clips else 1.0
        n = weight.shape[1]
        hessian, cross = (torch.zeros(n, n, dtype=torch.float64, device=weight.device) for _ in range(2))
        for x, token_weights in self._inputs():
            rounded = round_activation(x, form.activation_bits, clip)
            weighted = rounded * token_weights[:, None]
            hessian += weighted.T @ rounded
            cross += x.T @ weighted

        def held_out_errors(candidates: Mapping[float, Tensor]) -> dict[float, float]:
            lost, norm = dict.fromkeys(candidates, 0.0), 0.0
            for x, token_weights in self._inputs(held_out=True):
                y, rounded = x @ weight.T, round_activation(x, form.activation_bits, clip)
                norm += float((token_weights[:, None] * y.square()).sum())
                for ridge, candidate in candidates.items():
                    made = rounded @ candidate.T
                    lost[ridge] += float((token_weights[:, None] * (made - y).square()).sum())
            return {ridge: each / max(norm, 1e-30) for ridge, each in lost.items()}

        candidates = {0.0: weight}
        if self.steps.fit:
            candidates |= compensate(weight, hessian, cross, _RIDGES)
        errors = held_out_errors(candidates)
        ridge = min(errors, key=lambda r: errors[r])
        fitted = candidates[ridge]
        # GPTQ needs the memory.
        del candidates, cross
        best = gptq(fitted, hessian, form) if self.steps.gptq else quantize_weight(fitted, form)
        evidence = {
            "clip": clip,
            "ridge": ridge,
            "error_before": errors[0.0],
            "error_fitted": errors[ridge],
            "error": held_out_errors({ridge: dequantize_weight(best)})[ridge],
        }
        return clip, best, evidence

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
