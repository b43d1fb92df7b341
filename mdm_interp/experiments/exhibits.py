"""Pages that look inside models of the figures: each of the first seed, and of its first query pair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mdm_interp.experiments.grids import scheme_grid
from mdm_interp.experiments.subjects import Demo, Lab, demos, open_probe
from mdm_interp.training.runs import Run
from mdm_interp.viz.pages.attention import attention
from mdm_interp.viz.pages.page import Page
from mdm_interp.viz.pages.routes import routes
from mdm_interp.viz.pages.trajectory import trajectory

PAGES = {
    "inside_routes.html": "A one-layer model asked forward and in reverse, over its training",
    "settings_map.html": "Settings and numbers of heads, and how well reverse queries are answered in each",
    "inside_attention.html": "Every layer and head of a demo checkpoint",
    "inside_demo_routes.html": "The demo checkpoint asked forward and in reverse",
    "inside_denoising.html": "The demo checkpoint writes a sentence from its source alone",
}
"""What each page shows."""


def write_exhibits(lab: Lab, out: Path) -> None:
    """Write the pages of those models that the run store holds; pages of others that are in `out` stay."""
    for file, page in (*_of_small_model(lab), *_of_demo(lab)):
        page.save(out / file, shared=True)


def _of_small_model(lab: Lab) -> Iterator[tuple[str, Page]]:
    (config,) = [config for config in scheme_grid(lab.seeds[:1]) if config.model.position == "rope"]
    run = Run.of(config, lab.root)
    if run.finished:
        yield "inside_routes.html", routes(run, run.query_pairs()[0])


def _of_demo(lab: Lab) -> Iterator[tuple[str, Page]]:
    demo = Demo.of(next(config for config in demos(lab.seeds) if config.format == "llada"), lab.root)
    if not demo.finished:
        return
    probe = open_probe(demo.folder, demo.folder / "facts.csv", limit=1)
    model, pair = probe.model, probe.pairs("relational")[0]
    query, mask = pair.forward, probe.model.cfg.mask_token_id
    source_only = [token if at in range(*query.source_span) else mask for at, token in enumerate(query.tokens)]
    yield "inside_attention.html", attention(model, query)
    yield "inside_demo_routes.html", routes(model, pair)
    yield "inside_denoising.html", trajectory(model, replace(query, tokens=tuple(source_only)))
