"""Whether gradient alignment, route correlation and evidence go with reverse prediction: over training within a run
and across seeds, and whether they do beyond what forward prediction says already. Over settings: `signatures`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mdm_interp.config import TrainConfig
from mdm_interp.data.queries import QueryPair
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.claims import CONSTANT, ClaimTest
from mdm_interp.experiments.grids import MDM_SCHEMES, WORLDS, grid
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import SCOPE, STAGES, Moment, checkpoints, stages
from mdm_interp.measures.evidence import evidence_scores
from mdm_interp.measures.gradients.alignment import STORAGE
from mdm_interp.measures.gradients.first_order import Direction, inner_products, mean_gradient
from mdm_interp.measures.routes import route_correlation
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.correlations import correlation_estimate, partial_rank_correlation, rank_correlation
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.tables import where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import add_estimates
from mdm_interp.viz.theme import BLUE, CHANCE, ORANGE, legend_at
from mdm_interp.viz.theme import SCHEMES as COLORS

SIGNATURES = {
    "alignment": "gradient alignment (cosine, V and O)",
    "route": "route correlation",
    "evidence": "evidence for the answer (z-score)",
}
Kind = Literal["plain", "partial"]
KINDS: tuple[Kind, ...] = ("plain", "partial")
"""Rank correlation with reverse probability, and the same given forward probability."""


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    return [config for config in grid(seeds) if config.objective == "any_order"]


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """The signatures, of those queries that training recorded the probabilities of."""
    return [measured(run.model(step), run.query_pairs(), run.facts)]


def when(run: Run) -> list[Moment]:
    """Every second checkpoint, and the stages."""
    return [*checkpoints(run)[::2], *stages(run)]


def measured(model: HookedTransformer, pairs: Sequence[QueryPair], world: FactWorld) -> dict[str, float]:
    """The signatures of a model: the cosine in V and O of the gradients of the mean forward and the mean reverse loss,
    the route correlation, and the z-score of the answer's evidence in the reverse query."""
    reverse = [pair.reverse for pair in pairs]
    f, r = mean_gradient(model, [pair.forward for pair in pairs]), mean_gradient(model, reverse)

    def inner(one: Direction, other: Direction) -> float:
        products = inner_products(one, other)
        return sum(products[component] for component in STORAGE)

    return {
        "alignment": inner(f, r) / (inner(f, f) * inner(r, r)) ** 0.5,
        "route": route_correlation(model, pairs).nanmean().item(),
        "evidence": evidence_scores(model, reverse, world.candidates(reverse))[0].max().item(),
    }


def correlation(rows: pd.DataFrame, signature: str, kind: Kind) -> float:
    """Rank correlation over rows of a signature with reverse probability; NaN where the signature is constant, or where
    forward probability leaves nothing."""
    x, reverse, forward = rows[[signature, "reverse_probability", "forward_probability"]].to_numpy(dtype=float).T
    if np.ptp(x) < CONSTANT:
        return float("nan")
    return rank_correlation(x, reverse) if kind == "plain" else partial_rank_correlation(x, reverse, given=forward)


def over_training(frame: pd.DataFrame, signature: str, kind: Kind) -> pd.DataFrame:
    """Per run: correlation over its checkpoints (`effect`), and that of the next seed's signature at the same steps
    (`null`), which shares the course of training and nothing else."""
    rows = []
    for scope in frame[list(SCOPE)].drop_duplicates().to_dict("records"):
        setting = {str(name): value for name, value in scope.items()}
        at = where(frame, **setting, stage="checkpoint")
        runs = [run.sort_values("step") for _, run in at.groupby("seed")]
        for run, other in zip(runs, [*runs[1:], *runs[:1]], strict=True):
            same = run.merge(other[["step", signature]], on="step", suffixes=("", "_other"))
            effect, null = (correlation(same, column, kind) for column in (signature, f"{signature}_other"))
            place = {**setting, "stage": "over training", "seed": run["seed"].iloc[0]}
            rows.append({**place, "effect": effect, "null": null})
    return pd.DataFrame(rows)


def across_seeds(frame: pd.DataFrame, signature: str, kind: Kind, stage: str) -> dict[tuple[str, str], Estimate]:
    """Per world and scheme: correlation over the seeds at a stage."""
    return {
        (str(world), str(scheme)): correlation_estimate(
            correlation(runs, signature, kind), len(runs), n_given=int(kind == "partial")
        )
        for (world, scheme), runs in where(frame, stage=stage).groupby(["world", "scheme"], sort=False)
    }


