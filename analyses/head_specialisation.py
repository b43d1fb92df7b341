"""Reverse prediction by the number of heads: which part of it is lost, how far heads serve one side only, and what
comes back when side-specific heads read both sides alike.

A source has two partners in this world, one of either role, and the relation says which is meant. The probability of an
answer is that of its role times its own within the role: the first is lost when another partner is taken to be meant,
the second when the source no longer names its partners.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mdm_interp import Analysis, Estimate, Result, Run, Summary, mean_estimate, where
from mdm_interp.experiments.grids import HEAD_SCHEMES, HEADS, MANY_HEADS, head_grid
from mdm_interp.experiments.scope import SCOPE, STAGES, scope_label
from mdm_interp.inference.prediction import compare_answers
from mdm_interp.interventions import edit_heads
from mdm_interp.measures.heads import N_EXCHANGES, compare_heads
from mdm_interp.stats.correlations import correlation_estimate, rank_correlation
from mdm_interp.stats.resampling import rows_at
from mdm_interp.stats.summary import Entry
from mdm_interp.viz import (
    CHANCE,
    FORWARD,
    GOLD,
    INDIGO,
    MAGENTA,
    OLIVE,
    PROBABILITY,
    REVERSE,
    SHADES,
    Panels,
    opening,
    sample_size,
    shown,
    with_n,
)
from mdm_interp.viz.words import counted

GAP = 0.1
"""Nats between forward and reverse query from which it makes sense to ask in which part they are lost."""
SMALL = 0.1
"""Probability from which a loss counts as one."""
DECIDES = 0.5
"""Share of the loss above which a part decides."""
OF_MODELS = (
    *("chance", "forward_probability", "reverse_probability", "forward_role", "reverse_role"),
    *("forward_in_role", "reverse_in_role", "rival_probability", "gap_role", "gap_in_role"),
    *("index", "index_null_high", "rival_index", "follows"),
    *("specific_heads", "shared_after", "shared_control", "even_after", "even_control"),
)
CONTRASTS = {"index": ("within the answer's role", OLIVE), "rival_index": ("against the other partner", MAGENTA)}


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give one row of the `model`, and unless it is an ARM one per `head`."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    row = {"d_model": model.cfg.d_model, "kind": "model", **compare_answers(model, pairs, run.facts)}
    if not all(pair.shared for pair in pairs):
        return [row]
    heads, whole = compare_heads(model, pairs, run.facts)
    edits = edit_heads(model, pairs, heads["specific"] > 0)
    row |= {name: number.item() for name, number in whole.items()}
    row |= {f"{edit}_{name}": edits[edit].columns[name] for edit in edits for name in ("after", "control")}
    undefined = dict.fromkeys(("chance", "forward_probability", "reverse_probability"), float("nan"))
    return [row, *rows_at(heads, ("layer", "head"), {"d_model": row["d_model"], "kind": "head", **undefined})]


def models_of(result: Result) -> pd.DataFrame:
    """Take the rows of whole models, with what follows from them, and which MDMs' heads share the model's width."""
    models = where(result.frame, kind="model").astype(dict.fromkeys(OF_MODELS, float))
    lost, width = models["gap_role"] + models["gap_in_role"], models["n_heads"] * models["d_head"]
    return models.assign(
        lost_in_role=(models["gap_role"] / lost).where(lost > GAP),
        even_gain=models["even_after"] - models["reverse_probability"],
        shares_width=(width == models["d_model"]) & (models["objective"] == "any_order"),
    )


def summarize(result: Result) -> Summary:
    models = models_of(result)
    end = where(models, stage="end", objective="any_order")
    reverse = where(end, shares_width=True).pivot_table("reverse_probability", ["scheme", "seed"], "n_heads")
    lost = (reverse[1] - reverse[MANY_HEADS]).dropna().reset_index(name="lost_by_heads")
    settings = end.groupby(list(SCOPE))[["reverse_probability", *CONTRASTS]].mean()
    summary = Summary.of(models, (*SCOPE, "stage"), [*OF_MODELS, "lost_in_role", "even_gain"])
    summary += Summary.of(lost, ("scheme",), ("lost_by_heads",))
    for index in CONTRASTS:
        ranks = rank_correlation(settings[index], settings["reverse_probability"])
        summary += Summary([Entry("rank_correlation", {"index": index}, correlation_estimate(ranks, len(settings)))])
    return summary


def takeaway(result: Result) -> str:
    """Say whether reverse prediction is lost with several heads, in which part, and what reading both sides alike gives
    back; each only where the whole interval says so."""
    models = where(models_of(result), stage="end", shares_width=True)

    def found(scheme: str, quantity: str, n_heads: int = MANY_HEADS) -> Estimate:
        setting = where(models, scheme=scheme, n_heads=n_heads)[[*SCOPE, "stage"]].iloc[0]
        return result.summary.at(quantity, **setting.to_dict())

    def cause(scheme: str) -> str:
        lost, share = result.summary.at("lost_by_heads", scheme=scheme), found(scheme, "lost_in_role")
        if not lost.low > SMALL:
            return "it is not lost" if lost.high < SMALL else "too few runs to say whether it is lost"
        if share.low > DECIDES and found(scheme, "rival_probability").low > found(scheme, "chance").value:
            return "it is lost, mostly because the source's side decides which of its two partners is answered"
        if share.low > DECIDES:
            return "it is lost, mostly because an answer of another role is given"
        if share.high < DECIDES:
            return "it is lost, mostly because heads no longer share what they store"
        return "it is lost, and no single part of the answer is to blame"

    causes = {scheme: cause(scheme) for scheme in HEAD_SCHEMES}
    said = "; ".join(f"{shown(scheme)}: {why}" for scheme, why in causes.items())
    said = opening(causes["rope"]) if len(set(causes.values())) == 1 else said
    one, many, even = found("rope", "reverse_probability", 1), found("rope", "reverse_probability"), "even_after"
    gains = "brings back" if found("rope", "even_gain").side == "above" else "does not measurably change that:"
    return (
        f"{said}. Under {shown('rope')} the right answer gets {one.value:.2f} with 1 head and {many.value:.2f} with "
        f"{MANY_HEADS}; making side-specific heads read both sides alike {gains} {found('rope', even).value:.2f} "
        f"({sample_size([one, many])})."
    )


ANSWERED = {
    "forward_probability": ("forward query", FORWARD, "solid"),
    "reverse_probability": ("reverse query", REVERSE, "solid"),
    "rival_probability": ("reverse query: the source's other partner", MAGENTA, "dot"),
    "reverse_in_role": ("reverse query, given the answer's role", OLIVE, "dash"),
}
EDITED = {
    **{quantity: ANSWERED[quantity] for quantity in ("forward_probability", "reverse_probability")},
    "even_after": ("reverse, side-specific heads reading both sides alike", GOLD, "dash"),
    "shared_after": ("reverse, each head with the others' routes", INDIGO, "dot"),
}


def draw(result: Result) -> Panels:
    panels, models = Panels(), where(models_of(result), objective="any_order")
    models = models.assign(place=models["stage"].map(STAGES.index), octave=np.log2(models["n_heads"]))
    _draw_answers(panels, where(models, stage="end"))
    _draw_indices(panels, models)
    return panels


def _draw_answers(panels: Panels, end: pd.DataFrame) -> None:
    """Draw what is answered against the number of heads, for each scheme and then with edits."""
    end = where(end, shares_width=True)
    rope, shown_n = where(end, scheme="rope"), {scheme: where(end, scheme=scheme) for scheme in HEAD_SCHEMES}
    titles = [*(with_n(scheme, rows, "n_heads") for scheme, rows in shown_n.items()), f"{shown('rope')}, edited"]
    x = {"title": "heads", "tickvals": np.log2(HEADS), "ticktext": HEADS}
    y = {**PROBABILITY, "title": "probability, end of training"}
    row = panels.row(titles, x=x, y=y, height=350, widths=[1.2, 1.2, 1.0])
    for panel, rows, marks in zip(row, (*shown_n.values(), rope), (ANSWERED, ANSWERED, EDITED), strict=True):
        for i, (quantity, (name, color, dash)) in enumerate(marks.items()):
            shift = 0.05 * (i - len(marks) / 2)
            panel.points(rows, "octave", quantity, name=name, color=color, dash=dash, shift=shift)
    controls = {np.log2(n) + 0.12: mean_estimate(where(rope, n_heads=n)["even_control"]) for n in HEADS}
    name = "control: as many other heads reading both sides alike"
    row[-1].estimates(controls, name=name, color=CHANCE, symbol="x-thin", size=12, upright=True)


def _draw_indices(panels: Panels, models: pd.DataFrame) -> None:
    """Draw indices and their nulls: of each setting (mean over seeds) beside reverse probability, and over stages."""
    titles = ["each setting at the end", *(f"index {name}" for name, _ in CONTRASTS.values())]
    axis = {**PROBABILITY, "title": "specialisation index"}
    settings, *indices = panels.row(titles, x=axis, y=axis, height=230, one_y=False)
    settings.y(title="reverse probability")
    means = where(models, stage="end").groupby(list(SCOPE), sort=False).mean(numeric_only=True).reset_index()
    labels = [scope_label(row) for row in means.to_dict("records")]
    marks = [(index, name, color, "circle") for index, (name, color) in CONTRASTS.items()]
    marks += [(f"{index}_null", "null of either: sides exchanged", CHANCE, "x-thin") for index in CONTRASTS]
    for quantity, name, color, symbol in marks:
        look: dict[str, Any] = {
            "color": color,
            "symbol": symbol,
            "size": 10,
            "opacity": 0.7,
            "line": {"color": color, "width": 1.5},
        }
        settings.dots(means, quantity, "reverse_probability", name=name, label=labels, **look)
    for panel, quantity in zip(indices, CONTRASTS, strict=True):
        panel.x(title="stage of training", tickvals=[0, 1, 2], ticktext=STAGES, range=[-0.3, 2.3])
        for beside, scheme, dash in zip((0.0, 0.03), HEAD_SCHEMES, ("solid", "dash"), strict=True):
            for i, (n_heads, color) in enumerate(zip(HEADS, SHADES, strict=True)):
                rows = where(models, scheme=scheme, n_heads=n_heads, shares_width=True)
                look = {"name": f"{shown(scheme)}, {counted(n_heads, 'head')}", "color": color, "dash": dash}
                panel.points(rows, "place", quantity, shift=0.06 * (i - 1.5) + beside, **look)
        null = {"name": "null, mean over all", "color": CHANCE, "dash": "dot", "shift": -0.15}
        panel.points(models, "place", f"{quantity}_null", **null)


ANALYSIS = Analysis(
    name="head_specialisation",
    question="What becomes of reverse prediction when attention has several heads?",
    configs=head_grid,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    settings={"n_contexts": 1, "n_exchanges": N_EXCHANGES, "gap": GAP},
    order=12,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
