"""Name what TensorRT's parser refuses."""

from typing import Any

__all__ = ["refused_nodes"]

#: Error code of the parser -> what it means to whoever reads it.
_MEANING = {
    "UNSUPPORTED_NODE": "TensorRT has no such op, or not in this form",
    "UNSUPPORTED_GRAPH": "TensorRT cannot take this graph",
    "INVALID_NODE": "neither an op that TensorRT knows nor a registered plugin",
    "INVALID_GRAPH": "the graph is not valid",
}


def refused_nodes(parser: Any) -> list[str]:
    """Return one line for every error of a failed parse: node, op, what that means, and the parser's own words.

    The parser goes on behind a node it refuses, so this is the whole list, not the first of many.
    """
    lines = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        meaning = _MEANING.get(error.code().name, error.code().name)
        lines.append(f"{error.node_name() or '(graph)'} ({error.node_operator() or '-'}): {meaning}: {error.desc()}")
    return lines
