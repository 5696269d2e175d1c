"""Run passes one after the other."""

from collections.abc import Sequence

import onnx_ir as ir

__all__ = ["run_passes"]


def run_passes(model: ir.Model, passes: Sequence[ir.passes.PassBase]) -> ir.Model:
    """Return `model` after all `passes`.

    Unlike onnx_ir's Sequential it lets a pass's own error through, whose message and exit code are meant for the user.
    """
    for each in passes:
        model = each(model).model
    return model
