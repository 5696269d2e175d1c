"""Fold the transforms of a decoder block into its weights, in float64."""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from planish.compiler.learn.block import SITE_MODULES, Block
from planish.compiler.learn.factors import Factors
from planish.passes.transforms import Site

__all__ = ["fold_block", "reading_factors"]

_NORM_BEFORE: dict[Site, str] = {"attn_in": "input_layernorm", "ffn_in": "post_attention_layernorm"}


def fold_block(block: Block, factors: Mapping[Site, Factors]) -> Block:
    """Return `block` with everything folded that does not run online.

    Its linears then expect rows that went through the online factors; where attention reads keys and queries, it
    expects them mapped by the key map and its inverse. Sites that `factors` lacks are identities.
    """
    tensors = {name: tensor.double() for name, tensor in block.tensors.items()}
    value, ffn_out = factors.get("value"), factors.get("ffn_out")
    if value is not None and value.right is not None:
        for name in ("self_attn.v_proj.weight", "self_attn.v_proj.bias"):
            if name in tensors:
                tensors[name] = _map_heads(tensors[name], value.right.double())
    if ffn_out is not None and ffn_out.scale is not None:
        rows = ffn_out.scale.double()
        tensors["mlp.up_proj.weight"] = tensors["mlp.up_proj.weight"] * rows[:, None]
        if "mlp.up_proj.bias" in tensors:
            tensors["mlp.up_proj.bias"] = tensors["mlp.up_proj.bias"] * rows
    for site, norm in _NORM_BEFORE.items():
        scale = factors[site].scale if site in factors else None
        if scale is not None:
            tensors[f"{norm}.weight"] = tensors[f"{norm}.weight"] * scale.double()
    for site, modules in SITE_MODULES.items():
        reading = reading_factors(block, factors, site)
        for module in modules:
            tensors[f"{module}.weight"] = reading.apply_to_weight(tensors[f"{module}.weight"])
    return Block(block.config, {name: tensor.float() for name, tensor in tensors.items()})


def reading_factors(block: Block, factors: Mapping[Site, Factors], site: Site) -> Factors:
    """Return the whole map between what the float block has at `site` and what the folded linears there read.

    That is more than what runs online only at attn_out, where the value map was folded into v.
    """
    own = factors.get(site, Factors("identity"))
    value = factors.get("value")
    if site != "attn_out" or value is None or value.right is None:
        return own
    config = block.config
    per_head = value.right.expand(config.num_key_value_heads, -1, -1).repeat_interleave(config.groups, 0)
    return dataclasses.replace(own, right=per_head)


def _map_heads(tensor: Tensor, right: Tensor) -> Tensor:
    """Return the output channels of a value weight [heads * d, in], or bias, mapped head by head: v -> v V."""
    heads = tensor.reshape(-1, right.shape[-1], *tensor.shape[1:])
    mapped = right.mT @ (heads if tensor.ndim == 2 else heads[..., None])
    return mapped.reshape(tensor.shape)
