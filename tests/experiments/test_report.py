"""The report and the pages of single figures: what is written, and what a browser without a network makes of it."""

from __future__ import annotations

import base64
import dataclasses
import os
import re
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlencode

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from filelock import FileLock
from page_helpers import HOSTILE, expect, opened, point_of
from plotly.offline import get_plotlyjs, get_plotlyjs_version
from report_helpers import QUESTION, SETTING, SUMMARY, TAKEAWAY, drawing, result, verdict

from mdm_interp.config import DemoConfig
from mdm_interp.experiments import report as module
from mdm_interp.experiments.analysis import CheckpointAnalysis, discover
from mdm_interp.experiments.exhibits import SCORE_OF_CLAIM, explorer_of
from mdm_interp.experiments.findings import NAMED_SETTINGS
from mdm_interp.experiments.report import write_report
from mdm_interp.experiments.results import CheckpointOrigin, Result, TrainedOrigin
from mdm_interp.experiments.runner import report
from mdm_interp.experiments.scope import SCOPE, scope_label
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.summary import Entry, Summary
from mdm_interp.viz.pages.page import SMALL_TRACES
from mdm_interp.viz.panels import PROBABILITY, TRAINING_STEPS, Panels
from mdm_interp.viz.theme import CHANCE, REVERSE, legend_at, title_height, titled

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FIGURES = Path(__file__).parents[2] / "figures"
NAMES = [analysis.name for analysis in discover()]
CHECKPOINTS = {analysis.name for analysis in discover() if isinstance(analysis, CheckpointAnalysis)}
NAMED = "w, any_order {}, 1 layer, 1 head of 64"
"""The name of a setting of `report_helpers`."""
VERDICTS = [verdict("1", "rope", "holds"), verdict("1", "alibi", "fails"), verdict("5", "rope", "fails")]


@pytest.fixture(autouse=True)
def no_pngs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a browser, which only the test of PNGs needs here."""

    def fail(figures: Any, files: list[Path], **_: Any) -> None:
        files[0].write_bytes(b"half an image")
        raise RuntimeError("Kaleido requires Google Chrome.\nInstall it, or run `plotly_get_chrome`.")

    if "slow" not in request.keywords:
        monkeypatch.setattr(pio, "write_images", fail)


def write(folder: Path, *drawn: tuple[Result, go.Figure], **more: Any) -> Path:
    """All pages of some figures, by default of one; returns the report's path."""
    write_report(drawn or ((result(), drawing()),), folder, **more)
    return folder / "index.html"


# ---- files


def test_without_a_browser_the_pages_are_written_and_one_line_says_why_there_are_no_pngs(tmp_path: Path) -> None:
    problem = write_report([(result(), drawing()), (result("other"), drawing())], tmp_path)
    assert problem == "no PNGs: Kaleido requires Google Chrome."
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.html",
        "other.html",
        "plotly-cartesian.min.js",
        "tiny.html",
    ]


def test_what_has_not_changed_is_not_written_again(tmp_path: Path) -> None:
    figures = [(result(), drawing()), (result("other"), drawing())]
    assert write_report(figures, tmp_path, changed=["other"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "other.html", "plotly-cartesian.min.js"]
    assert "tiny.html" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_a_browser_that_stops_answering_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(pio, "write_images", lambda *_, **__: answer.wait(60))
    monkeypatch.setattr(module, "FIRST", 0.05)
    monkeypatch.setattr(module, "EACH", 0.0)
    assert write_report([(result(), drawing())], tmp_path) == "no PNGs: the browser does not answer"
    answer.set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "plotly-cartesian.min.js", "tiny.html"]


