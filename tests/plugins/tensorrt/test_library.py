"""The plugin library, driven by a host that stands for TensorRT, does what its contracts and the planish ops say."""

import ctypes
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from planish.plugins.kernel_layout import KernelWeight, gated_rows, pack_for_kernel
from planish.plugins.ops import append_kv, attend, matmul, quantize_activation
from planish.plugins.packing import pack
from planish.plugins.tensorrt.contract import Contract
from planish.plugins.tensorrt.plugins import KV_APPEND, KV_ATTEND, LAYOUT, LINEAR, PLUGINS, QUANTIZE_TOKENS
from tests.onnx_run import run_op
from tests.plugin_host import Host, Plugin, load_host, need_headers

Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def host() -> Host:
    need_headers()
    return load_host()


def linear(**changes: float) -> dict[str, float]:
    return {
        "layout": LAYOUT,
        "bits": 3,
        "channels": 80,
        "high_channels": 0,
        "rows": 40,
        "code_bits": 4,
        "type": 0,
        "gated": 0,
        **changes,
    }


def tokens(**changes: float) -> dict[str, float]:
    base = {"layout": LAYOUT, "bits": 3, "channels": 80, "high_channels": 0, "activation_bits": 3, "clip": 1.0,
            "high_activation_bits": 4, "high_clip": 1.0, "m": 1, "k": 80, "right_count": 0, "has_left": 0,
            "permuted": 0, "added": 0, "normed": 0, "epsilon": 0.0}  # fmt: skip
    return {**base, **changes}


def cache(**changes: float) -> dict[str, float]:
    return {"layout": LAYOUT, "kv_heads": 2, "head_dim": 64, "context": 32, "key_bits": 3, "value_bits": 2, **changes}


def made(host: Host, contract: Contract, attributes: dict[str, float]) -> Plugin:
    plugin = host.create(contract, attributes)
    assert plugin is not None, host.said()
    return plugin


