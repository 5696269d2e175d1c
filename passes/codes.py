"""Where passes get the codes of a quantised weight from: packed, one checkpoint module at a time.

A module whose input channels are cut into segments has a weight in each, under the name that `Segment.of` gives it.
"""

import dataclasses
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from planish.plugins.packing import Codes

__all__ = ["CodesSource", "PackedWeight"]


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """The stored form of one quantised weight.

    Attributes:
        packed: uint8 [out, packed_size(in, bits)], layout of packing.pack.
        scale: [groups, out]; float32 for one scale per output channel, float16 for one per group.
    """

    packed: Codes
    scale: npt.NDArray[np.floating[Any]]


class CodesSource(Protocol):
    """Gives the codes of a module; read when the model is saved, not when the graph is rewritten."""

    def out_features(self, module: str) -> int:
        """Return the number of output channels of `module` or of a segment of it."""

    def read(self, module: str) -> PackedWeight:
        """Return the packed weight of `module`, such as model.layers.3.self_attn.q_proj, or of a segment of it."""
