"""A recipe file: YAML whose settings are known by the line they stand in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from planish.compiler.errors import RecipeError

__all__ = ["RecipeFile"]


class _Loader(yaml.SafeLoader):
    """Says where a value stands that looks like a date, say, and is none; PyYAML lets Python's own errors through."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            problem = f"{str(node.value)[:40]!r} cannot be read as {kind}. Correct it, or put text in quotes."
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


class RecipeFile:
    """A mapping of settings as it was written.

    Attributes:
        path: of the file.
        settings: name -> value, as YAML reads it.
    """

    def __init__(self, path: Path) -> None:
        """Read `path`.

        Raises:
            RecipeError: if it cannot be read, is no mapping, or gives a setting twice.
        """
        self.path = path
        try:
            text = path.read_text(encoding="utf-8")
            node, settings = yaml.compose(text, yaml.SafeLoader), yaml.load(text, _Loader)
        except yaml.constructor.ConstructorError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise RecipeError(f"{path}:{line}: {error.problem}") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            # YAML's problems have several lines.
            raise RecipeError(f"The recipe {path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(settings, dict) or not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"The recipe {path} is not a mapping of settings, such as 'scheme: w4a4k4v4'.")
        self._node = node
        self._refuse_twice(node)
        self.settings: dict[str, Any] = {str(name): value for name, value in settings.items()}

    def place(self, keys: Sequence[str | int]) -> str:
        """Return file and line, as `r.yaml:3`, of what stands under `keys`, or of the innermost part that is there."""
        node: yaml.Node = self._node
        line = None
        for key in keys:
            found = _inside(node, key)
            if found is None:
                break
            line, node = found
        return str(self.path) if line is None else f"{self.path}:{line}"

    def _refuse_twice(self, node: yaml.Node) -> None:
        # YAML readers keep the last one without a word.
        if not isinstance(node, yaml.MappingNode):
            return
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise RecipeError(
                    f"{self.path}:{line}: '{key.value}' stands in line {lines[key.value]} as well. Keep one of the two."
                )
            lines[key.value] = line
            self._refuse_twice(value)


def _inside(node: yaml.Node, key: str | int) -> tuple[int, yaml.Node] | None:
    """Return the line, from 1, and the node under a key of a mapping or at a place in a list."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == str(key):
                return name.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        return node.value[key].start_mark.line + 1, node.value[key]
    return None