def floats(shape: Sequence[int], seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def int32(array: Array) -> Array:
    return np.ascontiguousarray(array).view(np.int32)


# What the library is.


def test_every_contract_has_a_creator(host: Host) -> None:
    for contract in PLUGINS:
        assert host.creator(contract)
        assert host.field_names(contract) == [each.name for each in contract.attributes]
        assert host.creator(contract, version="999") is None
        assert host.creator(contract, namespace="") is None


def test_the_library_says_what_it_is(host: Host) -> None:
    host.library.planish_plugins.restype = ctypes.c_char_p
    told = json.loads(host.library.planish_plugins())
    assert told["plugins"] == {contract.name: contract.version for contract in PLUGINS}
    assert told["layout"] == LAYOUT
    assert len(told["tensorrt"]) == 3
    assert 90 in told["sms"]


# What is refused while an engine is built.


@pytest.mark.parametrize(
    ("contract", "attributes", "words"),
    [
        (LINEAR, linear(bits=8), "PlanishLinear: weights of 8 bits have no kernel; weights of 2, 3 and 4 bits have"),
        (LINEAR, linear(layout=LAYOUT + 1), f"PlanishLinear: the model is packed in layout {LAYOUT + 1}, and this"),
        (LINEAR, {"layout": LAYOUT}, "PlanishLinear lacks the attribute 'bits' (bits of the weights of all other"),
        (QUANTIZE_TOKENS, tokens(clip=1.5), "PlanishQuantizeTokens: clips of 1.5 and 1;"),
        (KV_APPEND, {**cache(head_dim=80), "key_clip": 1, "value_clip": 1}, "heads of 80 channels have no kernel"),
        (KV_ATTEND, {**cache(), "heads": 5}, "PlanishKvAttend: 5 query heads cannot share 2 KV heads"),
    ],
)
def test_attributes_are_refused_in_words(
    host: Host, contract: Contract, attributes: dict[str, float], words: str
) -> None:
    assert host.create(contract, attributes) is None
    assert words in host.said()


def test_an_attribute_of_another_type(host: Host) -> None:
    assert host.create(LINEAR, linear(), kinds={"rows": "float"}) is None
    assert host.said() == "PlanishLinear: the attribute 'rows' is one int32"


def test_shapes_are_refused_in_words(host: Host) -> None:
    plugin = made(host, LINEAR, linear())
    inputs = [("int32", (2, 64)), ("float32", (2, 1)), ("int32", (2, 1, 2)),
              ("int32", (3, 384)), ("float32", (40,)), ("int32", (48,))]  # fmt: skip
    assert plugin.infer(inputs) == [("float32", (2, 40))]
    wrong = [*inputs[:3], ("int32", (3, 380)), *inputs[4:]]
    assert plugin.infer(wrong) is None
    assert host.said() == "PlanishLinear: 'words' has shape [3, 380]; it takes [3, 384]"
    assert not plugin.configure(wrong, [("float32", (2, 40))])
    assert "'words' has shape [3, 380]" in host.said()
    assert plugin.infer(inputs[:5]) is None
    assert host.said() == "PlanishLinear takes 6 inputs, and 5 are there"


def test_sizes_that_are_not_known_yet_go_through(host: Host) -> None:
    plugin = made(host, QUANTIZE_TOKENS, tokens())
    assert plugin.infer([("float16", (-1, -1, 80))]) == [
        ("int32", (-1, -1, 64)), ("float32", (-1, -1, 1)), ("int32", (-1, -1, 1, 2)),
    ]  # fmt: skip
    assert plugin.infer([("float16", (-1, -1, 81))]) is None


def test_the_gpu_is_refused_when_the_engine_is_built(host: Host) -> None:
    plugin = made(host, QUANTIZE_TOKENS, tokens())
    x, made_ = [("float32", (2, 80))], [("int32", (2, 64)), ("float32", (2, 1)), ("int32", (2, 1, 2))]
    assert plugin.configure(x, made_)
    sm = ctypes.c_int.in_dll(host.library, "planish_emulated_sm")
    sm.value = 75
    try:
        assert not plugin.configure(x, made_)
        assert "no kernels for SM 75" in host.said()
    finally:
        sm.value = 90


def test_types(host: Host) -> None:
    plugin = made(host, QUANTIZE_TOKENS, tokens())
    for x in ("float32", "float16", "bfloat16"):
        assert plugin.supports(0, [x, "int32", "float32", "int32"], 1)
    assert not plugin.supports(0, ["int8", "int32", "float32", "int32"], 1)
    assert not plugin.supports(0, ["int32", "int32", "float32", "int32"], 1)
    assert not plugin.supports(1, ["float32", "float32", "float32", "int32"], 1)
    assert not plugin.supports(0, ["float32", "int32", "float32", "int32"], 1, format=1)
    assert not plugin.configure([("int32", (2, 80))], [("int32", (2, 64)), ("float32", (2, 1)), ("int32", (2, 1, 2))])
    assert "'x' is int32; it takes float32 or float16 or bfloat16" in host.said()
    half = made(host, LINEAR, linear(type=1))
    types = ["int32", "float32", "int32", "int32", "float32", "int32"]
    assert half.supports(6, [*types, "float16"], 6)
    assert not half.supports(6, [*types, "float32"], 6)
    attends = made(host, KV_ATTEND, {**cache(), "heads": 2})
    types = ["int32", "int32", "int32", "float16", "int32", "float16"]
    assert attends.supports(7, ["bfloat16", *types, "bfloat16"], 7)
    assert not attends.supports(7, ["bfloat16", *types, "float32"], 7)


# What it computes.


def quantized(host: Host, x: Array, attributes: dict[str, float], *factors: Array) -> list[Array]:
    run = made(host, QUANTIZE_TOKENS, attributes).run([x, *factors])
    assert run is not None, host.said()
    return run


def weight_inputs(weight: KernelWeight, scale: Array) -> list[Array]:
    return [int32(weight.words), scale, weight.row_sums]


@pytest.mark.parametrize("count", [1, 3, 17, 40])
@pytest.mark.parametrize(("bits", "a"), [(2, 3), (3, 3), (4, 8)])
def test_a_linear_is_the_planish_ops(host: Host, bits: int, a: int, count: int) -> None:
    x = floats((2, count, 80), seed=count)
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (40, 80), np.uint8)
    scale = np.abs(floats((40,))) + 0.1
    expected_codes, token_scale = run_op(quantize_activation(), {"x": x}, bits=a, clip=0.8)
    (expected,) = run_op(
        matmul(bits),
        {"codes": expected_codes, "scale": token_scale, "weight": pack(codes, bits), "weight_scale": scale[None]},
        k=80, group=80, activation_bits=a,
    )  # fmt: skip
    stored = quantized(host, x, tokens(bits=bits, activation_bits=a, clip=0.8))
    np.testing.assert_array_equal(stored[1], token_scale)
    weight = pack_for_kernel(pack(codes, bits), 80, bits)
    run = made(host, LINEAR, linear(bits=bits)).run([*stored, *weight_inputs(weight, scale)])
    assert run is not None, host.said()
    np.testing.assert_array_equal(run[0], expected)


