"""PlanishTransform{Right,Rows,Left,RightLeft,RowsLeft}: an invertible map of the channels, at run time.

A row of n = m k channels is read as a matrix X of m rows and k columns:

    Right   Y = X right             one matrix for all rows
    Rows    Y[i] = X[i] right[i]    each row has its own
    Left    Y = left^T X            mixes the rows
    RightLeft, RowsLeft             first the right factor, then the left one

Right and left together are the Kronecker product of FlatQuant, Left after Rows a block-diagonal map and a mixing of
the blocks. The factors are inputs, not constants of the body, so that all layers share one function.
"""

import functools
from typing import Literal

from planish.plugins.ops.op import Op

__all__ = ["Right", "transform"]

#: The form of the right factor: one matrix, one per row, or none.
Right = Literal["Right", "Rows", ""]

_INPUT = {"Right": "float [k, k]", "Rows": "float [m, k, k], one matrix per row"}
#: The shape in which x is read.
_SHAPE = {
    "Right": """
        keep = Constant <value_ints = [0, 0]> ()
        k = Shape <start = 1, end = 2> (right)
        grid = Concat <axis = 0> (keep, rest, k)
    """,
    "Rows": """
        m_and_k = Shape <start = 0, end = 2> (right)
        grid = Concat <axis = 0> (rest, m_and_k)
    """,
    "": """
        keep = Constant <value_ints = [0, 0]> ()
        m = Shape <start = 0, end = 1> (left)
        grid = Concat <axis = 0> (keep, m, rest)
    """,
}
#: x_grid to right_done.
_PRODUCT = {
    "Right": "right_done = MatMul (x_grid, right)",
    # Rows are the batch of the product, with all tokens inside, so that a matrix is read once; with the tokens
    # outside ONNX Runtime multiplies T m vectors, one after the other.
    "Rows": """
        rows_first = Transpose <perm = [1, 0, 2]> (x_grid)
        product = MatMul (rows_first, right)
        right_done = Transpose <perm = [1, 0, 2]> (product)
    """,
    "": "",
}


@functools.cache
def transform(right: Right, left: bool) -> Op:
    """Return the op with a right factor of form `right` and, if `left`, a left factor.

    Raises:
        ValueError: if it would have no factor at all.
    """
    if not right and not left:
        raise ValueError("a transform without factors is no op: leave x as it is")
    inputs = {"x": "float [batch, sequence, n], n = m k, row-major; the factors have its type"}
    if right:
        inputs["right"] = _INPUT[right]
    y_grid, left_product = ("right_done", "") if right else ("x_grid", "")
    if left:
        inputs["left"] = "float [m, m]; multiplies transposed, from the left"
        left_product = f"""
        left_transposed = Transpose <perm = [1, 0]> (left)
        left_done = MatMul (left_transposed, {y_grid})
        """
        y_grid = "left_done"
    # The form Rows reads batch and sequence as one axis, so only x knows its shape.
    shape = "Shape (x)" if right == "Rows" else "Concat <axis = 0> (keep, rest)"
    return Op(
        name=f"PlanishTransform{right}{'Left' if left else ''}",
        inputs=inputs,
        outputs={"y": "float [batch, sequence, n]"},
        attributes={},
        body=f"""
        rest = Constant <value_ints = [-1]> ()
        {_SHAPE[right]}
        x_grid = Reshape (x, grid)
        {_PRODUCT[right]}
        {left_product}
        shape = {shape}
        y = Reshape ({y_grid}, shape)
        """,
    )
