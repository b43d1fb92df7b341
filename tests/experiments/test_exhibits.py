"""The pages beside the figures: of the models that are there, and only of those."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers import tiny_grid
from page_helpers import opened

from mdm_interp.experiments import exhibits
from mdm_interp.experiments.exhibits import PAGES, explorer_of, make_exhibits
from mdm_interp.experiments.grids import scheme_grid
from mdm_interp.experiments.subjects import Lab, demos, train_demos
from mdm_interp.training.loop import train

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def test_what_is_not_trained_is_not_shown(tmp_path: Path) -> None:
    assert not list(make_exhibits(Lab(n_seeds=1, root=tmp_path / "store")))
    assert list(tmp_path.iterdir()) == []


def write(lab: Lab, out: Path) -> None:
    for file, page in make_exhibits(lab):
        page.save(out / file, shared=True)


def test_each_model_that_is_there_has_its_pages(
    tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"rope": ["RoPE"], "learned": ["learned"]}  # tiny models have other heads than the named settings
    monkeypatch.setattr(exhibits, "settings_of", lambda scope: named.get(scope["scheme"], []))
    out = tmp_path / "out"
    out.mkdir()
    with tiny_grid():
        lab = Lab(n_seeds=1, root=tmp_path / "store")
        for config in (one for one in scheme_grid([0]) if one.model.position in named):
            train(config, root=lab.root, progress=False)
        write(lab, out)
        small = {explorer_of("RoPE"), explorer_of("learned")}
        assert {path.name for path in out.glob("*.html")} == small
        train_demos(demos(lab.seeds), lab)
        write(lab, out)
    written = {*small, "inside_attention.html", "inside_demo_routes.html", "inside_denoising.html"}
    assert written < PAGES.keys()
    assert {path.name for path in out.iterdir()} == {*written, "circuitsvis.js", "plotly.min.js"}
    for file in written:
        with opened(browser, out / file) as (tab, problems):
            assert tab.locator("#tokens li, ol.tokens li, #lens tbody tr").count() > 3
            assert tab.get_by_role("link", name="All figures").get_attribute("href") == "index.html"
        assert problems == [], file
