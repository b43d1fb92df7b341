"""Figures of every layer and head: one row of panels per checkpoint and kind of reverse query.

Their frames have columns `checkpoint`, `kind`, `layer`, `head` (null: all heads of the layer) and, as
:func:`mdm_interp.stats.resampling.rows_at` names them, the measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from mdm_interp.stats.tables import estimates_in, where
from mdm_interp.viz.panels import Panel, Panels

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
    undefined: str = UNDEFINED
    """What is said where there is nothing to draw."""


def checkpoints_and_kinds(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Return every checkpoint with every kind of reverse query that it was asked, in the order of the rows."""
    return list(dict.fromkeys(zip(frame["checkpoint"], frame["kind"], strict=True)))


def draw_layers(frame: pd.DataFrame, shown: Sequence[HeadMap | LayerCurves]) -> Panels:
    """Draw every panel for every checkpoint and kind."""
    panels, places = Panels(), checkpoints_and_kinds(frame)
    for checkpoint, kind in places:
        first, last = (checkpoint, kind) == places[0], (checkpoint, kind) == places[-1]
        titles = [one.title if first else "" for one in shown]
        row = panels.row(titles, height=200, one_y=False, legend="column")
        of_place = where(frame, checkpoint=checkpoint, kind=kind).dropna(subset="layer")
        for panel, one in zip(row, shown, strict=True):
            axis = "head" if isinstance(one, HeadMap) else "layer"
            panel.x(title=axis if last else None)
            if not _draw(panel, of_place, one, scale=last):
                panel.say(one.undefined if isinstance(one, LayerCurves) else UNDEFINED)
        row[0].y(title=f"<b>{checkpoint}</b><br>{kind} reverse<br>layer")
    return panels


def _draw(panel: Panel, frame: pd.DataFrame, one: HeadMap | LayerCurves, scale: bool) -> bool:
    """Draw one panel; tell whether there was anything to draw."""
    if isinstance(one, HeadMap):
        heads = frame.dropna(subset="head")
        matrix = heads.pivot(index="layer", columns="head", values=one.measure).astype(float)
        if not matrix.notna().any(axis=None):
            return False
        hover = f"layer %{{y}}, head %{{x}}<br>{one.title} %{{z:.3g}}"
        panel.matrix(matrix, limit=one.limit, middle=one.middle, hover=hover, scale="" if scale else None)
        for update, count in ((panel.y, len(matrix)), (panel.x, matrix.shape[1])):
            update(dtick=1 if count < 9 else 8, showgrid=False)
        return True
    layers, drawn = frame[frame["head"].isna()], False
    for measure, (name, color) in {**one.curves, **one.dotted}.items():
        points = estimates_in(layers, measure)
        panel.curve(points, "layer", name=name, color=color, dash="solid" if measure in one.curves else "dot")
        drawn |= len(points) > 0
    return drawn
