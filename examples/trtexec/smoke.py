"""Run an engine's model through trtexec once: does this TensorRT load the plugins, build the model and run a step?

    python smoke.py out/smollm2/engines/tensorrt [--run] [--save] [--plugins LIBRARY]

prints the command of trtexec, and with --run runs it; with --save trtexec writes model.engine beside the model. Needs
nothing but Python 3.10.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

NEW_TOKENS = 4  # or fewer, where the engine takes no prompt of as many
LIBRARY = "libplanish_plugins.so"
_SIZES = {"int64": 8, "int32": 4, "float32": 4, "float16": 2}


def write_inputs(record: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Write one prompt behind an empty cache; trtexec's random numbers would be no lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    files, tokens = {}, new_tokens(record)
    first = {
        "new_lengths": [tokens],
        "num_logits_to_keep": [1],
        "position_ids": range(tokens),
        "attention_mask": [1] * tokens,
    }
    for name, given in record["inputs"].items():
        size, count = _SIZES[given["dtype"]], 1
        for length in shape_of(name, given, tokens):
            count *= length
        content = b"".join(number.to_bytes(size, "little") for number in first.get(name, ()))
        content += bytes(size * count - len(content))
        files[name] = folder / f"{name}.bin"
        files[name].write_bytes(content)
    return files


def new_tokens(record: dict[str, Any]) -> int:
    """Return the number of tokens in the prompt."""
    return int(min(NEW_TOKENS, record["inputs"]["input_ids"]["max"][1]))


def shape_of(name: str, given: dict[str, Any], tokens: int) -> list[int]:
    """Return the shape of an input: one sequence, and `tokens` tokens where the profile leaves the length open."""
    if given["is_shape"]:
        return []
    return [1, tokens] if name in ("input_ids", "position_ids") else list(given["min"])


def command(engine: Path, library: Path | None = None, save: bool = False) -> list[str]:
    """Return the command for the model in the folder of a planish engine.

    Args:
        engine: the folder.
        library: of the plugins, if the model has some; None is the one that lies in the folder.
        save: whether trtexec is to write the engine into the folder.

    Raises:
        SystemExit: if the model has plugins and there is no library.
    """
    record = json.loads((engine / "engine.json").read_text())
    with_plugins = []
    if record.get("plugins") is not None:
        library = library or engine / LIBRARY
        if not library.is_file():
            raise SystemExit(f"The model has plugins, and {library} is missing. Compile it here, and give --plugins.")
        with_plugins = [f"--dynamicPlugins={library}", "--preview=+aliasedPluginIO1003"]
    files = write_inputs(record, engine / "smoke")

    def shapes(end: str) -> str:
        parts = [f"{name}:{'x'.join(map(str, given[end])) or 1}" for name, given in record["inputs"].items()]
        return ",".join(parts)

    sizes = {name: shape_of(name, given, new_tokens(record)) for name, given in record["inputs"].items()}
    at_run = [f"{name}:{'x'.join(map(str, shape)) or 1}" for name, shape in sizes.items()]
    return [
        "trtexec",
        f"--onnx={engine / 'model.onnx'}",
        "--stronglyTyped",
        *with_plugins,
        *([f"--saveEngine={engine / 'model.engine'}"] if save else []),
        *(f"--{end}Shapes={shapes(end)}" for end in ("min", "opt", "max")),
        f"--shapes={','.join(at_run)}",
        "--loadInputs=" + ",".join(f"{name}:{path}" for name, path in files.items()),
        "--iterations=1",
        "--warmUp=0",
        "--duration=0",
    ]


def main() -> None:
    """Print the command, and run it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", type=Path, help="engines/tensorrt of a bundle")
    parser.add_argument("--run", action="store_true", help="run trtexec, which must be on the path")
    parser.add_argument("--save", action="store_true", help="let trtexec write model.engine beside the model")
    parser.add_argument("--plugins", type=Path, help="the plugin library, if it lies elsewhere")
    given = parser.parse_args()
    line = command(given.engine, given.plugins, given.save)
    print(" \\\n    ".join(line))
    if given.run:
        sys.exit(subprocess.run(line, check=False).returncode)


if __name__ == "__main__":
    main()
