"""PlanishUnpack{bits}: bytes to codes, the inverse of `planish.plugins.packing.pack`."""

import functools

from planish.plugins.ops.op import Op

__all__ = ["unpack"]

_BODY = {
    2: """
    two = Constant <value = uint8 {2}> ()
    four = Constant <value = uint8 {4}> ()
    six = Constant <value = uint8 {6}> ()
    mask = Constant <value = uint8 {3}> ()
    c0 = BitwiseAnd (packed, mask)
    s1 = BitShift <direction = "RIGHT"> (packed, two)
    c1 = BitwiseAnd (s1, mask)
    s2 = BitShift <direction = "RIGHT"> (packed, four)
    c2 = BitwiseAnd (s2, mask)
    c3 = BitShift <direction = "RIGHT"> (packed, six)
    codes = Concat <axis = -1> (c0, c1, c2, c3)
    """,
    3: """
    one = Constant <value = uint8 {1}> ()
    two = Constant <value = uint8 {2}> ()
    three = Constant <value = uint8 {3}> ()
    four = Constant <value = uint8 {4}> ()
    low_bits = Constant <value = uint8 {7}> ()
    lane_bits = Constant <value = uint8 {17}> ()
    low = BitwiseAnd (packed, low_bits)
    shifted = BitShift <direction = "RIGHT"> (packed, four)
    high = BitwiseAnd (shifted, low_bits)
    spare = BitShift <direction = "RIGHT"> (packed, three)
    planes = BitwiseAnd (spare, lane_bits)
    plane0, plane1, plane2 = Split <axis = -1, num_outputs = 3> (planes)
    bit1 = BitShift <direction = "LEFT"> (plane1, one)
    bit2 = BitShift <direction = "LEFT"> (plane2, two)
    bits01 = BitwiseOr (plane0, bit1)
    spread = BitwiseOr (bits01, bit2)
    spread_low = BitwiseAnd (spread, low_bits)
    spread_high = BitShift <direction = "RIGHT"> (spread, four)
    codes = Concat <axis = -1> (low, high, spread_low, spread_high)
    """,
    4: """
    four = Constant <value = uint8 {4}> ()
    mask = Constant <value = uint8 {15}> ()
    low = BitwiseAnd (packed, mask)
    high = BitShift <direction = "RIGHT"> (packed, four)
    codes = Concat <axis = -1> (low, high)
    """,
    8: """
    codes = Identity (packed)
    """,
}


@functools.cache
def unpack(bits: int) -> Op:
    """Return PlanishUnpack2, 3, 4 or 8; the codes keep the padding of the packed axis."""
    return Op(
        name=f"PlanishUnpack{bits}",
        inputs={"packed": f"uint8 [..., bytes], layout of packing.pack for {bits} bits"},
        outputs={"codes": f"uint8 [..., bytes * 8 / {bits}], 0 .. {2**bits - 1}"},
        attributes={},
        body=_BODY[bits],
    )
