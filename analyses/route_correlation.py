"""Whether attention prefers the same tokens from either side over training; and the raw scores at sources, before and
after training, and their correlation against distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from mdm_interp.config import TrainConfig
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.grids import MDM_SCHEMES, grid, variant_of
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import checkpoints
from mdm_interp.measures.rope import distance_correlation
from mdm_interp.measures.routes import compute_routes
from mdm_interp.measures.routes import route_correlation as compute_route_correlation
from mdm_interp.stats.correlations import correlate
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.tables import curve, where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import TRAINING_STEPS, add_curve, add_level
from mdm_interp.viz.theme import CHANCE, COLORS, legend_at
from mdm_interp.viz.theme import VARIANTS as VARIANT_COLORS

DISTANCES = (1, 2, 3, 4, 5, 6, 7)
PREDICTIONS = {"measured": COLORS[0], "spectrum": COLORS[3], "isotropic": COLORS[2]}


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    """The MDMs: an ARM's queries share no source, so their routes cannot be compared."""
    return [config for config in grid(seeds, ["relation_cycle"]) if config.objective != "causal"]


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Three kinds of rows: one `correlation` (`measured` of whole rows, `raw` of the scores at sources); under rope,
    before and after, `distance` for each distance, of raw scores; and of the first seed `score` for each query pair and
    head."""
    model, pairs = run.model(step), run.query_pairs()
    forward = compute_routes(model, [pair.forward for pair in pairs]).scores
    reverse = compute_routes(model, [pair.reverse for pair in pairs]).scores
    correlations = {
        "measured": compute_route_correlation(model, pairs).nanmean().item(),
        "raw": correlate(forward, reverse).nanmean().item(),
    }
    rows: list[dict[str, Any]] = [{"kind": "correlation", **correlations}]
    if run.config.model.position == "rope" and step in (run.steps[0], run.steps[-1]):
        predicted = distance_correlation(model, pairs, torch.tensor(DISTANCES, dtype=torch.float64))
        rows += [
            {
                "kind": "distance",
                "distance": distance,
                "measured": predicted.measured[i].mean().item(),
                "spectrum": predicted.spectrum[i].mean().item(),
                "isotropic": predicted.isotropic[i].item(),
            }
            for i, distance in enumerate(DISTANCES)
        ]
        if run.config.seed == 0:
            heads = range(run.config.model.n_heads)
            rows += [
                {"kind": "score", "head": head, "side": pair.side, "forward": there[head], "reverse": back[head]}
                for pair, there, back in zip(pairs, forward[:, 0].tolist(), reverse[:, 0].tolist(), strict=True)
                for head in heads
            ]
    return [{"variant": variant_of(run.config), **row} for row in rows]


def summarize(result: Result) -> dict[str, Estimate]:
    frame = result.frame
    first, last = frame["step"].min(), frame["step"].max()
    summary = {}
    for stage, step in (("initial", first), ("final", last)):
        at = where(frame, step=step)
        for scheme in MDM_SCHEMES:
            group = where(at, kind="correlation", variant=f"MDM {scheme}")
            summary[f"MDM {scheme} / {stage} route correlation"] = mean_estimate(group["measured"])
            summary[f"MDM {scheme} / {stage} correlation of raw scores"] = mean_estimate(group["raw"])
        for distance in DISTANCES:
            group = where(at, kind="distance", distance=distance)
            for prediction in PREDICTIONS:
                key = f"MDM rope / {stage} correlation at distance {distance}, {prediction}"
                summary[key] = mean_estimate(group[prediction])
    return summary


def takeaway(result: Result) -> str:
    summary = result.summary

    def moved(scheme: str, quantity: str = "route correlation") -> str:
        initial, final = (summary[f"MDM {scheme} / {stage} {quantity}"].value for stage in ("initial", "final"))
        return f"{scheme} from {initial:.2f} to {final:.2f}"

    at = "MDM rope / final correlation at distance 2, "
    return (
        f"Training moves the correlation of forward and reverse rows for {', '.join(map(moved, MDM_SCHEMES))}; that of "
        f"raw scores at sources, which leaves out what all sources share, for "
        f"{moved('rope', 'correlation of raw scores')}. At distance 2, trained rope heads measure "
        f"{summary[at + 'measured'].value:.2f}; their spectrum predicts "
        f"{summary[at + 'spectrum'].value:.2f}, isotropy {summary[at + 'isotropic'].value:.2f}."
    )


def draw(result: Result) -> go.Figure:
    frame = result.frame
    first, last = frame["step"].min(), frame["step"].max()
    seed = frame["seed"].min()
    figure = make_subplots(
        2,
        3,
        specs=[[{}, {}, {"rowspan": 2}], [{}, {}, None]],
        column_widths=[0.3, 0.3, 0.4],
        subplot_titles=[
            f"scores before, rope, seed {seed}",
            "correlation at a distance, before",
            "over training (dotted: raw scores)",
            f"scores after, rope, seed {seed}",
            "correlation at a distance, after",
        ],
        horizontal_spacing=0.075,
        vertical_spacing=0.17,
    )
    for row, step in ((1, first), (2, last)):
        scores = where(frame, kind="score", step=step)
        for head in sorted(scores["head"].astype(int).unique()):
            group = where(scores, head=head)
            symbols = group["side"].map({"left": "circle", "right": "x-thin-open"})
            trace = go.Scatter(
                x=group["forward"],
                y=group["reverse"],
                mode="markers",
                marker={"color": COLORS[head], "size": 7, "opacity": 0.7, "symbol": symbols},
                name=f"head {head}",
                legendgroup=f"head {head}",
                legend="legend",
                showlegend=row == 1,
                customdata=group["side"],
                hovertemplate=f"head {head}, %{{customdata}} entity<br>forward %{{x:.3g}}, reverse %{{y:.3g}}"
                "<extra></extra>",
            )
            figure.add_trace(trace, row=row, col=1)
        figure.update_xaxes(title_text="forward score", row=row, col=1)
        figure.update_yaxes(title_text="reverse score", row=row, col=1)
        distances = where(frame, kind="distance", step=step)
        for prediction, color in PREDICTIONS.items():
            points = curve(distances, "distance", prediction)
            dash = "solid" if prediction == "measured" else "dash"
            add_curve(
                figure,
                points,
                "distance",
                name=prediction,
                color=color,
                row=row,
                col=2,
                dash=dash,
                legend="legend2" if row == 1 else None,
            )
        figure.update_xaxes(title_text="distance (positions)", row=row, col=2)
        figure.update_yaxes(title_text="correlation", range=[-1.05, 1.05], row=row, col=2)
    over_training = where(frame[frame["step"] > 0], kind="correlation")
    for name in over_training["variant"].unique():
        dash = "dash" if name == "MDM none" else "solid"  # it lies on alibi
        points = curve(where(over_training, variant=name), "step", "measured")
        add_curve(
            figure, points, "step", name=name, color=VARIANT_COLORS[name], row=1, col=3, dash=dash, legend="legend3"
        )
        raw: dict[str, Any] = {"dash": "dot", "legend": None}
        add_curve(
            figure,
            curve(where(over_training, variant=name), "step", "raw"),
            "step",
            name=f"{name}, raw scores",
            color=VARIANT_COLORS[name],
            row=1,
            col=3,
            **raw,
        )
    steps = over_training["step"].tolist()
    add_level(figure, steps, 0.0, name="unrelated sides", color=CHANCE, row=1, col=3, legend="legend3")
    figure.update_xaxes(TRAINING_STEPS, title_text="training step", row=1, col=3)
    figure.update_yaxes(title_text="correlation", range=[-1.05, 1.05], row=1, col=3)
    figure.update_layout(legend=legend_at(0.27, -0.1), legend2=legend_at(0.27, -0.155), legend3=legend_at(0.82, -0.1))
    figure.update_layout(height=950)
    return figure


ANALYSIS = Analysis(
    name="route_correlation",
    question="Does what draws attention to a source draw it from either side?",
    configs=configs,
    measure=measure,
    when=checkpoints,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    settings={"distances": list(DISTANCES)},
    order=30,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
