"""Figures of checkpoints: what all of them answer first, then every layer and head, one row of panels per checkpoint
and kind of reverse query.

Their frames have columns `checkpoint`, `kind`, `layer`, `head` (null: all heads of the layer) and, as
:func:`mdm_interp.stats.resampling.rows_at` names them, the measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mdm_interp.stats.estimates import NOTHING
from mdm_interp.stats.summary import Summary
from mdm_interp.stats.tables import estimates_in, where
from mdm_interp.viz.panels import Panel, Panels
from mdm_interp.viz.words import sample_size

UNDEFINED = "undefined: these pairs<br>share no source, or<br>the facts are too few"
CLUSTERS = "clusters of facts"
"""What `n` counts in checkpoints."""


@dataclass(frozen=True)
class Mark:
    """One estimate of every checkpoint in a row of :func:`draw_answers`."""

    quantity: str
    """Of the summary; `NAME_null` is the null of `NAME`."""
    name: str
    """In the legend."""
    color: str
    symbol: str = "circle"
    of: Mapping[str, Any] = field(default_factory=dict)
    """Which estimate of the quantity, where there are several per checkpoint and kind."""


@dataclass(frozen=True)
class HeadMap:
    """One number for each head, as a colour."""

    title: str
    measure: str
    middle: float
    """What is neither red (below) nor blue."""
    limit: float
    """How far from the middle the colours reach at least; further if a head does."""


@dataclass(frozen=True)
class LayerCurves:
    """Measures of whole layers, with their intervals."""

    title: str
    curves: Mapping[str, tuple[str, str]]
    """Measure to its name in the legend and its colour."""
    dotted: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Predictions, which have no interval."""
    undefined: str = UNDEFINED
    """What is said where there is nothing to draw."""


