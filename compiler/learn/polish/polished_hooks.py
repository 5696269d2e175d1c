"""A flattened block on its grids, what stays in floating point of it a parameter: see `polish.py`."""

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from planish.compiler.learn.block import MODULES, SITE_MODULES, Block
from planish.compiler.learn.gradient.trainable import round_activation_through, round_cached_through
from planish.compiler.learn.low_bit import LowBitHooks
from planish.compiler.learn.rounding.clip_parameter import clip_of, clip_parameter
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.quantize.arithmetic import channels_of
from planish.passes.high_impact import segments
from planish.passes.scheme import FLOAT_BITS, Scheme
from planish.passes.transforms import SITES, LayerTransforms, Site

__all__ = ["PolishedHooks"]

#: The norm that a site's channel scale folds into.
_NORMS: dict[Site, str] = {"attn_in": "input_layernorm", "ffn_in": "post_attention_layernorm"}


class PolishedHooks(LowBitHooks):
    """A block on its grids, whose gains, row scales and clips are logarithms or logits that learn.

    `weights` are those of segments, by the names that `Segment.of` gives them. What `site` returns has the channels of
    the segments side by side, the high-impact ones first.
    """

    def __init__(
        self,
        folded: Block,
        factors: dict[Site, Factors],
        scheme: Scheme,
        layer: LayerTransforms,
        weights: Mapping[str, Tensor],
    ) -> None:
        # The float weights are not needed any more; with them the model would be in memory twice.
        rest = {name: tensor for name, tensor in folded.tensors.items() if not name.endswith("_proj.weight")}
        super().__init__(Block(folded.config, rest), factors, scheme)
        self.weights = dict(weights)
        sizes = {norm: folded.config.hidden_size for norm in _NORMS.values()}
        sizes |= {module: len(weight) for module, weight in weights.items()}
        device = folded.weight(MODULES[0]).device
        self.learned: dict[str, Tensor] = {
            name: torch.zeros(size, device=device, requires_grad=True) for name, size in sizes.items()
        }
        # A rotation is to stay one.
        affine = {site: each for site, each in self._online.items() if site in SITE_MODULES and each.kind == "affine"}
        for site, each in affine.items():
            for part, factor in (("right", each.right), ("left", each.left)):
                if factor is not None:
                    self.learned[f"{site}.{part}"] = factor.clone().requires_grad_()
        bits: dict[Site, int] = {site: scheme.at(site).activation_bits for site in SITE_MODULES}
        bits |= {"key": scheme.key_bits, "value": scheme.value_bits}
        self._bits = {site: each for site, each in bits.items() if each < 8}
        self._segments = {site: segments(scheme.at(site), layer.high.get(site)) for site in SITE_MODULES}
        self._site_of = {module: site for site, modules in SITE_MODULES.items() for module in modules}
        self._clips: dict[str, float] = {site: layer.clip(site) for site in SITES}
        names: list[str] = [*self._bits]
        for site, (first, *others) in self._segments.items():
            if others:
                self._clips[first.of(site)] = layer.high[site].clip
                names += [first.of(site)] if first.format.activation_bits < 8 else []
        for name in names:
            self.learned[name] = clip_parameter(self._clips[name], device)

    @staticmethod
    def is_map(name: str) -> bool:
        """Say whether what is learned under a name is a factor of a map."""
        return name.endswith((".right", ".left"))

    def gain(self, norm: str) -> Tensor:
        """Return the gain of a norm."""
        return super().gain(norm) * self.learned[norm].exp()

    def transform(self, site: Site, x: Tensor) -> Tensor:
        """Return what runs online at `site`."""
        online = self._online[site]
        right, left = (self.learned.get(f"{site}.{part}") for part in ("right", "left"))
        return dataclasses.replace(
            online, right=online.right if right is None else right, left=online.left if left is None else left
        ).apply(x)

    def site(self, site: Site, x: Tensor) -> Tensor:
        """Return the transformed input on its grid."""
        x = self.transform(site, x)
        parts = []
        for segment in self._segments[site]:
            part, bits = channels_of(x, segment), segment.format.activation_bits
            parts.append(
                part if bits == FLOAT_BITS else round_activation_through(part, bits, self._clip(segment.of(site)))
            )
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def linear(self, module: str, x: Tensor) -> Tensor:
        """Return the output of a rounded linear, bias included."""
        names = [segment.of(module) for segment in self._segments[self._site_of[module]]]
        parts = torch.split(x, [self.weights[name].shape[1] for name in names], -1)
        products = [
            torch.nn.functional.linear(part, self.weights[name]) * self.learned[name].exp()
            for name, part in zip(names, parts, strict=True)
        ]
        y = functools.reduce(torch.add, products)
        bias = self._folded.tensors.get(f"{module}.bias")
        return y if bias is None else y + bias

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, and keys and values as the cache gives them back."""
        query, key = self.map_keys(query, key)
        if self._scheme.quantizes_cache:
            key = round_cached_through(key, self._scheme.key_bits, self._clip("key"))
            value = round_cached_through(value, self._scheme.value_bits, self._clip("value"))
        return query, key, value

    def polished(self, before: LayerTransforms) -> LayerTransforms:
        """Return the transforms of the layer with what was learned."""
        changed = {site: before[site] for site in SITE_MODULES}
        for site, norm in _NORMS.items():
            gain = self.learned[norm].detach().exp().cpu().numpy()
            scale = before[site].scale
            changed[site] = dataclasses.replace(before[site], scale=gain if scale is None else scale * gain)
        for site in SITE_MODULES:
            right, left = (self.learned.get(f"{site}.{part}") for part in ("right", "left"))
            changed[site] = dataclasses.replace(
                changed[site],
                right=changed[site].right if right is None else right.detach().cpu().numpy(),
                left=changed[site].left if left is None else left.detach().cpu().numpy(),
            )
        clips = {**before.clips, **{site: float(clip_of(self.learned[site].detach())) for site in self._bits}}
        high = {
            site: dataclasses.replace(each, clip=float(self._clip(self._segments[site][0].of(site)).detach()))
            for site, each in before.high.items()
        }
        return dataclasses.replace(before, **changed, clips=clips, high=high)

    def _clip(self, name: str) -> Tensor:
        """Return the clip of a site, or of a segment of its channels."""
        return clip_of(self.learned[name]) if name in self.learned else torch.tensor(self._clips[name])
