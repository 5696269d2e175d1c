"""Which forms of a transform may stand at a site, which one stands for a kind, and what it costs at run time."""

from collections.abc import Mapping

from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.learn.transforms.candidates import Form
from planish.compiler.select.kurtosis import Group
from planish.passes.transforms import Kind, Site, Transform

__all__ = ["MEASURED_FORMS", "SITE_FORMS", "SITE_GROUPS", "form_of", "forms_of_groups", "online_flops"]

_LINEAR_FORMS: tuple[Form, ...] = ("identity", "rotation", "kronecker", "blocks32", "blocks64", "blocks128", "dense")
#: The forms that are measured at every site. A dense map of the FFN's width costs as much as the linears there.
MEASURED_FORMS: dict[Site, tuple[Form, ...]] = {
    "attn_in": _LINEAR_FORMS,
    "attn_out": ("identity", "rotation"),
    "ffn_in": _LINEAR_FORMS,
    "ffn_out": tuple(form for form in _LINEAR_FORMS if form != "dense"),
    "key": ("identity", "rotation", "dense"),
    "value": ("identity", "rotation", "dense"),
}
#: The forms that a plan may name at every site.
SITE_FORMS: dict[Site, tuple[Form, ...]] = {
    site: (*forms, "hadamard", *(("smooth", "dense") if site == "ffn_out" else ()))
    for site, forms in MEASURED_FORMS.items()
}

#: Group of linears -> the sites in front of them. The kind of a group is that of all its sites.
SITE_GROUPS: dict[Group, tuple[Site, ...]] = {
    "attn": ("attn_in", "attn_out", "key", "value"),
    "ffn": ("ffn_in", "ffn_out"),
}

#: By site: the form of a rotation and of an affine map. At attn_out only the heads are mixed, which both kinds do by a
#: rotation; the affine part of that site is the value map.
_FORMS: dict[Site, dict[Kind, Form]] = {
    "attn_in": {"rotation": "rotation", "affine": "blocks64"},
    "attn_out": {"rotation": "rotation", "affine": "rotation"},
    "ffn_in": {"rotation": "rotation", "affine": "blocks64"},
    "ffn_out": {"rotation": "rotation", "affine": "blocks128"},
    "key": {"rotation": "rotation", "affine": "dense"},
    "value": {"rotation": "rotation", "affine": "dense"},
}


def form_of(site: Site, kind: Kind) -> Form:
    """Return the form that stands for a kind at a site."""
    return _FORMS[site][kind]


def forms_of_groups(kinds: Mapping[Group, Kind]) -> dict[Site, Form]:
    """Return the form at every site of a block, given the kind of each of its groups."""
    return {site: form_of(site, kinds[group]) for group, sites in SITE_GROUPS.items() for site in sites}


def online_flops(site: Site, transform: Transform, config: LlamaConfig) -> int:
    """Return the FLOPs per token that a transform costs at run time.

    The value map folds into weights; the key map is applied to keys, and its inverse to every query head.
    """
    if site == "value":
        return 0
    return transform.flops * (1 + config.groups if site == "key" else 1)
