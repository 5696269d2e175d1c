"""The Scheme: how many bits each kind of tensor gets, spelled `w3a3k3v3` or `w2a16g128`."""

import dataclasses
import re
from collections.abc import Mapping

from planish.plugins.errors import PlanishError
from planish.plugins.packing import PACKED_BITS

__all__ = ["FLOAT_BITS", "LinearFormat", "Scheme", "SchemeError"]

#: The spelling of "left in floating point".
FLOAT_BITS = 16

_LINEAR = r"w(?P<weight>\d+)a(?P<activation>\d+)"
_SCHEME = re.compile(rf"{_LINEAR}(?:k(?P<key>\d+)v(?P<value>\d+)|kv(?P<kv>\d+))?(?:g(?P<group>\d+))?")
_HEAD = re.compile(rf"{_LINEAR}(?:g(?P<group>\d+))?")


class SchemeError(PlanishError):
    """A scheme that cannot be read or cannot be built."""

    exit_code = 18


@dataclasses.dataclass(frozen=True)
class LinearFormat:
    """The format of one linear layer.

    Attributes:
        weight_bits: bits of a weight code; 16 leaves the weight in floating point.
        activation_bits: bits of an activation code; 16 leaves activations in floating point.
        group: input channels that share a weight scale; None is one scale per output channel.
        clip: share of a token's largest magnitude that the activation grid spans, in (0, 1].
    """

    weight_bits: int
    activation_bits: int
    group: int | None = None
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.weight_bits not in (*PACKED_BITS, FLOAT_BITS):
            raise SchemeError(f"{self.weight_bits}-bit weights do not exist here; use 2, 3, 4, 8 or 16 (float).")
        if not (2 <= self.activation_bits <= 8 or self.activation_bits == FLOAT_BITS):
            raise SchemeError(f"{self.activation_bits}-bit activations do not exist here; use 2 to 8, or 16 (float).")
        if self.weight_bits == FLOAT_BITS and self.activation_bits != FLOAT_BITS:
            raise SchemeError(
                "Quantised activations need quantised weights: an integer product has two integer sides. "
                "Give the weights 8 bits, or the activations 16."
            )
        if self.group is not None and (self.group < 16 or self.group & (self.group - 1)):
            raise SchemeError(f"A group of {self.group} channels is not possible; use a power of two, 16 or more.")
        if self.group is not None and self.weight_bits == FLOAT_BITS:
            raise SchemeError("Float weights have no scales, so no groups; drop the 'g...' part.")

    @property
    def is_float(self) -> bool:
        """Whether the layer stays in floating point."""
        return self.weight_bits == FLOAT_BITS

    @property
    def weight_only(self) -> bool:
        """Whether only the weight is quantised."""
        return not self.is_float and self.activation_bits == FLOAT_BITS

    def groups(self, k: int) -> int:
        """Return how many weight scales an output channel of `k` inputs has; the last group may be shorter."""
        return 1 if self.group is None else -(-k // self.group)

    @property
    def scale_bits(self) -> int:
        """Bits of a stored weight scale: float32 for one per output channel, float16 for one per group."""
        return 32 if self.group is None else 16

    def average_bits(self, k: int) -> float:
        """Return the stored bits per weight of a layer with `k` input channels, scales counted."""
        if self.is_float:
            return float(FLOAT_BITS)
        return self.weight_bits + self.groups(k) * self.scale_bits / k

    def __str__(self) -> str:
        return f"w{self.weight_bits}a{self.activation_bits}" + (f"g{self.group}" if self.group else "")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Bits per tensor role of a whole model.

    Attributes:
        linear: the format of the seven linears of every decoder block.
        key_bits: bits of a cached key code (after RoPE); 16 keeps the cache in floating point.
        value_bits: bits of a cached value code; 16 keeps the cache in floating point.
        lm_head: the format of the output projection.
        formats: by decoder block and site, the format of the linears that read the site, where it is another than
            `linear`.
    """

    linear: LinearFormat
    key_bits: int
    value_bits: int
    lm_head: LinearFormat
    formats: Mapping[tuple[int, str], LinearFormat] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for role, bits in (("keys", self.key_bits), ("values", self.value_bits)):
            if bits not in (*PACKED_BITS, FLOAT_BITS):
                raise SchemeError(f"{bits}-bit {role} do not exist here; use 2, 3, 4, 8 or 16 (float).")
        if (self.key_bits == FLOAT_BITS) != (self.value_bits == FLOAT_BITS):
            raise SchemeError(
                "The cache is quantised as a whole: give both keys and values 2, 3, 4 or 8 bits, or both 16."
            )

    @classmethod
    def parse(cls, text: str, lm_head: str | None = None) -> "Scheme":
        """Return the scheme spelled `text`, such as w4a4k4v4, w4a8kv8, w3a3k3v3, w2a16g128 or w16a16k16v16.

        Left out, keys and values stay in floating point. `lm_head` is spelled w8a8 or w4a16g64; left out it is
        w8a8, or stays in floating point where the scheme leaves weights so.

        Raises:
            SchemeError: if the spelling is unknown or the combination cannot be built.
        """
        match = _SCHEME.fullmatch(text.strip().lower())
        if match is None:
            raise SchemeError(
                f"'{text}' is not a scheme. Spell it w<bits>a<bits>[k<bits>v<bits>][g<group>], "
                "for example w4a4k4v4, w3a3k3v3, w4a8kv8 or w2a16g128."
            )
        linear = _linear(match)
        key = int(match["key"] or match["kv"] or FLOAT_BITS)
        value = int(match["value"] or match["kv"] or FLOAT_BITS)
        if lm_head is None:
            # Integers even in weight-only schemes: 8-bit activations cost the logits nothing that can be measured,
            # and the largest matrix of the model would otherwise be the slowest.
            head = linear if linear.is_float else LinearFormat(8, 8)
        else:
            head_match = _HEAD.fullmatch(lm_head.strip().lower())
            if head_match is None:
                raise SchemeError(f"'{lm_head}' is not a format for lm_head. Spell it w8a8, w8a16g64 or w16a16.")
            head = _linear(head_match)
        return cls(linear, key, value, head)

    def block(self, layer: int) -> "Scheme":
        """Return the scheme of decoder block `layer` as that of a model which has no other."""
        of_block = {(0, site): form for (of_layer, site), form in self.formats.items() if of_layer == layer}
        return dataclasses.replace(self, formats=of_block)

    def at(self, site: str, layer: int = 0) -> LinearFormat:
        """Return the format of the linears that read `site` in decoder block `layer`."""
        return self.formats.get((layer, site), self.linear)

    @property
    def quantizes_cache(self) -> bool:
        """Whether the KV cache is held in low-bit codes."""
        return self.key_bits != FLOAT_BITS

    def kv_bytes_per_token(self, layers: int, kv_heads: int, head_dim: int) -> int:
        """Return the bytes one token takes in the cache, scales and zeros counted; a float cache counts 16 bits."""
        scales = 8 if self.quantizes_cache else 0
        return layers * kv_heads * (head_dim * (self.key_bits + self.value_bits) // 8 + scales)

    def __str__(self) -> str:
        linear = self.linear
        group = f"g{linear.group}" if linear.group else ""
        return f"w{linear.weight_bits}a{linear.activation_bits}k{self.key_bits}v{self.value_bits}{group}"


def _linear(match: re.Match[str]) -> LinearFormat:
    group = int(match["group"]) if match["group"] else None
    return LinearFormat(int(match["weight"]), int(match["activation"]), group)
