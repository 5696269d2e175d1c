"""Lower the portable model to what TensorRT's parser takes: standard ops, and plugin nodes where there is a library."""

from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir
import onnx_ir.passes.common as common

from planish.compiler.backends.tensorrt.parser_versions import Version, opset_for, spelled_out_for
from planish.compiler.backends.tensorrt.plugin_cache import plug_cache
from planish.compiler.backends.tensorrt.plugin_linears import plug_linears
from planish.compiler.backends.tensorrt.surgery import LeftOut, Surgery
from planish.passes.float16 import Float16Pass
from planish.passes.lower_defaults_to_tensorrt import LowerDefaultsToTensorrtPass
from planish.passes.lower_kv_cache_to_tensorrt import LowerKvCacheToTensorrtPass
from planish.passes.lower_linears_to_tensorrt import LowerLinearsToTensorrtPass
from planish.passes.lower_opset import LowerOpsetPass
from planish.passes.sequence import run_passes
from planish.passes.spell_out_for_tensorrt import SpellOutForTensorrtPass

__all__ = ["Plugged", "lower_to_tensorrt", "plug"]


class Plugged(NamedTuple):
    """A model with plugin nodes, its other planish functions as they were, and the nodes that have no plugin."""

    model: ir.Model
    left_out: list[LeftOut]


def plug(portable: Path, work: Path, max_context: int) -> Plugged:
    """Return a portable model with plugin nodes in the place of all functions that have a kernel.

    Args:
        portable: the model's file, its data beside it.
        work: a folder for repacked weights, which the result reads when it is saved.
        max_context: slots of the cache.

    Raises:
        MissingExtraError: if onnx-graphsurgeon is not installed.
        NativeBuildError: if the packer cannot be compiled.
    """
    surgery = Surgery(portable, work)
    left_out = [*plug_linears(surgery), *plug_cache(surgery, max_context)]
    return Plugged(surgery.finish(), left_out)


def lower_to_tensorrt(model: ir.Model, max_context: int, version: Version | None = None) -> ir.Model:
    """Return the TensorRT form of a planish model, with plugin nodes or without; `model` itself stays as it was.

    Plugin nodes stay; what they did not replace becomes standard ops. Weights are unpacked when the result is saved.
    What the passes do to the inputs and outputs is told in LowerKvCacheToTensorrtPass and Float16Pass.

    Args:
        model: the portable model, or one with plugin nodes.
        max_context: slots of the cache.
        version: the TensorRT whose parser will read it: ops that it lacks are spelled out. None is one that lacks none.
    """
    older = [] if version is None else [SpellOutForTensorrtPass(spelled_out_for(version))]
    passes = [
        LowerLinearsToTensorrtPass(),
        LowerKvCacheToTensorrtPass(max_context),
        LowerDefaultsToTensorrtPass(),
        common.InlinePass(),  # the online transforms: their bodies are what TensorRT runs
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        *older,
        Float16Pass(),
        *([] if version is None else [LowerOpsetPass(opset_for(version))]),
    ]
    return run_passes(model.clone(), passes)
