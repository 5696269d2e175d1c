"""Numbers and names as people read them."""

from collections.abc import Sequence

__all__ = ["elided", "ratio", "runs", "short", "size"]


def size(count: float) -> str:
    """Return bytes in kB, MB or GB (powers of 1000), in three digits or more.

    Example:
        >>> size(229_234_170)
        '229 MB'
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= 0.9995 * unit:
            return f"{short(count / unit)} {name}"
    return f"{count:.0f} B"


def short(value: float) -> str:
    """Return three digits of a number, or all of those in front of its point.

    Example:
        >>> short(1534.2), short(0.012345)
        ('1,534', '0.0123')
    """
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def ratio(saving: float) -> str:
    """Return how many times smaller something is, which below 1 is larger.

    Example:
        >>> ratio(1.875), ratio(0.5)
        ('1.88 x smaller', '2.00 x larger')
    """
    return f"{saving:.2f} x smaller" if saving >= 1 else f"{1 / saving:.2f} x larger"


def elided(name: str, letters: int) -> str:
    """Return a name of at most so many letters: of a longer one, the beginning and the end.

    Example:
        >>> elided("SmolLM2-135M-Instruct", 11)
        'SmolL…truct'
    """
    end = letters // 2
    return name if len(name) <= letters else f"{name[: letters - end - 1]}…{name[len(name) - end :]}"


def runs(numbers: Sequence[int]) -> str:
    """Return ascending whole numbers, those in a row by the first and the last.

    Example:
        >>> runs([0, 1, 2, 7])
        '0-2, 7'
    """
    ends = [number for number in numbers if number + 1 not in numbers]
    starts = [number for number in numbers if number - 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