def summarize(result: Result) -> dict[str, Estimate]:
    frame, summary = result.frame, {}
    staged = [stage for stage in STAGES if (frame["stage"] == stage).any()]
    for signature in SIGNATURES:
        for kind in KINDS:
            linked = over_training(frame, signature, kind)
            for world in WORLDS:
                for scheme in MDM_SCHEMES:
                    group, key = where(linked, world=world, scheme=scheme), f"{signature} / {world}, {scheme}"
                    summary[f"{key}, over training / {kind}"] = mean_estimate(group["effect"])
                    summary[f"{key}, over training / {kind} null"] = mean_estimate(group["null"])
            for stage in staged:
                for (world, scheme), estimate in across_seeds(frame, signature, kind, stage).items():
                    summary[f"{signature} / {world}, {scheme}, across seeds, {stage} / {kind}"] = estimate
    return summary


def takeaway(result: Result) -> str:
    summary = result.summary

    def told(signature: str, scheme: str, kind: Kind) -> str:
        key = f"{signature} / relation_cycle, {scheme}, over training / {kind}"
        effect, null = summary[key], summary[f"{key} null"]
        return f"{effect.value:.2f} (null {null.value:.2f})" if effect.n else "undefined"

    listed = "; ".join(
        f"{signature} {told(signature, 'rope', 'plain')} under rope, given forward probability "
        f"{told(signature, 'rope', 'partial')}, under learned {told(signature, 'learned', 'plain')}, given forward "
        f"probability {told(signature, 'learned', 'partial')}"
        for signature in SIGNATURES
    )
    return (
        f"relation_cycle, over training: rank correlation with reverse probability: {listed}. The null takes the "
        "signature of another seed. Nothing is defined where a signature is constant, or where forward probability "
        "leaves nothing to explain."
    )


MARKS = {
    "plain": ("rank correlation", ORANGE),
    "partial": ("given forward probability", BLUE),
    "partial null": ("null of that: another seed's signature", CHANCE),
}


def draw(result: Result) -> go.Figure:
    frame, summary = result.frame, result.summary
    figure = make_subplots(
        2,
        len(SIGNATURES),
        subplot_titles=[f"{name}, all checkpoints" for name in SIGNATURES]
        + [f"{name}: rank correlations" for name in SIGNATURES],
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.15,
        row_heights=[0.35, 0.65],
    )
    for col, (signature, label) in enumerate(SIGNATURES.items(), start=1):
        for scheme in MDM_SCHEMES:
            group = where(frame, world="relation_cycle", scheme=scheme, stage="checkpoint")
            trace = go.Scatter(
                x=group[signature],
                y=group["reverse_probability"],
                mode="markers",
                marker={"color": COLORS[scheme], "size": 6, "opacity": 0.6},
                name=scheme,
                legendgroup=scheme,
                showlegend=col == 1,
                legend="legend",
                customdata=group[["seed", "step"]],
                hovertemplate="seed %{customdata[0]}, step %{customdata[1]}: %{x:.3g}, %{y:.3g}<extra></extra>",
            )
            figure.add_trace(trace, row=1, col=col)
        figure.update_xaxes(title_text=label, row=1, col=col)
        split = [(key.split(" / "), estimate) for key, estimate in summary.items()]
        for kind, (name, color) in MARKS.items():
            estimates = {at: estimate for (of, at, what), estimate in split if (of, what) == (signature, kind)}
            legend = "legend2" if col == 1 else None
            add_estimates(figure, estimates, name=name, color=color, row=2, col=col, legend=legend)
        figure.update_xaxes(title_text="rank correlation", range=[-1.1, 1.1], zeroline=True, row=2, col=col)
    order = dict.fromkeys(key.split(" / ")[1] for key in summary)
    figure.update_yaxes(title_text="reverse probability,<br>relation_cycle", row=1, col=1)
    figure.update_yaxes(categoryorder="array", categoryarray=list(order), autorange="reversed", tickfont_size=12, row=2)
    figure.update_yaxes(title_text="setting", row=2, col=1)
    figure.update_layout(legend=legend_at(0.5, 0.635), legend2=legend_at(0.5, -0.05))
    figure.update_layout(height=1700)
    return figure


CLAIMS = tuple(
    ClaimTest(
        claim="7",
        measure=f"partial rank correlation over training of {label} with reverse probability, given forward "
        "probability",
        effect="effect",
        null="null",
        null_is="the signature of another seed at the same steps",
        side="above",
        margin=0.1,
        rows=lambda result, signature=signature: over_training(result.frame, signature, "partial"),
    )
    for signature, label in SIGNATURES.items()
)

ANALYSIS = Analysis(
    name="prediction_link",
    question="Do alignment, route correlation and evidence go with reverse prediction?",
    configs=configs,
    measure=measure,
    when=when,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    claims=CLAIMS,
    settings={"constant": CONSTANT},
    order=90,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
