"""Measure what every form costs in accuracy: the error of a block's output with one site of it low-bit."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.learn.block import SITE_MODULES, Angles, Block, FloatHooks, enter_block, run_block, run_site
from planish.compiler.learn.low_bit import round_activation, round_mapped
from planish.compiler.learn.rounding.clips import read_heads, search_clip, search_kv_clip
from planish.compiler.learn.streams import Sequences, Streams
from planish.compiler.learn.transforms.candidates import Form
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.site_factors import closed_form_factors
from planish.compiler.learn.transforms.site_moments import gather_moments, residual_weights
from planish.compiler.progress import Progress
from planish.compiler.quantize.arithmetic import QuantizedWeight, dequantize_weight, quantize_weight
from planish.compiler.select.float_blocks import visit_float_blocks
from planish.compiler.select.forms import MEASURED_FORMS, form_of, online_flops
from planish.compiler.select.rho import rho_of
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Site

__all__ = ["FormErrors", "measure_forms"]

#: Rows on which clips are searched, and sequences for those of the cache: fewer than flattening takes, for many forms.
_CLIP_ROWS, _CLIP_SEQUENCES = 256, 1


@dataclasses.dataclass(frozen=True)
class FormErrors:
    """What was measured at one block.

    Attributes:
        errors: by site and form, the mean over held-out tokens of ||y' - y||^2 / ||y||^2, where y is the block's
            float output and y' that with only this site low-bit: its input and weights, or the keys, or the values.
            Infinite where what flows there has no such form, or rounding it gives NaN or infinity.
        flops: by site and form, what it costs online, per token.
        rho: by site of a linear and the forms that stand for the kinds there, how many times less error moments predict
            than with a rotation that has no channel scale; see `rho_of`.
    """

    errors: dict[Site, dict[Form, float]]
    flops: dict[Site, dict[Form, int]]
    rho: dict[Site, dict[Form, float]]


def measure_forms(
    checkpoint: Checkpoint,
    scheme: Scheme,
    token_ids: npt.NDArray[np.int64],
    folder: Path,
    progress: Progress,
    device: torch.device | None = None,
) -> list[FormErrors]:
    """Return the errors at every block; see `visit_float_blocks` for what is kept in `folder`.

    Transforms are fitted to all calibration sequences but the last eighth, on which errors are measured. All of it is
    computed on `device`; None is the CPU.
    """
    angles = Angles.of(checkpoint.config, token_ids.shape[1], device)

    def visit(layer: int, block: Block, streams: Streams, outputs: Sequences) -> dict[str, Any]:
        return dataclasses.asdict(_measure_block(block, streams, outputs, angles, scheme.block(layer)))

    found = visit_float_blocks(
        checkpoint,
        token_ids,
        folder,
        "forms",
        visit,
        lambda done, total: progress.step("measure transforms", done, total),
        device,
    )
    return [FormErrors(**each) for each in found]


def _measure_block(block: Block, streams: Streams, outputs: Sequences, angles: Angles, scheme: Scheme) -> FormErrors:
    moments = gather_moments(block, (streams.target[part] for part in streams.batches()), angles)
    sample = _Sampling(block)
    first = next(iter(streams.batches()))
    run_block(block.config, sample, streams.target[first], angles)
    weights = residual_weights(outputs[first])
    few, output = streams.target[first][:_CLIP_SEQUENCES], block.weight("self_attn.o_proj")
    heads, few_weights = read_heads(block, few, angles), weights[: few.shape[0] * few.shape[1]]
    result = FormErrors({site: {} for site in SITES}, {site: {} for site in SITES}, {site: {} for site in SITES})
    widths = {site: x.shape[-1] for site, x in sample.seen.items()}
    for site in SITES:
        candidates: dict[Form, _OneSite] = {}
        for form in MEASURED_FORMS[site]:
            try:
                factors = closed_form_factors(block, moments, {site: form}, seed=0)[site]
                stored = factors.stored(widths.get(site, block.config.kv_size))
            except (LinAlgError, ValueError):
                # What flows there has no such form: it stays out of the choice.
                result.errors[site][form], result.flops[site][form] = math.inf, 0
                continue
            hooks = _OneSite(block, site, factors, scheme)
            if site in SITE_MODULES:
                hooks.round_linears(sample.seen[site].flatten(0, -2)[:_CLIP_ROWS], weights[:_CLIP_ROWS])
                if form in (form_of(site, "rotation"), form_of(site, "affine")):
                    result.rho[site][form] = rho_of(factors, moments.inputs[site], moments.weights[site])
            else:
                bits = scheme.key_bits if site == "key" else scheme.value_bits
                hooks.clip = search_kv_clip(site, factors, bits, heads, output, few_weights)
            candidates[form] = hooks
            result.flops[site][form] = online_flops(site, stored, block.config)
        for form, error in _held_out_errors(block, site, candidates, streams, outputs, angles).items():
            result.errors[site][form] = error if math.isfinite(error) else math.inf
    return result


def _held_out_errors(
    block: Block,
    site: Site,
    candidates: Mapping[Form, "_OneSite"],
    streams: Streams,
    outputs: Sequences,
    angles: Angles,
) -> dict[Form, float]:
    """Return the error of every form at a site; what lies in front of the site is run once for all of them."""
    config, exact = block.config, FloatHooks(block)
    # Keys and values are made of what comes to attn_in.
    order = list(SITE_MODULES)
    place = order.index(site) if site in SITE_MODULES else order.index("attn_in")
    lost, tokens = dict.fromkeys(candidates, 0.0), 0
    for part in streams.batches(held_out=True):
        y, flow = outputs[part], enter_block(config, exact, streams.target[part])
        for before in order[:place]:
            flow = run_site(config, exact, before, flow, angles)
        for form, hooks in candidates.items():
            low = flow
            for behind in order[place:]:
                low = run_site(config, hooks, behind, low, angles)
            error = (low.residual - y).square().sum(-1) / y.square().sum(-1).clamp_min(1e-12)
            lost[form] += float(error.sum())
        tokens += y.shape[0] * y.shape[1]
    return {form: each / tokens for form, each in lost.items()}


class _Sampling(FloatHooks):
    """Keeps what comes to the sites of linears."""

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.seen: dict[Site, Tensor] = {}

    def site(self, site: Site, x: Tensor) -> Tensor:
        """Keep `x`."""
        self.seen[site] = x
        return x


class _OneSite(FloatHooks):
    """The float block with one site on the grids of a scheme, weights rounded to nearest."""

    def __init__(self, block: Block, site: Site, factors: Factors, scheme: Scheme) -> None:
        super().__init__(block)
        self._site, self._factors, self._scheme = site, factors, scheme
        # As codes: the forms of a site wait for one another.
        self._weights: dict[str, QuantizedWeight] = {}
        self.clip = 1.0

    def round_linears(self, rows: Tensor, token_weights: Tensor) -> None:
        """Round the linears of the site, and find its clip on `rows` [tokens, n]."""
        form = self._scheme.at(self._site)
        for module in SITE_MODULES[self._site]:
            mapped = self._factors.apply_to_weight(self._block.weight(module).double()).float()
            self._weights[module] = quantize_weight(mapped, form)
        stacked = torch.cat([dequantize_weight(weight) for weight in self._weights.values()])
        self.clip = search_clip(self._factors.apply(rows), stacked, form, token_weights)

    def site(self, site: Site, x: Tensor) -> Tensor:
        """Transform and round at the one site."""
        if site != self._site:
            return x
        return round_activation(self._factors.apply(x), self._scheme.at(site).activation_bits, self.clip)

    def linear(self, module: str, x: Tensor) -> Tensor:
        """Return the output of a linear, rounded or not."""
        if module not in self._weights:
            return super().linear(module, x)
        weight = dequantize_weight(self._weights[module])
        return torch.nn.functional.linear(x, weight, self._block.tensors.get(f"{module}.bias"))

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Round keys or values if they are the one site, in the space of their map and back."""
        if self._site == "key":
            key = self._stored(key, self._scheme.key_bits)
        if self._site == "value":
            value = self._stored(value, self._scheme.value_bits)
        return query, key, value

    def _stored(self, x: Tensor, bits: int) -> Tensor:
        return round_mapped(x, self._factors.right, bits, self.clip)
