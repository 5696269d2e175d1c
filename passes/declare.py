"""Declare the planish functions a model uses."""

import onnx_ir as ir

from planish.plugins.ops import DOMAIN, Op

__all__ = ["declare"]


def declare(model: ir.Model, op: Op) -> None:
    """Add the function of `op`, and those it uses, to `model`; functions that are there already stay."""
    model.graph.opset_imports[DOMAIN] = 1
    for function in op.functions():
        model.functions.setdefault(function.identifier(), function)
