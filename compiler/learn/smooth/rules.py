"""Channel scales in closed form for what is rotated next: from the largest magnitudes, from quantiles, from moments.

SmoothRot (arXiv 2506.05413) takes the largest magnitudes. One token far from all others then decides over its channel,
and the weight is given more of the range than the other tokens need. A quantile below 1 does not see that token, which
is better as long as few outputs depend on it, and ruinous where they do (arXiv 2606.09927): so the quantile is chosen
by the error that it causes.
"""

import itertools
from collections.abc import Iterator

from torch import Tensor

from planish.compiler.calibrate.statistics import QuantileSketch

__all__ = ["ALPHAS", "QUANTILES", "max_rule", "promising_quantile_rules"]

#: How much of the difference between channels moves from the activations to the weight: 1 is all of it.
ALPHAS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
#: Which quantile of |x| stands for a channel; 1 is the largest magnitude.
QUANTILES = (0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 1.0)

_SMALLEST = 1e-5


def max_rule(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """Return the channel scale 1 / s of SmoothRot, s = max(x_max^alpha / max(w_max, 1e-5)^(1 - alpha), 1e-5).

    The published code takes the largest signed weight for `w_max`, which is wrong for a channel of negative weights.

    Args:
        x_max: largest |x| of each channel, or what stands for it; float [n].
        w_max: largest |w| of each channel, float [n].
        alpha: how much moves to the weight, 0 to 1.

    Returns:
        What x is multiplied with and the columns of W are divided by, like `x_max`.
    """
    s = x_max.pow(alpha) / w_max.clamp_min(_SMALLEST).pow(1 - alpha)
    return 1 / s.clamp_min(_SMALLEST)


def promising_quantile_rules(
    inputs: Tensor, weight: Tensor, moments: tuple[Tensor, Tensor], count: int
) -> list[tuple[float, float, Tensor]]:
    """Return the `count` quantile rules of lowest predicted error, best first, of all in `ALPHAS` x `QUANTILES`.

    The prediction is tr(Sx D^2) tr(Sw D^-2), to which the error of a product is proportional once a rotation has mixed
    the channels (see `closed_forms`). It takes no rounding, and it ranks as the measured error does.

    Args:
        inputs: x, float [tokens, n].
        weight: W, float [out, n].
        moments: mean squares of the channels of x and of the columns of W, float64 [n] each.
        count: how many.

    Returns:
        alpha, q, and the scale, float32 [n] on the device of `inputs`, of each.
    """
    x_moments, w_moments = moments

    def predicted(rule: tuple[float, float, Tensor]) -> float:
        squared = rule[2].double().square()
        return float((x_moments * squared).sum() * (w_moments / squared).sum())

    return sorted(_quantile_rules(inputs, weight), key=predicted)[:count]


def _quantile_rules(inputs: Tensor, weight: Tensor) -> Iterator[tuple[float, float, Tensor]]:
    sketch = QuantileSketch(inputs.shape[1])
    sketch.update(inputs.cpu())
    x_quantiles = {q: sketch.quantile(q).to(inputs.device) for q in QUANTILES}
    w_max = weight.abs().amax(0)
    for alpha, q in itertools.product(ALPHAS, QUANTILES):
        yield alpha, q, max_rule(x_quantiles[q], w_max, alpha)
