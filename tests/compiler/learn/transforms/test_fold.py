"""Folding leaves a block as it was, with everything that runs online put in its place by hooks of this test."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.learn.block import Angles, Block, FloatHooks, read_block, run_block
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.fold import fold_block
from planish.passes.transforms import SITES, Site
from tests.tiny import write_tiny


def random_factors(block: Block) -> dict[Site, Factors]:
    """Return a transform at every site with all the parts it may have there, float64."""
    config, generator = block.config, np.random.default_rng(9)
    heads, kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def square(*shape: int) -> Tensor:
        return torch.from_numpy(np.eye(shape[-1]) + 0.1 * generator.normal(size=shape))

    def scale(width: int) -> Tensor:
        return torch.from_numpy(np.exp(0.3 * generator.normal(size=width)))

    hidden, wide = config.hidden_size, config.intermediate_size
    return {
        "attn_in": Factors("affine", scale(hidden), square(1, 8, 8), square(hidden // 8, hidden // 8)),
        "attn_out": Factors("affine", None, None, square(heads, heads)),
        "ffn_in": Factors("affine", scale(hidden), square(hidden // 8, 8, 8), square(hidden // 8, hidden // 8)),
        "ffn_out": Factors("affine", scale(wide), square(1, 16, 16), square(wide // 16, wide // 16)),
        "key": Factors("affine", None, square(kv, d, d)),
        "value": Factors("affine", None, square(kv, d, d)),
    }


class OnlineHooks(FloatHooks):
    """The folded block with its online transforms: factors without scales, and the key map with its inverse."""

    def __init__(self, folded: Block, factors: dict[Site, Factors]) -> None:
        super().__init__(folded)
        self.factors, self.groups = factors, folded.config.groups

    def site(self, site: Site, x: Tensor) -> Tensor:
        return dataclasses.replace(self.factors[site], scale=None).apply(x) if site in self.factors else x

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        right = self.factors["key"].right if "key" in self.factors else None
        if right is None:
            return query, key, value
        inverse = torch.linalg.inv(right.repeat_interleave(self.groups, 0))
        return query @ inverse.mT, key @ right, value


def in_double(block: Block) -> Block:
    return Block(block.config, {name: tensor.double() for name, tensor in block.tensors.items()})


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Block:
    """Grouped queries, heads that are not hidden / heads wide, and a bias wherever there may be one."""
    folder = write_tiny(tmp_path_factory.mktemp("fold") / "tiny", head_dim=24, attention_bias=True, mlp_bias=True)
    return read_block(open_checkpoint(folder), 1)


def change(block: Block, factors: dict[Site, Factors]) -> float:
    """Return how far the folded block is from the float one, in float64 but for the folded weights' float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, block.config.hidden_size, dtype=torch.float64, generator=generator)
    angles = Angles.of(block.config, 12)
    expected = run_block(block.config, FloatHooks(in_double(block)), x, angles)
    found = run_block(block.config, OnlineHooks(in_double(fold_block(block, factors)), factors), x, angles)
    return float((found - expected).norm() / (expected - x).norm())


def test_all_sites_together(block: Block) -> None:
    assert change(block, random_factors(block)) < 1e-6


@pytest.mark.parametrize("site", SITES)
def test_each_site_alone(block: Block, site: Site) -> None:
    assert change(block, {site: random_factors(block)[site]}) < 1e-6
