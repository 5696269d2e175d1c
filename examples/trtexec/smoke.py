"""Run an engine's model through trtexec once: does this TensorRT load the plugins, build the model and run a step?

    python smoke.py out/smollm2/engines/tensorrt [--run]

prints the command of trtexec, and with --run runs it. Needs nothing but Python.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

NEW_TOKENS = 4
_SIZES = {"int64": 8, "int32": 4, "float32": 4, "float16": 2}


def write_inputs(record: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Write one prompt of `NEW_TOKENS` tokens behind an empty cache; trtexec's random numbers would be no lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, given in record["inputs"].items():
        size = _SIZES[given["dtype"]]
        numbers = {"new_lengths": [NEW_TOKENS], "num_logits_to_keep": [1], "position_ids": range(NEW_TOKENS)}.get(name)
        if numbers is None:
            count = 1
            for length in shape_of(name, given):
                count *= length
            content = bytes(size * count)
        else:
            content = b"".join(number.to_bytes(size, "little") for number in numbers)
        files[name] = folder / f"{name}.bin"
        files[name].write_bytes(content)
    return files


def shape_of(name: str, given: dict[str, Any]) -> list[int]:
    """Return the shape of an input: one sequence, and `NEW_TOKENS` tokens where the profile leaves the length open."""
    if given["is_shape"]:
        return []
    return [1, NEW_TOKENS] if name in ("input_ids", "position_ids") else list(given["min"])


def command(engine: Path) -> list[str]:
    """Return the command for the model in the folder of a planish engine with plugins.

    Raises:
        SystemExit: if the engine has no plugins.
    """
    record = json.loads((engine / "engine.json").read_text())
    if record.get("plugins") is None:
        raise SystemExit(f"{engine} has no plugins. Build it where PLANISH_PLUGINS names the plugin library.")
    files = write_inputs(record, engine / "smoke")

    def shapes(end: str) -> str:
        parts = [f"{name}:{'x'.join(map(str, given[end])) or 1}" for name, given in record["inputs"].items()]
        return ",".join(parts)

    at_run = [f"{name}:{'x'.join(map(str, shape_of(name, given))) or 1}" for name, given in record["inputs"].items()]
    return [
        "trtexec",
        f"--onnx={engine / 'model.onnx'}",
        f"--dynamicPlugins={engine / record['plugins']['library']['file']}",
        "--stronglyTyped",
        "--preview=+aliasedPluginIO1003",
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
    given = parser.parse_args()
    line = command(given.engine)
    print(" \\\n    ".join(line))
    if given.run:
        sys.exit(subprocess.run(line, check=False).returncode)


if __name__ == "__main__":
    main()
