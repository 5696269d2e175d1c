"""A tiny decoder block and streams through it that are hard to round: loud channels, and a massive token."""

import tempfile
from pathlib import Path

import torch

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.learn.block import Angles, Block, FloatHooks, read_block, run_block
from planish.compiler.learn.streams import Streams
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.site_factors import closed_form_factors
from planish.compiler.learn.transforms.site_moments import SiteMoments, gather_moments
from planish.compiler.select.forms import forms_of_groups
from planish.passes.transforms import Kind, Site
from tests.tiny import VARIANTS, write_tiny

__all__ = ["SEQ", "block_of", "factors_of", "float_outputs", "moments_of", "streams_of"]

SEQ = 16


def block_of(variant: str = "gqa") -> Block:
    """Return the first block of a tiny checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        return read_block(open_checkpoint(write_tiny(Path(folder), **VARIANTS[variant])), 0)


def streams_of(block: Block, sequences: int = 8) -> Streams:
    """Return streams of which the last two sequences are held out; `seen` is off `target` by a few percent."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(sequences, SEQ, block.config.hidden_size, generator=generator)
    target[..., :4] *= 6
    target[:, 0] *= 20
    seen = target * (1 + 0.03 * torch.randn(target.shape, generator=generator))
    return Streams(target, seen, held_out=2)


def float_outputs(block: Block, streams: Streams) -> torch.Tensor:
    """Return what the float block makes of the float stream."""
    return run_block(block.config, FloatHooks(block), streams.target, Angles.of(block.config, SEQ))


def moments_of(block: Block, streams: Streams) -> SiteMoments:
    """Return the moments on all sequences that are not held out."""
    angles = Angles.of(block.config, SEQ)
    return gather_moments(block, (streams.target[part] for part in streams.batches()), angles)


def factors_of(block: Block, streams: Streams, kind: Kind) -> dict[Site, Factors]:
    """Return the closed forms of one kind at all sites."""
    return closed_form_factors(block, moments_of(block, streams), forms_of_groups({"attn": kind, "ffn": kind}), seed=1)
