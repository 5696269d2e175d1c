"""Build a target of a bundle that is compiled already: where the engine's GPU is, say, or for another GPU."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from planish.compiler.backends.tensorrt.engine_json import EngineRecord
from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.layout import (
    MANIFEST_FILE,
    MODEL_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    REPORT_FOLDER,
    REPORT_PAGE,
    engine_folder,
)
from planish.compiler.bundle.manifest import Manifest
from planish.compiler.errors import BundleCorruptError, BundleFormatError, OutputFolderError, RecipeError
from planish.compiler.pipeline.recipe import Recipe
from planish.compiler.pipeline.targets import check_context, check_engine_settings, check_targets, lower
from planish.compiler.pipeline.work_folder import clear_errors, lock
from planish.compiler.progress import Progress, Silent
from planish.compiler.report.run_record import RunRecord
from planish.compiler.report.write import write_report

__all__ = ["build_target"]


def build_target(
    bundle: str | Path,
    target: str,
    *,
    max_context: int | None = None,
    max_batch_size: int | None = None,
    max_input_len: int | None = None,
    sms: Sequence[int] | None = None,
    plugins: str | None = None,
    tensorrt_version: str | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Lower the portable model of a bundle to a target, in place of what the bundle has for it, if anything.

    The bundle runs as it is until everything is built. A run that is killed leaves it as it was, or without this
    target. Its recipe learns of the target and of settings that only engines have, and makes the same model as before.

    Args:
        bundle: its folder.
        target: one of `TARGETS`.
        max_context: of an engine; None is that of the engine which is replaced, if there is one, or the recipe's.
        max_batch_size: of an engine; likewise.
        max_input_len: of an engine; likewise.
        sms: see `Recipe`; None is what the recipe of the bundle has.
        plugins: see `Recipe`; likewise.
        tensorrt_version: see `Recipe`; None is none, whatever the recipe of the bundle has.
        progress: is told how far the build is; None says nothing.

    Returns:
        The bundle with the target.

    Raises:
        PlanishError: one of its subclasses: RecipeError for a target that does not exist or settings that do not suit
            it, MissingExtraError, EngineBuildError, BundleCorruptError, or OutputFolderError if the bundle cannot be
            written, or another build is writing to it.

    Example:
        >>> build_target(path, "ort").manifest.targets
        ('ort',)
    """
    with _hold(Path(bundle)) as opened:
        path, before = opened.path, opened.manifest.targets
        if not (path / RECIPE_FILE).is_file():
            raise RecipeError(
                f"{path} has no {RECIPE_FILE}: it is a float export, which has no targets. Compile the checkpoint with "
                "--scheme w16a16k16v16 instead."
            )
        kept = Recipe.read(path / RECIPE_FILE, sms=None if sms is None else tuple(sms), plugins=plugins)
        folder = engine_folder(path, target)
        limits = {"max_context": max_context, "max_batch_size": max_batch_size, "max_input_len": max_input_len}
        # Another machine's TensorRT is no property of the bundle: unless one is named, the engine is built here.
        asked = {"targets": (target,), "tensorrt_version": tensorrt_version}
        given = {name: value for name, value in limits.items() if value is not None}
        recipe = Recipe.read(None, **{**dict(kept), **_limits_of(folder), **given, **asked})
        check_targets(recipe)
        check_engine_settings(
            recipe.targets,
            **limits,
            sms=sms,
            plugins=plugins,
            tensorrt_version=tensorrt_version,
        )
        longest = min(opened.config.max_context, opened.manifest.max_context)
        check_context(max_context, longest)
        _check_links(path, folder)
        opened = _without_leftovers(opened, folder.parent)
        with clear_errors(path), _scratch(folder) as made:
            lower(target, path / MODEL_FILE, made, recipe, longest, progress or Silent())
            # What planish.json lists is always there and whole: it forgets the target first and learns it last.
            others = tuple(each for each in before if each != target)
            changing = (folder.relative_to(path).as_posix() + "/", RECIPE_FILE, REPORT_FOLDER + "/")
            manifest = dataclasses.replace(_without(opened.manifest, changing), targets=others)
            manifest.write_records(path)
            if folder.exists():
                shutil.rmtree(folder)
            made.rename(folder)
            targets = (*others, target)
            if target == "tensorrt":
                kept = kept.model_copy(update={"tensorrt_version": tensorrt_version})
            # Without the limits: those of the recipe are for all engines, and this one's are in its engine.json.
            kept.model_copy(update={"targets": targets}).write(path / RECIPE_FILE)
            manifest = dataclasses.replace(manifest, targets=targets)
            write_report(Bundle(path, manifest), RunRecord.read(opened))
            written = [path / name for name in (RECIPE_FILE, REPORT_FILE, REPORT_PAGE)]
            written += (each for each in folder.rglob("*") if each.is_file())
            manifest.recording(path, written).write_records(path)
        return Bundle.open(path, verify=False)


