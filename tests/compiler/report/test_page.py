"""The page stands alone, says all that report.json says, and can be read by eyes and by screen readers."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.report.facts import gather
from planish.compiler.report.run_record import RunRecord
from planish.compiler.report.write import render

#: Elements without an end tag, and those whose end tag HTML lets one leave out.
VOID, OPTIONAL = {"meta", "link"}, {"tr", "td", "th", "li", "p"}


class Elements(HTMLParser):
    """Collects elements, and checks that they are nested."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        assert not [name for name in self._open if name not in OPTIONAL]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self._open[-1] != tag:
            assert self._open.pop() in OPTIONAL
        self._open.pop()


@pytest.fixture(scope="module")
def page(flattened: Bundle) -> str:
    return (flattened.path / "report" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def facts(flattened: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((flattened.path / "report" / "report.json").read_text(encoding="utf-8"))
    return found


def test_it_needs_nothing_else(page: str) -> None:
    assert "http" not in page
    assert "@import" not in page
    for tag, attributes in Elements(page).found:
        assert tag not in {"script", "img", "iframe", "object"}
        target = attributes.get("href") or ""
        assert target.startswith(("#", "data:")) or not target
    assert len(page) < 600_000


def test_the_same_facts_make_the_same_page(page: str, facts: dict[str, Any], flattened: Bundle) -> None:
    assert render(facts) == render(facts)
    # What can be read from the bundle, and what is kept of the run, is all there is.
    again = gather(flattened, RunRecord.read(flattened))
    assert json.loads(json.dumps(again)) == {**facts, "sizes": again["sizes"]}
    sizes = facts["sizes"]
    assert page == render({**again, "sizes": sizes})


def test_every_plot_has_a_name_and_a_table(page: str) -> None:
    found = Elements(page).found
    plots = [attributes for tag, attributes in found if tag == "svg"]
    assert len(plots) >= 3 + 3 + 6 + 2 + 1
    ids = [attributes["id"] for _, attributes in found if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for attributes in plots:
        assert attributes["role"] == "img"
        for label in str(attributes["aria-labelledby"]).split():
            (words,) = re.findall(rf'id="{label}">([^<]+)<', page)
            assert len(words) > 5
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert all("<table>" in figure for figure in figures if 'data-plot="time"' not in figure)
    # References within drawings lead somewhere.
    assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page)) <= {
        pair for each in ids for pair in ((each, ""), ("", each))
    }


def test_it_says_what_was_found(page: str, facts: dict[str, Any]) -> None:
    assert facts["verdict"]["title"] in page
    for notice in facts["notices"]:
        assert notice.replace("'", "&#39;") in page
    for linear in facts["linears_by_module"]:
        assert linear["module"] in page
    assert facts["checkpoint"] in page
    for stage in facts["stages"]:
        assert f'<th scope="row">{stage["stage"]}' in page


def test_names_from_outside_are_escaped(facts: dict[str, Any]) -> None:
    page = render({**facts, "model": "<script>alert(1)</script>", "fallback": "a & b"})
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def palettes(page: str) -> list[dict[str, str]]:
    """Return the colours of light, dark and paper, each by variable."""
    blocks = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    assert len(blocks) == 3
    return [dict(re.findall(r"--([a-z]+): (#[0-9a-f]+);", block)) for block in blocks]


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2.2."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark", "paper"])
def test_contrast_is_that_of_wcag_aa(page: str, theme: str) -> None:
    light, dark, paper = palettes(page)
    colours = {"light": light, "dark": dark, "paper": {**light, **paper}}[theme]
    for text in ("ink", "soft", "after", "before", "mark", "close", "lossy", "damaged", "unmeasured"):
        for ground in ("page", "card"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["lines"], colours["card"]) >= 3


def test_a_bundle_without_flattening_has_a_report(bundle: Bundle) -> None:
    page = (bundle.path / "report" / "report.html").read_text(encoding="utf-8")
    Elements(page)
    assert "its accuracy was not measured" in page
    assert "Nothing was flattened" in page
    assert "loudest outliers" not in page
    assert "High-impact channels" not in page
