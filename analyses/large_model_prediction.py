"""What checkpoints answer about natural-language facts, forward and in reverse: exact match, log-likelihood and rank of
whole names, in every order of filling them in, whether or not the number of tokens is known."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from numpy import ndarray
from plotly.subplots import make_subplots

from mdm_interp.data.prompts import Kind, render, right_answers
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.experiments.analysis import CheckpointAnalysis
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe, demos
from mdm_interp.inference.prediction import Filled, infill, infill_any_length, orders, predict
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.resampling import FactSample
from mdm_interp.stats.tables import estimate_in, where
from mdm_interp.viz.plots import add_estimates
from mdm_interp.viz.theme import CHANCE, FORWARD, REVERSE, legend_at

Direction = Literal["forward", "reverse"]
Side = Literal["left", "right"]

DIRECTIONS: dict[Direction, str] = {"forward": FORWARD, "reverse": REVERSE}
SIDES: dict[Side, str] = {"left": "circle", "right": "diamond-open"}
MEASURES = {
    "exact match": "exact match (share of facts)",
    "log-likelihood": "log-likelihood (nats per answer)",
    "rank": "rank of the worst token (geometric mean)",
}
LABELS = {
    ("one_shot", "known"): "one shot",
    ("confidence", "known"): "confidence",
    ("left_to_right", "known"): "left to right",
    ("one_shot", "unknown"): "one shot, length unknown",
    ("confidence", "unknown"): "confidence, length unknown",
    ("left_to_right", "unknown"): "left to right, length unknown",
}


@dataclass(frozen=True)
class Question:
    """One query and what it stands for."""

    query: Query
    pair: QueryPair
    """The pair that it is of."""
    kind: Kind
    direction: Direction
    asked: Side
    """Which entity of the fact is the answer."""
    ends: frozenset[int] = frozenset()
    """For a causal model: the tokens that end the answer."""


def questions(probe: Probe) -> list[Question]:
    """Both queries of every pair."""
    asked = []
    for kind in KINDS:
        prompts = probe.prompts[kind]
        for pair, template in zip(prompts.pairs, prompts.templates, strict=True):
            for direction in DIRECTIONS:
                query = pair.forward if direction == "forward" else pair.reverse
                swapped = direction == "reverse" and not pair.shared
                side: Side = ("left" if pair.side == "right" else "right") if swapped else pair.side
                ends = sentence_ends(probe, kind, pair, template, direction) if probe.model.cfg.is_causal else ()
                asked.append(Question(query, pair, kind, direction, side, frozenset(ends)))
    return asked


def sentence_ends(probe: Probe, kind: Kind, pair: QueryPair, template: int, direction: Direction) -> set[int]:
    """The token that follows a causal query's answer in its sentence, and the token that ends a text."""
    table, tokenizer = probe.prompts[kind].table, probe.model.tokenizer
    values, stated = table.rows[pair.fact], table.templates.templates[template]
    sentence, query = (stated.forward, pair.forward) if direction == "forward" else (stated.reverse, pair.reverse)
    if direction == "reverse" and kind == "positional":
        left, right = table.templates.entities
        sentence, values = stated.forward, {**values, left: values[right], right: values[left]}
    tokens = tokenizer(render(sentence, values)[0])["input_ids"]
    after = tokens[query.answer_span[1] : query.answer_span[1] + 1]
    return {*after, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}


def other_answers(asked: Sequence[Question], *, same_length: bool) -> list[list[tuple[int, ...]]]:
    """List for every question the answers of facts that share no name with its own, directly or through other facts: a
    sibling's name would be no mistake. They are the null."""
    clusters = FactSample.of([question.pair for question in asked]).clusters.tolist()
    pool: dict[Side, dict[tuple[int, tuple[int, ...], tuple[int, ...]], None]] = {side: {} for side in SIDES}
    for question, cluster in zip(asked, clusters, strict=True):
        pool[question.asked][cluster, question.query.source, question.query.answer] = None
    return [
        [
            answer
            for cluster, _, answer in pool[question.asked]
            if cluster != own and (not same_length or len(answer) == len(question.query.answer))
        ]
        for question, own in zip(asked, clusters, strict=True)
    ]


def with_answer(query: Query, answer: tuple[int, ...], causal: bool) -> Query:
    """The query with another true answer of the same length; a causal model's holds it unmasked."""
    tokens = (*query.tokens[: query.answer_span[0]], *answer) if causal else query.tokens
    return replace(query, tokens=tokens, answer=answer)


