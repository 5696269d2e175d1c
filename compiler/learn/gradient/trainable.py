"""A decoder block on the grids of a scheme whose transforms, clips and weight scales are parameters.

Roundings pass the gradient straight through where the code is not cut off, and give the rest to the scale of the grid,
as LSQ does (arXiv 1902.08153); scales of tokens and weight rows are functions of what they scale, so that the gradient
reaches the transforms through them too. That is FlatQuant's loop (arXiv 2410.09426).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from planish.compiler.learn.block import MODULES, SITE_MODULES, Block, formats_of
from planish.compiler.learn.low_bit import LowBitHooks
from planish.compiler.learn.rounding.clip_parameter import clip_of, clip_parameter
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.fold import fold_block
from planish.compiler.quantize.arithmetic import fit_scale
from planish.passes.scheme import FLOAT_BITS, LinearFormat, Scheme
from planish.passes.transforms import Site
from planish.plugins.ops.append_kv import SMALLEST_KV_SCALE
from planish.plugins.ops.quantize_activation import SMALLEST_SCALE

__all__ = ["Trainable", "TrainableHooks", "round_activation_through", "round_cached_through", "round_to_grid"]


class Trainable:
    """The parameters of one block, starting at given transforms and clips.

    A rotation Q becomes Q Cayley(A), an affine factor P becomes P (I + A), with A = 0 at the start: A lives in the
    basis in which values are rounded, where all channels are of a size, and so one learning rate fits them. A channel
    scale keeps its sign. Clips are made of logits. A weight scale is that of least squared error at the last
    `fit_weight_scales`, moved along with the largest magnitude of its row, times the exponential of a parameter.
    """

    def __init__(
        self, block: Block, factors: Mapping[Site, Factors], clips: Mapping[Site, float], scheme: Scheme
    ) -> None:
        """Take the float block, and where to start: factors and clips of all sites."""
        self._block, self._scheme, self._formats = block, scheme, formats_of(scheme)
        self._maps = {site: _Map(each) for site, each in factors.items()}
        device = block.weight(MODULES[0]).device
        self._clip_logits: dict[Site, Tensor] = {}
        self._weight_logs: dict[str, Tensor] = {}
        self._fitted: dict[str, tuple[Tensor, Tensor]] = {}
        bits: dict[Site, int] = {site: scheme.at(site).activation_bits for site in SITE_MODULES}
        bits |= {"key": scheme.key_bits, "value": scheme.value_bits}
        for site in bits:
            if bits[site] != FLOAT_BITS:
                self._clip_logits[site] = clip_parameter(clips.get(site, 1.0), device)
        if not scheme.linear.is_float:
            for module, form in self._formats.items():
                rows, k = block.weight(module).shape
                logs = torch.zeros(rows * form.groups(k), 1, device=device)
                self._weight_logs[module] = logs.requires_grad_()
            self.fit_weight_scales()

    def transform_parameters(self) -> list[Tensor]:
        """Return what transforms are made of, and the logarithms of what multiplies weight scales."""
        return [part for each in self._maps.values() for part in each.parameters()] + list(self._weight_logs.values())

    def clip_parameters(self) -> list[Tensor]:
        """Return the logits of the clips."""
        return list(self._clip_logits.values())

    def factors(self) -> dict[Site, Factors]:
        """Return the transforms, float32, differentiable."""
        return {site: each.factors() for site, each in self._maps.items()}

    def clips(self) -> dict[Site, float]:
        """Return the clips of the sites that have a grid."""
        return {site: float(clip_of(logit.detach())) for site, logit in self._clip_logits.items()}

    def weight_scale_multipliers(self) -> dict[str, Tensor]:
        """Return by module what multiplies the scales of least squared error, float32 [groups, out]."""
        found = {}
        for module, logs in self._weight_logs.items():
            rows = len(self._block.weight(module))
            found[module] = logs.detach().exp().reshape(rows, -1).T.contiguous()
        return found

    @torch.no_grad()
    def fit_weight_scales(self) -> None:
        """Fit the weight scales to the transforms as they are."""
        if self._scheme.linear.is_float:
            return
        folded = fold_block(self._block, self.factors())
        for module, form in self._formats.items():
            rows = _rows(folded.weight(module), form)
            self._fitted[module] = fit_scale(rows, form), rows.abs().amax(1, keepdim=True)

    def hooks(self) -> "TrainableHooks":
        """Return hooks that run the block with the parameters as they are, differentiable in them."""
        factors = self.factors()
        folded = fold_block(self._block, factors)
        hooks = TrainableHooks(folded, factors, self._scheme, self._clip_logits)
        for module in MODULES:
            weight = folded.weight(module)
            hooks.weights[module] = self._rounded(module, weight) if self._fitted else weight
        return hooks

    def _rounded(self, module: str, weight: Tensor) -> Tensor:
        form = self._formats[module]
        rows = _rows(weight, form)
        scale, largest = self._fitted[module]
        # The quotient first: it is exactly 1 where nothing moved since the fit.
        scale = scale * (rows.abs().amax(1, keepdim=True) / largest.clamp_min(1e-30)) * self._weight_logs[module].exp()
        if form.group is not None:
            scale = _to_half(scale)
        zero = 1 << form.weight_bits - 1
        rounded = round_to_grid(rows, torch.where(scale > 0, scale, 1.0), -zero, zero - 1)
        return rounded.reshape(len(weight), -1)[:, : weight.shape[1]]


def _rows(weight: Tensor, form: LinearFormat) -> Tensor:
    """Return the rows that have one scale each, [out * groups, group]; the last group is filled with zeros."""
    group = form.group or weight.shape[1]
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).reshape(-1, group)


class TrainableHooks(LowBitHooks):
    """Hooks of a block that is being learned: `LowBitHooks` that round nothing, with differentiable rounding behind."""

    def __init__(
        self, folded: Block, factors: dict[Site, Factors], scheme: Scheme, clip_logits: Mapping[Site, Tensor]
    ) -> None:
        """Take what `LowBitHooks` takes, and the logits of the clips."""
        linear = dataclasses.replace(scheme.linear, activation_bits=FLOAT_BITS)
        unrounded = Scheme(linear, FLOAT_BITS, FLOAT_BITS, scheme.lm_head)
        super().__init__(folded, factors, unrounded)
        self._grids = scheme
        self._clip_logits = clip_logits

    def site(self, site: Site, x: Tensor) -> Tensor:
        """Return the transformed input on its grid."""
        x = super().site(site, x)
        if site not in self._clip_logits:
            return x
        return round_activation_through(x, self._grids.at(site).activation_bits, self._clip(site))

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, and keys and values as the cache gives them back."""
        query, key, value = super().heads(query, key, value)
        if "key" in self._clip_logits:
            key = round_cached_through(key, self._grids.key_bits, self._clip("key"))
        if "value" in self._clip_logits:
            value = round_cached_through(value, self._grids.value_bits, self._clip("value"))
        return query, key, value

    def _clip(self, site: Site) -> Tensor:
        return clip_of(self._clip_logits[site])


