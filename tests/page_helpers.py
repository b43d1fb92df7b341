"""Opening interactive pages as a reader without a network does."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PATIENCE = 10_000
"""Milliseconds until a page that does not do what is waited for has failed."""

HOSTILE = ["<script>alert(1)</script>", "</div>", "\"'&amp;", "שלום", "🦊", "<b>", " x", "\n", "`${1}`", "%{x}"]
"""Texts of tokens that would break a page that took them for HTML, for a script or for a template."""


def expect(shown: Any) -> Any:
    """Do as playwright's `expect`, with patience. Nothing needs playwright to be imported, only to open a page."""
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE)
    return expect(shown)


@contextlib.contextmanager
def opened(browser: Browser, path: Path, **context: Any) -> Iterator[tuple[Page, list[str]]]:
    """A page with the network off, and what went wrong on it: errors, warnings, requests and dialogs."""
    settings = {"offline": True, "viewport": {"width": 1280, "height": 1000}, **context}
    window = browser.new_context(**settings)
    window.route(re.compile(r"^https?:"), lambda route: route.abort())
    page, problems = window.new_page(), []
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    # A page that is left breaks off what it was still loading: nothing is wrong with either.
    page.on(
        "requestfailed",
        lambda request: problems.append(request.url) if request.failure != "net::ERR_ABORTED" else None,
    )
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("dialog", lambda dialog: dialog.dismiss())
    page.goto(path.as_uri(), wait_until="load")
    page.wait_for_function("() => !document.querySelector('[aria-busy]')")
    yield page, problems
    window.close()


def point_of(tab: Page, place: str, at: int) -> tuple[float, float]:
    """Where a point of the first curve that Plotly drew is in the window."""
    point = tab.locator(f"{place} .point").nth(at)
    x, y = point.evaluate(
        """point => {
          point.scrollIntoView({block: 'center'});
          const box = point.getBoundingClientRect();
          return [box.x + box.width / 2, box.y + box.height / 2];
        }"""
    )
    return x, y


def middle_of(tab: Page, place: str, column: int, row: int) -> tuple[float, float]:
    """Where a cell of a heat map that Plotly drew is in the window."""
    x, y = tab.locator(place).evaluate(
        """(place, [column, row]) => {
          const {z} = place.data[0], box = place.querySelector('.heatmaplayer image').getBoundingClientRect();
          return [box.left + box.width * (column + 0.5) / z[0].length, box.top + box.height * (row + 0.5) / z.length];
        }""",
        [column, row],
    )
    return x, y