def answer_all(
    probe: Probe, asked: Sequence[Question]
) -> Iterator[tuple[str, str, str, Float[ndarray, "question"], Float[ndarray, "question"]]]:
    """Give order, length, measure, what each question's answer gets, and what another fact's would get: NaN where there
    is none. For an exact match that is the share of other answers that were filled in."""
    model = probe.model
    alike, every = (other_answers(asked, same_length=same) for same in (True, False))
    chooser = random.Random(0)
    controls = {
        i: with_answer(asked[i].query, chooser.choice(names), model.cfg.is_causal)
        for i, names in enumerate(alike)
        if names
    }
    queries, ends = [question.query for question in asked], [question.ends for question in asked]
    longest = max(len(query.answer) for query in queries)
    for order in orders(model.cfg):
        known = infill(model, queries, order)
        yield order, "known", "exact match", *matches(known, queries, alike)
        guessed = infill_any_length(model, queries, order, longest=longest, ends=ends)
        yield order, "unknown", "exact match", *matches(guessed, queries, every)
        read = predict(model, [*queries, *controls.values()], order)
        for measure, values in (("log-likelihood", read.log_probability), ("rank", read.rank)):
            own, control = values.double().numpy()[: len(queries)], np.full(len(queries), np.nan)
            control[list(controls)] = values.double().numpy()[len(queries) :]
            yield order, "known", measure, own, control


def matches(
    filled: Sequence[Filled], queries: Sequence[Query], others: Sequence[Sequence[tuple[int, ...]]]
) -> tuple[Float[ndarray, "question"], Float[ndarray, "question"]]:
    """Whether each filling is the answer, or another that the facts give to the same words; and the share of other
    facts' answers that it is."""
    own = [float(answer.tokens in right) for answer, right in zip(filled, right_answers(queries), strict=True)]
    share = [
        names.count(answer.tokens) / len(names) if names else np.nan
        for answer, names in zip(filled, others, strict=True)
    ]
    return np.array(own), np.array(share)


def measure(probe: Probe) -> list[dict[str, Any]]:
    """Give one row per checkpoint, kind, direction, side asked for, order, length and measure. Twins are checkpoints
    too.

    `n` and `null_n` count the independent clusters of facts behind a number, and `facts` and `clusters` all there are.
    """
    return list(rows_of(probe))


def rows_of(probe: Probe) -> list[dict[str, Any]]:
    asked = questions(probe)
    # An MDM's forward queries are the same in both kinds. Shortest first: neighbours need little padding.
    different = sorted({(q.query, q.ends): q for q in asked}.values(), key=lambda question: len(question.query.tokens))
    place = {(question.query, question.ends): i for i, question in enumerate(different)}
    groups: dict[tuple[Kind, Direction, Side], list[Question]] = {}
    for question in asked:
        groups.setdefault((question.kind, question.direction, question.asked), []).append(question)
    samples = {group: FactSample.of([question.pair for question in members]) for group, members in groups.items()}
    rows = []
    for order, length, measure, own, null in answer_all(probe, different):
        for group, members in groups.items():
            at, sample = [place[question.query, question.ends] for question in members], samples[group]
            rows.append(
                {
                    "model": "ARM" if probe.model.cfg.is_causal else "MDM",
                    **dict(zip(("kind", "direction", "asked"), group, strict=True)),
                    "order": order,
                    "length": length,
                    "measure": measure,
                    "queries": len(members),
                    **sample.counts,
                    **flat("", estimate_over_facts(sample, own[at], measure)),
                    **flat("null_", estimate_over_facts(sample, null[at], measure)),
                }
            )
    return rows


def estimate_over_facts(sample: FactSample, values: Float[ndarray, "question"], measure: str) -> Estimate:
    """Give the mean over facts of the mean of each fact's questions; of ranks the geometric mean, since a few of them
    are far larger than the others."""
    if measure != "rank":
        return sample.mean(torch.from_numpy(values)).estimates()[0]
    log = sample.mean(torch.from_numpy(values).log()).estimates()[0]
    return Estimate(math.exp(log.value), math.exp(log.low), math.exp(log.high), log.n)


def flat(prefix: str, estimate: Estimate) -> dict[str, Any]:
    """An estimate as columns."""
    return {f"{prefix}{name}": value for name, value in vars(estimate).items()}


def summarize(result: Result) -> dict[str, Estimate]:
    summary = {}
    for row in result.frame.to_dict("records"):
        name = summary_name(*(row[column] for column in ("checkpoint", "kind", "direction", "asked")))
        name += f" / {LABELS[row['order'], row['length']]} / {row['measure']}"
        summary[name], summary[f"{name} / null"] = estimate_in(row), estimate_in(row, "null_")
    return summary


