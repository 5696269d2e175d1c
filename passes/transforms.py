"""Transforms: the invertible maps that flatten what is quantised, and where in a decoder block they stand.

A transform acts on rows, x -> (x * scale) P, and on the weights behind it as W -> (W / scale) P^-T, so that every
product x W^T stays what it was. P is held in two factors. With x read as a matrix of m rows and k columns, n = m k,

    right   multiplies every row from the right: by one [k, k] matrix, or each of the m rows by its own;
    left    mixes the m rows: x -> left^T x, one [m, m] matrix.

That is a Kronecker product left (x) right, a block-diagonal map (no left), a dense one (m = 1), or blocks followed by
a mixing of the blocks, all in one form.
"""

import dataclasses
import re
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from planish.passes.high_impact import HighImpact

__all__ = [
    "SITES",
    "SITE_MODULES",
    "Array",
    "HighImpacts",
    "Kind",
    "LayerTransforms",
    "Site",
    "Transform",
    "Transforms",
    "orthogonal",
    "site_of",
]

Array = npt.NDArray[np.floating[Any]]
Kind = Literal["identity", "rotation", "affine"]
Site = Literal["attn_in", "attn_out", "ffn_in", "ffn_out", "key", "value"]

SITES: tuple[Site, ...] = ("attn_in", "attn_out", "ffn_in", "ffn_out", "key", "value")

#: The sites that are the input of linears -> those linears, named within their block.
SITE_MODULES: dict[Site, tuple[str, ...]] = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "ffn_in": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn_out": ("mlp.down_proj",),
}

#: Decoder block -> site -> its high-impact channels.
HighImpacts = dict[int, dict[Site, HighImpact]]

_Matrix = npt.NDArray[np.float64]
_MODULE = re.compile(r"model\.layers\.(\d+)\.(.+)")
_SITE_OF = {module: site for site, modules in SITE_MODULES.items() for module in modules}
#: How far R^T R of a residual map may be from the identity before `orthogonal` makes up for its float32 entries.
_ORTHOGONAL = 1e-3


def site_of(module: str) -> Site | None:
    """Return the site that a checkpoint module reads from; None outside of the decoder blocks.

    Example:
        >>> site_of("model.layers.3.self_attn.q_proj")
        'attn_in'
    """
    match = _MODULE.fullmatch(module)
    return _SITE_OF.get(match[2]) if match else None


def orthogonal(R: Array) -> _Matrix:
    """Return the float64 orthogonal matrix that a float32 one was rounded from, to 1e-12.

    It is the nearest orthogonal matrix (the polar factor), by Newton's iteration R <- R (3 I - R^T R) / 2. What a
    float32 R is short of being orthogonal, 1e-7, would otherwise stay in every norm behind it.
    """
    result: _Matrix = R.astype(np.float64)
    for _ in range(3):
        result = result @ (1.5 * np.eye(len(result)) - 0.5 * result.T @ result)
    return result


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
        if self.left is not None and self.left.shape[0] != rows:
            return f"has a left factor of {self.left.shape[0]} rows and is read as {rows} x {columns}"
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

    def for_query_heads(self, groups: int) -> "Transform":
        """Return the map of all query heads from that of the KV heads, each of which serves `groups` of them."""
        right = self.right if self.right is None or len(self.right) == 1 else np.repeat(self.right, groups, axis=0)
        return dataclasses.replace(self, width=self.width * groups, right=right)

    def without_scale(self) -> "Transform":
        """Return the factors alone, as they run online."""
        return dataclasses.replace(self, scale=None)

    def apply(self, x: Array) -> _Matrix:
        """Return (x * scale) P, float64 like `x` [..., n]."""
        scaled: _Matrix = x.astype(np.float64)
        if self.scale is not None:
            scaled = scaled * self.scale.astype(np.float64)
        return self._factors(scaled, self.right, self.left)

    def apply_to_weight(self, weight: Array) -> _Matrix:
        """Return (W / scale) P^-T, float64 [..., n]: what undoes `apply` on the other side of a product."""
        scaled: _Matrix = weight.astype(np.float64)
        if self.scale is not None:
            scaled = scaled / self.scale.astype(np.float64)
        right, left = (None if each is None else each.swapaxes(-1, -2) for each in self.inverse_factors())
        return self._factors(scaled, right, left)

    def inverse_factors(self) -> tuple[_Matrix | None, _Matrix | None]:
        """Return the inverse right and left factors, float64; undoing P takes the left one first."""
        return _inverse(self.right), _inverse(self.left)

    def matrix(self) -> _Matrix:
        """Return diag(scale) P as one float64 [n, n] matrix."""
        return self.apply(np.eye(self.width))

    def _factors(self, x: _Matrix, right: Array | None, left: Array | None) -> _Matrix:
        y: _Matrix = x.reshape(-1, *self.grid)
        if right is not None and len(right) == 1:
            y = y @ right[0].astype(np.float64)
        elif right is not None:
            y = (y.swapaxes(0, 1) @ right.astype(np.float64)).swapaxes(0, 1)
        if left is not None:
            y = left.T.astype(np.float64) @ y
        return y.reshape(x.shape)


