"""Perplexity, size and speed of a model rounded to nearest, under several schemes, each beside its PyTorch oracle.

    python benchmarks/schemes.py --text wikitext2_valid.txt --scheme w4a8k8v8 --scheme w4a4k4v4

Bundles go to `--folder` and are kept there, so a run that was stopped goes on with the schemes that are missing.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.inspection import inspect
from planish.compiler.checkpoint.first_layers import open_first_layers
from planish.compiler.measure.bench import bench
from planish.compiler.measure.evaluation import evaluate
from planish.compiler.measure.texts import read_text
from planish.compiler.pipeline.compile import compile_recipe
from planish.compiler.pipeline.recipe import Recipe
from planish.compiler.progress import Silent
from planish.compiler.quantize.codes import quantize_checkpoint
from planish.compiler.verify.verification import verify


def against_oracle(recipe: Recipe, bundle: Bundle, text: Path, seqlen: int, windows: int) -> dict[str, float]:
    """Verify the bundle on every window of the text; return perplexities and how many codes were followed."""
    checkpoint, scheme = open_first_layers(recipe.model, recipe.num_layers), recipe.parsed_scheme()
    ids = np.asarray(bundle.tokenizer.encode(read_text(text))[: seqlen * windows]).reshape(windows, seqlen)
    with tempfile.TemporaryDirectory() as scratch:
        codes = quantize_checkpoint(checkpoint, scheme, Path(scratch))
        found = [verify(checkpoint, scheme, codes, bundle.model_path(), window.tolist()) for window in ids]

    def mean(name: str) -> float:
        return math.exp(statistics.fmean(math.log(getattr(each, name)) for each in found))

    return {
        "oracle_perplexity": mean("oracle_perplexity"),
        "unfollowed_perplexity": mean("unfollowed_perplexity"),
        "worst_logits_error": max(each.logits_error for each in found),
        "followed_per_million": 1e6
        * sum(each.followed for each in found)
        / max(1, sum(each.roundings for each in found)),
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--scheme", action="append", required=True)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("out/schemes"))
    parser.add_argument("--oracle", action="store_true", help="also verify every window against the oracle")
    parser.add_argument("--speed", action="store_true", help="also measure speed and memory against the float model")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    rows = []
    for scheme in arguments.scheme:
        recipe = Recipe.read(None, model=arguments.model, scheme=scheme, select="none")
        out = arguments.folder / scheme
        bundle = Bundle.open(out) if out.exists() else compile_recipe(recipe, out, Silent())
        found = inspect(bundle)
        measured = evaluate(
            bundle.session(threads=2),
            bundle.tokenizer,
            arguments.text,
            seqlen=arguments.seqlen,
            windows=arguments.windows,
        )
        row = {
            "scheme": scheme,
            "average_bits": found.average_bits,
            "kv_bytes_per_token": found.kv_bytes_per_token,
            "perplexity": measured.perplexity,
        }
        if arguments.oracle:
            row |= against_oracle(recipe, bundle, arguments.text, arguments.seqlen, arguments.windows)
        if arguments.speed:
            row |= {k: v for k, v in bench(bundle).to_dict().items() if k.endswith(("speedup", "ratio"))}
        rows.append(row)

    if arguments.json:
        print(json.dumps(rows))
        return
    table = Table(
        title=f"{arguments.model}, {arguments.windows} windows of {arguments.seqlen} of {arguments.text.name}"
    )
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
