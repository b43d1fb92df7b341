"""Figures as files: what is written, and that a browser without a network shows it."""

from __future__ import annotations

import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from playwright.sync_api import Browser, Dialog, sync_playwright
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from mdm_interp.analysis import discover
from mdm_interp.claims import CLAIMS, Verdict
from mdm_interp.probing import CheckpointAnalysis
from mdm_interp.results import Result
from mdm_interp.stats import Estimate
from mdm_interp.viz.plots import TRAINING_STEPS, add_curve, add_estimates, add_level, add_matrix, add_points
from mdm_interp.viz.report import write_figures, write_index
from mdm_interp.viz.theme import CHANCE, FORWARD, REVERSE, VARIANTS, faded, legend_at, titled

FIGURES = Path(__file__).parents[1] / "figures"
NAN = float("nan")
NAMES = [analysis.name for analysis in discover()]
CHECKPOINTS = {analysis.name for analysis in discover() if isinstance(analysis, CheckpointAnalysis)}
QUESTION = "Is <script>alert(1)</script> & \"more\" than 'less'?"
CURVE = pd.DataFrame({"step": [1, 10, 100], "value": [0.1, 0.4, 0.9], "low": [0.0, 0.3, 0.8], "high": [0.2, 0.5, 1.0]})
CURVE["n"] = 3


def result(name: str = "tiny", question: str = QUESTION) -> Result:
    summary = {"a < b": Estimate(0.123456, 0.1, 0.25, 3), "absent": Estimate(NAN, NAN, NAN, 0)}
    return Result(name, question, {}, [0, 1, 2], {"code": "0"}, [{"seed": 0, "value": 1.0}], summary)


def drawing(question: str = QUESTION) -> go.Figure:
    figure = make_subplots(1, 2, subplot_titles=["curves", "matrix"])
    add_curve(figure, CURVE, "step", name="forward", color=FORWARD, row=1, col=1, legend="legend")
    add_curve(figure, CURVE, "step", name="reverse", color=REVERSE, row=1, col=1, dash="dash")
    add_level(figure, [1.0, 100.0], 0.5, name="chance", color=CHANCE, row=1, col=1, legend="legend")
    matrix = pd.DataFrame([[1.0, -1.0], [0.0, 0.5]]).to_numpy()
    add_matrix(figure, matrix, x=["B0", "B1"], y=["A0", "A1"], limit=1.0, row=1, col=2, colorbar={"len": 0.5})
    figure.update_xaxes(TRAINING_STEPS, title_text="training step", row=1, col=1)
    figure.update_layout(legend=legend_at(0.2, -0.2))
    return titled(figure, question, "One is more than nothing.", height=600)