def _inverse(factor: Array | None) -> _Matrix | None:
    return None if factor is None else np.linalg.inv(factor.astype(np.float64))


@dataclasses.dataclass(frozen=True, eq=False)
class LayerTransforms:
    """The transforms of one decoder block, and the grids behind them: what they span, which channels have finer ones.

    Attributes:
        attn_in: input of q, k, v; its scale folds into the norm gain.
        attn_out: input of o, read as heads x head_dim; only a left factor, which mixes heads.
        ffn_in: input of gate, up; its scale folds into the norm gain.
        ffn_out: input of down; its scale folds into the rows of up.
        key: of every head after RoPE, read as KV heads x head_dim; only a right factor. Queries get its inverse.
        value: of every head, read as KV heads x head_dim; only a right factor, folded into v and o.
        clips: share of a token's largest magnitude that the grid spans, by site; 1 where it is not named.
        high: the high-impact channels among the transformed ones, by site that is the input of linears.
    """

    attn_in: Transform
    attn_out: Transform
    ffn_in: Transform
    ffn_out: Transform
    key: Transform
    value: Transform
    clips: dict[Site, float] = dataclasses.field(default_factory=dict)
    high: dict[Site, HighImpact] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in ("key", "value"):
            if getattr(self, site).scale is not None or getattr(self, site).left is not None:
                raise ValueError(f"the transform at the site {site} maps each head alone: it has only a right factor")
        if self.attn_out.scale is not None:
            raise ValueError("the transform at the site attn_out has no channel scale: nothing could take it up")
        for site, high in self.high.items():
            if site not in SITE_MODULES:
                raise ValueError(f"the site {site} has no high-impact channels: no linear reads it")
            if len(high.order) != self[site].width:
                raise ValueError(
                    f"the site {site} has {self[site].width} channels, and the order of their impact {len(high.order)}"
                )

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
        head: channel scale between the last norm and lm_head, float32 [hidden], never 0: it folds into the gain of the
            norm. None is all ones.
    """

    layers: tuple[LayerTransforms, ...]
    residual: Array | None = None
    head: Array | None = None

    def __post_init__(self) -> None:
        if self.head is not None:
            s = np.ascontiguousarray(self.head, np.float32)
            object.__setattr__(self, "head", s)
            if s.ndim != 1 or not np.all(s) or not np.isfinite(s).all():
                raise ValueError("the channel scale of lm_head is a row of finite numbers, none of them 0")
        if self.residual is None:
            return
        R = np.ascontiguousarray(self.residual, np.float32)
        object.__setattr__(self, "residual", R)
        if R.ndim != 2 or R.shape[0] != R.shape[1]:
            raise ValueError(f"a residual map is a square matrix, and this has the shape {R.shape}")
        off = float(np.abs(R.T @ R - np.eye(len(R), dtype=np.float32)).max())
        if not off <= _ORTHOGONAL:
            raise ValueError(f"a residual map is orthogonal, and R^T R of this one is {off:.2g} from the identity")

    def clip(self, module: str) -> float:
        """Return the activation clip of a linear, such as model.layers.3.self_attn.q_proj; 1 outside of the blocks."""
        match, site = _MODULE.fullmatch(module), site_of(module)
        return self.layers[int(match[1])].clip(site) if match and site else 1.0

    def high(self, module: str) -> HighImpact | None:
        """Return the high-impact channels of the input of a linear; None is none of them."""
        match, site = _MODULE.fullmatch(module), site_of(module)
        return self.layers[int(match[1])].high.get(site) if match and site else None

    def with_high(self, high: HighImpacts) -> "Transforms":
        """Return the same transforms with these high-impact channels, and no others."""
        layers = (dataclasses.replace(of_layer, high=high.get(i, {})) for i, of_layer in enumerate(self.layers))
        return dataclasses.replace(self, layers=tuple(layers))

    def first(self, layers: int) -> "Transforms":
        """Return the transforms of the first `layers` decoder blocks."""
        return dataclasses.replace(self, layers=self.layers[:layers])
