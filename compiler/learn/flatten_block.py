"""Flatten one decoder block in closed form: transforms from moments, clips by search, weights by GPTQ."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from planish.compiler.learn.block import SITE_MODULES, Angles, Block, FloatHooks, run_block
from planish.compiler.learn.candidates import Form, closed_form
from planish.compiler.learn.clips import search_clip
from planish.compiler.learn.closed_forms import head_transforms
from planish.compiler.learn.factors import Factors
from planish.compiler.learn.fold import fold_block, reading_factors
from planish.compiler.learn.gptq import compensate, gptq
from planish.compiler.learn.hadamard import hadamard_transform
from planish.compiler.learn.low_bit import LowBitHooks, Reached, round_activation
from planish.compiler.learn.site_moments import RESIDUAL_SITES, SiteMoments, gather_moments, residual_weights
from planish.compiler.quantize.arithmetic import QuantizedWeight, dequantize_weight, quantize_weight
from planish.passes.scheme import Scheme
from planish.passes.transforms import LayerTransforms, Site

__all__ = ["Flattened", "Streams", "closed_form_factors", "flatten_block"]

#: Ridges tried for the least-squares step before rounding, as shares of the Hessian's mean diagonal.
_RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0)
#: Rows on which clips are searched.
_CLIP_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Streams:
    """The inputs of one block, or its outputs.

    Attributes:
        target: float32 [sequences, seq, hidden], of the float model.
        seen: the same of the model quantised so far.
        held_out: how many of the last sequences nothing is fitted to.
    """

    target: Tensor
    seen: Tensor
    held_out: int

    def batches(self, held_out: bool = False, size: int = 4) -> Iterator[slice]:
        """Yield which sequences to take together, of those to fit to or of those held out."""
        border = len(self.target) - self.held_out
        first, last = (border, len(self.target)) if held_out else (0, border)
        yield from (slice(start, min(start + size, last)) for start in range(first, last, size))


@dataclasses.dataclass(frozen=True)
class Flattened:
    """One flattened block.

    Attributes:
        factors: by site.
        clips: by site.
        codes: by module within the block.
        hooks: run the block as it is now.
        evidence: by site, what was measured.
    """

    factors: dict[Site, Factors]
    clips: dict[Site, float]
    codes: dict[str, QuantizedWeight]
    hooks: LowBitHooks
    evidence: dict[Site, dict[str, float]]


def flatten_block(
    block: Block,
    streams: Streams,
    outputs: Tensor,
    scheme: Scheme,
    forms: dict[Site, Form],
    seed: int,
    rounding: str = "gptq",
) -> Flattened:
    """Return `block` flattened for `scheme`, with the given form at every site; `outputs` are the float block's."""
    angles = Angles.of(block.config, streams.target.shape[1], streams.target.device)
    moments = gather_moments(block, (streams.seen[part] for part in streams.batches()), angles)
    factors = closed_form_factors(block, moments, forms, seed)
    folded = fold_block(block, factors)
    hooks = LowBitHooks(folded, factors, scheme)
    codes: dict[str, QuantizedWeight] = {}
    evidence: dict[Site, dict[str, float]] = {}
    for site, modules in SITE_MODULES.items():
        rounding_of_site = _SiteRounding(
            block, folded, streams, outputs, angles, hooks, reading_factors(block, factors, site), site
        )
        hooks.clips[site], rounded, evidence[site] = rounding_of_site.run(scheme, rounding)
        for module, each in zip(modules, rounded, strict=True):
            codes[module], hooks.weights[module] = each, dequantize_weight(each)
    hooks.stop = None
    return Flattened(factors, hooks.clips, codes, hooks, evidence)


def closed_form_factors(
    block: Block, moments: SiteMoments, forms: dict[Site, Form], seed: int
) -> dict[Site, Factors]:
    """Return the closed-form transform of every site; `key` and `value` know identity, rotation and dense."""
    config = block.config
    factors: dict[Site, Factors] = {}
    stored = {"key": (moments.keys, moments.queries), "value": (moments.values, moments.value_readers)}
    for site, form in forms.items():
        if site in stored:
            mixing = torch.from_numpy(hadamard_transform(config.head_dim, seed).without_scale().matrix())
            if form == "identity":
                factors[site] = Factors("identity")
            elif form in ("hadamard", "rotation"):
                factors[site] = Factors("rotation", None, mixing[None].expand(config.num_key_value_heads, -1, -1))
            else:
                factors[site] = Factors("affine", None, head_transforms(*stored[site], mixing.to(moments.keys)))
        elif site == "attn_out":
            heads = config.num_attention_heads
            left = torch.from_numpy(hadamard_transform(heads, seed).without_scale().matrix())
            factors[site] = Factors("identity") if form == "identity" or heads == 1 else Factors("rotation", left=left)
        else:
            factors[site] = closed_form(form, moments.inputs[site], moments.weights[site], seed)
    # As they will be stored: what is folded must be the inverse of what runs.
    return {
        site: Factors(each.kind, *(None if p is None else p.float() for p in (each.scale, each.right, each.left)))
        for site, each in factors.items()
    }


