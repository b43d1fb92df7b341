"""Figures of every layer and head: one row of panels per checkpoint and kind of reverse query.

Their frames have columns `checkpoint`, `kind`, `layer`, `head` (null: all heads of the layer) and, as
:func:`mdm_interp.stats.resampling.rows_at` names them, the measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.resampling import estimates_in
from mdm_interp.stats.tables import where
from mdm_interp.viz.plots import add_curve
from mdm_interp.viz.theme import DIVERGING, legend_at

ROW, HEAD, FOOT = 270, 160, 150
"""Pixels: a row of panels, the panels' titles, and legends below the panels."""
UNDEFINED = "undefined: these pairs<br>share no source, or<br>the facts are too few"


@dataclass(frozen=True)
class HeadMap:
    """One number for each head, as a colour."""

    title: str
    measure: str
    middle: float
    """What is neither red (below) nor blue."""
    limit: float
    """How far from the middle the colours reach."""


@dataclass(frozen=True)
class LayerCurves:
    """Measures of whole layers, with their intervals."""

    title: str
    curves: Mapping[str, tuple[str, str]]
    """Measure to its name in the legend and its colour."""
    dotted: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Predictions, which have no interval."""


def draw_layers(frame: pd.DataFrame, panels: Sequence[HeadMap | LayerCurves]) -> go.Figure:
    """Every panel for every checkpoint and kind."""
    places = list(dict.fromkeys(zip(frame["checkpoint"], frame["kind"], strict=True)))
    height = HEAD + ROW * len(places)
    figure = make_subplots(
        len(places),
        len(panels),
        column_titles=[panel.title for panel in panels],
        horizontal_spacing=0.065,
        vertical_spacing=0.0 if len(places) == 1 else 55 / height,
    )
    for row, (checkpoint, kind) in enumerate(places, start=1):
        of_place = where(frame, checkpoint=checkpoint, kind=kind).dropna(subset="layer")
        for col, panel in enumerate(panels, start=1):
            _add_panel(figure, of_place, panel, row, col)
        figure.update_yaxes(title_text=f"<b>{checkpoint}</b><br>{kind} reverse<br>layer", row=row, col=1)
    below = -75 / height
    for col, panel in enumerate(panels, start=1):
        middle = (col - 0.5) / len(panels)
        figure.update_xaxes(title_text="head" if isinstance(panel, HeadMap) else "layer", row=len(places), col=col)
        if isinstance(panel, LayerCurves):
            figure.update_layout({f"legend{col}": legend_at(middle, below) | {"orientation": "v"}})
        else:
            bar = {"orientation": "h", "x": middle, "y": below, "yanchor": "top", "len": 0.8 / len(panels)}
            figure.update_traces({"colorbar": bar | {"thickness": 14}}, selector={"type": "heatmap"}, row=1, col=col)
    return figure


def layers_height(figure: go.Figure) -> int:
    """Height, in pixels, at which the panels of :func:`draw_layers` have their size."""
    rows = sum(1 for _ in figure.select_yaxes(col=1))
    return HEAD + ROW * rows + FOOT


def span_of(summary: Mapping[str, Estimate], ending: str) -> str:
    """The values whose name ends so, of all checkpoints: `0.21`, or `0.21 to 0.34`; empty where there are none."""
    values = [estimate.value for name, estimate in summary.items() if name.endswith(ending)]
    ends = dict.fromkeys(f"{round(end, 2) + 0.0:.2f}" for end in (min(values), max(values))) if values else []
    return " to ".join(ends)


def say(figure: go.Figure, text: str, row: int, col: int) -> None:
    """Words in place of a panel."""
    axis = {"showticklabels": False, "showgrid": False, "ticks": ""}
    figure.update_xaxes(axis, row=row, col=col)
    figure.update_yaxes(axis, row=row, col=col)
    words = go.Scatter(x=[0.5], y=[0.5], mode="text", text=[text], showlegend=False, hoverinfo="skip")
    figure.add_trace(words, row=row, col=col)


def _add_panel(figure: go.Figure, frame: pd.DataFrame, panel: HeadMap | LayerCurves, row: int, col: int) -> None:
    if isinstance(panel, HeadMap):
        heads = frame.dropna(subset="head")
        matrix = heads.pivot(index="layer", columns="head", values=panel.measure).astype(float)
        shown = bool(matrix.notna().any(axis=None))
        if shown:
            _add_heads(figure, matrix, panel, row, col)
    else:
        layers = frame[frame["head"].isna()]
        shown = False
        for measure, (name, color) in {**panel.curves, **panel.dotted}.items():
            solid = measure in panel.curves
            points = estimates_in(layers, measure) if solid else _without_interval(layers, measure)
            if points.empty:
                continue
            shown, legend = True, f"legend{col}" if row == 1 else None
            dash = "solid" if solid else "dot"
            add_curve(figure, points, "layer", name=name, color=color, row=row, col=col, dash=dash, legend=legend)
    if not shown:
        say(figure, UNDEFINED, row, col)


def _add_heads(figure: go.Figure, matrix: pd.DataFrame, panel: HeadMap, row: int, col: int) -> None:
    trace = go.Heatmap(
        z=matrix.to_numpy(),
        x=matrix.columns,
        y=matrix.index,
        zmin=panel.middle - panel.limit,
        zmax=panel.middle + panel.limit,
        colorscale=DIVERGING,
        showscale=row == 1,
        hovertemplate=f"layer %{{y}}, head %{{x}}<br>{panel.title} %{{z:.3g}}<extra></extra>",
    )
    figure.add_trace(trace, row=row, col=col)
    figure.update_yaxes(autorange="reversed", row=row, col=col)
    for update, count in ((figure.update_yaxes, len(matrix)), (figure.update_xaxes, matrix.shape[1])):
        update(dtick=1 if count < 9 else 8, showgrid=False, row=row, col=col)


def _without_interval(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    value = rows[measure].astype(float)
    points = pd.DataFrame({"layer": rows["layer"], "value": value, "low": value, "high": value, "n": rows["facts"]})
    return points.dropna(subset="value")
