"""What is wrong with a drawn figure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from page_helpers import opened

from mdm_interp import viz
from mdm_interp.viz import theme
from mdm_interp.viz.theme import shown

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMED_PARTS = {"storage": "storage|V|O", "routing": "routing|Q|K"}
MEANINGS = {
    theme.FORWARD: "forward",
    theme.REVERSE: "reverse",
    **{color: shown(scheme) for scheme, color in theme.SCHEME_COLORS.items()},
    theme.VARIANT_COLORS["ARM rope"]: "ARM",
    **{color: NAMED_PARTS.get(part, part) for part, color in theme.PART_COLORS.items()},
    **dict.fromkeys(theme.SHADES, "layers?|heads?|initial|early|end|before|after|masked|half-way|written"),
}
"""Colours, and a word of what each may stand for. Others are no side, scheme or part of a model."""
OTHERS = {theme.CHANCE, *theme.COLORS}
TAKEN = "|".join([*map(shown, theme.SCHEME_COLORS), *NAMED_PARTS, "MLP", "(un)?embedding"])


def wrong_colors(figure: Any) -> Iterator[str]:
    """Traces whose colour stands for something else in this project."""
    for trace in figure.data:
        color = None if trace.type == "heatmap" else trace.line.color or trace.marker.color
        if not isinstance(color, str):
            continue  # it has a scale of its own
        places = [] if trace.customdata is None else [str(one[0]) for one in trace.customdata]
        told = f"{trace.name}, {', '.join(places)}"
        fits = (
            re.search(rf"\b({MEANINGS[color]})\b", told)
            if color in MEANINGS
            else color in OTHERS and not re.match(rf"({TAKEN})\b(?!, )", trace.name)
        )
        if not fits:
            yield f"{trace.name} in {color}"


def cuts_without_mark(figure: Any) -> list[str]:
    """Traces that leave their axes, or the scale of their colours, with nothing to show it."""
    found = []
    for trace in figure.data:
        if trace.type == "heatmap":
            values = np.array(trace.z, dtype=float)
            beyond = (values < trace.zmin - 1e-9) | (values > trace.zmax + 1e-9)
            found += [f"colours of {trace.xaxis}"] if beyond.any() else []
            continue
        for letter, other in ("xy", "yx"):
            axis = axis_of(figure, trace, letter)
            if axis.range is None or axis.type == "log" or any(isinstance(value, str) for value in trace[letter]):
                continue
            at, bars, (low, high) = np.array(trace[letter], dtype=float), trace[f"error_{letter}"], sorted(axis.range)
            above, below = (np.array(0.0 if bar is None else bar, dtype=float) for bar in (bars.array, bars.arrayminus))
            beyond = (at - below < low - 1e-9) | (at + above > high + 1e-9)
            marks = [zip(one[other], one[letter], strict=True) for one in arrows(figure, trace)]
            marked = {at for of_one in marks for at in of_one}
            places = zip(np.array(trace[other])[beyond], at[beyond], strict=True)
            unmarked = [place for place, value in places if (place, low if value < low else high) not in marked]
            found += [f"{trace.name} of {trace.xaxis}, {letter}"] if unmarked else []
    return found


def axis_of(figure: Any, trace: Any, letter: str) -> Any:
    """The axis on which a trace is drawn."""
    return figure.layout[f"{letter}axis{(trace[f'{letter}axis'] or letter)[1:]}"]


def arrows(figure: Any, trace: Any) -> list[Any]:
    """The triangles that mark where a trace goes on."""
    alike = [one for one in figure.data if (one.name, one.xaxis, one.yaxis) == (trace.name, trace.xaxis, trace.yaxis)]
    return list(filter(is_arrow, alike))


def is_arrow(trace: Any) -> bool:
    """Whether a trace marks where another goes on."""
    return trace.mode == "markers" and str(trace.marker.symbol).startswith("triangle")


def hidden_marks(figure: Any) -> list[str]:
    """Pairs of traces of one panel with marks of one shape within two pixels of each other: one hides the other. Clouds
    of dots may touch, and what leaves an axis at one place."""
    layout, panels, found = figure.layout, dict[Any, list[Any]](), []
    for trace in figure.data:
        if trace.type == "scatter" and trace.mode != "text":
            panels.setdefault((trace.xaxis, trace.yaxis), []).append(trace)
    for traces in panels.values():
        axes = {letter: axis_of(figure, traces[0], letter) for letter in "xy"}
        every = {letter: [trace[letter] for trace in traces] for letter in "xy"}
        lengths = {"x": layout.width - layout.margin.l - layout.margin.r}
        lengths["y"] = layout.height - layout.margin.t - layout.margin.b
        marked = [
            trace for trace in traces if "markers" in trace.mode and not (trace.marker.opacity or is_arrow(trace))
        ]
        at = [
            np.stack(
                [
                    places_of(trace[letter], axis, every[letter]) * lengths[letter] * np.ptp(axis.domain)
                    for letter, axis in axes.items()
                ],
                axis=-1,
            )
            for trace in marked
        ]
        for i, one in enumerate(marked):
            for other, its in zip(marked[:i], at, strict=False):
                apart = np.abs(at[i][:, None] - its[None]).max(-1)
                same = (one.marker.symbol or "circle") == (other.marker.symbol or "circle")
                if same and np.nanmin(apart, initial=np.inf) < 2:
                    found.append(f"{one.name} on {other.name} of {one.xaxis}")
    return found


def places_of(values: Any, axis: Any, every: Any) -> np.ndarray:
    """Where values are along an axis, in shares of its length."""
    if any(isinstance(value, str) for value in values):
        order = list(dict.fromkeys(value for trace in every for value in trace))
        at, (start, end) = np.array([order.index(value) for value in values], dtype=float), (-0.5, len(order) - 0.5)
    else:
        at, known = np.array(values, dtype=float), np.concatenate([np.array(trace, dtype=float) for trace in every])
        at, known = (np.log10(at), np.log10(known)) if axis.type == "log" else (at, known)
        start, end = axis.range or (np.nanmin(known), np.nanmax(known))
    return (at - start) / ((end - start) or 1)


def empty_panels(figure: Any) -> list[str]:
    """Panels in which no finite value is within the axes, and no words say why."""
    axes = [name for name in figure.layout.to_plotly_json() if name.startswith("yaxis")]
    seen = {trace.yaxis or "y" for trace in figure.data if is_visible(figure, trace)}
    return [name for name in axes if name.replace("axis", "") not in seen]


def is_visible(figure: Any, trace: Any) -> bool:
    """Whether any of a trace can be seen."""
    if trace.type == "heatmap":
        return bool(np.isfinite(np.array(trace.z, dtype=float)).any())
    if trace.mode == "text":
        return any(trace.text)
    within = [inside(axis_of(figure, trace, letter), trace[letter]) for letter in "xy"]
    return bool(np.logical_and(*within).any())


def inside(axis: Any, values: Any) -> np.ndarray:
    """Which values an axis shows."""
    if any(isinstance(value, str) for value in values):
        return np.ones(len(values), dtype=bool)
    at = np.array(values, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = np.log10(at) if axis.type == "log" else at
    low, high = sorted(axis.range) if axis.range else (-np.inf, np.inf)
    return np.isfinite(at) & (low - 1e-9 <= at) & (at <= high + 1e-9)


TEXTS = {
    "title": ".gtitle",
    "subtitle": ".gtitle-subtitle",
    "words": ".annotation-text, .textpoint text",
    "legend": ".legend",
    "axis title": "[class^='x'][class$='title'], [class^='y'][class$='title']",
    "tick": ".xtick text, .ytick text",
    "colour bar": ".colorbar",
}
READ = """texts => {
  const whole = document.querySelector('.main-svg').getBoundingClientRect(), found = [], wrong = [];
  for (const [kind, selector] of Object.entries(texts)) {
    for (const element of document.querySelectorAll(selector)) {
      if (kind !== 'colour bar' && element.closest('.colorbar')) continue;
      const box = element.getBoundingClientRect(), turned = /rotate\\((?!0|-?90|-?180)/.test(element.outerHTML);
      if (box.width && !turned) found.push([`${kind}: ${element.textContent}`, box]);
    }
  }
  for (const [i, [text, box]] of found.entries()) {
    if (box.left < whole.left - 1 || box.right > whole.right + 1) wrong.push(`${text} is cut off`);
    if (box.top < whole.top - 1 || box.bottom > whole.bottom + 1) wrong.push(`${text} is cut off`);
    for (const [other, its] of found.slice(0, i)) {
      const width = Math.min(box.right, its.right) - Math.max(box.left, its.left);
      const height = Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top);
      if (width > 1 && height > 3) wrong.push(`${text} lies on ${other}`);
    }
  }
  return wrong;
}"""
"""What is wrong with the texts of a figure. The box of a slanted text says nothing, and line heights are generous."""


def wrong_texts(browser: Browser, figure: Any, path: Path) -> list[str]:
    """Texts of a figure that lie on each other or are cut off, in a browser."""
    figure.write_html(path, include_plotlyjs=LIBRARY.as_uri())
    with opened(browser, path, viewport={"width": 1420, "height": 1000}) as (page, problems):
        page.wait_for_function(SETTLED, polling=300)
        return problems + page.evaluate(READ, TEXTS)


LIBRARY = Path(viz.__file__).parent / "assets" / "plotly-cartesian.min.js"
SETTLED = """() => {
  const drawn = document.querySelector('.main-svg'), before = window.before;
  window.before = drawn && drawn.outerHTML.length;
  return drawn && window.before === before;
}"""
