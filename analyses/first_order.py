"""Steps down the forward loss, of the whole model and of its parts: the change of the reverse loss that gradients
predict, the change that comes, and that of a random step of the same size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mdm_interp.config import TrainConfig
from mdm_interp.data.queries import QueryPair
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.grids import VARIANTS, grid, variant_of
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import STAGES
from mdm_interp.measures.gradients.alignment import COMPONENTS, ROUTING, STORAGE
from mdm_interp.measures.gradients.first_order import first_order, inner_products, mean_gradient, random_direction
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.tables import curve, where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import add_curve, add_level, interval_bars
from mdm_interp.viz.theme import CHANCE, GREEN, ORANGE, PURPLE, legend_at

ETAS = [float(f"{eta:.3g}") for eta in np.logspace(-6, 0, 13)]
"""Step sizes, two per decade."""
SMALL = 1e-4
"""The step size at which effects are quoted."""
PART_ETAS = [1e-6, SMALL, 1e-2]
TOLERANCE = 0.1
"""How far actual over predicted may be from 1."""

NAMED = (*STORAGE, *ROUTING, "embedding", "unembedding")
GROUPS = {
    "whole": COMPONENTS,
    "storage": STORAGE,
    "routing": ROUTING,
    "embedding": ("embedding",),
    "unembedding": ("unembedding",),
    "other": tuple(component for component in COMPONENTS if component not in NAMED),
}
"""What moves: everything, or one part alone. The parts make up the whole."""
STAGE_COLORS = dict(zip(STAGES, (GREEN, ORANGE, PURPLE), strict=True))


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    return grid(seeds, ["relation_cycle"])


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """One row per group of components that moves, and step size. Changes are in nats, negative is learnt; transfers are
    relative to the first-order drop of the forward loss when everything moves."""
    seed = int(run.folder.name, 16) ^ step  # no two steps share a random direction
    rows = step_rows(run.model(step), run.query_pairs(n_contexts=1), seed)
    return [{"variant": variant_of(run.config), **row} for row in rows]


def step_rows(model: HookedTransformer, pairs: Sequence[QueryPair], seed: int) -> list[dict[str, Any]]:
    """One row per group of components that moves and step size. The transfer of an actual step is there only where the
    change of the reverse loss is to first order, within `TOLERANCE`."""
    rows: list[dict[str, Any]] = []
    gradient = mean_gradient(model, [pair.forward for pair in pairs])
    null = random_direction(gradient, seed)
    present = inner_products(gradient, null)
    drop = 0.0  # of the forward loss per unit of step: the squared norm of its gradient
    for group, members in GROUPS.items():
        etas = ETAS if group == "whole" else PART_ETAS
        moved = first_order(model, pairs, etas, [name for name in members if name in present])
        random = first_order(model, pairs, etas, moved.components[:-1], null)
        drop = drop or -moved.predicted_forward[-1, 0].item() / etas[0]
        end = moved.regime_end(TOLERANCE)
        for i, eta in enumerate(etas):
            predicted, reverse = moved.predicted[-1, i].item(), moved.reverse[i].item()
            rows.append(
                {
                    "group": group,
                    "eta": eta,
                    "predicted": predicted,
                    "reverse": reverse,
                    "forward": moved.forward[i].item(),
                    "random": random.reverse[i].item(),
                    "slope": moved.slope()[i].item(),
                    "in_regime": float(eta <= end),
                    "predicted_transfer": -predicted / (eta * drop),
                    "transfer": -reverse / (eta * drop) if eta <= end else float("nan"),
                    "random_transfer": -random.reverse[i].item() / (eta * drop),
                }
            )
    return rows


def summarize(result: Result) -> dict[str, Estimate]:
    frame = result.frame
    summary = {}
    for variant in VARIANTS:
        for stage in STAGES:
            at = where(frame, variant=variant, stage=stage)
            for group in GROUPS:
                small = where(at, group=group, eta=SMALL)
                for quantity in ("predicted_transfer", "transfer", "random_transfer", "slope"):
                    summary[f"{variant} / {stage} / {group} {quantity}"] = mean_estimate(small[quantity])
            summary[f"{variant} / {stage} / log10 of the regime's last step"] = mean_estimate(last_steps(at))
    return summary


def last_steps(frame: pd.DataFrame) -> pd.Series:
    """log10 of the largest step of each run up to which actual over predicted stays near 1."""
    return np.log10(frame[(frame["group"] == "whole") & (frame["in_regime"] == 1)].groupby("run")["eta"].max())


def takeaway(result: Result) -> str:
    summary = result.summary
    places = [f"{variant} / {stage}" for variant in VARIANTS for stage in STAGES]
    places = [place for place in places if summary[f"{place} / whole transfer"].n]
    slopes = [summary[f"{place} / whole slope"].value for place in places]
    ends = [summary[f"{place} / log10 of the regime's last step"] for place in places]
    reached = [10**end.value for end in ends if end.n] or [float("nan")]

    def rises(group: str) -> str:
        there = [p.replace(" / ", " at ") for p in places if summary[f"{p} / {group} transfer"].high < 0]
        return ", ".join(there) or "nowhere"

    def is_open(place: str) -> bool:
        return summary[f"{place} / whole transfer"].low <= 0 <= summary[f"{place} / whole transfer"].high

    undecided = ", ".join(place.replace(" / ", " at ") for place in places if is_open(place)) or "none"
    return (
        f"At step {SMALL:g} the reverse loss changes by {min(slopes):.2f} to {max(slopes):.2f} times that predicted; "
        f"it stays within {TOLERANCE:.0%} of that up to steps of {min(reached):.1g} to {max(reached):.1g} (means over "
        f"seeds). There a step down the forward loss raises the reverse loss: {rises('whole')} (interval holds 0: "
        f"{undecided}); a step of storage alone: {rises('storage')}; of routing alone: {rises('routing')}."
    )


TRANSFER_TICKS = (-1000, -100, -10, -1, 0, 1, 10, 100, 1000)
STEP_AXIS = {"type": "log", "tickvals": [1e-5, 1e-3, 1e-1], "ticktext": ["1e-5", "1e-3", "0.1"]}


def squeezed(points: pd.DataFrame) -> pd.DataFrame:
    """Values and intervals on an axis that is linear below about 1 and logarithmic beyond, to either side."""
    return points.assign(**{column: np.arcsinh(points[column]) for column in ("value", "low", "high")})


def draw(result: Result) -> go.Figure:
    frame, variants = result.frame, list(VARIANTS)
    figure = make_subplots(
        3,
        len(variants),
        shared_yaxes=True,
        subplot_titles=variants,
        horizontal_spacing=0.02,
        vertical_spacing=0.13,
    )
    shown = [stage for stage in STAGES if (frame["stage"] == stage).any()]
    for col, variant in enumerate(variants, start=1):
        for stage, color in STAGE_COLORS.items():
            at = where(frame, variant=variant, stage=stage)
            if at.empty:
                continue
            whole, small = where(at, group="whole"), where(at, eta=SMALL)
            listed = col == 1
            first = whole.dropna(subset=["slope"])
            if len(first):
                points = curve(first, "eta", "slope")
                legend = "legend" if listed else None
                add_curve(figure, points, "eta", name=stage, color=color, row=1, col=col, legend=legend)
            for quantity, name, dash in (("transfer", "gradient", "solid"), ("random_transfer", "random", "dot")):
                points = squeezed(curve(whole, "eta", quantity)).dropna(subset=["value"])  # only to first order
                if len(points):
                    name, legend = f"{stage}, {name} step", "legend2" if listed else None
                    add_curve(figure, points, "eta", name=name, color=color, row=2, col=col, dash=dash, legend=legend)
            for quantity, name, symbol in (
                ("predicted_transfer", "predicted", "circle"),
                ("random_transfer", "random step", "x-thin-open"),
            ):
                points = squeezed(curve(small, "group", quantity)).set_index("group").reindex(list(GROUPS)).dropna()
                trace = go.Scatter(
                    x=[list(GROUPS).index(group) + 0.22 * (shown.index(stage) - 1) for group in points.index],
                    y=points["value"],
                    error_y=interval_bars(points),
                    mode="markers",
                    marker={"color": color, "size": 9, "symbol": symbol},
                    name=f"{stage}, {name}",
                    legendgroup=f"{stage}, {name}",
                    legend="legend3",
                    showlegend=listed,
                    text=[
                        f"{group}: {value:.3g}"
                        for group, value in zip(points.index, np.sinh(points["value"]), strict=True)
                    ],
                    hovertemplate=f"{stage}, {name}<br>%{{text}}<extra></extra>",
                )
                figure.add_trace(trace, row=3, col=col)
        for row, level, x in ((1, 1.0, ETAS), (2, 0.0, ETAS), (3, 0.0, [-0.5, len(GROUPS) - 0.5])):
            add_level(figure, x, level, name=f"level {level:g}", color=CHANCE, row=row, col=col)
    squeezed_axis = {"tickvals": np.arcsinh(TRANSFER_TICKS).tolist(), "ticktext": [f"{t:g}" for t in TRANSFER_TICKS]}
    figure.update_yaxes(range=[-0.6, 2.1], row=1)
    transfers = [estimate for key, estimate in result.summary.items() if key.endswith("transfer") and estimate.n]
    limit = 1.05 * max(np.arcsinh(max(abs(estimate.low), abs(estimate.high))) for estimate in transfers)
    for row in (2, 3):
        figure.update_yaxes(squeezed_axis | {"range": [-limit, limit]}, row=row)
    figure.update_yaxes(title_text="actual / predicted<br>change of reverse loss", row=1, col=1)
    figure.update_yaxes(title_text="drop of reverse loss per<br>first-order drop of forward", row=2, col=1)
    figure.update_yaxes(title_text=f"the same by what moves,<br>step {SMALL:g}", row=3, col=1)
    for row in (1, 2):
        figure.update_xaxes(STEP_AXIS | {"title_text": "step size η"}, row=row)
    groups = {"tickvals": list(range(len(GROUPS))), "ticktext": list(GROUPS), "tickangle": 60}
    figure.update_xaxes(groups | {"title_text": "what moves"}, row=3)
    figure.update_layout(legend=legend_at(0.5, 0.685), legend2=legend_at(0.5, 0.31), legend3=legend_at(0.5, -0.17))
    figure.update_layout(height=1350)
    return figure


ANALYSIS = Analysis(
    name="first_order",
    question="Does a real step down the forward loss lower the reverse loss as the gradients predict?",
    configs=configs,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    settings={"etas": ETAS, "part_etas": PART_ETAS, "tolerance": TOLERANCE},
    order=60,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
