"""Evidence for the true answer over training, and the entity-by-entity evidence matrix before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from mdm_interp.config import TrainConfig
from mdm_interp.data.queries import Query
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.grids import VARIANTS, grid, variant_of
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import checkpoints
from mdm_interp.measures.evidence import compute_evidence, evidence_matrix
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.tables import curve, where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import TRAINING_STEPS, add_curve, add_level, add_matrix
from mdm_interp.viz.theme import CHANCE, legend_at
from mdm_interp.viz.theme import VARIANTS as COLORS

MATRICES = {"MDM rope": ("A given B",), "ARM rope": ("B given A", "A given B")}
"""Whose evidence matrices are shown. Facts are `A r B`: an MDM reads A given B in both directions; an ARM reads B given
A when asked forward and A given B when asked in reverse."""


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    return grid(seeds, ["relation_cycle"])


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Margin and rank per query kind; for the first seed, before and after, matrices of the first relation."""
    model, pairs, variant = run.model(step), run.query_pairs(), variant_of(run.config)
    asked = {"forward": [pair.forward for pair in pairs], "reverse": [pair.reverse for pair in pairs]}
    rows: list[dict[str, Any]] = []
    for kind, queries in asked.items():
        margin, rank = margin_and_rank(model, queries, run.facts)
        measured = {"margin": margin.mean().item(), "rank": rank.float().mean().item()}
        rows.append({"query": kind, **measured, "chance_rank": (len(run.facts.role(0)) + 1) / 2})
    if run.config.seed == 0 and step in (run.steps[0], run.steps[-1]):
        for cells in MATRICES.get(variant, ()):
            rows += [{"query": cells, **entry} for entry in matrix(model, run.facts, cells)]
    return [{"variant": variant, **row} for row in rows]


def margin_and_rank(
    model: HookedTransformer, queries: Sequence[Query], world: FactWorld
) -> tuple[Float[Tensor, "query"], Int[Tensor, "query"]]:
    """The true answer's evidence (summed over heads, unrouted) minus the strongest other of its role, and its rank
    among them (1 is best)."""
    evidence = compute_evidence(model, queries, torch.arange(world.config.n_entities)).sum((1, 2))
    answer = torch.tensor([query.answer for query in queries])
    role = world.candidates(queries)
    true, candidates = evidence.gather(1, answer), evidence.gather(1, role)
    others = candidates.masked_fill(role == answer, float("-inf"))
    return (true - others.amax(1, keepdim=True)).squeeze(1), 1 + (others >= true).sum(1)


def matrix(model: HookedTransformer, world: FactWorld, cells: str) -> list[dict[str, Any]]:
    """Evidence of every source of the first relation for every answer, in the order of the facts."""
    facts = world.facts[world.facts[:, 1] == world.facts[0, 1]]
    left, right = facts[:, 0], facts[:, 2]
    targets, sources = (left, right) if cells == "A given B" else (right, left)
    evidence = evidence_matrix(model, sources, targets).sum(0)[..., 0]
    names = world.token_names
    return [
        {"target": names[target], "source": names[source], "evidence": evidence[i, j].item()}
        for i, target in enumerate(targets.tolist())
        for j, source in enumerate(sources.tolist())
    ]


def summarize(result: Result) -> dict[str, Estimate]:
    frame = result.frame.dropna(subset=["margin"])
    summary = {}
    for variant in VARIANTS:
        for kind in ("forward", "reverse"):
            group = where(frame, variant=variant, query=kind)
            for stage, step in (("initial", group["step"].min()), ("final", group["step"].max())):
                for quantity in ("margin", "rank"):
                    values = where(group, step=step)[quantity]
                    summary[f"{variant} / {kind} / {stage} {quantity}"] = mean_estimate(values)
    summary["rank by chance"] = mean_estimate(frame.groupby("seed")["chance_rank"].first())
    return summary


