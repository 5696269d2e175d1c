"""What will be hard to round in a checkpoint, before anything is compiled: heavy tails of weights, loud activations."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.errors import CalibrationError
from planish.compiler.learn.block import MODULES, Angles, read_block
from planish.compiler.learn.flattening import embedding, naming_block
from planish.compiler.learn.site_statistics import float_statistics
from planish.compiler.select.kurtosis import (
    GROUPS,
    KurtosisRule,
    excess_kurtosis,
    read_kurtosis,
    robust_z,
    weight_sums,
)

__all__ = ["LayerOutliers", "find_outliers"]


@dataclasses.dataclass(frozen=True)
class LayerOutliers:
    """What was found in one decoder block.

    Attributes:
        layer: its index.
        weights: module -> excess kurtosis of its weight.
        groups: attn and ffn -> `kurtosis`, the mean over q, k, v or gate, up, down, and `z`, its robust z-score across
            the layers; see `KurtosisRule`.
        sites: site -> what `SiteStatistics.numbers` gives of the activations there, and `peak`, the largest without
            first tokens over the median.
    """

    layer: int
    weights: dict[str, float]
    groups: dict[str, dict[str, float]]
    sites: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary for JSON."""
        return dataclasses.asdict(self)


@torch.no_grad()
def find_outliers(
    checkpoint: Checkpoint, token_ids: npt.NDArray[np.int64], progress: Callable[[int, int], None]
) -> list[LayerOutliers]:
    """Run the float model block by block, and return what was found in each.

    Args:
        checkpoint: read one block at a time.
        token_ids: int64 [sequences, seq]; their hidden states are held in memory.
        progress: (blocks done, blocks in all).

    Raises:
        CalibrationError: if what flows is not finite; the message names the block.
        NonFiniteWeightError: if a weight is not.
    """
    config = checkpoint.config
    by_group = read_kurtosis(checkpoint, KurtosisRule(), lambda *_: None)
    z = {group: robust_z(by_group[group]) for group in GROUPS}
    angles, x, found = Angles.of(config, token_ids.shape[1]), embedding(checkpoint)(token_ids), []
    for layer in range(config.num_hidden_layers):
        block = read_block(checkpoint, layer)
        with naming_block(layer):
            statistics, x = float_statistics(block, x, angles)
            if not x.isfinite().all():
                raise CalibrationError("it makes NaN or infinity of this text")
        sites = {site: each.numbers() for site, each in statistics.items()}
        found.append(
            LayerOutliers(
                layer,
                {module: excess_kurtosis(weight_sums(block.weight(module).numpy())) for module in MODULES},
                {group: {"kurtosis": float(by_group[group][layer]), "z": float(z[group][layer])} for group in GROUPS},
                {
                    site: {**numbers, "peak": numbers["absmax_rest"] / max(numbers["median"], 1e-30)}
                    for site, numbers in sites.items()
                },
            )
        )
        progress(layer + 1, config.num_hidden_layers)
    return found
