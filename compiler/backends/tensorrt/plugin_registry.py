"""Load the plugin library into TensorRT's registry, and look up every plugin of a model before it is parsed."""

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from planish.compiler.errors import EngineBuildError
from planish.plugins.ops import DOMAIN

__all__ = ["load_plugins", "look_up", "plugin_nodes"]


def plugin_nodes(model: Path) -> Counter[tuple[str, str]]:
    """Return how many nodes of each plugin, by name and version, an ONNX model has; its data is not read."""
    graph = onnx.load(model, load_external_data=False).graph
    nodes = [node for node in graph.node if node.domain == DOMAIN]
    return Counter((node.op_type, _version(node)) for node in nodes)


def _version(node: onnx.NodeProto) -> str:
    # TensorRT's parser takes "1" where a node says nothing.
    given = [onnx.helper.get_attribute_value(each).decode() for each in node.attribute if each.name == "plugin_version"]
    return given[0] if given else "1"


def load_plugins(trt: ModuleType, library: Path) -> Any:
    """Load a plugin library into the registry of package `trt`, and return the registry.

    Raises:
        EngineBuildError: if TensorRT does not take the library.
    """
    registry = trt.get_plugin_registry()
    if registry.load_library(str(library)) is None:
        raise EngineBuildError(
            f"TensorRT {trt.__version__} does not take the plugin library {library}. Compile it against the headers of "
            "this TensorRT, with 'make plugins'."
        )
    return registry


def look_up(registry: Any, nodes: Counter[tuple[str, str]]) -> None:
    """Check that the registry has every plugin.

    Raises:
        EngineBuildError: if one is lacking; the message lists all, with what the registry has.
    """
    found = {key: registry.get_creator(*key, DOMAIN) is not None for key in nodes}
    if all(found.values()):
        return
    lines = [
        f"{name} version {version}, {count} node(s): {'there' if found[name, version] else 'MISSING'}"
        for (name, version), count in sorted(nodes.items())
    ]
    raise EngineBuildError(
        "The model needs plugins that TensorRT's registry does not have:\n  "
        + "\n  ".join(lines)
        + "\nCompile the library again with 'make plugins', from the planish that lowered the model."
    )
