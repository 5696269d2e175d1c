"""Which targets there are, what each needs, and the call that builds each."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir

from planish.compiler.backends.tensorrt.parser_versions import SINCE, read_version
from planish.compiler.backends.tensorrt.plugin_choice import plugs_without_library
from planish.compiler.errors import RecipeError
from planish.compiler.optional import require
from planish.compiler.pipeline.recipe import OF_TARGET, Recipe
from planish.compiler.progress import Progress

__all__ = ["check_context", "check_engine_settings", "check_targets", "lower"]

_ENGINES = {"rtx", "tensorrt"}
#: Slots of an engine's cache unless asked for otherwise: they are allocated whether they are used or not.
_ENGINE_CONTEXT = 2048


def check_targets(recipe: Recipe) -> None:
    """Check, before any work is done, that the targets of `recipe` can be lowered to, as far as that is known by then.

    Raises:
        MissingExtraError: naming the extra of the first package that a target needs and that is not installed.
        RecipeError: if no engine of a target can have the GPU generations or the TensorRT that is asked for.
        EngineBuildError: if plugins are required and that TensorRT cannot have them.
    """
    if "rtx" in recipe.targets:
        _check_sms(recipe, require("tensorrt_rtx"))
    if "tensorrt" in recipe.targets:
        if recipe.tensorrt_version is None:
            require("tensorrt")
        else:
            _check_version(recipe, recipe.tensorrt_version)


def _check_sms(recipe: Recipe, package: ModuleType) -> None:
    if recipe.sms is None:
        return
    known = sorted(int(name[2:]) for name in package.ComputeCapability.__members__ if name[2:].isdigit())
    if not recipe.sms or set(recipe.sms) - set(known):
        raise RecipeError(
            f"'sms' is {list(recipe.sms)}, and TensorRT-RTX {package.__version__} builds for "
            f"{', '.join(map(str, known))}. Choose among these (--sm), or leave it out."
        )


def _check_version(recipe: Recipe, text: str) -> None:
    version, first = read_version(text), min(SINCE.values())
    if version < first:
        raise RecipeError(
            f"'tensorrt_version' is {text}, and TensorRT reads low-bit weights from {first[0]}.{first[1]} on. Name a "
            "later one (--tensorrt-version)."
        )
    plugs_without_library(recipe.plugins, version)


def check_engine_settings(targets: Sequence[str], **given: Any) -> None:
    """Check that settings of engines are given only where they have an effect.

    Args:
        targets: of the run.
        given: by name as in `Recipe`; None is not given.

    Raises:
        RecipeError: naming the first that is given without a target that it is for.
    """
    for name, value in given.items():
        if value is None:
            continue
        if not set(targets) & _ENGINES:
            raise RecipeError(
                f"'{name}' is a setting of engines, and the target {', '.join(targets)} is none. Leave it out, or "
                "give the target rtx or tensorrt."
            )
        if name in OF_TARGET and OF_TARGET[name] not in targets:
            raise RecipeError(
                f"'{name}' is a setting of the target {OF_TARGET[name]} and does nothing for {', '.join(targets)}. "
                "Leave it out."
            )


def check_context(max_context: int | None, longest: int) -> None:
    """Check that the context that was asked for is not beyond the `longest`, both in tokens.

    Raises:
        RecipeError: if it is.
    """
    if max_context is not None and max_context > longest:
        raise RecipeError(
            f"A context of {max_context} tokens is beyond the model's {longest}. Ask for {longest} tokens or fewer "
            "(--max-context), or leave it out."
        )


def lower(target: str, portable: Path, folder: Path, recipe: Recipe, longest: int, progress: Progress) -> None:
    """Lower a portable model to `target`.

    Args:
        target: one of `TARGETS`.
        portable: the portable model's file.
        folder: where to; made if need be.
        recipe: gives what was asked for.
        longest: the longest context, in tokens, that the model itself allows.
        progress: is told how far the work is.

    Raises:
        EngineBuildError: if an engine cannot be built.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if target == "ort":
        from planish.compiler.backends.ort import build_ort

        build_ort(ir.load(portable), folder, lambda done, total: progress.step("lower to ort", done, total))
        return
    from planish.compiler.backends.tensorrt import build_engines

    settings: dict[str, Any] = {
        "max_context": min(recipe.max_context or _ENGINE_CONTEXT, longest),
        "max_batch": recipe.max_batch_size,
        "max_prompt": recipe.max_input_len,
        "sms": recipe.sms,
        "plugins": recipe.plugins,
        "tensorrt_version": recipe.tensorrt_version,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    build_engines(portable, folder, flavour=target, progress=progress, **given)
