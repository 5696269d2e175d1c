"""Find the sites of the loudest outliers, channel by channel: the picture of what flattening does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planish.compiler.learn.flattening import read_profile
from planish.compiler.learn.site_statistics import PROFILE
from planish.compiler.report.run_record import LoudSite
from planish.passes.transforms import SITES, Site

__all__ = ["loudest_sites"]

_SITES = 3
#: Channels of a picture; of more, neighbours are taken together.
_MOST_CHANNELS = 256


def loudest_sites(evidence: Sequence[Mapping[str, Any]], folder: Path) -> tuple[LoudSite, ...]:
    """Return the three sites whose tokens have the largest crest before flattening, the loudest first.

    Args:
        evidence: what `read_evidence` returns.
        folder: that blocks were flattened in.
    """
    crests = {
        (layer, site): of_layer[site]["crest_before"]
        for layer, of_layer in enumerate(evidence)
        for site in SITES
        if "crest_before" in of_layer.get(site, {})
    }
    loudest = sorted(crests, key=lambda place: -crests[place])[:_SITES]
    return tuple(_read(folder, layer, site) for layer, site in loudest)


def _read(folder: Path, layer: int, site: Site) -> LoudSite:
    profile = read_profile(folder, layer, site)
    channels = profile.shape[-1]
    pooled = -(-channels // _MOST_CHANNELS)
    before, after = (dict(zip(PROFILE, _pool(each, pooled), strict=True)) for each in profile)
    return LoudSite(layer, site, channels, pooled, before, after)


def _pool(profile: npt.NDArray[np.float32], pooled: int) -> list[list[float]]:
    """Return the largest of each group of `pooled` neighbours, [rows][groups], rounded to four digits."""
    starts = np.arange(0, profile.shape[1], pooled)
    return [[float(f"{each:.4g}") for each in row] for row in np.maximum.reduceat(profile, starts, axis=1)]
