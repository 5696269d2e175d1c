"""Channel scales learned in front of a rotation, within a trust region around one in closed form.

s = s0 exp(u) with |u| <= log 4 and mean(u) = 0, because a factor common to all channels changes nothing. Roundings pass
the gradient straight through; it also reaches u through the scales of tokens and of weight rows, which alone tell it
how large the roundings are.
"""

import dataclasses
import math

import torch
from torch import Tensor

from planish.compiler.learn.smooth.error import Tokens, output_errors, summed_up
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.quantize.arithmetic import fit_scale
from planish.passes.scheme import LinearFormat
from planish.plugins.ops.quantize_activation import SMALLEST_SCALE

__all__ = ["Learning", "learn_scale", "straight_through_errors", "weight_shares"]

#: Steps between looks at the held-out tokens.
_LOOK = 50
#: Steps between fits of the weight scales, as shares of the largest magnitude of their rows.
_REFIT = 20


@dataclasses.dataclass(frozen=True)
class Learning:
    """How channel scales are learned.

    Attributes:
        steps: of Adam; none leaves the closed forms as they are.
        tokens: drawn at each step.
        rate: of learning, at the start; it falls to 0 along a cosine.
        bound: of |u|.
    """

    steps: int = 200
    tokens: int = 256
    rate: float = 2e-2
    bound: float = math.log(4)


def learn_scale(
    start: Tensor,
    train: Tokens,
    held_out: Tokens,
    weight: Tensor,
    rotation: Factors,
    form: LinearFormat,
    *,
    seed: int,
    learning: Learning,
) -> Tensor:
    """Return the scale of lowest weighted error on the held-out tokens among `start` and those seen on the way.

    Tokens are drawn half by weight and half by their share of the error at the start, and count accordingly less: a few
    massive tokens may carry almost all of it, and a fair draw would rarely meet them.

    Args:
        start: float32 [n].
        train: what is learned from.
        held_out: what decides.
        weight: W, float32 [out, n].
        rotation: what follows the scale.
        form: how the two sides are rounded.
        seed: of the draw.
        learning: how.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    errors = train.weights * output_errors(train, weight, start, rotation, form)
    if not float(errors.sum()) > 0:
        return start
    share = train.weights / train.weights.sum()
    chance = (share + errors / errors.sum()) / 2
    counts = share / chance / float((share * errors / train.weights.clamp_min(1e-30)).sum())

    def held_out_error(scale: Tensor) -> float:
        return summed_up(output_errors(held_out, weight, scale, rotation, form), held_out).weighted

    best, best_error = start, held_out_error(start)
    u = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([u], betas=(0.9, 0.99))
    for step in range(learning.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning.rate * (1 + math.cos(math.pi * step / learning.steps)) / 2
        if step % _REFIT == 0:
            shares = weight_shares(weight, (start * u.exp()).detach(), rotation, form)
        drawn = torch.multinomial(chance, learning.tokens, replacement=True, generator=generator)
        with torch.enable_grad():
            scale = start * u.exp()
            here = straight_through_errors(train.x[drawn], train.y[drawn], weight, scale, rotation, form, shares)
            optimizer.zero_grad()
            (here * counts[drawn]).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        _project(u, learning.bound)
        if (step + 1) % _LOOK == 0 or step + 1 == learning.steps:
            scale = (start * u.exp()).detach()
            error = held_out_error(scale)
            if error < best_error:
                best, best_error = scale, error
    return best


def straight_through_errors(
    x: Tensor, y: Tensor, weight: Tensor, scale: Tensor, rotation: Factors, form: LinearFormat, shares: Tensor
) -> Tensor:
    """Return the squared output error of each token, float [tokens], differentiable in `scale`.

    Args:
        x: float [tokens, n].
        y: float outputs, [tokens, out].
        weight: W, float [out, n].
        scale: float [n].
        rotation: what follows the scale.
        form: how the two sides are rounded.
        shares: scales of the weight as shares of those that just span the largest magnitudes, as `weight_shares` gives
            them.
    """
    rows = _scaled_rows(rotation.apply_to_weight(weight / scale), form)
    spans = _spans(rows, form.weight_bits) * shares
    rounded = _round(rows, torch.where(spans > 0, spans, 1.0), form.weight_bits)
    rounded = rounded.reshape(len(weight), -1)[:, : weight.shape[1]]
    seen = rotation.apply(x * scale)
    if not form.weight_only:
        spans = _spans(seen, form.activation_bits) * form.clip
        seen = _round(seen, spans.clamp_min(SMALLEST_SCALE), form.activation_bits)
    return (seen @ rounded.T - y).square().sum(1)


def weight_shares(weight: Tensor, scale: Tensor, rotation: Factors, form: LinearFormat) -> Tensor:
    """Return the scale of least squared error of each row and group, over the one that spans it: float32 [rows, 1]."""
    rows = _scaled_rows(rotation.apply_to_weight(weight / scale), form)
    spans = _spans(rows, form.weight_bits)
    return torch.where(spans > 0, fit_scale(rows.float(), form) / spans, 1.0)


def _scaled_rows(weight: Tensor, form: LinearFormat) -> Tensor:
    """Return the rows of a weight [out, n] that have one scale each; the last group is filled with zeros."""
    group = form.group or weight.shape[1]
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).reshape(-1, group)


def _spans(rows: Tensor, bits: int) -> Tensor:
    """Return the scale of each row that just spans its largest magnitude, [rows, 1]."""
    return rows.abs().amax(1, keepdim=True) / ((1 << bits - 1) - 1)


def _round(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return rows on their grids, the rounding passed straight through where nothing is cut off."""
    zero = 1 << bits - 1
    steps = rows / scale
    nearest = steps.detach().round()
    kept = nearest.clamp(-zero, zero - 1)
    # Cut off by the code, not by the float: the largest magnitude may be an ulp beyond the grid and still belong to it.
    return torch.where(nearest == kept, steps + (kept - steps).detach(), kept) * scale


@torch.no_grad()
def _project(u: Tensor, bound: float) -> None:
    """Bring u close to its nearest neighbour with |u| <= bound and mean 0, by projecting on either in turn."""
    for _ in range(4):
        u.sub_(u.mean()).clamp_(-bound, bound)
