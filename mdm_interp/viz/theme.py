"""The look of every figure: colours that colour-blind readers can tell apart, type that survives half size."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

# What figures compare most has the colours of Okabe & Ito (2008), and others far from those, for colour-blind readers
# too. A colour means one thing in all figures; the last group means what a legend says.
FORWARD, REVERSE, CHANCE = "#0072B2", "#D55E00", "#666666"
"""Forward queries, reverse queries, and chance or nulls: these colours mean nothing else."""
ORANGE, GREEN, PURPLE, SKY, VIOLET, SAND, LIME = (
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#7B3FF2",
    "#C8A95A",
    "#5AC369",
)
"""Position schemes, and the ARM."""
SHADES = ("#D9AA90", "#C58F6A", "#AF6B45", "#8F5560")
"""Numbers of layers or heads, and moments: the more and the later, the darker."""
PART_COLORS = {
    "storage": "#00868B",
    "routing": "#D81B60",
    "MLP": "#6F86A8",
    "embedding": "#F28CB1",
    "unembedding": "#5FB7B0",
    "other": "#A8A878",
}
"""Parts of a model: storage is V and O, routing is Q and K."""
COLORS = OLIVE, GOLD, MAGENTA, INDIGO = "#7A8B00", "#B8A000", "#B03AB8", "#5566E0"
"""Whatever else a figure compares."""

SCHEME_COLORS = {
    "rope": VIOLET,
    "alibi": ORANGE,
    "none": GREEN,
    "learned": PURPLE,
    "t5_bias": SKY,
    "sinusoidal": LIME,
}
VARIANT_COLORS = {
    **{f"MDM {scheme}": SCHEME_COLORS[scheme] for scheme in ("rope", "alibi", "none", "learned")},
    "ARM rope": SAND,
}
SCHEME_NAMES = {"rope": "RoPE", "alibi": "ALiBi", "none": "NoPE", "t5_bias": "T5"}
"""What figures call position schemes whose names in configs are other ones."""
SEQUENTIAL = [[0.0, "#F7F7F7"], [1.0, "#2166AC"]]
"""Of shares."""
DIVERGING = [[0.0, "#B2182B"], [0.25, "#EF8A62"], [0.5, "#F7F7F7"], [0.75, "#67A9CF"], [1.0, "#2166AC"]]
"""Red for negative, blue for positive; distinct under red-green blindness."""

PAGE_COLORS = {
    "forward": FORWARD,
    "reverse": REVERSE,
    "share": "#4A1486",
    "positive": "#543F00",
    "negative": "#8E0152",
    "fact": "#1B9E4B",
    "even": "#222222",
    "odd": "#00848C",
}
"""What colours mean on interactive pages: a share of attention or a probability, numbers of either sign, what is asked
about or chosen, and the parts of a score."""
DARK_PAGE_COLORS = {
    "forward": "#6CB8F0",
    "reverse": "#FF9A4D",
    "share": "#B79CFF",
    "positive": "#E0B84C",
    "negative": "#FF8AC4",
    "fact": "#4FD083",
}
"""The same on dark ground, where they are not drawn: what is drawn is turned over."""

WIDTH, HEIGHT = 1400, 450
"""Of a figure that does not say. Titles are wrapped to what a narrow page shows of it without scrolling, 1100."""
NAME, DARK = "mdm_interp", "mdm_interp_dark"
"""Of the Plotly templates: the theme, and the same on dark ground."""


def _template(paper: str, ink: str, faint: str, line: str, grid: str, rim: float = 0) -> go.layout.Template:
    """Return everything of a figure's look that is not its data's colours. A `rim` shows marks whose colour is the
    paper's."""
    axis = {
        "showline": True,
        "linecolor": line,
        "tickcolor": line,
        "gridcolor": grid,
        "zeroline": False,
        "ticks": "outside",
        "automargin": True,
        "title": {"font": {"size": 18}, "standoff": 8},
        "tickfont": {"size": 16},
    }
    return go.layout.Template(
        data={"scatter": [{"marker": {"line": {"color": ink, "width": rim}}}]},
        layout={
            "font": {"family": "DejaVu Sans, Verdana, sans-serif", "size": 18, "color": ink},
            "colorway": list(COLORS),
            "paper_bgcolor": paper,
            "plot_bgcolor": paper,
            "xaxis": axis,
            "yaxis": axis,
            "margin": {"l": 90, "r": 40, "b": 100},
            "hoverlabel": {"font": {"size": 15}},
            "title": {"subtitle": {"font": {"color": faint}}},
        },
    )


pio.templates[NAME] = _template(paper="white", ink="#222222", faint="#444444", line="#444444", grid="#E4E4E4")
pio.templates[DARK] = _template(
    paper="#16181C", ink="#E8E8E8", faint="#BDBDBD", line="#9A9A9A", grid="#34373C", rim=0.5
)


def shown(label: str) -> str:
    """Return a label with its position scheme as figures call it: `MDM none` as `MDM NoPE`, `rope, 4 heads` as `RoPE, 4
    heads`. A scheme comes first, or after `MDM` or `ARM`."""
    return re.sub(
        r"^((?:MDM|ARM) )?(\w+)", lambda found: (found[1] or "") + SCHEME_NAMES.get(found[2], found[2]), label
    )


def title_height(takeaway: str, title: str = "") -> int:
    """Return the room, in pixels, that a title and this takeaway need above a figure's panels."""
    return 105 + 40 * (len(_title_lines(title)) - 1) + 24 * len(_lines(takeaway))


def titled(figure: go.Figure, title: str, takeaway: str) -> go.Figure:
    """Give a figure the theme, its title, and as subtitle what to take away."""
    layout: Any = figure.layout
    height = layout.height or HEIGHT
    figure.update_layout(
        template=NAME,
        width=WIDTH,
        height=height,
        margin={"t": max(layout.margin.t or 0, title_height(takeaway, title))},
        title={
            "text": f"<b>{'<br>'.join(_title_lines(title))}</b>",
            "subtitle": {"text": "<br>".join(_lines(takeaway)), "font": {"size": 17}},
            "x": 0.01,
            "xanchor": "left",
            "yref": "container",
            "y": 1 - (34 + 10 * (len(_title_lines(title)) - 1)) / height,
            "yanchor": "top",
            "font": {"size": 26},
        },
    )
    figure.update_annotations(font_size=19)  # panel titles
    return figure


def _title_lines(title: str) -> list[str]:
    return textwrap.wrap(title, 70) or [""]


def _lines(takeaway: str) -> list[str]:
    kept = takeaway.replace(" = ", "\u00a0=\u00a0")  # no line begins with the number of a sample
    return [line.replace("\u00a0", " ") for line in textwrap.wrap(kept, 125)]


def legend_at(x: float, y: float) -> dict[str, Any]:
    """Return a horizontal legend whose top centre is at (x, y) of the plotting area."""
    return {"orientation": "h", "xanchor": "center", "x": x, "yanchor": "top", "y": y, "font": {"size": 17}}


def faded(color: str, alpha: float = 0.2) -> str:
    """Return a hexadecimal colour with transparency, for bands."""
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
