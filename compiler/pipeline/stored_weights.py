"""How many bytes weights take as each form of a model stores them, from shapes alone."""

import dataclasses
from collections.abc import Callable
from math import prod

from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.checkpoint.tensors import expected_tensors
from planish.compiler.select.channel_split import ChannelSplit
from planish.compiler.select.high_channels import HighPolicy
from planish.compiler.select.ratios import Counts, Shapes, counts_of_share, fixed_counts
from planish.passes.formats import format_of
from planish.passes.scheme import LinearFormat, Scheme
from planish.passes.transforms import SITE_MODULES, Site, site_of

__all__ = ["FOR_ENGINES", "FOR_ORT", "PACKED", "HighShares", "Storage", "blocks_bytes", "model_bytes"]

#: Channels that share a scale in MatMulNBits where a whole output channel has one.
_BLOCK = 128
_EMBEDDINGS = "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Storage:
    """How one form of a model stores a linear.

    Attributes:
        of_linear: bytes of a linear of a format, output channels and input channels.
        spreads_rest: whether channels that are not high-impact ones stay where they are, among zeros.
    """

    of_linear: Callable[[LinearFormat, int, int], int]
    spreads_rest: bool = False


def _packed(form: LinearFormat, rows: int, k: int) -> int:
    if form.is_float:
        return 4 * rows * k
    return rows * (-(-k * form.weight_bits // 8) + form.groups(k) * form.scale_bits // 8)


def _for_ort(form: LinearFormat, rows: int, k: int) -> int:
    if form.is_float:
        return 4 * rows * k
    if not form.weight_only:
        return rows * (k + 4 * form.groups(k))
    block = form.group if form.group is not None and form.group < k else _BLOCK
    return rows * -(-k // block) * (block * max(form.weight_bits, 4) // 8 + 4)


def _for_engines(form: LinearFormat, rows: int, k: int) -> int:
    if form.is_float:
        return 2 * rows * k
    return rows * (k * (4 if form.weight_bits <= 4 else 8) // 8 + 2 * form.groups(k))


PACKED, FOR_ORT, FOR_ENGINES = Storage(_packed), Storage(_for_ort, spreads_rest=True), Storage(_for_engines)


@dataclasses.dataclass(frozen=True)
class HighShares:
    """High-impact channels that are the same share of a site in all blocks, as far as a policy tells before it runs.

    Attributes:
        split: how they are stored.
        counts: by site, how many there are; as `solved` leaves no bits unused, no multiple of a step.
    """

    split: ChannelSplit
    counts: Counts

    @classmethod
    def of(cls, config: LlamaConfig, form: LinearFormat, policy: HighPolicy) -> "HighShares":
        """Return those of a policy.

        Raises:
            SelectionError: if a share cannot be met, or a budget is below what low bits take.
        """
        split, shapes = ChannelSplit.of(form, policy.bits), _shapes(config)
        if policy.share is not None:
            counts = counts_of_share(shapes, split, policy.share)
        else:
            assert policy.average is not None
            counts = fixed_counts(shapes, split, policy.average)
            if policy.name == "solved":
                share = _share_of(split, shapes, policy.average)
                counts = {site: round(share * k) for site, (_, k) in shapes.items()}
        return cls(split, counts)

    def bytes_of(self, storage: Storage, site: Site, rows: int, k: int) -> int:
        """Return the bytes of a linear whose input channels at `site` are in two parts, their order not counted."""
        count = self.counts[site]
        if not count:
            return storage.of_linear(self.split.low, rows, k)
        rest = k if storage.spreads_rest and self.split.low.group is None else k - count
        return storage.of_linear(self.split.high, rows, count) + storage.of_linear(self.split.low, rows, rest)


def model_bytes(config: LlamaConfig, scheme: Scheme, storage: Storage, high: HighShares | None = None) -> int:
    """Return the bytes of all weights: linears, embeddings, norms and biases.

    Args:
        config: of the model.
        scheme: formats of its linears.
        storage: how a linear of a decoder block, and the output projection, are stored.
        high: high-impact channels; None is none.
    """
    total = blocks_bytes(config, scheme, storage, high)
    for name, shape in expected_tensors(config).items():
        if name == _EMBEDDINGS:
            total += prod(shape) * (4 if scheme.linear.is_float else 2)
        elif not name.endswith("_proj.weight") and name != "lm_head.weight":
            total += 4 * prod(shape)
    # In floating point, a tied output projection reads the embeddings.
    if not (scheme.lm_head.is_float and config.tie_word_embeddings):
        total += storage.of_linear(scheme.lm_head, config.vocab_size, config.hidden_size)
    return total


def blocks_bytes(config: LlamaConfig, scheme: Scheme, storage: Storage, high: HighShares | None = None) -> int:
    """Return the bytes of the linears of all decoder blocks, orders of channels counted; see `model_bytes`."""
    total = 0
    for name, (rows, k) in _linears(config).items():
        site = site_of(name)
        assert site is not None
        if high is None:
            total += storage.of_linear(format_of(scheme, name), rows, k)
        else:
            total += high.bytes_of(storage, site, rows, k)
    if high is not None:
        ordered = sum(k for site, (_, k) in _shapes(config).items() if high.counts[site])
        total += config.num_hidden_layers * ordered * high.split.index_bits // 8
    return total


def _linears(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Return the linears of the decoder blocks and their shapes [out, in]."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in expected_tensors(config).items()
        if name.endswith("_proj.weight")
    }


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Return the shape [out, in] of the linears of each site of a block, one below the other."""
    linears = _linears(config)
    found: dict[str, tuple[int, int]] = {}
    for site, modules in SITE_MODULES.items():
        shapes = [linears[f"model.layers.0.{module}"] for module in modules]
        found[site] = sum(rows for rows, _ in shapes), shapes[0][1]
    return found


def _share_of(split: ChannelSplit, shapes: Shapes, average: float) -> float:
    """Return the share of channels, the same everywhere, that takes `average` bits per weight, 0 at least."""
    weights = sum(rows * k for rows, k in shapes.values())
    # What stands for itself: scales, and, where there are high channels at all, those of both parts and the order.
    one = {site: split.stored_bits(shape, split.step) for site, shape in shapes.items()}
    per_channel = split.high.weight_bits - split.low.weight_bits
    none = sum(bits - shapes[site][0] * split.step * per_channel for site, bits in one.items())
    return max(0.0, (average * weights - none) / (weights * per_channel))
