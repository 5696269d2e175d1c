"""Tokens per second of a whole bundle, decoded on the GPU, beside transformers in float16 on the same GPU.

    make plugins
    python -m benchmarks.gpu.decode BUNDLE [--prompt 128] [--tokens 256] [--json]

One sequence, greedy, a CUDA graph replayed for every token, lm_head and the choice of the token included. The peer is
transformers' LlamaForCausalLM of the bundle's config.json, float16, over a static cache that is as long as the text;
once as it is and once through torch.compile, both captured into a CUDA graph as ours is. Its weights are random: speed
does not depend on them. Each time is the median of 5 runs that take turns. With `--json` the last line is one JSON
object.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from rich.console import Console
from rich.table import Table

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.errors import PlanishError, TextError
from planish.compiler.gpu.decoder import Decoder

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["Peer", "Row", "main", "peer_model", "table_of"]

OURS = "planish"
REPEATS = 5
_WARM_UP = 3
#: The peer's cache has a multiple of this many places.
_SLOTS = 64


class Model(Protocol):
    """What is measured: a prompt, then a token for each step, which waits for nothing."""

    def prefill(self, prompt: Sequence[int]) -> object:
        """Run a prompt and choose the token behind it."""

    def step(self) -> object:
        """Run the token chosen last and choose the next."""


def peer_model(config: Path, device: torch.device) -> "LlamaForCausalLM":
    """Return the float16 model of a config.json with random weights, made as such: in float32 it may not fit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with device:
        model: LlamaForCausalLM = LlamaForCausalLM._from_config(
            LlamaConfig.from_json_file(config), dtype=torch.float16
        ).eval()
    return model