@pytest.fixture
def no_pngs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a browser."""

    def fail(figures: Any, files: list[Path], **_: Any) -> None:
        files[0].write_bytes(b"half an image")
        raise RuntimeError("Kaleido requires Google Chrome.\nInstall it, or run `plotly_get_chrome`.")

    monkeypatch.setattr(pio, "write_images", fail)


# ---- marks and theme


def test_a_curve_is_its_mean_in_a_band_of_its_interval() -> None:
    drawn: Any = drawing().data
    band, line = drawn[:2]
    assert list(line.x) == [1, 10, 100]
    assert list(line.y) == [0.1, 0.4, 0.9]
    assert list(band.x) == [1, 10, 100, 100, 10, 1]
    assert list(band.y) == [0.2, 0.5, 1.0, 0.8, 0.3, 0.0]
    assert (band.fill, band.fillcolor, line.line.color) == ("toself", faded(FORWARD), FORWARD)
    assert [trace.showlegend for trace in drawn[:4]] == [False, True, False, False]


def test_points_and_estimates_have_their_intervals_as_bars_and_leave_out_what_was_not_measured() -> None:
    figure = make_subplots(1, 3)
    points = pd.concat([CURVE, pd.DataFrame([{"step": 1000, "value": NAN, "low": NAN, "high": NAN, "n": 0}])])
    add_points(figure, points, "step", name="reverse", color=REVERSE, row=1, col=1, shift=0.5, legend="legend2")
    add_points(figure, points[points["n"] == 0], "step", name="none", color=REVERSE, row=1, col=1)
    estimates = {
        "one": Estimate(0.5, 0.25, 1.0, 3),
        "absent": Estimate(NAN, NAN, NAN, 0),
        "two": Estimate(0.0, 0.0, 0.0, 1),
    }
    for col, upright in ((2, False), (3, True)):
        add_estimates(figure, estimates, name="effect", color=FORWARD, row=1, col=col, upright=upright)
    add_estimates(figure, {"absent": estimates["absent"]}, name="none", color=FORWARD, row=1, col=2)
    drawn: Any = figure.data
    assert [trace.name for trace in drawn] == ["reverse", "effect", "effect"]
    assert [trace.showlegend for trace in drawn] == [True, False, False]
    assert (list(drawn[0].x), list(drawn[0].y)) == ([1.5, 10.5, 100.5], [0.1, 0.4, 0.9])
    assert list(drawn[0].error_y.array) == pytest.approx([0.1] * 3)
    assert list(drawn[0].error_y.arrayminus) == pytest.approx([0.1] * 3)
    for trace, labels, values, bars in (
        (drawn[1], drawn[1].y, drawn[1].x, drawn[1].error_x),
        (drawn[2], drawn[2].x, drawn[2].y, drawn[2].error_y),
    ):
        assert (list(labels), list(values), trace.mode) == (["one", "two"], [0.5, 0.0], "markers")
        assert (list(bars.array), list(bars.arrayminus)) == ([0.5, 0.0], [0.25, 0.0])


def test_a_level_crosses_the_panel_and_a_matrix_has_its_first_row_on_top() -> None:
    figure: Any = drawing()
    level, matrix = figure.data[4:]
    assert (list(level.x), list(level.y)) == ([1.0, 100.0], [0.5, 0.5])
    assert matrix.z.tolist() == [[1.0, -1.0], [0.0, 0.5]]
    assert (list(matrix.x), list(matrix.y), matrix.zmin, matrix.zmax) == (["B0", "B1"], ["A0", "A1"], -1.0, 1.0)
    assert figure.layout.yaxis2.autorange == "reversed"


def test_faded_keeps_the_colour() -> None:
    assert faded("#0072B2", 0.5) == "rgba(0,114,178,0.5)"


def luminance(color: str) -> float:
    """Of sRGB, relative to white."""
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_variants_have_colours_of_their_own_that_stand_out_from_white() -> None:
    assert len(set(VARIANTS.values())) == len(VARIANTS)
    assert all(1.05 / (luminance(color) + 0.05) > 2 for color in VARIANTS.values())


# ---- files


@pytest.mark.usefixtures("no_pngs")
def test_without_a_browser_the_pages_are_written_and_one_line_says_why_there_are_no_pngs(tmp_path: Path) -> None:
    problem = write_figures([(result(), drawing()), (result("other"), drawing())], tmp_path)
    assert problem == "no PNGs: Kaleido requires Google Chrome."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.html", "plotly.min.js", "tiny.html"]
    assert (tmp_path / "plotly.min.js").read_text(encoding="utf-8") == get_plotlyjs()


@pytest.mark.usefixtures("no_pngs")
def test_text_is_escaped_and_plotly_is_shared(tmp_path: Path) -> None:
    drawn = [(result(), drawing())]
    write_figures(drawn, tmp_path)
    write_index(drawn, [], tmp_path)
    for name in ("tiny.html", "index.html"):
        page = (tmp_path / name).read_text(encoding="utf-8")
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert page.count('<script src="plotly.min.js"></script>') == 1
        assert len(page) < 100_000, "a copy of plotly.js"
    assert "<td>a &lt; b</td><td>0.123</td>\n<td>0.1 to 0.25</td><td>3</td>" in page
    assert "mdm-interp reproduce --only tiny --seeds 3" in page


@pytest.mark.usefixtures("no_pngs")
def test_pages_of_one_figure_are_the_same_every_time(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_figures([(result(), drawing())], folder)
        write_index([(result(), drawing())], [], folder)
    for name in ("tiny.html", "index.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.usefixtures("no_pngs")
def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_figures([(result(), drawing())], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_figures([(result(question="Changed?"), drawing("Changed?"))], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_pages_share_one_plotly(name: str) -> None:
    committed(f"{name}.html")
    for page in (f"{name}.html", "index.html"):
        text = committed(page).read_text(encoding="utf-8")
        assert text.count('<script src="plotly.min.js"></script>') == 1
        assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", text), "something comes from the network"
        assert "Copyright 2012" not in text, "a copy of plotly.js"
        for link in re.findall(r'href="([^"#]+)"', text):
            assert (FIGURES / link).exists(), f"{page} links to {link}"
    assert f'<section id="{name}">' in text


def committed(name: str) -> Path:
    path = FIGURES / name
    if not path.exists():
        pytest.skip(f"figures/{name} is not there; `make reproduce` writes it")
    return path


# ---- in a browser


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path. CI has one; elsewhere its absence skips."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        assert not os.environ.get("CI"), "CI must have a chromium: the pages are tested in it"
        pytest.skip("there is no chromium here to open the pages in")
    return path


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    arguments = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield started
        started.close()


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

READ = """texts => [...document.querySelectorAll('.plotly-graph-div')].map(plot => {
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
})"""


@pytest.fixture
def show(browser: Browser) -> Iterator[Callable[[Path], Shown]]:
    """Opens a page with the network off and waits until its plots are drawn."""
    context = browser.new_context(offline=True, viewport={"width": 1500, "height": 1200})
    context.route(re.compile(r"^https?:"), lambda route: route.abort())

    def open_page(path: Path) -> Shown:
        problems: list[str] = []
        page = context.new_page()

        def dismiss(dialog: Dialog) -> None:
            problems.append(dialog.message)
            dialog.dismiss()

        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(request.url))
        page.on("dialog", dismiss)
        page.goto(path.as_uri(), wait_until="load")
        page.wait_for_timeout(500)  # plotly places automatic margins after its first drawing
        plots = page.evaluate(READ, TEXTS)
        title = page.title()
        page.close()
        boxes = [[Box(*box) for box in plot["boxes"]] for plot in plots]
        return Shown(problems, title, boxes, [p["traces"] for p in plots], [p["expected"] for p in plots])

    yield open_page
    context.close()


def assert_shown(shown: Shown, n_plots: int) -> None:
    assert shown.problems == []
    assert len(shown.plots) == n_plots
    for (plot, *_), traces, expected in zip(shown.plots, shown.traces, shown.expected, strict=True):
        assert plot.right - plot.left > 500
        assert plot.bottom - plot.top > 300
        assert traces == expected > 0


@pytest.mark.usefixtures("no_pngs")
def test_a_browser_shows_what_was_written(tmp_path: Path, show: Callable[[Path], Shown]) -> None:
    drawn = [(result(), drawing()), (result("other", "Other?"), drawing("Other?"))]
    write_figures(drawn, tmp_path)
    write_index(drawn, [], tmp_path)
    alone = show(tmp_path / "tiny.html")
    assert_shown(alone, n_plots=1)
    assert alone.title == QUESTION
    assert_shown(show(tmp_path / "index.html"), n_plots=2)


def verdict(claim: str, scheme: str, outcome: Any) -> Verdict:
    scope = {"world": "w", "scheme": scheme, "objective": "any_order", "n_layers": 1, "mlp": False, "stage": "end"}
    of = {"id": claim, "sentence": CLAIMS[claim]}
    number = Estimate(0.5, 0.4, 0.6, 5)
    return Verdict(of, scope, "<b>measure</b>", number, number, "null", 0.01, outcome, "rule", "tiny")


@pytest.mark.usefixtures("no_pngs")
def test_the_ledger_filters(tmp_path: Path, browser: Browser) -> None:
    verdicts = [verdict("1", "rope", "holds"), verdict("1", "alibi", "fails"), verdict("5", "rope", "fails")]
    drawn = [(result(), drawing())]
    write_figures(drawn, tmp_path)
    write_index(drawn, verdicts, tmp_path)
    context = browser.new_context(offline=True)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((tmp_path / "index.html").as_uri())

    def shown() -> list[str]:
        return [row.inner_text().split("\t")[2] for row in page.locator("#ledger tbody tr:visible").all()]

    assert shown() == ["rope", "alibi", "rope"]
    page.get_by_label("verdict").select_option("fails")
    assert shown() == ["alibi", "rope"]
    page.get_by_label("scheme").select_option("rope")
    assert shown() == ["rope"]
    assert page.locator("#shown").inner_text() == "1 verdicts"
    page.get_by_label("verdict").select_option("all")
    assert shown() == ["rope", "rope"]
    assert "<b>measure</b>" in page.locator("#ledger tbody tr").first.inner_text(), "text is escaped"
    links = {link.get_attribute("href") for link in page.locator("#ledger a").all()}
    assert links == {"tiny.html", "tiny.json"}
    assert problems == []
    context.close()


@pytest.mark.usefixtures("no_pngs")
def test_the_browser_check_sees_a_page_that_does_not_work(tmp_path: Path, show: Callable[[Path], Shown]) -> None:
    write_figures([(result(), drawing())], tmp_path)
    (tmp_path / "plotly.min.js").unlink()
    assert any("plotly.min.js" in problem for problem in show(tmp_path / "tiny.html").problems)
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


@pytest.mark.usefixtures("no_pngs")
def test_the_overlap_check_sees_a_legend_on_an_axis_title(tmp_path: Path, show: Callable[[Path], Shown]) -> None:
    figure = drawing().update_layout(legend=legend_at(0.2, -0.08))
    write_figures([(result(), figure)], tmp_path)
    (plot,) = show(tmp_path / "tiny.html").plots
    assert [tuple(sorted(kind.partition(":")[0] for kind in pair)) for pair in collisions(plot[1:])] == [
        ("legend", "x title")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_figure_is_readable(name: str, show: Callable[[Path], Shown]) -> None:
    shown = show(committed(f"{name}.html"))
    assert_shown(shown, n_plots=1)
    (plot, *texts) = shown.plots[0]
    kinds = {"title", "subtitle", "panel title", "x title"}
    if name not in CHECKPOINTS:  # those name their quantities above the panels, and colours beside bars
        kinds |= {"legend", "y title"}
    assert kinds <= {text.kind for text in texts}
    assert collisions(texts) == []
    visible = [text for text in texts if text.right > text.left]
    assert [text for text in visible if not text.is_inside(plot)] == [], "cut off at the edge"


def test_the_committed_index_shows_every_figure(show: Callable[[Path], Shown]) -> None:
    assert_shown(show(committed("index.html")), n_plots=len(NAMES))


@pytest.mark.slow
@pytest.mark.usefixtures("chromium")
def test_pngs_are_drawn_in_the_size_of_their_figures(tmp_path: Path) -> None:
    problem = write_figures([(result("one"), drawing()), (result("two"), drawing())], tmp_path)
    assert problem is None
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["one.html", "one.png", "plotly.min.js", "two.html", "two.png"]
    for name in ("one.png", "two.png"):
        image = (tmp_path / name).read_bytes()
        assert image.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", image[16:24])
        assert width / height == pytest.approx(1400 / 600, rel=0.01)
        assert width >= 1400
