"""Route and evidence at the answer while a whole sentence is denoised from its source alone, against the same sentence
with another fact's source."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from mdm_interp.config import ModelConfig
from mdm_interp.data.prompts import Kind
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.experiments.analysis import CheckpointAnalysis
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe, demos
from mdm_interp.measures.trajectory import Denoised, denoise_answers
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.resampling import FactSample
from mdm_interp.stats.tables import estimate_in, where
from mdm_interp.viz.plots import add_curve, add_estimates, add_matrix
from mdm_interp.viz.theme import FORWARD, REVERSE, legend_at

DIRECTIONS = {"forward": FORWARD, "reverse": REVERSE}
STAGES = 5
"""Equal parts of the way from all masked to all filled."""
LAYERED = {"route": "route to the source", "evidence": "evidence"}
ENDINGS = {"correct": "tokens<br>right", "probability": "true ones'<br>probability", "filled_at": "filled<br>at"}


def source_only(query: Query, cfg: ModelConfig, special: set[int]) -> Query:
    """The query with everything masked but its source, special tokens and, in a shifted model, position 0, which has no
    prediction."""
    mask = query.tokens[query.answer_span[0]]
    given = {*range(*query.source_span), *range(-(cfg.readout_shift or 0))}
    tokens = [token if at in given or token in special else mask for at, token in enumerate(query.tokens)]
    return replace(query, tokens=tuple(tokens))


def with_source(query: Query, source: tuple[int, ...]) -> Query:
    """The query with another source, of any length."""
    (start, stop), (first, last) = query.answer_span, query.source_span
    tokens = (*query.tokens[:first], *source, *query.tokens[last:])
    moved = len(source) - (last - first) if start >= last else 0
    return Query(tokens, query.answer, (start + moved, stop + moved), (first, first + len(source)))


def other_sources(pairs: Sequence[QueryPair], n_ctx: int) -> list[tuple[int, ...] | None]:
    """Choose for every pair the source of a fact that is asked for the same side and shares no name with it, directly
    or through other facts; None where there is none, or none that the context holds."""
    chooser, clusters = random.Random(0), FactSample.of(pairs).clusters.tolist()
    known = dict.fromkeys(
        (pair.side, cluster, pair.forward.source) for pair, cluster in zip(pairs, clusters, strict=True)
    )
    chosen = []
    for pair, own in zip(pairs, clusters, strict=True):
        room = n_ctx - max(len(pair.forward.tokens), len(pair.reverse.tokens)) + len(pair.forward.source)
        others = [
            source for side, cluster, source in known if side == pair.side and cluster != own and len(source) <= room
        ]
        chosen.append(chooser.choice(others) if others else None)
    return chosen


def measure(probe: Probe) -> list[dict[str, Any]]:
    """Give rows per checkpoint, kind and direction: route and evidence per stage and layer, and over all layers
    together (layer null; routes averaged, evidence summed); the endings (stage null). MDMs only, twins among them.

    `n` and `null_n` count the independent clusters of facts behind a number, and `facts` and `clusters` all there are.
    """
    return [] if probe.model.cfg.is_causal else list(rows_of(probe))


def rows_of(probe: Probe) -> Iterator[dict[str, Any]]:
    cfg, special = probe.model.cfg, set(probe.model.tokenizer.all_special_ids)
    asked: dict[tuple[Kind, str], list[Query]] = {}
    controls: dict[tuple[Kind, str], list[Query | None]] = {}
    for kind in KINDS:
        others = other_sources(probe.pairs(kind), cfg.n_ctx)
        for direction in DIRECTIONS:
            queries = [source_only(getattr(pair, direction), cfg, special) for pair in probe.pairs(kind)]
            asked[kind, direction] = queries
            controls[kind, direction] = [
                with_source(query, source) if source else None for query, source in zip(queries, others, strict=True)
            ]
    # With the words masked, many are the same. Shortest first: neighbours need little padding.
    different = {query for of_place in (*asked.values(), *controls.values()) for query in of_place if query}
    ordered = sorted(different, key=lambda query: (len(query.tokens), query.tokens, query.answer))
    number = {query: i for i, query in enumerate(ordered)}
    measured = columns(denoise_answers(probe.model, ordered, STAGES))
    values = torch.stack(list(measured.values()), dim=1)
    values = torch.cat([values, values.new_full((1, len(measured)), torch.nan)])  # the last: of no query
    for kind, direction in asked:
        sample = FactSample.of(probe.pairs(kind))
        own, null = (
            sample.mean(values[[number[query] if query else -1 for query in of[kind, direction]]]).estimates()
            for of in (asked, controls)
        )
        for at, estimate, control in zip(measured, own, null, strict=True):
            yield {
                "kind": kind,
                "direction": direction,
                **dict(zip(("measure", "stage", "layer"), at, strict=True)),
                **sample.counts,
                **vars(estimate),
                **{f"null_{name}": value for name, value in vars(control).items()},
            }


def columns(denoised: Denoised) -> dict[tuple[str, int | None, int | None], Float[Tensor, "query"]]:
    """Values by measure, stage and layer."""
    found: dict[tuple[str, int | None, int | None], Tensor] = {}
    for name, together in (("route", torch.mean), ("evidence", torch.sum)):
        values = getattr(denoised, name).double()
        for stage in range(values.shape[1]):
            found[name, stage, None] = together(values[:, stage], dim=-1)
            found |= {(name, stage, layer): values[:, stage, layer] for layer in range(values.shape[2])}
    return found | {(name, None, None): getattr(denoised, name) for name in ENDINGS}


def summarize(result: Result) -> dict[str, Estimate]:
    summary = {}
    for row in result.rows:
        if row["layer"] is None:
            stage = "" if row["stage"] is None else f", stage {row['stage'] + 1} of {STAGES}"
            name = f"{row['checkpoint']} / {row['kind']} / {row['direction']} / {row['measure']}{stage}"
            summary[name], summary[f"{name} / null"] = estimate_in(row), estimate_in(row, "null_")
    return summary


def takeaway(result: Result) -> str:
    if result.frame.empty:
        return "Causal models have no denoising trajectory: give a masked diffusion model."
    said = []
    for checkpoint, kind in panels(result):

        def right(direction: str, place: str = f"{checkpoint} / {kind}") -> str:
            name = f"{place} / {direction} / correct"
            return f"{direction} {result.summary[name].value:.2f} ({result.summary[f'{name} / null'].value:.2f})"

        said.append(f"{checkpoint}, {kind}: {', '.join(map(right, DIRECTIONS))}")
    return (
        "Share of the answer's tokens that come out right when all but the source is masked (in brackets: with another "
        f"fact's source). {'; '.join(said)}. Route and evidence are of the facts whose answer is still masked. "
        "With its words masked, a positional reverse query differs from a relational one in the number of tokens only."
    )


def panels(result: Result) -> list[tuple[str, str]]:
    return list(dict.fromkeys(zip(result.frame["checkpoint"], result.frame["kind"], strict=True)))


def draw(result: Result) -> go.Figure:
    if result.frame.empty:
        return go.Figure(layout={"height": 300})
    rows = panels(result)
    height = 270 * len(rows)
    figure = make_subplots(
        len(rows),
        4,
        column_widths=[0.27, 0.27, 0.23, 0.23],
        subplot_titles=[
            text
            for checkpoint, kind in rows
            for text in (f"{checkpoint}, {kind}", "", "", "reverse route above its null")
        ],
        horizontal_spacing=0.07,
        vertical_spacing=80 / height,
    )
    frame = result.frame.assign(way=(result.frame["stage"] + 0.5) / STAGES)
    routes = where(frame[frame["layer"].notna()], measure="route", direction="reverse")
    routes = routes.assign(above=routes["value"] - routes["null_value"])
    limit = float(routes["above"].abs().max()) if routes["above"].notna().any() else 1.0
    for row, (checkpoint, kind) in enumerate(rows, 1):
        of_panel = where(frame, checkpoint=checkpoint, kind=kind)
        _draw_means(figure, pd.DataFrame(of_panel[of_panel["layer"].isna()]), row)
        above = where(routes, checkpoint=checkpoint, kind=kind).pivot(index="layer", columns="way", values="above")
        add_matrix(
            figure,
            above.to_numpy(),
            x=[f"{way:.1f}" for way in above.columns],
            y=[f"{int(layer)}" for layer in above.index],
            limit=limit,
            row=row,
            col=4,
            colorbar={"len": 1 / len(rows), "y": 1, "yanchor": "top", "thickness": 12} if row == 1 else None,
        )
        for col, name in enumerate([*LAYERED.values(), "", "layer"], 1):
            figure.update_yaxes(title_text=name, row=row, col=col)
    for col in (1, 2, 4):
        figure.update_xaxes(title_text="share of the way", row=len(rows), col=col)
    for col in (1, 2):
        figure.update_xaxes(range=[0, 1], col=col)
    figure.update_yaxes(range=[-0.04, 1.04], col=3)
    figure.update_layout(legend=legend_at(0.5, -80 / height))
    figure.update_layout(height=height + 330)
    return figure


def _draw_means(figure: go.Figure, of_panel: pd.DataFrame, row: int) -> None:
    """Route and evidence over the way, and how it ends, each with its null."""
    for direction, color in DIRECTIONS.items():
        for prefix, dash, name in (("null_", "dot", f"{direction}, another fact's source"), ("", "solid", direction)):
            for col, measure in enumerate(LAYERED, 1):
                of_measure = where(of_panel, measure=measure, direction=direction).to_dict("records")
                points = [{"way": at["way"], **vars(estimate_in(at, prefix))} for at in of_measure]
                curve = pd.DataFrame([point for point in points if point["n"]], columns=list(points[0]))
                legend = "legend" if (row, col) == (1, 1) else None
                add_curve(figure, curve, "way", name=name, color=color, row=row, col=col, dash=dash, legend=legend)
            ends = {
                label: estimate_in(where(of_panel, measure=measure, direction=direction).to_dict("records")[0], prefix)
                for measure, label in ENDINGS.items()
            }
            symbol = "line-ew" if prefix else "circle"
            add_estimates(figure, ends, name=name, color=color, symbol=symbol, upright=True, row=row, col=3)


ANALYSIS = CheckpointAnalysis(
    name="trajectory",
    question="What do route and evidence do while a sentence is denoised from its source?",
    configs=demos,
    measure=measure,
    of_twins=True,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    settings={"stages": STAGES},
    order=250,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
