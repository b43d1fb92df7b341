"""Figures made of rows of panels.

    panels = Panels()
    left, right = panels.row(["before", "after"], x={"title": "distance"}, y={"title": "correlation"})
    left.curve(rows, "distance", "measured", name="measured", color=FORWARD)
    left.level(0.0, name="unrelated", color=CHANCE)
    panels.figure()

A row says how high it is and what its axes are. Where panels, legends and colour scales go, and how high the figure is,
follows from that and from what was drawn: a name is listed once, below the last row in which it occurs. All lengths
are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.tables import curve
from mdm_interp.viz.theme import DIVERGING, SEQUENTIAL, WIDTH, faded, legend_at

TRAINING_STEPS = {
    "title": "training step",
    "type": "log",
    "tickvals": [1, 10, 100, 1000, 10_000],
    "ticktext": ["1", "10", "100", "1k", "10k"],
}
"""An axis of training steps."""
PROBABILITY = {"range": [-0.03, 1.03]}
"""An axis of probabilities, or of shares."""
CORRELATION = {"range": [-1.05, 1.05]}
"""An axis of correlations, or of cosines."""

LEFT, RIGHT = 110, 40
"""Margins of a figure."""
LINE = 26
"""Height of a line of text."""
NARROW, WIDE = 26, 100
"""Gaps between the panels of a row, where they have one y axis and where each has its own."""
SCALE = 80
"""Width of a colour scale beside a panel."""
CHARACTER, MARK = 9.4, 62
"""Widths in a legend: of a character, and of the mark beside each name."""
GIVES_WAY = 0.25
"""Share of its length by which an axis grows at either end to hold an interval; one that is longer is cut."""
CUT = "triangles at an edge: the interval goes on beyond it"

LegendOf = Literal["figure", "column"]


class Panels:
    """A figure in the making."""

    def __init__(self) -> None:
        self._figure = go.Figure()
        self._rows: list[_Row] = []

    def row(
        self,
        titles: Sequence[str],
        *,
        x: Mapping[str, Any] | None = None,
        y: Mapping[str, Any] | None = None,
        height: int = 230,
        widths: Sequence[float | int] | None = None,
        one_y: bool = True,
        ticks: bool = True,
        ticks_height: int = LINE,
        warp: Callable[[Any], Any] | None = None,
        legend: LegendOf = "figure",
    ) -> list[Panel]:
        """Add a row of panels below the others, as many as it has titles.

        Args:
            titles: Of the panels; empty where a panel has none.
            x: The panels' x axis, in Plotly's words; `title` may be a text.
            y: The same of the y axis.
            height: Of a panel.
            widths: Of the panels, in relation to each other.
            one_y: Whether the panels share their y axis, which only the first then shows.
            ticks: Whether they show the x axis; otherwise it is that of the row below.
            ticks_height: Height of the labels of the x axis.
            warp: What bends the y axis, such as `np.arcsinh`. `range` and `tickvals` of `y` are given as on a straight
                one, and so are estimates.
            legend: Whether what is drawn is listed for the whole figure, or for each column by itself, below all its
                panels.
        """
        if warp is not None and y is not None:
            bent = {name: list(warp(np.array(y[name]))) for name in ("range", "tickvals") if name in y}
            y = {**y, **bent, "ticktext": [f"{value:g}" for value in y.get("tickvals", ())]}
        row = _Row(titles, height, widths or [1.0] * len(titles), one_y, ticks, ticks_height, legend)
        first = sum(len(other.panels) for other in self._rows) + 1
        for i, title in enumerate(titles):
            panel = Panel(self._figure, len(self._rows), i, str(first + i) if first + i > 1 else "", legend, warp)
            row.panels.append(panel)
            x_axis: dict[str, Any] = {"anchor": f"y{panel.axes}", **(x or {})}
            y_axis: dict[str, Any] = {"anchor": f"x{panel.axes}", **(y or {})}
            if not ticks:
                x_axis |= {"showticklabels": False, "title": None}
            if one_y and i:
                y_axis |= {"showticklabels": False, "title": None, "matches": f"y{row.panels[0].axes}"}
            panel.x(**x_axis)
            panel.y(**y_axis)
            if title:
                panel.note(title, 0.5, 1.0, yanchor="bottom")
        self._rows.append(row)
        return row.panels

    def figure(self, top: int = 60) -> go.Figure:
        """Put everything in its place.

        Args:
            top: Room above the panels: for their titles, and for that of the figure.
        """
        if not self._rows:
            return self._figure
        cut = [row for row in self._rows if row.fit()]
        for row in cut[-1:]:
            row.say_what_is_cut()
        legends = self._legends()
        axes = [row.axis_height() for row in self._rows]
        listed = [
            max([*map(row.scale_height, row.panels), *(one.shift + one.height for one in legends if one.row == i)])
            for i, row in enumerate(self._rows)
        ]
        below = [sum(parts) for parts in zip(axes, listed, strict=True)]
        above = [row.titles_height() if i else 0 for i, row in enumerate(self._rows)]
        total = sum(row.height for row in self._rows) + sum(above) + sum(below[:-1])
        start = 0
        for i, row in enumerate(self._rows):
            start += above[i]
            row.place(1 - (start + row.height) / total, 1 - start / total, total)
            start += row.height + below[i]
            for legend in legends:
                if legend.row == i:
                    legend.place(self._figure, 1 - (start - listed[i] + legend.shift) / total)
        top += max(0, self._rows[0].titles_height() - 20 - LINE)
        margin = {"l": LEFT, "r": RIGHT, "t": top, "b": below[-1] + 12}
        self._figure.update_layout(width=WIDTH, height=top + total + margin["b"], margin=margin)
        return self._figure

    def _legends(self) -> list[_Legend]:
        """Return one for every row and column below which something is listed."""
        last: dict[tuple[LegendOf, int, str], tuple[int, Any]] = {}
        for row in self._rows:
            for panel in row.panels:
                for name, trace in panel.listed.items():
                    key = (panel.legend, panel.column if panel.legend == "column" else 0, name)
                    if key not in last or last[key][0] < panel.row:
                        last[key] = (self._last_of_column(panel) if panel.legend == "column" else panel.row, trace)
        found: dict[tuple[int, int, LegendOf], _Legend] = {}
        for (of, column, name), (row, trace) in last.items():
            legend = found.setdefault((row, column, of), _Legend(len(found) + 1, row))
            if of == "column":
                legend.upright, legend.middle = True, self._rows[row].middle_of(column)
                legend.shift = self._rows[row].scale_height(self._rows[row].panels[column])
            legend.names.append(name)
            trace.update(legend=legend.key, showlegend=True)
        return list(found.values())

    def _last_of_column(self, panel: Panel) -> int:
        """Return the last row with a panel in its column."""
        rows = enumerate(self._rows)
        return max(i for i, row in rows if row.legend == "column" and len(row.panels) > panel.column)


@dataclass
class Panel:
    """One panel. Of all traces of a name, those in other panels included, a click on the legend hides all."""

    _figure: go.Figure
    row: int
    column: int
    axes: str
    """The number of its axes, as Plotly counts them."""
    legend: LegendOf
    warp: Callable[[Any], Any] | None = None
    """What bends its y axis."""
    listed: dict[str, Any] = field(default_factory=dict)
    """What a legend lists of it: the first trace of each name."""
    scale: Any = None
    """What has the colours of the scale beside the panel: a trace, or its marks."""

    def x(self, **axis: Any) -> None:
        """Update the x axis, in Plotly's words."""
        self._figure.update_layout({f"xaxis{self.axes}": axis})

    def y(self, **axis: Any) -> None:
        """Update the y axis, in Plotly's words."""
        self._figure.update_layout({f"yaxis{self.axes}": axis})

    def axis(self, letter: Literal["x", "y"]) -> Any:
        """Return an axis as it is."""
        return self._figure.layout[f"{letter}axis{self.axes}"]

    # ---- marks

    def curve(
        self,
        rows: pd.DataFrame,
        x: str,
        y: str | None = None,
        *,
        name: str,
        color: str,
        dash: str = "solid",
        listed: bool = True,
    ) -> None:
        """Draw means over seeds, with their intervals as a band.

        Args:
            rows: One for each seed and `x`.
            y: What is averaged; without it, rows are estimates with columns `value`, `low`, `high` and `n`.
            listed: Whether a legend names it.
        """
        points = _points(rows, x, y)
        if points.empty:
            return
        drawn = self._bent(points)
        known = drawn.dropna(subset=["low", "high"])  # a single observation has no interval
        if len(known):
            band = go.Scatter(
                x=np.concatenate([known[x].to_numpy(), known[x].to_numpy()[::-1]]),
                y=np.concatenate([known["high"].to_numpy(), known["low"].to_numpy()[::-1]]),
                mode="lines",
                line={"color": color, "width": 0},
                fill="toself",
                fillcolor=faded(color),
                hoverinfo="skip",
            )
            self.add(band, name, listed=False)
        line = go.Scatter(
            x=points[x],
            y=drawn["value"],
            mode="lines",
            line={"color": color, "width": 3, "dash": dash},
            customdata=points[["value", "low", "high", "n"]],
            hovertemplate=f"{name}<br>{x} %{{x}}: %{{customdata[0]:.3g}} [%{{customdata[1]:.3g}}, "
            "%{customdata[2]:.3g}], n = %{customdata[3]}<extra></extra>",
        )
        self.add(line, name, listed=listed)

    def points(
        self,
        rows: pd.DataFrame,
        x: str,
        y: str | None = None,
        *,
        name: str,
        color: str,
        dash: str = "solid",
        shift: float = 0.0,
        listed: bool = True,
    ) -> None:
        """Draw means over seeds at few places, with their intervals as bars.

        Args:
            rows: As of :meth:`curve`.
            y: As of :meth:`curve`.
            shift: How far right of `x` they are.
            listed: Whether a legend names it.
        """
        points = _points(rows, x, y)
        if points.empty:
            return
        drawn = self._bent(points)
        trace = go.Scatter(
            x=points[x] + shift,
            y=drawn["value"],
            mode="lines+markers",
            line={"color": color, "width": 2.5, "dash": dash},
            marker={"size": 8},
            error_y=_bars(drawn),
            customdata=[[text] for text in _told(points)],
            hovertemplate=f"{name}<br>%{{customdata[0]}}<extra></extra>",
        )
        self.add(trace, name, listed=listed)

    def estimates(
        self,
        estimates: Mapping[Any, Estimate],
        *,
        name: str,
        color: str,
        symbol: str = "circle",
        size: int = 9,
        upright: bool = False,
        shift: float | None = None,
        listed: bool = True,
    ) -> None:
        """Draw estimates by place, their intervals as bars: places one below the other, or side by side if `upright`.
        Those of nothing are left out.

        Args:
            shift: How far below its place each is (right of it, if `upright`), the next place being at 1.
            listed: Whether a legend names them.
        """
        measured = {place: estimate for place, estimate in estimates.items() if estimate.n}
        if not measured:
            return
        points = pd.DataFrame(list(map(asdict, measured.values())), index=list(measured))
        place_axis, value_axis = ("x", "y") if upright else ("y", "x")
        drawn = self._bent(points) if upright else points
        at: list[Any] = list(measured)
        if shift is not None:  # the axis counts places, and shows their names
            at = [i + shift for i, place in enumerate(estimates) if place in measured]
            ends = [-0.5, len(estimates) - 0.5]
            names = {"tickvals": list(range(len(estimates))), "ticktext": list(estimates)}
            (self.x if upright else self.y)(**names, range=ends if upright else ends[::-1])
        trace = go.Scatter(
            {place_axis: at, value_axis: drawn["value"], f"error_{value_axis}": _bars(drawn)},
            mode="markers",
            marker={"color": color, "symbol": symbol, "size": size, "line": {"color": color, "width": 2}},
            customdata=list(map(list, zip(measured, _told(points), strict=True))),
            hovertemplate=f"{name}, %{{customdata[0]}}: %{{customdata[1]}}<extra></extra>",
        )
        self.add(trace, name, listed=listed)

    def dots(
        self,
        rows: pd.DataFrame,
        x: str,
        y: str,
        *,
        name: str,
        label: Sequence[Any],
        scale: str | None = None,
        listed: bool = True,
        **marker: Any,
    ) -> None:
        """Draw a dot for every row.

        Args:
            label: What each dot is of; shown beside its two numbers.
            scale: Title of a scale of their colours beside the panel; without it there is none.
            listed: Whether a legend names it.
            marker: In Plotly's words: `color`, `size`, ….
        """
        if rows.empty:
            return
        trace = go.Scatter(
            x=rows[x],
            y=rows[y],
            mode="markers",
            marker={"size": 7, **marker},
            customdata=[[one] for one in label],
            hovertemplate=f"{name}, %{{customdata[0]}}<br>%{{x:.3g}}, %{{y:.3g}}<extra></extra>",
        )
        added = self.add(trace, name, listed=listed)
        if scale is not None:
            self.scale = added.marker.update(colorbar=_scale(scale))

    def level(
        self, level: float, *, name: str, color: str, x: Sequence[float | int] | None = None, listed: bool = True
    ) -> None:
        """Draw a dotted horizontal line.

        Args:
            x: From where to where; default: as far as what is drawn here reaches.
            listed: Whether a legend names it.
        """
        drawn = [value for trace in self.traces() for value in (() if trace.x is None else trace.x)]
        reach = drawn if x is None else list(x)
        if not reach:
            return
        trace = go.Scatter(
            x=[min(reach), max(reach)],
            y=[level, level],
            mode="lines",
            line={"color": color, "width": 2, "dash": "dot"},
            hovertemplate=f"{name} %{{y:.3g}}<extra></extra>",
        )
        self.add(trace, name, listed=listed)

    def matrix(
        self,
        table: pd.DataFrame,
        *,
        limit: float,
        middle: float = 0.0,
        colors: Any = DIVERGING,
        scale: str | None = None,
        hover: str = "%{y}, %{x}: %{z:.3g}",
        text: Any = None,
    ) -> None:
        """Draw a table as a heat map, first row on top: red below the middle, blue above.

        Args:
            limit: How far the colours reach to either side of the middle.
            scale: Title of a colour scale beside the panel; without it there is none.
            text: Of each cell.
        """
        trace = go.Heatmap(
            z=table.to_numpy(dtype=float),
            x=list(table.columns),
            y=list(table.index),
            zmin=middle - limit,
            zmax=middle + limit,
            colorscale=colors,
            showscale=scale is not None,
            text=text,
            texttemplate=None if text is None else "%{text}",
            textfont={"size": 14},
            hovertemplate=f"{hover}<extra></extra>",
        )
        added = self.add(trace)
        if scale is not None:
            self.scale = added.update(colorbar=_scale(scale))
        self.y(autorange="reversed")

    def probabilities(
        self,
        cells: pd.DataFrame,
        rows: tuple[str, Sequence[str]],
        columns: tuple[str, Sequence[str]],
        scale: str | None,
    ) -> None:
        """Draw a table of probabilities: white at 0, blue at 1, each with its interval if it is of several.

        Args:
            cells: The estimates, as in a summary's frame.
            rows: Their column that says in which row each is, and the rows in order.
            columns: The same of columns.
            scale: As of :meth:`matrix`.
        """
        (row, in_rows), (column, in_columns) = rows, columns
        bounds = cells[["low", "high"]].round(2) + 0.0  # no minus before a zero
        interval = bounds.apply(lambda cell: f"<br>{cell['low']:.2f}–{cell['high']:.2f}", axis=1)
        cells = cells.assign(text=cells["value"].map("{:.2f}".format) + interval.where(cells["n"] > 1, ""))
        values, texts = (
            cells.pivot(index=row, columns=column, values=of).reindex(index=list(in_rows), columns=list(in_columns))
            for of in ("value", "text")
        )
        self.matrix(values, limit=0.5, middle=0.5, colors=SEQUENTIAL, text=texts.fillna(""), scale=scale)

    def note(self, text: str, x: float, y: float, **words: Any) -> None:
        """Write words at a place of the panel, whose lower left corner is (0, 0) and upper right corner (1, 1)."""
        at: dict[str, Any] = {"xref": f"x{self.axes} domain", "yref": f"y{self.axes} domain", "showarrow": False}
        self._figure.add_annotation(text=text, x=x, y=y, **at, **words)

    def say(self, text: str) -> None:
        """Write words in place of a panel."""
        nothing = {"showticklabels": False, "showgrid": False, "showline": False, "ticks": ""}
        self.x(**nothing)
        self.y(**nothing)
        self.add(go.Scatter(x=[0.5], y=[0.5], mode="text", text=[text], hoverinfo="skip", cliponaxis=False))

    def add(self, trace: Any, name: str | None = None, *, listed: bool = True) -> Any:
        """Add any trace of Plotly's, and return it as the figure holds it.

        Args:
            name: What it is called; all of one name are switched together.
            listed: Whether a legend names it.
        """
        words: dict[str, Any] = {"xaxis": f"x{self.axes}", "yaxis": f"y{self.axes}"}
        words |= {"showlegend": False} if isinstance(trace, go.Scatter) else {}
        words |= {"name": name, "legendgroup": name} if name else {}
        self._figure.add_trace(trace.update(**words))
        added = self._figure.data[-1]
        if name and listed:
            self.listed.setdefault(name, added)
        return added

    def reach(self, letter: Literal["x", "y"]) -> tuple[np.ndarray, np.ndarray]:
        """Return where along an axis its values are, and where their intervals end."""
        nothing: np.ndarray = np.empty(0)
        values, ends = [nothing], [nothing]
        for trace in self.traces():
            (ends if trace.fill else values).append(at := _numbers(trace[letter]))
            ends += _ends(trace, letter, at)
        return np.concatenate(values), np.concatenate(ends)

    def cut(self, letter: Literal["x", "y"], low: float | int, high: float | int) -> bool:
        """End intervals at the ends of an axis, with a triangle on each that goes on; tell whether any does."""
        other, (down, up) = ("y", ("left", "right")) if letter == "x" else ("x", ("down", "up"))
        found = False
        for trace in self.traces():
            at, places, bars = _numbers(trace[letter]), np.array(trace[other]), trace[f"error_{letter}"]
            below, above = _ends(trace, letter, at) or (at, at)
            if bars.array is not None:
                bars.update(array=np.minimum(above, high) - at, arrayminus=at - np.maximum(below, low))
            for beyond, edge, points in ((below < low, low, down), (above > high, high, up)):
                if not beyond.any():
                    continue
                found = True
                color = trace.line.color or trace.marker.color
                marker = {"symbol": f"triangle-{points}", "size": 9, "color": color, "line": {"width": 0}}
                ends = {other: places[beyond], letter: np.full(beyond.sum(), edge)}
                arrows = go.Scatter(ends, mode="markers", marker=marker, hoverinfo="skip", cliponaxis=False)
                self.add(arrows, trace.name, listed=False)
        return found

    def _bent(self, points: pd.DataFrame) -> pd.DataFrame:
        """Return estimates as its y axis shows them."""
        if self.warp is None:
            return points
        return points.assign(**{name: self.warp(points[name]) for name in ("value", "low", "high")})

    def traces(self) -> list[Any]:
        """Return the lines and marks that it has."""
        return [trace for trace in self._figure.data if trace.xaxis == f"x{self.axes}" and trace.type == "scatter"]


