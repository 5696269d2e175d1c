"""Online transforms in a graph: build the planish op that multiplies by factors, and read the factors back."""

import numpy as np
import onnx_ir as ir

from planish.passes.blocks import initializer_of
from planish.passes.builder import Builder
from planish.passes.declare import declare
from planish.passes.transforms import Array, Transform
from planish.plugins.ops import DOMAIN, transform
from planish.plugins.ops.transform import Right

__all__ = ["factors_of", "multiply"]


def multiply(
    model: ir.Model,
    build: Builder,
    x: ir.Value,
    factors: tuple[Array | None, Array | None],
    name: str,
    dtype: ir.DataType,
) -> ir.Value:
    """Return x P for the right and left factors of P, at least one of them; see `Transform` for their shapes.

    The factors become initializers `{name}.right` and `{name}.left` of type `dtype`, and the function of the op is
    declared in `model`.
    """
    right, left = factors
    inputs = [x]
    form: Right = "" if right is None else "Right" if len(right) == 1 else "Rows"
    for part, factor in (("right", right[0] if right is not None and len(right) == 1 else right), ("left", left)):
        if factor is not None:
            array = np.ascontiguousarray(factor, dtype.numpy())
            inputs.append(build.initializer(array, f"{name}.{part}"))
    op = transform(form, left is not None)
    declare(model, op)
    return build.op(op.name, inputs, name, domain=DOMAIN)


def factors_of(node: ir.Node, width: int) -> Transform:
    """Return the transform of `width` channels that the node of a planish transform op multiplies by.

    Raises:
        GraphError: if a factor is no initializer.
    """
    right = left = None
    tensors = [initializer_of(node, i).const_value for i in range(1, len(node.inputs))]
    arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
    if node.op_type.endswith("Left"):
        left = arrays.pop()
    if arrays:
        right = arrays[0].reshape(-1, *arrays[0].shape[-2:])
    return Transform(width, "affine", right=right, left=left)