class Peer:
    """A float16 LlamaForCausalLM of transformers with a static cache and random weights."""

    def __init__(self, model: "LlamaForCausalLM", context: int, *, compiled: bool = False) -> None:
        """Take a model of `peer_model`, with room for `context` tokens and a few more."""
        from transformers import StaticCache

        self.model, device = model, model.device
        self._run: Callable[..., object] = model
        if compiled:
            self._run = torch.compile(model, mode="max-autotune-no-cudagraphs", fullgraph=True)
        # PyTorch's attention copies a mask of another width in every layer.
        slots = -(-context // _SLOTS) * _SLOTS
        self._cache = StaticCache(config=model.config, max_cache_len=slots)
        self._slots = torch.arange(slots, device=device)
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def prefill(self, prompt: Sequence[int]) -> torch.Tensor:
        """Run a prompt, uncompiled, and return the logits behind it, [1, vocab]."""
        self._cache.reset()
        ids = torch.tensor([list(prompt)], device=self._token.device)
        places = torch.arange(len(prompt), device=ids.device)[None]
        logits = self._logits(self.model, ids, places)
        self._token.copy_(logits.argmax(-1, keepdim=True))
        self._position.fill_(len(prompt))
        return logits

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Run the token chosen last and return the logits behind it, [1, vocab]; behind a capture, the graph's own."""
        if self._graph is None:
            self._made = self._step()
        else:
            self._graph.replay()
        return self._made

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture a step; whatever text there was is lost."""
        self.prefill([0])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._made = self._step()
        self._graph = graph

    def _step(self) -> torch.Tensor:
        logits = self._logits(self._run, self._token, self._position)
        self._token.copy_(logits.argmax(-1, keepdim=True))
        self._position.add_(1)
        return logits

    def _logits(self, run: Callable[..., object], ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        seen = (self._slots <= places[..., None])[:, None]
        made = run(
            input_ids=ids, position_ids=places, attention_mask=seen, past_key_values=self._cache, logits_to_keep=1
        )
        logits: torch.Tensor = made.logits[:, -1]  # type: ignore[attr-defined]
        return logits


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of a model: microseconds to a token, and gigabytes that it holds on the GPU."""

    name: str
    microseconds: float
    gigabytes: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens decoded in a second."""
        return 1e6 / self.microseconds


def microseconds(model: Model, prompt: Sequence[int], tokens: int) -> float:
    """Return the time of a step behind a prompt, the mean over `tokens` of them."""
    model.prefill(prompt)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(tokens):
        model.step()
    end.record()
    end.synchronize()
    return 1e3 * float(start.elapsed_time(end)) / tokens


def table_of(rows: Sequence[Row], title: str) -> Table:
    """Return the table; the first row is ours, and ratios are its tokens per second over those of the row."""
    table = Table(title=title)
    for column in ("model", "µs a token", "tokens/s", "ours over it", "GB on the GPU"):
        table.add_column(column)
    for row in rows:
        ratio = row.microseconds / rows[0].microseconds
        table.add_row(
            row.name, f"{row.microseconds:.0f}", f"{row.tokens_per_second:.0f}", f"{ratio:.2f}", f"{row.gigabytes:.2f}"
        )
    return table


def measure(bundle: Bundle, prompt: int, tokens: int) -> tuple[list[Row], dict[str, str]]:
    """Return the rows, ours first, and why a peer is lacking, by its name."""
    context = prompt + tokens + _WARM_UP
    if context > bundle.manifest.max_context:
        raise TextError(
            f"The bundle has room for {bundle.manifest.max_context} tokens, and {prompt} of prompt, {tokens} decoded "
            f"and {_WARM_UP} to warm up are {context}. Ask for fewer (--prompt, --tokens)."
        )
    # Both peers run the same weights, which each of them would hold alone.
    weights = functools.cache(lambda: peer_model(bundle.path / "config.json", torch.device("cuda")))
    makers: dict[str, Callable[[], Decoder | Peer]] = {
        OURS: lambda: Decoder.open(bundle, context=context),
        "transformers float16": lambda: Peer(weights(), context),
        "transformers float16, torch.compile": lambda: Peer(weights(), context, compiled=True),
    }
    models: dict[str, Model] = {}
    sizes: dict[str, float] = {}
    lacking: dict[str, str] = {}
    for name, make in makers.items():
        shared = weights().get_memory_footprint() if name != OURS and weights.cache_info().currsize else 0
        before, made = torch.cuda.memory_allocated(), None
        try:
            made = make()
            made.capture()
        except Exception as error:
            # Ours has to run; a peer that this GPU or PyTorch does not run is named, not counted.
            if name == OURS:
                raise
            lacking[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        models[name], sizes[name] = made, (torch.cuda.memory_allocated() - before + shared) / 1e9
    text = [i % bundle.config.vocab_size for i in range(1, prompt + 1)]
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(REPEATS):
        for name, model in models.items():
            times[name].append(microseconds(model, text, tokens))
    return [Row(name, statistics.median(each), sizes[name]) for name, each in times.items()], lacking


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", type=int, default=128, help="tokens in front of the measured ones")
    parser.add_argument("--tokens", type=int, default=256, help="tokens that are decoded")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit(
            f"error: PyTorch {torch.__version__} finds no GPU, and these are tokens per second on one. Run it where "
            "there is an NVIDIA GPU and a PyTorch with CUDA."
        )
    try:
        bundle = Bundle.open(options.bundle)
        rows, lacking = measure(bundle, options.prompt, options.tokens)
    except PlanishError as error:
        sys.exit(f"error: {error}")
    card = torch.cuda.get_device_name()
    title = f"{card}: {bundle.manifest.model}, {bundle.scheme}, {options.tokens} tokens behind {options.prompt}"
    Console(width=130).print(table_of(rows, f"{title}; median of {REPEATS}"))
    for name, why in lacking.items():
        print(f"{name} is not measured: {why}")
    if options.json:
        listed = [dataclasses.asdict(row) | {"tokens_per_second": row.tokens_per_second} for row in rows]
        settings = {"scheme": str(bundle.scheme), "prompt": options.prompt, "tokens": options.tokens}
        print(json.dumps({"card": card, **settings, "rows": listed, "lacking": lacking}))


if __name__ == "__main__":
    main()
