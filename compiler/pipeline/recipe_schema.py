"""The JSON schema of recipe.yaml, for editors that complete and check settings: `python -m` writes it to a file."""

import sys
from pathlib import Path
from typing import Any

from planish.compiler.checkpoint.files import write_json
from planish.compiler.pipeline.recipe import Recipe

__all__ = ["recipe_schema"]


def recipe_schema() -> dict[str, Any]:
    """Return the schema, JSON Schema 2020-12."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


if __name__ == "__main__":
    write_json(Path(sys.argv[1]), recipe_schema())
