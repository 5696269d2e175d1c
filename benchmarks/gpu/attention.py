"""Times of attention over the packed cache, and of appending to it, against float16 on the same GPU in the same run.

    python -m benchmarks.gpu.attention [--only TEXT] [--json]

One token to a sequence, head_dim 128, every cache full. Peers are the fastest of PyTorch's attentions of float16 keys
and values (flash, cuDNN, memory-efficient), which are handed the KV heads as they are, and for appending the copy of
the new float16 keys and values into a cache. Caches take turns, so that none is found in L2. Ratios are the peer's time
over ours.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.shapes import copies_for
from benchmarks.gpu.timing import REPEATS, microseconds
from planish.plugins.kv_ops import PackedCache, append_kv, attend_kv, attention_workspace

__all__ = ["GOALS", "Case", "all_cases", "main"]

HEAD_DIM = 128
HEADS = 32
#: Bits of keys and values -> time of the best peer over ours, at least, at 8,192 tokens and batch 8.
GOALS = {4: 2.2, 3: 2.6, 2: 3.2}
#: The same at 1,024 tokens and batch 1.
SHORT_GOAL = 0.9
#: Time of an append over that of a copy, at most.
APPEND_GOAL = 1.5
PEERS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Calls = list[Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: so many tokens in each of `batch` sequences, of which an append makes `new` at once."""

    what: str
    bits: int
    kv_heads: int
    tokens: int
    batch: int
    new: int
    goal: float

    @property
    def name(self) -> str:
        """What the table calls it."""
        heads = "MHA" if self.kv_heads == HEADS else f"GQA {HEADS // self.kv_heads}"
        return f"{self.what} K{self.bits}V{self.bits} {heads}, {self.tokens} tokens, batch {self.batch}, new {self.new}"

    @property
    def cache_bytes(self) -> int:
        """Codes and scales of the whole cache."""
        return self.batch * self.kv_heads * self.tokens * 2 * (HEAD_DIM * self.bits // 8 + 4)


@dataclasses.dataclass(frozen=True)
class Row:
    """A case measured, times in microseconds."""

    case: Case
    ours_us: float
    peer: str
    peer_us: float

    @property
    def ratio(self) -> float:
        """Time of the peer over ours."""
        return self.peer_us / self.ours_us

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.ratio >= self.case.goal


def all_cases() -> Iterator[Case]:
    """Yield what is measured."""
    for kv_heads in (HEADS, HEADS // 4):
        for bits, goal in GOALS.items():
            yield Case("attend", bits, kv_heads, 8192, 8, 1, goal)
    for bits in GOALS:
        yield Case("attend", bits, HEADS // 4, 1024, 1, 1, SHORT_GOAL)
    for kv_heads in (HEADS, HEADS // 4):
        for batch, new in ((8, 1), (1, 2048)):
            yield Case("append", 3, kv_heads, 4096, batch, new, 1 / APPEND_GOAL)


def _attend_calls(case: Case, device: torch.device) -> Calls:
    calls: Calls = []
    past = torch.full((case.batch,), case.tokens - 1, dtype=torch.int32, device=device)
    for _ in range(copies_for(case.cache_bytes)):
        cache = _filled(case, device)
        queries = torch.randn(case.batch, 1, HEADS, HEAD_DIM, device=device).half()
        room, out = attention_workspace(cache, case.batch, 1, HEADS), torch.empty_like(queries)
        calls.append(
            lambda cache=cache, queries=queries, room=room, out=out: attend_kv(  # type: ignore[misc]
                cache, past, queries, workspace=room, out=out
            )
        )
    return calls


def _filled(case: Case, device: torch.device) -> PackedCache:
    cache = PackedCache.empty(case.batch, case.kv_heads, case.tokens, HEAD_DIM, (case.bits, case.bits), device=device)
    for codes, scales in zip(cache.codes, cache.scales, strict=True):
        codes.random_(0, 256)
        scales[..., 0].uniform_(0.1, 0.5)
        scales[..., 1].uniform_(-2, -1)
    return cache


def _attend_peers(case: Case, device: torch.device) -> dict[str, Calls]:
    size = case.batch * case.kv_heads * case.tokens * HEAD_DIM * 2 * 2
    shape = (case.batch, case.kv_heads, case.tokens, HEAD_DIM)
    caches = [[torch.randn(*shape, device=device).half() for _ in range(2)] for _ in range(copies_for(size))]
    queries = torch.randn(case.batch, HEADS, 1, HEAD_DIM, device=device).half()

    def calls(backend: SDPBackend) -> Calls:
        def attend(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    queries, keys, values, enable_gqa=case.kv_heads != HEADS
                )

        return [lambda keys=keys, values=values: attend(keys, values) for keys, values in caches]  # type: ignore[misc]

    return {name: calls(backend) for name, backend in PEERS.items()}


def _append_calls(case: Case, device: torch.device) -> tuple[Calls, Calls]:
    """Return appends and copies of the same new keys and values, with RoPE in ours; caches take turns."""
    ours: Calls = []
    copies: Calls = []
    start = case.tokens - case.new
    past = torch.full((case.batch,), start, dtype=torch.int32, device=device)
    angles = [torch.randn(case.tokens, HEAD_DIM // 2, device=device) for _ in range(2)]
    new = [torch.randn(case.batch, case.new, case.kv_heads, HEAD_DIM, device=device).half() for _ in range(2)]
    for _ in range(4):
        cache = _filled(case, device)
        ours.append(lambda cache=cache: append_kv(cache, past, new[0], new[1], angles=(angles[0], angles[1])))  # type: ignore[misc]
        whole = torch.empty(2, case.batch, case.tokens, case.kv_heads, HEAD_DIM, device=device).half()

        def copy(whole: torch.Tensor = whole) -> None:
            for part, vectors in zip(whole, new, strict=True):
                part[:, start:].copy_(vectors)

        copies.append(copy)
    return ours, copies


def measure(case: Case, device: torch.device) -> Row:
    """Measure a case; a peer that does not take it is left out.

    Raises:
        RuntimeError: if no peer takes it.
    """
    if case.what == "append":
        ours, copies = _append_calls(case, device)
        return Row(case, microseconds(ours), "copy", microseconds(copies))
    mine = microseconds(_attend_calls(case, device))
    torch.cuda.empty_cache()
    times: dict[str, float] = {}
    refusals: list[str] = []
    for name, calls in _attend_peers(case, device).items():
        try:
            times[name] = microseconds(calls)
        except RuntimeError as error:
            refusals.append(f"{name}: {error}")
    torch.cuda.empty_cache()
    if not times:
        raise RuntimeError(f"no attention of PyTorch takes {case.name}: {'; '.join(refusals)}")
    best = min(times, key=times.__getitem__)
    return Row(case, mine, best, times[best])


def table_of(rows: list[Row], card: str) -> Table:
    """Return the table, the card in its title."""
    table = Table(title=f"{card}; median of {REPEATS}")
    for column in ("case", "µs", "peer", "µs", "ratio", "goal", "ours TB/s"):
        table.add_column(column)
    for row in rows:
        rate = f"{row.case.cache_bytes / row.ours_us / 1e6:.2f}" if row.case.what == "attend" else ""
        goal = f"{row.case.goal:.2f} {'met' if row.met else 'missed'}"
        table.add_row(
            row.case.name, f"{row.ours_us:.1f}", row.peer, f"{row.peer_us:.1f}", f"{row.ratio:.2f}", goal, rate
        )
    return table


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    cases = [case for case in all_cases() if options.only in case.name]
    if not cases:
        sys.exit(f"error: no case contains '{options.only}'")
    if not torch.cuda.is_available():
        sys.exit(
            f"error: PyTorch {torch.__version__} finds no GPU, and these are times on one. Run it where there is an "
            f"NVIDIA GPU and a PyTorch with CUDA; {len(cases)} cases are waiting."
        )
    rows = [measure(case, torch.device("cuda")) for case in cases]
    Console(width=150).print(table_of(rows, torch.cuda.get_device_name()))
    if options.json:
        listed = [dataclasses.asdict(row) | {"name": row.case.name, "ratio": row.ratio, "met": row.met} for row in rows]
        print(json.dumps({"card": torch.cuda.get_device_name(), "rows": listed}))


if __name__ == "__main__":
    main()