def takeaway(result: Result) -> str:
    summary = result.summary

    def rank(variant: str, kind: str) -> str:
        return f"{summary[f'{variant} / {kind} / final rank'].value:.1f}"

    mdm = ", ".join(f"{rank(variant, 'reverse')} ({variant})" for variant in VARIANTS if variant.startswith("MDM"))
    return (
        f"Among the {2 * summary['rank by chance'].value - 1:.0f} entities of its role, the true answer's "
        "evidence in the "
        f"reverse query ends at mean rank {mdm}; in the ARM at {rank('ARM rope', 'forward')} forward and "
        f"{rank('ARM rope', 'reverse')} in reverse."
    )


def draw(result: Result) -> go.Figure:
    panels = ["margin over the strongest other", "rank of the true answer (1 is best)"]
    matrices = ["MDM rope, before<br>A given B", "MDM rope, after<br>A given B"]
    matrices += ["ARM rope, after<br>B given A (trained)", "ARM rope, after<br>A given B (reverse)"]
    figure = make_subplots(
        2,
        4,
        specs=[[{"colspan": 2}, None, {"colspan": 2}, None], [{}, {}, {}, {}]],
        subplot_titles=panels + matrices,
        horizontal_spacing=0.06,
        vertical_spacing=0.28,
    )
    frame = result.frame
    curves = frame[frame["margin"].notna() & (frame["step"] > 0)]
    for col, quantity in ((1, "margin"), (3, "rank")):
        for variant, color in COLORS.items():
            for kind, dash in (("forward", "solid"), ("reverse", "dot")):
                group = where(curves, variant=variant, query=kind)
                legend = "legend" if quantity == "margin" and kind == "forward" else None
                points = curve(group, "step", quantity)
                add_curve(figure, points, "step", name=variant, color=color, row=1, col=col, dash=dash, legend=legend)
        steps = curves["step"].tolist()
        level, name = (0.0, "margin 0") if quantity == "margin" else (curves["chance_rank"].iloc[0], "rank by chance")
        add_level(
            figure,
            steps,
            level,
            name=name,
            color=CHANCE,
            row=1,
            col=col,
            legend="legend" if quantity == "rank" else None,
        )
        axis_title = "training step (solid: forward query, dotted: reverse)"
        figure.update_xaxes(TRAINING_STEPS, title_text=axis_title, row=1, col=col)
    figure.update_yaxes(title_text="evidence margin (logits × σ)", row=1, col=1)
    figure.update_yaxes(title_text="mean rank", row=1, col=3)
    entries = frame[frame["evidence"].notna()]
    limit = float(entries["evidence"].abs().max())
    first, last = entries["step"].min(), entries["step"].max()
    shown = [("MDM rope", "A given B", first), ("MDM rope", "A given B", last)]
    shown += [("ARM rope", "B given A", last), ("ARM rope", "A given B", last)]
    for col, (variant, cells, step) in enumerate(shown, start=1):
        group = where(entries, variant=variant, query=cells, step=step)
        table = group.pivot(index="target", columns="source", values="evidence")
        x, y = list(group["source"].unique()), list(group["target"].unique())
        scale = {"title": {"text": "evidence"}, "len": 0.38, "y": 0.18, "tickfont": {"size": 15}} if col == 4 else None
        cells_shown = table.loc[y, x].to_numpy()
        add_matrix(figure, cells_shown, x=x, y=y, limit=limit, row=2, col=col, colorbar=scale)
        figure.update_xaxes(title_text="source", showticklabels=False, ticks="", row=2, col=col)
        figure.update_yaxes(title_text="answer" if col == 1 else None, showticklabels=False, ticks="", row=2, col=col)
    figure.update_layout(legend=legend_at(0.5, 0.51))
    figure.update_layout(height=1000)
    return figure


ANALYSIS = Analysis(
    name="evidence_growth",
    question="Does forward training store evidence that the reverse query reads?",
    configs=configs,
    measure=measure,
    when=checkpoints,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=20,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
