"""Perplexity at equal bits: high-impact channels by solved and by fixed numbers, and groups of scales without any.

    python benchmarks/high_impact.py smollm2 --dataset CALIBRATION --text SCORING [...] --work FOLDER --rows ROWS

Rows are spelled SCHEME, which has no high-impact channels, or SCHEME@BUDGET:RULE:ROUNDING, separated by commas. Rules
are solved, fixed, no-pairs (the losses of groups just add up) and no-fisher (channels ranked by their share of their
linear's error, blocks alike). Roundings are gptq, adaround and nearest. A row flattens and polishes the whole model and
scores it before and after the polish, in PyTorch: perplexity, and KL divergence from the float model in nats per token.
What rows share, and finished rows, is kept in the work folder, from which a killed run goes on.
"""

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation import float_blocks, perplexity_of, windows_of
from rich.console import Console
from rich.table import Table

from planish.compiler.calibrate.text import calibration_tokens
from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.learn.flattening import flatten_checkpoint, held_out_sequences
from planish.compiler.learn.polish.low_bit_model import LowBitModel
from planish.compiler.learn.polish.next_token import Head
from planish.compiler.learn.polish.polish import polish
from planish.compiler.learn.precision import fast_products
from planish.compiler.learn.rounding.site_fit import HighCount, Steps
from planish.compiler.learn.stream_files import StreamFiles
from planish.compiler.learn.transforms.candidates import Form
from planish.compiler.pipeline.high_impact import unranked
from planish.compiler.progress import Progress, progress_for
from planish.compiler.quantize.codes import CodesOnDisk
from planish.compiler.select.channel_split import ChannelSplit
from planish.compiler.select.choose_forms import choose_forms
from planish.compiler.select.fitted_transforms import fit_transforms
from planish.compiler.select.high_channels import (
    SEQUENCES,
    ChosenChannels,
    HighPolicy,
    check_high_policy,
    choose_channels,
    high_counts,
)
from planish.compiler.select.pair_losses import BY_SITE, PairLosses, group_shapes
from planish.compiler.select.policy import SelectionPolicy
from planish.compiler.select.ratios import average_bits, choose_counts
from planish.compiler.select.sensitivity import measure_sensitivity
from planish.passes.scheme import Scheme
from planish.passes.transforms import Site, Transforms

#: Perplexity and divergence on one text.
Score = dict[str, float]

