"""The compiled model, lowered and not, against the oracle: every scheme and every variant of the model."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from planish.compiler.backends.ort import build_ort
from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.errors import AccuracyError
from planish.compiler.export.float_model import save_model
from planish.compiler.export.portable import portable_model
from planish.compiler.quantize.codes import CodesOnDisk, quantize_checkpoint
from planish.compiler.runtime.session import Session
from planish.compiler.verify.verification import _Following, verify
from planish.passes.scheme import Scheme, SchemeError
from planish.passes.transforms import Transforms
from tests.cache_clips import clipping_transforms
from tests.tiny import VARIANTS, write_tiny

SCHEMES = [
    "w4a4k4v4",
    "w3a3k3v3",
    "w3a3k3v2",
    "w2a2k2v2",
    "w4a8kv8",
    "w8a8k8v8",
    "w4a5k4v8",
    "w4a4k4v4g32",
    "w2a16g32",
    "w3a16k3v3",
    "w4a16g64",
    "w8a16kv4",
    "w16a16k16v16",
    "w16a16k4v4",
]
TOKENS = [int(token) for token in np.random.default_rng(7).integers(0, 200, 21)]


def build(
    checkpoint: Checkpoint, scheme: Scheme, folder: Path, transforms: Transforms | None = None
) -> tuple[CodesOnDisk, list[Path]]:
    """Write the portable and the lowered model; return the codes and both paths."""
    codes = quantize_checkpoint(checkpoint, scheme, folder / "codes")
    portable = save_model(portable_model(checkpoint, scheme, codes, transforms)[0], folder / "portable")
    return codes, [portable, build_ort(ir.load(portable), folder / "ort")]


@pytest.mark.parametrize("spelling", SCHEMES)
def test_scheme(spelling: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path / "tiny"))
    scheme = Scheme.parse(spelling)
    codes, models = build(checkpoint, scheme, tmp_path)
    for model in models:
        result = verify(checkpoint, scheme, codes, model, TOKENS)
        assert result.tokens == len(TOKENS)
        assert result.logits_error < 1e-5
        assert result.followed <= result.roundings * 1e-3
        assert (result.roundings > 0) == (not scheme.lm_head.is_float or scheme.quantizes_cache)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path / "tiny", **VARIANTS[variant]))
    scheme = Scheme.parse("w3a4k3v3" if checkpoint.config.head_dim % 8 == 0 else "w3a4")
    codes, models = build(checkpoint, scheme, tmp_path)
    for model in models:
        assert verify(checkpoint, scheme, codes, model, TOKENS).logits_error < 1e-5


@pytest.mark.parametrize("spelling", ["w4a4k2v2", "w4a4k3v2", "w4a8k8v4", "w8a8k8v8"])
def test_clipped_cache(spelling: str, tmp_path: Path) -> None:
    """Keys and values of every layer have clips of their own; codes saturate."""
    checkpoint = open_checkpoint(write_tiny(tmp_path / "tiny"))
    scheme, transforms = Scheme.parse(spelling), clipping_transforms(checkpoint.config)
    codes, models = build(checkpoint, scheme, tmp_path, transforms)
    for model in models:
        result = verify(checkpoint, scheme, codes, model, TOKENS, transforms)
        assert result.logits_error < 1e-5
        assert result.followed <= result.roundings * 1e-3
        with pytest.raises(AccuracyError, match=r"model\.layers\.0\.key drifts first: \d+ cached scales differ"):
            verify(checkpoint, scheme, codes, model, TOKENS)


def test_an_unclipped_cache_has_the_nodes_it_had(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path / "tiny"))
    scheme = Scheme.parse("w4a4k3v2")
    for name, transforms, added in (("none", None, 0), ("clips", clipping_transforms(checkpoint.config), 4)):
        _, (_, lowered) = build(checkpoint, scheme, tmp_path / name, transforms)
        names = [node.name for node in onnx.load(lowered, load_external_data=False).graph.node]
        assert sum(name.endswith((".kv.left_out", ".kv.lowest")) for name in names) == added


def test_a_zero_of_a_clipped_grid_near_nought(tmp_path: Path) -> None:
    """It is the difference of larger numbers, and has their noise: 1e-6 here, where float16 resolves 6e-8."""
    scheme = Scheme.parse("w16a16k3v3")
    stored = torch.tensor([[[[0.25, 1e-5]]]]).half()
    codes, x = torch.zeros(1, 1, 1, 8, dtype=torch.uint8), torch.zeros(1, 1, 1, 8)

    class Run:
        def __init__(self, scale: float, zero: float) -> None:
            self.stored = np.array([[[[scale, zero]]]], np.float16)

        def cached(self, *_: object) -> tuple[np.ndarray, np.ndarray]:
            return codes.numpy(), self.stored

    _Following(Run(0.25, -1e-5), scheme).cached("model.layers.0.key", x, codes, stored)  # type: ignore[arg-type]
    for off in (Run(0.2506, 1e-5), Run(0.25, 2e-3)):
        with pytest.raises(AccuracyError, match="1 cached scales differ"):
            _Following(off, scheme).cached("model.layers.0.key", x, codes, stored)  # type: ignore[arg-type]


def test_padded_batch(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path / "tiny"))
    _, models = build(checkpoint, Scheme.parse("w4a8k4v3"), tmp_path)
    ids = np.random.default_rng(3).integers(0, 200, (3, 12))
    mask = np.ones_like(ids)
    mask[0, :5] = mask[2, :2] = 0
    portable, lowered = (np.concatenate(list(_steps(Session(model, 1), ids, mask)), axis=1) for model in models)
    error = np.abs(portable - lowered).max(-1)[mask.astype(bool)] / np.ptp(portable)
    assert (error < 1e-5).mean() > 0.8  # a tie may round the other way and change what follows it
    assert error.max() < 0.2


def _steps(session: Session, ids: np.ndarray, mask: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the logits of a prefill of 9 tokens and of 3 decoded ones."""
    logits, cache = session.run(ids[:, :9], mask=mask[:, :9])
    yield logits
    for i in range(9, ids.shape[1]):
        logits, cache = session.run(ids[:, i : i + 1], cache, mask=mask[:, i : i + 1])
        yield logits


