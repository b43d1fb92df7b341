"""The few marks that figures are made of. Data in, traces out: nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mdm_interp.stats.estimates import Estimate
from mdm_interp.viz.theme import DIVERGING, faded

TRAINING_STEPS = {"type": "log", "tickvals": [1, 10, 100, 1000, 10_000], "ticktext": ["1", "10", "100", "1k", "10k"]}
"""An axis of training steps."""


def add_curve(
    figure: go.Figure,
    curve: pd.DataFrame,
    x: str,
    *,
    name: str,
    color: str,
    row: int,
    col: int,
    dash: str = "solid",
    legend: str | None = None,
) -> None:
    """A mean (`value`) over `x` with its interval (`low`, `high`) as a band; listed in the legend of that name."""
    known = curve.dropna(subset=["low", "high"])  # a single observation has no interval
    edges = np.concatenate([known["high"].to_numpy(), known["low"].to_numpy()[::-1]])
    both = np.concatenate([known[x].to_numpy(), known[x].to_numpy()[::-1]])
    band = go.Scatter(
        x=both,
        y=edges,
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=faded(color),
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
    )
    line = go.Scatter(
        x=curve[x],
        y=curve["value"],
        mode="lines",
        line={"color": color, "width": 3, "dash": dash},
        **_listed(name, legend),
        customdata=curve[["low", "high", "n"]],
        hovertemplate=f"{name}<br>{x} %{{x}}: %{{y:.3g}} [%{{customdata[0]:.3g}}, %{{customdata[1]:.3g}}]"
        ", n = %{customdata[2]}<extra></extra>",
    )
    figure.add_traces([band, line] if len(known) else [line], rows=row, cols=col)


def add_points(
    figure: go.Figure,
    points: pd.DataFrame,
    x: str,
    *,
    name: str,
    color: str,
    row: int,
    col: int,
    dash: str = "solid",
    shift: float = 0.0,
    legend: str | None = None,
) -> None:
    """Means (`value`) at few places, with intervals (`low`, `high`) as bars; nothing where nothing was measured."""
    points = pd.DataFrame(points[points["n"] > 0]) if len(points) else points
    if points.empty:
        return
    trace = go.Scatter(
        x=points[x] + shift,
        y=points["value"],
        mode="lines+markers",
        line={"color": color, "width": 2.5, "dash": dash},
        marker={"size": 8},
        error_y=interval_bars(points),
        **_listed(name, legend),
        hovertemplate=f"{name}<br>%{{y:.3g}}<extra></extra>",
    )
    figure.add_trace(trace, row=row, col=col)


def add_estimates(
    figure: go.Figure,
    estimates: Mapping[str, Estimate],
    *,
    name: str,
    color: str,
    row: int,
    col: int,
    symbol: str = "circle",
    size: int = 9,
    upright: bool = False,
    legend: str | None = None,
) -> None:
    """Estimates by label, their intervals as bars: the labels one below the other, or side by side if `upright`;
    nothing where nothing was measured."""
    measured = {label: estimate for label, estimate in estimates.items() if estimate.n}
    if not measured:
        return
    points = pd.DataFrame(list(map(asdict, measured.values())), index=list(measured))
    label_axis, value_axis = ("x", "y") if upright else ("y", "x")
    trace = go.Scatter(
        {label_axis: list(measured), value_axis: points["value"], f"error_{value_axis}": interval_bars(points)},
        mode="markers",
        marker={"color": color, "symbol": symbol, "size": size, "line": {"color": color, "width": 2}},
        **_listed(name, legend),
        hovertemplate=f"{name}, %{{{label_axis}}}: %{{{value_axis}:.3g}}<extra></extra>",
    )
    figure.add_trace(trace, row=row, col=col)


def _listed(name: str, legend: str | None) -> dict[str, Any]:
    """A trace's name, and the legend that lists it, if any; all traces of a name are switched together."""
    return {"name": name, "legendgroup": name, "legend": legend, "showlegend": legend is not None}


def interval_bars(points: pd.DataFrame) -> dict[str, Any]:
    """Error bars from `low` to `high` around `value`."""
    above, below = points["high"] - points["value"], points["value"] - points["low"]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "width": 2, "thickness": 1.5}


def add_level(
    figure: go.Figure,
    x: Sequence[float] | Sequence[int],
    level: float,
    *,
    name: str,
    color: str,
    row: int,
    col: int,
    legend: str | None = None,
) -> None:
    """A dotted horizontal line across `x`."""
    trace = go.Scatter(
        x=[min(x), max(x)],
        y=[level, level],
        mode="lines",
        line={"color": color, "width": 2, "dash": "dot"},
        **_listed(name, legend),
        hovertemplate=f"{name} %{{y:.3g}}<extra></extra>",
    )
    figure.add_trace(trace, row=row, col=col)


def add_matrix(
    figure: go.Figure,
    matrix: np.ndarray,
    *,
    x: Sequence[str],
    y: Sequence[str],
    limit: float,
    row: int,
    col: int,
    colorbar: dict | None = None,
) -> None:
    """A heat map from -limit (red) to limit (blue), first row on top; `colorbar` draws its scale."""
    trace = go.Heatmap(
        z=matrix,
        x=list(x),
        y=list(y),
        zmin=-limit,
        zmax=limit,
        colorscale=DIVERGING,
        showscale=colorbar is not None,
        colorbar=colorbar,
        hovertemplate="%{y} given %{x}: %{z:.3g}<extra></extra>",
    )
    figure.add_trace(trace, row=row, col=col)
    figure.update_yaxes(autorange="reversed", row=row, col=col)
