"""Pages that look inside models of the figures: each of the first seed, and of its first query pair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mdm_interp.analysis import Lab
from mdm_interp.presets import scheme_grid
from mdm_interp.probing import demo_folder, demos, open_probe
from mdm_interp.runs import Run
from mdm_interp.viz.attention_page import attention
from mdm_interp.viz.page import Page
from mdm_interp.viz.routes_page import routes
from mdm_interp.viz.trajectory_page import trajectory


def write_exhibits(lab: Lab, out: Path) -> dict[str, str]:
    """Write the pages of those models that the run store holds.

    Returns:
        File names, with what each page shows.
    """
    shown = {}
    for file, sentence, page in (*_of_small_model(lab), *_of_demo(lab)):
        page.save(out / file, shared=True)
        shown[file] = sentence
    return shown


def _of_small_model(lab: Lab) -> Iterator[tuple[str, str, Page]]:
    (config,) = [config for config in scheme_grid(lab.seeds[:1]) if config.model.position == "rope"]
    run = Run.of(config, lab.root)
    if run.finished:
        page = routes(run, run.query_pairs()[0])
        yield "inside_routes.html", "A one-layer model asked forward and in reverse, over its training", page


def _of_demo(lab: Lab) -> Iterator[tuple[str, str, Page]]:
    (config,) = [config for config in demos(lab.seeds) if config.format == "llada"]
    folder = demo_folder(config, lab.root)
    if not (folder / "config.json").exists():
        return
    probe = open_probe(folder, folder / "facts.csv", limit=1, device=lab.device)
    model, pair = probe.model, probe.pairs("relational")[0]
    query, mask = pair.forward, probe.model.cfg.mask_token_id
    source_only = [token if at in range(*query.source_span) else mask for at, token in enumerate(query.tokens)]
    denoised = trajectory(model, replace(query, tokens=tuple(source_only)))
    yield "inside_attention.html", "Every layer and head of a demo checkpoint", attention(model, query)
    yield "inside_demo_routes.html", "The demo checkpoint asked forward and in reverse", routes(model, pair)
    yield "inside_denoising.html", "The demo checkpoint writes a sentence from its source alone", denoised
