"""The value map: mapped values in the cache, the same logits."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from planish.passes.blocks import GraphError
from planish.passes.fold_value_map import FoldValueMapPass
from planish.passes.transforms import Transform, Transforms
from tests.flattening import assert_same_logits, config_of, graph_of, random_transforms, run_float64
from tests.tiny import VARIANTS


@pytest.mark.parametrize("form", ["right", "rows"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_stay(variant: str, form: str, tmp_path: Path) -> None:
    assert_same_logits(variant, [FoldValueMapPass(random_transforms(config_of(variant), form))], tmp_path)


@pytest.mark.parametrize("form", ["right", "rows"])
def test_the_cache_holds_mapped_values(form: str) -> None:
    transforms = random_transforms(config_of("attention_bias"), form)
    model = graph_of("attention_bias", np.float64)
    _, before = run_float64(model)
    FoldValueMapPass(transforms)(model)
    _, after = run_float64(model)
    for i, layer in enumerate(transforms.layers):
        assert layer.value.right is not None
        expected = before[f"past_key_values.{i}.value"] @ layer.value.right.astype(np.float64)
        np.testing.assert_allclose(after[f"past_key_values.{i}.value"], expected, atol=1e-11)
        np.testing.assert_allclose(after[f"past_key_values.{i}.key"], before[f"past_key_values.{i}.key"], atol=1e-11)


def with_value(value: Transform, layers: int = 2) -> Transforms:
    layer = random_transforms(config_of("gqa")).layers[0]
    return Transforms((dataclasses.replace(layer, value=value),) * layers)


def test_identity_changes_nothing() -> None:
    model = graph_of("gqa")
    assert not FoldValueMapPass(with_value(Transform(32)))(model).modified


def test_maps_of_another_model_are_refused() -> None:
    with pytest.raises(GraphError, match="2 KV heads of 16 channels, and a map of its heads reads 4 of 8"):
        FoldValueMapPass(with_value(Transform(32, right=np.eye(8)[None])))(graph_of("gqa"))
    with pytest.raises(GraphError, match="transforms for 3 blocks, and the graph has 2"):
        FoldValueMapPass(with_value(Transform(32), layers=3))(graph_of("gqa"))
