"""Channel scales: other channels at the sites, the same logits."""

from pathlib import Path

import numpy as np
import pytest

from planish.passes.blocks import GraphError
from planish.passes.fold_channel_scale import FoldChannelScalePass
from planish.passes.insert_online_transform import InsertOnlineTransformPass
from tests.flattening import assert_same_logits, config_of, graph_of, initializer, random_transforms, weights_of
from tests.tiny import VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_stay(variant: str, tmp_path: Path) -> None:
    assert_same_logits(variant, [FoldChannelScalePass(random_transforms(config_of(variant), "scale left"))], tmp_path)


def test_where_the_scales_go() -> None:
    transforms = random_transforms(config_of("mlp_bias"), "scale")
    model, (_, weights) = graph_of("mlp_bias"), weights_of("mlp_bias")
    FoldChannelScalePass(transforms)(model)
    block, layer = "model.layers.1", transforms.layers[1]
    scales = {site: layer[site].scale for site in ("attn_in", "ffn_in", "ffn_out")}
    expected = {
        f"{block}.input_layernorm.weight": lambda w: w * scales["attn_in"],
        f"{block}.post_attention_layernorm.weight": lambda w: w * scales["ffn_in"],
        f"{block}.self_attn.k_proj.weight": lambda w: (w / scales["attn_in"]).T,
        f"{block}.mlp.gate_proj.weight": lambda w: (w / scales["ffn_in"]).T,
        f"{block}.mlp.gate_proj.bias": lambda w: w,
        f"{block}.mlp.up_proj.weight": lambda w: (w / scales["ffn_in"]).T * scales["ffn_out"],
        f"{block}.mlp.up_proj.bias": lambda w: w * scales["ffn_out"],
        f"{block}.mlp.down_proj.weight": lambda w: (w / scales["ffn_out"]).T,
        f"{block}.self_attn.o_proj.weight": lambda w: w.T,
    }
    for name, made in expected.items():
        np.testing.assert_allclose(initializer(model, name), made(weights[name]), rtol=1e-6)


def test_no_scale_changes_nothing() -> None:
    assert not FoldChannelScalePass(random_transforms(config_of("gqa"), "rows left"))(graph_of("gqa")).modified


def test_after_the_online_transforms_it_is_refused() -> None:
    model, transforms = graph_of("gqa"), random_transforms(config_of("gqa"))
    InsertOnlineTransformPass(transforms)(model)
    with pytest.raises(GraphError, match=r"q_proj' reads .* should read 'model\.layers\.0\.input_layernorm'"):
        FoldChannelScalePass(transforms)(model)
