"""PlanishPack{bits}: codes to bytes, `planish.plugins.packing.pack` in standard ops.

The packed axis must be a multiple of 8 long; head dimensions are.
"""

import functools

from planish.plugins.ops.op import Op

__all__ = ["pack"]

_BODY = {
    2: """
    four = Constant <value = uint8 {4}> ()
    sixteen = Constant <value = uint8 {16}> ()
    sixty_four = Constant <value = uint8 {64}> ()
    c0, c1, c2, c3 = Split <axis = -1, num_outputs = 4> (codes)
    s1 = Mul (c1, four)
    s2 = Mul (c2, sixteen)
    s3 = Mul (c3, sixty_four)
    b1 = Add (c0, s1)
    b2 = Add (b1, s2)
    packed = Add (b2, s3)
    """,
    3: """
    one = Constant <value = uint8 {1}> ()
    two = Constant <value = uint8 {2}> ()
    eight = Constant <value = uint8 {8}> ()
    sixteen = Constant <value = uint8 {16}> ()
    lane_bits = Constant <value = uint8 {17}> ()
    chunks = Constant <value = int64[4] {3, 3, 1, 1}> ()
    eighths = Constant <value_int = 8> ()
    length = Shape <start = -1> (codes)
    eighth = Div (length, eighths)
    sizes = Mul (chunks, eighth)
    low, high, spread_low, spread_high = Split <axis = -1> (codes, sizes)
    high_nibble = Mul (high, sixteen)
    whole = Add (low, high_nibble)
    spread_nibble = Mul (spread_high, sixteen)
    spread = Add (spread_low, spread_nibble)
    shift1 = BitShift <direction = "RIGHT"> (spread, one)
    shift2 = BitShift <direction = "RIGHT"> (spread, two)
    planes = Concat <axis = -1> (spread, shift1, shift2)
    bits = BitwiseAnd (planes, lane_bits)
    spare = Mul (bits, eight)
    packed = Add (whole, spare)
    """,
    4: """
    sixteen = Constant <value = uint8 {16}> ()
    low, high = Split <axis = -1, num_outputs = 2> (codes)
    nibble = Mul (high, sixteen)
    packed = Add (low, nibble)
    """,
    8: """
    packed = Identity (codes)
    """,
}


@functools.cache
def pack(bits: int) -> Op:
    """Return PlanishPack2, 3, 4 or 8."""
    return Op(
        name=f"PlanishPack{bits}",
        inputs={"codes": f"uint8 [..., n], 0 .. {2**bits - 1}, n a multiple of 8"},
        outputs={"packed": f"uint8 [..., n * {bits} / 8], layout of packing.pack"},
        attributes={},
        body=_BODY[bits],
    )
