"""Lower the portable model to standard ops that TensorRT's parser takes without a plugin."""

import onnx_ir as ir
import onnx_ir.passes.common as common

from planish.passes.float16 import Float16Pass
from planish.passes.lower_defaults_to_tensorrt import LowerDefaultsToTensorrtPass
from planish.passes.lower_kv_cache_to_tensorrt import LowerKvCacheToTensorrtPass
from planish.passes.lower_linears_to_tensorrt import LowerLinearsToTensorrtPass
from planish.passes.sequence import run_passes

__all__ = ["lower_to_tensorrt"]


def lower_to_tensorrt(model: ir.Model, max_context: int) -> ir.Model:
    """Return the TensorRT form of a planish model; `model` itself stays as it was.

    Weights are unpacked when the result is saved. What the passes do to the inputs and outputs is told in
    LowerKvCacheToTensorrtPass and Float16Pass.
    """
    passes = [
        LowerLinearsToTensorrtPass(),
        LowerKvCacheToTensorrtPass(max_context),
        LowerDefaultsToTensorrtPass(),
        common.InlinePass(),  # the online transforms: their bodies are what TensorRT runs
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        Float16Pass(),
    ]
    return run_passes(model.clone(), passes)
