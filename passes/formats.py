"""The format that a scheme gives to one module of a checkpoint."""

import re

from planish.passes.scheme import LinearFormat, Scheme
from planish.passes.transforms import site_of

__all__ = ["LM_HEAD", "format_of"]

LM_HEAD = "lm_head"

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def format_of(scheme: Scheme, module: str) -> LinearFormat:
    """Return the format of a linear, named as in the checkpoint.

    Example:
        >>> str(format_of(Scheme.parse("w4a4", "w8a8"), "lm_head"))
        'w8a8'
    """
    if module == LM_HEAD:
        return scheme.lm_head
    layer, site = _LAYER.match(module), site_of(module)
    return scheme.linear if layer is None or site is None else scheme.at(site, int(layer[1]))
