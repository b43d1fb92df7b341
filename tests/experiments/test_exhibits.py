"""The pages beside the figures: of the models that are there, and only of those."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import pytest
from helpers import random_model, tiny_grid
from model_helpers import mirrored_pairs
from page_helpers import opened
from probe_helpers import tiny_probe

from mdm_interp import viz
from mdm_interp.errors import UserError
from mdm_interp.experiments.claims import CLAIMS
from mdm_interp.experiments.exhibits import PAGES, SCORE_OF_CLAIM, explored, explorer_of, make_exhibits, write_probed
from mdm_interp.experiments.grids import scheme_grid
from mdm_interp.experiments.scope import stages
from mdm_interp.experiments.subjects import Lab, demos, train_demos
from mdm_interp.measures.head_scores import SCORES
from mdm_interp.training.loop import train
from mdm_interp.viz.pages import explorer

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def test_what_is_not_trained_is_not_shown(tmp_path: Path) -> None:
    assert not list(make_exhibits(Lab(n_seeds=1, root=tmp_path / "store"), scheme_grid([0])))
    assert list(tmp_path.iterdir()) == []


def write(lab: Lab, out: Path) -> None:
    for file, page in make_exhibits(lab, scheme_grid(lab.seeds)):
        page.save(out / file, shared=True)


def test_each_model_that_is_there_has_its_pages(tmp_path: Path, browser: Browser) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with tiny_grid():
        lab = Lab(n_seeds=2, root=tmp_path / "store")
        runs = {
            (config.seed, config.model.position): train(config, root=lab.root, progress=False)
            for config in scheme_grid(lab.seeds)
            if (config.seed, config.model.position) in ((0, "rope"), (1, "rope"), (1, "learned"))
        }
        shown = [runs[0, "rope"], runs[1, "learned"]]  # of each setting the first seed that is there
        for run, (_, page) in zip(shown, make_exhibits(lab, scheme_grid(lab.seeds)), strict=True):
            (steps,) = (series["steps"] for series in page.data["series"])
            assert {max(weights, key=lambda step: weights[step]) for _, weights in stages(run)} <= {*steps}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(explorer, "MAX_ENTRIES", 50)
            assert not list(make_exhibits(lab, scheme_grid(lab.seeds))), "what no page holds is left out"
        write(lab, out)
        small = {explorer_of(run.folder.name) for run in shown}
        assert {path.name for path in out.glob("*.html")} == small
        train_demos([next(demo for demo in demos(lab.seeds) if demo.format == "llada")], lab)
        write(lab, out)
    assert explored(out) == {run.folder.name: explorer_of(run.folder.name) for run in shown}
    written = {*small, "inside_attention.html", "inside_demo_routes.html", "inside_denoising.html"}
    assert written - small < PAGES.keys()
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


# ---- from a verdict to a head, and back


def test_every_claim_leads_to_a_score() -> None:
    assert SCORE_OF_CLAIM.keys() == CLAIMS.keys()
    assert {*SCORE_OF_CLAIM.values()} <= SCORES.keys()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The explorer of a model of 2 layers x 4 heads, which belongs to a report."""
    made = viz.explore(random_model(), mirrored_pairs(causal=False)[:2])
    return replace(made, home="index.html").save(tmp_path_factory.mktemp("page") / "explore_a.html", shared=True)


def test_an_address_with_a_score_opens_the_head_that_leads_by_it(page: Path, browser: Browser) -> None:
    with opened(browser, page) as (tab, problems):
        for score in ("forward route", "reverse evidence", "reverse attribution"):
            tab.goto(f"{page.as_uri()}#{urlencode({'score': score})}")
            tab.wait_for_function("score => document.querySelector('#score').value === score", arg=score)
            tab.locator("#ranking").get_by_role("button", name=score, exact=True).click()
            best = tab.locator("#ranking tbody tr").first
            assert "chosen" in str(best.get_attribute("class"))
            assert best.get_by_role("rowheader").inner_text() == ".".join(
                tab.locator(f"#{name}").input_value() for name in ("layer", "head")
            )
        tab.goto(f"{page.as_uri()}#score=forward+route&layer=1&head=2")
        tab.wait_for_function("document.querySelector('#chosen').textContent === 'Layer 1, head 2'")
        assert problems == []


BACK = {
    "index.html#claim=3&scheme=NoPE": "Back to the report",
    "index.html": "Back to the report",
    "signatures.html#setting=w,%20NoPE": "Back to the figure",
}
"""Where a reader may have come from, and what the link is called."""
NOT_BESIDE = [
    "javascript:alert(1)",
    "javascript:alert(1)//a.html",
    "data:text/html,<script>alert(1)</script>.html",
    "https://evil.example/a.html",
    "//evil.example/a.html",
    "\\\\evil.example\\a.html",
    "../index.html",
    "..\\index.html",
    "%2e%2e/index.html",
    "/etc/a.html",
    "a.html?next=https://evil.example",
    "\njavascript:alert(1)#.html",
    "index.html\n",
    "<b>.html",
    "",
]


def test_an_explorer_leads_back_to_a_page_beside_it_and_to_none_else(page: Path, browser: Browser) -> None:
    for name in ("index.html", "signatures.html"):
        (page.parent / name).write_text(f"<title>{name}</title>")
    with opened(browser, page) as (tab, problems):
        home = tab.locator("#home")
        for back in (*BACK, *NOT_BESIDE):
            tab.goto("about:blank")
            tab.goto(f"{page.as_uri()}#{urlencode({'score': 'forward route', 'back': back})}")
            assert home.inner_text() == BACK.get(back, "All figures"), back
            assert home.get_attribute("href") == (back if back in BACK else "index.html")
            tab.locator("#score").select_option("reverse route")
            assert ("back=" in tab.url) == (back in BACK), "a copied address leads back, too"
            assert "back=" not in str(tab.locator("#code").text_content())
            if back in BACK:
                home.click()
                tab.wait_for_url(f"**/{back}")
        assert problems == []
