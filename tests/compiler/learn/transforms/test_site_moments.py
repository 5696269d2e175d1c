"""Second moments against what hooks into transformers' model record, summed in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.errors import CalibrationError
from planish.compiler.learn.block import Angles, Block, read_block
from planish.compiler.learn.transforms.site_moments import gather_moments, residual_weights
from tests.tiny import VARIANTS, write_tiny

SEQ = 11
READERS = {
    "attn_in": "self_attn.q_proj",
    "attn_out": "self_attn.o_proj",
    "ffn_in": "mlp.gate_proj",
    "ffn_out": "mlp.down_proj",
}


def record(folder: Path, ids: torch.Tensor) -> tuple[dict[str, np.ndarray], DynamicCache]:
    """Return what went into and came out of the modules of the first block, float64, and the cache."""
    model, seen = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), {}
    block = model.model.layers[0]

    def keep(name: str) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor], output: Any) -> None:
            seen[f"{name} in"] = inputs[0].double().numpy()
            seen[f"{name} out"] = (output[0] if isinstance(output, tuple) else output).double().numpy()

        return hook

    for name, module in block.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(keep(name))
    block.register_forward_hook(keep("block"))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        query = torch.from_numpy(seen["self_attn.q_proj out"]).float()
        query = query.unflatten(-1, (-1, cache.layers[0].keys.shape[-1])).transpose(1, 2)
        cos, sin = model.model.rotary_emb(query, torch.arange(SEQ)[None])
        seen["query"] = apply_rotary_pos_emb(query, query, cos, sin)[0].double().numpy()
    return seen, cache


@pytest.mark.parametrize("variant", ["gqa", "head_dim", "attention_bias"])
def test_moments_equal_recorded_ones(variant: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, **VARIANTS[variant])
    ids = torch.from_numpy(np.random.default_rng(2).integers(3, 272, (3, SEQ)))
    seen, cache = record(folder, ids)
    block = read_block(open_checkpoint(folder), 0)
    config = block.config
    x = torch.from_numpy(seen["block in"]).float()
    found = gather_moments(block, x.split(2), Angles.of(config, SEQ))

    # A batch weighs its tokens by 1 / |output|^2, to a mean of 1 in the batch.
    parts = [1 / np.square(seen["block out"][part]).mean(-1).ravel() for part in (slice(0, 2), slice(2, 3))]
    weights = np.concatenate([part / part.mean() for part in parts])
    for site, module in READERS.items():
        rows = seen[f"{module} in"].reshape(-1, seen[f"{module} in"].shape[-1])
        weighted = rows * weights[:, None] if site in ("attn_out", "ffn_out") else rows
        close(found.inputs[site], weighted.T @ rows / len(rows))
        assert found.weights[site].shape == found.inputs[site].shape
    gate_up = np.concatenate([block.weight(f"mlp.{each}_proj").double().numpy() for each in ("gate", "up")])
    close(found.weights["ffn_in"], gate_up.T @ gate_up / len(gate_up))

    kv, groups, d = config.num_key_value_heads, config.groups, config.head_dim
    keys, values = (t.double().numpy() for t in (cache.layers[0].keys, cache.layers[0].values))
    columns = block.weight("self_attn.o_proj").double().numpy().reshape(config.hidden_size, -1, d)
    for head in range(kv):
        served = range(head * groups, (head + 1) * groups)
        close(found.keys[head], sum(k.T @ k for k in keys[:, head]))
        close(found.values[head], sum(v.T @ v for v in values[:, head]))
        close(found.queries[head], sum(q.T @ q for each in served for q in seen["query"][:, each]))
        close(found.value_readers[head], sum(columns[:, each].T @ columns[:, each] for each in served))


def close(found: torch.Tensor, expected: Any) -> None:
    assert found.dtype == torch.float64
    assert np.abs(found.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def test_tokens_count_by_their_share_of_the_stream() -> None:
    output = torch.tensor([[[1.0, 1.0], [3.0, 3.0]]])
    assert torch.allclose(residual_weights(output), torch.tensor([1.8, 0.2]))
    assert residual_weights(torch.zeros(1, 2, 4)).isfinite().all()


def test_moments_beyond_float32_are_told(tmp_path: Path) -> None:
    block = read_block(open_checkpoint(write_tiny(tmp_path)), 0)
    gain = block.weight("input_layernorm").clone()
    gain[5] = 1e22
    loud = Block(block.config, {**block.tensors, "input_layernorm.weight": gain})
    with pytest.raises(CalibrationError, match="what flows at attn_in is too large for float32"):
        gather_moments(loud, [torch.randn(1, SEQ, 64)], Angles.of(block.config, SEQ))
