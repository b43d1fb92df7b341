"""Whether gradient alignment, route correlation and evidence go with reverse prediction: over training within a run
and across seeds, and whether they do beyond what forward prediction says already. Over settings: `signatures`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from mdm_interp import Analysis, Result, Run, Summary, TrainConfig, all_checkpoints, stages, where
from mdm_interp.experiments.claims import CONSTANT
from mdm_interp.experiments.grids import MDM_SCHEMES, WORLDS, grid
from mdm_interp.experiments.paper import CORRELATIONS, LINK_RULES, SIGNATURES, across_seeds, over_training
from mdm_interp.experiments.scope import STAGES, Moment
from mdm_interp.measures.gradients import STORAGE, direction_cosine, mean_gradient
from mdm_interp.measures.signatures import evidence, route
from mdm_interp.viz import CHANCE, GOLD, MAGENTA, PROBABILITY, SCHEME_COLORS, Panels, shown
from mdm_interp.viz.words import counted, counted_of, joined, sample_size, side_of, span

PLAIN = "rank correlation", GOLD, "diamond-open", -0.22
GIVEN = "given forward probability", MAGENTA, "circle", 0.0
NULL = "null of that: another seed's signature", CHANCE, "x-thin", 0.22
"""How correlations look: name, colour, mark, and how far below their setting they are."""


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    return [config for config in grid(seeds) if config.objective == "any_order"]


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give the signatures of those queries that training recorded the probabilities of; alignment is the cosine of the
    gradients of the mean forward and the mean reverse loss."""
    model, pairs = run.model(step), run.query_pairs()
    forward, reverse = [pair.forward for pair in pairs], [pair.reverse for pair in pairs]
    alignment = direction_cosine(mean_gradient(model, forward), mean_gradient(model, reverse), STORAGE)
    found = {"route": route(model, pairs).effect, "evidence": evidence(model, pairs, run.facts).effect}
    return [{"alignment": alignment, **found}]


def when(run: Run) -> list[Moment]:
    """Give every second checkpoint, and the stages."""
    return [*all_checkpoints(run)[::2], *stages(run)]


def summarize(result: Result) -> Summary:
    frame, by = result.frame, ("signature", "world", "scheme", "stage")
    runs = pd.concat([over_training(frame, signature) for signature in SIGNATURES])
    at_stages = pd.concat([across_seeds(frame, signature, stage) for stage in STAGES for signature in SIGNATURES])
    return Summary.of(runs, by, CORRELATIONS) + Summary.read(at_stages, by, CORRELATIONS)


def takeaway(result: Result) -> str:
    found = [
        entry for entry in result.summary.where("partial", stage="over training") if entry.null and entry.effect.n > 1
    ]
    if not found:
        return "Unknown: no signature varies by itself where forward probability leaves anything to explain."
    clear = [entry for entry in found if side_of(entry.effect, entry.null) == "above" and entry.effect.side == "above"]
    names = joined(list(dict.fromkeys(entry.of["signature"] for entry in clear)))
    answer = f"In part, {names}" if clear else "Not beyond what forward probability says"
    return (
        f"{answer}: given it, a signature's rank correlation over training with reverse probability is surely above "
        f"another seed's signature's in {counted_of(len(clear), len(found), 'cases')}; it is "
        f"{span(entry.effect for entry in found)} ({sample_size([entry.effect for entry in found])})."
    )


def draw(result: Result) -> Panels:
    """Draw the correlations over training, then the checkpoints they are of, then those across seeds."""
    panels, summary = Panels(), result.summary
    _draw_correlations(panels, summary, "over training", height=44)
    measured = where(result.frame, world="relation_cycle", stage="checkpoint")
    y: dict[str, Any] = {**PROBABILITY, "title": "reverse probability,<br>relation_cycle"}
    titles = [f"every checkpoint of {counted(measured['run'].nunique(), 'run')}" if not at else "" for at in range(3)]
    for panel, (signature, label) in zip(panels.row(titles, y=y, height=260), SIGNATURES.items(), strict=True):
        panel.x(title={"text": label, "font": {"size": 15}})
        for scheme in MDM_SCHEMES:
            group = where(measured, scheme=scheme)
            of = [f"seed {seed}, step {step}" for seed, step in zip(group["seed"], group["step"], strict=True)]
            look = {"color": SCHEME_COLORS[scheme], "size": 6, "opacity": 0.6}
            panel.dots(group, signature, "reverse_probability", name=shown(scheme), label=of, **look)
    for stage in STAGES[1:]:
        _draw_correlations(panels, summary, f"across seeds, {stage}", height=30)
    return panels


def _draw_correlations(panels: Panels, summary: Summary, stage: str, height: int) -> None:
    """Draw what is defined of a row of panels, one per signature."""
    at_stage = summary.where(stage=stage)
    known = {(entry.of["world"], entry.of["scheme"]) for entry in at_stage if entry.effect.n}
    places = {
        f"{shown(scheme)}, {world}": {"world": world, "scheme": scheme, "stage": stage}
        for world in WORLDS
        for scheme in MDM_SCHEMES
        if (world, scheme) in known
    }
    if not places:
        return
    x = {"title": "rank correlation with reverse probability", "range": [-1.1, 1.1], "zeroline": True}
    x["title"] = {"text": x["title"], "font": {"size": 15}}
    size = {name: sample_size([entry.effect for entry in at_stage.where(signature=name)]) for name in SIGNATURES}
    titles = [f"{name}, {stage}<br>{size[name]}" for name in SIGNATURES]
    row = panels.row(titles, x=x, y={"tickfont": {"size": 14}, "title": "setting"}, height=40 + height * len(places))
    for panel, signature in zip(row, SIGNATURES, strict=True):
        for look_up, kind, (name, color, symbol, shift) in (
            (summary.at, "plain", PLAIN),
            (summary.at, "partial", GIVEN),
            (summary.null, "partial", NULL),
        ):
            found = {label: look_up(kind, signature=signature, **of) for label, of in places.items()}
            found = {
                label: replace(one, low=max(one.low, -1.0), high=min(one.high, 1.0)) for label, one in found.items()
            }
            name = name if stage == "over training" else f"{name}, across seeds"
            panel.estimates(found, name=name, color=color, symbol=symbol, shift=shift)


ANALYSIS = Analysis(
    name="prediction_link",
    question="Do alignment, route correlation and evidence go with reverse prediction?",
    configs=configs,
    measure=measure,
    when=when,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    claims=LINK_RULES,
    settings={"constant": CONSTANT},
    order=90,
    detail_of="signatures",
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
