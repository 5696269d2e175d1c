"""Transforms: the invertible maps that flatten what is quantised, and where in a decoder block they stand.

A transform acts on rows, x -> (x * scale) P, and on the weights behind it as W -> (W / scale) P^-T, so that every
product x W^T stays what it was. P is held in two factors. With x read as a matrix of m rows and k columns, n = m k,

    right   multiplies every row from the right: by one [k, k] matrix, or each of the m rows by its own;
    left    mixes the m rows: x -> left^T x, one [m, m] matrix.

That is a Kronecker product left (x) right, a block-diagonal map (no left), a dense one (m = 1), or blocks followed by
a mixing of the blocks, all in one form.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["SITES", "Array", "Kind", "LayerTransforms", "Site", "Transform", "Transforms"]

Array = npt.NDArray[np.floating[Any]]
Kind = Literal["identity", "rotation", "affine"]
Site = Literal["attn_in", "attn_out", "ffn_in", "ffn_out", "key", "value"]

SITES: tuple[Site, ...] = ("attn_in", "attn_out", "ffn_in", "ffn_out", "key", "value")

_Matrix = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Transform:
    """One invertible map of rows of `width` = m k channels.

    Attributes:
        width: channels, n.
        kind: identity, rotation (P is orthogonal) or affine; says nothing of the scale.
        scale: channel scale, float32 [n], never 0; None is all ones.
        right: float32 [1, k, k] or [m, k, k]; None is the identity.
        left: float32 [m, m]; None is the identity.
    """

    width: int
    kind: Kind = "identity"
    scale: Array | None = None
    right: Array | None = None
    left: Array | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "right", "left"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, np.ascontiguousarray(given, np.float32))
        problem = self._problem()
        if problem:
            raise ValueError(f"a transform of {self.width} channels {problem}")

    def _problem(self) -> str | None:
        if self.scale is not None and (self.scale.shape != (self.width,) or not np.all(self.scale)):
            return "needs as many channel scales, none of them 0"
        if self.right is not None and (self.right.ndim != 3 or self.right.shape[1] != self.right.shape[2]):
            return f"has a right factor of shape {self.right.shape}"
        if self.left is not None and (self.left.ndim != 2 or self.left.shape[0] != self.left.shape[1]):
            return f"has a left factor of shape {self.left.shape}"
        rows, columns = self.grid
        if rows * columns != self.width:
            return f"cannot be read as {rows} x {columns}"
        if self.right is not None and self.right.shape[0] not in (1, rows):
            return f"has {self.right.shape[0]} right factors for {rows} rows"
        if not all(np.isfinite(each).all() for each in (self.scale, self.right, self.left) if each is not None):
            return "holds NaN or infinity"
        return None

    @property
    def grid(self) -> tuple[int, int]:
        """The shape (m, k) in which the factors read a row."""
        if self.right is not None:
            return self.width // self.right.shape[1], self.right.shape[1]
        if self.left is not None:
            return self.left.shape[0], self.width // self.left.shape[0]
        return 1, self.width

    @property
    def is_identity(self) -> bool:
        """Whether rows pass unchanged."""
        return self.scale is None and not self.has_matrix

    @property
    def has_matrix(self) -> bool:
        """Whether there is anything but the channel scale."""
        return self.right is not None or self.left is not None

    @property
    def flops(self) -> int:
        """Floating-point operations per token of the factors, a multiplication and an addition counted as two."""
        rows, columns = self.grid
        return 2 * self.width * ((columns if self.right is not None else 0) + (rows if self.left is not None else 0))

    def without_scale(self) -> "Transform":
        """Return the factors alone, as they run online."""
        return dataclasses.replace(self, scale=None)

    def apply(self, x: Array) -> _Matrix:
        """Return (x * scale) P, float64 like `x` [..., n]."""
        scaled = x.astype(np.float64) if self.scale is None else x * self.scale.astype(np.float64)
        return self._factors(scaled, self.right, self.left)

    def apply_to_weight(self, weight: Array) -> _Matrix:
        """Return (W / scale) P^-T, float64 [..., n]: what undoes `apply` on the other side of a product."""
        scaled = weight.astype(np.float64) if self.scale is None else weight / self.scale.astype(np.float64)
        return self._factors(scaled, _inverse_transposed(self.right), _inverse_transposed(self.left))

    def matrix(self) -> _Matrix:
        """Return diag(scale) P as one float64 [n, n] matrix."""
        return self.apply(np.eye(self.width))

    def _factors(self, x: _Matrix, right: Array | None, left: Array | None) -> _Matrix:
        rows, columns = self.grid
        y = x.reshape(*x.shape[:-1], rows, columns)
        if right is not None:
            y = np.einsum("...mk,mkj->...mj", y, np.broadcast_to(right, (rows, columns, columns)), optimize=True)
        if left is not None:
            y = left.T @ y
        return y.reshape(x.shape)


def _inverse_transposed(factor: Array | None) -> _Matrix | None:
    return None if factor is None else np.linalg.inv(factor.astype(np.float64)).swapaxes(-1, -2)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerTransforms:
    """The transforms of one decoder block, and how much of its range each activation grid spans.

    Attributes:
        attn_in: input of q, k, v; its scale folds into the norm gain.
        attn_out: input of o, read as heads x head_dim; only a left factor, which mixes heads.
        ffn_in: input of gate, up; its scale folds into the norm gain.
        ffn_out: input of down; its scale folds into the rows of up.
        key: of every head after RoPE, read as KV heads x head_dim; only a right factor. Queries get its inverse.
        value: of every head, read as KV heads x head_dim; only a right factor, folded into v and o.
        clips: share of a token's largest magnitude that the grid spans, by site; 1 where it is not named.
    """

    attn_in: Transform
    attn_out: Transform
    ffn_in: Transform
    ffn_out: Transform
    key: Transform
    value: Transform
    clips: dict[Site, float] = dataclasses.field(default_factory=dict)

    def __getitem__(self, site: Site) -> Transform:
        transform: Transform = getattr(self, site)
        return transform

    def clip(self, site: Site) -> float:
        """Return the clip of `site`."""
        return self.clips.get(site, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Transforms:
    """The transforms of a model.

    Attributes:
        layers: one per decoder block.
        residual: orthogonal map of the residual stream, float32 [hidden, hidden], folded everywhere; None is none.
            Where it stands, norm gains are folded into the weights behind them first.
    """

    layers: tuple[LayerTransforms, ...]
    residual: Array | None = None
