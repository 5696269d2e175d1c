"""Decode a bundle on a GPU with the CUDA kernels: a prompt at once, then a token for each replay of one CUDA graph.

A block is ten kernels: norm, transform and codes of the input in one, then the product, for each of the four linears;
appending to the packed cache, and attention over it. What a product gives is added to the residual stream by the
kernel that quantises next. Activations between kernels are float32, as in the portable model.

Position, token and cache are in fixed memory, and lengths are read on the GPU: so one captured step serves them all.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.errors import DeviceError, TextError
from planish.compiler.gpu.weights import Head, LayerWeights, LinearWeights, Weights, read_weights
from planish.compiler.learn.block import Angles
from planish.plugins.byte_linear import byte_linear
from planish.plugins.kernel_library import Order
from planish.plugins.kv_ops import PackedCache, append_kv, attend_kv, attention_workspace
from planish.plugins.linear_ops import linear
from planish.plugins.token_ops import best_order, quantize_tokens, spread_workspace

__all__ = ["Decoder"]

#: A cache has room for a multiple of so many tokens.
_CACHE_STEP = 16
#: Tokens that are decoded between two looks for the end of the text, for which the GPU has to be waited for.
_LOOK_EVERY = 16
#: Steps that run before one is captured.
_WARM_UP = 3


class Decoder:
    """Greedy generation of one sequence.

    Attributes:
        context: tokens that there is room for, prompt and answer together.
        caches: the packed keys and values of every layer.

    Example:
        >>> decoder = Decoder.open(Bundle.open("out/smollm2"), context=2048)  # doctest: +SKIP
        >>> tokens = decoder.generate(bundle.tokenizer.encode("The sky"), max_new_tokens=64)  # doctest: +SKIP
    """

    def __init__(self, weights: Weights, config: LlamaConfig, context: int, device: torch.device) -> None:
        """Make room for `context` tokens beside weights that are on `device`.

        Raises:
            ValueError: if the kernels of the cache do not take its heads.
            NativeBuildError: if the kernels are not compiled.
        """
        self.context = context
        self._weights = weights
        self._config = config
        angles = Angles.of(config, context, device)
        self._angles = angles.cos, angles.sin
        room = -(-context // _CACHE_STEP) * _CACHE_STEP
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.caches = tuple(
            PackedCache.empty(1, kv_heads, room, head_dim, layer.bits, device=device) for layer in weights.layers
        )
        workspaces = [attention_workspace(cache, 1, 1, heads) for cache in self.caches]
        # Layers run one after the other, so the largest serves all, whatever their bits.
        self._workspace = max(workspaces, key=len)
        self._past = torch.zeros(1, dtype=torch.int32, device=device)
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._text = torch.zeros(context, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)

    @classmethod
    def open(cls, bundle: Bundle, *, context: int | None = None, device: str = "cuda") -> "Decoder":
        """Read a bundle onto a GPU.

        Args:
            bundle: with low-bit linears and a low-bit cache, whatever its targets.
            context: tokens of prompt and answer together; None is what the bundle was made for.
            device: the GPU, cuda or cuda:N.

        Raises:
            DeviceError: if PyTorch finds no GPU.
            UnsupportedModelError: if something in the bundle has no kernel; the message names it.
            ValueError: if the kernels of the cache do not take its heads.
            NativeBuildError: if the kernels are not compiled.
        """
        where = torch.device(device)
        if where.type == "cuda" and not torch.cuda.is_available():
            raise DeviceError(
                f"PyTorch ({torch.__version__}) finds no GPU, and the decoder runs on one. On a CPU, 'planish "
                "generate' runs the bundle."
            )
        weights = read_weights(bundle.model_path("portable"), bundle.config.num_hidden_layers, where)
        return cls(weights, bundle.config, min(context or sys.maxsize, bundle.manifest.max_context), where)

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], *, max_new_tokens: int, eos: Sequence[int] = ()) -> list[int]:
        """Return the likeliest tokens behind `prompt`, until one of `eos` (left out), their number, or a full context.

        Raises:
            TextError: if the prompt is empty or fills the whole context.
            KernelError: if a kernel cannot be launched.
        """
        if self._graph is None and self._past.is_cuda:
            self.capture()
        self.prefill(prompt)
        start, wanted = len(prompt), min(max_new_tokens, self.context - len(prompt))
        tokens: list[int] = []
        while len(tokens) < wanted:
            for _ in range(min(_LOOK_EVERY, wanted - len(tokens)) - (not tokens)):
                self.step()
            made = self._text[start + len(tokens) : int(self._past) + 1].tolist()
            for token in made:
                if token in eos:
                    return tokens
                tokens.append(token)
        return tokens

    @torch.inference_mode()
    def prefill(self, prompt: Sequence[int]) -> Tensor:
        """Forget all that was before, run a prompt, and return the logits behind it, float32 [1, vocab].

        Raises:
            TextError: if the prompt is empty or fills the whole context.
        """
        if not 0 < len(prompt) < self.context:
            raise TextError(
                f"The prompt has {len(prompt)} tokens, and the decoder takes 1 to {self.context - 1} of them, so that "
                "there is room for an answer."
            )
        self._past.zero_()
        logits = self._forward(torch.tensor(prompt, device=self._past.device))
        self._past.fill_(len(prompt))
        self._choose(logits)
        return logits

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Run the token chosen last, choose the next, and return its logits, float32 [1, vocab]; nothing is waited for.

        Whoever calls it stays within the context. Behind a capture the logits are the graph's own memory, which the
        next step overwrites.
        """
        if self._graph is not None:
            with torch.cuda.device(self._past.device):
                self._graph.replay()
        else:
            self._logits = self._run_step()
        return self._logits

    def _run_step(self) -> Tensor:
        logits = self._forward(self._token)
        self._past.add_(1)
        self._choose(logits)
        return logits

    def _choose(self, logits: Tensor) -> None:
        """Let the likeliest token be the one at the end of the text."""
        torch.argmax(logits, 1, out=self._token)
        self._text.index_copy_(0, self._past.long(), self._token)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture a step; whatever text there was is lost.

        PyTorch wants the warm-up on a stream of its own, so that nothing is initialised while capturing.
        """
        # Streams and graphs are of the current GPU, which need not be the decoder's, and the stream that PyTorch
        # captures on by itself is of the one that captured first.
        with torch.cuda.device(self._past.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._past.zero_()
                    self._run_step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self._logits = self._run_step()
        self._graph = graph

    def _forward(self, tokens: Tensor) -> Tensor:
        """Append `tokens`, int64 [n], to the cache, and return the logits behind the last, float32 [1, vocab]."""
        hidden, added = self._weights.embedding[tokens].float(), None
        for layer, cache in zip(self._weights.layers, self.caches, strict=True):
            qkv, hidden = _normed(layer.qkv, hidden, added)
            added = _linear(layer.o, self._attend(layer, cache, qkv))
            gated, hidden = _normed(layer.gate_up, hidden, added)
            added = _linear(layer.down, gated)
        assert added is not None
        return _head(self._weights.head, hidden[-1:], added[-1:])

    def _attend(self, layer: LayerWeights, cache: PackedCache, qkv: Tensor) -> Tensor:
        """Append keys and values to the cache, and return what the queries attend to, float32 [n, heads * head_dim]."""
        heads, kv_heads = self._config.num_attention_heads, self._config.num_key_value_heads
        by_head = qkv.view(1, len(qkv), -1, self._config.head_dim)
        queries, keys, values = torch.split(by_head, [heads, kv_heads, kv_heads], 2)
        rotated = append_kv(
            cache, self._past, keys, values, queries, angles=self._angles, maps=layer.maps, clips=layer.clips
        )
        assert rotated is not None
        # The workspace is planned for one token; for a prompt there is none, or another.
        workspace = self._workspace if len(qkv) == 1 else None
        return attend_kv(cache, self._past, rotated, workspace=workspace).view(len(qkv), -1)


def _normed(weights: LinearWeights, hidden: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a linear of the normed residual stream, and that stream with `added` in it, float32 [n, hidden]."""
    if added is None:
        return _linear(weights, hidden), hidden
    total = torch.empty_like(hidden)
    return _linear(weights, hidden, added, total), total


def _linear(weights: LinearWeights, x: Tensor, residual: Tensor | None = None, sum_out: Tensor | None = None) -> Tensor:
    """Return the linear of `x`, float32 [n, channels], with `residual` added to it first, float32 [n, rows]."""
    order = best_order(len(x), max(segment.bits for segment in weights.segments), x.device)
    workspace = spread_workspace(x, weights.prologue.get("right"))
    tokens = quantize_tokens(
        x, weights.segments, residual=residual, sum_out=sum_out, order=order, workspace=workspace, **weights.prologue
    )
    return linear(tokens, weights.low, weights.high, dtype=torch.float32, gated=weights.gated)


def _head(head: Head, hidden: Tensor, added: Tensor) -> Tensor:
    tokens = quantize_tokens(hidden, [head.segment], residual=added, order=Order.LANES, **head.prologue)
    return byte_linear(tokens, head.weight)