RULES = ("solved", "fixed", "no-pairs", "no-fisher")


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to spend bits.

    Attributes:
        scheme: of the model.
        budget: stored bits per weight; None has no high-impact channels.
        rule: one of `RULES`.
        rounding: of the weights.
    """

    scheme: Scheme
    budget: float | None = None
    rule: str = "solved"
    rounding: str = "gptq"

    @classmethod
    def of(cls, spelling: str) -> "Row":
        """Read a spelling such as w2a16@2.3:solved:gptq."""
        head, *rest = spelling.split(":")
        scheme, _, budget = head.partition("@")
        return cls(Scheme.parse(scheme), float(budget) if budget else None, *rest)


class Setting:
    """What all rows share: a model, its calibration text, and a folder where what is found is kept."""

    def __init__(self, arguments: argparse.Namespace, progress: Progress) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(arguments.model)
        self.tokens = calibration_tokens(
            arguments.dataset,
            self.checkpoint,
            nsamples=arguments.nsamples,
            seqlen=arguments.seqlen,
            seed=arguments.seed,
        )
        self._seed = arguments.seed
        self._texts = {
            text: windows_of(self.checkpoint, text, arguments.seqlen, arguments.windows) for text in arguments.text
        }
        self._expected = {text: float_blocks(self.checkpoint, windows) for text, windows in self._texts.items()}
        self._policy = SelectionPolicy.parse(arguments.select)
        self._bits, self._epochs = arguments.hic_bits, arguments.polish
        self._work, self._progress = arguments.work, progress

    def folder(self, *parts: object) -> Path:
        """Return a folder in the work folder, which is made."""
        folder: Path = self._work.joinpath(*map(str, parts))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def forms(self, scheme: Scheme) -> list[dict[Site, Form]]:
        """Return the forms of the transforms of every block for a scheme."""
        chosen = choose_forms(self.checkpoint, scheme, self._policy, self.tokens, self.folder(scheme), self._progress)
        return [each.forms for each in chosen]

    def choose(self, row: Row, forms: list[dict[Site, Form]]) -> ChosenChannels:
        """Return how many channels of a row are high, and what that rests on."""
        assert row.budget is not None
        folder = self.folder(row.scheme)
        transforms, _ = fit_transforms(self.checkpoint, row.scheme, forms, self.tokens, folder, self._progress)
        of_score = {"score": "moment", "weighted": False} if row.rule == "no-fisher" else {}
        policy = HighPolicy(self._bits, row.budget, name="fixed" if row.rule == "fixed" else "solved", **of_score)
        form = row.scheme.linear
        check_high_policy(policy, self.checkpoint, form)
        folder = self.folder(row.scheme, f"{self._bits}-{row.budget}-{policy.score}")
        # Sensitivity does not depend on the budget.
        shared = self.folder(row.scheme, "sensitivity")
        sensitivity = measure_sensitivity(
            self.checkpoint, self.tokens[:SEQUENCES], form, shared, self._progress, transforms
        )
        for path in shared.glob("*.safetensors"):
            link = folder / path.name
            if not link.exists():
                link.hardlink_to(path)
        started = time.perf_counter()
        chosen = choose_channels(policy, self.checkpoint, form, transforms, self.tokens, folder, self._progress)
        self._progress.say(f"choosing took {time.perf_counter() - started:.0f} s")
        if row.rule != "no-pairs":
            return chosen
        split, shapes = ChannelSplit.of(form, policy.bits), group_shapes(self.checkpoint, BY_SITE)
        alone = [without_pairs(PairLosses(**each)) for each in chosen.evidence["losses"]]
        counts = choose_counts(alone, shapes, split, row.budget, chosen.evidence["block_weights"])
        evidence = chosen.evidence | {"counts": counts, "stored_bits": average_bits(counts, shapes, split)}
        return ChosenChannels(high_counts(counts, sensitivity, policy), evidence)

    def scores(
        self, spelling: str, forms: list[dict[Site, Form]], high: list[dict[Site, HighCount]] | None
    ) -> dict[str, dict[str, Score]]:
        """Return by text how good a row is as it is flattened, and as it is polished."""
        row, checkpoint, tokens = Row.of(spelling), self.checkpoint, self.tokens
        layers, held_out = checkpoint.config.num_hidden_layers, held_out_sequences(len(tokens))
        work = self.folder("flattening", spelling)
        first, last = self.folder(work, "rounded"), self.folder(work, "polished")
        transforms = flatten_checkpoint(
            checkpoint,
            row.scheme,
            forms,
            tokens,
            work,
            CodesOnDisk(first, checkpoint, row.scheme, unranked(high, checkpoint.config).high),
            steps=Steps(rounding=row.rounding),
            high=high,
            progress=lambda done, total: self._progress.step("flatten", done, total),
        )
        rounded, scaled = (CodesOnDisk(each, checkpoint, row.scheme, transforms.high) for each in (first, last))
        found = {"flattened": self._score(row.scheme, transforms, rounded)}
        if self._epochs:
            polished = polish(
                checkpoint,
                row.scheme,
                transforms,
                rounded,
                tokens,
                StreamFiles(work, held_out).open(layers).target,
                held_out,
                self._epochs,
                work,
                seed=self._seed,
                progress=lambda done, total: self._progress.step("polish", done, total),
            )
            scaled.keep_scaled(rounded, polished.row_scales)
            found["polished"] = self._score(row.scheme, polished.transforms, scaled)
        shutil.rmtree(work)
        return found

    @torch.no_grad()
    def _score(self, scheme: Scheme, transforms: Transforms, codes: CodesOnDisk) -> dict[str, Score]:
        model, head = LowBitModel(self.checkpoint, scheme, transforms, codes), Head.of(self.checkpoint)
        scores: dict[str, Score] = {}
        for text, windows in self._texts.items():
            with fast_products():
                hidden = torch.cat([model.outputs(window[None]) for window in windows])
                divergence = head.mean_divergence(hidden, self._expected[text])
            perplexity = perplexity_of(self.checkpoint, scheme, windows, hidden)
            scores[text] = {"perplexity": perplexity, "divergence": divergence}
        return scores


def without_pairs(losses: PairLosses) -> PairLosses:
    """Return the same losses with groups that do not act on each other."""
    together = {
        first: {second: np.add.outer(losses.alone[first], losses.alone[second]).tolist() for second in of_first}
        for first, of_first in losses.together.items()
    }
    return dataclasses.replace(losses, together=together)


def stored_bits(scheme: Scheme, checkpoint: Checkpoint) -> float:
    """Return the stored bits per weight without high-impact channels."""
    shapes = group_shapes(checkpoint, BY_SITE).values()
    bits = sum(scheme.linear.average_bits(inputs) * rows * inputs for rows, inputs in shapes)
    return bits / sum(rows * inputs for rows, inputs in shapes)


def run_row(setting: Setting, spelling: str) -> dict[str, Any]:
    """Return the scores of a row, the bits it stores, the time it took, and its numbers of channels."""
    row, started = Row.of(spelling), time.perf_counter()
    forms, found, high = setting.forms(row.scheme), {}, None
    if row.budget is None:
        found["bits"] = stored_bits(row.scheme, setting.checkpoint)
    else:
        chosen = setting.choose(row, forms)
        high = chosen.high
        found["bits"], found["counts"] = chosen.evidence["stored_bits"], chosen.evidence["counts"]
    return {**found, **setting.scores(spelling, forms, high), "seconds": round(time.perf_counter() - started)}


def main() -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True, help="calibration text")
    parser.add_argument("--text", required=True, nargs="+", help="scoring texts")
    parser.add_argument("--work", type=Path, required=True, help="folder of one setting; rows may differ")
    parser.add_argument("--rows", required=True)
    parser.add_argument("--select", default="fixed:affine", help="policy of the transforms")
    parser.add_argument("--hic-bits", type=int, default=4)
    parser.add_argument("--polish", type=int, default=4, help="epochs; 0 leaves it out")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40, help="of every text")
    parser.add_argument(
        "--seed", type=int, default=0, help="of what is taken of the calibration text, and of polishing"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows: Sequence[str] = arguments.rows.split(",")
    kept = arguments.work / "rows.json"
    with progress_for() as progress:
        setting = Setting(arguments, progress)
        for spelling in rows:
            found = json.loads(kept.read_text()) if kept.exists() else {}
            if spelling not in found:
                found[spelling] = run_row(setting, spelling)
                kept.write_text(json.dumps(found))
    table = Table("row", "bits", "text", "flattened", "divergence", "polished", "divergence", "seconds")
    for spelling in rows:
        each = found[spelling]
        for text in arguments.text:
            scores = [
                f"{each[made][text][score]:{digits}}" if made in each else ""
                for made in ("flattened", "polished")
                for score, digits in (("perplexity", ".2f"), ("divergence", ".3f"))
            ]
            table.add_row(spelling, f"{each['bits']:.3f}", Path(text).name, *scores, str(each["seconds"]))
    Console().print(table)
    if arguments.json:
        print(json.dumps({row: found[row] for row in rows}))


if __name__ == "__main__":
    main()
