"""Measure what every form costs in accuracy: the error of a block's output with one site of it low-bit."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
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
from planish.compiler.learn.rounding.clips import Heads, read_heads, search_clip, search_kv_clip
from planish.compiler.learn.streams import Sequences, Streams
from planish.compiler.learn.transforms.candidates import Form
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.fold import reading_factors
from planish.compiler.learn.transforms.site_factors import closed_form_factors
from planish.compiler.learn.transforms.site_moments import gather_moments, residual_weights
from planish.compiler.progress import Progress
from planish.compiler.quantize.arithmetic import QuantizedWeight, dequantize_weight, quantize_weight
from planish.compiler.select.float_blocks import visit_float_blocks
from planish.compiler.select.forms import MEASURED_FORMS, form_of, online_flops
from planish.compiler.select.rho import rho_of
from planish.passes.scheme import FLOAT_BITS, Scheme
from planish.passes.transforms import SITES, Site

__all__ = ["FormErrors", "measure_forms"]

#: Rows on which clips are searched, and sequences for those of the cache: fewer than flattening takes, for many forms.
_CLIP_ROWS, _CLIP_SEQUENCES = 256, 1


@dataclasses.dataclass(frozen=True)
class FormErrors:
    """What was measured at one block.

    Attributes:
        errors: by site and form, the mean over held-out tokens of ||y' - y||^2 / ||y||^2, where y is the block's
            float output and y' that with only this site low-bit: its input and weights, or the keys. At attn_out it
            is that behind the value map of least error; at `value`, what low-bit values and their map add to that.
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
    measured = _MeasuredBlock(block, streams, outputs, angles, scheme)
    for site in ("attn_in", "ffn_in", "ffn_out", "key"):
        measured.keep(site, measured.errors(measured.candidates(site, {})))
    # What attn_out rounds has gone through the value map, and o_proj reads it through the inverse: a map that does
    # nothing for values, as where the cache is in floating point, may do much for them.
    mixing = measured.factors("attn_out", form_of("attn_out", "affine"))
    pairs = measured.candidates("value", {"attn_out": mixing}, ("attn_out",))
    together = measured.errors(pairs)
    best = min(together, key=lambda form: together[form])
    behind = measured.errors(measured.candidates("attn_out", {"value": pairs[best].factors["value"]}))
    measured.keep("attn_out", behind)
    measured.keep("value", {form: error - behind[form_of("attn_out", "affine")] for form, error in together.items()})
    return measured.found


class _MeasuredBlock:
    """A block, what its transforms are fitted to, and what has been measured of them."""

    def __init__(self, block: Block, streams: Streams, outputs: Sequences, angles: Angles, scheme: Scheme) -> None:
        self._block, self._streams, self._outputs = block, streams, outputs
        self._angles, self._scheme = angles, scheme
        self._moments = gather_moments(block, (streams.target[part] for part in streams.batches()), angles)
        sample, first = _Sampling(block), next(iter(streams.batches()))
        run_block(block.config, sample, streams.target[first], angles)
        self._inputs = sample.seen
        self._token_weights = residual_weights(outputs[first])
        self._heads = read_heads(block, streams.target[first][:_CLIP_SEQUENCES], angles)
        self.found = FormErrors(
            {site: {} for site in SITES}, {site: {} for site in SITES}, {site: {} for site in SITES}
        )

    def keep(self, site: Site, errors: Mapping[Form, float]) -> None:
        """Keep the errors of the forms of a site."""
        for form in MEASURED_FORMS[site]:
            error = errors.get(form, math.inf)
            # A difference of two infinities is none.
            self.found.errors[site][form] = error if math.isfinite(error) else math.inf

    def factors(self, site: Site, form: Form) -> Factors:
        """Return the transform of a site; raises LinAlgError or ValueError where what flows there has no such form."""
        return closed_form_factors(self._block, self._moments, {site: form}, seed=0)[site]

    def candidates(
        self, site: Site, beside: Mapping[Site, Factors], low: Sequence[Site] = ()
    ) -> dict[Form, "_LowSites"]:
        """Return by form the block with `site` and those in `low` rounded, and transforms at it and those `beside`."""
        made: dict[Form, _LowSites] = {}
        for form in MEASURED_FORMS[site]:
            try:
                factors = self.factors(site, form)
                width = self._inputs[site].shape[-1] if site in self._inputs else self._block.config.kv_size
                self.found.flops[site][form] = online_flops(site, factors.stored(width), self._block.config)
            except (LinAlgError, ValueError):
                # What flows there has no such form: it stays out of the choice.
                self.found.flops[site][form] = 0
                continue
            made[form] = self._low_bit({site: factors, **beside}, (site, *low))
            if site in SITE_MODULES and form in (form_of(site, "rotation"), form_of(site, "affine")):
                self.found.rho[site][form] = rho_of(factors, self._moments.inputs[site], self._moments.weights[site])
        return made

    def _low_bit(self, factors: Mapping[Site, Factors], low: Sequence[Site]) -> "_LowSites":
        hooks = _LowSites(self._block, factors, self._scheme)
        for site in low:
            if site in SITE_MODULES:
                rows = self._inputs[site].flatten(0, -2)[:_CLIP_ROWS]
                hooks.round_linears(site, rows, self._token_weights[:_CLIP_ROWS])
            else:
                sequences, _, length, _ = self._heads.key.shape
                hooks.round_cache(site, self._heads, self._token_weights[: sequences * length])
        return hooks

    def errors(self, candidates: Mapping[Form, "_LowSites"]) -> dict[Form, float]:
        """Return the error of every form; what lies in front of the low-bit sites is run once for all of them."""
        config, exact, order = self._block.config, FloatHooks(self._block), list(SITE_MODULES)
        place = min(hooks.place for hooks in candidates.values())
        lost, tokens = dict.fromkeys(candidates, 0.0), 0
        for part in self._streams.batches(held_out=True):
            y, flow = self._outputs[part], enter_block(config, exact, self._streams.target[part])
            for before in order[:place]:
                flow = run_site(config, exact, before, flow, self._angles)
            for form, hooks in candidates.items():
                low = flow
                for behind in order[place:]:
                    low = run_site(config, hooks, behind, low, self._angles)
                error = (low.residual - y).square().sum(-1) / y.square().sum(-1).clamp_min(1e-12)
                lost[form] += float(error.sum())
            tokens += y.shape[0] * y.shape[1]
        return {form: each / tokens if math.isfinite(each) else math.inf for form, each in lost.items()}


