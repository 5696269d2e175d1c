"""The transforms of all sites of one block, in closed form but for the form `smooth`."""

import torch

from planish.compiler.learn.block import Angles, Block
from planish.compiler.learn.smooth.site_form import smooth_ffn_out
from planish.compiler.learn.streams import Sequences, Streams
from planish.compiler.learn.transforms.candidates import Form, closed_form
from planish.compiler.learn.transforms.closed_forms import head_transforms
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.hadamard import hadamard_transform
from planish.compiler.learn.transforms.site_moments import SiteMoments, gather_moments
from planish.passes.scheme import Scheme
from planish.passes.transforms import Site

__all__ = ["closed_form_factors", "fit_factors"]


def fit_factors(
    block: Block,
    streams: Streams,
    outputs: Sequences,
    angles: Angles,
    scheme: Scheme,
    forms: dict[Site, Form],
    seed: int,
) -> tuple[dict[Site, Factors], dict[str, float]]:
    """Return the transform of every site, fitted to the `seen` stream, and what was measured for the form `smooth`.

    Args:
        block: the float block.
        streams: its inputs.
        outputs: of the float block.
        angles: of the positions.
        scheme: what will be rounded to.
        forms: by site.
        seed: of the rotations.
    """
    inputs = (streams.seen[part] for part in streams.batches())
    smooth = forms["ffn_out"] == "smooth"
    closed: dict[Site, Form] = {**forms, "ffn_out": "rotation"} if smooth else forms
    # The moments are not kept: they are several times as large as the block.
    factors = closed_form_factors(block, gather_moments(block, inputs, angles), closed, seed)
    if not smooth:
        return factors, {}
    factors["ffn_out"], scales = smooth_ffn_out(block, streams, outputs, angles, scheme, seed)
    return factors, scales


def closed_form_factors(block: Block, moments: SiteMoments, forms: dict[Site, Form], seed: int) -> dict[Site, Factors]:
    """Return the closed-form transform of every site, on the device of the moments.

    `key` and `value` know identity, rotation and dense.
    """
    config, device = block.config, moments.keys.device
    factors: dict[Site, Factors] = {}
    stored = {"key": (moments.keys, moments.queries), "value": (moments.values, moments.value_readers)}
    for site, form in forms.items():
        if site in stored:
            mixing = torch.from_numpy(hadamard_transform(config.head_dim, seed).without_scale().matrix())
            if form == "identity":
                factors[site] = Factors("identity")
            elif form in ("hadamard", "rotation"):
                factors[site] = Factors("rotation", None, mixing[None].expand(config.num_key_value_heads, -1, -1))
            else:
                factors[site] = Factors("affine", None, head_transforms(*stored[site], mixing.to(moments.keys)))
        elif site == "attn_out":
            heads = config.num_attention_heads
            left = torch.from_numpy(hadamard_transform(heads, seed).without_scale().matrix())
            factors[site] = Factors("identity") if form == "identity" or heads == 1 else Factors("rotation", left=left)
        else:
            factors[site] = closed_form(form, moments.inputs[site], moments.weights[site], seed)
    # As they will be stored: what is folded must be the inverse of what runs.
    return {
        site: Factors(
            each.kind,
            *(None if part is None else part.float().to(device) for part in (each.scale, each.right, each.left)),
        )
        for site, each in factors.items()
    }
