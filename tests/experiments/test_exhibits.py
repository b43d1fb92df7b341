"""The pages beside the figures: of the models that are there, and only of those."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers import tiny_grid
from page_helpers import opened
from probe_helpers import tiny_probe

from mdm_interp.errors import UserError
from mdm_interp.experiments import exhibits
from mdm_interp.experiments.exhibits import PAGES, explored, explorer_of, make_exhibits, write_probed
from mdm_interp.experiments.grids import scheme_grid
from mdm_interp.experiments.subjects import Lab, demos, train_demos
from mdm_interp.training.loop import train
from mdm_interp.viz.pages import explorer

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
        trained = dict[str, str]()
        for config in (one for one in scheme_grid([0]) if one.model.position in named):
            (name,) = named[config.model.position]
            trained[train(config, root=lab.root, progress=False).folder.name] = name
        write(lab, out)
        small = {explorer_of("RoPE"), explorer_of("learned")}
        assert {path.name for path in out.glob("*.html")} == small
        train_demos(demos(lab.seeds), lab)
        write(lab, out)
    assert explored(out) == {run: explorer_of(name) for run, name in trained.items()}
    written = {*small, "inside_attention.html", "inside_demo_routes.html", "inside_denoising.html"}
    assert written < PAGES.keys()
    assert {path.name for path in out.iterdir()} == {*written, "circuitsvis.js", "plotly-cartesian.min.js"}
    for file in written:
        with opened(browser, out / file) as (tab, problems):
            assert tab.locator("#tokens li, ol.tokens li, #lens tbody tr").count() > 3
            assert tab.get_by_role("link", name="All figures").get_attribute("href") == "index.html"
        assert problems == [], file


def test_a_probe_is_explored_with_its_twin(tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    probe, out = tiny_probe(tmp_path, "llada", twin="qwen2"), tmp_path / "out"
    out.mkdir()
    pages = write_probed(probe, out, 3, tmp_path / "tiny-llada", tmp_path / "tiny-qwen2")
    assert pages == {
        "explorer.html": "Every head of tiny-llada",
        "twin_explorer.html": "Every head of tiny-qwen2",
    }
    assert explored(out) == {}, "these are of no run"
    for file, name in zip(pages, ("tiny-llada", "tiny-qwen2"), strict=True):
        with opened(browser, out / file) as (tab, problems):
            assert tab.title() == f"Explorer: {name}"
            assert f"load_checkpoint('{tmp_path / name}')" in str(tab.locator("#code").text_content())
            assert tab.locator("#pair option").count() == 3
            assert tab.get_by_role("link", name="All figures").get_attribute("href") == "index.html"
        assert problems == [], file
    monkeypatch.setattr(explorer, "MAX_ENTRIES", 50)
    with pytest.raises(UserError, match=r"^query_pairs: 3 pairs of 1 models with .* are more than the 50 entries"):
        write_probed(probe, out, 3, tmp_path / "tiny-llada", tmp_path / "tiny-qwen2")
