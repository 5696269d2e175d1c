"""What fell back, was skipped or is worse than might be expected: a sentence each, none of it silent."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["notices"]

#: Share of codes between two others, rounded either way, above which a model is called sensitive to that.
_SENSITIVE = 0.05


def notices(facts: Mapping[str, Any]) -> list[str]:
    """Return the sentences; none if all went as asked."""
    return [*_flattening(facts), *_linears(facts), *_verification(facts), *_engines(facts)]


def _flattening(facts: Mapping[str, Any]) -> Iterator[str]:
    if facts["fallback"]:
        yield f"Flattening fell back: {facts['fallback']}."
    sites = facts["sites"]
    diverged = Counter(form for each in sites for form in each["diverged"])
    for form, count in diverged.items():
        yield f"The form {form} diverged at {count} {_sites(count)}, where it could not be chosen."
    fallen = sum("fell back to a rotation" in each["evidence"] for each in sites)
    if fallen:
        yield f"The search fell back to rotations at {fallen} {_sites(fallen)}."
    worse = [
        f"{each['site']} of layer {each['layer']}"
        for each in sites
        if None not in (each["sqnr_db"], each["sqnr_unflattened_db"]) and each["sqnr_db"] < each["sqnr_unflattened_db"]
    ]
    if worse:
        yield f"Flattening did not lower the error at {len(worse)} {_sites(len(worse))}: {_listed(worse)}."
    unfitted = sum(each["evidence"].get("ridge") == 0 for each in sites)
    if unfitted:
        yield f"At {unfitted} {_sites(unfitted)} weights stay as they were: fitting them to rounded inputs did not pay."
    if facts["choice"] and facts["polish"] is None:
        yield "The model was not polished."
    elif facts["polish"]:
        before, *_, after = facts["polish"]["held_out_divergence"]
        if after is None or after >= before:
            yield "Polishing was undone: it got no better on held-out text."


def _linears(facts: Mapping[str, Any]) -> Iterator[str]:
    reasons = Counter(entry["reason"] for entry in facts["left_float"])
    for reason, count in reasons.items():
        yield f"{count} {'linear is' if count == 1 else 'linears are'} in floating point: {reason}."


def _verification(facts: Mapping[str, Any]) -> Iterator[str]:
    found = facts["verification"]
    if not found:
        return
    if found["followed"]:
        yield (
            f"{found['followed']} of {found['roundings']} roundings lay between two codes and were followed the other "
            "way by the verification."
        )
    if found["unfollowed_error"] > _SENSITIVE:
        yield (
            f"Under this scheme the model is sensitive to such ties: followed nowhere, they move a logit by up to "
            f"{found['unfollowed_error']:.0%} of the range."
        )
    if facts["choice"] and not facts["passes"]:
        yield "The passes that flatten were not verified one by one."


def _engines(facts: Mapping[str, Any]) -> Iterator[str]:
    for target, engine in facts["engines"].items():
        for each in engine.get("fallbacks", []):
            yield f"Engine {target}: {each['what']}: {each['instead']}, because {each['why']}."


def _sites(count: int) -> str:
    return "site" if count == 1 else "sites"


def _listed(names: list[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
