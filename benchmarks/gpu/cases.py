"""What is measured: pairs of calls, ours and the peer's, on random weights that take turns.

A case is made on its device when it is measured, and its memory is free when it is done.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.gpu.shapes import LAYERS, Shape, copies_for, linear_bytes
from planish.plugins.kernel_layout import padded_channels
from planish.plugins.linear_ops import DeviceWeight, linear, weight_only_linear
from planish.plugins.token_ops import QuantizedTokens, TokenSegment, best_order, quantize_tokens, spread_workspace

__all__ = ["Case", "Pair", "all_cases"]

Calls = list[Callable[[], object]]

#: Channels of a head.
HEAD = 128
#: Share of channels that are high-impact ones, and the most time that they may add.
HIGH_SHARE, HIGH_COST = 0.125, 1.08
_MM, _INT4, _COPY, _W3A3 = "torch.mm fp16", "torch._weight_int4pack_mm", "copy of the rows", "w3a3"


@dataclasses.dataclass(frozen=True)
class Pair:
    """The calls of a case: ours, and those of the peer, each over weights that take turns."""

    ours: Calls
    peer: Calls


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: model and linear.
        tokens: how many.
        what: ours.
        peer: what it is compared with.
        goal: time of the peer over ours, at least; None where none is set.
        bytes_moved: by ours, at least.
        operations: of ours, a multiply-add is two.
        int8: whether the operations are on int8.
        make: the calls, on a device.
    """

    name: str
    tokens: int
    what: str
    peer: str
    goal: float | None
    bytes_moved: float
    operations: float
    int8: bool
    make: Callable[[torch.device], Pair]


