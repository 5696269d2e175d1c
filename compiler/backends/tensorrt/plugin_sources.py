"""What may be part of a plugin: norms and residuals where tokens are quantised, silu(gate) * up behind a linear.

All of it is read off the graph; nothing is changed here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from planish.compiler.backends.tensorrt.surgery import Surgery
from planish.plugins.ops import DOMAIN

__all__ = ["Source", "gated_result", "sources_of"]

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """What a plugin makes codes of: transform(norm(x + residual)), any part of which may be missing.

    Attributes:
        x: the tokens.
        residual: what is added to them; None is nothing.
        total: the sum, which others read too; None where nothing is added.
        gain: of the norm, a constant; None is no norm.
        epsilon: of the norm.
        factors: `right` and `left` of the transform.
    """

    x: Any
    residual: Any = None
    total: Any = None
    gain: Any = None
    epsilon: float = 0.0
    factors: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    @property
    def attributes(self) -> dict[str, float]:
        """Return the attributes of the plugin that say what there is; those of the factors are left out."""
        added, normed = int(self.residual is not None), int(self.gain is not None)
        return {"added": added, "normed": normed, "epsilon": self.epsilon}

    @property
    def inputs(self) -> list[Any]:
        """Return the inputs of the plugin, before the factors."""
        return [each for each in (self.x, self.residual, self.gain) if each is not None]


def sources_of(surgery: Surgery, x: Any) -> list[Source]:
    """Return what may be quantised instead of `x` to the same codes: as much as possible in one first, `x` last."""
    behind = _before_norm(surgery, Source(x))
    transform = surgery.producer(x)
    if transform is None or not transform.op.startswith("PlanishTransform") or transform.domain != DOMAIN:
        return [behind]
    arrays = [surgery.array(each).astype(np.float32) for each in transform.inputs[1:]]
    factors = {}
    if transform.op.endswith("Left"):
        factors["left"] = arrays.pop()
    if arrays:
        factors["right"] = arrays[0].reshape(-1, *arrays[0].shape[-2:])
    return [_before_norm(surgery, Source(transform.inputs[0], factors=factors)), behind]


def _before_norm(surgery: Surgery, source: Source) -> Source:
    """Return a source with the norm, and the residual before that, if that is what makes its tokens."""
    norm = surgery.producer(source.x)
    if norm is None or norm.op != "RMSNormalization" or norm.attrs.get("axis", -1) != -1:
        return source
    x, gain = norm.inputs
    if not _is_constant(gain) or gain.dtype != np.float32:
        return source
    normed = dataclasses.replace(source, x=x, gain=gain, epsilon=float(norm.attrs.get("epsilon", 1e-5)))
    add = surgery.producer(x)
    # A bias is a constant, and no residual.
    if add is None or add.op != "Add" or any(map(_is_constant, add.inputs)):
        return normed
    return dataclasses.replace(normed, x=add.inputs[0], residual=add.inputs[1], total=x)


def gated_result(surgery: Surgery, y: Any) -> Any | None:
    """Return silu(gate) * up if `y` holds gate and then up, equally wide, and nothing else reads either; else None."""
    split = _only_reader(y, "Split")
    if split is None or len(split.outputs) != 2 or split.attrs.get("axis", 0) != -1 or len(split.inputs) != 2:
        return None
    first, second = surgery.array(split.inputs[1])
    if first != second:
        return None
    gate, up = split.outputs
    sigmoids = [node for node in gate.outputs if node.op == "Sigmoid"]
    silu = _only_reader(sigmoids[0].outputs[0], "Mul") if len(sigmoids) == 1 else None
    if silu is None or {id(node) for node in gate.outputs} != {id(sigmoids[0]), id(silu)}:
        return None
    product = _only_reader(silu.outputs[0], "Mul")
    if _only_reader(up, "Mul") is not product or product is None:
        return None
    return product.outputs[0]


def _only_reader(tensor: Any, op: str) -> Any | None:
    """Return the node that reads a tensor, if there is one alone, and it is an `op`."""
    if len(tensor.outputs) != 1 or tensor.outputs[0].op != op:
        return None
    return tensor.outputs[0]


def _is_constant(tensor: Any) -> bool:
    return hasattr(tensor, "_values")
