"""The commands of the examples' READMEs run, on two layers of the model and with little calibration text."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = sorted((ROOT / "examples").glob("*/README.md"))
#: Its commands need TensorRT; tests/compiler/test_deploy_examples.py tests what can be tested of it.
NEED_TENSORRT = ("tensorrt_cpp",)
#: A command of a README, as a newcomer would copy it.
_COMMAND = re.compile(r"^    ((?:planish|python) .*)$", re.MULTILINE)
#: What makes a command cheap, by its first words.
_REDUCED = {
    "planish compile": "--num-layers 2 --max-context 128",
    "planish study": "--num-layers 2 --nsamples 4 --seqlen 64",
    "planish eval": "--windows 1 --seqlen 64",
    "planish generate": "--max-new-tokens 4",
}
#: What besides makes a compile cheap that flattens.
_FEW = "--nsamples 4 --seqlen 64 --polish 1"


def commands(readme: Path) -> list[str]:
    found = _COMMAND.findall(readme.read_text(encoding="utf-8"))
    return [
        f"{each} {_REDUCED.get(' '.join(each.split()[:2]), '')} "
        f"{_FEW if each.startswith('planish compile') and '--select none' not in each else ''}"
        for each in found
    ]


@pytest.mark.parametrize(
    "readme", [each for each in READMES if each.parent.name not in NEED_TENSORRT], ids=lambda path: path.parent.name
)
def test_the_commands_of_an_example_run(readme: Path, tmp_path: Path) -> None:
    assert commands(readme)
    for name in ("README.md", "docs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands(readme):
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip(), f"{command} prints nothing"
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_every_example_has_a_readme() -> None:
    folders = {path.name for path in (ROOT / "examples").iterdir() if path.is_dir()}
    assert folders == {readme.parent.name for readme in READMES}
