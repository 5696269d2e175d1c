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
from planish.compiler.quantize.arithmetic import QuantizedWeight, dequantize_weight
from planish.passes.scheme import LinearFormat, Scheme
from planish.passes.transforms import Site

__all__ = ["FOLDS", "Flattened", "Streams", "closed_form_factors", "flatten_block"]

#: Ridges tried for the least-squares step before rounding, as shares of the Hessian's mean diagonal.
_RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0)
#: Parts of the sequences to fit to. What comes out of a block for one part is computed with weights fitted to the others:
#: weights fitted to the very tokens they are run on would show later blocks half the error they will really see.
FOLDS = 2
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

    def batches(self, fold: int | None = None, *, held_out: bool = False, size: int = 4) -> Iterator[slice]:
        """Yield which sequences to take together: of all to fit to, of one of `FOLDS` folds, or of those held out."""
        border = len(self.target) - self.held_out
        first, last = (border, len(self.target)) if held_out else (0, border)
        if fold is not None:
            first, last = border * fold // FOLDS, border * (fold + 1) // FOLDS
        yield from (slice(start, min(start + size, last)) for start in range(first, last, size))


@dataclasses.dataclass(frozen=True)
class Flattened:
    """One flattened block.

    Attributes:
        factors: by site.
        clips: by site.
        codes: by module within the block.
        hooks: run the block as it is now.
        fold_hooks: run it with the weights fitted to all folds but one, for each of the folds.
        evidence: by site, what was measured.
    """

    factors: dict[Site, Factors]
    clips: dict[Site, float]
    codes: dict[str, QuantizedWeight]
    hooks: LowBitHooks
    fold_hooks: list[LowBitHooks]
    evidence: dict[Site, dict[str, float]]


def flatten_block(
    block: Block,
    streams: Streams,
    outputs: Tensor,
    scheme: Scheme,
    forms: dict[Site, Form],
    seed: int,
) -> Flattened:
    """Return `block` flattened for `scheme`, with the given form at every site; `outputs` are the float block's."""
    angles = Angles.of(block.config, streams.target.shape[1], streams.target.device)
    moments = gather_moments(block, (streams.seen[part] for part in streams.batches()), angles)
    factors = closed_form_factors(block, moments, forms, seed)
    folded = fold_block(block, factors)
    hooks = LowBitHooks(folded, factors, scheme)
    fold_hooks = [LowBitHooks(folded, factors, scheme) for _ in range(FOLDS)]
    codes: dict[str, QuantizedWeight] = {}
    evidence: dict[Site, dict[str, float]] = {}
    for site, modules in SITE_MODULES.items():
        fit = _SiteFit(
            block, folded, streams, outputs, angles, hooks, fold_hooks, reading_factors(block, factors, site), site
        )
        clip, rounded, evidence[site] = fit.run(scheme)
        for each_hooks, whole in zip([hooks, *fold_hooks], rounded, strict=True):
            each_hooks.clips[site] = clip
            for module, each in zip(modules, _split_rows(whole, [len(folded.weight(m)) for m in modules]), strict=True):
                each_hooks.weights[module] = dequantize_weight(each)
                if each_hooks is hooks:
                    codes[module] = each
    for each_hooks in (hooks, *fold_hooks):
        each_hooks.stop = None
    return Flattened(factors, hooks.clips, codes, hooks, fold_hooks, evidence)


def _split_rows(weight: QuantizedWeight, sizes: list[int]) -> list[QuantizedWeight]:
    return [
        dataclasses.replace(weight, codes=codes, scale=scale.contiguous())
        for codes, scale in zip(weight.codes.split(sizes), weight.scale.split(sizes, dim=1), strict=True)
    ]


def closed_form_factors(block: Block, moments: SiteMoments, forms: dict[Site, Form], seed: int) -> dict[Site, Factors]:
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
class _SiteFit:
    """Fits and rounds the linears of one site to what they will really see there."""

    block: Block
    folded: Block
    streams: Streams
    outputs: Tensor
    angles: Angles
    hooks: LowBitHooks
    fold_hooks: list[LowBitHooks]
    reading: Factors
    site: Site

    def run(self, scheme: Scheme) -> tuple[float, list[QuantizedWeight], dict[str, float]]:
        """Return the clip, the site's linears stacked and rounded (final, then without each fold), and the evidence."""
        form = scheme.linear
        weight = torch.cat([self.folded.weight(module) for module in SITE_MODULES[self.site]])
        for hooks in (self.hooks, *self.fold_hooks):
            hooks.stop = self.site
        first = next(self._inputs(0))
        clip = search_clip(first.seen[:_CLIP_ROWS], weight, form, first.weights[:_CLIP_ROWS])
        sums = [self._sums(fold, form, clip) for fold in range(FOLDS)]
        hessian, cross = sum(h for h, _ in sums), sum(c for _, c in sums)
        held = [
            (round_activation(rows.seen, form.activation_bits, clip), rows.target @ weight.T, rows.weights)
            for rows in self._inputs(None)
        ]

        def error(candidate: Tensor) -> float:
            total = scale = 0.0
            for x, y, token_weights in held:
                total += float((token_weights[:, None] * (x @ candidate.T - y).square()).sum())
                scale += float((token_weights[:, None] * y.square()).sum())
            return total / max(scale, 1e-30)

        errors = {ridge: error(compensate(weight, hessian, cross, ridge).float()) for ridge in _RIDGES}
        ridge = min(errors, key=lambda r: errors[r])
        evidence = {
            "clip": clip,
            "error_before_rounding": error(weight),
            "ridge": ridge,
            "error_compensated": errors[ridge],
        }
        rounded = [gptq(compensate(weight, hessian, cross, ridge).float(), hessian, form)]
        for fold_hessian, fold_cross in sums:
            others = hessian - fold_hessian, cross - fold_cross
            rounded.append(gptq(compensate(weight, *others, ridge).float(), others[0], form))
        evidence["error"] = error(dequantize_weight(rounded[0]))
        return clip, rounded, evidence

    def _sums(self, fold: int, form: LinearFormat, clip: float) -> tuple[Tensor, Tensor]:
        """Return Xq^T Xq and X^T Xq of a fold, float64 [n, n]."""
        n = self.folded.weight(SITE_MODULES[self.site][0]).shape[1]
        hessian, cross = torch.zeros(2, n, n, dtype=torch.float64, device=self.outputs.device)
        for rows in self._inputs(fold):
            rounded = round_activation(rows.seen, form.activation_bits, clip)
            weighted = rounded * rows.weights[:, None]
            hessian += weighted.T @ rounded
            cross += rows.target.T @ weighted
        return hessian, cross

    def _inputs(self, fold: int | None) -> "Iterator[_Rows]":
        """Yield what comes to the site in a fold, or in the sequences held out."""
        hooks = self.hooks if fold is None else self.fold_hooks[fold]
        for part in self.streams.batches(fold, held_out=fold is None):
            target = _run_to_stop(self.block, _Stopping(self.block, self.site), self.streams.target[part], self.angles)
            seen = _run_to_stop(self.block, hooks, self.streams.seen[part], self.angles)
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
