"""Route and evidence at the answer while a whole sentence is denoised from its source alone, against the same sentence
with another fact's source."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch

from mdm_interp import CheckpointAnalysis, Contrast, Probe, Query, Result, Summary, where
from mdm_interp.data.prompts import Kind
from mdm_interp.experiments.subjects import KINDS, demos
from mdm_interp.measures.trajectory import denoise_answers, other_sources, source_only, with_source
from mdm_interp.stats.resampling import FactSample
from mdm_interp.stats.tables import as_columns, estimate_in, estimates_in
from mdm_interp.viz import (
    CHANCE,
    CLUSTERS,
    FORWARD,
    PROBABILITY,
    REVERSE,
    Panel,
    Panels,
    checkpoints_and_kinds,
    draw_threads,
)
from mdm_interp.viz.words import sample_size, side_of

DIRECTIONS = {"forward": FORWARD, "reverse": REVERSE}
N_PARTS = 5
"""Equal parts of the way from all masked to all filled, `stage` in the rows."""
LAYERED = {"route": "route to the source", "evidence": "evidence"}
NULLS = {direction: f"{direction}, another fact's source" for direction in DIRECTIONS}
CAUSAL = "Causal models have no denoising trajectory: give a masked diffusion model."


def measure(probe: Probe) -> list[dict[str, Any]]:
    """Give rows per checkpoint, kind and direction: route and evidence per stage and layer, and over all layers
    together (layer null; routes averaged, evidence summed); the endings (stage null). MDMs only, twins among them.

    `value_n` and `value_null_n` count the independent clusters of facts behind a number, and `facts` and `clusters` all
    there are.
    """
    cfg, special = probe.model.cfg, set(probe.model.tokenizer.all_special_ids)
    if cfg.is_causal:
        return []
    asked: dict[tuple[Kind, str], Contrast[list[Query | None]]] = {}
    for kind in KINDS:
        others = other_sources(probe.pairs(kind), cfg.n_ctx)
        for direction in DIRECTIONS:
            own = [source_only(getattr(pair, direction), cfg, special) for pair in probe.pairs(kind)]
            null = [with_source(query, source) if source else None for query, source in zip(own, others, strict=True)]
            asked[kind, direction] = Contrast([*own], null)
    # With the words masked, many are the same. Shortest first: neighbours need little padding.
    different = {query for of in asked.values() for query in (*of.effect, *of.null) if query}
    ordered = sorted(different, key=lambda query: (len(query.tokens), query.tokens, query.answer))
    columns = denoise_answers(probe.model, ordered, N_PARTS).columns
    values = dict(zip(ordered, torch.stack(list(columns.values()), dim=1), strict=True))
    nothing, rows = torch.full((len(columns),), torch.nan, dtype=torch.float64), []
    for (kind, direction), of in asked.items():
        sample = FactSample.of(probe.pairs(kind))
        estimates = (
            sample.mean(torch.stack([values[query] if query else nothing for query in queries])).estimates()
            for queries in (of.effect, of.null)
        )
        for (name, stage, layer), effect, null in zip(columns, *estimates, strict=True):
            about = {"kind": kind, "direction": direction, "measure": name, "stage": stage, "layer": layer}
            rows.append(about | sample.counts | as_columns("value", effect) | as_columns("value_null", null))
    return rows


def summarize(result: Result) -> Summary:
    if result.frame.empty:
        return Summary()
    by, together = ("checkpoint", "kind", "direction", "measure"), result.frame[result.frame["layer"].isna()]
    staged, endings = together[together["stage"].notna()], together[together["stage"].isna()]
    return Summary.read(staged, (*by, "stage"), ("value",)) + Summary.read(endings, by, ("value",))


def takeaway(result: Result) -> str:
    if result.frame.empty:
        return CAUSAL
    summary = result.summary.where("value")

    def apart(measure: str) -> str:
        """Say at how many stages a reverse query's measure is above that of another fact's source."""
        found = summary.where(direction="reverse", measure=measure)
        sides = [side_of(entry.effect, entry.null) for entry in found]
        clear = sides.count("above")
        return "at every stage" if clear == len(sides) else f"at {clear} of {len(sides)}" if clear else "at none"

    right = {direction: summary.where(direction=direction, measure="correct") for direction in DIRECTIONS}
    least, most = (
        end(entry.effect.value for entry in right[direction]) for end, direction in ((min, "forward"), (max, "reverse"))
    )
    size = sample_size([entry.effect for entry in summary.where(measure="correct")], CLUSTERS)
    return (
        f"In reverse, evidence is surely above that with another fact's source {apart('evidence')}, the route "
        f"{apart('route')}. {'Still, at' if most < least else 'At'} most {most:.0%} of the answer's tokens come out "
        f"right, forward at least {least:.0%} ({size})."
    )


def draw(result: Result) -> Panels:
    """Draw how far each checkpoint's route and evidence are above their nulls, and how it ends; and below each by
    itself."""
    panels, frame = Panels(), result.frame
    if frame.empty:
        (panel,) = panels.row([""])
        panel.say(CAUSAL)
        return panels
    above = frame["value"].astype(float) - frame["value_null"].astype(float)
    frame = frame.assign(way=(frame["stage"] + 0.5) / N_PARTS, above=above)
    draw_overview(panels, result, frame)
    routes = where(frame[frame["layer"].notna()], measure="route", direction="reverse")
    limit = float(routes["above"].abs().max()) if routes["above"].notna().any() else 1.0
    places = checkpoints_and_kinds(frame)
    top: list[Panel] = []
    for checkpoint, kind in places:
        last = (checkpoint, kind) == places[-1]
        titles = [f"{checkpoint}, {kind}", "", "reverse route above its null" if not top else ""]
        row = panels.row(titles, widths=[1.25, 1.25, 1.0], height=150, one_y=False, ticks=last)
        together = where(frame[frame["layer"].isna()], checkpoint=checkpoint, kind=kind)
        for direction, color in DIRECTIONS.items():
            for column, name, dash in (("value_null", NULLS[direction], "dot"), ("value", direction, "solid")):
                for panel, measure in zip(row, LAYERED, strict=False):
                    rows = estimates_in(where(together, measure=measure, direction=direction), column)
                    panel.curve(rows, "way", name=name, color=color, dash=dash)
        table = where(routes, checkpoint=checkpoint, kind=kind).pivot(index="layer", columns="way", values="above")
        row[2].matrix(table, limit=limit, scale="", hover="layer %{y}, %{x:.1f} of the way: %{z:.3g}")
        top = top or row
        for panel, first, title in zip(row, top, [*LAYERED.values(), "layer"], strict=True):
            panel.x(title="share of the way" if last else None, range=[0, 1])
            panel.y(title={"text": title, "font": {"size": 15}}, nticks=5)
            panel.y(matches=None if panel is first or title == "layer" else f"y{first.axes}")
    return panels


def draw_overview(panels: Panels, result: Result, frame: pd.DataFrame) -> None:
    """Draw what all checkpoints have above their nulls over the way, and how many tokens come out right."""
    together = frame[frame["layer"].isna()]
    size = sample_size((entry.effect for entry in result.summary.where(measure="correct")), CLUSTERS)
    titles = [
        "route above its null,<br>a line per checkpoint",
        "evidence above its null,<br>a line per checkpoint",
        f"tokens right<br>{size}",
    ]
    route, evidence, right = panels.row(titles, one_y=False, height=330)
    for panel, measure in ((route, "route"), (evidence, "evidence")):
        panel.x(title="share of the way", range=[0, 1])
        panel.y(title="share of attention" if measure == "route" else "logits")
        for direction, color in DIRECTIONS.items():
            rows = where(together, measure=measure, direction=direction)
            draw_threads(panel, rows, "way", "above", name=f"{direction} query", color=color)
        panel.level(0.0, name="null: another fact's source", color=CHANCE)
    right.x(**PROBABILITY, title="share of the answer's tokens")
    places = checkpoints_and_kinds(frame)
    for place, direction in enumerate(DIRECTIONS):
        for column, name, color, symbol in (
            ("value", f"{direction} query", DIRECTIONS[direction], "circle"),
            ("value_null", "null: another fact's source", CHANCE, "x-thin"),
        ):
            at = {"direction": direction, "measure": "correct"}
            rows = where(together, **at).to_dict("records")
            found = {(row["checkpoint"], row["kind"]): estimate_in(row, column) for row in rows}
            estimates = {f"{of[0]},<br>{of[1]}": found[of] for of in places if of in found}
            shift = 0.3 * place - 0.15 + 0.1 * (column == "value_null")
            right.estimates(estimates, name=name, color=color, symbol=symbol, size=7, shift=shift)
    right.y(tickfont={"size": 12})


ANALYSIS = CheckpointAnalysis(
    name="trajectory",
    question="What do route and evidence do while a sentence is denoised from its source?",
    configs=demos,
    measure=measure,
    of_twins=True,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    settings={"stages": N_PARTS},
    order=250,
    detail_of="large_model_prediction",
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
