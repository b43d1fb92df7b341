"""What is wrong with a drawn figure."""

from __future__ import annotations

from typing import Any

import numpy as np


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
    return [one for one in alike if one.mode == "markers" and str(one.marker.symbol).startswith("triangle")]
