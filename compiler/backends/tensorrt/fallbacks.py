"""What a TensorRT engine holds or computes otherwise than the portable model, and why."""

from collections.abc import Collection, Sequence

import onnx_ir as ir

from planish.compiler.backends.tensorrt.engine_json import Fallback
from planish.compiler.backends.tensorrt.surgery import LeftOut
from planish.plugins.ops import DOMAIN, append_kv, attend, matmul, quantize_activation, weight_only_matmul
from planish.plugins.packing import PACKED_BITS

__all__ = ["fallbacks"]


#: What attention and the cache of a portable model become, unless they are plugins.
_ATTENTION = {"Attention", *(attend(key, value).name for key in PACKED_BITS for value in PACKED_BITS)}
_LOWERED_ATTENTION = {"Attention", "TensorScatter"}


def fallbacks(
    model: ir.Model, left_out: Sequence[LeftOut] = (), tensorrt: str = "", lacking: Collection[str] = ()
) -> tuple[Fallback, ...]:
    """Return the fallbacks of a portable model, or of one with plugin nodes.

    Args:
        model: before planish functions became standard ops.
        left_out: the nodes that no plugin took the place of.
        tensorrt: the version of TensorRT that it is lowered for.
        lacking: ops that its parser lacks.
    """
    everything = {node.op_type for node in model.graph}
    if everything & _ATTENTION:
        everything |= _LOWERED_ATTENTION
    ops = {node.op_type for node in model.graph if node.domain == DOMAIN}
    found = [
        Fallback(
            what=f"{bits}-bit weight codes",
            instead="stored in 4 bits each",
            why=f"TensorRT has no {bits}-bit type",
        )
        for bits in (2, 3)
        if ops & {matmul(bits).name, weight_only_matmul(bits).name}
    ]
    if quantize_activation().name in ops:
        found.append(
            Fallback(
                what="products of activation codes and weight codes",
                instead="multiplied in float16, which holds every code exactly; only the sum is rounded",
                why="without a plugin TensorRT has no integer product with scales found at run time",
            )
        )
    if ops & {append_kv(bits).name for bits in PACKED_BITS}:
        found.append(
            Fallback(
                what="low-bit KV cache",
                instead="stored as float16, each number rounded to its code's value (fake-quantised)",
                why="TensorRT's cache update takes float caches only",
            )
        )
    if spelled_out := sorted(everything & set(lacking)):
        copied = "; the cache is copied at every step" if "TensorScatter" in spelled_out else ""
        found.append(
            Fallback(
                what=", ".join(spelled_out),
                instead=f"spelled out in older ops{copied}",
                why=f"the parser of TensorRT {tensorrt} does not know them",
            )
        )
    reasons: dict[str, list[str]] = {}
    for node, why in left_out:
        reasons.setdefault(why, []).append(node)
    found += [
        Fallback(what=f"{len(nodes)} node(s): {_named(nodes)}", instead="standard ops, without a plugin", why=why)
        for why, nodes in reasons.items()
    ]
    return tuple(found)


def _named(nodes: list[str]) -> str:
    return nodes[0] if len(nodes) == 1 else f"{nodes[0]} to {nodes[-1]}"
