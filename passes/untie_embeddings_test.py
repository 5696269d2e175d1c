"""Untying: lm_head gets the embeddings' content under a name of its own, and nothing else changes."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.export.decoder import build_decoder
from planish.compiler.export.float_model import float_model, save_model
from planish.compiler.export.streaming import CheckpointTensor
from planish.passes.folding import fold
from planish.passes.untie_embeddings import UntieEmbeddingsPass
from tests.flattening import assert_same_logits, graph_of, initializer
from tests.onnx_run import CachedModel
from tests.tiny import VARIANTS, write_tiny


def test_logits_stay(tmp_path: Path) -> None:
    assert_same_logits("tied", [UntieEmbeddingsPass()], tmp_path)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_lm_head_has_its_own_weight(dtype: ir.DataType, tmp_path: Path) -> None:
    """Embeddings in float16 reach lm_head through a Cast."""
    checkpoint = open_checkpoint(write_tiny(tmp_path, **VARIANTS["tied"]))

    def weight(name: str, transpose: bool) -> ir.TensorProtocol:
        stored = dtype if "embed" in name else ir.DataType.FLOAT
        return CheckpointTensor(checkpoint, name, stored, transpose=transpose)

    model = build_decoder(checkpoint.config, weight)
    before = CachedModel(save_model(model, tmp_path / "before"))
    assert UntieEmbeddingsPass()(model).modified
    head, embedding = (model.graph.initializers[name] for name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert head.dtype == embedding.dtype == dtype
    assert len(head.uses()) == len(embedding.uses()) == 1
    np.testing.assert_array_equal(initializer(model, "lm_head.weight"), initializer(model, "model.embed_tokens.weight"))
    fold(embedding, 1, lambda x: 0 * x)
    assert initializer(model, "lm_head.weight").any()
    fold(head, 0, lambda x: -x)
    fold(embedding, 1, lambda x: x)
    assert not initializer(model, "model.embed_tokens.weight").any()
    ids = np.arange(3, 12)[None]
    after = CachedModel(save_model(model, tmp_path / "after"))(ids).logits
    assert before(ids).logits.std() > 0.1
    np.testing.assert_array_equal(after, 0)  # the embeddings are nothing now, and the head is not


def test_nothing_to_untie_and_nothing_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not UntieEmbeddingsPass()(graph_of("gqa")).modified
    checkpoint = open_checkpoint(write_tiny(tmp_path, **VARIANTS["tied"]))

    def read(name: str) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(checkpoint, "_read", read)
    model = float_model(checkpoint)
    assert UntieEmbeddingsPass()(model).modified
    assert not UntieEmbeddingsPass()(model).modified
