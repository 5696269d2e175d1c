"""PlanishAppendKv{bits}: quantise new keys (after RoPE) or values and append them to the packed cache.

Asymmetric, one scale and one zero per token and KV head, both float16. The grid spans the share `clip` of the range,
about the middle of it:

    span  = max x - min x
    zero  = float16(min x + span * ((1 - clip) / 2)),   scale = float16(max(span / ((2^bits - 1) / clip), 2^-14))
    codes = clamp(round((x - zero) / scale), 0, 2^bits - 1),   x ~ codes * scale + zero

`round` is half to even; 2^-14 is the smallest normal float16. The two quotients of `clip` are float32 numbers; at
clip 1 they are 0 and 2^bits - 1, and change nothing.
"""

import functools

from planish.plugins.ops.op import Op
from planish.plugins.ops.pack import pack

__all__ = ["SMALLEST_KV_SCALE", "append_kv"]

#: The smallest normal float16, so that the scale of a constant row keeps its precision.
SMALLEST_KV_SCALE = 2.0**-14


@functools.cache
def append_kv(bits: int) -> Op:
    """Return PlanishAppendKv2, 3, 4 or 8."""
    return Op(
        name=f"PlanishAppendKv{bits}",
        inputs={
            "x": "float32 [batch, kv_heads, sequence, head_dim]",
            "past": f"uint8 [batch, kv_heads, past, head_dim * {bits} / 8], layout of packing.pack",
            "past_scale": "float16 [batch, kv_heads, past, 2], scale then zero",
        },
        outputs={
            "present": f"uint8 [batch, kv_heads, past + sequence, head_dim * {bits} / 8]",
            "present_scale": "float16 [batch, kv_heads, past + sequence, 2]",
        },
        attributes={"clip": "float, share of the range max x - min x that the grid spans, 0 < clip <= 1"},
        body=f"""
        last = Constant <value_ints = [-1]> ()
        nothing = Constant <value = float {{0.0}}> ()
        one = Constant <value = float {{1.0}}> ()
        two = Constant <value = float {{2.0}}> ()
        highest = Constant <value = float {{{2**bits - 1}.0}}> ()
        smallest = Constant <value = float {{{SMALLEST_KV_SCALE}}}> ()
        ratio = Constant <value_float: float = @clip> ()
        levels = Div (highest, ratio)
        outside = Sub (one, ratio)
        margin = Div (outside, two)
        maximum = ReduceMax (x, last)
        minimum = ReduceMin (x, last)
        span = Sub (maximum, minimum)
        step = Div (span, levels)
        bounded = Max (step, smallest)
        left_out = Mul (span, margin)
        lowest = Add (minimum, left_out)
        scale_half = Cast <to = 10> (bounded)
        zero_half = Cast <to = 10> (lowest)
        new_scale = Concat <axis = -1> (scale_half, zero_half)
        scale = Cast <to = 1> (scale_half)
        zero = Cast <to = 1> (zero_half)
        offset = Sub (x, zero)
        scaled = Div (offset, scale)
        rounded = Round (scaled)
        clamped = Clip (rounded, nothing, highest)
        codes = Cast <to = 2> (clamped)
        new = {pack(bits).call} (codes)
        present = Concat <axis = 2> (past, new)
        present_scale = Concat <axis = 2> (past_scale, new_scale)
        """,
        uses=(pack(bits),),
    )
