"""The key map: mapped keys in the cache, the same logits."""

from pathlib import Path

import numpy as np
import pytest

from planish.passes.blocks import GraphError
from planish.passes.insert_key_map import InsertKeyMapPass
from planish.passes.merge_linears import MergeLinearsPass
from planish.passes.merge_rotary import MergeRotaryPass
from tests.flattening import assert_same_logits, config_of, graph_of, random_transforms, run_float64
from tests.tiny import VARIANTS


@pytest.mark.parametrize("form", ["right", "rows"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_stay(variant: str, form: str, tmp_path: Path) -> None:
    assert_same_logits(variant, [InsertKeyMapPass(random_transforms(config_of(variant), form))], tmp_path)


@pytest.mark.parametrize("form", ["right", "rows"])
def test_the_cache_holds_mapped_keys(form: str) -> None:
    transforms = random_transforms(config_of("head_dim"), form)
    model = graph_of("head_dim", np.float64)
    _, before = run_float64(model)
    InsertKeyMapPass(transforms)(model)
    _, after = run_float64(model)
    for i, layer in enumerate(transforms.layers):
        assert layer.key.right is not None
        expected = before[f"past_key_values.{i}.key"] @ layer.key.right.astype(np.float64)
        np.testing.assert_allclose(after[f"past_key_values.{i}.key"], expected, atol=1e-11)
        np.testing.assert_allclose(
            after[f"past_key_values.{i}.value"], before[f"past_key_values.{i}.value"], atol=1e-11
        )


def test_rotations_merge_in_front_of_it(tmp_path: Path) -> None:
    before = [InsertKeyMapPass(random_transforms(config_of("gqa"), "rows"))]
    assert_same_logits("gqa", [MergeLinearsPass(), MergeRotaryPass()], tmp_path, before=before)


def test_what_it_needs() -> None:
    model, transforms = graph_of("gqa"), random_transforms(config_of("gqa"))
    InsertKeyMapPass(transforms)(model)
    with pytest.raises(GraphError, match="there is a key map already"):
        InsertKeyMapPass(transforms)(model)
    with pytest.raises(GraphError, match="4 KV heads of 16 channels, and a map of its heads reads 2 of 16"):
        InsertKeyMapPass(transforms)(graph_of("mha"))
