"""report.json and report.html: what a compile made, and how well it was checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.inspection import inspect
from planish.compiler.bundle.layout import REPORT_FOLDER
from planish.compiler.checkpoint.files import read_json, write_json, write_text
from planish.compiler.verify.passes import PassDrift

__all__ = ["write_report"]


def write_report(
    bundle: Bundle,
    plan: Mapping[str, Any],
    verification: Any,
    drifts: Sequence[PassDrift],
    seconds: Mapping[str, float],
) -> None:
    """Write the report of a bundle that is otherwise complete into its folder report/.

    Args:
        bundle: the bundle; its manifest needs no file records yet.
        plan: the content of plan.json.
        verification: the dataclass that `verify` returned.
        drifts: how far each pass that flattens moved the logits; empty where none ran or none was verified.
        seconds: stage of the compile -> how long it took; stages kept from an earlier run are not in it.
    """
    engines = {}
    for target in bundle.manifest.targets:
        path = bundle.model_path(target).with_name("engine.json")
        if path.is_file():
            engines[target] = read_json(path)
    report = {
        **inspect(bundle).to_dict(),
        "planish_version": bundle.manifest.planish_version,
        "verification": dataclasses.asdict(verification),
        "passes": {each.name: each.drift for each in drifts},
        "left_float": plan["left_float"],
        "engines": engines,
        "seconds": dict(seconds),
    }
    folder = bundle.path / REPORT_FOLDER
    folder.mkdir(exist_ok=True)
    write_json(folder / "report.json", report)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("planish.compiler.pipeline"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(report=report, plan=plan)
    write_text(folder / "report.html", page)
