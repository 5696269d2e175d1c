"""Write report.json and report.html: one page that needs no other file, for screens of any width and for paper."""

from typing import Any

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.layout import REPORT_FILE, REPORT_PAGE
from planish.compiler.checkpoint.files import write_json, write_text
from planish.compiler.report.facts import gather
from planish.compiler.report.page import fill
from planish.compiler.report.plots import draw_plots
from planish.compiler.report.run_record import RunRecord
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
    layers: dict[int, dict[str, Any]] = {}
    for each in facts["sites"]:
        layers.setdefault(each["layer"], {})[each["site"]] = each
    return fill("report.html.jinja", facts=facts, plots=draw_plots(facts), layers=layers, site_names=SITES)
