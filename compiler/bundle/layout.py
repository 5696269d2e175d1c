"""Where things lie in a bundle."""

from pathlib import Path

__all__ = [
    "MANIFEST_FILE",
    "MODEL_FILE",
    "PLAN_FILE",
    "RECIPE_FILE",
    "REPORT_FILE",
    "REPORT_PAGE",
    "engine_folder",
]

MANIFEST_FILE = "planish.json"
RECIPE_FILE = "recipe.yaml"
PLAN_FILE = "plan.json"
REPORT_FILE = "report/report.json"
REPORT_PAGE = "report/report.html"

#: The portable model at the top, and the lowered one in the folder of a target; weights are in MODEL_FILE + ".data".
MODEL_FILE = "model.onnx"


def engine_folder(bundle: Path, target: str) -> Path:
    """Return the folder of what a bundle holds for `target`."""
    return bundle / "engines" / target
