"""A decoder's run held against the oracle: every code that it makes, and the logits behind them.

The oracle reads what it multiplies out of the portable model, so any bundle will do.
"""

import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.gpu import decoder as decoder_module
from planish.compiler.gpu.decoder import Decoder
from planish.compiler.quantize.arithmetic import QuantizedWeight
from planish.compiler.verify.oracle import Oracle
from planish.passes.high_impact import SUFFIXES, Segment
from planish.passes.scheme import Scheme
from planish.passes.transforms import Transforms
from planish.plugins import token_ops
from planish.plugins.packing import unpack
from planish.plugins.token_ops import QuantizedTokens
from tests.kernel_reference import natural_codes

__all__ = ["Agreement", "Run", "compare"]

Array = npt.NDArray[Any]

_SITES = ("attn_in", "attn_out", "ffn_in", "ffn_out")
#: How far past the middle between two codes a value may be rounded, in steps, where it is computed in float32; as in
#: verification.
_TIE = 5e-3
#: Attention over the packed cache multiplies float16 numbers: what it gives is within this share of its length.
_ATTENTION = 1e-3


class Run:
    """A prompt and the tokens behind it, one by one, with every code that the decoder makes on the way.

    Attributes:
        logits: float32 [tokens, vocab], behind the prompt and behind every token but the last.
        tokens: the likeliest ones.
        ids: the prompt and the tokens that were run.
        cache_bits: of keys and of values.
    """

    def __init__(self, decoder: Decoder, prompt: list[int], tokens: int) -> None:
        made: list[QuantizedTokens] = []
        quantize = token_ops.quantize_tokens

        def recording(*arguments: Any, **named: Any) -> QuantizedTokens:
            made.append(quantize(*arguments, **named))
            return made[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder_module, "quantize_tokens", recording)
            logits = [decoder.prefill(prompt).clone()]
            logits += [decoder.step().clone() for _ in range(tokens - 1)]
        self.logits = torch.cat(logits).cpu().numpy()
        self.tokens = [int(token) for token in self.logits.argmax(1)]
        self.ids = [*prompt, *self.tokens[:-1]]
        self.cache_bits = decoder.caches[0].bits
        self._caches = decoder.caches
        self._codes = _by_site(made, len(decoder.caches))

    def codes(self, name: str) -> Tensor:
        """Return the codes in a segment of a site, uint8 [1, tokens, channels]."""
        return self._codes[name]

    def cached(self, layer: int, part: int) -> tuple[Tensor, Tensor]:
        """Return codes and stored scales of keys (0) or values (1), [1, kv_heads, tokens, head_dim] and [..., 2]."""
        cache = self._caches[layer]
        packed, scales = (each[part][:, :, : len(self.ids)].cpu() for each in (cache.codes, cache.scales))
        return torch.from_numpy(unpack(packed.numpy(), cache.bits[part], cache.head_dim)), scales


