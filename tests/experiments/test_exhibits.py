"""The pages beside the figures: of the models that are there, and only of those."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from helpers import tiny_grid
from page_helpers import opened

from mdm_interp.experiments.exhibits import PAGES, write_exhibits
from mdm_interp.experiments.grids import scheme_grid
from mdm_interp.experiments.subjects import Lab, demos, train_demos
from mdm_interp.training.loop import train

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def test_what_is_not_trained_is_not_shown(tmp_path: Path) -> None:
    write_exhibits(Lab(n_seeds=1, root=tmp_path / "store"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_each_model_that_is_there_has_its_pages(tmp_path: Path, browser: Browser) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with tiny_grid():
        lab = Lab(n_seeds=1, root=tmp_path / "store")
        train(scheme_grid([0])[0], root=lab.root, progress=False)
        write_exhibits(lab, out)
        assert [path.name for path in out.glob("inside_*")] == ["inside_routes.html"]
        train_demos(demos(lab.seeds), lab)
        write_exhibits(lab, out)
    written = PAGES.keys() - {"settings_map.html"}  # an analysis' own
    assert len(written) == 4
    assert {path.name for path in out.iterdir()} == {*written, "circuitsvis.js", "plotly.min.js"}
    for file in written:
        with opened(browser, out / file) as (tab, problems):
            assert tab.locator("#tokens li, ol.tokens li").count() > 3
        assert problems == [], file
