"""The factors of a transform as PyTorch tensors: what passes/transforms.py defines, on a device and with gradients."""

import dataclasses
from typing import Self

import torch
from torch import Tensor

from planish.passes.transforms import Kind, Transform

__all__ = ["Factors"]


@dataclasses.dataclass(frozen=True)
class Factors:
    """An invertible map x -> (x * scale) P, with P given by `right` and `left` as in `Transform`.

    Attributes:
        kind: identity, rotation or affine.
        scale: [n], or None.
        right: [1, k, k] or [m, k, k], or None.
        left: [m, m], or None.
    """

    kind: Kind
    scale: Tensor | None = None
    right: Tensor | None = None
    left: Tensor | None = None

    @classmethod
    def of(cls, transform: Transform, device: torch.device | None = None) -> Self:
        """Take a stored transform over, in float32."""
        parts = (transform.scale, transform.right, transform.left)
        return cls(transform.kind, *(None if part is None else torch.tensor(part, device=device) for part in parts))

    def stored(self, width: int) -> Transform:
        """Return the transform to store: float32, as it will run."""
        parts = (self.scale, self.right, self.left)
        return Transform(width, self.kind, *(None if part is None else part.detach().cpu().numpy() for part in parts))

    def apply(self, x: Tensor) -> Tensor:
        """Return (x * scale) P like `x` [..., n]."""
        return self._map(x if self.scale is None else x * self.scale.to(x.dtype), self.right, self.left)

    def apply_to_weight(self, weight: Tensor) -> Tensor:
        """Return (W / scale) P^-T like `weight` [out, n], differentiable in the factors."""
        scaled = weight if self.scale is None else weight / self.scale.to(weight.dtype)
        parts = (None if part is None else part.to(weight.dtype) for part in (self.right, self.left))
        return self._map(scaled, *(None if part is None else torch.linalg.inv(part).mT for part in parts))

    @staticmethod
    def _map(x: Tensor, right: Tensor | None, left: Tensor | None) -> Tensor:
        if right is not None:
            right = right.to(x.dtype)
            rows = torch.unflatten(x, -1, (-1, right.shape[-1]))
            # One product per row of the grid, over all tokens at once, where rows have factors of their own.
            by_row = rows.flatten(0, -3).transpose(0, 1) @ right if len(right) > 1 else None
            rows = rows @ right[0] if by_row is None else by_row.transpose(0, 1).reshape(rows.shape)
            x = rows.flatten(-2)
        if left is not None:
            x = (left.to(x.dtype).mT @ torch.unflatten(x, -1, (len(left), -1))).flatten(-2)
        return x
