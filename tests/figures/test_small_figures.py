"""Figures of small results are whole: nothing on something else, nothing cut off, nothing empty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import pytest
from figure_helpers import cuts_without_mark, empty_panels, hidden_marks, wrong_colors, wrong_texts

from mdm_interp.experiments.analysis import discover
from mdm_interp.experiments.results import Result
from mdm_interp.viz.panels import Panels
from mdm_interp.viz.theme import FORWARD, titled

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ANALYSES = {analysis.name: analysis for analysis in discover()}


@pytest.mark.parametrize("name", sorted(ANALYSES))
def test_a_figure_of_a_small_result_is_whole(
    name: str, tiny_result: Callable[[str], Result], browser: Browser, tmp_path: Path
) -> None:
    figure = ANALYSES[name].figure(tiny_result(name))
    assert wrong_texts(browser, figure, tmp_path / "figure.html") == []
    assert empty_panels(figure) == []
    assert cuts_without_mark(figure) == []
    assert hidden_marks(figure) == []
    assert list(wrong_colors(figure)) == []


def drawn(**axis: Any) -> go.Figure:
    (panel,) = (panels := Panels()).row(["panel"], x={"title": "where", **axis}, y={"title": "what"})
    for name in ("one", "other"):
        panel.add(go.Scatter(x=[0, 1], y=[0, 1], mode="markers", marker={"color": FORWARD}), name)
    return titled(panels.figure(160), "Question?", "Answer.")


def test_the_checks_see_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "figure.html"
    assert wrong_texts(browser, drawn(), page) == []
    names = {"tickvals": [0.5, 0.51], "ticktext": ["a long name", "another"], "tickangle": 0}
    assert any(
        said.startswith("tick: another lies on tick: a long") for said in wrong_texts(browser, drawn(**names), page)
    )
    high = drawn().update_layout(title={"y": 1.0, "yanchor": "bottom"})
    assert "title: Question? is cut off" in wrong_texts(browser, high, page)
    assert hidden_marks(drawn()) == ["other on one of x"]
    assert empty_panels(drawn()) == []
    assert empty_panels(drawn().update_layout(xaxis={"range": [2, 3]})) == ["yaxis"]
