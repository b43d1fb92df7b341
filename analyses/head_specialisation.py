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
from mdm_interp.experiments.scope import SCOPE, STAGES, counted, scope_label
from mdm_interp.inference.prediction import compare_answers
from mdm_interp.interventions import edit_heads
from mdm_interp.measures.heads import N_EXCHANGES, compare_heads
from mdm_interp.stats.correlations import correlation_estimate, rank_correlation
from mdm_interp.stats.resampling import rows_at
from mdm_interp.stats.summary import Entry
from mdm_interp.viz import BLUE, FORWARD, GREEN, GREY, ORANGE, PROBABILITY, PURPLE, REVERSE, SKY, VERMILION, Panels

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
CONTRASTS = {"index": ("within the answer's role", GREEN), "rival_index": ("against the other partner", PURPLE)}


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

    def listed(quantity: str, n_heads: int = MANY_HEADS) -> str:
        return ", ".join(f"{found(scheme, quantity, n_heads).value:.2g} ({scheme})" for scheme in HEAD_SCHEMES)

    def cause(scheme: str) -> str:
        lost, share = result.summary.at("lost_by_heads", scheme=scheme), found(scheme, "lost_in_role")
        if not lost.low > SMALL:
            return "Nothing: it is not lost" if lost.high < SMALL else "Too few runs to say whether it is lost"
        if share.low > DECIDES and found(scheme, "rival_probability").low > found(scheme, "chance").value:
            return "It is lost, mostly because the side of the source decides which of its two partners is answered"
        if share.low > DECIDES:
            return "It is lost, mostly because an answer of another role is given"
        if share.high < DECIDES:
            return "It is lost, mostly because heads no longer share what they store"
        return "It is lost, and no single part of the answer is to blame"

    causes = {scheme: cause(scheme) for scheme in HEAD_SCHEMES}
    same, gain = len(set(causes.values())) == 1, found("rope", "even_gain")
    return (
        f"{causes['rope'] if same else '; '.join(f'{scheme}: {why}' for scheme, why in causes.items())}. Reverse "
        f"probability is {listed('reverse_probability', 1)} with 1 head, {listed('reverse_probability')} with "
        f"{MANY_HEADS}; there the other partner gets {listed('rival_probability')}, and the right one, given its role, "
        f"{listed('reverse_in_role')}. Rope's side-specific heads, made to read both sides alike, "
        f"{'bring it back to' if gain.side == 'above' else 'do not measurably change it:'} "
        f"{found('rope', 'even_after').value:.2g}."
    )


ANSWERED = {
    "forward_probability": ("forward query", FORWARD, "solid"),
    "reverse_in_role": ("reverse query, given the answer's role", GREEN, "dash"),
    "rival_probability": ("reverse query: the source's other partner", PURPLE, "dot"),
    "reverse_probability": ("reverse query", REVERSE, "solid"),
}
EDITED = {
    **{quantity: ANSWERED[quantity] for quantity in ("forward_probability", "reverse_probability")},
    "even_after": ("reverse, side-specific heads reading both sides alike", ORANGE, "dash"),
    "shared_after": ("reverse, each head with the others' routes", SKY, "dot"),
}
OTHER_SHAPES = (("1 head of 16", "diamond-open", 1, 16), ("4 heads of 64", "square-open", MANY_HEADS, 64))
"""Heads that do not share the width: name and mark, how many, and of how many dimensions."""


def draw(result: Result) -> Panels:
    panels, models = Panels(), where(models_of(result), objective="any_order")
    models = models.assign(place=models["stage"].map(STAGES.index), octave=np.log2(models["n_heads"]))
    _draw_answers(panels, where(models, stage="end"))
    _draw_indices(panels, models)
    return panels


def _draw_answers(panels: Panels, end: pd.DataFrame) -> None:
    """Draw what is answered against the number of heads, for each scheme and then with edits."""
    titles = [*(f"{scheme}: what is answered" for scheme in HEAD_SCHEMES), "rope: the reverse query edited"]
    x = {"title": "heads", "tickvals": np.log2(HEADS), "ticktext": HEADS}
    row = panels.row(titles, x=x, y={**PROBABILITY, "title": "probability"}, height=350)
    for panel, scheme, marks in zip(row, (*HEAD_SCHEMES, "rope"), (ANSWERED, ANSWERED, EDITED), strict=True):
        rows = where(end, scheme=scheme, shares_width=True)
        for i, (quantity, (name, color, dash)) in enumerate(marks.items()):
            shift = 0.05 * (i - len(marks) / 2)
            panel.points(rows, "octave", quantity, name=name, color=color, dash=dash, shift=shift)
        for name, symbol, n_heads, d_head in OTHER_SHAPES if marks is ANSWERED else ():
            rows, at = where(end, scheme=scheme, n_heads=n_heads, d_head=d_head), np.log2(n_heads) + 0.25
            look: dict[str, Any] = {"name": name, "symbol": symbol, "size": 13, "upright": True}
            panel.estimates({at: mean_estimate(rows["forward_probability"])}, color=FORWARD, listed=False, **look)
            panel.estimates({at: mean_estimate(rows["reverse_probability"])}, color=REVERSE, **look)
    rope = where(end, scheme="rope", shares_width=True)
    controls = {np.log2(n) + 0.12: mean_estimate(where(rope, n_heads=n)["even_control"]) for n in HEADS}
    name = "control: as many other heads reading both sides alike"
    row[-1].estimates(controls, name=name, color=GREY, symbol="x-thin", size=12, upright=True)


def _draw_indices(panels: Panels, models: pd.DataFrame) -> None:
    """Draw indices and their nulls: of each setting (mean over seeds) beside reverse probability, and over stages."""
    titles = ["each setting at the end", *(f"index {name}" for name, _ in CONTRASTS.values())]
    axis = {**PROBABILITY, "title": "specialisation index"}
    settings, *indices = panels.row(titles, x=axis, y=axis, height=350, one_y=False)
    settings.y(title="reverse probability")
    means = where(models, stage="end").groupby(list(SCOPE), sort=False).mean(numeric_only=True).reset_index()
    labels = [scope_label(row) for row in means.to_dict("records")]
    marks = [(index, name, color, "circle") for index, (name, color) in CONTRASTS.items()]
    marks += [(f"{index}_null", "null of either: sides exchanged", GREY, "x-thin") for index in CONTRASTS]
    for quantity, name, color, symbol in marks:
        look: dict[str, Any] = {"color": color, "symbol": symbol, "size": 10, "line": {"color": color, "width": 1.5}}
        settings.dots(means, quantity, "reverse_probability", name=name, label=labels, **look)
    for panel, quantity in zip(indices, CONTRASTS, strict=True):
        panel.x(title="stage of training", tickvals=[0, 1, 2], ticktext=STAGES, range=[-0.2, 2.2])
        for scheme, dash in zip(HEAD_SCHEMES, ("solid", "dash"), strict=True):
            for n_heads, color in zip(HEADS, (SKY, BLUE, ORANGE, VERMILION), strict=True):
                rows = where(models, scheme=scheme, n_heads=n_heads, shares_width=True)
                name = f"{scheme}, {counted(n_heads, 'head')}"
                panel.points(rows, "place", quantity, name=name, color=color, dash=dash)
        panel.points(models, "place", f"{quantity}_null", name="null, mean over all", color=GREY, dash="dot")


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
