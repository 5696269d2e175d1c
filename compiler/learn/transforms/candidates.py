"""The forms a transform may take at a site, each in closed form from the moments there.

Every form but `identity` carries the RMS channel scale, which folds away, so that forms differ in what runs online.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from planish.compiler.learn.transforms.closed_forms import (
    block_means,
    geometric_mean,
    kronecker_means,
    rms_scale,
    whiten_and_mix,
)
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.hadamard import hadamard_transform
from planish.passes.transforms import Kind

__all__ = ["FORMS", "Form", "closed_form", "kind_of"]

Form = Literal["identity", "hadamard", "rotation", "smooth", "kronecker", "blocks32", "blocks64", "blocks128", "dense"]


def kind_of(form: Form) -> Kind:
    """Return the kind that a form is of; the scale, which every kind may have, does not count."""
    if form == "identity":
        return "identity"
    return "rotation" if form in ("hadamard", "rotation", "smooth") else "affine"


def closed_form(form: Form, inputs: Tensor, weights: Tensor, seed: int) -> Factors:
    """Return the transform of a form.

    Args:
        form: one of `FORMS`.
        inputs: Sx = E[x^T x], float64 [n, n].
        weights: Sw = E[w^T w] over the rows of all weights that read x, float64 [n, n].
        seed: of the random signs of the rotations.
    """
    return FORMS[form](inputs, weights, seed)


def _identity(inputs: Tensor, weights: Tensor, seed: int) -> Factors:
    return Factors("identity")


def _plain_hadamard(inputs: Tensor, weights: Tensor, seed: int) -> Factors:
    return _mixing(len(inputs), seed)


def _rotation(inputs: Tensor, weights: Tensor, seed: int) -> Factors:
    mixing = _mixing(len(inputs), seed)
    assert mixing.scale is not None
    scale = rms_scale(inputs.diagonal(), weights.diagonal())
    return Factors("rotation", mixing.scale.to(scale) * scale, mixing.right, mixing.left)


def _kronecker(inputs: Tensor, weights: Tensor, seed: int) -> Factors:
    mixing, scale = _mixing(len(inputs), seed), rms_scale(inputs.diagonal(), weights.diagonal())
    if mixing.left is None:
        return _dense(inputs, weights, seed)
    scaled = inputs * scale * scale[:, None], weights / scale / scale[:, None]
    left, right, left_moment, right_moment = kronecker_means(*scaled, len(mixing.left))
    assert mixing.right is not None
    return Factors(
        "affine",
        scale,
        whiten_and_mix(right, right_moment, mixing.right[0].to(right))[None],
        whiten_and_mix(left, left_moment, mixing.left.to(left)),
    )


def _blocks(size: int) -> Callable[[Tensor, Tensor, int], Factors]:
    def blocks(inputs: Tensor, weights: Tensor, seed: int) -> Factors:
        n = len(inputs)
        if n <= size:
            return _dense(inputs, weights, seed)
        if n % size:
            return blocks_of_divisor(inputs, weights, seed)
        metric, moments = block_means(inputs, weights, size)
        right = whiten_and_mix(metric, moments, _dense_mixing(size, seed).to(metric))
        return Factors("affine", None, right, _dense_mixing(n // size, seed + 1).to(metric))

    def blocks_of_divisor(inputs: Tensor, weights: Tensor, seed: int) -> Factors:
        divisor = max(d for d in range(1, size + 1) if len(inputs) % d == 0)
        return _blocks(divisor)(inputs, weights, seed) if divisor > 1 else _rotation(inputs, weights, seed)

    return blocks


def _dense(inputs: Tensor, weights: Tensor, seed: int) -> Factors:
    mixing = _dense_mixing(len(inputs), seed).to(inputs)
    return Factors("affine", None, whiten_and_mix(geometric_mean(inputs, weights), inputs, mixing)[None])


def _mixing(width: int, seed: int) -> Factors:
    return Factors.of(hadamard_transform(width, seed))


def _dense_mixing(width: int, seed: int) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(hadamard_transform(width, seed).without_scale().matrix()))


#: By form: (Sx, Sw, seed) -> the transform. `smooth` is not in closed form; see `smooth_site`.
FORMS: dict[Form, Callable[[Tensor, Tensor, int], Factors]] = {
    "identity": _identity,
    "hadamard": _plain_hadamard,
    "rotation": _rotation,
    "kronecker": _kronecker,
    "blocks32": _blocks(32),
    "blocks64": _blocks(64),
    "blocks128": _blocks(128),
    "dense": _dense,
}
