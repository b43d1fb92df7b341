"""Takeaways of the committed results fit two lines and few numbers, and their figures are drawn whole."""

from __future__ import annotations

import re
from typing import Any

import plotly.graph_objects as go
import pytest
from figure_helpers import cuts_without_mark, empty_panels, hidden_marks, is_arrow, wrong_colors
from helpers import ROOT

from mdm_interp.experiments.analysis import discover
from mdm_interp.viz.panels import CUT
from mdm_interp.viz.theme import COLORS, FORWARD, PART_COLORS, SCHEME_COLORS, SCHEME_NAMES, SHADES

NAMES = sorted(analysis.name for analysis in discover() if (ROOT / "figures" / f"{analysis.name}.json").exists())
LONGEST, NUMBERS = 290, 5
SIZE = re.compile(r"n = \d+( to \d+)?|\d+ heads?\b|`[^`]*`")
"""What is not counted: how many were measured, and names of settings."""
PLAIN_NAMES = re.compile(rf"\b({'|'.join(SCHEME_NAMES)})\b".replace("none", "(?:MDM|ARM|any_order) none"))


def numbers_in(text: str) -> list[str]:
    return re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?!\w)", SIZE.sub("", text))


def test_numbers_are_counted_but_for_sizes_and_names() -> None:
    said = "T5 and demo qwen2 give 0.82 to -0.40, 90% in 3 of 4 settings with 4 heads (n = 5 to 10 seeds)."
    assert numbers_in(said) == ["0.82", "-0.40", "90", "3", "4"]


@pytest.fixture(scope="module", params=NAMES)
def committed(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """An analysis and its committed result."""
    (analysis,) = (one for one in discover() if one.name == request.param)
    return analysis, analysis.load(ROOT / "figures" / f"{request.param}.json")


def test_the_takeaway_is_short_and_names_its_size(committed: tuple[Any, Any]) -> None:
    analysis, result = committed
    said = analysis.takeaway(result)
    assert len(said) <= LONGEST, said
    assert len(numbers_in(said)) <= NUMBERS, said
    assert re.search(r"n = \d+", said), said
    assert "nan" not in said and not re.search(r"-0(\.0*)?(?![.\d])", said), said
    assert not PLAIN_NAMES.search(said), said


def shown_texts(figure: Any) -> list[str]:
    """Titles, names and named places of a figure."""
    layout = figure.layout
    axes = [axis for name, axis in layout.to_plotly_json().items() if name.startswith(("xaxis", "yaxis"))]
    places = [str(text) for axis in axes for text in axis.get("ticktext", ())]
    return [*(one.text for one in layout.annotations), *(str(trace.name) for trace in figure.data), *places]


def test_the_figure_says_how_many_and_names_schemes_as_readers_know_them(committed: tuple[Any, Any]) -> None:
    analysis, result = committed
    texts = shown_texts(analysis.figure(result))
    assert any("n = " in text for text in texts) or "n = " in analysis.takeaway(result)
    assert [text for text in texts if PLAIN_NAMES.search(text)] == []


def test_nothing_is_cut_without_a_mark(committed: tuple[Any, Any]) -> None:
    """Values and bars lie within the axes, bands within them or below a triangle, and colours within their scale."""
    figure = committed[0].figure(committed[1])
    assert cuts_without_mark(figure) == []
    marked = any(is_arrow(trace) for trace in figure.data if trace.type == "scatter")
    assert marked == any(note.text == CUT for note in figure.layout.annotations)


def test_a_color_means_one_thing_in_all_figures(committed: tuple[Any, Any]) -> None:
    assert list(wrong_colors(committed[0].figure(committed[1]))) == []


@pytest.mark.parametrize(
    ("name", "color", "is_wrong"),
    [
        ("forward query", FORWARD, False),
        ("NoPE", FORWARD, True),
        ("RoPE, 4 heads", SHADES[2], False),
        ("RoPE, 4 heads", SCHEME_COLORS["alibi"], True),
        ("V", PART_COLORS["storage"], False),
        ("V", SCHEME_COLORS["none"], True),
        ("RoPE", COLORS[0], True),
        ("written", "#123456", True),
    ],
)
def test_the_check_of_colors_knows_what_each_means(name: str, color: str, is_wrong: bool) -> None:
    figure = go.Figure(go.Scatter(x=[0], y=[0], name=name, line={"color": color}))
    assert bool(list(wrong_colors(figure))) == is_wrong


def test_every_panel_has_something_to_see(committed: tuple[Any, Any]) -> None:
    assert empty_panels(committed[0].figure(committed[1])) == []


def test_no_mark_hides_another(committed: tuple[Any, Any]) -> None:
    assert hidden_marks(committed[0].figure(committed[1])) == []
