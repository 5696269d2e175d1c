"""The `ort` target: the portable model lowered to what stock ONNX Runtime executes in integers."""

from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common

from planish.compiler.export.float_model import Progress, save_model
from planish.passes.lower_kv_cache_to_ort import LowerKvCacheToOrtPass
from planish.passes.lower_linears_to_ort import LowerLinearsToOrtPass
from planish.passes.merge_rotary import MergeRotaryPass
from planish.passes.sequence import run_passes
from planish.passes.spread_rest_segment import SpreadRestSegmentPass

__all__ = ["build_ort", "lower_to_ort"]


def lower_to_ort(model: ir.Model) -> ir.Model:
    """Return `model` lowered in place: integer products, and no function left that is not used."""
    passes = [
        MergeRotaryPass(),
        SpreadRestSegmentPass(),
        LowerLinearsToOrtPass(),
        LowerKvCacheToOrtPass(),
        common.InlinePass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
    ]
    return run_passes(model, passes)


def build_ort(model: ir.Model, folder: Path, progress: Progress | None = None) -> Path:
    """Lower the portable `model` (which is consumed) and write it into `folder`; return the model's path."""
    return save_model(lower_to_ort(model), folder, progress)
