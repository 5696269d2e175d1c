"""What the processor says of its integer instructions."""

import functools
from pathlib import Path

__all__ = ["PRODUCTS_WITHOUT_SATURATION", "cpu_flags"]

#: Flags of processors whose products of unsigned by signed 8-bit integers are summed in 32 bits, as Linux spells them;
#: without any of them two products are first added in 16 bits and may saturate.
PRODUCTS_WITHOUT_SATURATION = {"avx_vnni", "avx512_vnni", "amx_int8", "asimd"}


@functools.cache
def cpu_flags() -> tuple[str, ...]:
    """Return the feature flags of this processor; none where /proc/cpuinfo does not say."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(value.split())
    return ()
