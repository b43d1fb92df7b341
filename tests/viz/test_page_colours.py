"""A colour of the pages has one meaning, and stands out from what is behind it in light and in dark."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers import random_model
from model_helpers import mirrored_pairs
from page_helpers import opened
from test_panels import contrast

from mdm_interp import viz
from mdm_interp.viz.pages.page import Page
from mdm_interp.viz.theme import DARK_PAGE_COLORS, FORWARD, PAGE_COLORS, REVERSE

if TYPE_CHECKING:
    from playwright.sync_api import Browser

GROUNDS = [(PAGE_COLORS, "#FFFFFF"), (DARK_PAGE_COLORS, "#16181C")]


@pytest.mark.parametrize(("colors", "paper"), GROUNDS)
def test_colours_stand_out_from_the_paper(colors: dict[str, str], paper: str) -> None:
    for one, other in combinations(colors.values(), 2):
        assert one != other
    for name, color in colors.items():
        assert contrast(color, paper) >= (4.5 if name in ("positive", "negative") else 3), name
    assert contrast(PAGE_COLORS["fact"], PAGE_COLORS["share"]) >= 3, "a frame around a full share is seen"


def pages() -> dict[str, Page]:
    model, other = (random_model(mask_token_id=0, position="rope", seed=seed) for seed in (0, 1))
    pairs = mirrored_pairs(causal=False)
    return {
        "attention": viz.attention(model, pairs[0].forward),
        "denoising": viz.trajectory(model, pairs[0].forward),
        "routes": viz.routes(model, pairs[0]),
        "explorer": viz.explore({"one": model, "other": other}, pairs),
    }


USED = """() => [...document.querySelectorAll('.js-plotly-plot')].flatMap(({data, layout}) => [
  ...data.flatMap(({name, x, type, colorscale, marker, line}) => type === 'heatmap'
    ? colorscale.map(([, color]) => ['scale', color])
    : Array.isArray(marker?.color) ? marker.color.map((color, at) => [x[at], color])
    : [marker?.color, line?.color].filter(color => color).map(color => [name, color])),
  ...(layout.shapes ?? []).map(({line}) => ['frame', line.color]),
]).map(([what, color]) => [what, color.toUpperCase()])"""


@pytest.mark.parametrize("name", ["attention", "denoising", "routes", "explorer"])
def test_forward_and_reverse_have_their_colours_alone(name: str, tmp_path: Path, browser: Browser) -> None:
    with opened(browser, pages()[name].save(tmp_path / "page.html")) as (tab, problems):
        used: list[list[Any]] = tab.evaluate(USED)
        assert used or name == "attention"
        meant = {FORWARD: "forward", REVERSE: "reverse"}
        for what, color in used:
            assert meant.get(color, what) == what, (what, color)
        assert {color for what, color in used if what == "frame"} <= {PAGE_COLORS["fact"].upper(), "#5F5F5F", "#222222"}
        scales = {color for what, color in used if what == "scale"} - {"#FFFFFF"}
        assert scales <= {PAGE_COLORS[meaning].upper() for meaning in ("share", "positive", "negative")}
        assert problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_marks_have_the_colours_that_plots_have(scheme: Any, tmp_path: Path, browser: Browser) -> None:
    colors = {**PAGE_COLORS, **(DARK_PAGE_COLORS if scheme == "dark" else {})}
    with opened(browser, pages()["routes"].save(tmp_path / "page.html"), color_scheme=scheme) as (tab, problems):
        read = """([selector, side, pseudo]) => getComputedStyle(document.querySelector(selector), pseudo)[side]"""
        for selector, side, pseudo, meaning in [
            (".tokens li.source", "borderTopColor", None, "fact"),
            (".tokens li.answer", "borderTopColor", None, "fact"),
            (".forward", "borderTopColor", "::before", "forward"),
            (".reverse", "borderTopColor", "::before", "reverse"),
        ]:
            red, green, blue = (int(colors[meaning][at : at + 2], 16) for at in (1, 3, 5))
            assert tab.evaluate(read, [selector, side, pseudo]) == f"rgb({red}, {green}, {blue})", selector
        assert problems == []
