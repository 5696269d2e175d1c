"""Every number of a report, gathered from the files of a bundle and the record of the run that made it."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.inspection import inspect, stored_bits
from planish.compiler.bundle.layout import PLAN_FILE, RECIPE_FILE
from planish.compiler.checkpoint.tensors import expected_tensors
from planish.compiler.report.high_channels import high_facts
from planish.compiler.report.notices import notices
from planish.compiler.report.run_record import RunRecord
from planish.compiler.report.verdict import judge
from planish.passes.transforms import Site, site_of

__all__ = ["CONTEXTS", "gather"]

#: Tokens of context for which the size of the cache is told, beside the longest.
CONTEXTS = (4096, 32768)

_RULE = re.compile(r"kurtosis:(?P<mode>z|raw|topm)=(?P<attn>[^,:]+),(?P<ffn>[^,:]+)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_ERROR_OF = "error of "


def gather(bundle: Bundle, run: RunRecord) -> dict[str, Any]:
    """Return the content of report.json.

    Beside the fields of `Inspection` and `RunRecord` it holds `checkpoint` and `planish_version`; `float16_bytes`, what
    the checkpoint takes in float16; `held_out`, a row per model that was measured on held-out text (`cross_entropy` and
    `divergence` in nats per token, `perplexity`, null where not measured); `cache`, bytes at several lengths of
    context, and of a float16 cache; `sites`, what plan.json has for each site, with `sqnr_db` = -10 log10(error) after
    and, under `sqnr_unflattened_db`, before, and the `measured` errors of forms; `linears_by_module` and `left_float`
    of plan.json; `formats`, those of linears that overrides gave another than the scheme; `choice`, how forms were
    chosen; `high_impact`, see `high_facts`; `engines`; `recipe`; `notices`, what fell back or was skipped, a sentence
    each; and `verdict`.

    Args:
        bundle: its manifest needs no file records yet.
        run: what made it.
    """
    plan, engines = _json(bundle, PLAN_FILE), _engines(bundle)
    transforms = plan.get("transforms", {})
    sites = [_site(each) for each in transforms.get("sites", [])]
    facts = {
        **inspect(bundle).to_dict(),
        "planish_version": bundle.manifest.planish_version,
        "checkpoint": bundle.manifest.checkpoint,
        "float16_bytes": 2 * sum(math.prod(shape) for shape in expected_tensors(bundle.config).values()),
        "held_out": _held_out(transforms or plan),
        "sites": sites,
        "formats": _formats(str(bundle.scheme.linear), plan.get("linears", [])),
        "linears_by_module": plan.get("linears", []),
        "left_float": plan.get("left_float", []),
        "choice": _choice(transforms, sites),
        "high_impact": high_facts(plan.get("linears", []), stored_bits(bundle), transforms.get("high_impact")),
        "polish": transforms.get("polish"),
        "fallback": plan.get("fallback"),
        "engines": engines,
        "recipe": _recipe(bundle),
        **dataclasses.asdict(run),
    }
    facts["cache"] = _cache(facts)
    facts["notices"] = notices(facts)
    facts["verdict"] = judge(facts)
    return facts


def _formats(of_scheme: str, linears: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return format, site and layers of the linears that have another format than that."""
    found: dict[tuple[str, Site], set[int]] = {}
    for linear in linears:
        layer, site = _LAYER.match(linear["module"]), site_of(linear["module"])
        if layer is not None and site is not None and linear["format"] != of_scheme:
            found.setdefault((linear["format"], site), set()).add(int(layer[1]))
    return [{"format": form, "site": site, "layers": sorted(layers)} for (form, site), layers in found.items()]


def _json(bundle: Bundle, name: str) -> dict[str, Any]:
    path = bundle.path / name
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _recipe(bundle: Bundle) -> dict[str, Any]:
    path = bundle.path / RECIPE_FILE
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _engines(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """Return target -> the content of its engine.json, of the targets that have one."""
    found = {}
    for target in bundle.manifest.targets:
        path = bundle.model_path(target).with_name("engine.json")
        if path.is_file():
            found[target] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _held_out(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    entropies = measured.get("held_out_cross_entropy", {})
    divergences = measured.get("held_out_divergence", {})
    rows = []
    for name in dict.fromkeys([*entropies, *divergences]):
        entropy, divergence = entropies.get(name), 0.0 if name == "float" else divergences.get(name)
        # A model that is broken may be beyond what a float holds.
        perplexity = None if entropy is None or entropy > 700 else math.exp(entropy)
        rows.append({"model": name, "cross_entropy": entropy, "perplexity": perplexity, "divergence": divergence})
    return rows


def _site(entry: Mapping[str, Any]) -> dict[str, Any]:
    evidence = entry["evidence"]
    measured = {name.removeprefix(_ERROR_OF): error for name, error in evidence.items() if name.startswith(_ERROR_OF)}
    return {
        **entry,
        "measured": measured,
        "diverged": [name.removeprefix("diverged: ") for name in evidence if name.startswith("diverged: ")],
        "sqnr_db": _decibels(entry["error"]),
        "sqnr_unflattened_db": _decibels(evidence.get("error_unflattened")),
    }


def _decibels(error: float | None) -> float | None:
    return round(-10 * math.log10(error), 2) if error else None


def _choice(transforms: Mapping[str, Any], sites: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return how forms were chosen: the policy, the kurtosis rule with its thresholds, and counts of forms by site."""
    if not transforms:
        return None
    rule = _RULE.match(transforms["policy"])
    forms: dict[str, Counter[str]] = {}
    for each in sites:
        forms.setdefault(each["site"], Counter())[each["form"]] += 1
    return {
        "policy": transforms["policy"],
        "rule": None
        if rule is None
        else {"mode": rule["mode"], "attn": float(rule["attn"]), "ffn": float(rule["ffn"])},
        "forms": {site: dict(counts.most_common()) for site, counts in forms.items()},
        "online_flops": sum(each["cost_flops"] for each in sites),
    }


def _cache(facts: Mapping[str, Any]) -> list[dict[str, int]]:
    """Return bytes of cache at several lengths of context; the longest of the model counts even if it is shorter."""
    longest, per_token = facts["max_context"], facts["kv_bytes_per_token"]
    lengths = sorted({*(length for length in CONTEXTS if length < longest), longest})
    half = round(per_token * facts["kv_saving"])
    return [{"tokens": length, "bytes": length * per_token, "float16_bytes": length * half} for length in lengths]
