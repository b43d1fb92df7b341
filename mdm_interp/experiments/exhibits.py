"""Pages that look inside models of the figures: small ones, each of the first seed, and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from mdm_interp.experiments.findings import NAMED_SETTINGS, settings_of
from mdm_interp.experiments.grids import depth_grid, head_grid, objective_grid, pool_grid, scheme_grid
from mdm_interp.experiments.scope import about
from mdm_interp.experiments.subjects import Demo, Lab, Probe, demos, open_probe
from mdm_interp.training.runs import Run
from mdm_interp.viz.pages.attention import attention
from mdm_interp.viz.pages.explorer import explore
from mdm_interp.viz.pages.page import Page, run_of
from mdm_interp.viz.pages.routes import evenly, routes
from mdm_interp.viz.pages.subject import Subject
from mdm_interp.viz.pages.trajectory import trajectory


def explorer_of(setting: str) -> str:
    """Return the file of the explorer of one of :data:`~mdm_interp.experiments.findings.NAMED_SETTINGS`."""
    return f"explore_{setting.lower().replace(' ', '_')}.html"


PAGES = {
    **{explorer_of(name): f"Every head of a small model: {name}" for name in NAMED_SETTINGS},
    "settings_map.html": "Settings and numbers of heads, and how well reverse queries are answered in each",
    "inside_attention.html": "Every layer and head of a demo checkpoint",
    "inside_demo_routes.html": "The demo checkpoint asked forward and in reverse",
    "inside_denoising.html": "The demo checkpoint writes a sentence from its source alone",
}
"""What each page shows."""
GRIDS = (scheme_grid, head_grid, depth_grid, pool_grid, objective_grid)
"""Where small models are looked for."""
PAIRS, STEPS = 6, 4
"""How many query pairs and checkpoints of a small model its explorer shows: enough to look around."""


def make_exhibits(lab: Lab) -> Iterator[tuple[str, Page]]:
    """Give the pages of those models that the run store holds, each with its file name."""
    for file, page in chain(_of_small_models(lab), _of_demo(lab)):
        yield file, replace(page, home="index.html")


def write_probed(
    probe: Probe, out: Path, n_pairs: int, checkpoint: str | Path, twin: str | Path | None = None, **loading: Any
) -> dict[str, str]:
    """Write the explorer of a checkpoint, and that of its twin, each asked its own first positional pairs.

    Args:
        checkpoint, twin, loading: As of :func:`~mdm_interp.experiments.subjects.open_probe`.

    Returns:
        What each file shows.

    Raises:
        UserError: a model has so many heads that a page cannot hold these pairs.
    """
    asked = {"explorer.html": (probe, Subject.of_checkpoint(probe.model, checkpoint, **loading))}
    if probe.twin is not None and twin is not None:
        of_twin = Subject.of_checkpoint(probe.twin.model, twin, dtype=loading.get("dtype"))
        asked["twin_explorer.html"] = (probe.twin, of_twin)
    for file, (one, subject) in asked.items():
        page = explore({one.name: subject}, one.pairs("positional")[:n_pairs])
        replace(page, home="index.html").save(out / file, shared=True)
    return {file: f"Every head of {one.name}" for file, (one, _) in asked.items()}


def explored(out: Path) -> dict[str, str]:
    """Return the runs whose explorers are in a folder: digest to file."""
    shown = {path.name: run_of(path) for path in sorted(out.glob("explore_*.html"), reverse=True)}
    return {run: file for file, run in shown.items() if run}


def _of_small_models(lab: Lab) -> Iterator[tuple[str, Page]]:
    """Explore the first seed's run of each named setting that the figures are of."""
    configs = {config: None for grid in GRIDS for config in grid(lab.seeds) if config.seed == lab.seeds[0]}
    shown = dict[str, Run]()
    for run in (Run.of(config, lab.root) for config in configs):
        for name in settings_of(about(run)) if run.finished else ():
            shown.setdefault(name, run)
    for name, run in shown.items():
        steps = evenly(run.steps, STEPS)
        page = explore(run, run.query_pairs(n_contexts=1)[:PAIRS], steps=steps)
        yield explorer_of(name), replace(page, run=run.folder.name)


def _of_demo(lab: Lab) -> Iterator[tuple[str, Page]]:
    demo = Demo.of(next(config for config in demos(lab.seeds) if config.format == "llada"), lab.root)
    if not demo.finished:
        return
    probe = open_probe(demo.folder, demo.folder / "facts.csv", limit=1)
    model, pair = probe.model, probe.pairs("relational")[0]
    subject = Subject.of_checkpoint(model, Path(lab.root) / demo.folder.relative_to(Path(lab.root).absolute()))
    query, mask = pair.forward, model.cfg.mask_token_id
    source_only = [token if at in range(*query.source_span) else mask for at, token in enumerate(query.tokens)]
    yield "inside_attention.html", attention(subject, query)
    yield "inside_demo_routes.html", routes(subject, pair)
    yield "inside_denoising.html", trajectory(subject, replace(query, tokens=tuple(source_only)))