def test_text_is_escaped_and_plotly_is_shared(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("tiny.html", "index.html"):
        page = (tmp_path / name).read_text(encoding="utf-8")
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert page.count('<link id="library" rel="library" href="plotly-cartesian.min.js">') == 1
        assert len(page) < 100_000, "a copy of plotly.js"
        assert "mdm-interp reproduce --only tiny --seeds 3" in page


def test_the_part_of_plotly_draws_what_is_said(tmp_path: Path, browser: Browser) -> None:
    with opened(browser, write(tmp_path)) as (page, problems):
        assert page.evaluate("Plotly.version") == get_plotlyjs_version(), "that of the Python package"
        assert set(page.evaluate("Object.keys(Plotly.PlotSchema.get().traces)")) == SMALL_TRACES
    assert problems == []


def test_a_figure_that_needs_all_of_plotly_gets_it(tmp_path: Path, browser: Browser) -> None:
    polar = titled(go.Figure(go.Scatterpolar(r=[1, 2], theta=[0, 90])), QUESTION, TAKEAWAY)
    index = write(tmp_path, (result(), drawing()), (result("polar"), polar))
    assert (tmp_path / "plotly.min.js").read_text(encoding="utf-8") == get_plotlyjs()
    for file, library in {"tiny": "plotly-cartesian", "polar": "plotly", "index": "plotly"}.items():
        assert f'href="{library}.min.js"' in (tmp_path / f"{file}.html").read_text(encoding="utf-8")
    for path in (index, tmp_path / "polar.html"):
        with opened(browser, path) as (page, problems):
            page.locator("#figure-polar").scroll_into_view_if_needed()
            page.locator("#figure-polar .polarsublayer").first.wait_for(state="attached")
        assert problems == []


def test_pages_are_the_same_every_time(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        write(folder, verdicts=VERDICTS)
    for name in ("tiny.html", "index.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report([(result(), drawing())], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report([(result(question="Changed?"), drawing("Changed?"))], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def trained_on(*runs: str) -> TrainedOrigin:
    return TrainedOrigin(kind="runs", runs=list(runs), first_seed=[{"seed": 0}])


GIVEN = CheckpointOrigin(
    checkpoint="LLaDA",
    model={"n_layers": 32, "n_heads": 16, "d_model": 4096},
    digest="d1",
    facts=7,
    pairs={"positional": 14, "relational": 12},
    skipped={"positional": 0, "relational": 2},
    reasons={"positional": [], "relational": ["row 3", "row 4"]},
    twin=None,
)


def text_of(page: Path) -> str:
    """What a page says, without its tags, scripts and styles."""
    text = re.sub(r"(?s)<(script|style)\b.*?</\1>", "", page.read_text(encoding="utf-8"))
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))


def test_a_figure_names_the_runs_behind_it_by_setting(tmp_path: Path) -> None:
    of_settings = [{**SETTING, "seed": seed, "run": run} for seed, run in enumerate(("aa", "bb"))]
    of_variants = [{"variant": "MDM none", "seed": 0, "run": "cc"}]
    first = result(origin=trained_on("aa", "bb", "dd"), rows=of_settings)
    second = result("other", origin=trained_on("cc", "aa"), rows=of_variants)
    index = write(tmp_path, (first, drawing()), (second, drawing()))
    for page in (index, tmp_path / "tiny.html"):
        said = text_of(page)
        assert "Its 3 runs mdm-interp explore DIGEST --out explorer.html shows those of any other" in said
        assert "w, any_order RoPE, 1 layer, 1 head of 64: aa bb dd" in said
    for page in (index, tmp_path / "other.html"):
        said = text_of(page)
        assert "Its 2 runs mdm-interp explore DIGEST --out explorer.html shows those of any other" in said
        assert "MDM none: cc aa" in said
    assert "2 analyses of 4 trained models with 3 seeds, 3 rows of measurements." in text_of(index)


HERE = {"torch": "2.13.0", "numpy": "2.2.0", "training": "n3w", "code": "c0de"}
MEASURED: dict[str, Any] = {
    "versions": {name: HERE[name] for name in ("torch", "numpy", "code")},
    "measured_with": {"training": HERE["training"], "cpu": "Three", "threads": 3},
}


def trained(n: int, *by: dict[str, Any]) -> dict[str, Any]:
    """Runs with one past: what tells each stretch of it from `HERE`, None being nothing known of it."""
    return {"runs": n, "by": [{**HERE, "cpu": "One", **one} if one else one for one in by]}


def test_a_figure_names_the_runs_that_other_code_or_versions_trained(tmp_path: Path) -> None:
    origin = trained_on(*(f"r{i}" for i in range(20)))
    same, another_cpu = {"threads": 1}, {"cpu": "Two"}
    alike = [trained(9, same), trained(1, another_cpu)]
    others = [
        trained(4, {"torch": "2.6.0"}),
        trained(1, {}),
        trained(2, same, {"torch": "2.6.0", "cpu": "Two"}),
        trained(3, {"training": "0ld", "numpy": "1.26.4"}),
    ]
    measured = result(**MEASURED, origin=origin, made_with=[*alike, *others])
    index = write(tmp_path, (measured, drawing()))
    for page in (index, tmp_path / "tiny.html"):
        assert (
            "10 of 20 runs were trained by other code or versions: 6 with torch 2.6.0 instead of 2.13.0; 3 with numpy "
            "1.26.4 instead of 2.2.0, training 0ld instead of n3w; 1 with unknown code and versions."
        ) in text_of(page)


def test_a_figure_says_nothing_of_what_trained_its_runs_where_all_agree(tmp_path: Path) -> None:
    agreeing = [trained(2, {"threads": 1}), trained(1, {"cpu": "Two"}, {"device": "GPU"})]
    measured = result(**MEASURED, origin=trained_on("aa", "bb", "cc"), made_with=agreeing)
    of_given_checkpoint = result(origin=GIVEN)
    for each in (measured, of_given_checkpoint):
        assert "trained by" not in text_of(write(tmp_path, (each, drawing())))


def test_a_figure_of_one_other_run_and_one_from_before_it_was_recorded(tmp_path: Path) -> None:
    origin = trained_on("aa", "bb")
    one = result(**MEASURED, origin=origin, made_with=[trained(1, {}), trained(1, {"cpu": "Two"})])
    said = text_of(write(tmp_path, (one, drawing())))
    assert "1 of 2 runs was trained by other code or versions: 1 with unknown code and versions." in said
    old = result(origin=origin)
    said = text_of(write(tmp_path, (old, drawing())))
    assert "2 of 2 runs were trained by other code or versions: 2 with unknown code and versions." in said


def test_a_figure_of_demo_checkpoints_names_them(tmp_path: Path, real_grid: None) -> None:
    configs = [DemoConfig(format="llada"), DemoConfig(format="qwen2")]
    one, two = (config.digest() for config in configs)
    dumped = [config.model_dump(mode="json") for config in configs]
    origin = TrainedOrigin(kind="demos", runs=[one, two, "cc"], first_seed=dumped)
    said = text_of(write(tmp_path, (result(origin=origin), drawing())))
    assert f"demo llada: {one} demo qwen2: {two} demo checkpoints of other seeds: cc" in said
    assert "runs show" not in said
    assert "Of checkpoints" in said


def test_a_figure_of_a_given_checkpoint_says_which_and_what_it_was_asked(tmp_path: Path) -> None:
    twin = GIVEN.model_copy(update={"checkpoint": "LLaMA", "digest": "d2"})
    said = text_of(write(tmp_path, (result(origin=GIVEN.model_copy(update={"twin": twin})), drawing())))
    asked = "asked about 7 facts (positional: 14 pairs, 0 skipped; relational: 12 pairs, 2 skipped)."
    assert f"Checkpoint LLaDA: 32 layers of 16 heads, width 4096, digest d1; {asked}" in said
    assert f"Its twin LLaMA: 32 layers of 16 heads, width 4096, digest d2; {asked}" in said
    assert "mdm-interp probe CHECKPOINT --facts FACTS.csv --twin TWIN --only tiny --out DIR" in said
    assert "1 analysis of the checkpoint LLaDA, 1 row of measurements" in said


def test_the_report_links_the_interactive_pages_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "attention.html").write_text("")
    pages = {"attention.html": "Attention <of> a model", "gone.html": "Not written"}
    page = write(tmp_path, pages=pages).read_text(encoding="utf-8")
    assert '<a href="attention.html">Attention &lt;of&gt; a model</a>' in page
    assert "gone.html" not in page
    assert "Look inside" not in write(tmp_path).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def figures(shared_folder: Path) -> Path:
    """A folder of the committed results and of what is drawn of them, in one of the session's processes."""
    folder = shared_folder / "figures"
    with FileLock(shared_folder / "figures.lock"), pytest.MonkeyPatch.context() as patch:
        if not (folder / "index.html").exists():
            folder.mkdir()
            for name in NAMES:
                shutil.copy(FIGURES / f"{name}.json", folder)
            patch.setattr(pio, "write_images", None)  # to save the time
            assert report(folder).figures == NAMES
    return folder


@pytest.mark.slow
def test_the_report_is_of_every_committed_result(figures: Path) -> None:
    written = {path.name for path in figures.iterdir()}
    assert written == {*(f"{name}.{kind}" for name in NAMES for kind in ("json", "html")), *OF_ALL}
    for name in NAMES:
        assert (figures / f"{name}.json").read_bytes() == (FIGURES / f"{name}.json").read_bytes()


OF_ALL = ("index.html", "claims.json", "plotly-cartesian.min.js")


@pytest.mark.parametrize("name", NAMES)
def test_the_pages_share_one_plotly(name: str, figures: Path) -> None:
    for page in (f"{name}.html", "index.html"):
        text = (figures / page).read_text(encoding="utf-8")
        assert text.count('<link id="library" rel="library" href="plotly-cartesian.min.js">') == 1
        assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", text), "something comes from the network"
        assert "Copyright 2012" not in text, "a copy of plotly.js"
        for link in re.findall(r'href="([^"#]+)"', text):
            assert (figures / link).exists(), f"{page} links to {link}"
    assert f'<section id="{name}">' in text


# ---- in a browser: the figures


class Box(NamedTuple):
    """Where a piece of text is on the page, in pixels."""

    kind: str
    text: str
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return width > 1 and height > 1

    def is_inside(self, other: Box) -> bool:
        horizontally = other.left - 1 <= self.left and self.right <= other.right + 1
        return horizontally and other.top - 1 <= self.top and self.bottom <= other.bottom + 1


class Shown(NamedTuple):
    """What a browser made of a page."""

    problems: list[str]
    title: str
    plots: list[list[Box]]
    """Per plot: its own box first, then its texts and legends."""
    traces: list[int]
    """Per plot: how many curves and matrices are drawn."""
    expected: list[int]
    """Per plot: how many its data asks for."""


TEXTS = {
    "title": ".gtitle",
    "subtitle": ".gtitle-subtitle",
    "panel title": ".annotation-text",
    "legend": ".legend",
    "x title": "[class^='x'][class$='title']",
    "y title": "[class^='y'][class$='title']",
    "colour bar": ".colorbar",
}

READ = """([plot, texts]) => {
  const box = (kind, element) => {
    const {left, top, right, bottom} = element.getBoundingClientRect();
    return [kind, element.textContent, left, top, right, bottom];
  };
  const found = Object.entries(texts).flatMap(
    ([kind, selector]) => [...plot.querySelectorAll(selector)]
      .filter(element => kind === 'colour bar' || !element.closest('.colorbar'))
      .map(element => box(kind, element)));
  return {
    boxes: [box('plot', plot.querySelector('.main-svg') || plot), ...found],
    traces: plot.querySelectorAll('.scatterlayer .trace, .heatmaplayer .hm').length,
    expected: (plot.data || []).length,
  };
}"""

SETTLED = f"""given => {{
  const before = window.before;
  window.before = JSON.stringify(({READ})(given));
  return window.before === before;
}}"""
"""Plotly places automatic margins after its first drawing."""


def read(page: Page, plot: Any, texts: dict[str, str] = TEXTS) -> dict[str, Any]:
    """What is drawn in a plot, once it is settled."""
    page.wait_for_function(SETTLED, arg=[plot, texts], polling=300)
    return page.evaluate(READ, [plot, texts])


