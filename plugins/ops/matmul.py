"""PlanishMatMul{bits}: activation codes times packed weight codes, in integers.

    y[t, n] = scale[t] * sum_g weight_scale[g, n] * sum_{k in g} (codes[t, k] - 2^(a-1)) * (w[n, k] - 2^(bits-1))

with a the activation bits. The inner sum is an exact int32. `group` consecutive input channels share a weight
scale; the last group is shorter where `group` does not divide K. One scale per output channel is `group` = K.
"""

import functools

from planish.plugins.ops.op import Op
from planish.plugins.ops.unpack import unpack

__all__ = ["matmul"]


@functools.cache
def matmul(bits: int) -> Op:
    """Return PlanishMatMul2, 3, 4 or 8, named by the bits of the weight codes."""
    return Op(
        name=f"PlanishMatMul{bits}",
        inputs={
            "codes": "uint8 [batch, sequence, K], from PlanishQuantizeActivation",
            "scale": "float32 [batch, sequence, 1], from PlanishQuantizeActivation",
            "weight": f"uint8 [N, packed_size(K, {bits})], layout of packing.pack",
            "weight_scale": "float32 [1, N], or float16 [ceil(K / group), N]",
        },
        outputs={"y": "float32 [batch, sequence, N]"},
        attributes={
            "k": "int, the number of input channels",
            "group": "int, input channels to a weight scale",
            "activation_bits": "int, 2 .. 8",
        },
        body=f"""
        one = Constant <value = float {{1.0}}> ()
        two = Constant <value = float {{2.0}}> ()
        none = Constant <value_ints = [0]> ()
        only = Constant <value_ints = [1]> ()
        rest = Constant <value_ints = [-1]> ()
        weight_zero = Constant <value = uint8 {{{1 << bits - 1}}}> ()
        activation_bits_int = Constant <value_int: int = @activation_bits> ()
        activation_bits_float = Cast <to = 1> (activation_bits_int)
        magnitude_bits = Sub (activation_bits_float, one)
        zero_float = Pow (two, magnitude_bits)
        zero = Cast <to = 2> (zero_float)
        k_scalar = Constant <value_int: int = @k> ()
        k = Reshape (k_scalar, only)
        group_scalar = Constant <value_int: int = @group> ()
        group = Reshape (group_scalar, only)
        groups = Shape <start = 0, end = 1> (weight_scale)
        whole = Mul (groups, group)
        padding = Sub (whole, k)
        pads = Concat <axis = 0> (none, padding)
        grouping = Concat <axis = 0> (rest, groups, group)

        stored = {unpack(bits).call} (weight)
        unpadded = Slice (stored, none, k, only)
        whole_weight = Pad (unpadded, pads, weight_zero, only)
        grouped_weight = Reshape (whole_weight, grouping)
        group_major_weight = Transpose <perm = [1, 2, 0]> (grouped_weight)
        whole_codes = Pad (codes, pads, zero, rest)
        grouped_codes = Reshape (whole_codes, grouping)
        group_major_codes = Transpose <perm = [1, 0, 2]> (grouped_codes)

        products = MatMulInteger (group_major_codes, group_major_weight, zero, weight_zero)
        products_float = Cast <to = 1> (products)
        weight_scale_float = Cast <to = 1> (weight_scale)
        group_scale = Unsqueeze (weight_scale_float, only)
        scaled = Mul (products_float, group_scale)
        summed = ReduceSum <keepdims = 0> (scaled, none)
        outer = Shape <start = 0, end = 2> (codes)
        y_shape = Concat <axis = 0> (outer, rest)
        shaped = Reshape (summed, y_shape)
        y = Mul (shaped, scale)
        """,
        uses=(unpack(bits),),
    )
