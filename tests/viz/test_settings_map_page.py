"""The map of settings: its numbers are those given, sliders and clicks go where they say, and names stay text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from page_helpers import HOSTILE, expect, middle_of, opened

from mdm_interp import viz
from mdm_interp.errors import UserError

if TYPE_CHECKING:
    from playwright.sync_api import Browser

QUANTITIES = {"reverse": "reverse probability", "odd": "odd share"}


def place(axis: str, setting: str, n_heads: int, reverse: float, **changes: Any) -> viz.Place:
    settings: dict[str, Any] = {
        "values": {"reverse": reverse, "odd": -reverse},
        "runs": [f"{setting} {n_heads} {seed}" for seed in (0, 1)],
        "curves": {"step": [1.0, 10.0, 100.0], "forward": [0.0, 0.5, 0.9], "reverse": [0.0, 0.2, reverse]},
    }
    return viz.Place(axis, setting, n_heads, **settings | changes)


PLACES = [
    place("", "base", 1, 0.9, inside="inside.html"),
    place("", "base", 4, 0.1),
    place("depth", "2 layers", 1, 0.7),
    place("depth", "3 layers", 1, float("nan")),
    place("depth", "3 layers", 4, 0.25),
    place(HOSTILE[0], HOSTILE[5], 4, 0.5),
]


def test_a_page_holds_the_numbers_of_every_place() -> None:
    page = viz.settings_map(PLACES, QUANTITIES, about="Answers.")
    columns = [(column["axis"], column["setting"]) for column in page.data["columns"]]
    assert columns == list(dict.fromkeys((one.axis, one.setting) for one in PLACES))
    assert page.data["heads"] == [1, 4] and len(page.data["cells"]) == len(PLACES)
    for one in PLACES:
        cell = page.data["cells"][f"{columns.index((one.axis, one.setting))},{[1, 4].index(one.n_heads)}"]
        expected = [None, None] if one.setting == "3 layers" and one.n_heads == 1 else list(one.values.values())
        assert cell["values"] == pytest.approx(expected) if expected[0] is not None else cell["values"] == expected
        assert cell["runs"] == one.runs and cell["curves"]["step"] == [1, 10, 100]


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([], "places: a map needs at least one"),
        ([PLACES[0], PLACES[0]], "places: 'base' with 1 head is there twice"),
        ([place("", "base", 1, 0.5, values={"reverse": 0.5})], "places: 'base' has no 'odd'; give every quantity"),
    ],
)
def test_what_is_no_map_is_refused(places: list[viz.Place], said: str) -> None:
    with pytest.raises(UserError, match=said):
        viz.settings_map(places, QUANTITIES, about="")


def test_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    viz.settings_map(PLACES, QUANTITIES, about=HOSTILE[0]).save(tmp_path / "page.html")
    for width in (1400, 700):
        with opened(browser, tmp_path / "page.html", viewport={"width": width, "height": 1000}) as (tab, problems):
            here, values = tab.locator("#here"), tab.locator("#values li")
            expect(here).to_have_text("base, 1 head")
            assert values.all_text_contents() == ["0.9000  reverse probability", "-0.9000  odd share"]
            assert tab.locator("#runs li").all_text_contents() == ["base 1 0", "base 1 1"]
            expect(tab.locator("#inside a")).to_have_attribute("href", "inside.html")
            tab.locator("#axis").select_option("depth")
            tab.locator("#setting").fill("2")
            expect(tab.locator("#setting-said")).to_have_text("3 layers")
            assert values.first.text_content() == "undefined  reverse probability"
            tab.locator("#heads").fill("1")
            expect(here).to_have_text("3 layers, 4 heads")
            assert values.first.text_content() == "0.2500  reverse probability"
            tab.locator("#setting").fill("1")
            expect(here).to_have_text("2 layers, 4 heads: not measured")
            expect(values).to_have_count(0)
            tab.locator("#map").scroll_into_view_if_needed()
            tab.mouse.click(*middle_of(tab, "#map", 3, 1))
            expect(here).to_have_text(f"{HOSTILE[5]}, 4 heads")
            expect(tab.locator("#axis")).to_have_value(HOSTILE[0])
            tab.locator("#quantity").select_option("1")
            label = tab.locator("#map").get_attribute("aria-label")
            assert label == "odd share by setting and number of heads"
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert problems == []
