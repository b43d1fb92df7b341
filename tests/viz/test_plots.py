"""Marks and theme: what is drawn for which data, in which colours."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.io as pio
import pytest
from plotly.subplots import make_subplots
from report_helpers import CURVE, NAN, drawing

from mdm_interp.stats.estimates import Estimate
from mdm_interp.viz import theme
from mdm_interp.viz.plots import add_estimates, add_points
from mdm_interp.viz.theme import DARK, FORWARD, NAME, REVERSE, SCHEMES, VARIANTS, faded


def test_a_curve_is_its_mean_in_a_band_of_its_interval() -> None:
    drawn: Any = drawing().data
    band, line = drawn[:2]
    assert list(line.x) == [1, 10, 100]
    assert list(line.y) == [0.1, 0.4, 0.9]
    assert list(band.x) == [1, 10, 100, 100, 10, 1]
    assert list(band.y) == [0.2, 0.5, 1.0, 0.8, 0.3, 0.0]
    assert (band.fill, band.fillcolor, line.line.color) == ("toself", faded(FORWARD), FORWARD)
    assert [trace.showlegend for trace in drawn[:4]] == [False, True, False, False]


def test_points_and_estimates_have_their_intervals_as_bars_and_leave_out_what_was_not_measured() -> None:
    figure = make_subplots(1, 3)
    points = pd.concat([CURVE, pd.DataFrame([{"step": 1000, "value": NAN, "low": NAN, "high": NAN, "n": 0}])])
    add_points(figure, points, "step", name="reverse", color=REVERSE, row=1, col=1, shift=0.5, legend="legend2")
    add_points(figure, points[points["n"] == 0], "step", name="none", color=REVERSE, row=1, col=1)
    estimates = {
        "one": Estimate(0.5, 0.25, 1.0, 3),
        "absent": Estimate(NAN, NAN, NAN, 0),
        "two": Estimate(0.0, 0.0, 0.0, 1),
    }
    for col, upright in ((2, False), (3, True)):
        add_estimates(figure, estimates, name="effect", color=FORWARD, row=1, col=col, upright=upright)
    add_estimates(figure, {"absent": estimates["absent"]}, name="none", color=FORWARD, row=1, col=2)
    drawn: Any = figure.data
    assert [trace.name for trace in drawn] == ["reverse", "effect", "effect"]
    assert [trace.showlegend for trace in drawn] == [True, False, False]
    assert (list(drawn[0].x), list(drawn[0].y)) == ([1.5, 10.5, 100.5], [0.1, 0.4, 0.9])
    assert list(drawn[0].error_y.array) == pytest.approx([0.1] * 3)
    assert list(drawn[0].error_y.arrayminus) == pytest.approx([0.1] * 3)
    for trace, labels, values, bars in (
        (drawn[1], drawn[1].y, drawn[1].x, drawn[1].error_x),
        (drawn[2], drawn[2].x, drawn[2].y, drawn[2].error_y),
    ):
        assert (list(labels), list(values), trace.mode) == (["one", "two"], [0.5, 0.0], "markers")
        assert (list(bars.array), list(bars.arrayminus)) == ([0.5, 0.0], [0.25, 0.0])


def test_a_level_crosses_the_panel_and_a_matrix_has_its_first_row_on_top() -> None:
    figure: Any = drawing()
    level, matrix = figure.data[4:]
    assert (list(level.x), list(level.y)) == ([1.0, 100.0], [0.5, 0.5])
    assert matrix.z.tolist() == [[1.0, -1.0], [0.0, 0.5]]
    assert (list(matrix.x), list(matrix.y), matrix.zmin, matrix.zmax) == (["B0", "B1"], ["A0", "A1"], -1.0, 1.0)
    assert figure.layout.yaxis2.autorange == "reversed"


def test_faded_keeps_the_colour() -> None:
    assert faded("#0072B2", 0.5) == "rgba(0,114,178,0.5)"


def luminance(color: str) -> float:
    """Of sRGB, relative to white."""
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Of two colours, 1 to 21 (WCAG 2.2)."""
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def layout_of(template: str) -> Any:
    return pio.templates[template].layout


def ground(template: str) -> str:
    color = layout_of(template).paper_bgcolor
    return "#FFFFFF" if color == "white" else color


@pytest.mark.parametrize("colors", [VARIANTS, SCHEMES])
def test_what_is_compared_has_colours_of_its_own(colors: dict[str, str]) -> None:
    assert len(set(colors.values())) == len(colors)


@pytest.mark.parametrize(("template", "least"), [(NAME, 2.0), (DARK, 3.0)])
def test_colours_stand_out_from_the_paper(template: str, least: float) -> None:
    for color in (*theme.COLORS, theme.GREY):
        assert contrast(color, ground(template)) > least, color


@pytest.mark.parametrize("template", [NAME, DARK])
def test_text_of_figures_is_readable(template: str) -> None:
    layout = layout_of(template)
    for color in (layout.font.color, layout.title.subtitle.font.color):
        assert contrast(color, ground(template)) >= 7


def test_the_dark_theme_is_the_light_one_in_other_colours() -> None:
    def shape(value: Any) -> Any:
        """What a template sets, less its colours."""
        if isinstance(value, dict):
            return {key: shape(part) for key, part in value.items() if "color" not in key or key == "colorway"}
        return value

    light, dark = (pio.templates[name].to_plotly_json()["layout"] for name in (NAME, DARK))
    assert shape(light) == shape(dark)
    assert light["font"]["color"] != dark["font"]["color"]
