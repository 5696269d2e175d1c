"""PlanishWeightOnlyMatMul{bits}: float activations times packed weight codes.

y[t, n] = sum_k x[t, k] * weight_scale[k // group, n] * (w[n, k] - 2^(bits-1))
"""

import functools

from planish.plugins.ops.op import Op
from planish.plugins.ops.unpack import unpack

__all__ = ["weight_only_matmul"]


@functools.cache
def weight_only_matmul(bits: int) -> Op:
    """Return PlanishWeightOnlyMatMul2, 3, 4 or 8, named by the bits of the weight codes."""
    return Op(
        name=f"PlanishWeightOnlyMatMul{bits}",
        inputs={
            "x": "float32 [batch, sequence, K]",
            "weight": f"uint8 [N, packed_size(K, {bits})], layout of packing.pack",
            "weight_scale": "float32 [1, N], or float16 [ceil(K / group), N]",
        },
        outputs={"y": "float32 [batch, sequence, N]"},
        attributes={
            "k": "int, the number of input channels",
            "group": "int, input channels to a weight scale",
        },
        body=f"""
        none = Constant <value_ints = [0]> ()
        only = Constant <value_ints = [1]> ()
        rest = Constant <value_ints = [-1]> ()
        weight_zero = Constant <value = float {{{1 << bits - 1}.0}}> ()
        k_scalar = Constant <value_int: int = @k> ()
        k = Reshape (k_scalar, only)
        group_scalar = Constant <value_int: int = @group> ()
        group = Reshape (group_scalar, only)
        groups = Shape <start = 0, end = 1> (weight_scale)
        whole = Mul (groups, group)
        outputs = Shape <start = 1, end = 2> (weight_scale)
        flat_shape = Concat <axis = 0> (outputs, whole)
        spread_shape = Concat <axis = 0> (outputs, groups, group)

        stored = {unpack(bits).call} (weight)
        codes = Slice (stored, none, k, only)
        codes_float = Cast <to = 1> (codes)
        centred = Sub (codes_float, weight_zero)
        weight_scale_float = Cast <to = 1> (weight_scale)
        output_major_scale = Transpose <perm = [1, 0]> (weight_scale_float)
        column_scale = Unsqueeze (output_major_scale, rest)
        spread_scale = Expand (column_scale, spread_shape)
        flat_scale = Reshape (spread_scale, flat_shape)
        channel_scale = Slice (flat_scale, none, k, only)
        dequantized = Mul (centred, channel_scale)
        weight_kn = Transpose <perm = [1, 0]> (dequantized)
        y = MatMul (x, weight_kn)
        """,
        uses=(unpack(bits),),
    )
