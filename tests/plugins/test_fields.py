"""Fields of packed bytes, times the field matrix, are the codes."""

import numpy as np
import pytest

from planish.plugins.fields import FIELD_MULTIPLIERS, field_matrix
from planish.plugins.packing import pack


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [8, 64, 96])
def test_fields_give_the_codes(bits: int, n: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (500, n)).astype(np.uint8)
    codes[0], codes[1] = 0, (1 << bits) - 1
    packed = pack(codes, bits)
    fields = np.concatenate([packed * np.uint8(m) for m in FIELD_MULTIPLIERS[bits]], axis=-1)
    matrix = field_matrix(bits, n)
    np.testing.assert_array_equal(matrix, matrix.astype(np.float32))
    np.testing.assert_array_equal(fields.astype(np.float64) @ matrix, codes)