def checkpoints_and_kinds(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Return every checkpoint with every kind of reverse query that it was asked, in the order of the rows."""
    return list(dict.fromkeys(zip(frame["checkpoint"], frame["kind"], strict=True)))


def draw_answers(panels: Panels, summary: Summary, title: str, marks: Sequence[Mark], x: Mapping[str, Any]) -> None:
    """Add a row with one panel per kind of reverse query, in which every checkpoint has its marks.

    Args:
        title: Of the panels, before the kind and `n`.
        x: The axis of values, in Plotly's words.
    """
    shown = [entry for mark in marks for entry in summary.where(mark.quantity.removesuffix("_null"), **mark.of)]
    checkpoints = list(dict.fromkeys(entry.of["checkpoint"] for entry in summary))
    kinds = list(dict.fromkeys(entry.of["kind"] for entry in summary))
    size = {kind: sample_size([one.effect for one in shown if one.of["kind"] == kind], CLUSTERS) for kind in kinds}
    titles = [f"{title}<br>{kind} reverse, {size[kind]}" for kind in kinds]
    height = max(240, 40 + max(46, 16 * len(marks)) * len(checkpoints))
    row = panels.row(titles, x=x, height=height) if kinds else []
    for panel, kind in zip(row, kinds, strict=True):
        for place, mark in enumerate(marks):
            entries = summary.where(mark.quantity.removesuffix("_null"), kind=kind, **mark.of)
            is_null = mark.quantity.endswith("_null")
            found = {entry.of["checkpoint"]: entry.null if is_null else entry.effect for entry in entries}
            estimates = {checkpoint: found.get(checkpoint) or NOTHING for checkpoint in checkpoints}
            shift = 0.6 * (place - (len(marks) - 1) / 2) / max(len(marks), 2)
            panel.estimates(estimates, name=mark.name, color=mark.color, symbol=mark.symbol, shift=shift)
        if not any(one.of["kind"] == kind for one in shown):
            panel.say(UNDEFINED)
        elif "range" not in x and panel is not row[0]:
            panel.x(matches=f"x{row[0].axes}")


def draw_threads(
    panel: Panel, frame: pd.DataFrame, x: str, y: str, *, name: str, color: str, dash: str = "solid"
) -> None:
    """Draw one thin line for each checkpoint and kind, which are named where the pointer is."""
    for of, rows in frame.dropna(subset=y).groupby(["checkpoint", "kind"], sort=False):
        hover = f"{name}, {', '.join(map(str, of))}<br>%{{y:.3g}}<extra></extra>"
        line = {"color": color, "width": 2, "dash": dash}
        panel.add(go.Scatter(x=rows[x], y=rows[y].astype(float), mode="lines", line=line, hovertemplate=hover), name)


def draw_layers(frame: pd.DataFrame, shown: Sequence[HeadMap | LayerCurves], panels: Panels | None = None) -> Panels:
    """Draw every panel for every checkpoint and kind, below what `panels` has already. Those of a column share their
    scale."""
    panels, places = panels or Panels(), checkpoints_and_kinds(frame)
    of_column: dict[str, list[Panel]] = {}
    for checkpoint, kind in places:
        first, last = (checkpoint, kind) == places[0], (checkpoint, kind) == places[-1]
        titles = [one.title if first else "" for one in shown]
        row = panels.row(titles, height=150, one_y=False, legend="column")
        of_place = where(frame, checkpoint=checkpoint, kind=kind).dropna(subset="layer")
        for panel, one in zip(row, shown, strict=True):
            axis = "head" if isinstance(one, HeadMap) else "layer"
            panel.x(title=axis if last else None)
            drawn = (
                _draw_heads(panel, frame, of_place, one, last)
                if isinstance(one, HeadMap)
                else _draw(panel, of_place, one)
            )
            if not drawn:
                panel.say(one.undefined if isinstance(one, LayerCurves) else UNDEFINED)
            elif isinstance(one, LayerCurves):
                of_column.setdefault(one.title, []).append(panel)
            lines = [f"<b>{checkpoint}</b>", kind] * (panel is row[0]) + ["layer"] * isinstance(one, HeadMap)
            panel.y(title={"text": "<br>".join(lines), "font": {"size": 15}} if lines else None)
    for column in of_column.values():
        share_scale(column)
    return panels


def share_scale(panels: Sequence[Panel]) -> None:
    """Give panels one y axis, which `matches` of Plotly does not beside other matching axes of a given range."""
    drawn = [value for panel in panels for trace in panel.traces() for value in trace.y]
    low, high = min(drawn), max(drawn)
    room = 0.05 * (high - low or 1.0)
    for panel in panels:
        panel.y(range=[low - room, high + room])


def _draw_heads(panel: Panel, frame: pd.DataFrame, of_place: pd.DataFrame, one: HeadMap, last: bool) -> bool:
    """Draw a number of every head; tell whether there was anything to draw."""
    matrix = of_place.dropna(subset="head").pivot(index="layer", columns="head", values=one.measure).astype(float)
    if not matrix.notna().any(axis=None):
        return False
    furthest = (frame.dropna(subset="head")[one.measure].astype(float) - one.middle).abs().max()
    hover = f"layer %{{y}}, head %{{x}}<br>{one.title} %{{z:.3g}}"
    limit = max(one.limit, furthest)
    panel.matrix(matrix, limit=limit, middle=one.middle, hover=hover, scale="" if last else None)
    for update, count in ((panel.y, len(matrix)), (panel.x, matrix.shape[1])):
        update(dtick=1 if count < 9 else 8, showgrid=False)
    return True


def _draw(panel: Panel, frame: pd.DataFrame, one: LayerCurves) -> bool:
    """Draw curves over layers; tell whether there was anything to draw."""
    layers, drawn = frame[frame["head"].isna()], False
    for measure, (name, color) in {**one.curves, **one.dotted}.items():
        points = estimates_in(layers, measure)
        panel.curve(points, "layer", name=name, color=color, dash="solid" if measure in one.curves else "dot")
        drawn |= len(points) > 0
    panel.x(dtick=1 if layers["layer"].nunique() < 9 else 8)
    return drawn
