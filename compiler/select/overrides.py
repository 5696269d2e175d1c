"""What single sites or layers get instead of what the policy and the scheme say, named by regular expressions."""

import re
from collections.abc import Mapping, Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from planish.compiler.errors import SelectionError
from planish.compiler.learn.candidates import Form, kind_of
from planish.compiler.select.forms import SITE_FORMS, form_of
from planish.passes.transforms import SITE_MODULES, SITES, Kind, Site

__all__ = ["SiteOverride", "resolve_overrides"]


class SiteOverride(BaseModel):
    """What the sites that one expression names get; what is left out stays as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Kind | None = None
    """Kind of the transform; its form is the one that stands for the kind at the site."""
    form: Form | None = None
    """Form of the transform."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.kind is None and self.form is None:
            raise ValueError("it says nothing: give a kind or a form")
        if self.kind is not None and self.form is not None and kind_of(self.form) != self.kind:
            raise ValueError(
                f"the form {self.form} is of the kind {kind_of(self.form)}, not {self.kind}: give one of them"
            )
        return self

    def form_at(self, site: Site) -> Form | None:
        """Return the form at `site`; None leaves it open.

        Raises:
            SelectionError: if the site takes no such form.
        """
        if self.form is not None and self.form not in SITE_FORMS[site]:
            raise SelectionError(f"{site} takes {', '.join(SITE_FORMS[site])}, and not {self.form}")
        if self.form is not None or self.kind is None:
            return self.form
        return "identity" if self.kind == "identity" else form_of(site, self.kind)


def resolve_overrides(overrides: Mapping[str, SiteOverride], layers: int) -> list[dict[Site, SiteOverride]]:
    r"""Return for every decoder block what its sites get instead.

    An expression names a site if it matches the whole of `model.layers.{layer}.{site}`, or the name of every linear
    that reads the site: `model\.layers\.(0|1)\..*`, `.*\.ffn_out` and `.*\.mlp\.down_proj` all do.

    Args:
        overrides: by regular expression.
        layers: number of decoder blocks.

    Raises:
        SelectionError: if an expression cannot be read, names no site, names some of the linears that share an input
            and not the others, gives a form that the site does not take, or says of a site what another contradicts.
    """
    resolved: list[dict[Site, SiteOverride]] = [{} for _ in range(layers)]
    named: dict[tuple[int, Site], str] = {}
    for expression, override in overrides.items():
        sites = _named(expression, layers)
        if not sites:
            raise SelectionError(
                f"The override '{expression}' names no site of the {layers} layers. Names look like "
                "model.layers.0.ffn_out or model.layers.0.mlp.down_proj, and are matched as a whole: write .* for what "
                "may be anything."
            )
        for layer, site in sites:
            other = named.setdefault((layer, site), expression)
            if other != expression and resolved[layer][site] != override:
                raise SelectionError(
                    f"The overrides '{other}' and '{expression}' both name {site} of layer {layer}, and contradict "
                    "each other. Make one of them leave it out."
                )
            override.form_at(site)
            resolved[layer][site] = override
    return resolved


def _named(expression: str, layers: int) -> Sequence[tuple[int, Site]]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise SelectionError(f"The override '{expression}' is no regular expression: {error}.") from error
    found = []
    for layer in range(layers):
        for site in SITES:
            block, modules = f"model.layers.{layer}", SITE_MODULES.get(site, ())
            hit = [module for module in modules if pattern.fullmatch(f"{block}.{module}")]
            if pattern.fullmatch(f"{block}.{site}") or (hit and len(hit) == len(modules)):
                found.append((layer, site))
            elif hit:
                missed = next(module for module in modules if module not in hit)
                raise SelectionError(
                    f"The override '{expression}' names {block}.{hit[0]} and not {missed}, which reads the same input, "
                    f"so that both have one transform. Name {block}.{site}, or all of its linears."
                )
    return found
