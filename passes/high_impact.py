"""High-impact channels: the input channels of a site that keep more bits than the scheme gives the others.

The input channels of the linears at a site are permuted, the high ones first, and cut into two segments. Each is a
linear product of its own, with weights in its own format and, where activations are quantised, with codes and a scale
per token of its own:

    y = Q(x[high]) Q(W[:, high])^T + Q(x[rest]) Q(W[:, rest])^T

The permutation stands behind the online transform of the site: it permutes transformed channels. All linears of a site
share it, as they share the quantised activation. High-impact channels as in arXiv 2511.17801, of inputs and with
activations.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from planish.passes.scheme import FLOAT_BITS, LinearFormat

__all__ = [
    "CHANNEL_STEP",
    "HIGH_BITS",
    "SUFFIXES",
    "Channels",
    "HighImpact",
    "HighImpactOf",
    "Segment",
    "high_format",
    "module_of",
    "no_high_impact",
    "segments",
]

#: The widths that high-impact channels may have.
HIGH_BITS = (3, 4, 8)
#: The high segment is a whole number of these: a kernel that runs both in one loop over the input channels goes from
#: one format to the other between two tiles of this many.
CHANNEL_STEP = 64

_HIGH, _REST = ".high", ""
#: What a `Segment` may have for a suffix.
SUFFIXES = (_HIGH, _REST)

Channels = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class HighImpact:
    """The high-impact channels of one site.

    Attributes:
        bits: of a weight code of these channels; of an activation code too, unless the scheme gives activations more.
        order: permutation of the site's input channels, int64 [n]; the first `count` of them are the high ones.
        count: how many, a multiple of `CHANNEL_STEP` below n; 0 is none.
        clip: share of the largest magnitude of a token's high channels that their grid spans, in (0, 1].
    """

    bits: int
    order: Channels
    count: int
    clip: float = 1.0

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(problem)
        object.__setattr__(self, "order", np.ascontiguousarray(self.order, np.int64))

    def _problem(self) -> str | None:
        order = np.asarray(self.order)
        n = len(order) if order.ndim == 1 else 0
        if self.bits not in HIGH_BITS:
            return f"high-impact channels have 3, 4 or 8 bits, not {self.bits}"
        if not n or order.dtype.kind not in "iu" or not np.array_equal(np.sort(order), np.arange(n)):
            return f"the order of the channels, {order.dtype} {list(order.shape)}, is no permutation of them"
        if self.count % CHANNEL_STEP or not 0 <= self.count < n:
            return (
                f"{self.count} high-impact channels of {n} cannot be: "
                f"they are a multiple of {CHANNEL_STEP}, and not all of them"
            )
        if not 0 < self.clip <= 1:
            return f"the clip of the high-impact channels is {self.clip}, and a clip is in (0, 1]"
        return None


#: A checkpoint module, such as model.layers.3.self_attn.q_proj -> the high-impact channels of its input.
HighImpactOf = Callable[[str], HighImpact | None]


def no_high_impact(module: str) -> None:
    """Say of every module that all its input channels are alike."""


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """Input channels of a linear that share a format: all of them, the high-impact ones, or the rest.

    Attributes:
        suffix: what the names of its codes, scales and nodes have behind the name of the linear.
        format: bits, group and clip.
        channels: which input channels, in the order in which their codes are stored, int64; None is all, as they come.
    """

    suffix: str
    format: LinearFormat
    channels: Channels | None = None

    def of(self, name: str) -> str:
        """Return the name of this segment of the linear or module called `name`.

        Example:
            >>> Segment(".high", LinearFormat(4, 4)).of("model.layers.3.mlp.down_proj")
            'model.layers.3.mlp.down_proj.high'
        """
        return name + self.suffix

    def size(self, k: int) -> int:
        """Return how many of the `k` input channels of the linear these are."""
        return k if self.channels is None else len(self.channels)


def module_of(name: str) -> str:
    """Return the module that a name made by `Segment.of` belongs to.

    Example:
        >>> module_of("model.layers.3.mlp.down_proj.high")
        'model.layers.3.mlp.down_proj'
    """
    return name.removesuffix(_HIGH)


def segments(form: LinearFormat, high: HighImpact | None, clip: float = 1.0) -> tuple[Segment, ...]:
    """Return the segments of a linear, the high one first.

    Args:
        form: of the linear, as the scheme says.
        high: the high-impact channels of its input; None or none of them leaves one segment.
        clip: what the clip of the rest, or of the whole linear, is multiplied with.

    Raises:
        ValueError: if the high-impact channels have no more bits than the others.
    """
    rest = dataclasses.replace(form, clip=form.clip * clip)
    if high is None or high.count == 0:
        return (Segment(_REST, rest),)
    kept = high_format(form, high.bits)
    kept = dataclasses.replace(kept, clip=kept.clip * high.clip)
    return Segment(_HIGH, kept, high.order[: high.count]), Segment(_REST, rest, high.order[high.count :])


def high_format(form: LinearFormat, bits: int) -> LinearFormat:
    """Return the format of the high-impact channels of a linear, before their clip.

    Args:
        form: of the linear, as the scheme says.
        bits: of their weight codes.

    Raises:
        ValueError: if that is not more bits than the others have.
    """
    if bits <= form.weight_bits:
        others = "stay in floating point" if form.is_float else f"have {form.weight_bits}"
        raise ValueError(f"high-impact channels of {bits} bits are no gain where weights {others}")
    activation_bits = form.activation_bits if form.activation_bits == FLOAT_BITS else max(bits, form.activation_bits)
    return dataclasses.replace(form, weight_bits=bits, activation_bits=activation_bits)
