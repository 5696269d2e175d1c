"""Which version of TensorRT's ONNX parser takes which op, as data, and what of a model one version lacks.

Sources: docs/operators.md of onnx/onnx-tensorrt at the commits that TensorRT's tags name, 96e7811 (10.1, whose matrix
is that of 10.0) and fa5aa9f (10.15), and the parser changes in CHANGELOG.md of NVIDIA/TensorRT at v11.1, under 10.14,
10.15 and 11.0. INT4 initializers and quantisation by blocks are in the parser's changelog under 10.0.

A parser does not refuse a newer opset than its documentation names: it reads every op by the opset that the model
says. Blocked DequantizeLinear is an op of opset 21, and parsers read it from 10.0 on.
"""

from collections import Counter

import onnx_ir as ir

from planish.compiler.errors import EngineBuildError
from planish.passes.spell_out_for_tensorrt import SPELLABLE
from planish.plugins.ops import OPSET

__all__ = ["SINCE", "Version", "check_ops", "opset_for", "read_version", "spelled_out_for"]

Version = tuple[int, int]

#: The first version that parses INT4 weights: before it there is nothing to lower to.
_FIRST: Version = (10, 0)
#: First version of TensorRT -> the opset to write for it, the oldest that has the ops which its parser takes: Attention
#: came with opset 23, blocked DequantizeLinear with 21.
_OPSETS: dict[Version, int] = {(10, 15): OPSET, (10, 14): 23, _FIRST: 21}

#: Op -> the first version whose parser takes it, of the ops that lowered models have; those of 10.0 may be older.
SINCE: dict[str, Version] = {
    **dict.fromkeys(
        (
            *("Abs", "Add", "And", "Cast", "Clip", "Concat", "Constant", "Cos", "DequantizeLinear", "Div", "Equal"),
            *("Expand", "Gather", "LessOrEqual", "MatMul", "Max", "Mul", "Neg", "Or", "Range", "ReduceMax"),
            *("ReduceMean", "ReduceMin", "Reshape", "Round", "ScatterND", "Shape", "Sigmoid", "Sin", "Slice"),
            *("Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
        ),
        _FIRST,
    ),
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "TensorScatter": (10, 15),
    "Swish": (11, 0),
}


def read_version(text: str) -> Version:
    """Return the first two numbers of a version such as 10.3.0.30: parsers change with these."""
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


def spelled_out_for(version: Version) -> frozenset[str]:
    """Return the ops that a version lacks and that can be spelled out in others."""
    return frozenset(op for op in SPELLABLE if SINCE[op] > version)


def opset_for(version: Version) -> int:
    """Return the opset to write for a version: that of planish, or an older one where ops have to be spelled out."""
    return next((opset for first, opset in _OPSETS.items() if version >= first), min(_OPSETS.values()))


def check_ops(model: ir.Model, version: Version) -> None:
    """Check that the parser of a version takes every standard op of a lowered model.

    Raises:
        EngineBuildError: if it lacks some; the message lists all, with the version that has them.
    """
    ops = Counter(node.op_type for node in model.graph if node.domain == "")
    lines = []
    for op, count in sorted(ops.items()):
        since = SINCE.get(op)
        if since is None:
            lines.append(f"{op}, {count} node(s): in no version that planish knows of")
        elif since > version:
            lines.append(f"{op}, {count} node(s): from TensorRT {_spell(since)} on")
    if lines:
        raise EngineBuildError(
            f"The parser of TensorRT {_spell(version)} does not take {len(lines)} op(s) of the model:\n  "
            + "\n  ".join(lines)
            + f"\nUse TensorRT {_spell(max(_FIRST, *(SINCE.get(op, _FIRST) for op in ops)))} or later."
        )


def _spell(version: Version) -> str:
    return ".".join(map(str, version))
