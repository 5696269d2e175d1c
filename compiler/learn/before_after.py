"""What flattening did to a block: activations and rounding errors at every site before it and after."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planish.compiler.learn.block import SITE_MODULES, Angles, Block, run_block
from planish.compiler.learn.low_bit import LowBitHooks, round_activation, round_cached, round_mapped
from planish.compiler.learn.site_statistics import WatchedFloat, WatchedLowBit
from planish.compiler.learn.streams import Sequences, Streams
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.site_moments import RESIDUAL_SITES, residual_weights
from planish.compiler.quantize.arithmetic import dequantize_weight, quantize_weight
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Site

__all__ = ["BeforeAfter", "compare_block"]


@dataclasses.dataclass(frozen=True)
class BeforeAfter:
    """What was found on held-out sequences.

    Attributes:
        evidence: by site, what `SiteStatistics.numbers` gives, with `_before` or `_after` behind the names;
            `error_unflattened`, the relative error with nothing flattened and all rounded to nearest; and of `key` and
            `value`, `error`, that of the flattened heads, and `clip`.
        profiles: by site, `SiteStatistics.profile` before and after, float32 [2, 4, channels].
    """

    evidence: dict[Site, dict[str, float]]
    profiles: dict[Site, npt.NDArray[np.float32]]


@torch.no_grad()
def compare_block(
    block: Block,
    hooks: LowBitHooks,
    factors: Mapping[Site, Factors],
    streams: Streams,
    outputs: Sequences,
    angles: Angles,
    scheme: Scheme,
) -> BeforeAfter:
    """Run `block`, and the same flattened, as `hooks` has it, over the held-out sequences that come to it.

    Args:
        block: as the checkpoint has it.
        hooks: of the flattened block, all of its linears rounded.
        factors: that it was flattened by.
        streams: the block's inputs; those of the model quantised so far are taken.
        outputs: of the float block, which give tokens their weights.
        angles: of the positions.
        scheme: gives the grids.

    Raises:
        CalibrationError: if an activation is not finite.
    """
    unflattened = _Unflattened(block, factors, hooks.clips, scheme)
    flattened = WatchedLowBit(block, hooks)
    for part in streams.batches(held_out=True, size=1):
        unflattened.weigh(outputs[part])
        for each in (unflattened, flattened):
            run_block(block.config, each, streams.seen[part], angles)
    evidence = {
        site: {
            **{f"{name}_before": number for name, number in unflattened.statistics[site].numbers().items()},
            **{f"{name}_after": number for name, number in flattened.statistics[site].numbers().items()},
            **unflattened.rounding(site),
        }
        for site in SITES
    }
    profiles = {
        site: np.stack([unflattened.statistics[site].profile(), flattened.statistics[site].profile()]) for site in SITES
    }
    return BeforeAfter(evidence, profiles)


class _Unflattened(WatchedFloat):
    """The float block, with the errors that rounding to nearest would make at each site."""

    def __init__(
        self, block: Block, factors: Mapping[Site, Factors], clips: Mapping[Site, float], scheme: Scheme
    ) -> None:
        super().__init__(block)
        self._scheme, self._clips = scheme, clips
        self._maps = {site: factors[site].right if site in factors else None for site in ("key", "value")}
        # Codes, and no floats: those of all sites would be a second block in memory.
        self._codes = {site: quantize_weight(self._weight(site), scheme.at(site)) for site in SITE_MODULES}
        self._token_weights = torch.ones(0)
        self._lost: dict[str, float] = {}
        self._norm: dict[str, float] = {}

    def weigh(self, output: Tensor) -> None:
        """Take the float output of the sequences that come next."""
        self._token_weights = residual_weights(output)

    def site(self, site: Site, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        rounded = round_activation(rows, self._scheme.at(site).activation_bits)
        weights = self._token_weights if site in RESIDUAL_SITES else torch.ones(len(rows), device=rows.device)
        made = rounded @ dequantize_weight(self._codes[site]).T
        self._add(site, made, rows @ self._weight(site).T, weights[:, None])
        return super().site(site, x)

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._scheme.quantizes_cache:
            bits = {"key": self._scheme.key_bits, "value": self._scheme.value_bits}
            sites: tuple[tuple[Site, Tensor], ...] = (("key", key), ("value", value))
            for site, heads in sites:
                mapped = round_mapped(heads, self._maps[site], bits[site], self._clips.get(site, 1.0))
                self._add(site, round_cached(heads, bits[site]), heads)
                self._add(f"flattened {site}", mapped, heads)
        return super().heads(query, key, value)

    def rounding(self, site: Site) -> dict[str, float]:
        """Return the relative errors at `site`, and of cached heads the clip; nothing where nothing is rounded."""
        names = {"error_unflattened": site, "error": f"flattened {site}"}
        kept = {error: name for error, name in names.items() if name in self._lost}
        errors = {error: self._lost[name] / max(self._norm[name], 1e-30) for error, name in kept.items()}
        return {"clip": self._clips.get(site, 1.0), **errors} if "error" in errors else errors

    def _weight(self, site: Site) -> Tensor:
        """Return the linears of a site, stacked."""
        return torch.cat([self._block.weight(module) for module in SITE_MODULES[site]])

    def _add(self, name: str, made: Tensor, exact: Tensor, weights: Tensor | float = 1.0) -> None:
        lost, norm = ((weights * each.square()).sum() for each in (made - exact, exact))
        self._lost[name] = self._lost.get(name, 0.0) + float(lost)
        self._norm[name] = self._norm.get(name, 0.0) + float(norm)
