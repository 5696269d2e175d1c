"""Times of the CUDA kernels beside their peers, in one table.

    make plugins
    python -m benchmarks.gpu [--only TEXT] [--json]

Every time is the median of 50 replays of a CUDA graph, divided by its calls. Weights take turns, more than 120 MB of
them and three times the L2, so that none is found there. The peer runs in the same process on the same card. `ratio`
is the peer's time over ours, `goal` what it should be at least; `floor` is the least time by the card's own measured
ceilings, and `of floor` how much of our time that is. With `--json` the last line is one JSON object.
"""

import argparse
import dataclasses
import json
import sys

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.cases import Case, all_cases
from benchmarks.gpu.shapes import Ceilings, floor
from benchmarks.gpu.timing import REPEATS, measure_ceilings, microseconds


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of a case, times in microseconds."""

    name: str
    tokens: int
    what: str
    peer: str
    ours_us: float
    peer_us: float
    floor_us: float
    goal: float | None

    @classmethod
    def of(cls, case: Case, ours_us: float, peer_us: float, ceilings: Ceilings) -> "Row":
        """Return the row of a case from its two times."""
        least = floor(case.bytes_moved, case.operations, ceilings, case.int8)
        return cls(case.name, case.tokens, case.what, case.peer, ours_us, peer_us, least, case.goal)

    @property
    def ratio(self) -> float:
        """Time of the peer over ours."""
        return self.peer_us / self.ours_us

    def cells(self) -> list[str]:
        """Return the row as the table shows it."""
        goal = "" if self.goal is None else f"{self.goal:.2f} {'met' if self.ratio >= self.goal else 'missed'}"
        times = [f"{each:.1f}" for each in (self.ours_us, self.peer_us)]
        share = f"{self.floor_us / self.ours_us:.0%}"
        return [self.name, str(self.tokens), self.what, times[0], self.peer, times[1], f"{self.ratio:.2f}", goal,
                f"{self.floor_us:.1f}", share]  # fmt: skip


COLUMNS = ("linear", "tokens", "ours", "µs", "peer", "µs", "ratio", "goal", "floor µs", "of floor")


def table_of(rows: list[Row], card: str, ceilings: Ceilings) -> Table:
    """Return the table, the card and its ceilings in the title."""
    table = Table(
        title=f"{card}: {ceilings.bytes_per_second / 1e12:.2f} TB/s, "
        f"{ceilings.float16_per_second / 1e12:.0f} T float16/s, {ceilings.int8_per_second / 1e12:.0f} T int8/s, "
        f"{ceilings.launch_us:.1f} µs from kernel to kernel; median of {REPEATS}"
    )
    for column in COLUMNS:
        table.add_column(column)
    for row in rows:
        table.add_row(*row.cells())
    return table


def measure(case: Case, device: torch.device, ceilings: Ceilings) -> Row:
    """Measure a case and free its memory."""
    pair = case.make(device)
    row = Row.of(case, microseconds(pair.ours), microseconds(pair.peer), ceilings)
    del pair
    torch.cuda.empty_cache()
    return row


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name and kernel contain TEXT")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    cases = [case for case in all_cases() if options.only in f"{case.name} {case.what}"]
    if not cases:
        sys.exit(f"error: no row contains '{options.only}'")
    if not torch.cuda.is_available():
        sys.exit(
            f"error: PyTorch {torch.__version__} finds no GPU, and these are times on one. Run it where there is an "
            f"NVIDIA GPU and a PyTorch with CUDA; {len(cases)} rows are waiting."
        )
    ceilings = measure_ceilings()
    card = torch.cuda.get_device_name()
    rows = [measure(case, torch.device("cuda"), ceilings) for case in cases]
    Console(width=170).print(table_of(rows, card, ceilings))
    if options.json:
        listed = [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows]
        print(json.dumps({"card": card, "ceilings": dataclasses.asdict(ceilings), "rows": listed}))


if __name__ == "__main__":
    main()
