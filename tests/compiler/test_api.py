"""The public names are there, and the examples in their docstrings run."""

import doctest
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import planish.compiler
from planish.compiler.bundle.bundle import Bundle

_EXAMPLES = ("Bundle", "build_target", "compile_model", "evaluate", "inspect")


@pytest.mark.parametrize("name", planish.compiler.__all__)
def test_public_names_resolve_and_are_documented(name: str) -> None:
    assert getattr(planish.compiler, name).__doc__
    assert name in dir(planish.compiler)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compile_modle'"):
        _ = planish.compiler.compile_modle


def test_importing_a_module_does_not_hide_a_public_name() -> None:
    # A submodule called like a public function would replace it once it is imported.
    show = """
import pkgutil, planish.compiler as c
print(*{m.name for m in pkgutil.iter_modules(c.__path__)} & set(c.__all__))
"""
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", _EXAMPLES)
def test_examples_run(name: str, tiny: Path, bundle: Bundle, text: Path, tmp_path: Path) -> None:
    names = {
        **{public: getattr(planish.compiler, public) for public in planish.compiler.__all__},
        "checkpoint": tiny,
        "out": tmp_path / "out",
        "bundle": bundle,
        "path": shutil.copytree(bundle.path, tmp_path / "bundle") if name == "build_target" else bundle.path,
        "text": text,
    }
    parser, failed = doctest.DocTestRunner(), 0
    tests = doctest.DocTestFinder(recurse=False).find(getattr(planish.compiler, name), name, globs=names)
    ran = sum(len(test.examples) for test in tests)
    for test in tests:
        failed += parser.run(test).failed
    assert failed == 0
    assert ran > 0