@dataclasses.dataclass
class _SiteRounding:
    """Rounds the linears of one site to what they will really see there."""

    block: Block
    folded: Block
    streams: Streams
    outputs: Tensor
    angles: Angles
    hooks: LowBitHooks
    reading: Factors
    site: Site

    def run(self, scheme: Scheme, rounding: str) -> tuple[float, list[QuantizedWeight], dict[str, float]]:
        """Return the clip, the codes of the site's linears, and the evidence."""
        form = scheme.linear
        weights = [self.folded.weight(module) for module in SITE_MODULES[self.site]]
        weight = torch.cat(weights)
        self.hooks.stop = self.site
        first = next(iter(self._inputs(held_out=False)))
        clip = search_clip(first.seen[:_CLIP_ROWS], weight, form, first.weights[:_CLIP_ROWS])
        n = weight.shape[1]
        hessian = torch.zeros(n, n, dtype=torch.float64, device=weight.device)
        cross = torch.zeros_like(hessian)
        for rows in self._inputs(held_out=False):
            rounded = round_activation(rows.seen, form.activation_bits, clip)
            weighted = rounded * rows.weights[:, None]
            hessian += (weighted.T @ rounded).double()
            cross += (rows.target.T @ weighted).double()
        held = [
            (round_activation(rows.seen, form.activation_bits, clip), rows.target @ weight.T, rows.weights)
            for rows in self._inputs(held_out=True)
        ]

        def error(candidate: Tensor) -> float:
            total = scale = 0.0
            for x, y, token_weights in held:
                total += float((token_weights[:, None] * (x @ candidate.T - y).square()).sum())
                scale += float((token_weights[:, None] * y.square()).sum())
            return total / max(scale, 1e-30)

        evidence = {"clip": clip, "error_before_rounding": error(weight)}
        if rounding == "nearest":
            best = weight
        else:
            tried = {0.0: (evidence["error_before_rounding"], weight)}
            for ridge in _RIDGES:
                candidate = compensate(weight, hessian, cross, ridge).float()
                tried[ridge] = (error(candidate), candidate)
            ridge = min(tried, key=lambda r: tried[r][0])
            evidence |= {"ridge": ridge, "error_compensated": tried[ridge][0]}
            best = tried[ridge][1]
        quantize = gptq if rounding == "gptq" else None
        whole = gptq(best, hessian, form) if quantize else quantize_weight(best, form)
        evidence["error"] = error(dequantize_weight(whole))
        parts, start = [], 0
        for each in weights:
            rows = slice(start, start + len(each))
            parts.append(dataclasses.replace(whole, codes=whole.codes[rows], scale=whole.scale[:, rows].contiguous()))
            start += len(each)
        return clip, parts, evidence

    def _inputs(self, held_out: bool) -> "Iterator[_Rows]":
        for part in self.streams.batches(held_out):
            target = _run_to_stop(self.block, _Stopping(self.block, self.site), self.streams.target[part], self.angles)
            seen = _run_to_stop(self.block, self.hooks, self.streams.seen[part], self.angles)
            if self.site in RESIDUAL_SITES:
                weights = residual_weights(self.outputs[part])
            else:
                weights = torch.ones(seen.shape[0] * seen.shape[1], device=seen.device)
            yield _Rows(self.reading.apply(target).flatten(0, -2), seen.flatten(0, -2), weights)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What comes to a site, [tokens, n]: in the float model, transformed, and in the quantised one; token weights."""

    target: Tensor
    seen: Tensor
    weights: Tensor


class _Stopping(FloatHooks):
    def __init__(self, block: Block, site: Site) -> None:
        super().__init__(block)
        self._site = site

    def site(self, site: Site, x: Tensor) -> Tensor:
        if site == self._site:
            raise Reached(x)
        return x


def _run_to_stop(block: Block, hooks: FloatHooks | LowBitHooks, x: Tensor, angles: Angles) -> Tensor:
    try:
        run_block(block.config, hooks, x, angles)
    except Reached as reached:
        return reached.x
    raise AssertionError("the run did not reach its site")
