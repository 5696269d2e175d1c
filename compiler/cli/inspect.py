"""`planish inspect`: what is in a bundle."""

from pathlib import Path
from typing import Annotated

import typer

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.cli.app import JsonFlag, Output
from planish.compiler.errors import EngineMismatchError, MissingExtraError

__all__ = ["run_inspect"]


def run_inspect(bundle: Annotated[Path, typer.Argument(help="A bundle.")], json: JsonFlag = False) -> None:
    """Check the files of a bundle and say what is in it."""
    from planish.compiler.bundle.inspection import inspect

    out, opened = Output(json), Bundle.open(bundle)
    found, engines = inspect(opened), _engines(opened)
    sizes = ", ".join(f"{part} {size / 1e6:.1f} MB" for part, size in found.sizes.items())
    out.rows(
        {
            "model": f"{found.model}, {found.layers} layers",
            "scheme": f"{found.scheme}, lm_head {found.lm_head}",
            "linears": f"{found.linears} quantised, {found.skipped} in floating point",
            "bits per weight": f"{found.average_bits:.3f} linears, {found.lm_head_bits:.3f} lm_head; scales counted",
            "KV cache": f"{found.kv_bytes_per_token} bytes per token, {found.kv_saving:.2f} x smaller than float16",
            "context": f"{found.max_context} tokens",
            "targets": ", ".join(found.targets) or "none: the portable model alone",
            "sizes": sizes,
            **{f"engine {target}": state for target, state in engines.items()},
        }
    )
    out.result({**found.to_dict(), "engines": engines})


def _engines(bundle: Bundle) -> dict[str, str]:
    """Return target -> whether its engine runs on this machine, in words."""
    engines = {}
    for target in bundle.manifest.targets:
        if target == "ort":
            continue
        try:
            record = bundle.engine(target)
        except (EngineMismatchError, MissingExtraError) as error:
            engines[target] = str(error)
        else:
            engines[target] = f"runs here; up to {record.max_batch} sequences of {record.max_context} tokens"
    return engines
