"""What is installed, who may import whom, and what a light import must not pull in."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("compiler", "passes", "plugins")
MAX_LINES = 400

# Importing one of these must stay light: they are what running a bundle needs.
RUNTIME_MODULES = [
    "planish.compiler",
    "planish.compiler.errors",
    "planish.compiler.optional",
    "planish.plugins.errors",
]
HEAVY = {"gguf", "polygraphy", "tensorrt", "tensorrt_rtx", "torch", "transformers"}

# A part of planish -> what its modules must not import.
FORBIDDEN = {
    "passes": ("planish.compiler",),
    "plugins": ("planish.compiler", "planish.passes"),
}


def _sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything `path` imports, `from a import b` as a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _run(*command: str, cwd: Path, **variables: str) -> str:
    """Run this Python in `cwd` and return what it prints; what it says on failure is in the test's report."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a distribution is built from, with a new subpackage, data files and a test added."""
    target = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (target / "plugins" / "added" / "deep").mkdir(parents=True)
    for name in (
        "compiler/added.html.jinja",
        "passes/added_test.py",
        "plugins/added/__init__.py",
        "plugins/added/deep/__init__.py",
        "plugins/added/kernel.cu",
        "plugins/added/kernel.h",
    ):
        (target / name).touch()
    return target


@pytest.fixture(scope="module")
def wheel(copy: Path) -> zipfile.ZipFile:
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-index")
    _run("-m", "pip", "wheel", *options, "-w", "dist", ".", cwd=copy)
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_module_and_no_test(wheel: zipfile.ZipFile, copy: Path) -> None:
    on_disk = {
        f"planish/{path.relative_to(copy)}"
        for folder in FOLDERS
        for path in (copy / folder).rglob("*.py")
        if not path.name.endswith("_test.py")
    }
    packed = {name for name in wheel.namelist() if name.endswith(".py")}
    assert packed == on_disk
    assert "planish/plugins/added/deep/__init__.py" in packed


def test_wheel_holds_the_data_files(wheel: zipfile.ZipFile) -> None:
    expected = {f"planish/{folder}/py.typed" for folder in FOLDERS} | {
        "planish/compiler/added.html.jinja",
        "planish/plugins/added/kernel.cu",
        "planish/plugins/added/kernel.h",
    }
    assert expected <= set(wheel.namelist())


def test_wheel_installs_planish_alone(wheel: zipfile.ZipFile) -> None:
    top, metadata = sorted({name.split("/")[0] for name in wheel.namelist()})
    assert top == "planish"
    assert metadata.startswith("planish-")
    assert metadata.endswith(".dist-info")


def test_wheel_names_the_console_script(wheel: zipfile.ZipFile) -> None:
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    entry_points = wheel.read(path).decode()
    assert entry_points.split() == ["[console_scripts]", "planish", "=", "planish.compiler.cli:main"]


def test_editable_install_is_a_plain_path_that_shows_new_files(copy: Path, tmp_path: Path) -> None:
    build = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    _run("-c", build, cwd=copy)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        (link,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        entry = wheel.read(link).decode().strip()
        assert not [name for name in wheel.namelist() if name.endswith(".py")]
    # Type checkers read paths from .pth files and ignore lines of code.
    assert Path(entry).samefile(copy / ".editable")

    (copy / "passes" / "later").mkdir()
    (copy / "passes" / "later" / "__init__.py").touch()
    show = "import planish.passes.later as module; print(module.__file__)"
    printed = _run("-c", show, cwd=tmp_path, PYTHONPATH=entry)
    assert Path(printed.strip()).samefile(copy / "passes" / "later" / "__init__.py")


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_dependencies_point_one_way(folder: str) -> None:
    # A pass's test may build its graph with the exporter; the pass itself may not.
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _sources(folder)
        if not path.name.endswith("_test.py")
        for name in _imports(path)
        if any(_is_below(name, package) for package in FORBIDDEN[folder])
    ]
    assert not wrong


def test_nothing_imports_the_folders_by_their_own_names() -> None:
    # From the top of the tree `import compiler` would work, and load every module a second time.
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _sources(*FOLDERS, "tests", "examples", "benchmarks")
        for name in _imports(path)
        if any(_is_below(name, folder) for folder in FOLDERS)
    ]
    assert not wrong


@pytest.mark.parametrize("module", RUNTIME_MODULES)
def test_runtime_modules_import_nothing_heavy(module: str, tmp_path: Path) -> None:
    show = f"import {module}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = set(_run("-c", show, cwd=tmp_path).split())
    assert "planish" in loaded
    assert not loaded & HEAVY


def test_files_are_short() -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in _sources(*FOLDERS, "tests", "examples", "benchmarks")
    }
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}
