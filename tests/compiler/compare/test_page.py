"""A comparison drawn: names that touch no other, axes that fit the range, a page that shows every figure."""

import dataclasses
import itertools
import re
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from planish.compiler.compare.comparison import Compared, Comparison
from planish.compiler.compare.page import comparison_page, write_page
from planish.compiler.compare.plot import plot_comparison
from planish.compiler.compare.table import figures, labels
from planish.compiler.compare.tradeoff import draw_tradeoff, tradeoff
from planish.compiler.errors import OutputFolderError
from planish.compiler.harness.tasks import Score, TaskScores
from planish.compiler.measure.bench import Side
from planish.compiler.measure.evaluation import Evaluation


def compared(name: str, bits: float, perplexity: float) -> Compared:
    scores = {"piqa": TaskScores(50, 1.0, {"acc": Score(0.6, 0.05), "acc_norm": Score(0.61, 0.05)})}
    evaluation = Evaluation(perplexity, 1022, 2, 512, 1.0, 0.1, 0.9)
    return Compared(name, "w3a3", 10**6, bits, [evaluation], scores, Side(100.0, 10.0, 300.0, 400.0, 1.0))


def comparison(*perplexities: float, bits: float = 3.0) -> Comparison:
    models = [compared(f"out/model-{i}", bits + 0.01 * i, each) for i, each in enumerate(perplexities)]
    return Comparison(models, ["text.txt"], "float")


def drawn(found: Comparison) -> Axes:
    axes = Figure(figsize=(5, 4)).subplots()
    draw_tradeoff(axes, found, "blue", "black")
    return axes


@pytest.mark.parametrize("perplexities", [(20.0, 20.1, 20.2, 20.3, 45.0), (20.0, 21.0, 2e6), (20.0,), (20.0, 20.0)])
def test_names_touch_no_other(perplexities: tuple[float, ...]) -> None:
    found = comparison(*perplexities)
    axes = drawn(found)
    names = [text for text in axes.texts if isinstance(text, Annotation) and text.get_text()]
    assert {text.get_text() for text in names} == {*labels(found.models)}
    for one, other in itertools.combinations(names, 2):
        assert not one.get_window_extent().overlaps(other.get_window_extent())


def test_axes_are_logarithmic_where_the_range_asks_for_it() -> None:
    near = drawn(comparison(20.0, 45.0))
    assert (near.get_xscale(), near.get_yscale()) == ("linear", "linear")
    far = drawn(Comparison([compared("a", 3.0, 2e6), compared("b", 16.0, 20.0)], ["text.txt"], None))
    assert (far.get_xscale(), far.get_yscale()) == ("log", "log")
    assert "logarithmic" in far.get_xlabel()


def test_no_two_models_have_one_name() -> None:
    models = [compared(name, 3.0, 20.0) for name in ("a/out", "b/out", "c/other", "c/other")]
    assert labels(models) == ["a/out (w3a3)", "b/out (w3a3)", "c/other (w3a3) #1", "c/other (w3a3) #2"]


def test_no_two_texts_have_one_name() -> None:
    twice = dataclasses.replace(comparison(20.0), texts=["a/text.txt", "b/text.txt"])
    models = [dataclasses.replace(each, evaluations=each.evaluations * 2) for each in twice.models]
    names = [each.name for each in figures(dataclasses.replace(twice, models=models))]
    assert {"perplexity on a/text.txt", "perplexity on b/text.txt"} <= {*names}


def test_a_page_shows_every_figure() -> None:
    found = comparison(20.0, 45.0, 3e5)
    page = unescape(comparison_page(found))
    for figure in figures(found):
        for words in figure.shown:
            assert words in page
    assert len(re.findall("data-plot=", page)) == 1 + len(figures(found))
    assert page.count("Whiskers are standard errors.") == 1
    assert comparison_page(found) == comparison_page(found)


def test_what_is_not_finite_is_not_drawn(tmp_path: Path) -> None:
    found = comparison(20.0, float("inf"))
    assert [name for name, *_ in tradeoff(found)] == ["model-0 (w3a3)"]
    assert "inf" in comparison_page(found)
    none = comparison(float("inf"), float("inf"))
    assert "tradeoff" not in comparison_page(none)
    plot_comparison(none, tmp_path / "plot.svg")
    assert "stored bits" not in "".join(ElementTree.parse(tmp_path / "plot.svg").getroot().itertext())


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputFolderError, match="Name another"):
        write_page(comparison(20.0, 21.0), tmp_path / "none" / "page.html")
