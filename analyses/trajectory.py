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
from mdm_interp.viz import FORWARD, PROBABILITY, REVERSE, Panel, Panels, checkpoints_and_kinds

DIRECTIONS = {"forward": FORWARD, "reverse": REVERSE}
N_PARTS = 5
"""Equal parts of the way from all masked to all filled, `stage` in the rows."""
LAYERED = {"route": "route to the source", "evidence": "evidence"}
ENDINGS = {"correct": "tokens<br>right", "probability": "true ones'<br>probability", "filled_at": "filled<br>at"}


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
        return "Causal models have no denoising trajectory: give a masked diffusion model."
    said = []
    for checkpoint, kind in checkpoints_and_kinds(result.frame):
        of = {"checkpoint": checkpoint, "kind": kind, "measure": "correct"}
        right = {direction: result.summary.contrast("value", direction=direction, **of) for direction in DIRECTIONS}
        told = [f"{direction} {one.effect.value:.2f} ({one.null.value:.2f})" for direction, one in right.items()]
        said.append(f"{checkpoint}, {kind}: {', '.join(told)}")
    return (
        "Share of the answer's tokens that come out right when all but the source is masked (in brackets: with another "
        f"fact's source). {'; '.join(said)}. Route and evidence are of the facts whose answer is still masked. "
        "With its words masked, a positional reverse query differs from a relational one in the number of tokens only."
    )


def draw(result: Result) -> Panels:
    panels, frame = Panels(), result.frame
    if frame.empty:
        return panels
    above = frame["value"].astype(float) - frame["value_null"].astype(float)
    frame = frame.assign(way=(frame["stage"] + 0.5) / N_PARTS, above=above)
    routes = where(frame[frame["layer"].notna()], measure="route", direction="reverse")
    limit = float(routes["above"].abs().max()) if routes["above"].notna().any() else 1.0
    places = checkpoints_and_kinds(frame)
    for checkpoint, kind in places:
        last = (checkpoint, kind) == places[-1]
        titles = [f"{checkpoint}, {kind}", "", "", "reverse route above its null"]
        row = panels.row(titles, widths=[1.25, 1.25, 1.0, 1.0], height=210, one_y=False, ticks=last, ticks_height=50)
        together = where(frame[frame["layer"].isna()], checkpoint=checkpoint, kind=kind)
        for direction in DIRECTIONS:
            _draw_means(row, where(together, direction=direction), direction)
        table = where(routes, checkpoint=checkpoint, kind=kind).pivot(index="layer", columns="way", values="above")
        row[3].matrix(table, limit=limit, scale="", hover="layer %{y}, %{x:.1f} of the way: %{z:.3g}")
        for panel, title in zip(row, [*LAYERED.values(), None, "layer"], strict=True):
            panel.x(title="share of the way" if title and last else None, range=[0, 1] if title else None)
            panel.y(title=title)
        row[2].y(**PROBABILITY)
    return panels


def _draw_means(row: list[Panel], frame: pd.DataFrame, direction: str) -> None:
    """Draw one direction's route and evidence over the way, and how it ends, each with its null."""
    color, endings = DIRECTIONS[direction], frame[frame["stage"].isna()].to_dict("records")
    for column, name, dash, symbol in (
        ("value_null", f"{direction}, another fact's source", "dot", "line-ew"),
        ("value", direction, "solid", "circle"),
    ):
        for panel, measure in zip(row, LAYERED, strict=False):
            panel.curve(estimates_in(where(frame, measure=measure), column), "way", name=name, color=color, dash=dash)
        ends = {ENDINGS[ending["measure"]]: estimate_in(ending, column) for ending in endings}
        row[2].estimates(ends, name=name, color=color, symbol=symbol, upright=True)


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
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