@contextlib.contextmanager
def _hold(path: Path) -> Iterator[Bundle]:
    """Open a bundle, and keep other builds from it meanwhile.

    Raises:
        OutputFolderError: if another build has it.
    """
    # Says what is there instead, where it is no bundle.
    Bundle.open(path, verify=False)
    # The folder itself is locked: a file for it would be one more in the bundle, and planish.json is replaced.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network disks lock no folders: there a build is as good as it is without a lock.
        with contextlib.suppress(OSError):
            lock(descriptor, f"Another build is writing to {path}. Wait for it, and run the same command again.")
        yield Bundle.open(path)
    finally:
        os.close(descriptor)


def _limits_of(engine: Path) -> dict[str, int]:
    """Return the limits of the engine in a folder, by setting; none where there is none that this planish reads."""
    with contextlib.suppress(BundleCorruptError, BundleFormatError):
        record = EngineRecord.read(engine)
        limits = {"max_context": record.max_context, "max_batch_size": record.max_batch}
        # Prompts as long as the cache may have been cut to it, and a larger one takes longer prompts.
        return limits if record.max_prompt >= record.max_context else {**limits, "max_input_len": record.max_prompt}
    return {}


def _check_links(bundle: Path, engine: Path) -> None:
    """Refuse symbolic links that a build would stumble over when its work is done.

    Raises:
        OutputFolderError: if the engine's folder is one, or the model's files are, as in a cache of the Hub.
    """
    if engine.is_symlink():
        raise OutputFolderError(
            f"{engine} is a symbolic link, in whose place the new one would be written. Remove it first."
        )
    linked = [name for name in (MODEL_FILE, f"{MODEL_FILE}.data") if (bundle / name).is_symlink()]
    if linked:
        raise OutputFolderError(
            f"{bundle / linked[0]} is a symbolic link, and ONNX reads no weights through one. Copy the bundle with "
            "cp -rL, and build in the copy."
        )


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Make a folder beside `folder`, and remove it again unless it was renamed."""
    made = folder.with_name(f".{folder.name}.partial")
    try:
        made.mkdir(parents=True)
    except OSError as error:
        raise OutputFolderError(
            f"{made} cannot be made ({error.strerror}). Give a bundle that can be written."
        ) from error
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _without_leftovers(bundle: Bundle, engines: Path) -> Bundle:
    """Remove what killed builds left, and find out before a long build whether planish.json can be written behind it.

    Raises:
        OutputFolderError: if it cannot.
    """
    path, left = bundle.path, list(engines.glob(".*.partial"))
    manifest = _without(bundle.manifest, tuple(each.relative_to(path).as_posix() + "/" for each in left))
    try:
        with clear_errors(path):
            manifest.write_records(path)
    except OSError as error:
        raise OutputFolderError(
            f"{path / MANIFEST_FILE} cannot be written ({error.strerror}). Give a bundle that can be written."
        ) from error
    for each in left:
        shutil.rmtree(each, ignore_errors=True)
    return Bundle(path, manifest)


def _without(manifest: Manifest, begun: tuple[str, ...]) -> Manifest:
    """Return a manifest without the records of files whose names begin with one of `begun`."""
    files = {name: record for name, record in manifest.files.items() if not name.startswith(begun)}
    return dataclasses.replace(manifest, files=files)
