"""The planish ops, one per file: each an ONNX function whose body of standard ops is its meaning."""

from planish.plugins.ops.append_kv import append_kv
from planish.plugins.ops.attend import attend
from planish.plugins.ops.matmul import matmul
from planish.plugins.ops.op import DOMAIN, OPSET, Op
from planish.plugins.ops.quantize_activation import quantize_activation
from planish.plugins.ops.transform import transform
from planish.plugins.ops.unpack import unpack
from planish.plugins.ops.weight_only_matmul import weight_only_matmul

__all__ = [
    "DOMAIN",
    "OPSET",
    "Op",
    "append_kv",
    "attend",
    "matmul",
    "quantize_activation",
    "transform",
    "unpack",
    "weight_only_matmul",
]
