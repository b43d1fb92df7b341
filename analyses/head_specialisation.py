"""Reverse prediction by the number of heads: which part of it is lost, how far heads serve one side only, and what
comes back when side-specific heads read both sides alike.

A source has two partners in this world, one of either role, and the relation says which is meant. The probability of an
answer is that of its role times its own within the role: the first is lost when another partner is taken to be meant,
the second when the source no longer names its partners.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from mdm_interp.data.queries import Query, QueryPair, batches
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.grids import HEAD_SCHEMES, HEADS, MANY_HEADS, head_grid
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import SCOPE, STAGES, scope_label
from mdm_interp.interventions.effects import project_even_routes, share_routes
from mdm_interp.measures.heads import N_EXCHANGES, compute_contributions, compute_reading, specialisation
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.correlations import correlation_estimate, rank_correlation
from mdm_interp.stats.estimates import LEVEL, Estimate, mean_estimate
from mdm_interp.stats.tables import curve, where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import add_estimates, add_points
from mdm_interp.viz.theme import BLUE, FORWARD, GREEN, GREY, ORANGE, PURPLE, REVERSE, SKY, VERMILION, legend_at

N_CONTEXTS = 1
GAP = 0.1
"""Nats between forward and reverse query from which it makes sense to ask in which part they are lost."""
SMALL = 0.1
"""Probability from which a loss counts as one."""
DECIDES = 0.5
"""Share of the loss above which a part decides."""
ANSWERS = (
    *("chance", "forward_probability", "reverse_probability", "forward_role", "reverse_role"),
    *("forward_in_role", "reverse_in_role", "rival_probability", "gap_role", "gap_in_role"),
)
INDICES = ("index", "index_null", "index_null_high", "rival_index", "rival_index_null", "follows")
EDITS = ("specific_heads", "shared_after", "shared_control", "even_after", "even_control")
HEAD = (
    *("layer", "head", "specific", "forward_left", "forward_right", "reverse_left", "reverse_right"),
    *("forward_share", "reverse_share", "forward_rival", "reverse_rival"),
    *("attention_right", "attention_left", "evidence_left", "evidence_right"),
)


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give one row of the `model`, and one per `head`; what is undefined for an ARM is NaN.

    Contributions and evidence are in logits, gaps in nats; all are means over pairs. `left` and `right` are the
    answer's side in its fact, except in `attention_…`, where they are the source's side of the readout.
    """
    model, pairs = run.model(step), run.query_pairs(N_CONTEXTS)
    rows = [{"kind": "model", **answers(model, run.facts, pairs)}]
    if all(pair.shared for pair in pairs):
        of_model, of_heads = compare_heads(model, run.facts, pairs)
        rows = [rows[0] | of_model, *({"kind": "head", **of_head} for of_head in of_heads)]
    unmeasured = dict.fromkeys(("kind", *ANSWERS, *INDICES, *EDITS, *HEAD), float("nan"))
    return [{"d_model": model.cfg.d_model, **unmeasured, **row} for row in rows]


def answers(model: HookedTransformer, world: FactWorld, pairs: Sequence[QueryPair]) -> dict[str, float]:
    """Measure what both queries are answered, split exactly into the answer's role and the answer within it."""
    row, logs = {"chance": world.chance}, {}
    for kind in ("forward", "reverse"):
        queries = [getattr(pair, kind) for pair in pairs]
        told = _log_probabilities(model, queries)
        answer = torch.tensor([query.answer for query in queries])
        role = told.gather(1, world.candidates(queries)).logsumexp(1)
        logs[kind] = {"probability": told.gather(1, answer)[:, 0], "role": role}
        logs[kind]["in_role"] = logs[kind]["probability"] - role
        row |= {f"{kind}_{name}": log.exp().mean().item() for name, log in logs[kind].items()}
        if kind == "reverse":
            row["rival_probability"] = told.gather(1, rivals(world, queries)).exp().mean().item()
    gaps = {name: (logs["forward"][name] - logs["reverse"][name]).mean().item() for name in ("role", "in_role")}
    return {**row, **{f"gap_{name}": gap for name, gap in gaps.items()}}


