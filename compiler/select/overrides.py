"""What single sites or layers get instead of what the policy and the scheme say, named by regular expressions."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from planish.compiler.errors import SelectionError
from planish.compiler.learn.transforms.candidates import Form, kind_of
from planish.compiler.select.forms import SITE_FORMS, form_of
from planish.passes.scheme import LinearFormat, Scheme
from planish.passes.transforms import SITE_MODULES, SITES, Kind, Site

__all__ = ["SiteOverride", "override_scheme", "resolve_overrides"]


class SiteOverride(BaseModel):
    """What the sites that one expression names get; what is left out stays as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Kind | None = None
    """Kind of the transform; its form is the one that stands for the kind at the site."""
    form: Form | None = None
    """Form of the transform."""
    bits: Literal[2, 3, 4, 8] | None = None
    """Bits of the weights of the linears that read the site; keys and values have none."""
    activation_bits: Literal[2, 3, 4, 5, 6, 7, 8, 16] | None = None
    """Bits of the input of those linears; 16 leaves it in floating point."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if not self.model_dump(exclude_none=True):
            raise ValueError("it says nothing: give a kind, a form, bits or activation_bits")
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

    def format_at(self, site: Site, form: LinearFormat) -> LinearFormat:
        """Return the format of the linears that read `site` where the scheme gives them `form`."""
        if site not in SITE_MODULES:
            return form
        return dataclasses.replace(
            form,
            weight_bits=form.weight_bits if self.bits is None else self.bits,
            activation_bits=form.activation_bits if self.activation_bits is None else self.activation_bits,
        )


def override_scheme(scheme: Scheme, resolved: Sequence[Mapping[Site, SiteOverride]]) -> Scheme:
    """Return the scheme with the formats that overrides ask for.

    Args:
        scheme: with low-bit linears.
        resolved: by decoder block, see `resolve_overrides`.
    """
    asked = {
        (layer, site): override.format_at(site, scheme.linear)
        for layer, of_layer in enumerate(resolved)
        for site, override in of_layer.items()
    }
    return dataclasses.replace(scheme, formats={at: form for at, form in asked.items() if form != scheme.linear})


def resolve_overrides(overrides: Mapping[str, SiteOverride], layers: int) -> list[dict[Site, SiteOverride]]:
    r"""Return for every decoder block what its sites get instead.

    An expression names a site if it matches the whole of `model.layers.{layer}.{site}`, or the name of every linear
    that reads the site: `model\.layers\.(0|1)\..*`, `.*\.ffn_out` and `.*\.mlp\.down_proj` all do.

    Args:
        overrides: by regular expression.
        layers: number of decoder blocks.

    Raises:
        SelectionError: if an expression cannot be read, names no site, names some of the linears that share an input
            and not the others, gives a form that the site does not take or bits where no linear reads, or says of a
            site what another contradicts.
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
        if not any(site in SITE_MODULES for _, site in sites) and (override.bits or override.activation_bits):
            raise SelectionError(
                f"The override '{expression}' names keys and values alone, which no weights read: their bits are the "
                "scheme's, as in w4a4k3v3. Leave its bits out."
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