@pytest.fixture
def show(browser: Browser) -> Iterator[Callable[[Path], Shown]]:
    """Opens a page with the network off, goes past all its plots and waits until they are drawn."""

    def open_page(path: Path) -> Shown:
        with opened(browser, path, viewport={"width": 1500, "height": 1200}) as (page, problems):
            plots = [read(page, plot) for plot in go_past_all(page)]
            boxes = [[Box(*box) for box in plot["boxes"]] for plot in plots]
            return Shown(problems, page.title(), boxes, *([p[key] for p in plots] for key in ("traces", "expected")))

    yield open_page


def go_past_all(page: Page) -> Iterator[Any]:
    """Scrolls to each plot and gives it when it is drawn."""
    page.evaluate("document.querySelectorAll('details.more').forEach(folded => { folded.open = true; })")
    for plot in page.locator(".plot").element_handles():
        plot.scroll_into_view_if_needed()
        page.wait_for_function("plot => !window.Plotly || plot.querySelector('.main-svg')", arg=plot)
        yield plot


def assert_shown(shown: Shown, n_plots: int) -> None:
    assert shown.problems == []
    assert len(shown.plots) == n_plots
    for (plot, *_), traces, expected in zip(shown.plots, shown.traces, shown.expected, strict=True):
        assert plot.right - plot.left > 500
        assert plot.bottom - plot.top > 300
        assert traces == expected > 0


def test_a_browser_shows_what_was_written(tmp_path: Path, show: Callable[[Path], Shown]) -> None:
    index = write(tmp_path, (result(), drawing()), (result("other", "Other?"), drawing("Other?")))
    alone = show(tmp_path / "tiny.html")
    assert_shown(alone, n_plots=1)
    assert alone.title == QUESTION
    assert_shown(show(index), n_plots=2)


def test_the_browser_check_sees_a_page_that_does_not_work(tmp_path: Path, show: Callable[[Path], Shown]) -> None:
    write(tmp_path)
    (tmp_path / "plotly-cartesian.min.js").unlink()
    assert any("plotly-cartesian.min.js" in problem for problem in show(tmp_path / "tiny.html").problems)
    with pytest.raises(AssertionError):
        assert_shown(show(tmp_path / "tiny.html"), n_plots=1)