class _Map:
    """The parameters of one site's factors."""

    def __init__(self, start: Factors) -> None:
        self._start = start
        self._log_scale = None if start.scale is None else start.scale.abs().log().requires_grad_()
        self._right = None if start.right is None else torch.zeros_like(start.right.contiguous(), requires_grad=True)
        self._left = None if start.left is None else torch.zeros_like(start.left, requires_grad=True)

    def parameters(self) -> Iterator[Tensor]:
        yield from (each for each in (self._log_scale, self._right, self._left) if each is not None)

    def factors(self) -> Factors:
        start = self._start
        scale = None
        if self._log_scale is not None and start.scale is not None:
            scale = start.scale.sign() * self._log_scale.exp()
        return dataclasses.replace(
            start, scale=scale, right=self._moved(start.right, self._right), left=self._moved(start.left, self._left)
        )

    def _moved(self, start: Tensor | None, by: Tensor | None) -> Tensor | None:
        """Return a factor, from products in float64: those of float32 may be rounded to bfloat16."""
        if start is None or by is None:
            return start
        A = by.double()
        turn = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        if self._start.kind == "rotation":
            skew = (A.tril(-1) - A.tril(-1).mT) / 2
            turn = torch.linalg.solve(turn + skew, turn - skew)
        else:
            turn = turn + A
        return (start.double() @ turn).float()


class _RoundToGrid(torch.autograd.Function):
    """x, scale -> clamp(round(x / scale)) scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        steps = x / scale
        nearest = _nearest(steps)
        kept = nearest.clamp(low, high)
        # Cut off by the code, not by the float: the largest magnitude may be an ulp beyond the grid and belong to it.
        inside = nearest == kept
        ctx.save_for_backward(inside, torch.where(inside, kept - steps, kept))
        ctx.scale_shape = scale.shape
        return kept * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        inside, slope = ctx.saved_tensors
        return gradient * inside, (gradient * slope).sum_to_size(ctx.scale_shape), None, None


def round_to_grid(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Return `x` on the grid of codes `low` to `high` of `scale`, which broadcasts over it.

    The gradient in x is that of the identity where the code is not cut off, else 0; in the scale it is that of
    code * scale with x / scale + constant for the code, where the code is not cut off.
    """
    rounded: Tensor = _RoundToGrid.apply(x, scale, low, high)  # type: ignore[no-untyped-call]
    return rounded


def round_activation_through(x: Tensor, bits: int, clip: Tensor) -> Tensor:
    """Return `x` [..., n] on the grid of `quantize_activation`, differentiable in it and in the clip [] alike."""
    zero = 1 << (bits - 1)
    scale = (x.abs().amax(-1, keepdim=True) * (clip / (zero - 1))).clamp_min(SMALLEST_SCALE)
    return round_to_grid(x, scale, -zero, zero - 1)


def round_cached_through(x: Tensor, bits: int, clip: Tensor) -> Tensor:
    """Return keys or values [..., d] as `quantize_kv` stores them, differentiable in them and in the clip [] alike."""
    low = x.amin(-1, keepdim=True)
    span = x.amax(-1, keepdim=True) - low
    step = (span / ((2**bits - 1) / clip)).clamp_min(SMALLEST_KV_SCALE)
    scale, zero = _to_half(step), _to_half(low + span * ((1 - clip) / 2))
    return round_to_grid(x - zero, scale, 0, 2**bits - 1) + zero


def _to_half(x: Tensor) -> Tensor:
    """Return `x` rounded to float16, the gradient passed straight through; the sum is exact."""
    return x + (x.detach().half().float() - x.detach())


def _nearest(steps: Tensor) -> Tensor:
    return steps.round()
