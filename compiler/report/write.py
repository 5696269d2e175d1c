"""Write report.json and report.html: one page that needs no other file, for screens of any width and for paper."""

import json
from typing import Any

import jinja2

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.layout import REPORT_FILE, REPORT_PAGE
from planish.compiler.checkpoint.files import write_json, write_text
from planish.compiler.report.facts import gather
from planish.compiler.report.plots import draw_plots
from planish.compiler.report.run_record import RunRecord
from planish.compiler.report.words import ratio, size
from planish.passes.transforms import SITES

__all__ = ["render", "write_report"]


def write_report(bundle: Bundle, run: RunRecord) -> None:
    """Write the report of a bundle that is otherwise complete into its folder report/.

    Args:
        bundle: its manifest needs no file records yet.
        run: what made it.
    """
    facts = gather(bundle, run)
    (bundle.path / REPORT_FILE).parent.mkdir(exist_ok=True)
    write_json(bundle.path / REPORT_FILE, facts)
    write_text(bundle.path / REPORT_PAGE, render(facts))


def render(facts: dict[str, Any]) -> str:
    """Return the page for the content of report.json."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("planish.compiler.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "ratio": ratio, "size": size, "spelled": _spelled}
    layers: dict[int, dict[str, Any]] = {}
    for each in facts["sites"]:
        layers.setdefault(each["layer"], {})[each["site"]] = each
    page = environment.get_template("report.html.jinja")
    return page.render(facts=facts, plots=draw_plots(facts), layers=layers, site_names=SITES)


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