@torch.no_grad()
def _log_probabilities(model: HookedTransformer, queries: Sequence[Query]) -> Float[Tensor, "query d_vocab"]:
    asked = [batch.at_readout(model(batch.tokens))[:, 0] for batch in batches(queries, model.cfg)]
    return torch.cat(asked).log_softmax(-1)


def rivals(world: FactWorld, queries: Sequence[Query]) -> Int[Tensor, "query 1"]:
    """Find the entity that training shows where each query asks, beside its source: the answer of a forward query, in a
    reverse query the source's other partner."""
    shown = {}
    for left, _, right in world.facts.tolist():
        shown[left, False], shown[right, True] = right, left
    return torch.tensor([[shown[query.source[0], query.offset > 0]] for query in queries])


def compare_heads(
    model: HookedTransformer, world: FactWorld, pairs: Sequence[QueryPair]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Give the columns of the model and of each of its heads."""
    candidates = world.candidates([pair.forward for pair in pairs])
    role = compute_contributions(model, pairs, candidates)
    rival = compute_contributions(model, pairs, rivals(world, [pair.reverse for pair in pairs]))
    reading = compute_reading(model, pairs, candidates)
    of_role, of_rival = specialisation(role), specialisation(rival)
    specific = of_role.side_specific()
    sides = {
        f"{query}_{side}": mean
        for query, means in zip(("forward", "reverse"), role.means(), strict=True)
        for side, mean in zip(("left", "right"), means, strict=True)
    }
    columns = {
        **_indices(of_role.head, of_role.head_null, of_rival.head, of_rival.head_null),
        **sides,
        **dict(zip(("forward_share", "reverse_share"), role.shares(), strict=True)),
        **{"forward_rival": rival.forward.mean(0), "reverse_rival": rival.reverse.mean(0)},
        **{"attention_right": reading.right, "attention_left": reading.left, "follows": reading.follows},
        **{"evidence_left": reading.left_evidence, "evidence_right": reading.right_evidence},
        "specific": specific.double(),
    }
    places = torch.ones_like(specific).nonzero().tolist()
    of_heads = [
        {"layer": layer, "head": head, **{name: x[layer, head].item() for name, x in columns.items()}}
        for layer, head in places
    ]
    of_model = _indices(of_role.model, of_role.model_null, of_rival.model, of_rival.model_null)
    of_model = {name: x.item() for name, x in of_model.items()}
    chosen = [(layer, head) for layer, head in specific.nonzero().tolist()]
    return {**of_model, "follows": reading.model_follows.item(), **edited(model, pairs, chosen)}, of_heads


def _indices(
    index: Float[Tensor, "*place"],
    null: Float[Tensor, "draw *place"],
    rival: Float[Tensor, "*place"],
    rival_null: Float[Tensor, "draw *place"],
) -> dict[str, Float[Tensor, "*place"]]:
    """Name both indices with the mean of their null, and of the first also what 95 % of its null stay below."""
    return {
        "index": index,
        "index_null": null.nanmean(0),
        "index_null_high": null.nanquantile(LEVEL, dim=0),
        "rival_index": rival,
        "rival_index_null": rival_null.nanmean(0),
    }


def edited(
    model: HookedTransformer, pairs: Sequence[QueryPair], specific: Sequence[tuple[int, int]]
) -> dict[str, float]:
    """Ask the reverse queries with other heads' routes, and without the odd part of the side-specific heads' scores."""
    effects = {"shared": share_routes(model, pairs)} if model.cfg.n_heads > 1 else {}
    if model.pos_embed.relative:
        effects["even"] = project_even_routes(model, pairs, heads=specific)
    row = {"specific_heads": float(len(specific))}
    for name, effect in effects.items():
        row |= {f"{name}_{kind}": getattr(effect, kind).exp().mean().item() for kind in ("after", "control")}
    return row


def summarize(result: Result) -> dict[str, Estimate]:
    """Estimate every column of the model per setting and stage, what is lost of reverse probability from one head to
    many, and how each index goes with it over settings."""
    models, summary = where(result.frame, kind="model"), {}
    models = models.astype(dict.fromkeys((*ANSWERS, *INDICES, *EDITS), float))
    lost = models["gap_role"] + models["gap_in_role"]
    models["lost_in_role"] = (models["gap_role"] / lost).where(lost > GAP)
    models["even_gain"] = models["even_after"] - models["reverse_probability"]
    quantities = [*ANSWERS, *INDICES, *EDITS, "lost_in_role", "even_gain"]
    for values, group in models.groupby([*SCOPE, "stage"], sort=False):
        named = scope_label(dict(zip([*SCOPE, "stage"], values, strict=True)))
        summary |= {f"{named} / {quantity}": mean_estimate(group[quantity]) for quantity in quantities}
    end = where(models, stage="end", objective="any_order")
    for scheme in HEAD_SCHEMES:
        one, many = (
            where(shared_width(end, scheme), n_heads=n_heads).groupby("seed")["reverse_probability"].mean()
            for n_heads in (1, MANY_HEADS)
        )
        summary[f"{scheme} / reverse_probability lost by {MANY_HEADS} heads"] = mean_estimate(one - many)
    settings = end.groupby(list(SCOPE))[["reverse_probability", "index", "rival_index"]].mean()
    for index in ("index", "rival_index"):
        correlation = rank_correlation(settings[index], settings["reverse_probability"])
        summary[f"rank correlation of {index} and reverse_probability over settings"] = correlation_estimate(
            correlation, len(settings)
        )
    return summary


def shared_width(frame: pd.DataFrame, scheme: str) -> pd.DataFrame:
    """Take the MDMs under a scheme whose heads share the width of the model."""
    kept = where(frame, scheme=scheme, objective="any_order")
    return pd.DataFrame(kept[kept["n_heads"] * kept["d_head"] == kept["d_model"]])


CAUSES = {
    "choice": "It is lost, mostly because the side of the source decides which of its two partners is answered",
    "role": "It is lost, mostly because an answer of another role is given",
    "storage": "It is lost, mostly because heads no longer share what they store",
    "both": "It is lost, and no single part of the answer is to blame",
    "kept": "Nothing: it is not lost",
    "undecided": "Too few runs to say whether it is lost",
}
"""What becomes of reverse prediction: lost in the choice between the source's partners, or in naming the one chosen."""


def takeaway(result: Result) -> str:
    """Say whether reverse prediction is lost with several heads, in which part, and what reading both sides alike gives
    back; each only where the whole interval says so."""
    end, summary = where(result.frame, kind="model", stage="end"), result.summary

    def found(scheme: str, n_heads: int, quantity: str) -> Estimate:
        rows = where(shared_width(end, scheme), n_heads=n_heads)
        scope = {name: rows[name].iloc[0] for name in (*SCOPE, "stage")}
        return summary[f"{scope_label(scope)} / {quantity}"]

    def cause(scheme: str) -> str:
        lost = summary[f"{scheme} / reverse_probability lost by {MANY_HEADS} heads"]
        if not lost.low > SMALL:
            return "kept" if lost.high < SMALL else "undecided"
        share, rival = (found(scheme, MANY_HEADS, quantity) for quantity in ("lost_in_role", "rival_probability"))
        if share.low > DECIDES:
            return "choice" if rival.low > found(scheme, MANY_HEADS, "chance").value else "role"
        return "storage" if share.high < DECIDES else "both"

    def listed(quantity: str) -> str:
        values = {scheme: found(scheme, MANY_HEADS, quantity).value for scheme in HEAD_SCHEMES}
        return ", ".join(f"{value:.2g} ({scheme})" for scheme, value in values.items())

    causes = {scheme: cause(scheme) for scheme in HEAD_SCHEMES}
    same = len(set(causes.values())) == 1
    answer = CAUSES[causes["rope"]] if same else "; ".join(f"{scheme}: {CAUSES[why]}" for scheme, why in causes.items())
    one = ", ".join(f"{found(scheme, 1, 'reverse_probability').value:.2g} ({scheme})" for scheme in HEAD_SCHEMES)
    gain, after = (found("rope", MANY_HEADS, quantity) for quantity in ("even_gain", "even_after"))
    return (
        f"{answer}. Reverse probability is {one} with 1 head, {listed('reverse_probability')} with {MANY_HEADS}; there "
        f"the other partner gets {listed('rival_probability')}, and the right one, given its role, "
        f"{listed('reverse_in_role')}. Rope's side-specific heads, made to read both sides alike, "
        f"{'bring it back to' if gain.low > 0 else 'do not measurably change it:'} {after.value:.2g}."
    )


ANSWERED = {
    "forward_probability": ("forward query", FORWARD, "solid"),
    "reverse_in_role": ("reverse query, given the answer's role", GREEN, "dash"),
    "rival_probability": ("reverse query: the source's other partner", PURPLE, "dot"),
    "reverse_probability": ("reverse query", REVERSE, "solid"),
}
EDITED = {
    "even_after": ("reverse, side-specific heads reading both sides alike", ORANGE, "dash"),
    "shared_after": ("reverse, each head with the others' routes", SKY, "dot"),
}
CONTROL = "control: as many other heads reading both sides alike"
OTHER_SHAPES = {"diamond-open": (1, 16), "square-open": (MANY_HEADS, 64)}
"""Marks of heads that do not share the width: how many, and of how many dimensions."""
CONTRASTS = {"index": ("within the answer's role", GREEN), "rival_index": ("against the other partner", PURPLE)}
HEAD_COLORS = dict(zip(HEADS, (SKY, BLUE, ORANGE, VERMILION), strict=True))


def draw(result: Result) -> go.Figure:
    titles = [*(f"{scheme}: what is answered" for scheme in HEAD_SCHEMES), "rope: the reverse query edited"]
    titles += ["each setting at the end", *(f"index {name}" for name, _ in CONTRASTS.values())]
    figure = make_subplots(2, 3, subplot_titles=titles, horizontal_spacing=0.06, vertical_spacing=0.3)
    models = where(result.frame, kind="model", objective="any_order")
    end = where(models, stage="end")
    for col, scheme in enumerate(HEAD_SCHEMES, start=1):
        legend = "legend" if col == 1 else None
        _draw_by_heads(figure, shared_width(end, scheme), ANSWERED, col, legend)
        _draw_other_shapes(figure, where(end, scheme=scheme), col, legend)
    _draw_edits(figure, shared_width(end, "rope"), col=3)
    _draw_settings(figure, end)
    for col, quantity in enumerate(CONTRASTS, start=2):
        _draw_stages(figure, models, quantity, col, "legend2" if col == 2 else None)
    figure.update_yaxes(range=[-0.04, 1.04])
    for row, col in ((1, 2), (1, 3), (2, 3)):  # as their neighbour's
        figure.update_yaxes(showticklabels=False, row=row, col=col)
    figure.update_yaxes(title_text="probability", row=1, col=1)
    figure.update_yaxes(title_text="reverse probability", row=2, col=1)
    figure.update_yaxes(title_text="specialisation index", row=2, col=2)
    figure.update_layout(legend=legend_at(0.5, 0.56), legend2=legend_at(0.5, -0.09))
    figure.update_layout(height=1100)
    return figure


def _heads(n_heads: int) -> str:
    return f"{n_heads} head{'s' if n_heads > 1 else ''}"


def _octave(n_heads: int) -> float:
    """Where the axes of the upper row have this many heads."""
    return float(np.log2(n_heads))


def _draw_by_heads(
    figure: go.Figure, rows: pd.DataFrame, shown: Mapping[str, tuple[str, str, str]], col: int, legend: str | None
) -> None:
    """Means over seeds against the number of heads."""
    rows = rows.assign(octave=rows["n_heads"].map(_octave))
    for i, (quantity, (name, color, dash)) in enumerate(shown.items()):
        points, shift = curve(rows.astype({quantity: float}), "octave", quantity), 0.05 * (i - len(shown) / 2)
        look: dict[str, Any] = {"name": name, "color": color, "dash": dash, "shift": shift, "legend": legend}
        add_points(figure, points, "octave", row=1, col=col, **look)
    ticks = {"type": "linear", "tickvals": list(map(_octave, HEADS)), "ticktext": list(map(str, HEADS))}
    figure.update_xaxes(ticks, title_text="heads", row=1, col=col)


def _draw_other_shapes(figure: go.Figure, rows: pd.DataFrame, col: int, legend: str | None) -> None:
    for symbol, (n_heads, d_head) in OTHER_SHAPES.items():
        of_shape = where(rows, n_heads=n_heads, d_head=d_head)
        for query, color, listed in (("forward", FORWARD, None), ("reverse", REVERSE, legend)):
            there = {str(_octave(n_heads) + 0.25): mean_estimate(of_shape[f"{query}_probability"])}
            look: dict[str, Any] = {"color": color, "symbol": symbol, "size": 13, "legend": listed}
            name = f"{_heads(n_heads)} of {d_head}"
            add_estimates(figure, there, name=name, row=1, col=col, upright=True, **look)


def _draw_edits(figure: go.Figure, rows: pd.DataFrame, col: int) -> None:
    plain = {quantity: ANSWERED[quantity] for quantity in ("forward_probability", "reverse_probability")}
    _draw_by_heads(figure, rows, plain, col, None)
    _draw_by_heads(figure, rows, EDITED, col, "legend")
    groups = {n_heads: where(rows, n_heads=n_heads)["even_control"].astype(float) for n_heads in HEADS}
    controls = {str(_octave(n_heads) + 0.12): mean_estimate(group) for n_heads, group in groups.items()}
    look: dict[str, Any] = {"name": CONTROL, "color": GREY, "symbol": "x-thin", "size": 12, "legend": "legend"}
    add_estimates(figure, controls, row=1, col=col, upright=True, **look)


def _draw_settings(figure: go.Figure, end: pd.DataFrame) -> None:
    """Mean over seeds of each setting: its indices and their nulls beside reverse probability."""
    numbers = [name for index in CONTRASTS for name in (index, f"{index}_null")]
    means = end.astype(dict.fromkeys(numbers, float)).groupby(list(SCOPE), sort=False)[
        [*numbers, "reverse_probability"]
    ]
    means = means.mean().reset_index()
    labels = [scope_label(row) for row in means.to_dict("records")]
    marks = [(index, name, color, "circle") for index, (name, color) in CONTRASTS.items()]
    marks += [(f"{index}_null", "null of either: sides exchanged", GREY, "x-thin") for index in CONTRASTS]
    for i, (quantity, name, color, symbol) in enumerate(marks):
        trace = go.Scatter(
            x=means[quantity],
            y=means["reverse_probability"],
            mode="markers",
            marker={"color": color, "symbol": symbol, "size": 10, "line": {"color": color, "width": 1.5}},
            name=name,
            legendgroup=name,
            showlegend=i < len(marks) - 1,
            legend="legend2",
            customdata=labels,
            hovertemplate=f"%{{customdata}}<br>{name} %{{x:.3g}}, reverse %{{y:.3g}}<extra></extra>",
        )
        figure.add_trace(trace, row=2, col=1)
    figure.update_xaxes(title_text="specialisation index", range=[-0.04, 1.04], row=2, col=1)


def _draw_stages(figure: go.Figure, models: pd.DataFrame, quantity: str, col: int, legend: str | None) -> None:
    models = models.astype({quantity: float, f"{quantity}_null": float})
    models["place"] = models["stage"].map(STAGES.index)
    for scheme, dash in zip(HEAD_SCHEMES, ("solid", "dash"), strict=True):
        rows = shared_width(models, scheme)
        for n_heads, color in HEAD_COLORS.items():
            points, name = curve(where(rows, n_heads=n_heads), "place", quantity), f"{scheme}, {_heads(n_heads)}"
            look: dict[str, Any] = {"name": name, "color": color, "dash": dash, "legend": legend}
            add_points(figure, points, "place", row=2, col=col, **look)
    null = curve(models, "place", f"{quantity}_null")
    look = {"name": "null, mean over all", "color": GREY, "dash": "dot", "legend": legend}
    add_points(figure, null, "place", row=2, col=col, **look)
    ticks = {"tickvals": [*range(len(STAGES))], "ticktext": list(STAGES)}
    figure.update_xaxes(ticks, title_text="stage of training", range=[-0.2, len(STAGES) - 0.8], row=2, col=col)


ANALYSIS = Analysis(
    name="head_specialisation",
    question="What becomes of reverse prediction when attention has several heads?",
    configs=head_grid,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    settings={"n_contexts": N_CONTEXTS, "n_exchanges": N_EXCHANGES, "gap": GAP},
    order=12,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
