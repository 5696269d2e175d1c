"""plan.safetensors: what is saved is loaded, and what is damaged or of another model is refused."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.errors import PlanError
from planish.compiler.select.plan_file import MATRICES_FILE, load_transforms, save_transforms
from planish.passes.high_impact import HighImpact
from planish.passes.transforms import SITES, LayerTransforms, Transform, Transforms

CONFIG = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
KEY = "planish.transforms"


def matrix(seed: int, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (np.random.default_rng(seed).normal(size=shape) + 3).astype(np.float32)


def some_transforms() -> Transforms:
    plain = Transform(16)
    residual, _ = np.linalg.qr(matrix(9, 16, 16))
    return Transforms(
        (
            LayerTransforms(
                attn_in=Transform(16, "affine", scale=matrix(0, 16), right=matrix(1, 1, 4, 4), left=matrix(2, 4, 4)),
                attn_out=Transform(24, "rotation", left=np.eye(4)[::-1]),
                ffn_in=Transform(16, "rotation", scale=matrix(3, 16)),
                ffn_out=Transform(24, "affine", right=matrix(4, 3, 8, 8), left=matrix(5, 3, 3)),
                key=Transform(12, "affine", right=matrix(6, 2, 6, 6)),
                value=Transform(12, "affine", right=matrix(7, 1, 6, 6)),
                clips={"ffn_out": 0.71, "attn_in": 1.0},
            ),
            LayerTransforms(plain, Transform(24), plain, Transform(24), Transform(12), Transform(12)),
        ),
        residual,
        head=matrix(10, 16),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_transforms(some_transforms(), tmp_path)
    return tmp_path


def rewrite(folder: Path, header: Any = None, **changes: Any) -> None:
    """Write the file again with other tensors (None removes one) and, if given, another header."""
    path = folder / MATRICES_FILE
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path, metadata if header is None else {KEY: json.dumps(header)})


def header_of(folder: Path) -> Any:
    with safe_open(folder / MATRICES_FILE, framework="numpy") as file:
        return json.loads(file.metadata()[KEY])


def test_what_is_saved_is_loaded(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == [MATRICES_FILE]
    loaded, expected = load_transforms(folder, CONFIG), some_transforms()
    np.testing.assert_array_equal(loaded.residual, expected.residual, strict=True)
    np.testing.assert_array_equal(loaded.head, expected.head, strict=True)
    assert len(loaded.layers) == 2
    for found, original in zip(loaded.layers, expected.layers, strict=True):
        assert found.clips == original.clips
        for site in SITES:
            assert (found[site].width, found[site].kind) == (original[site].width, original[site].kind)
            for part in ("scale", "right", "left"):
                one, other = getattr(found[site], part), getattr(original[site], part)
                assert (one is None) == (other is None)
                if one is not None:
                    np.testing.assert_array_equal(one, other, strict=True)


def test_the_file_can_be_read_without_planish(folder: Path) -> None:
    tensors = load_file(folder / MATRICES_FILE)
    assert {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()} == {
        "residual": ("float32", (16, 16)),
        "lm_head.scale": ("float32", (16,)),
        "layers.0.attn_in.scale": ("float32", (16,)),
        "layers.0.attn_in.right": ("float32", (1, 4, 4)),
        "layers.0.attn_in.left": ("float32", (4, 4)),
        "layers.0.attn_out.left": ("float32", (4, 4)),
        "layers.0.ffn_in.scale": ("float32", (16,)),
        "layers.0.ffn_out.right": ("float32", (3, 8, 8)),
        "layers.0.ffn_out.left": ("float32", (3, 3)),
        "layers.0.key.right": ("float32", (2, 6, 6)),
        "layers.0.value.right": ("float32", (1, 6, 6)),
    }
    header = header_of(folder)
    assert header["layers"][0]["ffn_out"] == {"kind": "affine", "clip": 0.71}
    assert header["layers"][0]["key"] == {"kind": "affine", "clip": None}


def test_no_transforms_at_all(tmp_path: Path) -> None:
    layer = some_transforms().layers[1]
    save_transforms(Transforms((layer, layer)), tmp_path)
    loaded = load_transforms(tmp_path, CONFIG)
    assert loaded.residual is None
    assert loaded.head is None
    assert all(each[site].is_identity for each in loaded.layers for site in SITES)


def test_a_file_that_is_there_stays_when_writing_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / MATRICES_FILE).read_bytes()

    def interrupt(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("planish.compiler.select.plan_file.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_transforms(Transforms(()), folder)
    assert (folder / MATRICES_FILE).read_bytes() == before


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_file(folder: Path, kept: int) -> None:
    path = folder / MATRICES_FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(PlanError, match=r"plan\.safetensors is missing, truncated or damaged.*learned again") as caught:
        load_transforms(folder, CONFIG)
    assert caught.value.exit_code == 26


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="missing"):
        load_transforms(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.0.attn_in.scale", matrix(0, 15), "layer 0, site attn_in: .*16 channels needs as many channel scales"),
        ("layers.0.attn_in.scale", np.zeros(16, np.float32), "layer 0, site attn_in: .*none of them 0"),
        ("layers.0.attn_in.right", matrix(0, 1, 5, 5), "layer 0, site attn_in: .*cannot be read as"),
        ("layers.0.ffn_out.left", matrix(0, 4, 4), "layer 0, site ffn_out: .*left factor of 4 rows"),
        ("layers.0.ffn_out.left", np.full((3, 3), np.nan, np.float32), "layer 0, site ffn_out: .*NaN or infinity"),
        ("layers.0.ffn_out.left", np.eye(3), "layer 0, site ffn_out: 'left' is of type float64"),
        ("layers.0.key.right", matrix(0, 1, 4, 4), "layer 0, site key: 'right' has the shape .* heads have 6"),
        ("layers.0.key.right", np.float32(3), "layer 0, site key: 'right' has the shape"),
        ("layers.1.key.left", matrix(0, 2, 2), "layer 1: .*the site key maps each head alone"),
        ("layers.1.attn_out.scale", matrix(0, 24), "layer 1: .*attn_out has no channel scale"),
        ("layers.2.attn_in.scale", matrix(0, 16), r"a matrix 'layers\.2\.attn_in\.scale' that no transform has"),
        (
            "residual",
            np.eye(12, dtype=np.float32),
            r"residual map has the shape \(12, 12\), and the model the width 16",
        ),
        ("residual", matrix(0, 16, 16), "a residual map is orthogonal"),
        ("lm_head.scale", matrix(0, 12), r"scale of lm_head has the shape \(12,\), and the model the width 16"),
        ("lm_head.scale", np.zeros(16, np.float32), "scale of lm_head is a row of finite numbers, none of them 0"),
    ],
)
def test_matrices_that_do_not_fit(folder: Path, name: str, tensor: Any, message: str) -> None:
    rewrite(folder, **{name: np.asarray(tensor)})
    with pytest.raises(PlanError, match=message):
        load_transforms(folder, CONFIG)


def test_a_model_of_another_shape(folder: Path) -> None:
    with pytest.raises(PlanError, match="of a model with 2 layers, and this one has 3"):
        load_transforms(folder, dataclasses.replace(CONFIG, num_hidden_layers=3))
    with pytest.raises(PlanError, match="layer 0, site attn_in: a transform of 32 channels"):
        load_transforms(folder, dataclasses.replace(CONFIG, hidden_size=32))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h["layers"][1]["key"].update(kind="shear"), "layers.1.key.kind Input should be 'identity'"),
        (lambda h: h["layers"][1]["key"].update(clip=0.0), "layers.1.key.clip .*greater than 0"),
        (lambda h: h["layers"][1]["key"].update(clip=1.5), "layers.1.key.clip .*less than or equal to 1"),
        (lambda h: h["layers"][1].pop("key"), "layer 1, site key: there is no entry"),
        (lambda h: h["layers"][1].update(keys=h["layers"][1]["key"]), "layers.1.keys"),
        (lambda h: h.update(format=2), "format Input should be 1"),
        (lambda h: h.pop("layers"), "layers Field required"),
    ],
)
def test_metadata_that_describe_nothing(folder: Path, edit: Any, message: str) -> None:
    header = header_of(folder)
    edit(header)
    rewrite(folder, header)
    with pytest.raises(PlanError, match=message):
        load_transforms(folder, CONFIG)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    save_file({"weight": matrix(0, 2)}, tmp_path / MATRICES_FILE)
    with pytest.raises(PlanError, match="metadata do not describe transforms"):
        load_transforms(tmp_path, CONFIG)


# High-impact channels

WIDE = dataclasses.replace(CONFIG, intermediate_size=150)


def with_high(folder: Path, layer: int = 1) -> Transforms:
    """Write transforms of which one site has high-impact channels, and return them."""
    plain = Transform(16)
    identity = LayerTransforms(plain, Transform(24), plain, Transform(150), Transform(12), Transform(12))
    high = HighImpact(4, np.random.default_rng(3).permutation(150), 64, 0.75)
    transforms = Transforms((identity, identity)).with_high({layer: {"ffn_out": high}})
    save_transforms(transforms, folder)
    return transforms


@pytest.mark.parametrize("layer", [0, 1])
def test_high_impact_channels_are_saved_and_loaded(layer: int, tmp_path: Path) -> None:
    expected = with_high(tmp_path, layer).layers[layer].high["ffn_out"]
    loaded = load_transforms(tmp_path, WIDE)
    assert not loaded.layers[1 - layer].high
    ((site, found),) = loaded.layers[layer].high.items()
    assert (site, found.bits, found.count, found.clip) == ("ffn_out", 4, 64, 0.75)
    np.testing.assert_array_equal(found.order, expected.order, strict=True)
    stored = load_file(tmp_path / MATRICES_FILE)
    assert {name: (each.dtype.name, each.shape) for name, each in stored.items()} == {
        f"layers.{layer}.ffn_out.order": ("int32", (150,))
    }
    assert header_of(tmp_path)["high"][layer] == {"ffn_out": {"bits": 4, "count": 64, "clip": 0.75}}


def test_a_file_without_them_is_as_it_was(folder: Path) -> None:
    assert set(header_of(folder)) == {"format", "layers"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 2}, "high-impact channels have 3, 4 or 8 bits, not 2"),
        ({"count": 60}, "60 high-impact channels of 150 cannot be: they are a multiple of 64"),
        ({"count": 192}, "192 high-impact channels of 150 cannot be"),
        ({"clip": 0.0}, "the clip of the high-impact channels is 0.0"),
        ({"bits": "4"}, "high.1.ffn_out.bits"),
        ({"colour": "red"}, "high.1.ffn_out.colour"),
        ({"order": np.zeros(150, np.int32)}, r"int32 \[150\], is no permutation"),
        ({"order": np.arange(128)[::-1].astype(np.int32)}, "ffn_out has 150 channels, and the order .* 128"),
        ({"order": np.ones(150, np.float32)}, "float32 .*, is no permutation"),
        ({"order": None}, "its high-impact channels have no 'order'"),
    ],
)
def test_high_impact_channels_that_cannot_be(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with_high(tmp_path)
    header = header_of(tmp_path)
    tensors = {"layers.1.ffn_out.order": changes.pop("order")} if "order" in changes else {}
    header["high"][1]["ffn_out"] |= changes
    rewrite(tmp_path, header, **tensors)
    with pytest.raises(PlanError, match=message) as caught:
        load_transforms(tmp_path, WIDE)
    assert re.search(r"layer 1|high\.1\.ffn_out", str(caught.value))


def test_high_impact_channels_of_other_layers(tmp_path: Path) -> None:
    with_high(tmp_path)
    header = header_of(tmp_path)
    header["high"].append({})
    rewrite(tmp_path, header)
    with pytest.raises(PlanError, match="high-impact channels for 3 layers of 2"):
        load_transforms(tmp_path, WIDE)
