"""Numbers that JSON does not have."""

import math
from typing import Any

__all__ = ["finite"]


def finite(content: Any) -> Any:
    """Return `content` with None for NaN and infinity, and lists for tuples."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
