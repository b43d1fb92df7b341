"""Settings map: trained models by setting and number of heads, to walk through, each with what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mdm_interp.errors import UserError
from mdm_interp.viz.pages.code import call, left_open, saving
from mdm_interp.viz.pages.page import Page, as_lists
from mdm_interp.viz.words import counted


@dataclass(frozen=True)
class Place:
    """One setting with one number of heads."""

    axis: str
    """The quantity that the setting changes."""
    setting: str
    n_heads: int
    values: Mapping[str, float]
    """What was measured, by name; NaN where it is undefined."""
    runs: Sequence[str]
    """The names of its runs."""
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Of the first run, at each `step`: `forward` and `reverse` probability."""
    inside: str | None = None
    """File beside the page that shows the first run from inside."""


def settings_map(places: Sequence[Place], quantities: Mapping[str, str], *, about: str) -> Page:
    """Return a map to walk through with sliders: one for the settings of each axis and one for the number of heads.

    Args:
        places: Settings of one axis follow each other; the axis `""` has what the others differ from.
        quantities: What the values are called, and what readers know it as; the first one is shown at first.
        about: What is seen, in words.

    Raises:
        UserError: there is no place, or one twice, or a place lacks a quantity.
    """
    if not places:
        raise UserError("places: a map needs at least one")
    rows = sorted({place.n_heads for place in places})
    columns = list(dict.fromkeys((place.axis, place.setting) for place in places))
    cells: dict[str, dict[str, Any]] = {}
    for place in places:
        at = f"{columns.index((place.axis, place.setting))},{rows.index(place.n_heads)}"
        if at in cells:
            heads = counted(place.n_heads, "head")
            raise UserError(f"places: {place.setting!r} with {heads} is there twice; leave one out")
        if missing := sorted(quantities.keys() - place.values.keys()):
            raise UserError(f"places: {place.setting!r} has no {missing[0]!r}; give every quantity, NaN if undefined")
        cells[at] = {
            "values": as_lists(torch.tensor([place.values[name] for name in quantities], dtype=torch.float64)),
            "runs": list(place.runs),
            "curves": {name: as_lists(torch.tensor(list(values))) for name, values in place.curves.items()},
            "inside": place.inside,
        }
    data = {
        "columns": [{"axis": axis, "setting": setting} for axis, setting in columns],
        "heads": rows,
        "quantities": list(quantities.values()),
        "cells": cells,
    }
    made = call("viz.settings_map", "places", "quantities", about=about)
    return Page(
        "settings_map", "Map of settings", about, ("plotly",), data, saving(made, left_open("places", "quantities"))
    )
