"""Second moments of everything that a block multiplies, in one pass over its inputs."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from planish.compiler.errors import CalibrationError
from planish.compiler.learn.block import SITE_MODULES, Angles, Block, FloatHooks, run_block
from planish.passes.transforms import Site

__all__ = ["RESIDUAL_SITES", "SiteMoments", "gather_moments", "residual_weights"]

#: Sites whose linears write to the residual stream, where a token counts by how large its stream is.
RESIDUAL_SITES: tuple[Site, ...] = ("attn_out", "ffn_out")


@dataclasses.dataclass(frozen=True)
class SiteMoments:
    """Second moments, float64.

    Attributes:
        inputs: E[x^T x] by site of a linear, [n, n].
        weights: E[w^T w] over the rows of the linears that read it, [n, n].
        keys: E[k^T k] after RoPE by KV head, [kv_heads, d, d].
        queries: E[q^T q] after RoPE, summed over the heads that share the keys.
        values: E[v^T v].
        value_readers: W_o^T W_o of the columns that read the head, summed over the heads that share the values.
    """

    inputs: dict[Site, Tensor]
    weights: dict[Site, Tensor]
    keys: Tensor
    queries: Tensor
    values: Tensor
    value_readers: Tensor


def residual_weights(output: Tensor) -> Tensor:
    """Return the weight of every token, [tokens], of mean 1, given a block's float output [..., hidden].

    An error counts by its share of the residual stream, which the next norm divides by: without this the few tokens
    of massive activations would be the only ones that matter.
    """
    weights = 1 / output.flatten(0, -2).square().mean(-1).clamp_min(1e-12)
    return weights / weights.mean()


def gather_moments(block: Block, batches: Iterable[Tensor], angles: Angles) -> SiteMoments:
    """Run the float block over its inputs, [batch, seq, hidden] each, and return the moments.

    Raises:
        CalibrationError: if one is not finite; the message names the site.
    """
    hooks = _Recording(block)
    for x in batches:
        output = run_block(block.config, hooks, x, angles)
        hooks.add(residual_weights(output))
    for name, moment in hooks.sums.items():
        if not moment.isfinite().all():
            raise CalibrationError(f"what flows at {name} is too large for float32, or not finite")
    config = block.config
    weights = {}
    for site, modules in SITE_MODULES.items():
        stacked = torch.cat([block.weight(module) for module in modules]).double()
        weights[site] = (stacked.T @ stacked).div_(len(stacked))
    columns = torch.unflatten(block.weight("self_attn.o_proj").double(), 1, (-1, config.head_dim))
    readers = torch.einsum("ohd,ohe->hde", columns, columns)
    return SiteMoments(
        {site: hooks.sums[site].div_(hooks.tokens) for site in SITE_MODULES},
        weights,
        hooks.sums["key"],
        _over_groups(hooks.sums["query"], config.groups),
        hooks.sums["value"],
        _over_groups(readers, config.groups),
    )


class _Recording(FloatHooks):
    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0
        self._seen: dict[str, Tensor] = {}

    def site(self, site: Site, x: Tensor) -> Tensor:
        self._seen[site] = x
        return x

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._seen |= {"query": query, "key": key, "value": value}
        return query, key, value

    def add(self, token_weights: Tensor) -> None:
        """Add what the last run recorded."""
        for name, x in self._seen.items():
            if name in SITE_MODULES:
                rows = x.flatten(0, -2)
                weighted = rows * token_weights[:, None] if name in RESIDUAL_SITES else rows
                moment = weighted.T @ rows
            else:
                moment = torch.einsum("bhtd,bhte->hde", x, x)
            if name in self.sums:
                self.sums[name] += moment
            else:
                self.sums[name] = moment.double()
        self.tokens += len(token_weights)


def _over_groups(moments: Tensor, groups: int) -> Tensor:
    return torch.unflatten(moments, 0, (-1, groups)).sum(1)
