"""plan.safetensors: the matrices of a model's transforms, float32, with their kinds and clips in its metadata.

High-impact channels lie beside the transform whose channels they are: their order as a tensor, bits and count and clip
in the metadata.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.errors import PlanError
from planish.passes.high_impact import HighImpact
from planish.passes.transforms import SITES, Kind, LayerTransforms, Site, Transform, Transforms

__all__ = ["MATRICES_FILE", "load_transforms", "save_transforms", "site_widths"]

MATRICES_FILE = "plan.safetensors"

_PARTS = ("scale", "right", "left")
_ORDER = "order"
_RESIDUAL, _HEAD = "residual", "lm_head.scale"
#: Key of the metadata whose value is a `_Header` in JSON.
_HEADER = "planish.transforms"
_Tensors = dict[str, npt.NDArray[Any]]

_REMEDY = "Remove it to have the transforms learned again."


class _SiteHeader(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    kind: Kind
    clip: Annotated[float, Field(gt=0, le=1)] | None


class _HighHeader(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    bits: int
    count: int
    clip: float


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1] = 1
    layers: list[dict[Site, _SiteHeader]]
    high: list[dict[Site, _HighHeader]] | None = None


def site_widths(config: LlamaConfig) -> dict[Site, int]:
    """Return how many channels every site of a model has."""
    return {
        "attn_in": config.hidden_size,
        "attn_out": config.q_size,
        "ffn_in": config.hidden_size,
        "ffn_out": config.intermediate_size,
        "key": config.kv_size,
        "value": config.kv_size,
    }


def save_transforms(transforms: Transforms, folder: Path) -> None:
    """Write plan.safetensors into `folder`, whole or not at all.

    The tensors are `layers.{i}.{site}.{scale,right,left}`, `residual` and `lm_head.scale`, each as in `Transform` and
    `Transforms`; a factor that is the identity has none. `layers.{i}.{site}.order`, int32, is that of `HighImpact`.
    """
    of_model = {_RESIDUAL: transforms.residual, _HEAD: transforms.head}
    tensors: _Tensors = {name: each for name, each in of_model.items() if each is not None}
    header = _Header(layers=[])
    for layer, of_layer in enumerate(transforms.layers):
        header.layers.append(
            {site: _SiteHeader(kind=of_layer[site].kind, clip=of_layer.clips.get(site)) for site in SITES}
        )
        for site in SITES:
            for part in _PARTS:
                matrix = getattr(of_layer[site], part)
                if matrix is not None:
                    tensors[f"layers.{layer}.{site}.{part}"] = matrix
        for site, high in of_layer.high.items():
            tensors[f"layers.{layer}.{site}.{_ORDER}"] = high.order.astype(np.int32)
    if any(of_layer.high for of_layer in transforms.layers):
        header.high = [
            {
                site: _HighHeader(bits=each.bits, count=each.count, clip=each.clip)
                for site, each in of_layer.high.items()
            }
            for of_layer in transforms.layers
        ]
    path = folder / MATRICES_FILE
    partial = path.with_name(path.name + ".partial")
    save_file(
        tensors, partial, metadata={_HEADER: header.model_dump_json(exclude={"high"} if header.high is None else None)}
    )
    os.replace(partial, path)


def load_transforms(folder: Path, config: LlamaConfig) -> Transforms:
    """Read plan.safetensors from `folder`, for a model with this config.

    Raises:
        PlanError: if the file is missing, truncated or damaged, a matrix has another shape than the model needs, or
            holds NaN or infinity, or the high-impact channels of a site cannot be; the message names the layer and the
            site.
    """
    path = folder / MATRICES_FILE
    header, tensors = _read(path)
    if len(header.layers) != config.num_hidden_layers:
        raise PlanError(
            f"{path} is of a model with {len(header.layers)} layers, and this one has {config.num_hidden_layers}. "
            f"{_REMEDY}"
        )
    high = header.high or [{}] * len(header.layers)
    if len(high) != len(header.layers):
        raise PlanError(f"{path} has high-impact channels for {len(high)} layers of {len(header.layers)}. {_REMEDY}")
    layers = tuple(
        _layer(path, layer, header.layers[layer], high[layer], tensors, config) for layer in range(len(high))
    )
    residual, head = (tensors.pop(name, None) for name in (_RESIDUAL, _HEAD))
    if tensors:
        raise PlanError(f"{path} holds a matrix '{next(iter(tensors))}' that no transform has. {_REMEDY}")
    if residual is not None and residual.shape != (config.hidden_size, config.hidden_size):
        raise PlanError(
            f"{path}: the residual map has the shape {residual.shape}, and the model the width {config.hidden_size}. "
            f"{_REMEDY}"
        )
    if head is not None and head.shape != (config.hidden_size,):
        raise PlanError(
            f"{path}: the scale of lm_head has the shape {head.shape}, and the model the width {config.hidden_size}. "
            f"{_REMEDY}"
        )
    try:
        return Transforms(layers, residual, head)
    except ValueError as error:
        raise PlanError(f"{path}: {error}. {_REMEDY}") from error


def _read(path: Path) -> tuple[_Header, _Tensors]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise PlanError(f"{path} is missing, truncated or damaged ({error}). {_REMEDY}") from error
    try:
        header = _Header.model_validate_json(metadata.get(_HEADER, ""))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise PlanError(
            f"{path}: its metadata do not describe transforms: {field} {problem['msg']}. {_REMEDY}"
        ) from error
    return header, tensors


def _layer(
    path: Path,
    layer: int,
    sites: dict[Site, _SiteHeader],
    highs: dict[Site, _HighHeader],
    tensors: _Tensors,
    config: LlamaConfig,
) -> LayerTransforms:
    """Build the transforms of one layer of what it takes out of `tensors`."""
    found: dict[Site, Transform] = {}
    for site, width in site_widths(config).items():
        place = f"{path}: layer {layer}, site {site}"
        if site not in sites:
            raise PlanError(f"{place}: there is no entry for it. {_REMEDY}")
        parts = {part: tensors.pop(f"layers.{layer}.{site}.{part}", None) for part in _PARTS}
        for part, matrix in parts.items():
            if matrix is not None and matrix.dtype != np.float32:
                raise PlanError(f"{place}: '{part}' is of type {matrix.dtype}, not float32. {_REMEDY}")
        right = parts["right"]
        if site in ("key", "value") and right is not None and right.shape[-1:] != (config.head_dim,):
            raise PlanError(
                f"{place}: 'right' has the shape {right.shape}, and heads have {config.head_dim} channels. {_REMEDY}"
            )
        try:
            found[site] = Transform(width, sites[site].kind, **parts)
        except ValueError as error:
            raise PlanError(f"{place}: {error}. {_REMEDY}") from error
    clips = {site: clip for site in SITES if (clip := sites[site].clip) is not None}
    high = {site: _high(path, layer, site, each, tensors) for site, each in highs.items()}
    try:
        return LayerTransforms(**found, clips=clips, high=high)
    except ValueError as error:
        raise PlanError(f"{path}: layer {layer}: {error}. {_REMEDY}") from error


def _high(path: Path, layer: int, site: Site, header: _HighHeader, tensors: _Tensors) -> HighImpact:
    place = f"{path}: layer {layer}, site {site}"
    order = tensors.pop(f"layers.{layer}.{site}.{_ORDER}", None)
    if order is None:
        raise PlanError(f"{place}: its high-impact channels have no '{_ORDER}'. {_REMEDY}")
    try:
        return HighImpact(header.bits, order, header.count, header.clip)
    except ValueError as error:
        raise PlanError(f"{place}: {error}. {_REMEDY}") from error