@pytest.mark.parametrize("tokens", [6, 7, 8, 9])  # prefills of 2 to 5, around the number of query blocks
def test_short_prompts(tokens: int, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path / "tiny"))
    scheme = Scheme.parse("w4a8k8v8")
    codes, (_, lowered) = build(checkpoint, scheme, tmp_path)
    assert verify(checkpoint, scheme, codes, lowered, TOKENS[:tokens]).logits_error < 1e-5


def test_cache_of_odd_heads_is_refused_in_words(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path / "tiny", head_dim=12))
    with pytest.raises(SchemeError, match="drop the k and v parts"):
        build(checkpoint, Scheme.parse("w4a4k4v4"), tmp_path)


def test_lowered_model_holds_no_planish_op_and_multiplies_integers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path / "tiny"))
    _, (portable, lowered) = build(checkpoint, Scheme.parse("w3a3k3v3"), tmp_path)
    assert {function.domain for function in onnx.load(portable).functions} == {"planish"}
    model = onnx.load(lowered)
    assert not model.functions
    assert "planish" not in {node.domain for node in model.graph.node}
    products = [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 4 * checkpoint.config.num_hidden_layers + 1
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {types[node.input[1]] for node in products} == {onnx.TensorProto.INT8}
    # The one matrix left in floating point is the embedding table.
    large = {t.name for t in model.graph.initializer if len(t.dims) == 2 and t.data_type != onnx.TensorProto.INT8}
    assert {name for name in large if "matrix" not in name} == {"model.embed_tokens.weight"}


def _spoil(model: Path, name: str) -> None:
    """Add 1 to the first float initializer whose name ends like `name`."""
    proto = onnx.load(model)
    tensor = next(t for t in proto.graph.initializer if t.name.endswith(name))
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + np.float32(1), tensor.name))
    onnx.save(proto, model)


@pytest.mark.parametrize(
    ("name", "culprit"),
    [
        ("layers.1.input_layernorm.weight", r"model\.layers\.1\.attn_in drifts first"),
        ("layers.0.mlp.down_proj.scale_row", r"Layer 0 drifts first"),
        ("lm_head.scale_row", r"lm_head drifts first"),
    ],
)
def test_names_what_drifts_first(name: str, culprit: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path / "tiny"))
    scheme = Scheme.parse("w4a4k4v4")
    codes, (_, lowered) = build(checkpoint, scheme, tmp_path)
    _spoil(lowered, name)
    with pytest.raises(AccuracyError, match=culprit):
        verify(checkpoint, scheme, codes, lowered, TOKENS)
    assert not list(lowered.parent.glob("verify*"))
