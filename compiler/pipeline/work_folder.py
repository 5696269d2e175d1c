"""The folder that a compile works in, beside the output: resumed by the same compile, renamed at the end."""

import contextlib
import errno
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

import planish.compiler
import planish.passes
import planish.plugins
from planish.compiler.checkpoint.files import write_json
from planish.compiler.errors import DiskFullError, OutputFolderError, PlanishError
from planish.compiler.pipeline.stages import Stage
from planish.compiler.progress import Progress

__all__ = ["WorkFolder", "check_output", "check_space", "clear_errors", "code_fingerprint", "lock"]

_STATE, _LOCK = "state.json", "lock"


class WorkFolder:
    """`OUT.partial`, which holds the growing bundle, the quantised blocks, and what is finished.

    Attributes:
        path: the folder itself.
        bundle: what becomes the output.
        codes: for the quantised blocks.
        flatten: for what flattening learns.
    """

    def __init__(self, out: Path) -> None:
        """Use `WorkFolder.hold`, which makes the folder."""
        self._out = out
        self.path = out.with_name(out.name + ".partial")
        self.bundle, self.codes, self.flatten = (self.path / name for name in ("bundle", "codes", "flatten"))
        self._state: dict[str, Any] = {}

    @classmethod
    @contextlib.contextmanager
    def hold(cls, out: Path, settings: dict[str, Any], progress: Progress) -> Iterator[Self]:
        """Make the folder, or take up the one that a run with equal `settings` left, and keep others from it meanwhile.

        Of `settings`, `code` says which planish it is, and `recipe` what was asked for, the command included. A run
        that ends before it has made anything leaves no folder: other settings would be refused for nothing.

        Raises:
            OutputFolderError: if it cannot be made, or is in use, or holds what planish did not write or a command with
                other settings did not finish, or if there is something at `out`.
        """
        work = cls(out)
        with contextlib.ExitStack() as stack:
            with _as_output_error(work.path):
                work.path.mkdir(parents=True, exist_ok=True)
                refusal = f"Another compile is writing to {out}. Wait for it, or choose another output folder."
                lock(stack.enter_context((work.path / _LOCK).open("w")), refusal)
                # What held the lock until now may have finished since the caller looked.
                check_output(out)
                work._state = work._resume(settings, progress)
                work.bundle.mkdir(exist_ok=True)
            try:
                yield work
            finally:
                if not work._holds_work():
                    shutil.rmtree(work.path, ignore_errors=True)

    def finished(self, stage: str, settings: Mapping[str, Any]) -> bool:
        """Say whether `stage` was finished before with equal `settings` of its own, and its files have their sizes."""
        mark = self._state["finished"].get(stage)
        return mark is not None and mark["settings"] == settings and mark["files"] == self._sizes(mark["files"])

    def begin(self, stage: str) -> None:
        """Note that `stage` is not finished, whatever a run with other settings of its own noted."""
        if self._state["finished"].pop(stage, None) is not None:
            write_json(self.path / _STATE, self._state)

    def finish(self, stage: str, settings: Mapping[str, Any], folder: Path) -> None:
        """Note that `stage` is finished with `settings`, for JSON, and made the files directly in `folder`."""
        made = [str(path.relative_to(self.path)) for path in sorted(folder.iterdir()) if path.is_file()]
        self._state["finished"][stage] = {"settings": settings, "files": self._sizes(made)}
        write_json(self.path / _STATE, self._state)

    def noted(self) -> list[Stage]:
        """Return what runs before this one noted of their stages; see `StageClock`."""
        noted: list[Stage] = self._state.get("stages", [])
        return noted

    def note(self, stages: list[Stage]) -> None:
        """Keep what is noted of the stages so far."""
        self._state["stages"] = stages
        write_json(self.path / _STATE, self._state)

    def publish(self) -> None:
        """Rename the bundle to the output folder and remove the rest.

        Raises:
            OutputFolderError: if something came to lie at the output meanwhile.
        """
        with _as_output_error(self._out):
            self.bundle.rename(self._out)
        shutil.rmtree(self.path)

    def _resume(self, settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
        state = self.path / _STATE
        others = [path.name for path in self.path.iterdir() if path.name not in (_LOCK, f"{_STATE}.partial")]
        if others and not state.is_file():
            raise OutputFolderError(
                f"{self.path} is needed as work folder and holds files that planish did not write ({others[0]}). "
                "Move them away, or choose another output folder."
            )
        if state.is_file():
            found = _read_state(state)
            if found is not None:
                before = found["settings"]
                if before == settings:
                    progress.say(f"resuming from {self.path}")
                    return found
                if before["code"] == settings["code"]:
                    self._check_command(before["recipe"], settings["recipe"])
            progress.say(f"{self.path} is of another checkpoint, text or planish; starting anew")
            for path in (self.bundle, self.codes, self.flatten):
                shutil.rmtree(path, ignore_errors=True)
        fresh = {"settings": settings, "finished": {}}
        write_json(state, fresh)
        return fresh

    def _check_command(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuse to throw away hours of work that its own command would finish."""
        other = [
            f"{name} {before[name]}, not {now[name]}" for name in now if name in before and before[name] != now[name]
        ]
        if other:
            raise OutputFolderError(
                f"{self.path} holds the unfinished work of a command with other settings: {'; '.join(other)}. Finish "
                "it by its own command, remove the folder to start anew, or choose another output folder."
            )

    def _holds_work(self) -> bool:
        made = (path for folder in (self.codes, self.flatten) for path in folder.rglob("*"))
        return bool(self._state["finished"]) or any(path.is_file() for path in made)

    def _sizes(self, names: Iterable[str]) -> dict[str, int]:
        paths = {name: self.path / name for name in names}
        return {name: path.stat().st_size if path.is_file() else -1 for name, path in paths.items()}


def _read_state(path: Path) -> dict[str, Any] | None:
    """Return what a run before noted; None if it cannot be read, as behind a damaged disk."""
    with contextlib.suppress(ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("settings"), dict):
            return found
    return None


def lock(file: IO[str] | int, refusal: str) -> None:
    """Lock a file or a folder that is open, until it is closed, and so until the process ends, however it does.

    Raises:
        OutputFolderError: with the words `refusal`, if another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputFolderError(refusal) from error


def check_output(out: Path) -> None:
    """Check that a bundle can be put at `out`: nothing there, or an empty folder that can be replaced.

    Raises:
        OutputFolderError: if not.
    """
    with _as_output_error(out):
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise OutputFolderError(f"{out} exists and is not a folder. Choose another output folder.")
        if out.is_dir() and any(out.iterdir()):
            raise OutputFolderError(f"The output folder {out} is not empty. Choose another one, or empty it.")
        if out.is_dir():
            # The finished bundle is renamed to `out`, which a mount refuses and the shell would not see.
            kind = "the current folder" if out.resolve() == Path.cwd() else "a mount point" if out.is_mount() else None
            if kind is not None:
                raise OutputFolderError(
                    f"{out} is {kind}, which cannot be replaced by the output. Choose a folder in it, such as "
                    f"{out.resolve() / 'bundle'}."
                )


def check_space(folder: Path, needed: int) -> None:
    """Check that the disk of `folder` has room for what is still to be written of `needed` bytes in that folder.

    Raises:
        DiskFullError: if it has not.
    """
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free, more = shutil.disk_usage(folder).free, max(0, needed - there)
    if free < more:
        raise DiskFullError(
            f"The disk of {folder} has {free / 1e6:.1f} MB free and the compile needs about {more / 1e6:.1f} MB. "
            "Free some, or choose an output folder on another disk."
        )


@contextlib.contextmanager
def clear_errors(out: Path) -> Iterator[None]:
    """Turn the many ways in which libraries say that a disk is full into DiskFullError, and unwrap planish's errors.

    onnx_ir wraps whatever goes wrong while it writes a tensor, such as a weight that is not finite.
    """
    try:
        yield
    except Exception as error:
        for cause in _causes(error):
            # An engine that could not be written says so as one that could not be built.
            if _says_disk_full(cause) and not isinstance(cause, DiskFullError):
                raise DiskFullError(
                    f"The disk of {out} is full. Free some space and run the same command again: what is finished is "
                    "kept."
                ) from error
            if isinstance(cause, PlanishError):
                raise cause from cause.__cause__
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def code_fingerprint() -> str:
    """Return a sha256 (hex) over the sources of planish: what another version left is not resumed."""
    digest = hashlib.sha256()
    for package in (planish.compiler, planish.passes, planish.plugins):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _says_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors reports in words; numpy's tofile counts what it could not write and has no errno.
    text = str(error)
    return "No space left" in text or (isinstance(error, OSError) and "requested and" in text and "written" in text)


@contextlib.contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if _says_disk_full(error):
            raise DiskFullError(f"The disk of {path} is full. Free some space.") from error
        raise OutputFolderError(
            f"{path} cannot be written ({error.strerror}). Choose an output folder that you may write to."
        ) from error
