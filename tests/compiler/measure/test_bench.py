"""The prompt of a benchmark fits into the context of the models that are measured."""

from pathlib import Path
from typing import Any

import pytest

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.compare import comparison
from planish.compiler.errors import TextError
from planish.compiler.measure.bench import prompt_length
from planish.compiler.measure.texts import text_file
from planish.compiler.progress import Silent


@pytest.mark.parametrize(
    ("context", "asked", "tokens"), [(8192, None, 512), (544, None, 512), (543, None, 511), (33, None, 1), (256, 9, 9)]
)
def test_what_fits(context: int, asked: int | None, tokens: int) -> None:
    assert prompt_length(context, asked=asked) == tokens


@pytest.mark.parametrize(
    ("context", "asked", "remedy"),
    [
        (256, 225, "1 to 224 tokens"),
        (256, 0, "1 to 224 tokens"),
        (32, None, "be timed"),
        (8, None, "be timed"),
    ],
)
def test_what_does_not_fit(context: int, asked: int | None, remedy: str) -> None:
    with pytest.raises(TextError, match=f"context of {context}.*{remedy}"):
        prompt_length(context, asked=asked)


def test_a_comparison_stays_within_the_shortest_context(
    bundle: Bundle, float_bundle: Bundle, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def measured(models: Any, *, tokens: int, **_: Any) -> dict[str, Any]:
        asked.append(tokens)
        return {}

    monkeypatch.setattr(comparison, "measure_sides", measured)
    models = [str(bundle.path), str(float_bundle.path)]
    comparison.compare_models(models, [text_file(text)], Silent(), seqlen=32, windows=1, divergence=False)
    assert asked == [bundle.manifest.max_context - 32] == [224]
