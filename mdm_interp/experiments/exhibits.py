"""Pages that look inside models of the figures: small ones, each of the first seed, and checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from mdm_interp.config import TrainConfig
from mdm_interp.errors import UserError
from mdm_interp.experiments.scope import about, scope_key, stages
from mdm_interp.experiments.subjects import Demo, Lab, Probe, demos, open_probe
from mdm_interp.measures.trajectory import source_only
from mdm_interp.training.runs import Run
from mdm_interp.viz.pages.attention import attention
from mdm_interp.viz.pages.explorer import explore
from mdm_interp.viz.pages.page import Page
from mdm_interp.viz.pages.routes import evenly, routes
from mdm_interp.viz.pages.subject import Subject
from mdm_interp.viz.pages.trajectory import trajectory

PAGES = {
    "settings_map.html": "Settings and numbers of heads, and how well reverse queries are answered in each",
    "inside_attention.html": "Every layer and head of a demo checkpoint",
    "inside_demo_routes.html": "The demo checkpoint asked forward and in reverse",
    "inside_denoising.html": "The demo checkpoint writes a sentence from its source alone",
}
"""What each page shows that is not an explorer of a run."""
PAIRS, STEPS = 6, 4
"""How many query pairs of a small model its explorer shows, and how many checkpoints besides those of its stages:
enough to look around."""
SCORE_OF_CLAIM = {
    "0": "reverse attribution",
    "1": "reverse attribution",
    "2": "reverse evidence",
    "3": "reverse route",
    "4": "reverse evidence",
    "5": "reverse route",
    "6": "storage alignment",
    "7": "reverse attribution",
    "8": "reverse attribution",
    "9": "reverse route",
}
"""Which of :data:`~mdm_interp.measures.head_scores.SCORES` a verdict leads to: what its claim speaks of, in the reverse
query; of claims about predictions (0, 1, 7 and 8) what a head adds to the answer."""


def make_exhibits(lab: Lab, configs: Iterable[TrainConfig]) -> Iterator[tuple[str, Page]]:
    """Give the pages of those models that the run store holds, each with its file name: an explorer of one run of each
    setting among the configs, that of the first seed, and pages of a demo checkpoint."""
    for file, page in chain(_of_small_models(lab, configs), _of_demo(lab)):
        yield file, replace(page, home="index.html")


def explorer_of(digest: str) -> str:
    """Return the file of a run's explorer."""
    return f"explore_{digest}.html"


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
    files = sorted(path.name for path in out.glob(explorer_of("*")))
    return {file.removeprefix("explore_").removesuffix(".html"): file for file in files}


def _of_small_models(lab: Lab, configs: Iterable[TrainConfig]) -> Iterator[tuple[str, Page]]:
    shown = dict[tuple[Any, ...], Run]()
    for config in sorted(configs, key=lambda config: config.seed):
        if (run := Run.of(config, lab.root)).finished:
            shown.setdefault(scope_key(about(run)), run)
    for run in shown.values():
        of_stages = (max(weights, key=weights.__getitem__) for _, weights in stages(run))
        steps = sorted({*evenly(run.steps, STEPS), *of_stages})
        with contextlib.suppress(UserError):  # a model of one's own can be more than a page holds
            yield explorer_of(run.folder.name), explore(run, run.query_pairs(n_contexts=1)[:PAIRS], steps=steps)


def _of_demo(lab: Lab) -> Iterator[tuple[str, Page]]:
    demo = Demo.of(next(config for config in demos(lab.seeds) if config.format == "llada"), lab.root)
    if not demo.finished:
        return
    probe = open_probe(demo.folder, demo.folder / "facts.csv", limit=1)
    model, pair = probe.model, probe.pairs("relational")[0]
    subject = Subject.of_checkpoint(model, Path(lab.root) / demo.folder.relative_to(Path(lab.root).absolute()))
    yield "inside_attention.html", attention(subject, pair.forward)
    yield "inside_demo_routes.html", routes(subject, pair)
    yield "inside_denoising.html", trajectory(subject, source_only(pair.forward, model.cfg))