def _points(rows: pd.DataFrame, x: str, y: str | None) -> pd.DataFrame:
    """Return the estimates at every x; none where nothing was measured."""
    if rows.empty:
        return rows
    points = rows if y is None else curve(rows.astype({y: float}), x, y)
    return pd.DataFrame(points[points["n"] > 0])


def _numbers(values: Any) -> np.ndarray:
    """Return coordinates on an axis of numbers; nothing is known of those on an axis of names."""
    named = any(isinstance(value, str) for value in values)
    return np.full(len(values), math.nan) if named else np.array(values, dtype=float)


def _ends(trace: Any, letter: str, at: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return where the bars of a trace begin and end, if it has any."""
    bars = trace[f"error_{letter}"]
    if bars.array is None:
        return ()
    return at - np.array(bars.arrayminus, dtype=float), at + np.array(bars.array, dtype=float)


def _told(points: pd.DataFrame) -> list[str]:
    """Say each estimate with its interval, which the axis may cut."""
    interval = points["low"].map(" [{:.3g}, ".format) + points["high"].map("{:.3g}]".format)
    return list(points["value"].map("{:.3g}".format) + interval.where(points["n"] > 1, ""))


def _scale(title: str) -> dict[str, Any]:
    return {"title": {"text": title}, "thickness": 14, "tickfont": {"size": 15}}


def _bars(points: pd.DataFrame) -> dict[str, Any]:
    """Return error bars from `low` to `high` around `value`."""
    above, below = points["high"] - points["value"], points["value"] - points["low"]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "width": 2, "thickness": 1.5}


# ---- where things go


@dataclass
class _Row:
    titles: Sequence[str]
    height: int
    widths: Sequence[float | int]
    one_y: bool
    ticks: bool
    ticks_height: int
    legend: LegendOf
    panels: list[Panel] = field(default_factory=list)
    says_what_is_cut: bool = False

    def fit(self) -> bool:
        """Let axes that have a range hold what is drawn, and those of one range keep one. An interval that would squash
        the rest is cut; tell whether any is."""
        cut = False
        letters: tuple[Literal["x", "y"], ...] = ("x", "y")
        for letter in letters:
            alike: dict[tuple[float, float], list[Panel]] = {}
            for panel in self.panels:
                axis = panel.axis(letter)
                if axis.range is not None and axis.type != "log":
                    alike.setdefault(axis.range, []).append(panel)
            for ends, panels in alike.items():
                low, high = self._wide_enough(letter, panels, *map(float, sorted(ends)))
                for panel in panels:
                    panel.axis(letter).range = (low, high) if ends[0] < ends[1] else (high, low)
                    cut |= panel.cut(letter, low, high)
        return cut

    def _wide_enough(
        self, letter: Literal["x", "y"], panels: Sequence[Panel], low: float, high: float
    ) -> tuple[float, float]:
        values, ends = (np.concatenate(parts) for parts in zip(*(panel.reach(letter) for panel in panels), strict=True))
        room, rim = GIVES_WAY * (high - low), 0.02 * (high - low)
        held = np.concatenate([values, ends[(ends >= low - room) & (ends <= high + room)]])
        lowest, highest = float(np.nanmin(held, initial=low)), float(np.nanmax(held, initial=high))
        return lowest - rim * (lowest < low), highest + rim * (highest > high)

    def say_what_is_cut(self) -> None:
        """Write below the axes what the triangles are."""
        below = self.axis_height()
        self.says_what_is_cut = True
        self.panels[0].note(CUT, 0.0, 0.0, xanchor="left", yanchor="top", yshift=-below)

    def titles_height(self) -> int:
        """Return the room above the panels."""
        lines = [1 + title.count("<br>") for title in self.titles if title]
        return 20 + LINE * max(lines, default=0)

    def axis_height(self) -> int:
        """Return the room below the panels that their axes take."""
        titles = [panel.axis("x").title.text or "" for panel in self.panels]
        shown = [LINE * (1 + title.count("<br>")) + 8 for title in titles if title]
        own = (self.ticks_height + 8 if self.ticks else 6) + max(shown, default=0)
        return own + LINE * self.says_what_is_cut

    def scale_height(self, panel: Panel) -> int:
        """Return the room below a panel's axis for its colour scale, which is there if columns have legends of their
        own."""
        return 3 * LINE if self.legend == "column" and panel.scale is not None else 0

    def domains(self) -> list[tuple[float, float]]:
        """Return where each panel begins and ends, as shares of the plot's width."""
        whole = WIDTH - LEFT - RIGHT
        beside = [SCALE if panel.scale is not None and self.legend == "figure" else 0 for panel in self.panels]
        gap = NARROW if self.one_y else WIDE
        room = whole - gap * (len(self.panels) - 1) - sum(beside)
        found, start = [], 0.0
        for width, scale in zip(self.widths, beside, strict=True):
            end = start + room * width / sum(self.widths)
            found.append((start / whole, min(end / whole, 1.0)))
            start = end + scale + gap
        return found

    def middle_of(self, column: int) -> float:
        return sum(self.domains()[column]) / 2

    def place(self, bottom: float, top: float, total: int) -> None:
        for panel, (left, right) in zip(self.panels, self.domains(), strict=True):
            panel.x(domain=[left, right])
            panel.y(domain=[bottom, top])
            if panel.scale is None:
                continue
            if self.legend == "figure":
                bar = {"x": right + 8 / WIDTH, "y": (bottom + top) / 2, "len": top - bottom, "yanchor": "middle"}
            else:
                below = bottom - (self.axis_height() + 6) / total
                bar = {"orientation": "h", "x": (left + right) / 2, "y": below, "yanchor": "top", "len": right - left}
                bar["xanchor"] = "center"
            panel.scale.update(colorbar=bar)


@dataclass
class _Legend:
    number: int
    row: int
    middle: float = 0.5
    upright: bool = False
    shift: int = 0
    """How far below the axes it begins."""
    names: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        return "legend" if self.number == 1 else f"legend{self.number}"

    @property
    def height(self) -> int:
        """How high it is, as far as that can be told."""
        width = sum(len(name) * CHARACTER + MARK for name in self.names)
        lines = len(self.names) if self.upright else math.ceil(width / (WIDTH - LEFT - RIGHT))
        return LINE * lines + 12

    def place(self, figure: go.Figure, top: float) -> None:
        upright = {"orientation": "v"} if self.upright else {}
        figure.update_layout({self.key: legend_at(self.middle, top) | upright})
