"""The fixed cache of the TensorRT form holds and attends to what the growing cache of the portable model does."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.export.float_model import save_model
from planish.compiler.export.portable import portable_model
from planish.compiler.quantize.codes import quantize_checkpoint
from planish.passes.lower_kv_cache_to_tensorrt import LowerKvCacheToTensorrtPass
from planish.passes.scheme import Scheme
from planish.plugins.packing import unpack
from tests.cache_clips import clipping_transforms
from tests.fixed_cache import FixedCacheModel
from tests.onnx_run import CachedModel, range_error
from tests.tiny import write_tiny

Array = npt.NDArray[Any]
CONTEXT, BATCH, LENGTH = 16, 2, 11
#: float32 sums in another order; a wrong slot or mask gives 1e-2 and more.
BOUND = 1e-5


class Pair(NamedTuple):
    portable: Path
    lowered: Path


@pytest.fixture(scope="module", params=["w16a16", "w16a16k8v8", "w16a16k3v3", "w16a16k4v2"])
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return Scheme.parse(request.param, lm_head="w16a16")


@pytest.fixture(scope="module", params=["gqa", "mha", "clipped"])
def pair(request: pytest.FixtureRequest, scheme: Scheme, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("cache")
    heads = 4 if request.param == "mha" else 2
    checkpoint = open_checkpoint(write_tiny(folder / "checkpoint", num_key_value_heads=heads))
    codes = quantize_checkpoint(checkpoint, scheme, folder / "codes")
    transforms = clipping_transforms(checkpoint.config) if request.param == "clipped" else None
    model, _ = portable_model(checkpoint, scheme, codes, transforms)
    lowered = model.clone()
    LowerKvCacheToTensorrtPass(CONTEXT)(lowered)
    common.RemoveUnusedNodesPass()(lowered)
    return Pair(save_model(model, folder / "portable"), save_model(lowered, folder / "lowered"))


def prompt(seed: int = 0) -> tuple[Array, Array]:
    """Return a batch of ids and its mask, the second row padded on the left."""
    ids = np.random.default_rng(seed).integers(3, 272, (BATCH, LENGTH))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


@pytest.mark.parametrize("sizes", [[LENGTH], [5, 1, 1, 1, 1, 1, 1], [4, 4, 3]], ids=["whole", "decode", "chunks"])
def test_logits_equal_those_of_the_growing_cache(pair: Pair, sizes: list[int]) -> None:
    ids, mask = prompt()
    expected = CachedModel(pair.portable).in_chunks(ids, sizes, mask)
    found = FixedCacheModel(pair.lowered, BATCH).in_chunks(ids, sizes, mask)
    real = mask.astype(bool)
    assert range_error(found[real], expected[real]) < BOUND


def test_stored_rows_are_the_values_of_the_codes(pair: Pair, scheme: Scheme) -> None:
    ids, mask = prompt()
    cache = CachedModel(pair.portable)(ids, mask).cache
    model = FixedCacheModel(pair.lowered, BATCH, garbage=7.0)
    model(ids, mask, 0)
    for name, found in model.caches.items():
        expected = cache[name].astype(np.float32)
        if scheme.quantizes_cache:
            bits = scheme.key_bits if name.endswith("key") else scheme.value_bits
            scale, zero = np.split(cache[f"{name}_scale"].astype(np.float32), 2, -1)
            expected = unpack(cache[name], bits, found.shape[-1]) * scale + zero
        # The first layer sees the same inputs in both; later ones may round a number to the next code.
        if ".0." in name:
            np.testing.assert_allclose(found[:, :, :LENGTH], expected, rtol=1e-5, atol=1e-5)
        assert (found[:, :, LENGTH:] == 7.0).all()


def test_what_lies_in_unwritten_slots_does_not_matter(pair: Pair) -> None:
    ids, mask = prompt()
    clean, dirty = (
        FixedCacheModel(pair.lowered, BATCH, garbage).in_chunks(ids, [5, 6], mask) for garbage in (0.0, 100.0)
    )
    np.testing.assert_array_equal(clean, dirty)


def test_every_earlier_token_matters_and_no_later_one(pair: Pair) -> None:
    ids, mask = prompt()
    before = FixedCacheModel(pair.lowered, BATCH).in_chunks(ids, [5, 6], mask)
    changed = ids.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 272
    after = FixedCacheModel(pair.lowered, BATCH).in_chunks(changed, [5, 6], mask)
    moved = np.abs(after - before).max(-1) > 1e-3
    np.testing.assert_array_equal(moved, np.broadcast_to(np.arange(LENGTH) >= 6, moved.shape))


def test_inputs_and_outputs_keep_their_names_and_have_fixed_length(pair: Pair) -> None:
    graph = ir.load(pair.lowered).graph
    names = [value.name for value in graph.inputs]
    assert names[:4] == ["input_ids", "attention_mask", "write_indices", "position_ids"]
    caches = [
        value for value in [*graph.inputs, *graph.outputs] if "key" in str(value.name) or "value" in str(value.name)
    ]
    assert len(caches) == 8
    for value in caches:
        assert value.shape is not None
        assert value.shape[2] == CONTEXT
        assert "scale" not in str(value.name)
    assert not LowerKvCacheToTensorrtPass(CONTEXT)(ir.load(pair.lowered)).modified


def test_a_clip_of_one_costs_nothing(pair: Pair, scheme: Scheme, request: pytest.FixtureRequest) -> None:
    clipped = "clipped" in request.node.callspec.id and scheme.quantizes_cache
    additions = [node for node in ir.load(pair.lowered).graph if str(node.name).endswith(".left_out")]
    assert len(additions) == (4 if clipped else 0)
