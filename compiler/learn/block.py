"""One decoder block in PyTorch, with a hook at every place where a transform or a quantiser may stand."""

import dataclasses
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.checkpoint.config import LlamaConfig
from planish.passes.scheme import LinearFormat, Scheme
from planish.passes.transforms import SITE_MODULES, Site

__all__ = [
    "MODULES",
    "SITE_MODULES",
    "Angles",
    "Block",
    "FloatHooks",
    "Flow",
    "Hooks",
    "attend",
    "enter_block",
    "formats_of",
    "read_block",
    "run_block",
    "run_site",
]

#: The linears of a block, named within it.
MODULES = tuple(module for modules in SITE_MODULES.values() for module in modules)


@dataclasses.dataclass(frozen=True)
class Block:
    """The weights of one decoder block.

    Attributes:
        config: of the model.
        tensors: float32 by name within the block, such as self_attn.q_proj.weight, [out, in].
    """

    config: LlamaConfig
    tensors: dict[str, Tensor]

    def weight(self, module: str) -> Tensor:
        """Return a linear's weight, [out, in]."""
        return self.tensors[f"{module}.weight"]

    def to(self, device: torch.device | None) -> "Block":
        """Return the block on `device`; None leaves it where it is."""
        return Block(self.config, {name: tensor.to(device) for name, tensor in self.tensors.items()})


def formats_of(scheme: Scheme) -> dict[str, LinearFormat]:
    """Return the format of every linear of a block, by its name within the block."""
    return {module: scheme.at(site) for site, modules in SITE_MODULES.items() for module in modules}


def read_block(checkpoint: Checkpoint, layer: int) -> Block:
    """Read block `layer` of a checkpoint."""
    prefix = f"model.layers.{layer}."
    names = [name for name in checkpoint.names() if name.startswith(prefix)]
    tensors = {
        name.removeprefix(prefix): torch.from_numpy(checkpoint.tensor(name).astype(np.float32)) for name in names
    }
    return Block(checkpoint.config, tensors)


@dataclasses.dataclass(frozen=True)
class Angles:
    """Rotary angles of positions 0, 1, ...: cos and sin, float32 [seq, head_dim / 2]."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, config: LlamaConfig, length: int, device: torch.device | None = None) -> "Angles":
        """Return the angles of the first `length` positions."""
        angles = torch.arange(length)[:, None].float() * torch.from_numpy(config.inv_freq())
        return cls(angles.cos().to(device), angles.sin().to(device))


class Hooks(Protocol):
    """What stands between the parts of a block. Heads come as [batch, heads, seq, head_dim]."""

    def site(self, site: Site, x: Tensor) -> Tensor:
        """Return what the linears of `site` read instead of `x` [batch, seq, n]."""

    def linear(self, module: str, x: Tensor) -> Tensor:
        """Return the output of a linear, bias included."""

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what attention computes with instead of queries and keys after RoPE, and values."""

    def gain(self, norm: str) -> Tensor:
        """Return the gain of a norm."""


class FloatHooks:
    """The block as the checkpoint has it."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def site(self, site: Site, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def linear(self, module: str, x: Tensor) -> Tensor:
        """Return the output of a linear, bias included."""
        return torch.nn.functional.linear(x, self._block.weight(module), self._block.tensors.get(f"{module}.bias"))

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the arguments."""
        return query, key, value

    def gain(self, norm: str) -> Tensor:
        """Return the gain of a norm."""
        return self._block.weight(norm)


def run_block(config: LlamaConfig, hooks: Hooks, x: Tensor, angles: Angles) -> Tensor:
    """Return the output of a block, float32 like `x` [batch, seq, hidden], without padding or cache."""
    flow = enter_block(config, hooks, x)
    for site in SITE_MODULES:
        flow = run_site(config, hooks, site, flow, angles)
    return flow.residual


@dataclasses.dataclass(frozen=True)
class Flow:
    """What flows between the sites of a block.

    Attributes:
        residual: the residual stream, float32 [batch, seq, hidden].
        x: what comes to the next site, float32 [batch, seq, n].
    """

    residual: Tensor
    x: Tensor


def enter_block(config: LlamaConfig, hooks: Hooks, x: Tensor) -> Flow:
    """Return what comes to `attn_in`, the first site, given the input of the block."""
    return Flow(x, _norm(x, hooks.gain("input_layernorm"), config.rms_norm_eps))


def run_site(config: LlamaConfig, hooks: Hooks, site: Site, flow: Flow, angles: Angles) -> Flow:
    """Return what comes to the site behind `site`; behind the last one, `ffn_out`, the block's output, twice."""
    x = hooks.site(site, flow.x)
    if site == "attn_in":
        query, key, value = (
            torch.unflatten(hooks.linear(module, x), -1, (-1, config.head_dim)).transpose(1, 2)
            for module in SITE_MODULES["attn_in"]
        )
        query, key, value = hooks.heads(_rotate(query, angles), _rotate(key, angles), value)
        return Flow(flow.residual, attend(query, key, value))
    if site == "attn_out":
        residual = flow.residual + hooks.linear("self_attn.o_proj", x)
        return Flow(residual, _norm(residual, hooks.gain("post_attention_layernorm"), config.rms_norm_eps))
    if site == "ffn_in":
        hidden = torch.nn.functional.silu(hooks.linear("mlp.gate_proj", x)) * hooks.linear("mlp.up_proj", x)
        return Flow(flow.residual, hidden)
    output = flow.residual + hooks.linear("mlp.down_proj", x)
    return Flow(output, output)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the output of causal attention, [batch, seq, heads * d]; heads come as [batch, heads, seq, d].

    Queries are of all tokens that have keys, or of the last one alone, which sees all of them.
    """
    grouped = query.shape[1] > key.shape[1]
    if grouped and query.device.type != "cpu":
        # On a GPU, float32 heads that share keys have no kernel but the one that holds all scores.
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
        grouped = False
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=query.shape[2] > 1, enable_gqa=grouped
    )
    return attended.transpose(1, 2).flatten(2)


def _norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    return gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon))


def _rotate(x: Tensor, angles: Angles) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * angles.cos - second * angles.sin, second * angles.cos + first * angles.sin], -1)
