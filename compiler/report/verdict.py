"""Did it work: what a report says first, in words, from what was verified and measured."""

from collections.abc import Mapping
from typing import Any

from planish.compiler.report.words import short

__all__ = ["judge"]

#: Perplexity over that of the float model up to which a model counts as close to it, and as usable.
_CLOSE, _USABLE = 1.1, 1.5
#: The bound of `verify` on the difference of a logit, as a share of the range of the logits.
_BOUND = 1e-3


def judge(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return `grade`, a word; `title`, some words; and `sentences` that say why.

    The grade is `close`, `lossy` or `damaged` by the perplexity on held-out text over that of the float model (up to
    1.1, up to 1.5, above), and `unmeasured` where there is none.
    """
    sentences = [_verified(facts["verification"])]
    rows = {row["model"]: row for row in facts["held_out"]}
    grade, title, words = _accuracy(rows, facts)
    return {"grade": grade, "title": title, "sentences": [*sentences, *words]}


def _verified(found: Mapping[str, Any]) -> str:
    if not found:
        return "Nothing was verified: this bundle has no record of a verification."
    return (
        f"It computes what was asked for: on {found['tokens']} tokens, prefilled and decoded, no logit differs from an "
        f"independent computation in PyTorch by more than {found['logits_error']:.1g} of their range (allowed: "
        f"{_BOUND:g})."
    )


def _accuracy(rows: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    exact, nearest = rows.get("float", {}).get("perplexity"), rows.get("rounded to nearest", {})
    made = nearest if facts["fallback"] else list(rows.values())[-1] if rows else {}
    found = made.get("perplexity")
    if not exact or not found:
        return (
            "unmeasured",
            "Compiled; its accuracy was not measured",
            ["No text was held out to measure accuracy on. Measure it: planish eval BUNDLE --text FILE."],
        )
    ratio = found / exact
    grade = "close" if ratio <= _CLOSE else "lossy" if ratio <= _USABLE else "damaged"
    title = {
        "close": "Works, and is close to the float model",
        "lossy": "Works, and is worse than the float model",
        "damaged": "Works, and is much worse than the float model",
    }[grade]
    words = [
        f"On held-out calibration text its perplexity is {found:.4g}: {ratio:.3g} times the float model's {exact:.4g}."
    ]
    if nearest.get("perplexity") and made is not nearest:
        words.append(
            f"Rounded to nearest with nothing flattened, it would be {short(nearest['perplexity'])}. What it predicts "
            f"is {made['divergence']:.3g} nats per token from the float model's predictions (KL divergence), instead "
            f"of {nearest['divergence']:.3g}."
        )
    return grade, title, words
