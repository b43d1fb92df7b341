"""The paper's claims, each measured with its null in every setting and at every stage of training: the rows that the
claims ledger is computed from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mdm_interp import Analysis, Contrast, Result, Run, Summary, where
from mdm_interp.experiments.claims import ClaimTest
from mdm_interp.experiments.grids import every_run
from mdm_interp.experiments.paper import LINKED, RULES
from mdm_interp.experiments.scope import SCOPE, STAGES, scope_label, shown_label
from mdm_interp.interventions import transplant_routes
from mdm_interp.measures.signatures import alignment, evidence, position, route, score
from mdm_interp.stats.summary import Entry
from mdm_interp.viz import DIVERGING, PROBABILITY, SCHEME_COLORS, Panel, Panels, shown
from mdm_interp.viz.words import sample_size, side_of

SHOWN = {
    "evidence": "evidence<br>(z-score)",
    "position": "share<br>of place",
    "transplant": "distance,<br>transplant",
    "route": "route<br>correlation",
    "score": "raw score<br>correlation",
    "alignment": "gradients<br>of pairs",
    "mean_alignment": "mean<br>gradients",
}
PAPER = {rule.effect: rule.side for rule in RULES if isinstance(rule, ClaimTest) and rule.effect in SHOWN}
"""On which side of its null the paper has each."""
MARKS = {"+": 1.0, "?": 0.0, "−": -1.0, "": 0.0}
"""Cells of the matrix, and where their colours are on the scale."""
UNDEFINED = Contrast(float("nan"), float("nan"))


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give every signature beside its null; NaN where the pairs share neither answer nor source (an ARM's)."""
    model, pairs, world = run.model(step), run.query_pairs(n_contexts=1), run.facts
    found = dict.fromkeys(("route", "score", "position", "transplant"), UNDEFINED)
    if all(pair.shared for pair in pairs):
        found["route"], found["score"] = route(model, pairs), score(model, pairs)
        found["position"] = position(model, pairs, world)
        found["transplant"] = transplant_routes(model, pairs).distance()
    found |= {"evidence": evidence(model, pairs, world), **alignment(model, pairs)}
    return [{key: value for name, of in found.items() for key, value in ((name, of.effect), (f"{name}_null", of.null))}]


def summarize(result: Result) -> Summary:
    return Summary.of(result.frame, (*SCOPE, "stage"), tuple(SHOWN))


def takeaway(result: Result) -> str:
    def agreeing(stage: str, name: str | None = None) -> tuple[int, int]:
        found = [entry for entry in result.summary.where(name, stage=stage) if entry.effect.n > 1]
        return sum(lies(entry) == "+" for entry in found), len(found)

    (before, of_before), (after, of_after) = agreeing("initial"), agreeing("end")
    if not of_after:
        return "Unknown: no setting has several seeds."
    shares = {name: count / total for name in SHOWN for count, total in [agreeing("end", name)] if total}
    best, least = max(shares, key=lambda name: shares[name]), min(shares, key=lambda name: shares[name])
    size = sample_size([entry.effect for entry in result.summary.where(stage="end") if entry.effect.n > 1])
    return (
        f"At the end of training {after / of_after:.0%} of signatures and settings are surely on the paper's side of "
        f"the null{f', {before / of_before:.0%} before it' if of_before else ''}: most often “{named(best)}” "
        f"({shares[best]:.0%}), least often “{named(least)}” ({shares[least]:.0%}; {size})."
    )


def named(signature: str) -> str:
    """Name a signature in one line."""
    return SHOWN[signature].replace("<br>", " ")


def lies(entry: Entry) -> str:
    """Say where an effect is: on the paper's side of its null, on the other, or neither for sure."""
    side = side_of(entry.effect, entry.null)
    return "?" if side == "undecided" else "+" if side == PAPER[entry.quantity] else "−"


def settings_at(result: Result, stage: str) -> pd.DataFrame:
    """Give one row per setting at a stage: the means over seeds, and the setting's name."""
    at = where(result.frame, stage=stage)
    points = at.groupby(list(SCOPE), sort=False)[[*LINKED, "reverse_probability"]].mean().reset_index()
    return points.assign(setting=[scope_label(row) for row in points.to_dict("records")])


def draw(result: Result) -> Panels:
    """Draw the matrix of settings and signatures at every stage, and what settings answer beside three of them."""
    panels, points = Panels(), settings_at(result, "end")
    settings = result.frame[list(SCOPE)].drop_duplicates().to_dict("records")
    size = sample_size([entry.effect for entry in result.summary])
    titles = [
        "before training<br>+ on the paper's side",
        "half-way<br>− on the other side",
        f"end, {size}<br>? neither, blank: undefined",
    ]
    labels = list(map(shown_label, settings))
    base = labels[0].split(", ") if labels else []
    ordinary = ", ".join(part for part in base if part != base[1])
    y = {"tickfont": {"size": 15}, "autorange": "reversed", "showgrid": False}
    y |= {"title": f"setting (unless said: {ordinary})", "tickvals": labels, "ticktext": list(told_apart(labels))}
    x = {"tickangle": 90, "tickfont": {"size": 15}, "showgrid": False, "title": "signature"}
    row = panels.row(titles, x=x, y=y, height=23 * len(settings), ticks_height=215)
    for panel, stage in zip(row, STAGES, strict=True):
        _draw_cells(panel, result.summary.where(stage=stage), settings)
    y = {**PROBABILITY, "title": "reverse probability,<br>each setting at the end"}
    for panel, name in zip(panels.row([""] * len(LINKED), y=y, height=240), LINKED, strict=True):
        panel.x(title=named(name), nticks=5)
        for scheme, color in SCHEME_COLORS.items():
            dots = where(points, scheme=scheme).dropna(subset=[name])
            panel.dots(
                dots,
                name,
                "reverse_probability",
                name=shown(scheme),
                label=[*dots["setting"]],
                color=color,
                size=8,
                opacity=0.7,
            )
    return panels


def _draw_cells(panel: Panel, summary: Summary, settings: list[dict[str, Any]]) -> None:
    """Draw one cell for each setting and signature; its numbers show where the pointer is."""
    found = {(entry.quantity, *map(entry.of.get, SCOPE)): entry for entry in summary if entry.effect.n}
    cells = [[found.get((name, *map(of.get, SCOPE))) for name in SHOWN] for of in settings]
    marks = [["" if entry is None else lies(entry) for entry in row] for row in cells]
    numbers = [
        ["undefined" if one is None else f"{one.effect}, null {one.null}, n = {one.effect.n}" for one in row]
        for row in cells
    ]
    trace = go.Heatmap(
        z=[[MARKS[mark] for mark in row] for row in marks],
        x=list(map(named, SHOWN)),
        y=[shown_label(of) for of in settings],
        text=marks,
        customdata=numbers,
        texttemplate="%{text}",
        textfont={"size": 15},
        zmin=-1.4,
        zmax=1.4,
        colorscale=DIVERGING,
        showscale=False,
        xgap=1,
        ygap=1,
        hovertemplate="%{y}<br>%{x}: %{customdata}<extra></extra>",
    )
    panel.add(trace)


def told_apart(labels: Sequence[str]) -> Iterator[str]:
    """Shorten labels of settings to their scheme and what the first one's do not say."""
    for label in labels:
        parts = label.split(", ")
        yield ", ".join(part for i, part in enumerate(parts) if i == 1 or part not in labels[0].split(", "))


ANALYSIS = Analysis(
    name="signatures",
    question="Where do the paper's signatures show, and when?",
    configs=every_run,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    claims=RULES,
    order=5,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
