"""What pyproject.toml cannot say: which packages the mapped folders hold, and how to install them editably.

Everything else about the distribution is in pyproject.toml.
"""

import os
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

FOLDERS = ("compiler", "passes", "plugins")
LINKS = Path(".editable")


class BuildPy(build_py):
    """Leaves the tests that lie beside the passes out of the wheel."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if not module[1].endswith("_test")]


class EditableWheel(editable_wheel):
    """Installs one path entry, `.editable`, where `planish/` holds a link to each folder.

    For mapped folders setuptools would install an import hook instead, which type checkers and editors cannot
    follow.
    """

    def finalize_options(self) -> None:
        namespace = LINKS / "planish"
        namespace.mkdir(parents=True, exist_ok=True)
        for folder in FOLDERS:
            link = namespace / folder
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(folder, namespace), target_is_directory=True)
        self.distribution.package_dir = {"": str(LINKS)}
        # Named too, so that setuptools sees that all packages lie below one path.
        self.distribution.packages.insert(0, namespace.name)
        super().finalize_options()


setup(
    packages=[
        name
        for folder in FOLDERS
        for name in (f"planish.{folder}", *(f"planish.{folder}.{sub}" for sub in find_packages(folder)))
    ],
    cmdclass={"build_py": BuildPy, "editable_wheel": EditableWheel},
)