def collisions(boxes: list[Box]) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other."""
    visible = [box for box in boxes if box.right - box.left > 0 and box.bottom - box.top > 0]
    return [
        (f"{one.kind}: {one.text}", f"{other.kind}: {other.text}")
        for one, other in combinations(visible, 2)
        if one.overlaps(other)
    ]


def test_the_overlap_check_sees_a_legend_on_an_axis_title(tmp_path: Path, show: Callable[[Path], Shown]) -> None:
    write(tmp_path, (result(), drawing().update_layout(legend=legend_at(0.2, -0.08))))
    (plot,) = show(tmp_path / "tiny.html").plots
    assert [tuple(sorted(kind.partition(":")[0] for kind in pair)) for pair in collisions(plot[1:])] == [
        ("legend", "x title")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_figure_of_the_committed_result_is_readable(
    name: str, figures: Path, show: Callable[[Path], Shown]
) -> None:
    shown = show(figures / f"{name}.html")
    assert_shown(shown, n_plots=1)
    (plot, *texts) = shown.plots[0]
    kinds = {"title", "subtitle", "panel title", "x title"}
    if name not in CHECKPOINTS:  # those name their quantities above the panels, and colours beside bars
        kinds |= {"y title"}
    if name == "signatures":  # its panels share their rows, and are named below
        kinds -= {"panel title"}
    found = {text.kind for text in texts}
    assert kinds <= found
    assert name in CHECKPOINTS or found & {"legend", "colour bar"}, "nothing says what its colours mean"
    assert collisions(texts) == []
    visible = [text for text in texts if text.right > text.left]
    assert [text for text in visible if not text.is_inside(plot)] == [], "cut off at the edge"


def test_the_report_shows_every_figure(figures: Path, show: Callable[[Path], Shown]) -> None:
    assert_shown(show(figures / "index.html"), n_plots=len(NAMES))


DRAWN = "[...document.querySelectorAll('.plot')].map(plot => Boolean(plot.querySelector('.main-svg')))"


def test_a_figure_is_drawn_when_it_comes_near(tmp_path: Path, browser: Browser) -> None:
    index = write(tmp_path, *((result(f"tiny{i}"), drawing()) for i in range(5)))
    with opened(browser, index) as (page, problems):
        page.wait_for_function(f"{DRAWN}[0]")
        page.wait_for_timeout(300)
        assert not page.evaluate(DRAWN)[-1]
        place = page.locator("#tiny4 .drawing").bounding_box()
        page.locator("#tiny4").scroll_into_view_if_needed()
        page.wait_for_function("document.querySelector('#tiny4 .main-svg')")
        after = page.locator("#tiny4 .drawing").bounding_box()
        assert place and after and (place["width"], place["height"]) == (after["width"], after["height"])
        assert problems == []


N_NODES, PAGE_HEIGHT = "document.querySelectorAll('*').length", "document.documentElement.scrollHeight"


def test_figures_that_are_far_away_are_cleared_and_come_back_as_they_were(tmp_path: Path, browser: Browser) -> None:
    names = [f"tiny{i}" for i in range(16)]
    (tmp_path / f"{names[0]}.png").write_bytes(base64.b64decode(PIXEL))
    index = write(tmp_path, *((result(name), drawing()) for name in names))
    with opened(browser, index) as (page, problems):
        first, place = page.locator(f"#{names[0]} .plot"), page.locator(f"#{names[0]} .drawing")
        first.locator(".main-svg").first.wait_for()
        page.locator(".curves summary").first.click()
        page.get_by_role("checkbox", name="forward").first.uncheck()
        first.evaluate("plot => Plotly.relayout(plot, {'yaxis.range': [0, 0.5]})")
        look = "plot => [plot.data.map(({visible}) => visible ?? true), plot.layout.yaxis.range]"
        changed, size, most = first.evaluate(look), place.bounding_box(), page.evaluate(N_NODES)
        described = first.locator("[role=img]").get_attribute("aria-label")
        for plot in go_past_all(page):
            assert plot.query_selector(".main-svg")
            most = max(most, page.evaluate(N_NODES))
        height = page.evaluate(PAGE_HEIGHT)
        per_figure = page.locator(f"#{names[-1]} .plot *").count()
        bare = page.evaluate("document.querySelectorAll('body > *, main *:not(.plot *)').length")
        assert most < bare + 8 * per_figure, "half of the figures at once, at most"
        assert not first.locator(".main-svg").count() and first.locator(".still").count() == 1
        assert first.get_attribute("aria-label") == described
        first.scroll_into_view_if_needed()
        first.locator(".main-svg").first.wait_for()
        assert first.evaluate(look) == changed
        assert page.evaluate(PAGE_HEIGHT) == height, "nothing jumps"
        assert not page.get_by_role("checkbox", name="forward").first.is_checked()
        assert page.locator(".curves").first.get_by_role("checkbox").count() == 2
        page.get_by_role("checkbox", name="forward").first.check()
        assert first.evaluate("plot => plot.data.every(({visible}) => visible ?? true)")
        end = place.bounding_box()
        assert size and end and (size["width"], size["height"]) == (end["width"], end["height"])
        page.emulate_media(media="print")
        page.wait_for_function(f"{DRAWN}.every(Boolean)")
        page.emulate_media(media="screen")
        page.wait_for_function(f"{DRAWN}.filter(Boolean).length < 8")
        assert problems == []


def test_a_figure_that_details_another_is_folded_below_it_until_it_is_asked_for(
    tmp_path: Path, browser: Browser
) -> None:
    figures = [(result(name), drawing()) for name in ("main", "detail", "alone")]
    index = write(tmp_path, *figures, details={"main": "", "detail": "main", "alone": "gone"})
    with opened(browser, index) as (page, problems):
        contents = page.get_by_role("navigation", name="Figures by question")
        assert contents.locator("ol > li > a").count() == 2 and contents.locator("ul a").count() == 1
        folded, drawn = page.locator("#main > details.more"), page.locator("#detail .main-svg").first
        assert folded.count() == page.locator("details.more").count() == 1
        assert not drawn.is_visible()
        folded.locator("summary").first.click()
        drawn.wait_for()
        folded.locator("summary").first.click()
        contents.locator("ul a").click()
        drawn.wait_for()
        expect(page.locator("#detail")).to_be_in_viewport()
        page.goto("about:blank")
        page.goto(f"{index.as_uri()}#detail")
        expect(page.locator("#detail .plot")).to_be_in_viewport()
        assert problems == []


HOVER = ".hoverlayer .hovertext"


@pytest.mark.parametrize("width", [700, 1000, 1500])
def test_hovering_finds_the_point_under_the_pointer_at_every_size(tmp_path: Path, browser: Browser, width: int) -> None:
    write(tmp_path, (result(), go.Figure(go.Scatter(x=[0, 1, 2], y=[3, 1, 2], mode="markers"))))
    with opened(browser, tmp_path / "tiny.html", viewport={"width": width, "height": 900}) as (page, _):
        for i, point in enumerate(page.locator(".points path").all()[:2]):  # what is further right may need scrolling
            box = point.bounding_box()
            assert box
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            expect(page.locator(HOVER)).to_have_text(re.compile(rf"^\D*{i}\D*{[3, 1, 2][i]}\D*$"))


def test_a_figure_looks_alike_whatever_its_window_and_paper_were_before(tmp_path: Path, browser: Browser) -> None:
    write(tmp_path)

    def looks(page: Page) -> tuple[list[Any], bytes]:
        drawn = read(page, page.query_selector(".plot"), {**TEXTS, "tick label": ".xtick, .ytick"})
        return drawn["boxes"], page.locator(".plot").screenshot()

    fresh = {}
    for width in (1400, 700):
        with opened(browser, tmp_path / "tiny.html", viewport={"width": width, "height": 900}) as (page, _):
            page.locator(".plot .main-svg").first.wait_for()
            fresh[width] = looks(page)
            assert {"tick label", "x title", "legend"} <= {kind for kind, *_ in fresh[width][0]}
    with opened(browser, tmp_path / "tiny.html", viewport={"width": 1400, "height": 900}) as (page, problems):
        page.locator(".plot .main-svg").first.wait_for()
        for width in (900, 700, 1400):
            page.set_viewport_size({"width": width, "height": 900})
            assert width not in fresh or looks(page) == fresh[width]
        page.emulate_media(media="print")
        page.wait_for_function(f"({FITS})().every(Boolean)")
        page.emulate_media(media="screen")
        assert looks(page) == fresh[1400]
        assert problems == []


# ---- in a browser: the ledger


def shown_schemes(page: Page) -> list[str]:
    return [row.locator("td").nth(1).inner_text() for row in page.locator("#ledger tbody tr:visible").all()]


def test_the_ledger_filters(tmp_path: Path, browser: Browser) -> None:
    verdicts = [verdict("1", "rope", "holds", measure="<b>measure</b>"), *VERDICTS[1:]]
    with opened(browser, write(tmp_path, verdicts=verdicts)) as (page, problems):
        assert shown_schemes(page) == ["RoPE", "ALiBi", "RoPE"]
        assert page.get_by_role("status").inner_text() == "3 of 3 verdicts"
        page.get_by_label("verdict").select_option("fails")
        assert shown_schemes(page) == ["ALiBi", "RoPE"]
        page.get_by_label("scheme").select_option("RoPE")
        assert shown_schemes(page) == ["RoPE"]
        assert page.get_by_role("status").inner_text() == "1 of 3 verdicts: scheme RoPE, verdict fails"
        page.get_by_label("verdict").select_option("all")
        assert shown_schemes(page) == ["RoPE", "RoPE"]
        page.get_by_role("button", name="Show all").click()
        expect(page.get_by_role("status")).to_have_text("3 of 3 verdicts")
        assert shown_schemes(page) == ["RoPE", "ALiBi", "RoPE"]
        assert "<b>measure</b>" in page.locator("#ledger tbody tr").first.inner_text(), "text is escaped"
        links = {link.get_attribute("href") for link in page.locator("#ledger tbody tr").first.locator("a").all()}
        assert links == {f"tiny.html#{urlencode({'setting': NAMED.format('RoPE')})}", "tiny.json"}
        assert problems == []


def test_the_ledger_sorts_searches_and_keeps_both_in_its_address(tmp_path: Path, browser: Browser) -> None:
    effects = {"learned": 0.5, "sinusoidal": -2.0, "own": 10.0}
    verdicts = [
        dataclasses.replace(verdict("1", scheme, "holds", measure=f"of {scheme}"), effect=Estimate(value, 0.0, 1.0, 5))
        for scheme, value in effects.items()
    ]
    index = write(tmp_path, verdicts=verdicts)
    with opened(browser, index) as (page, problems):
        header = page.locator("#ledger thead").get_by_role("button", name="effect")
        orders = {"ascending": ["sinusoidal", "learned", "own"], "descending": ["own", "learned", "sinusoidal"]}
        orders |= {"none": [*effects]}
        for direction, schemes in orders.items():
            header.click()
            assert shown_schemes(page) == schemes, "by number, not by text"
            assert header.locator("xpath=..").get_attribute("aria-sort") == direction
        header.click()
        page.get_by_label("search").fill("OF LE")
        assert shown_schemes(page) == ["learned"]
        assert page.get_by_role("status").inner_text() == "1 of 3 verdicts: “OF LE”"
        address = page.url
        assert address.endswith("#words=OF+LE&sort=effect")
        page.get_by_role("button", name="Show all").click()
        expect(page.get_by_role("status")).to_have_text("3 of 3 verdicts")
        assert shown_schemes(page) == [*effects]
        page.goto("about:blank")
        page.goto(address.replace("OF+LE", "of"))
        assert shown_schemes(page) == orders["ascending"]
        assert problems == []


def test_a_long_ledger_shows_its_first_lines_and_the_rest_when_asked(tmp_path: Path, browser: Browser) -> None:
    verdicts = [verdict("5", f"scheme{i}", "fails") for i in range(130)]
    with opened(browser, write(tmp_path, verdicts=verdicts)) as (page, problems):
        rows = page.locator("#ledger tbody tr")
        assert rows.count() == 100
        page.get_by_role("button", name="Show 30 more").click()
        assert rows.count() == 130
        assert not page.locator("#more").is_visible()
        assert problems == []


def test_a_verdict_leads_to_the_heads_that_it_is_about_and_these_lead_back(tmp_path: Path, browser: Browser) -> None:
    rope = {"initial": ("2", 0), "early": ("5", 47), "end": ("0", 400), "over training": ("9", None)}
    lines = [
        dataclasses.replace(line, scope={**line.scope, "stage": stage})
        for stage, (claim, _) in rope.items()
        for line in (verdict(claim, "rope", "fails"), verdict(claim, "learned", "fails"))
    ]
    for digest in ("rope10", "elsewhere"):
        (tmp_path / explorer_of(digest)).write_text(f"<title>{digest}</title>")
    with opened(browser, write(tmp_path, of_settings(tmp_path), verdicts=lines)) as (page, problems):
        links = page.locator("#ledger").get_by_role("link", name="heads").all()
        expected = [
            {"score": SCORE_OF_CLAIM[claim]} | ({} if step is None else {"step": step}) for claim, step in rope.values()
        ]
        assert [link.get_attribute("href") for link in links] == [
            f"explore_rope10.html#{urlencode(named)}" for named in expected
        ]
        page.get_by_label("stage").select_option("early")
        page.locator("#ledger").get_by_role("link", name="heads").click()
        page.wait_for_url("**/explore_rope10.html#*")
        back = {"back": "index.html#stage=early"}
        assert page.url.partition("#")[2] == urlencode({**expected[1], **back})
        assert problems == []


# ---- in a browser: from figures to heads

RUNS = {"".join(map(str, of)): of for of in product(("rope", "alibi"), (1, 4), (0, 1))}
"""Scheme, heads and seed, by digest."""


def of_settings(folder: Path) -> tuple[Result, go.Figure]:
    """A figure of four settings, two of which have an explorer in the folder: one panel for each number of heads, with
    a point for each scheme, and a matrix with a row for each setting."""
    rows = [
        {**SETTING, "scheme": scheme, "n_heads": n_heads, "seed": seed, "run": run, "stage": stage, "step": step + seed}
        for run, (scheme, n_heads, seed) in RUNS.items()
        for stage, step in {"initial": 0, "early": 47, "end": 400}.items()
    ]
    made, of = Panels(), {"RoPE<br>n = 2": Estimate(0.3, 0.2, 0.4, 2), "ALiBi<br>n = 2": Estimate(0.7, 0.6, 0.8, 2)}
    for panel in made.row(["w, 1 head (n = 2)", "w, 4 heads (n = 2)"], y=PROBABILITY):
        panel.estimates(of, name="reverse query", color=REVERSE, shift=0.1, size=20, upright=True)
        panel.level(0.1, name="chance", color=CHANCE, x=[0, 1])
    names = list(dict.fromkeys(scope_label({column: row[column] for column in SCOPE}) for row in rows))
    (matrix,) = made.row(["half-way"])
    matrix.matrix(pd.DataFrame([[0.0]] * len(names), index=names, columns=["measure"]), limit=1.0)
    for run in ("rope10", "alibi41"):
        (folder / explorer_of(run)).write_text(f"<title>{run}</title>")
    return result(rows=rows, origin=trained_on(*RUNS)), titled(made.figure(title_height(TAKEAWAY)), QUESTION, TAKEAWAY)


def test_a_point_leads_to_the_heads_of_a_run_behind_it(tmp_path: Path, browser: Browser) -> None:
    write(tmp_path, of_settings(tmp_path))
    expected = ["rope10", None, None, "alibi41"]  # RoPE and ALiBi, with 1 head and with 4
    for at, run in enumerate(expected):
        with opened(browser, tmp_path / "tiny.html", viewport={"width": 1500, "height": 900}) as (page, problems):
            page.locator(".plot .main-svg").first.wait_for()
            box = page.locator(".points .point").nth(at).bounding_box()
            assert box
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            page.locator(HOVER).first.wait_for()
            assert ("leads" in str(page.locator(".plot").get_attribute("class")).split()) == bool(run)
            page.mouse.down()
            page.mouse.up()
            if run:
                page.wait_for_url(f"**/{explorer_of(run)}#back=tiny.html")
                assert page.title() == run
            else:
                page.wait_for_timeout(200)
                assert page.url.endswith("tiny.html")
        assert problems == []


def test_a_row_of_a_matrix_leads_to_its_heads(tmp_path: Path, browser: Browser) -> None:
    write(tmp_path, of_settings(tmp_path))
    with opened(browser, tmp_path / "tiny.html", viewport={"width": 1500, "height": 900}) as (page, problems):
        page.locator(".heatmaplayer image").wait_for(state="attached")
        box = page.locator(".heatmaplayer image").bounding_box()
        assert box
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 3.5 / 4)
        page.locator(HOVER).first.wait_for()
        page.mouse.down()
        page.mouse.up()
        page.wait_for_url("**/explore_alibi41.html#step=48&back=tiny.html")
        assert problems == []


def test_a_point_of_a_curve_over_training_leads_to_its_step(tmp_path: Path, browser: Browser) -> None:
    made, steps = Panels(), [1, 10, 100]
    (panel,) = made.row(["w, 1 head"], x=TRAINING_STEPS)
    panel.add(go.Scatter(x=steps, y=[0.1, 0.5, 0.9], name="RoPE", mode="lines+markers"))
    index = write(tmp_path, (of_settings(tmp_path)[0], made.figure(title_height(TAKEAWAY))))
    for at, step in enumerate(steps):
        with opened(browser, index, viewport={"width": 1500, "height": 900}) as (page, _):
            page.locator(".plot .main-svg").first.wait_for()
            page.mouse.move(*point_of(page, ".plot", at))
            page.locator(HOVER).first.wait_for()
            page.mouse.down()
            page.mouse.up()
            page.wait_for_url(f"**/explore_rope10.html#step={step}&back=index.html%23tiny")


def test_runs_and_settings_lead_to_their_heads_without_a_mouse(tmp_path: Path, browser: Browser) -> None:
    write(tmp_path, of_settings(tmp_path))
    with opened(browser, tmp_path / "tiny.html") as (page, problems):
        page.locator(".runs summary").click()
        digests = {link.inner_text(): link.get_attribute("href") for link in page.locator(".runs a").all()}
        assert digests == {run: explorer_of(run) for run in ("rope10", "alibi41")}
        assert page.locator(".runs li code").count() == len(RUNS), "the others say how they are explored"
        assert f"{NAMED.format('RoPE')}: rope10 rope11" in page.locator(".runs").inner_text()
        page.get_by_role("link", name="rope10").focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/explore_rope10.html#back=tiny.html")
        assert problems == []


@pytest.mark.parametrize("allowed", [True, False])
def test_a_run_without_a_page_says_how_to_look_inside(tmp_path: Path, browser: Browser, allowed: bool) -> None:
    write(tmp_path, of_settings(tmp_path))
    with opened(browser, tmp_path / "tiny.html", permissions=["clipboard-read", "clipboard-write"]) as (page, problems):
        if not allowed:
            page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); }")
        page.locator(".runs summary").click()
        one, other = (page.get_by_role("button", name=name) for name in ("rope11", "alibi40"))
        one.hover()
        command = page.get_by_role("tooltip")
        assert command.inner_text() == "mdm-interp explore rope11 --out explorer.html"
        command.hover()
        assert command.is_visible(), "it can be selected"
        other.focus()
        assert command.inner_text() == "mdm-interp explore alibi40 --out explorer.html"
        assert other.get_attribute("aria-describedby") == command.get_attribute("id")
        assert one.get_attribute("aria-describedby") is None
        page.keyboard.press("Enter")
        if allowed:
            expect(command).to_have_attribute("data-said", "copied")
            assert page.evaluate("navigator.clipboard.readText()") == command.inner_text()
        else:
            page.wait_for_function("getSelection().toString() === document.querySelector('#command').textContent")
        page.keyboard.press("Escape")
        assert command.count() == 0
        assert problems == []


def test_the_report_lists_explorers_of_named_settings_first(tmp_path: Path, browser: Browser) -> None:
    scopes = [SETTING, {**SETTING, **NAMED_SETTINGS["NoPE"]}, {**SETTING, **NAMED_SETTINGS["RoPE"]}]
    rows = [{**scope, "run": f"run{at}"} for at, scope in enumerate(scopes)]
    for at in range(3):
        (tmp_path / explorer_of(f"run{at}")).write_text("")
    with opened(browser, write(tmp_path, (result(rows=rows), drawing()))) as (page, problems):
        links = {a.text_content(): a.get_attribute("href") for a in page.locator("#inside a").all()}
        assert list(links.items()) == [
            ("RoPE", "explore_run2.html"),
            ("NoPE", "explore_run1.html"),
            (NAMED.format("RoPE"), "explore_run0.html"),
        ]
        other = page.get_by_role("link", name=NAMED.format("RoPE"))
        assert not other.is_visible()
        page.get_by_text("1 other setting").click()
        other.click()
        page.wait_for_url("**/explore_run0.html#back=index.html%23inside")
        assert problems == []


def test_a_figure_without_explorers_leads_nowhere(tmp_path: Path) -> None:
    made = of_settings(tmp_path)
    for path in tmp_path.glob("explore_*.html"):
        path.unlink()
    said = text_of(write(tmp_path, made))
    assert "ook inside" not in said and "click on a point" not in said and "Its 8 runs" in said


MARKED = """plot => plot.data.map(({opacity, selectedpoints}) => [opacity ?? 1, selectedpoints ?? null])"""
FRAMES = """plot => (plot.layout.shapes ?? []).map(({xref, yref, y0, y1}) => [xref, yref, y0, y1])"""


def test_a_verdicts_figure_marks_its_setting(tmp_path: Path, browser: Browser) -> None:
    """From the ledger: what is of other settings fades, and what is of none stays."""
    index = write(tmp_path, of_settings(tmp_path), verdicts=[verdict("1", "alibi", "holds")])
    with opened(browser, index) as (page, problems):
        page.locator("#ledger").get_by_role("link", name="tiny").click()
        plot = page.locator(".plot")
        plot.locator(".main-svg").first.wait_for()
        assert plot.evaluate(MARKED) == [[1, [1]], [1, None], [0.15, None], [0.15, None], [1, None]]
        assert plot.evaluate(FRAMES) == [["x3 domain", "y3", 1.5, 2.5]]
        assert page.get_by_role("status").inner_text() == f"Marked: {NAMED.format('ALiBi')}. Show all alike"
        page.goto("about:blank")
        page.goto(f"{(tmp_path / 'tiny.html').as_uri()}#{urlencode({'setting': NAMED.format('alibi')})}")
        assert page.get_by_role("status").inner_text() == f"Marked: {NAMED.format('ALiBi')}. Show all alike"
        page.get_by_role("link", name="Show all alike").click()
        page.wait_for_function("!document.querySelector('#marked a') && document.querySelector('.main-svg')")
        assert plot.evaluate(MARKED) == [[1, None]] * 5 and plot.evaluate(FRAMES) == []
        assert not page.locator("#marked").is_visible()
        page.goto(f"{(tmp_path / 'tiny.html').as_uri()}#setting=another")
        page.reload()
        plot.locator(".main-svg").first.wait_for()
        assert plot.evaluate(MARKED) == [[1, None]] * 5, "a setting that is not there marks nothing"
        assert problems == []


def test_a_picture_is_there_before_plotly_is(tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "tiny.png").write_bytes(base64.b64decode(PIXEL))
    index = write(tmp_path)
    with opened(browser, index) as (page, problems):
        page.locator(".plot .main-svg").first.wait_for()
        assert page.locator(".still").count() == 0, "the drawing takes its place"
        assert problems == []
    (tmp_path / "plotly-cartesian.min.js").unlink()
    with opened(browser, index) as (page, _):
        still, place = (page.locator(selector).bounding_box() for selector in (".still", ".plot"))
        assert still == place


def test_a_slow_computer_paints_the_picture_before_plotly_is_loaded(tmp_path: Path, browser: Browser) -> None:
    """An order of events, not a time: the script cannot have run when the picture is painted."""
    (tmp_path / "tiny.png").write_bytes(base64.b64decode(PIXEL))
    write(tmp_path)
    seen = """() => {
      window.order = [];
      let plotly;
      Object.defineProperty(window, 'Plotly', {configurable: true, get: () => plotly, set: (value) => {
        plotly = value;
        order.push('Plotly');
      }});
      const painted = () => setTimeout(() => order.push('picture'));
      document.addEventListener('load', ({target}) => {
        if (target.matches?.('.still')) requestAnimationFrame(painted);
      }, true);
    }"""
    with opened(browser, tmp_path / "tiny.html") as (page, problems):
        page.context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": 4})
        page.add_init_script(f"({seen})()")
        page.reload()
        page.locator(".plot .main-svg").first.wait_for()
        assert page.evaluate("order") == ["picture", "Plotly"]
        assert problems == []


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
"""A PNG of one pixel."""


def test_the_address_names_what_the_ledger_is_filtered_by(tmp_path: Path, browser: Browser) -> None:
    index = write(tmp_path, verdicts=VERDICTS)
    with opened(browser, index) as (page, problems):
        page.get_by_label("scheme").select_option("RoPE")
        page.get_by_label("verdict").select_option("fails")
        address = page.url
        assert address.endswith("#scheme=RoPE&verdict=fails")
        for same in (address, address.replace("RoPE", "rope")):  # as results call it
            page.goto("about:blank")
            page.goto(same)
            assert shown_schemes(page) == ["RoPE"]
            assert page.get_by_label("scheme").input_value() == "RoPE"
            assert page.get_by_label("verdict").input_value() == "fails"
        page.goto(f"{index.as_uri()}#verdict=perhaps")
        page.wait_for_function("document.querySelector('[name=scheme]').value === ''")
        assert len(shown_schemes(page)) == 3, "what no verdict has does not filter"
        page.goto(f"{index.as_uri()}#tiny")
        assert len(shown_schemes(page)) == 3
        assert problems == []


def test_the_overview_counts_verdicts_and_leads_to_them(tmp_path: Path, browser: Browser) -> None:
    verdicts = [*VERDICTS, verdict("5", "learned", "fails", role="arm")]
    with opened(browser, write(tmp_path, verdicts=verdicts)) as (page, problems):
        table = page.get_by_role("table", name="Verdicts per claim")
        rows = [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]
        assert rows == [["1", "1", "0", "0", "0", "0"], ["0", "1", "0", "0", "1", "0"]]
        assert "Any-order masking alone" in table.locator("tbody tr").first.inner_text()
        table.get_by_role("link", name="1: claim 1 fails").click()
        page.wait_for_function("document.querySelector('[name=claim]').value === '1'")
        assert shown_schemes(page) == ["ALiBi"]
        assert page.locator("#ledger td.fails:visible").count() == 1
        table.get_by_role("link", name="1: claim 5 arm").click()
        page.wait_for_function("document.querySelector('[name=role]').value === 'arm'")
        assert shown_schemes(page) == ["learned"]
        assert "confirms the paper" in page.locator("#ledger tbody tr:visible").inner_text()
        assert problems == []


def test_a_verdict_is_told_by_word_and_sign_as_well_as_by_colour(tmp_path: Path, browser: Browser) -> None:
    verdicts = [*VERDICTS, verdict("5", "none", "inconclusive")]
    with opened(browser, write(tmp_path, verdicts=verdicts)) as (page, _):
        for outcome, sign in (("holds", "✓"), ("fails", "✗"), ("inconclusive", "?")):
            cell = page.locator(f"#ledger td.{outcome}").first
            assert cell.inner_text() == outcome
            assert sign in cell.evaluate("cell => getComputedStyle(cell, '::before').content")


# ---- in a browser: whoever reads, on whatever


FOCUSED = """() => {
  const element = document.activeElement;
  return [element.tagName.toLowerCase(), element.getAttribute('aria-label') || element.name
    || (element.closest('label') || element).textContent.trim()];
}"""


def test_every_control_is_reached_and_worked_by_keyboard(tmp_path: Path, browser: Browser) -> None:
    index = write(tmp_path, (result(origin=trained_on("aa")), drawing()), verdicts=VERDICTS)
    with opened(browser, index) as (page, problems):
        page.wait_for_function("document.querySelector('.curves:not([hidden])')")
        page.keyboard.press("Tab")
        assert page.evaluate(FOCUSED) == ["a", "To the content"]
        assert page.locator(".skip").bounding_box()["y"] >= 0, "seen when focused"  # type: ignore[index]
        page.locator(".curves summary").focus()
        page.keyboard.press("Enter")
        page.evaluate("document.activeElement.blur(); window.getSelection().removeAllRanges()")
        page.locator(".skip").focus()
        reached = []
        while (focused := page.evaluate(FOCUSED))[0] != "body" and len(reached) < 100:
            reached.append(tuple(focused))
            page.keyboard.press("Tab")
        assert {
            ("select", name)
            for name in ("claim", "world", "scheme", "objective", "layers", "heads", "stage", "role", "verdict")
        } <= {*reached}
        assert {("button", "Show all"), ("div", "Claims ledger"), ("div", f"Figure: {QUESTION}")} <= {*reached}
        assert {("summary", "How each claim is judged"), ("summary", "Its 1 run"), ("summary", "Its 2 numbers")} <= {
            *reached
        }
        assert {("input", "forward"), ("input", "chance")} <= {*reached}
        assert {("button", "Zoom in"), ("button", "Reset axes")} <= {*reached}
        focusable = page.locator("a[href], button, select, input, summary, [tabindex='0']")
        assert len(reached) == sum(element.is_visible() for element in focusable.all())

        page.get_by_label("scheme").focus()
        page.keyboard.press("ArrowDown")
        assert shown_schemes(page) == ["RoPE", "RoPE"]
        assert problems == []


def test_a_focused_control_is_seen(tmp_path: Path, browser: Browser) -> None:
    with opened(browser, write(tmp_path, verdicts=VERDICTS)) as (page, _):
        page.get_by_label("world").focus()
        page.keyboard.press("Tab")
        style = page.evaluate("getComputedStyle(document.activeElement).outline")
        assert "3px" in style and "solid" in style
        page.locator(".modebar-btn").first.focus()
        page.wait_for_function("getComputedStyle(document.activeElement.parentElement).opacity === '1'")


def test_a_figure_is_saved_as_a_picture_and_its_numbers_as_a_table(tmp_path: Path, browser: Browser) -> None:
    write(tmp_path)
    with opened(browser, tmp_path / "tiny.html") as (page, problems):
        page.locator(".plot .main-svg").first.wait_for()
        saved = {}
        for kind in ("PNG", "SVG", "CSV"):
            page.locator(".plot").hover()
            with page.expect_download() as download:
                page.locator(f".modebar-btn[data-title='Save as {kind}']").click()
            assert download.value.suggested_filename == f"tiny.{kind.lower()}"
            saved[kind] = download.value.path().read_bytes()
        assert saved["PNG"].startswith(b"\x89PNG")
        assert saved["SVG"].startswith(b"<svg") and TAKEAWAY.encode() in saved["SVG"]
        assert saved["CSV"].decode().splitlines() == [
            "quantity,scheme,mean,95 % interval,null,n",
            "share,a < b,0.123,0.1 to 0.25,0.05,3",
            "chance,,not defined,,,0",
        ]
        assert problems == []


def test_curves_are_switched_with_a_checkbox_as_in_the_legend(tmp_path: Path, browser: Browser) -> None:
    write(tmp_path)
    visible = "document.querySelector('.plot').data.map(trace => trace.visible ?? true)"
    with opened(browser, tmp_path / "tiny.html") as (page, problems):
        page.get_by_text("Curves shown").first.click()
        page.get_by_role("checkbox", name="forward").focus()
        page.keyboard.press("Space")
        assert page.evaluate(visible) == ["legendonly", "legendonly", True, True, True, True], "the band goes too"
        page.keyboard.press("Space")
        assert page.evaluate(visible) == [True] * 6
        page.evaluate("Plotly.restyle(document.querySelector('.plot'), {visible: 'legendonly'}, [0, 1])")
        assert not page.get_by_role("checkbox", name="forward").is_checked()
        assert page.get_by_role("checkbox", name="chance").is_checked()
        assert problems == []


def test_a_figure_has_a_text_alternative_made_from_its_summary(tmp_path: Path, browser: Browser) -> None:
    index = write(tmp_path, (result(question="What is it?"), drawing("A <title>")))
    for path in (index, tmp_path / "tiny.html"):
        with opened(browser, path) as (page, problems):
            image = page.get_by_role("img", name="A <title>")
            image.wait_for()
            assert page.locator("[role=img]").count() == 1
            described, detailed = (image.get_attribute(f"aria-{name}") for name in ("describedby", "details"))
            assert page.locator(f"#{described}").text_content() == (
                f"{TAKEAWAY} The table that follows has {len(SUMMARY)} numbers."
            )
            page.locator(f"#{detailed} summary").click()
            table = page.locator(f"#{detailed}").get_by_role("table", name="What is it?")
            assert [cell.inner_text() for cell in table.get_by_role("columnheader").all()] == [
                "quantity",
                "scheme",
                "mean",
                "95 % interval",
                "null",
                "n",
            ]
            rows = [row.locator("th, td").all_inner_texts() for row in table.locator("tbody tr").all()]
            assert rows == [
                ["share", "a < b", "0.123", "0.1 to 0.25", "0.05", "3"],
                ["chance", "", "not defined", "", "", "0"],
            ]
            assert [row.get_by_role("rowheader").count() for row in table.locator("tbody tr").all()] == [1, 1]
            assert problems == []


def test_a_long_table_shows_its_first_rows_and_the_rest_when_asked_or_printed(tmp_path: Path, browser: Browser) -> None:
    summary = Summary([Entry(f"share{i}", {}, Estimate(0.1, 0.0, 0.2, 3)) for i in range(130)])
    write(tmp_path, (result(summary=summary), drawing()))
    with opened(browser, tmp_path / "tiny.html") as (page, problems):
        table, rows = page.locator("#numbers-tiny"), page.locator("#numbers-tiny tbody tr")
        table.locator("summary").click()
        expect(rows).to_have_count(100)
        page.get_by_role("button", name="Show 30 more").click()
        expect(rows).to_have_count(130)
        assert not table.locator(".rest").is_visible()
        table.locator("summary").click()
        expect(rows).to_have_count(0)  # none are kept
        page.emulate_media(media="print")
        expect(rows).to_have_count(130)
        assert not table.locator(".rest").is_visible()
        assert problems == []


def write_named(folder: Path, names: list[str]) -> Path:
    """A report in which whatever can have a name has one of these, or all."""
    joined = " ".join(names)
    asked = {"pairs": {names[0]: 1}, "skipped": {names[0]: 1}, "digest": names[1]}
    twin = GIVEN.model_copy(update={**asked, "checkpoint": names[1]})
    given = GIVEN.model_copy(update={**asked, "checkpoint": names[0], "twin": twin})
    of_runs, of_checkpoint = (
        result(
            name,
            question=joined,
            origin=origin,
            rows=[{"run": name, "variant": name} for name in names],
            summary=Summary([Entry(name, {name: name}, Estimate(0.5, 0.4, 0.6, 3)) for name in names]),
        )
        for name, origin in (("tiny", trained_on(*names)), ("given", given))
    )
    figure = drawing(joined).update_traces(name=joined, selector=1)
    verdicts = [verdict("1", name, "fails", measure=name) for name in names]
    drawn = ((of_runs, figure), (of_checkpoint, figure))
    return write(folder, *drawn, verdicts=verdicts, pages={"tiny.html": joined})


@pytest.mark.parametrize("page_name", ["index.html", "tiny.html", "given.html"])
def test_hostile_names_are_text_everywhere(tmp_path: Path, browser: Browser, page_name: str) -> None:
    n_elements = []
    for folder, names in ((tmp_path / "a", HOSTILE), (tmp_path / "b", [f"name{i}" for i, _ in enumerate(HOSTILE)])):
        write_named(folder, names)
        with opened(browser, folder / page_name) as (page, problems):
            page.locator(".plot").first.scroll_into_view_if_needed()
            page.locator(".plot .main-svg").first.wait_for()
            shown = ("tiny", "given") if page_name == "index.html" else (page_name.removesuffix(".html"),)
            page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
            for name in shown:
                expect(page.locator(f"#numbers-{name} tbody th")).to_have_text(names)
            assert page.locator(".runs li code").all_text_contents() == (names if "tiny" in shown else [])
            if "given" in shown:
                text = page.locator("body").evaluate("body => body.textContent")
                assert f"Checkpoint {names[0]}: 32 layers" in text and f"Its twin {names[1]}: 32 layers" in text
            assert page.evaluate("document.querySelector('.plot').data[1].name") == " ".join(names)
            if page_name == "index.html":
                assert page.locator("#ledger td:nth-child(10)").all_text_contents() == [
                    f"{name} (contradicts the paper)" for name in names
                ]
                for name in names:
                    page.get_by_label("scheme").select_option(value=name)
                    assert page.locator("#ledger tbody tr:visible").count() == 1
            n_elements.append(page.evaluate("document.querySelectorAll('body *:not(.plot *)').length"))
            assert problems == []
    assert n_elements[0] == n_elements[1], "no name makes an element"


CONTRASTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (color) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const part = rgb(color)[i] / 255;
    return sum + weight * (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  }, 0);
  const behind = (element) => {
    const plot = element.closest('.plot');
    if (plot) return getComputedStyle(plot.querySelector('.main-svg')).backgroundColor;
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (rgb(color)[3] === 255) return color;
    }
    throw Error('no background');
  };
  const said = (element) => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  return [...document.querySelectorAll('body *')]
    .filter(element => said(element) && element.getClientRects().length && !element.matches('script, style'))
    .map(element => {
      const style = getComputedStyle(element);
      const color = element.closest('svg') ? style.fill : style.color;
      const [dark, light] = [luminance(color), luminance(behind(element))].sort((a, b) => a - b);
      return [element.textContent.slice(0, 40), (light + 0.05) / (dark + 0.05)];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(tmp_path: Path, browser: Browser, scheme: Any) -> None:
    verdicts = [*VERDICTS, verdict("5", "none", "inconclusive")]
    index = write(tmp_path, (result(origin=trained_on("aa")), drawing()), verdicts=verdicts)
    for path in (index, tmp_path / "tiny.html"):
        with opened(browser, path, color_scheme=scheme) as (page, problems):
            page.locator(".plot .main-svg").first.wait_for()
            page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
            found = page.evaluate(CONTRASTS)
            texts = {text for text, _ in found}
            assert {TAKEAWAY, "training step", "forward", "matrix", "To the content"} <= texts, "sees drawings too"
            assert [(text, ratio) for text, ratio in found if ratio < 4.5] == []
            assert problems == []


GROUNDS = """() => [document.body, ...document.querySelectorAll('.plot .main-svg')].map(
  element => getComputedStyle(element).backgroundColor).filter(color => color !== 'rgba(0, 0, 0, 0)')"""
WHITE, BLACKISH = "rgb(255, 255, 255)", "rgb(22, 24, 28)"


def test_figures_follow_the_readers_colours(tmp_path: Path, browser: Browser) -> None:
    marks = "[...document.querySelectorAll('.scatterlayer .js-line')].map(line => getComputedStyle(line).stroke)"
    with opened(browser, write(tmp_path)) as (page, problems):
        page.locator(".plot .main-svg").first.wait_for()
        assert {*page.evaluate(GROUNDS)} == {WHITE}
        colors = page.evaluate(marks)
        page.emulate_media(color_scheme="dark")
        page.wait_for_function(
            f"getComputedStyle(document.querySelector('.main-svg')).backgroundColor === '{BLACKISH}'"
        )
        assert {*page.evaluate(GROUNDS)} == {BLACKISH}
        assert page.evaluate(marks) == colors, "a curve keeps its colour"
        page.emulate_media(color_scheme="light")
        page.wait_for_function(f"getComputedStyle(document.querySelector('.main-svg')).backgroundColor === '{WHITE}'")
        assert problems == []


@pytest.mark.parametrize("name", ["index.html", "tiny.html"])
def test_a_phone_never_scrolls_sideways_except_within_a_figure(tmp_path: Path, browser: Browser, name: str) -> None:
    write(
        tmp_path,
        (result(summary=Summary([Entry("a_very_long_name" * 8, {}, Estimate(1.0, 0.0, 2.0, 3))])), drawing()),
        verdicts=VERDICTS,
    )
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    with opened(browser, tmp_path / name, **phone) as (page, problems):
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert list(go_past_all(page))
        page.locator(".plot .main-svg").first.wait_for()
        assert page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]") == [390, 390]
        frame = page.locator(".frame").first
        assert frame.evaluate("frame => [frame.scrollWidth > frame.clientWidth, frame.tabIndex]") == [True, 0]
        label = page.locator(".plot .xtitle").first
        assert label.evaluate("label => label.getBoundingClientRect().height") > 9, "labels are readable"
        assert page.locator("#about-tiny").is_visible(), "what the drawing's subtitle says, in whole"
        assert page.evaluate("document.querySelector('.plot')._fullLayout.dragmode") is False, "a finger scrolls"
        smallest = page.evaluate(
            "Math.min(...[...document.querySelectorAll('main p, main td, main th, main label')].map("
            "element => parseFloat(getComputedStyle(element).fontSize)))"
        )
        assert smallest >= 13
        if name == "index.html":
            cells = page.locator("#ledger tbody tr").first.locator("th, td").all()
            assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for c in cells if (box := c.bounding_box()))
        assert problems == []


FITS = """() => [...document.querySelectorAll('.plot')].map(plot => {
  const svgs = [...plot.querySelectorAll('.main-svg')].map(svg => svg.getBoundingClientRect());
  return svgs.length > 0 && svgs.every(({left, right, width, height}) =>
    left >= -1 && right <= innerWidth + 1 && Math.abs(width / height - plot.layout.width / plot.layout.height) < 0.02)
    && [...plot.querySelectorAll('text')].every(text => text.getBoundingClientRect().right <= innerWidth);
})"""


def test_paper_gets_everything_in_light_colours_and_within_its_width(tmp_path: Path, browser: Browser) -> None:
    drawn = [(result(f"tiny{i}", origin=trained_on("aa")), drawing()) for i in range(4)]
    index = write(tmp_path, *drawn, verdicts=[*VERDICTS, *([verdict("5", "none", "fails")] * 100)])
    with opened(browser, index, color_scheme="dark", viewport={"width": 700, "height": 900}) as (page, problems):
        page.locator("[name=claim]").select_option("5")
        page.emulate_media(media="print", color_scheme="dark")
        page.wait_for_function(f"{DRAWN}.every(Boolean) && ({FITS})().every(Boolean)")
        assert page.evaluate(DRAWN) == [True] * 4, "also those that nobody went to"
        assert page.evaluate(FITS) == [True] * 4
        assert {*page.evaluate(GROUNDS)} <= {WHITE, "rgba(0, 0, 0, 0)"}
        assert not page.locator(".filters, .curves, .skip, .modebar").filter(visible=True).count()
        assert page.locator("#ledger tbody tr:visible").count() == 101, "the ledger that was chosen"
        assert page.get_by_role("status").inner_text() == "101 of 103 verdicts: claim 5"
        ledger = page.get_by_role("region", name="Claims ledger")
        assert ledger.evaluate("region => region.scrollHeight <= region.clientHeight + 1"), "unrolled"
        head = page.locator("#ledger thead")
        assert head.evaluate("head => getComputedStyle(head).display") == "table-header-group", "on every sheet"
        assert page.locator("main details:not(.curves)").count() == page.locator("details[open]").count() > 4

        page.emulate_media(media="screen", color_scheme="dark")
        expect(page.locator("details[open]")).to_have_count(0)  # as it was
        page.wait_for_function(f"({GROUNDS})().every(color => color === '{BLACKISH}')")
        assert {*page.evaluate(GROUNDS)} == {BLACKISH}
        assert problems == []


def test_printing_draws_what_was_not_drawn(tmp_path: Path, browser: Browser) -> None:
    index = write(tmp_path, *((result(f"tiny{i}"), drawing()) for i in range(5)))
    with opened(browser, index, color_scheme="dark") as (page, problems):
        page.wait_for_function(f"{DRAWN}[0]")
        page.wait_for_timeout(200)
        assert not all(page.evaluate(DRAWN))
        page.evaluate(f"addEventListener('beforeprint', () => {{ window.atPrint = [{DRAWN}, ({GROUNDS})()]; }})")
        printed = page.pdf(format="A4")
        assert printed.startswith(b"%PDF") and printed.count(b"/Type /Page\n") >= 5
        drawn, grounds = page.evaluate("window.atPrint")
        assert drawn == [True] * 5
        assert set(grounds) - {WHITE} <= {BLACKISH} and grounds.count(WHITE) >= 5, "figures; the page follows by style"
        assert problems == []


@pytest.mark.slow
@pytest.mark.usefixtures("chromium")
def test_pngs_are_drawn_in_the_size_of_their_figures(tmp_path: Path) -> None:
    problem = write_report([(result("one"), drawing()), (result("two"), drawing())], tmp_path)
    layout: Any = drawing().layout
    assert problem is None
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["index.html", "one.html", "one.png", "plotly-cartesian.min.js", "two.html", "two.png"]
    for name in ("one.png", "two.png"):
        image = (tmp_path / name).read_bytes()
        assert image.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", image[16:24])
        assert width / height == pytest.approx(1400 / layout.height, rel=0.01)
        assert width >= 1400