def random_weight(rows: int, channels: int, bits: int, device: torch.device) -> DeviceWeight:
    """Return a weight of random codes: every pattern of bits is one."""
    row_tiles = -(-rows // 16)
    words = padded_channels(channels, bits) * 16 * bits // 32
    return DeviceWeight(
        torch.randint(-(1 << 31), 1 << 31, (row_tiles, words), dtype=torch.int32, device=device),
        torch.zeros(row_tiles * 16, dtype=torch.int32, device=device),
        torch.full((rows,), 0.01, device=device),
        channels,
        bits,
    )


def random_halves(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, device=device).half()


def random_factors(shape: Shape, device: torch.device) -> dict[str, torch.Tensor]:
    m, k = shape.factors
    return {"right": torch.randn(k, k, device=device) / k**0.5, "left": torch.randn(m, m, device=device) / m**0.5}


def random_mixing(lines: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return a mixing of blocks, or of heads."""
    return {"left": torch.randn(lines, lines, device=device) / lines**0.5}


def random_blocks(shape: Shape, device: torch.device) -> dict[str, torch.Tensor]:
    """Return a block-diagonal map of blocks of 64 channels, and the mixing behind it."""
    blocks = shape.channels // 64
    return {"right": torch.randn(blocks, 64, 64, device=device) / 8} | random_mixing(blocks, device)


#: What comes before codes -> its factors and, to a channel, its multiply-adds.
TRANSFORMS: dict[str, tuple[Callable[[Shape, torch.device], dict[str, torch.Tensor]], Callable[[Shape], int]]] = {
    "quantise": (lambda shape, device: {}, lambda shape: 0),
    "transform and quantise": (random_factors, lambda shape: sum(shape.factors)),
    "blocks of 64, mixed, and quantise": (random_blocks, lambda shape: 64 + shape.channels // 64),
    "heads mixed and quantise": (
        lambda shape, device: random_mixing(shape.channels // HEAD, device),
        lambda shape: shape.channels // HEAD,
    ),
}


def tokens_for(shape: Shape, tokens: int, high: int, device: torch.device) -> QuantizedTokens:
    """Return quantised tokens, `high` of whose channels have 4 bits, in the order that is fastest here."""
    segments = [TokenSegment(shape.channels - high, 3, 3)]
    if high:
        segments.insert(0, TokenSegment(high, 4, 4))
    order = best_order(tokens, 4 if high else 3, device)
    return quantize_tokens(random_halves(tokens, shape.channels, device=device), segments, order=order)


def our_linears(shape: Shape, tokens: int, high: int, device: torch.device) -> Calls:
    x = tokens_for(shape, tokens, high, device)
    out = torch.empty(tokens, shape.rows, dtype=torch.float16, device=device)
    calls: Calls = []
    for _ in range(copies_for(shape.channels * shape.rows * 3 / 8)):
        low = random_weight(shape.rows, shape.channels - high, 3, device)
        some = random_weight(shape.rows, high, 4, device) if high else None
        calls.append(lambda low=low, some=some: linear(x, low, some, out=out))  # type: ignore[misc]
    return calls


def matrix_products(shape: Shape, tokens: int, device: torch.device) -> Calls:
    """Return fp16 products of torch.mm, weights stored as [rows, channels] like those of nn.Linear."""
    x = random_halves(tokens, shape.channels, device=device)
    out = torch.empty(tokens, shape.rows, dtype=torch.float16, device=device)
    weights = [
        random_halves(shape.rows, shape.channels, device=device)
        for _ in range(copies_for(shape.channels * shape.rows * 2))
    ]
    return [lambda weight=weight: torch.mm(x, weight.T, out=out) for weight in weights]  # type: ignore[misc]


def int4_products(shape: Shape, tokens: int, device: torch.device) -> Calls:
    """Return products of bfloat16 activations by int4 weights in groups of 128."""
    x = random_halves(tokens, shape.channels, device=device).bfloat16()
    scales = torch.ones(shape.channels // 128, shape.rows, 2, dtype=torch.bfloat16, device=device)
    calls: Calls = []
    for _ in range(copies_for(shape.channels * shape.rows / 2)):
        codes = torch.randint(256, (shape.rows, shape.channels // 2), dtype=torch.uint8, device=device)
        packed = torch._convert_weight_to_int4pack(codes, 8)
        calls.append(lambda packed=packed: torch._weight_int4pack_mm(x, packed, 128, scales))  # type: ignore[misc]
    return calls


def linear_case(model: str, shape: Shape, tokens: int, goal: float | None) -> Case:
    return Case(
        f"{model} {shape.name}", tokens, _W3A3, _MM, goal, linear_bytes(shape, tokens, 3, 8),
        2 * tokens * shape.channels * shape.rows, True,
        lambda device: Pair(our_linears(shape, tokens, 0, device), matrix_products(shape, tokens, device)),
    )  # fmt: skip


def int4_case(model: str, shape: Shape, goal: float) -> Case:
    case = linear_case(model, shape, 1, goal)
    return dataclasses.replace(
        case, peer=_INT4,
        make=lambda device: Pair(our_linears(shape, 1, 0, device), int4_products(shape, 1, device)),
    )  # fmt: skip


def high_case(model: str, shape: Shape, tokens: int) -> Case:
    high = round(shape.channels * HIGH_SHARE / 64) * 64
    case = linear_case(model, shape, tokens, 1 / HIGH_COST)
    return dataclasses.replace(
        case, what=f"w3a3, {HIGH_SHARE:.1%} w4a4", peer=_W3A3,
        bytes_moved=linear_bytes(shape, tokens, 3 + high / shape.channels, 8),
        make=lambda device: Pair(our_linears(shape, tokens, high, device), our_linears(shape, tokens, 0, device)),
    )  # fmt: skip


def weight_only_case(model: str, shape: Shape, tokens: int, bits: int) -> Case:
    def ours(device: torch.device) -> Calls:
        x = random_halves(tokens, shape.channels, device=device)
        out = torch.empty(tokens, shape.rows, dtype=torch.float16, device=device)
        weights = [
            random_weight(shape.rows, shape.channels, bits, device)
            for _ in range(copies_for(shape.channels * shape.rows * bits / 8))
        ]
        return [lambda weight=weight: weight_only_linear(x, weight, out=out) for weight in weights]  # type: ignore[misc]

    case = linear_case(model, shape, tokens, None)
    return dataclasses.replace(
        case, what=f"w{bits}a16", int8=False, bytes_moved=linear_bytes(shape, tokens, bits, 16),
        make=lambda device: Pair(ours(device), matrix_products(shape, tokens, device)),
    )  # fmt: skip


def quantise_case(model: str, shape: Shape, tokens: int, what: str, goal: float | None) -> Case:
    """Return the row of one of `TRANSFORMS` and quantisation, beside a copy of the float16 rows."""
    factors_of, products = TRANSFORMS[what]

    def make(device: torch.device) -> Pair:
        factors = factors_of(shape, device)
        order = best_order(tokens, 3, device)
        segments = [TokenSegment(shape.channels, 3, 3)]
        ours: Calls = []
        peer: Calls = []
        for _ in range(copies_for(tokens * shape.channels * 2) if tokens > 16 else 8):
            x = random_halves(tokens, shape.channels, device=device)
            out, copied = QuantizedTokens.empty(tokens, segments, order, device), torch.empty_like(x)
            room = {"out": out, "workspace": spread_workspace(x, factors.get("right"))}
            ours.append(lambda x=x, room=room: quantize_tokens(x, segments, order=order, **room, **factors))  # type: ignore[misc]
            peer.append(lambda x=x, copied=copied: copied.copy_(x))  # type: ignore[misc]
        return Pair(ours, peer)

    size = tokens * shape.channels
    operations = 2 * size * products(shape)
    return Case(f"{model} {shape.name}", tokens, what, _COPY, goal, 3 * size, operations, False, make)


def layer_calls(shapes: Sequence[Shape], tokens: int, device: torch.device) -> Calls:
    """Return whole layers: residual, norm, transform and quantisation in front of every linear; gate and up fused."""
    copies = copies_for(sum(shape.channels * shape.rows for shape in shapes) * 3 / 8)
    order = best_order(tokens, 3, device)
    parts = []
    for shape in shapes:
        segments = [TokenSegment(shape.channels, 3, 3)]
        gated, normed = shape.name == "gate_up", shape.name in ("qkv", "gate_up")
        prologue: dict[str, torch.Tensor | float] = dict(random_factors(shape, device))
        x = random_halves(tokens, shape.channels, device=device)
        if normed:
            prologue |= {"residual": torch.zeros_like(x), "sum_out": torch.empty_like(x), "epsilon": 1e-5}
            prologue["gain"] = torch.ones(shape.channels, device=device)
        rows = shape.rows // 2 if gated else shape.rows
        out = torch.empty(tokens, rows, dtype=torch.float16, device=device)
        parts.append((shape, segments, gated, prologue, x, QuantizedTokens.empty(tokens, segments, order, device), out))

    def layer(weights: list[DeviceWeight]) -> None:
        for (_, segments, gated, prologue, x, room, out), weight in zip(parts, weights, strict=True):
            quantize_tokens(x, segments, order=order, out=room, **prologue)  # type: ignore[arg-type]
            linear(room, weight, gated=gated, out=out)

    calls: Calls = []
    for _ in range(copies):
        weights = [random_weight(shape.rows, shape.channels, 3, device) for shape in shapes]
        calls.append(lambda weights=weights: layer(weights))  # type: ignore[misc]
    return calls


def layer_case(model: str, shapes: Sequence[Shape], tokens: int, goal: float | None) -> Case:
    def peer(device: torch.device) -> Calls:
        turns = [matrix_products(shape, tokens, device) for shape in shapes]
        return [lambda i=i: [each[i % len(each)]() for each in turns] for i in range(2)]  # type: ignore[misc]

    return Case(
        f"{model} layer", tokens, "w3a3 with prologues", _MM, goal,
        sum(linear_bytes(shape, tokens, 3, 8) for shape in shapes),
        sum(2 * tokens * shape.channels * shape.rows for shape in shapes), True,
        lambda device: Pair(layer_calls(shapes, tokens, device), peer(device)),
    )  # fmt: skip


#: Goals on an H100, by linear: of one token against torch.mm.
ONE_TOKEN = {"gate_up": 4.0, "down": 3.3, "qkv": 2.5, "o": 2.0}


def all_cases() -> Iterator[Case]:
    """Yield every row of the table."""
    for model, shapes in LAYERS.items():
        first, widest = shapes[0], shapes[3]
        for what in TRANSFORMS:
            yield quantise_case(model, first, 2048, what, 1 / 1.5)
            yield quantise_case(model, widest, 2048, what, 1 / 1.5)
            yield quantise_case(model, first, 1, what, None)
        for shape in shapes:
            yield linear_case(model, shape, 1, ONE_TOKEN[shape.name])
            yield int4_case(model, shape, 1.2)
            yield high_case(model, shape, 1)
            yield linear_case(model, shape, 16, 3.5 if shape.name == "gate_up" else None)
            yield linear_case(model, shape, 2048, 1.5)
            yield high_case(model, shape, 2048)
            yield weight_only_case(model, shape, 1, 3)
            yield weight_only_case(model, shape, 1, 4)
        yield layer_case(model, shapes, 1, 3.2)
        yield layer_case(model, shapes, 16, None)
        yield layer_case(model, shapes, 2048, None)
