"""PlanishQuantizeActivation: symmetric codes of activations, one scale per token, found at run time.

    scale = max(clip * max|x| / (2^(bits-1) - 1), 1e-10)
    codes = clamp(round(x / scale), -2^(bits-1), 2^(bits-1) - 1) + 2^(bits-1)

`round` is half to even. The codes are unsigned because ONNX Runtime's integer kernels want the activation side so.
The factor clip / (2^(bits-1) - 1) is rounded to float32 before it multiplies. It is written -clip / -(...), because
ONNX Runtime rewrites 1 / a * b to b / a, which rounds otherwise.
"""

import functools

from planish.plugins.ops.op import Op

__all__ = ["SMALLEST_SCALE", "quantize_activation"]

#: The scale of an all-zero token: any positive number gives zero codes; this one cannot overflow 1 / scale.
SMALLEST_SCALE = 1e-10


@functools.cache
def quantize_activation() -> Op:
    """Return PlanishQuantizeActivation."""
    return Op(
        name="PlanishQuantizeActivation",
        inputs={"x": "float32 [..., K]"},
        outputs={"codes": "uint8 [..., K], 0 .. 2^bits - 1, zero at 2^(bits-1)", "scale": "float32 [..., 1]"},
        attributes={"bits": "int, 2 .. 8", "clip": "float, share of max|x| that the grid spans, 0 < clip <= 1"},
        body=f"""
        one = Constant <value = float {{1.0}}> ()
        two = Constant <value = float {{2.0}}> ()
        smallest = Constant <value = float {{{SMALLEST_SCALE}}}> ()
        last = Constant <value_ints = [-1]> ()
        bits_int = Constant <value_int: int = @bits> ()
        bits_float = Cast <to = 1> (bits_int)
        magnitude_bits = Sub (bits_float, one)
        zero = Pow (two, magnitude_bits)
        lowest = Neg (zero)
        highest = Sub (zero, one)
        ratio = Constant <value_float: float = @clip> ()
        minus_ratio = Neg (ratio)
        minus_highest = Neg (highest)
        factor = Div (minus_ratio, minus_highest)
        magnitude = Abs (x)
        largest = ReduceMax (magnitude, last)
        spanned = Mul (largest, factor)
        scale = Max (spanned, smallest)
        scaled = Div (x, scale)
        rounded = Round (scaled)
        clamped = Clip (rounded, lowest, highest)
        shifted = Add (clamped, zero)
        codes = Cast <to = 2> (shifted)
        """,
    )