class _Sampling(FloatHooks):
    """Keeps what comes to the sites of linears."""

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.seen: dict[Site, Tensor] = {}

    def site(self, site: Site, x: Tensor) -> Tensor:
        """Keep `x`."""
        self.seen[site] = x
        return x


class _LowSites(FloatHooks):
    """The float block with some sites on the grids of a scheme, weights rounded to nearest, and transforms at some."""

    def __init__(self, block: Block, factors: Mapping[Site, Factors], scheme: Scheme) -> None:
        super().__init__(block)
        self.factors = factors
        self._scheme = scheme
        # As codes: the forms of a site wait for one another.
        self._weights: dict[str, QuantizedWeight] = {}
        self._clips: dict[Site, float] = {}

    @property
    def place(self) -> int:
        """The index of the first site of linears that is not as the checkpoint has it."""
        # Keys and values are made of what comes to attn_in.
        return min(list(SITE_MODULES).index(site if site in SITE_MODULES else "attn_in") for site in self._clips)

    def round_linears(self, site: Site, rows: Tensor, token_weights: Tensor) -> None:
        """Round the linears of a site, and find its clip on `rows` [tokens, n]."""
        form, factors = self._scheme.at(site), reading_factors(self._block, self.factors, site)
        for module in SITE_MODULES[site]:
            mapped = factors.apply_to_weight(self._block.weight(module).double()).float()
            self._weights[module] = quantize_weight(mapped, form)
        stacked = torch.cat([dequantize_weight(self._weights[module]) for module in SITE_MODULES[site]])
        self._clips[site] = search_clip(factors.apply(rows), stacked, form, token_weights)

    def round_cache(self, site: Site, heads: Heads, token_weights: Tensor) -> None:
        """Round keys or values, and find the clip on those of the float block."""
        output = self._block.weight("self_attn.o_proj")
        self._clips[site] = search_kv_clip(site, self.factors[site], self._bits(site), heads, output, token_weights)

    def site(self, site: Site, x: Tensor) -> Tensor:
        """Transform and round at a site that is low-bit."""
        if site not in self._clips:
            return x
        mapped = reading_factors(self._block, self.factors, site).apply(x)
        return round_activation(mapped, self._scheme.at(site).activation_bits, self._clips[site])

    def linear(self, module: str, x: Tensor) -> Tensor:
        """Return the output of a linear, rounded or not."""
        if module not in self._weights:
            return super().linear(module, x)
        weight = dequantize_weight(self._weights[module])
        return torch.nn.functional.linear(x, weight, self._block.tensors.get(f"{module}.bias"))

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Round keys or values that are low-bit, in the space of their map and back."""
        return query, self._stored("key", key), self._stored("value", value)

    def _stored(self, site: Site, x: Tensor) -> Tensor:
        if site not in self._clips or self._bits(site) == FLOAT_BITS:
            return x
        return round_mapped(x, self.factors[site].right, self._bits(site), self._clips[site])

    def _bits(self, site: Site) -> int:
        return self._scheme.key_bits if site == "key" else self._scheme.value_bits
