"""Where things lie in a bundle."""

from pathlib import Path

__all__ = [
    "MANIFEST_FILE",
    "MODEL_FILE",
    "PLAN_FILE",
    "RECIPE_FILE",
    "REPORT_FILE",
    "REPORT_FOLDER",
    "REPORT_PAGE",
    "engine_folder",
]

MANIFEST_FILE = "planish.json"
RECIPE_FILE = "recipe.yaml"
PLAN_FILE = "plan.json"
REPORT_FOLDER = "report"
REPORT_FILE = f"{REPORT_FOLDER}/report.json"
REPORT_PAGE = f"{REPORT_FOLDER}/report.html"

#: The portable model at the top, and the lowered one in the folder of a target; weights are in MODEL_FILE + ".data".
MODEL_FILE = "model.onnx"


def engine_folder(bundle: Path, target: str) -> Path:
    """Return the folder of what a bundle holds for `target`."""
    return bundle / "engines" / target
