"""Panels and theme: what is drawn for which data, where, and in which colours."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from figure_helpers import cuts_without_mark
from hypothesis import given, settings
from hypothesis import strategies as st
from report_helpers import CURVE, NAN, drawing

from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.viz import theme
from mdm_interp.viz.panels import CUT, Panels
from mdm_interp.viz.theme import DARK, FORWARD, NAME, REVERSE, SCHEME_COLORS, VARIANT_COLORS, faded, shown


def test_a_curve_is_its_mean_in_a_band_of_its_interval() -> None:
    drawn: Any = drawing().data
    band, line = drawn[:2]
    assert list(line.x) == [1, 10, 100]
    assert list(line.y) == [0.1, 0.4, 0.9]
    assert list(band.x) == [1, 10, 100, 100, 10, 1]
    assert list(band.y) == [0.2, 0.5, 1.0, 0.8, 0.3, 0.0]
    assert (band.fill, band.fillcolor, line.line.color) == ("toself", faded(FORWARD), FORWARD)
    assert [trace.showlegend for trace in drawn[:4]] == [False, True, False, False]


def test_a_curve_of_rows_is_the_mean_over_seeds_and_leaves_out_what_was_not_measured() -> None:
    rows = pd.DataFrame(
        {"step": [1, 1, 10, 10, 100], "seed": [0, 1, 0, 1, 0], "share": [0.1, 0.3, None, 0.5, None]}, dtype=object
    )
    (panel,) = (panels := Panels()).row([""])
    panel.curve(rows, "step", "share", name="share", color=FORWARD)
    panel.points(rows, "step", "share", name="share", color=FORWARD)
    panel.curve(rows[rows["step"] == 100], "step", "share", name="nothing", color=FORWARD)
    panel.curve(rows[:0], "step", "share", name="nothing", color=FORWARD)
    band, line, points = panels.figure().data
    assert list(line.x) == list(points.x) == [1, 10]
    assert list(line.y) == list(points.y) == pytest.approx([0.2, 0.5])
    pair = mean_estimate([0.1, 0.3])
    assert list(band.y) == pytest.approx([pair.high, pair.low]), "a single seed has no interval"


def test_points_and_estimates_have_their_intervals_as_bars_and_leave_out_what_was_not_measured() -> None:
    panels = Panels()
    first, second, third = panels.row(["", "", ""])
    points = pd.concat([CURVE, pd.DataFrame([{"step": 1000, "value": NAN, "low": NAN, "high": NAN, "n": 0}])])
    first.points(points, "step", name="reverse", color=REVERSE, shift=0.5)
    first.points(points[points["n"] == 0], "step", name="none", color=REVERSE)
    estimates = {
        "one": Estimate(0.5, 0.25, 1.0, 3),
        "absent": Estimate(NAN, NAN, NAN, 0),
        "two": Estimate(0.0, 0.0, 0.0, 1),
    }
    second.estimates(estimates, name="effect", color=FORWARD)
    third.estimates(estimates, name="effect", color=FORWARD, upright=True)
    second.estimates({"absent": estimates["absent"]}, name="none", color=FORWARD)
    drawn: Any = panels.figure().data
    assert [trace.name for trace in drawn] == ["reverse", "effect", "effect"]
    assert [trace.showlegend for trace in drawn] == [True, True, False]
    assert (list(drawn[0].x), list(drawn[0].y)) == ([1.5, 10.5, 100.5], [0.1, 0.4, 0.9])
    assert list(drawn[0].error_y.array) == pytest.approx([0.1] * 3)
    assert list(drawn[0].error_y.arrayminus) == pytest.approx([0.1] * 3)
    for trace, labels, values, bars in (
        (drawn[1], drawn[1].y, drawn[1].x, drawn[1].error_x),
        (drawn[2], drawn[2].x, drawn[2].y, drawn[2].error_y),
    ):
        assert (list(labels), list(values), trace.mode) == (["one", "two"], [0.5, 0.0], "markers")
        assert (list(bars.array), list(bars.arrayminus)) == ([0.5, 0.0], [0.25, 0.0])


def test_a_level_reaches_as_far_as_the_data_and_a_matrix_has_its_first_row_on_top() -> None:
    figure: Any = drawing()
    level, matrix = figure.data[4:]
    assert (list(level.x), list(level.y)) == ([1.0, 100.0], [0.5, 0.5])
    assert matrix.z.tolist() == [[1.0, -1.0], [0.0, 0.5]]
    assert (list(matrix.x), list(matrix.y), matrix.zmin, matrix.zmax) == (["B0", "B1"], ["A0", "A1"], -1.0, 1.0)
    assert figure.layout.yaxis2.autorange == "reversed"
    right = figure.layout.xaxis2.domain[1]
    assert matrix.colorbar.x > right, "the colour scale is beside the panel"


def test_a_name_is_listed_once_below_the_last_row_in_which_it_occurs() -> None:
    panels = Panels()
    for names in (("measured", "null"), ("forward", "null"), ("forward",)):
        for panel in panels.row(["", ""]):
            for name in names:
                panel.curve(CURVE, "step", name=name, color=FORWARD)
    figure: Any = panels.figure()
    listed = [(trace.name, trace.yaxis, trace.legend) for trace in figure.data if trace.showlegend]
    assert [name for name, *_ in listed] == ["measured", "null", "forward"]
    assert [axis for _, axis, _ in listed] == ["y", "y3", "y5"]
    tops = [figure.layout[legend].y for _, _, legend in listed]
    for top, above, below in zip(tops, ("yaxis", "yaxis3", "yaxis5"), ("yaxis3", "yaxis5", None), strict=True):
        assert figure.layout[above].domain[0] > top
        assert below is None or top > figure.layout[below].domain[1]


def test_columns_have_legends_of_their_own_where_a_row_says_so() -> None:
    panels = Panels()
    for panel, name in zip(panels.row(["", ""], legend="column"), ("left", "right"), strict=True):
        panel.curve(CURVE, "step", name=name, color=FORWARD)
        panel.curve(CURVE, "step", name="both", color=REVERSE)
    figure: Any = panels.figure()
    listed = [(trace.name, trace.legend) for trace in figure.data if trace.showlegend]
    assert listed == [("left", "legend"), ("both", "legend"), ("right", "legend2"), ("both", "legend2")]
    for legend, axis in (("legend", "xaxis"), ("legend2", "xaxis2")):
        assert figure.layout[legend].x == pytest.approx(sum(figure.layout[axis].domain) / 2)
        assert figure.layout[legend].orientation == "v"


def test_columns_list_their_names_below_their_last_panel_and_below_a_scale_of_their_own() -> None:
    panels = Panels()
    (first, scaled), (_, last) = (panels.row(["", ""], one_y=False, legend="column") for _ in range(2))
    first.curve(CURVE, "step", name="once", color=FORWARD)
    for panel in (scaled, last):
        panel.curve(CURVE, "step", name="twice", color=FORWARD)
    dots = pd.DataFrame({"one": [0.1, 0.2], "other": [0.3, 0.4], "layer": [0, 1]})
    look = {"name": "heads", "label": ["a", "b"], "listed": False, "color": dots["layer"]}
    last.dots(dots, "one", "other", scale="layer", **look)
    figure: Any = panels.figure()
    once, twice = (
        next(trace.legend for trace in figure.data if trace.name == name and trace.showlegend)
        for name in ("once", "twice")
    )
    bar = figure.data[-1].marker.colorbar
    assert bar.title.text == "layer" and bar.x == pytest.approx(sum(figure.layout.xaxis4.domain) / 2)
    bottom = figure.layout.yaxis3.domain[0]
    assert bottom == 0 > figure.layout[once].y > figure.layout[twice].y, "both are below the last row"
    assert figure.layout[twice].y < bar.y < 0, "the names are below the scale"


def test_estimates_of_one_place_can_be_drawn_side_by_side() -> None:
    first, second = (panels := Panels()).row(["", ""])
    estimates = {
        "one": Estimate(0.5, 0.25, 1.0, 3),
        "absent": Estimate(NAN, NAN, NAN, 0),
        "two": Estimate(0.0, 0.0, 0.0, 1),
    }
    first.estimates(estimates, name="effect", color=FORWARD, shift=-0.1)
    second.estimates(estimates, name="effect", color=FORWARD, shift=0.1, upright=True)
    figure: Any = panels.figure()
    assert list(figure.data[0].y) == pytest.approx([-0.1, 1.9]) and list(figure.data[1].x) == pytest.approx([0.1, 2.1])
    for axis, ends in ((figure.layout.yaxis, (2.5, -0.5)), (figure.layout.xaxis2, (-0.5, 2.5))):
        assert (list(axis.ticktext), list(axis.tickvals), axis.range) == (list(estimates), [0, 1, 2], ends)
    assert [name for name, _ in figure.data[0].customdata] == ["one", "two"]


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 5), st.integers(60, 400), st.booleans(), st.booleans()), min_size=1, max_size=5
    ),
    top=st.integers(0, 300),
)
def test_panels_never_overlap_and_have_the_height_that_they_were_given(
    rows: list[tuple[int, int, bool, bool]], top: int
) -> None:
    panels, made = Panels(), []
    for n, height, one_y, scaled in rows:
        row = panels.row(["title"] * n, height=height, one_y=one_y, x={"title": "x"})
        row[0].curve(CURVE, "step", name="a name", color=FORWARD)
        if scaled:
            row[-1].matrix(pd.DataFrame([[1.0]]), limit=1.0, scale="scale")
        made.append(row)
    figure: Any = panels.figure(top)
    layout = figure.layout
    plot = layout.height - layout.margin.t - layout.margin.b
    bottoms = []
    for row, (_, height, *_) in zip(made, rows, strict=True):
        lefts_and_rights = [panel.axis("x").domain for panel in row]
        assert all(left < right for left, right in lefts_and_rights)
        assert all(right < left for (_, right), (left, _) in pairwise(lefts_and_rights))
        assert lefts_and_rights[0][0] >= 0 and lefts_and_rights[-1][1] <= 1
        ((bottom, upper),) = {tuple(panel.axis("y").domain) for panel in row}
        assert (upper - bottom) * plot == pytest.approx(height)
        assert not bottoms or upper < bottoms[-1]
        bottoms.append(bottom)
    assert bottoms[-1] == pytest.approx(0)


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


@pytest.mark.parametrize("colors", [VARIANT_COLORS, SCHEME_COLORS])
def test_what_is_compared_has_colours_of_its_own(colors: dict[str, str]) -> None:
    assert len(set(colors.values())) == len(colors)
    sides, others = (
        {theme.FORWARD, theme.REVERSE, theme.CHANCE},
        {*theme.COLORS, *theme.SHADES, *theme.PART_COLORS.values()},
    )
    assert not sides & {*colors.values(), *others} and not {*colors.values()} & others, "these mean one thing"
    assert len(others) == len([*theme.COLORS, *theme.SHADES, *theme.PART_COLORS])


@pytest.mark.parametrize(("template", "least"), [(NAME, 2.0), (DARK, 3.0)])
def test_colours_stand_out_from_the_paper(template: str, least: float) -> None:
    of_kinds = {**SCHEME_COLORS, **VARIANT_COLORS, **theme.PART_COLORS}.values()
    for color in (*of_kinds, *theme.SHADES, *theme.COLORS, theme.FORWARD, theme.REVERSE, theme.CHANCE):
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


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("MDM none", "MDM NoPE"),
        ("ARM rope", "ARM RoPE"),
        ("rope, 4 heads", "RoPE, 4 heads"),
        ("t5_bias", "T5"),
        ("learned", "learned"),
        ("MDM learned", "MDM learned"),
        ("null: none", "null: none"),
    ],
)
def test_labels_name_schemes_as_readers_know_them(label: str, expected: str) -> None:
    assert shown(label) == expected


def interval(value: float, low: float, high: float) -> dict[str, Estimate]:
    return {"place": Estimate(value, low, high, 3)}


def test_an_axis_grows_to_hold_an_interval_and_cuts_one_that_would_squash_the_rest() -> None:
    panels = Panels()
    first, second = panels.row(["", ""], y={"range": [0, 1]})
    (third,) = panels.row([""], x={"range": [1, 0]})
    first.estimates(interval(0.9, 0.5, 1.2), name="held", color=FORWARD, upright=True)
    second.estimates(interval(0.5, -3.0, 4.0), name="long", color=REVERSE, upright=True)
    third.estimates(interval(0.5, 0.25, 4.0), name="long", color=REVERSE)
    figure: Any = panels.figure()
    assert figure.layout.yaxis.range == figure.layout.yaxis2.range == (0, pytest.approx(1.22))
    assert figure.layout.xaxis3.range == (1, 0)
    held, long, flat, *arrows = figure.data
    assert (list(held.error_y.array), list(held.error_y.arrayminus)) == (pytest.approx([0.3]), pytest.approx([0.4]))
    assert (list(long.error_y.array), list(long.error_y.arrayminus)) == (pytest.approx([0.72]), pytest.approx([0.5]))
    assert (list(flat.error_x.array), list(flat.error_x.arrayminus)) == (pytest.approx([0.5]), pytest.approx([0.25]))
    assert long.customdata[0][1] == "0.5 [-3, 4]"
    symbols = {(arrow.marker.symbol, arrow.marker.color, arrow.legendgroup, arrow.showlegend) for arrow in arrows}
    assert symbols == {(f"triangle-{points}", REVERSE, "long", False) for points in ("down", "up", "right")}
    assert [list(arrow.y) for arrow in arrows[:2]] == [[0], [pytest.approx(1.22)]]
    (note,) = (note for note in figure.layout.annotations if note.text == CUT)
    assert note.yref == "y3 domain", "said once, below the last row in which something is cut"


def test_a_band_that_leaves_its_axis_is_marked_where_it_does() -> None:
    (panel,) = (panels := Panels()).row([""], y={"range": [0, 1]})
    rows = pd.DataFrame({"step": [1, 2, 3], "value": 0.5, "low": 0.25, "high": [0.75, 2.0, 3.0], "n": 3})
    panel.curve(rows, "step", name="share", color=FORWARD)
    figure: Any = panels.figure()
    _, _, arrows = figure.data
    assert (list(arrows.x), list(arrows.y), arrows.marker.color) == ([2, 3], [1, 1], FORWARD)
    assert cuts_without_mark(figure) == []
    assert cuts_without_mark(go.Figure(figure.data[:2], figure.layout)) == ["share of x, y"]