@pytest.mark.parametrize("count", [5, 40])
def test_two_segments_a_transform_and_a_permutation(host: Host, count: int) -> None:
    x, right, left = floats((count, 144)), floats((9, 16, 16), 1), floats((9, 9), 2)
    order = np.random.default_rng(3).permutation(144).astype(np.int32)
    attributes = tokens(channels=80, high_channels=64, m=9, k=16, right_count=9, has_left=1, permuted=1)
    plugin = made(host, QUANTIZE_TOKENS, attributes)
    stored = plugin.run([x, right, left, order])
    assert stored is not None, host.said()
    lines = np.einsum("tij,ijk->tik", x.reshape(count, 9, 16), right)
    # Few tokens have their map spread over the GPU, in the workspace; it has room for no more.
    assert plugin.workspace is not None
    spread = plugin.workspace.view(np.float32).reshape(min(count, 32), 144)
    if count <= 32:
        np.testing.assert_allclose(spread, lines.reshape(count, 144), rtol=1e-4, atol=1e-4)
    else:
        assert np.isnan(spread).all()
    moved = np.einsum("il,tik->tlk", left, lines).reshape(count, 144)[:, order]
    high, low = (np.random.default_rng(i).integers(0, 16 >> i, (40, n), np.uint8) for i, n in ((0, 64), (1, 80)))
    scale = np.abs(floats((2, 40))) + 0.1
    weights = [*weight_inputs(pack_for_kernel(pack(low, 3), 80, 3), scale[0]),
               *weight_inputs(pack_for_kernel(pack(high, 4), 64, 4), scale[1])]  # fmt: skip
    run = made(host, LINEAR, linear(high_channels=64)).run([*stored, *weights])
    assert run is not None, host.said()
    expected = np.zeros((count, 40))
    for part, codes, bits, a, each in ((moved[:, :64], high, 4, 4, scale[1]), (moved[:, 64:], low, 3, 3, scale[0])):
        zero = 1 << a - 1
        step = np.abs(part).max(-1, keepdims=True) / (zero - 1)
        rounded = np.clip(np.rint(part / step), -zero, zero - 1)
        expected += step * (rounded @ (codes.astype(float) - (1 << bits - 1)).T) * each
    np.testing.assert_allclose(run[0], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("count", [1, 40])
def test_residual_and_norm_come_before_the_codes(host: Host, count: int) -> None:
    x, residual, gain = floats((count, 80)), 3 * floats((count, 80), 1), floats((80,), 2)
    attributes = tokens(added=1, normed=1, epsilon=1e-5, activation_bits=4)
    codes, scales, sums, total = quantized(host, x, attributes, residual, gain)
    np.testing.assert_array_equal(total, x + residual)
    exact = total.astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * gain
    plain = quantized(host, exact.astype(np.float32), tokens(activation_bits=4))
    np.testing.assert_allclose(scales, plain[1], rtol=1e-6)
    # A value between two codes may go either way.
    differing = np.abs(codes.view(np.uint8).astype(int) - plain[0].view(np.uint8))
    assert differing.max() <= 1
    assert (differing > 0).mean() < 1e-3
    only_norm = quantized(host, total, tokens(normed=1, epsilon=1e-5, activation_bits=4), gain)
    for found, expected in zip(only_norm, (codes, scales, sums), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("count", [1, 17])
def test_a_gated_linear(host: Host, count: int) -> None:
    codes = np.random.default_rng(0).integers(0, 8, (48, 80), np.uint8)
    scale, stored = np.abs(floats((48,))) + 0.1, quantized(host, floats((count, 80)), tokens())
    (both,) = made(host, LINEAR, linear(rows=48)).run(  # type: ignore[misc]
        [*stored, *weight_inputs(pack_for_kernel(pack(codes, 3), 80, 3), scale)]
    )
    order = gated_rows(48)
    mixed = pack_for_kernel(pack(codes[order], 3), 80, 3)
    run = made(host, LINEAR, linear(rows=48, gated=1)).run([*stored, *weight_inputs(mixed, scale[order])])
    assert run is not None, host.said()
    gate, up = both[:, :24].astype(np.float64), both[:, 24:]
    np.testing.assert_allclose(run[0], gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6)


class Cache:
    """The packed cache of a batch, once as the portable model has it and once as the plugins do."""

    def __init__(self, host: Host, bits: tuple[int, int], heads: int, batch: int = 2, context: int = 32) -> None:
        self.bits, self.clips, self.heads, self.batch = bits, (0.9, 1.0), heads, batch
        attributes = cache(key_bits=bits[0], value_bits=bits[1], context=context)
        self.append = made(host, KV_APPEND, {**attributes, "key_clip": 0.9, "value_clip": 1.0})
        self.attend = made(host, KV_ATTEND, {**attributes, "heads": heads})
        self.tensors = [
            np.full((batch, 2, context, size), -1, dtype)
            for each in bits
            for size, dtype in ((64 * each // 32, np.int32), (2, np.float16))
        ]

    def empty(self) -> list[Array]:
        """Return what the portable model's cache of one sequence is before the first token."""
        return [
            np.zeros((1, 2, 0, size), dtype)
            for each in self.bits
            for size, dtype in ((8 * each, np.uint8), (2, np.float16))
        ]

    def step(self, past: Array, news: Array, key: Array, value: Array, query: Array, aliased: bool = True) -> Array:
        lengths = [past.astype(np.int32), news.astype(np.int32)]
        run = self.append.run([key, value, *lengths, *self.tensors], aliased)
        assert run is not None
        self.tensors = run
        attended = self.attend.run([query, *lengths, *self.tensors])
        assert attended is not None
        return attended[0]


@pytest.mark.parametrize("aliased", [True, False])
@pytest.mark.parametrize(("bits", "heads"), [((3, 3), 2), ((4, 2), 6), ((8, 8), 8)])
def test_the_cache_is_that_of_the_planish_ops(host: Host, bits: tuple[int, int], heads: int, aliased: bool) -> None:
    held = Cache(host, bits, heads)
    sequences = [held.empty(), held.empty()]
    past = np.array([0, 0])
    for step, news in enumerate([np.array([5, 3]), np.array([1, 1]), np.array([1, 0]), np.array([2, 4])]):
        count = int(news.max())
        key, value, query = (floats((2, count, n * 64), seed) for n, seed in ((2, step), (2, 50 + step), (heads, 90)))
        y = held.step(past, news, key, value, query, aliased)
        for b, ours in enumerate(sequences):
            n = int(news[b])
            if n == 0:
                continue
            for side, x in enumerate((key, value)):
                by_head = x[b : b + 1, :n].reshape(1, n, 2, 64).transpose(0, 2, 1, 3)
                ours[2 * side : 2 * side + 2] = run_op(
                    append_kv(bits[side]),
                    {"x": by_head, "past": ours[2 * side], "past_scale": ours[2 * side + 1]},
                    clip=held.clips[side],
                )
            total = int(past[b]) + n
            for found, expected in zip(held.tensors, ours, strict=True):
                assert found[b, :, :total].tobytes() == expected[0].tobytes()
            mask = np.where(np.arange(total) <= int(past[b]) + np.arange(n)[:, None], 0, -np.inf).astype(np.float32)
            (expected_y,) = run_op(
                attend(*bits),
                {"query": query[b : b + 1, :n], "key": ours[0], "key_scale": ours[1], "value": ours[2],
                 "value_scale": ours[3], "mask": mask[None, None]},
                heads=heads, head_dim=64,
            )  # fmt: skip
            np.testing.assert_allclose(y[b : b + 1, :n], expected_y, rtol=1e-4, atol=1e-5)
        past = past + news


@pytest.mark.parametrize("blocks", [8, 500, 5000])
def test_a_cache_is_split_on_every_gpu(host: Host, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's workspace is asked for once, and serves the GPU that it is run on, however many blocks it has."""
    held = Cache(host, (3, 3), heads=2, batch=1, context=1024)
    key, value, query = (floats((1, 1, 128), seed) for seed in range(3))
    expected = held.step(np.array([0]), np.array([1]), key, value, query)
    asked = held.attend.workspace
    assert asked is not None
    assert len(asked) == 4096 + 2 * 8 * 8 * 66 * 4
    monkeypatch.setattr(ctypes.c_int.in_dll(host.library, "planish_emulated_blocks"), "value", blocks)
    np.testing.assert_array_equal(held.step(np.array([0]), np.array([1]), key, value, query), expected)
    # As much of it is used as the GPU has splits of this context, one query to a KV head.
    used = 4096 + 2 * min(blocks // 2, 8) * 66 * 4
    now = held.attend.workspace
    assert now is not None
    assert (now[4096:used] == 0x55).all()
    assert (now[used:] == 255).all()


def test_the_cache_shares_the_memory_of_its_inputs(host: Host) -> None:
    plugin = made(host, KV_APPEND, {**cache(), "key_clip": 1, "value_clip": 1})
    assert plugin.aliases() == [4, 5, 6, 7]
    assert made(host, LINEAR, linear()).aliases() == [-1]


# What an engine does with it.


@pytest.mark.parametrize("way", ["clone", "attach", "restore"])
def test_copies_do_the_same(host: Host, way: str) -> None:
    x = floats((3, 80))
    first = made(host, QUANTIZE_TOKENS, tokens(clip=0.6, m=5, k=16, right_count=1))
    factors = [floats((1, 16, 16), 1)]
    expected = first.run([x, *factors])
    second = first.another(way)
    first.delete()
    found = second.run([x, *factors])
    assert found is not None
    assert expected is not None
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    second.delete()


def test_a_failed_launch_is_told(host: Host) -> None:
    # The emulation knows float32 alone: what a kernel's launch would say on a GPU.
    assert made(host, LINEAR, linear(type=1)).run([
        np.zeros((2, 64), np.int32), np.zeros((2, 1), np.float32), np.zeros((2, 1, 2), np.int32),
        np.zeros((3, 384), np.int32), np.zeros(40, np.float32), np.zeros(48, np.int32),
    ]) is None  # fmt: skip
    assert host.said() == "PlanishLinear: emulated in float32 only"


def test_a_shape_that_changes_at_run_time_is_checked(host: Host) -> None:
    plugin = made(host, QUANTIZE_TOKENS, tokens())
    assert plugin.run([floats((0, 80))]) is not None
    assert plugin.run([floats((1, 81))]) is None
    assert "'x' has shape [1, 81]; it takes [1, 80]" in host.said()