def _by_site(made: list[QuantizedTokens], layers: int) -> dict[str, Tensor]:
    names = [f"model.layers.{i}.{site}" for i in range(layers) for site in _SITES] + ["lm_head"]
    found: dict[str, list[Tensor]] = {}
    for i, tokens in enumerate(made):
        for j, segment in enumerate(tokens.segments):
            name = names[i % len(names)] + SUFFIXES[j - len(tokens.segments)]
            found.setdefault(name, []).append(natural_codes(tokens, j)[:, : segment.channels])
    return {name: torch.cat(parts).to(torch.uint8)[None] for name, parts in found.items()}


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How a run compares with the oracle that follows its roundings.

    Attributes:
        logits_error: largest difference of a logit over the range of the logits.
        roundings: codes compared.
        followed: those that the oracle alone would have rounded the other way.
        tokens: the likeliest ones by the oracle.
        margins: by how much of the range the oracle prefers each to the next likeliest.
    """

    logits_error: float
    roundings: int
    followed: int
    tokens: list[int]
    margins: list[float]


class _Following:
    """Goes on with the codes of a run once each is seen to be the nearest to the oracle's value, but for its noise."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.roundings = self.followed = 0

    def activation(self, site: str, segment: Segment, scaled: Tensor, codes: Tensor) -> Tensor:
        theirs, zero = self._run.codes(segment.of(site)), 1 << segment.format.activation_bits - 1
        # Attention is within a share of its length. Behind it the noise is that of its scale, which o_proj hands on.
        size = scaled.norm(dim=-1, keepdim=True) if site.endswith("attn_out") else scaled.abs().amax(-1, keepdim=True)
        self._check(site, scaled.clamp(-zero, zero - 1) + zero, codes, theirs, _TIE + _ATTENTION * size)
        return theirs

    def cached(self, name: str, x: Tensor, codes: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        layer, role = name.removeprefix("model.layers.").split(".")
        theirs, their_stored = self._run.cached(int(layer), ("key", "value").index(role))
        bound = _ATTENTION * stored.float().abs() + 1e-6
        bound[..., 1] += _TIE * stored[..., 0].float()
        assert bool(((their_stored.float() - stored.float()).abs() <= bound).all()), f"scales of {name}"
        scale, zero = their_stored.float().chunk(2, -1)
        most = (1 << self._run.cache_bits[("key", "value").index(role)]) - 1
        self._check(name, ((x - zero) / scale).clamp(0, most), codes, theirs, torch.tensor(_TIE + _ATTENTION * most))
        return theirs, their_stored

    def _check(self, name: str, exact: Tensor, codes: Tensor, theirs: Tensor, tolerance: Tensor) -> None:
        off = (exact - theirs.float()).abs() - 0.5 - tolerance
        assert float(off.max()) <= 0, f"{name}: {int((off > 0).sum())} codes are not what the oracle rounds to"
        self.roundings += codes.numel()
        self.followed += int((codes != theirs).sum())


class _Stored:
    """What the oracle wants of a checkpoint and of its codes, out of a portable model."""

    def __init__(self, model: Path, config: LlamaConfig, transforms: Transforms) -> None:
        self.config = config
        graph = ir.load(model).graph
        self._initializers = graph.initializers
        self._nodes = {str(node.name): node for node in graph}
        self._transforms = transforms

    def tensor(self, name: str) -> Array:
        """Return what the oracle reads as floats: gains and embeddings have the names that they had."""
        stored = self._initializers[name].const_value
        assert stored is not None
        return stored.numpy()

    def codes(self, name: str) -> QuantizedWeight:
        """Return the codes of a module or segment: its rows of a product that may be merged."""
        module = name.removesuffix(SUFFIXES[0])
        linear, rows = self._place(module)
        product = self._nodes[f"{linear}{name.removeprefix(module)}.product"]
        bits, k = int(product.op_type.removeprefix("PlanishMatMul")), product.attributes.get_int("k", 0)
        packed, scale = (self.tensor(str(value.name)) for value in product.inputs[2:4] if value is not None)
        codes, scales = torch.from_numpy(unpack(packed[rows].copy(), bits, k)), torch.from_numpy(scale[:, rows].copy())
        if module.endswith(("gate_proj", "up_proj")) and (order := self._folded_order(int(module.split(".")[2]))):
            back = torch.tensor(order).argsort()
            codes, scales = codes[back], scales[:, back]
        return QuantizedWeight(codes, scales, bits, k)

    def _place(self, module: str) -> tuple[str, slice]:
        """Return the product that a module is in, and which of its rows it has."""
        block, _, name = module.rpartition(".")
        q, kv, inner = self.config.q_size, self.config.kv_size, self.config.intermediate_size
        merged = {"q_proj": ("qkv_proj", 0, q), "k_proj": ("qkv_proj", q, q + kv), "v_proj": ("qkv_proj", q + kv, None),
                  "gate_proj": ("gate_up_proj", 0, inner), "up_proj": ("gate_up_proj", inner, None)}  # fmt: skip
        linear, start, end = merged.get(name, (name, 0, None))
        return f"{block}.{linear}" if block else linear, slice(start, end)

    def _folded_order(self, layer: int) -> list[int]:
        """Return the order in which FoldChannelOrderPass has put the rows of gate and up; empty where it has not."""
        quantize = self._nodes.get(f"model.layers.{layer}.mlp.down_proj.high.input")
        maker = None if quantize is None else quantize.predecessors()[0]
        if maker is None or maker.op_type != "Split":
            return []
        return [int(i) for i in self._transforms.layers[layer].high["ffn_out"].order]


def compare(run: Run, model: Path, config: LlamaConfig, scheme: Scheme, transforms: Transforms) -> Agreement:
    """Let the oracle of a portable model follow a run.

    Raises:
        AssertionError: if a code is not the nearest to the oracle's value, but for the noise of float arithmetic.
    """
    stored, follow = _Stored(model, config, transforms), _Following(run)
    oracle = Oracle(cast("Checkpoint", stored), scheme, stored.codes, follow, transforms)
    with torch.inference_mode():
        *_, hidden = oracle.hidden_states(torch.tensor([run.ids]))
        logits = oracle.head(hidden[:, -len(run.tokens) :])[0]
    span = float(logits.max() - logits.min())
    best = logits.topk(2)
    return Agreement(
        float(np.abs(run.logits - logits.numpy()).max()) / span, follow.roundings, follow.followed,
        best.indices[:, 0].tolist(), ((best.values[:, 0] - best.values[:, 1]) / span).tolist(),
    )  # fmt: skip
