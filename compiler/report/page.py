"""Fill the templates of pages that need no other file: numbers, sizes and settings as people read them."""

import json
from typing import Any

import jinja2

from planish.compiler.report.words import ratio, runs, size

__all__ = ["fill"]


def fill(template: str, **content: Any) -> str:
    """Return the page that a template of `templates/` makes of `content`, whose text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("planish.compiler.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "ratio": ratio, "runs": runs, "size": size, "spelled": _spelled}
    return environment.get_template(template).render(**content)


def _number(value: Any) -> str:
    """Return a number in four digits, a dash for None, and anything else as it is."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _spelled(value: Any) -> str:
    """Return a setting as YAML has it on one line."""
    return value if isinstance(value, str) else json.dumps(value)
