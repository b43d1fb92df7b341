"""Takeaways of the committed results fit two lines and few numbers, and their figures are drawn whole."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from figure_helpers import cuts_without_mark, wrong_colors
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
    marked = any(str(trace.marker.symbol).startswith("triangle") for trace in figure.data if trace.type == "scatter")
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
    figure = committed[0].draw(committed[1]).figure()
    used = {trace.yaxis or "y" for trace in figure.data}
    axes = [name for name in figure.layout.to_plotly_json() if name.startswith("yaxis")]
    assert [name for name in axes if name.replace("axis", "") not in used] == []


def places_of(values: Any, axis: Any, other: Any) -> np.ndarray:
    """Where values are along an axis, in shares of its length."""
    if any(isinstance(value, str) for value in values):
        order = list(dict.fromkeys(value for trace in other for value in trace))
        at, span = np.array([order.index(value) for value in values], dtype=float), (-0.5, len(order) - 0.5)
    else:
        at = np.array(values, dtype=float)
        every = np.concatenate([np.array(trace, dtype=float) for trace in other])
        at, every = (np.log10(at), np.log10(every)) if axis.type == "log" else (at, every)
        span = axis.range or (np.nanmin(every), np.nanmax(every))
    return (at - span[0]) / ((span[1] - span[0]) or 1)


def test_no_estimate_hides_another(committed: tuple[Any, Any]) -> None:
    """Marks with intervals lie at least two pixels apart, unless both are hollow or of another shape."""
    figure = committed[0].figure(committed[1])
    layout, panels = figure.layout, {}
    for trace in figure.data:
        if trace.type == "scatter":
            panels.setdefault((trace.xaxis or "x", trace.yaxis or "y"), []).append(trace)
    hidden = []
    for (x, y), traces in panels.items():
        axes = [layout[f"{name[0]}axis{name[1:]}"] for name in (x, y)]
        sizes = [layout.width, layout.height]
        lengths = [size * (axis.domain[1] - axis.domain[0]) for size, axis in zip(sizes, axes, strict=True)]
        every = [[trace[letter] for trace in traces] for letter in "xy"]
        bars = [(trace, (trace.error_x.array, trace.error_y.array)) for trace in traces if trace.mode == "markers"]
        marks = [trace for trace, arrays in bars if any(array is not None for array in arrays)]
        found = [
            (
                trace.name,
                trace.marker.symbol,
                np.stack(
                    [
                        places_of(trace[letter], axis, other) * length
                        for letter, axis, other, length in zip("xy", axes, every, lengths, strict=True)
                    ],
                    axis=-1,
                ),
            )
            for trace in marks
        ]
        for i, (name, symbol, one) in enumerate(found):
            for other, its, two in found[:i]:
                apart = np.abs(one[:, None] - two[None]).max(-1)
                if symbol == its and np.nanmin(apart, initial=np.inf) < 2:
                    hidden.append((x, y, name, other))
    assert hidden == []
