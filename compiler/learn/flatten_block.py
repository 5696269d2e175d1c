"""Flatten one decoder block in closed form: transforms from moments, clips by search, weights by GPTQ."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from planish.compiler.learn.before_after import BeforeAfter, compare_block
from planish.compiler.learn.block import SITE_MODULES, Angles, Block
from planish.compiler.learn.gradient.refine import Refinement, refine
from planish.compiler.learn.low_bit import LowBitHooks
from planish.compiler.learn.rounding.clips import kv_clips
from planish.compiler.learn.rounding.segments import select_rows
from planish.compiler.learn.rounding.site_fit import HighCount, SiteFit, Steps
from planish.compiler.learn.streams import Sequences, Streams
from planish.compiler.learn.transforms.candidates import Form
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.fold import fold_block
from planish.compiler.learn.transforms.site_factors import fit_factors
from planish.compiler.learn.transforms.site_moments import residual_weights
from planish.compiler.quantize.arithmetic import QuantizedWeight
from planish.passes.high_impact import HighImpact, segments
from planish.passes.scheme import Scheme
from planish.passes.transforms import Site

__all__ = ["Flattened", "flatten_block"]


@dataclasses.dataclass(frozen=True)
class Flattened:
    """One flattened block.

    Attributes:
        factors: by site.
        clips: by site.
        high: the high-impact channels with their clips, by site that has any.
        codes: by module within the block, or segment of it as `Segment.of` calls it.
        hooks: run the block as it is now.
        evidence: by site, what was measured.
        compared: activations and errors of the block as it was and as it is.
        refinement: what refining the transforms did, if it was asked for; see `Refined.evidence`.
    """

    factors: dict[Site, Factors]
    clips: dict[Site, float]
    high: dict[Site, HighImpact]
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
    high: Mapping[Site, HighImpact | HighCount] | None = None,
) -> Flattened:
    """Return `block` flattened for `scheme`, with the given form at every site.

    Args:
        block: the float block.
        streams: its inputs.
        outputs: of the float block.
        scheme: what is rounded to.
        forms: by site.
        seed: of the rotations.
        steps: what is done besides; None is all.
        refinement: how the transforms are refined; None is not at all.
        high: high-impact channels, or how many there are, by site that has any; None is nowhere.
    """
    angles = Angles.of(block.config, streams.target.shape[1], streams.target.device)
    factors, scales = fit_factors(block, streams, outputs, angles, scheme, forms, seed)
    refined = None
    if refinement is not None and refinement.epochs:
        refined = refine(block, factors, streams, outputs, scheme, refinement)
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
        chosen = None if high is None else high.get(site)
        done = SiteFit(folded, streams, outputs, angles, hooks, site, steps, chosen).run(scheme.at(site))
        hooks.clips[site], evidence[site] = done.clip, done.evidence
        if done.high is not None:
            hooks.high[site] = done.high
        first_row = 0
        for module in modules:
            rows = slice(first_row, first_row + len(folded.weight(module)))
            first_row, hooks.weights[module] = rows.stop, done.weight[rows]
            for segment, part in zip(segments(scheme.at(site), done.high), select_rows(done.parts, rows), strict=True):
                codes[segment.of(module)] = part
    evidence["ffn_out"] |= scales
    compared = compare_block(block, hooks, factors, streams, outputs, angles, scheme)
    learned = None if refined is None else refined.evidence
    return Flattened(factors, hooks.clips, hooks.high, codes, hooks, evidence, compared, learned)
