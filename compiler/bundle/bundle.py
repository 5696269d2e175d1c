"""A bundle: the folder that a compile leaves, opened to be run."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from planish.compiler.bundle.layout import MANIFEST_FILE, MODEL_FILE, engine_folder
from planish.compiler.bundle.manifest import Manifest
from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.checkpoint.files import read_json
from planish.compiler.checkpoint.sidecars import end_tokens
from planish.compiler.errors import NotPlanishModelError
from planish.compiler.runtime.generate import GREEDY, Sampling, generate
from planish.compiler.runtime.language_model import LanguageModel
from planish.compiler.runtime.provider import Provider, check_provider
from planish.compiler.runtime.runnable import ENGINES, Runnable
from planish.compiler.runtime.session import Session
from planish.compiler.runtime.tokenizer import Tokenizer
from planish.passes.scheme import Scheme

if TYPE_CHECKING:
    from planish.compiler.backends.tensorrt import EngineRecord

__all__ = ["Bundle"]


class Bundle:
    """A compiled model on disk.

    Attributes:
        path: the folder.
        manifest: what planish.json says.

    Example:
        >>> bundle = Bundle.open(path)
        >>> str(bundle.scheme)
        'w4a8k8v8'
        >>> text = "".join(bundle.generate("The sky", max_new_tokens=4))
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Use `Bundle.open`, which checks what it opens."""
        self.path = path
        self.manifest = manifest
        self._sessions: dict[tuple[str | None, int | None, str], Session] = {}
        self._engines: dict[str, LanguageModel] = {}

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> "Bundle":
        """Open a bundle.

        Args:
            path: its folder.
            verify: read all files and compare their hashes; about a second per gigabyte.

        Raises:
            NotPlanishModelError: if there is no bundle at `path`.
            BundleFormatError: if it was written in a newer format.
            BundleCorruptError: if a file is missing or differs from its hash.
        """
        path = Path(path)
        if not (path / MANIFEST_FILE).is_file():
            raise NotPlanishModelError(_why_no_bundle(path))
        manifest = Manifest.read(path)
        if verify:
            manifest.verify(path)
        return cls(path, manifest)

    @property
    def scheme(self) -> Scheme:
        """The scheme it was compiled with."""
        return Scheme.parse(self.manifest.scheme, self.manifest.lm_head)

    @cached_property
    def config(self) -> LlamaConfig:
        """The configuration of the model."""
        return LlamaConfig.from_dict(read_json(self.path / "config.json"))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model.

        Raises:
            TokenizerError: if it is missing or unreadable.
        """
        return Tokenizer(self.path)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: those of generation_config.json, else those of config.json."""
        return end_tokens(self.path, self.config)

    def model_path(self, target: str | None = None) -> Path:
        """Return the ONNX file that `session(target)` runs.

        Raises:
            NotPlanishModelError: if the bundle was not compiled for `target`.
        """
        if target is None:
            target = "ort" if "ort" in self.manifest.targets else "portable"
        if target == "portable":
            return self.path / MODEL_FILE
        if target not in self.manifest.targets:
            raise NotPlanishModelError(
                f"{self.path} was compiled for {', '.join(self.manifest.targets) or 'no target'}, not for {target}. "
                f"Add it: planish build {self.path} --target {target}"
            )
        return engine_folder(self.path, target) / MODEL_FILE

    def session(
        self, target: str | None = None, threads: int | None = None, provider: Provider | str = Provider.CPU
    ) -> Session:
        """Return the model loaded by ONNX Runtime; the same call returns the same session.

        Args:
            target: 'ort' is the model lowered to integer products, 'portable' the one of standard ONNX operators. None
                is 'ort' where the bundle was compiled for it, else 'portable'.
            threads: threads of one operator; None is one per core.
            provider: 'cpu', or 'cuda' for a GPU.

        Raises:
            NotPlanishModelError: if the bundle was not compiled for `target`.
            MissingExtraError: if the installed ONNX Runtime lacks the provider.
            DeviceError: if the provider does not start.
            ValueError: if `target` is not one that ONNX Runtime executes.
        """
        if target not in (None, "ort", "portable"):
            raise ValueError(f"ONNX Runtime executes 'ort' and 'portable', not {target!r}; see Bundle.load")
        key = (target, threads, str(provider))
        if key not in self._sessions:
            self._sessions[key] = Session(self.model_path(target), threads, provider)
        return self._sessions[key]

    def runnable(self, target: str | None = None, provider: Provider | str = Provider.CPU) -> Runnable:
        """Return what `load` loads, after checking that this machine can run it.

        Raises:
            PlanishError: as `engine` and `check_provider` do.
        """
        if target in ENGINES:
            self.engine(target)
            return Runnable(self.model_path(target), target)
        check_provider(Provider(provider))
        return Runnable(self.model_path(target), str(provider))

    def load(
        self, target: str | None = None, threads: int | None = None, provider: Provider | str = Provider.CPU
    ) -> LanguageModel:
        """Return the model of a target, whatever runs it; the same call returns the same one.

        Args:
            target: as in `session`; or 'rtx' or 'tensorrt', the engine, which runs on an NVIDIA GPU.
            threads: of ONNX Runtime, as in `session`.
            provider: of ONNX Runtime, as in `session`.

        Raises:
            PlanishError: as `session` and `engine` do; DeviceError if the GPU cannot be used.
        """
        if target not in ENGINES:
            return self.session(target, threads, provider)
        if target not in self._engines:
            self._engines[target] = self.runnable(target).load()
        return self._engines[target]

    def engine(self, target: str) -> "EngineRecord":
        """Check that the engine of `target` ('rtx' or 'tensorrt') runs on this machine, and return its engine.json.

        Raises:
            EngineMismatchError: if it was built for another GPU, TensorRT or system; the message says which.
            NotPlanishModelError: if the bundle was not compiled for `target`.
        """
        from planish.compiler.backends.tensorrt import check_engine

        return check_engine(self.model_path(target).parent, target)

    def max_context(self, model: LanguageModel) -> int:
        """Return how many tokens `model`, one of this bundle, sees at most: an engine may have room for fewer."""
        return min(self.manifest.max_context, model.limits.context or self.manifest.max_context)

    def generate(
        self,
        prompt: str,
        *,
        chat: bool = False,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        chunk: int | None = None,
        threads: int | None = None,
        target: str | None = None,
        provider: Provider | str = Provider.CPU,
    ) -> Iterator[str]:
        """Yield the text that continues `prompt`, piece by piece.

        Args:
            prompt: the text to continue or, with `chat`, what the user says.
            chat: put the prompt into the model's chat template.
            max_new_tokens: how many tokens to generate at most.
            sampling: how tokens are chosen; greedy unless told otherwise.
            chunk: prefill this many tokens at a time; None takes the prompt at once.
            threads: as in `load`.
            target: as in `load`.
            provider: as in `load`.

        Raises:
            TextError: if the prompt is empty or longer than the model's context.
            TokenizerError: if there is no chat template, or no tokenizer.
        """
        text = self.tokenizer.chat([{"role": "user", "content": prompt}]) if chat else prompt
        model = self.load(target, threads, provider)
        tokens = generate(
            model,
            self.tokenizer.encode(text, special=not chat),
            max_new_tokens=max_new_tokens,
            max_context=self.max_context(model),
            eos=self.eos_token_ids,
            sampling=sampling,
            chunk=chunk,
        )
        stream = self.tokenizer.stream()
        for token in tokens:
            if piece := stream.push(token):
                yield piece
        if rest := stream.finish():
            yield rest


def _why_no_bundle(path: Path) -> str:
    """Say what is at `path` instead of a bundle, and what to do."""
    if not path.exists():
        return f"{path} does not exist. Give the folder that 'planish compile -o' wrote."
    if path.is_dir():
        return (
            f"{path} is not a bundle: it holds no {MANIFEST_FILE}. Give the folder that 'planish compile -o' wrote, or "
            "compile the model first."
        )
    for folder in path.parents:
        if (folder / MANIFEST_FILE).is_file():
            return f"{path} is a file of the bundle {folder}. Give that folder."
    return f"{path} is not a bundle that planish wrote. Compile the checkpoint it was made from with 'planish compile'."
