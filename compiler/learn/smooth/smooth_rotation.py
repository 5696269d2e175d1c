"""Smooth rotation of what down_proj reads: channel scales that fold into up_proj, and a Hadamard rotation behind them.

After silu(gate) * up a few channels of a few tokens are hundreds of times larger than all others. A rotation spreads
them over all channels, and smooths best what was levelled before: x is multiplied with a channel scale, the columns of
W are divided by it. Several rules give one (SmoothRot, arXiv 2506.05413; quantiles and learned scales, arXiv
2606.09927; moments, see `closed_forms`), and the one of least measured error on sequences that no rule has seen is
taken.
"""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from planish.compiler.errors import CalibrationError
from planish.compiler.learn.smooth.error import OutputError, Tokens, output_errors, summed_up
from planish.compiler.learn.smooth.learned_scales import Learning, learn_scale
from planish.compiler.learn.smooth.rules import max_rule, promising_quantile_rules
from planish.compiler.learn.transforms.closed_forms import rms_scale
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.hadamard import hadamard_transform
from planish.passes.scheme import LinearFormat
from planish.passes.transforms import Transform

__all__ = ["Candidate", "Policy", "SmoothRotation", "smooth_rotation"]

Policy = Literal["ones", "max", "quantile", "rms", "rms_learned", "quantile_learned"]

#: One sequence in so many is held out, the last ones.
_HELD_OUT = 4
#: Tokens that are squared in float64 at a time.
_CHUNK = 4096
#: Quantile rules whose error is measured, of those with the lowest predicted error.
_MEASURED = 8


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One channel scale and what it costs on held-out tokens.

    Attributes:
        policy: where it comes from.
        scale: float32 [n], of geometric mean 1.
        error: on the held-out tokens.
        alpha: exponent of the rule that it comes from, or started from; None where there is none.
        q: quantile of that rule.
    """

    policy: Policy
    scale: Tensor
    error: OutputError
    alpha: float | None = None
    q: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what is recorded of it: all but the scale."""
        return {
            "policy": self.policy,
            "alpha": self.alpha,
            "q": self.q,
            **dataclasses.asdict(self.error),
        }


@dataclasses.dataclass(frozen=True)
class SmoothRotation:
    """The channel scale chosen for a site, and the evidence.

    Attributes:
        candidates: one for each policy.
        seed: of the rotation.
    """

    candidates: tuple[Candidate, ...]
    seed: int

    @property
    def chosen(self) -> Candidate:
        """The candidate of lowest weighted error."""
        return min(self.candidates, key=_weighted_error)

    @property
    def transform(self) -> Transform:
        """The chosen scale, with the signs of the rotation, and the rotation."""
        return hadamard_transform(len(self.chosen.scale), self.seed, self.chosen.scale.cpu().numpy())


def smooth_rotation(
    inputs: Tensor,
    weight: Tensor,
    form: LinearFormat,
    *,
    seed: int,
    token_weights: Tensor | None = None,
    learning: Learning | None = None,
) -> SmoothRotation:
    """Choose the channel scale in front of the Hadamard rotation at the input of a linear.

    The last quarter of the sequences is held out: rules and gradients see the others alone. The error is that of the
    rounded product under `form`, its clip included, with the weight rounded to nearest.

    Args:
        inputs: what the linear reads, float [sequences, seq, n], with seq > 1.
        weight: W, float [out, n].
        form: how inputs and weight are rounded.
        seed: of the rotation's signs and of the learning.
        token_weights: what the error of each token counts, float [sequences, seq]; None is 1 each.
        learning: how scales are learned; None is the defaults.

    Raises:
        CalibrationError: if there is one sequence only, or an input is NaN or infinite.
        ValueError: if shapes do not agree, weights are negative or all 0, or `form` rounds nothing.

    Example:
        >>> found = smooth_rotation(torch.randn(4, 32, 64), torch.randn(8, 64), LinearFormat(4, 4), seed=0)
        >>> found.transform.apply(np.ones((1, 64))).shape
        (1, 64)
    """
    _check(inputs, weight, form, token_weights)
    learning = learning or Learning()
    weight = weight.float()
    sequences = inputs.float()
    counts = inputs.new_ones(inputs.shape[:2]) if token_weights is None else token_weights
    held = max(1, len(inputs) // _HELD_OUT)
    train = Tokens.of(sequences[:-held], weight, counts[:-held].float())
    held_out = Tokens.of(sequences[-held:], weight, counts[-held:].float())
    rotation = Factors.of(hadamard_transform(weight.shape[1], seed), weight.device)

    def candidate(policy: Policy, scale: Tensor, alpha: float | None = None, q: float | None = None) -> Candidate:
        error = summed_up(output_errors(held_out, weight, scale, rotation, form), held_out)
        return Candidate(policy, scale, error, alpha, q)

    def learned(policy: Policy, start: Candidate) -> Candidate:
        scale = learn_scale(start.scale, train, held_out, weight, rotation, form, seed=seed, learning=learning)
        return candidate(policy, scale, start.alpha, start.q)

    squares = torch.zeros_like(weight[0], dtype=torch.float64)
    for x, counted in zip(torch.split(train.x, _CHUNK), torch.split(train.weights, _CHUNK), strict=True):
        squares += counted.double() @ x.double().square()
    moments = (squares / train.weights.sum(), weight.double().square().mean(0))
    ones = candidate("ones", torch.ones_like(weight[0]))
    largest = candidate("max", _centred(max_rule(train.x.abs().amax(0), weight.abs().amax(0), 0.5)), 0.5, 1.0)
    quantiles = [
        candidate("quantile", _centred(scale), alpha, q)
        for alpha, q, scale in promising_quantile_rules(train.x, weight, moments, _MEASURED)
    ]
    # The rule of SmoothRot is one of them, whatever was predicted for it.
    quantiles.append(dataclasses.replace(largest, policy="quantile"))
    quantile = min(quantiles, key=_weighted_error)
    rms = candidate("rms", rms_scale(*moments).float())
    return SmoothRotation(
        (ones, largest, quantile, rms, learned("rms_learned", rms), learned("quantile_learned", quantile)), seed
    )


def _centred(scale: Tensor) -> Tensor:
    """Return the scale with geometric mean 1."""
    return scale / scale.log().mean().exp()


def _weighted_error(candidate: Candidate) -> float:
    return candidate.error.weighted


def _check(inputs: Tensor, weight: Tensor, form: LinearFormat, token_weights: Tensor | None) -> None:
    if inputs.ndim != 3 or weight.ndim != 2 or inputs.shape[2] != weight.shape[1] or inputs.shape[1] < 2:
        raise ValueError(
            f"inputs {tuple(inputs.shape)} are not [sequences, seq, n] for a weight {tuple(weight.shape)} [out, n]"
        )
    if form.is_float:
        raise ValueError("nothing is rounded, so no scale is better than another")
    if token_weights is not None and (
        token_weights.shape != inputs.shape[:2] or not (token_weights >= 0).all() or not token_weights.any(1).all()
    ):
        raise ValueError(
            f"token weights {tuple(token_weights.shape)} are not [sequences, seq] {tuple(inputs.shape[:2])}, or "
            "negative, or 0 for a whole sequence"
        )
    if len(inputs) < 2:
        raise CalibrationError(
            "One calibration sequence cannot be held out from itself. Ask for two or more sequences."
        )
    if not inputs.isfinite().all():
        raise CalibrationError(
            "The inputs of a linear are not finite. The model overflows on this text; check its weights, or calibrate "
            "on another text."
        )
