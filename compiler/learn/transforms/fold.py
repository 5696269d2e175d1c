"""Fold the transforms of a decoder block into its weights, in float64."""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from planish.compiler.learn.block import SITE_MODULES, Block
from planish.compiler.learn.transforms.factors import Factors
from planish.passes.transforms import Site

__all__ = ["fold_block", "reading_factors"]

_NORM_BEFORE: dict[Site, str] = {"attn_in": "input_layernorm", "ffn_in": "post_attention_layernorm"}


def fold_block(block: Block, factors: Mapping[Site, Factors]) -> Block:
    """Return `block` with everything folded that does not run online.

    Its linears then expect rows that went through the online factors; where attention reads keys and queries, it
    expects them mapped by the key map and its inverse. Sites that `factors` lacks are identities.
    """
    value, ffn_out = factors.get("value"), factors.get("ffn_out")
    gains = {norm: factors[site].scale for site, norm in _NORM_BEFORE.items() if site in factors}
    reading = {
        module: reading_factors(block, factors, site) for site, modules in SITE_MODULES.items() for module in modules
    }

    def fold(name: str, tensor: Tensor) -> Tensor:
        module, _, part = name.rpartition(".")
        gain = gains.get(module)
        if gain is not None:
            tensor = tensor * gain.double()
        if module == "self_attn.v_proj" and value is not None and value.right is not None:
            tensor = _map_heads(tensor, value.right.double())
        if module == "mlp.up_proj" and ffn_out is not None and ffn_out.scale is not None:
            rows = ffn_out.scale.double()
            tensor = tensor * (rows[:, None] if part == "weight" else rows)
        if module in reading and part == "weight":
            tensor = reading[module].apply_to_weight(tensor)
        return tensor

    # One tensor at a time is in float64, unless all are kept for a gradient.
    folded = {name: fold(name, tensor.double()).float() for name, tensor in block.tensors.items()}
    return Block(block.config, folded)


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
