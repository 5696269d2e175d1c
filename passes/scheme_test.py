"""Schemes: what the spellings mean, what is refused, and what they cost."""

import dataclasses

import pytest

from planish.passes.formats import format_of
from planish.passes.scheme import FLOAT_BITS, LinearFormat, Scheme, SchemeError

SPELLINGS = {
    "w4a4k4v4": Scheme(LinearFormat(4, 4), 4, 4, LinearFormat(8, 8)),
    "w3a3k3v3": Scheme(LinearFormat(3, 3), 3, 3, LinearFormat(8, 8)),
    "w3a3k2v2": Scheme(LinearFormat(3, 3), 2, 2, LinearFormat(8, 8)),
    "w4a8k8v8": Scheme(LinearFormat(4, 8), 8, 8, LinearFormat(8, 8)),
    "w4a8kv8": Scheme(LinearFormat(4, 8), 8, 8, LinearFormat(8, 8)),
    "w4a5k4v8": Scheme(LinearFormat(4, 5), 4, 8, LinearFormat(8, 8)),
    "w2a16g128": Scheme(LinearFormat(2, 16, 128), 16, 16, LinearFormat(8, 8)),
    "w4a4k4v4g32": Scheme(LinearFormat(4, 4, 32), 4, 4, LinearFormat(8, 8)),
    "w16a16k16v16": Scheme(LinearFormat(16, 16), 16, 16, LinearFormat(16, 16)),
    "w16a16": Scheme(LinearFormat(16, 16), 16, 16, LinearFormat(16, 16)),
    "w16a16k3v3": Scheme(LinearFormat(16, 16), 3, 3, LinearFormat(16, 16)),
    "w8a8": Scheme(LinearFormat(8, 8), 16, 16, LinearFormat(8, 8)),
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_spellings(text: str) -> None:
    scheme = Scheme.parse(text)
    assert scheme == SPELLINGS[text]
    assert Scheme.parse(f"  {text.upper()}\n") == scheme
    # What is printed reads back as the same scheme.
    assert Scheme.parse(str(scheme)) == scheme


def test_printed_in_full() -> None:
    assert str(Scheme.parse("w4a8kv8")) == "w4a8k8v8"
    assert str(Scheme.parse("w2a16g128")) == "w2a16k16v16g128"
    assert str(Scheme.parse("w4a16g64").linear) == "w4a16g64"
    assert str(LinearFormat(8, 8)) == "w8a8"


def test_lm_head_of_its_own() -> None:
    assert Scheme.parse("w3a3k3v3", lm_head="w8a16g64").lm_head == LinearFormat(8, 16, 64)
    assert Scheme.parse("w3a3k3v3", lm_head=" W16A16 ").lm_head.is_float
    assert Scheme.parse("w16a16", lm_head="w8a8").lm_head == LinearFormat(8, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a scheme"),
        ("w4", "is not a scheme"),
        ("4a4", "is not a scheme"),
        ("w4a4k4", "is not a scheme"),
        ("w4a4v4k4", "is not a scheme"),
        ("w4a4g32k4v4", "is not a scheme. Spell it"),
        ("w4a4k4v4 and more", "is not a scheme"),
        ("w-4a4", "is not a scheme"),
        ("w5a8", "5-bit weights do not exist here; use 2, 3, 4, 8 or 16"),
        ("w1a8", "1-bit weights"),
        ("w0a0", "0-bit weights"),
        ("w4a1", "1-bit activations do not exist here; use 2 to 8, or 16"),
        ("w4a9", "9-bit activations"),
        ("w16a8", "Quantised activations need quantised weights"),
        ("w4a4k5v4", "5-bit keys"),
        ("w4a4k4v6", "6-bit values"),
        ("w4a4k16v4", "quantised as a whole"),
        ("w4a4k4v16", "quantised as a whole"),
        ("w4a16g100", "group of 100 channels is not possible; use a power of two, 16 or more"),
        ("w4a16g8", "group of 8 channels"),
        ("w4a16g0", "group of 0 channels"),
        ("w16a16g128", "Float weights have no scales"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message) as error:
        Scheme.parse(text)
    assert error.value.exit_code == 18


@pytest.mark.parametrize("text", ["w8", "8", "w8a8k8v8", "w7a8", "w8a8g5"])
def test_lm_head_refused(text: str) -> None:
    with pytest.raises(SchemeError):
        Scheme.parse("w4a4k4v4", lm_head=text)


def test_kinds() -> None:
    assert LinearFormat(16, 16).is_float
    assert not LinearFormat(16, 16).weight_only
    assert LinearFormat(4, 16).weight_only
    assert not LinearFormat(4, 8).weight_only
    assert not LinearFormat(4, 8).is_float
    assert Scheme.parse("w16a16k4v4").quantizes_cache
    assert not Scheme.parse("w4a4").quantizes_cache
    assert Scheme.parse("w4a4").key_bits == FLOAT_BITS


@pytest.mark.parametrize(
    ("form", "k", "groups", "bits"),
    [
        (LinearFormat(4, 4), 576, 1, 4 + 32 / 576),
        (LinearFormat(3, 16, 128), 576, 5, 3 + 5 * 16 / 576),
        (LinearFormat(3, 16, 128), 1536, 12, 3.125),
        (LinearFormat(2, 16, 64), 576, 9, 2.25),
        (LinearFormat(2, 16, 128), 64, 1, 2.25),
        (LinearFormat(16, 16), 576, 1, 16),
    ],
)
def test_average_bits(form: LinearFormat, k: int, groups: int, bits: float) -> None:
    assert form.groups(k) == groups
    assert form.average_bits(k) == pytest.approx(bits)


@pytest.mark.parametrize("text", ["w2a8", "w3a3", "w4a4", "w8a8", "w2a16g64", "w3a16g128", "w4a16g128"])
@pytest.mark.parametrize("k", [512, 576, 1536, 2048, 8192, 11008])
def test_scales_cost_at_most_a_quarter_bit(text: str, k: int) -> None:
    form = Scheme.parse(text).linear
    assert form.average_bits(k) <= form.weight_bits + 0.25


def test_cache_bytes_per_token() -> None:
    # SmolLM2: 30 layers, 3 KV heads of 64. Per head 24 + 24 bytes of codes and two pairs of float16.
    assert Scheme.parse("w3a3k3v3").kv_bytes_per_token(30, 3, 64) == 30 * 3 * (24 + 24 + 8)
    assert Scheme.parse("w3a3k3v2").kv_bytes_per_token(30, 3, 64) == 30 * 3 * (24 + 16 + 8)
    assert Scheme.parse("w3a3").kv_bytes_per_token(30, 3, 64) == 30 * 3 * 256


def test_formats_of_single_sites() -> None:
    eight = LinearFormat(8, 8)
    scheme = dataclasses.replace(Scheme.parse("w4a4"), formats={(1, "ffn_out"): eight})
    assert (scheme.at("ffn_out", 1), scheme.at("ffn_out"), scheme.at("ffn_in", 1)) == (eight, *[scheme.linear] * 2)
    assert scheme.block(1).at("ffn_out") == eight
    assert scheme.block(0).formats == {}
    assert format_of(scheme, "model.layers.1.mlp.down_proj") == eight
    assert format_of(scheme, "model.layers.11.mlp.down_proj") == scheme.linear
    assert format_of(scheme, "lm_head") == scheme.lm_head