def summary_name(checkpoint: str, kind: str, direction: str, asked: str) -> str:
    return f"{checkpoint} / {kind} / {direction}, asks for the {asked} entity"


def takeaway(result: Result) -> str:
    """Exact matches of every checkpoint in one order, with the length known."""
    said = []
    for checkpoint, of_checkpoint in result.frame.groupby("checkpoint", sort=False):
        causal = of_checkpoint["model"].iloc[0] == "ARM"
        label = LABELS["left_to_right" if causal else "confidence", "known"]

        def exact(kind: str, direction: str, checkpoint: Any = checkpoint, label: str = label) -> str:
            names = [f"{summary_name(checkpoint, kind, direction, side)} / {label} / exact match" for side in SIDES]
            return " and ".join(f"{result.summary[name].value:.2f}" for name in names if name in result.summary)

        reverse = ", ".join(f"{kind} reverse {exact(kind, 'reverse')}" for kind in of_checkpoint["kind"].unique())
        said.append(f"{checkpoint} ({label}): forward {exact(of_checkpoint['kind'].iloc[0], 'forward')}, {reverse}")
    return (
        f"Exact matches, number of tokens known. {'; '.join(said)}. Two numbers: asked for the left entity and for the "
        "right one. A causal model has one order and can be asked for the last entity only."
    )


def draw(result: Result) -> go.Figure:
    frame = result.frame
    panels = list(dict.fromkeys(zip(frame["checkpoint"], frame["kind"], strict=True)))
    shown = [[label for label in LABELS if label in set(orders_in(frame, panel))] for panel in panels]
    height = 60 + sum(90 + 34 * len(labels) for labels in shown)
    figure = make_subplots(
        len(panels),
        len(MEASURES),
        row_heights=[90 + 34 * len(labels) for labels in shown],
        shared_yaxes=True,
        subplot_titles=[
            text
            for checkpoint, kind in panels
            for text in (f"{checkpoint}, {kind} reverse", *[""] * (len(MEASURES) - 1))
        ],
        horizontal_spacing=0.03,
        vertical_spacing=70 / height,
    )
    legends = set()
    for row, ((checkpoint, kind), labels) in enumerate(zip(panels, shown, strict=True), 1):
        for col, (measure, axis) in enumerate(MEASURES.items(), 1):
            of_panel = where(frame, checkpoint=checkpoint, kind=kind, measure=measure)
            for direction, color in DIRECTIONS.items():
                for side, symbol in SIDES.items():
                    of_series = where(of_panel, direction=direction, asked=side).to_dict("records")
                    own = {LABELS[r["order"], r["length"]]: estimate_in(r) for r in of_series}
                    null = {LABELS[r["order"], r["length"]]: estimate_in(r, "null_") for r in of_series}
                    name = f"{direction}, asks for the {side} entity"
                    for estimates, text, shade, mark in (
                        (null, "null: another fact's answer", CHANCE, "line-ns"),
                        (own, name, color, symbol),
                    ):
                        new = bool(estimates) and text not in legends
                        legends |= {text} if new else set()
                        add_estimates(
                            figure,
                            estimates,
                            name=text,
                            color=shade,
                            symbol=mark,
                            row=row,
                            col=col,
                            legend="legend" if new else None,
                        )
            if row == len(panels):
                figure.update_xaxes(title_text=axis, row=row, col=col)
        names = [LABELS[label] for label in labels][::-1]
        figure.update_yaxes(categoryorder="array", categoryarray=names, row=row)
    figure.update_xaxes(range=[-0.04, 1.04], col=1)
    figure.update_xaxes(matches="x2", col=2)  # one scale for all checkpoints
    figure.update_xaxes(type="log", matches="x3", col=3)
    figure.update_layout(legend=legend_at(0.45, -75 / height))
    figure.update_layout(height=height + 260)
    return figure


def orders_in(frame: pd.DataFrame, panel: tuple[str, str]) -> list[tuple[str, str]]:
    """Order and length of every row of a panel."""
    of_panel = where(frame, checkpoint=panel[0], kind=panel[1])
    return list(zip(of_panel["order"], of_panel["length"], strict=True))


ANALYSIS = CheckpointAnalysis(
    name="large_model_prediction",
    question="Can a checkpoint name the other entity, forward and in reverse?",
    configs=demos,
    measure=measure,
    of_twins=True,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=240,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
