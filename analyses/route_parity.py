"""Direction selectivity of heads over training beside what their models answer in reverse, under six position schemes;
and, for rope, which planes the content is in and which of them tell left from right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from mdm_interp.data.queries import QueryPair
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.grids import SCHEMES, scheme_grid
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import second_checkpoints
from mdm_interp.measures.parity import Parity, plane_spectrum, rope_parity, score_parity
from mdm_interp.measures.rope import compute_content, plane_products, require_rope
from mdm_interp.measures.routes import other_facts
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.tables import curve, where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import TRAINING_STEPS, add_curve, add_level
from mdm_interp.viz.theme import BLUE, CHANCE, FORWARD, GREY, REVERSE, SKY, VERMILION, legend_at
from mdm_interp.viz.theme import SCHEMES as COLORS

OF_RUN = ("selectivity", "null")
OF_PLANE = ("plane", "wavelength", "energy_share", "odd_energy", "odd_uniform")
STAGES = ("initial", "reverse peak", "end")


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Two kinds of rows: one `run` (selectivity: mean over heads); under rope, before and after, `plane` for each plane
    (mean over heads)."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    parity = score_parity(model, pairs)
    of_run = {
        "selectivity": parity.selectivity().nanmean().item(),
        "null": mispaired_selectivity(parity, pairs).nanmean().item(),
    }
    rows: list[dict[str, Any]] = [{"kind": "run", **of_run}]
    if run.config.model.position == "rope" and step in (run.steps[0], run.steps[-1]):
        rows += [{"kind": "plane", **of_plane} for of_plane in measure_planes(model, pairs)]
    return [{**dict.fromkeys(OF_RUN + OF_PLANE, float("nan")), **row} for row in rows]


def mispaired_selectivity(parity: Parity, pairs: Sequence[QueryPair]) -> Float[Tensor, "layer head"]:
    """The null: selectivity when one fact's score with the source on the right meets another fact's score with the
    source on the left, mean over all rotations. Where sides share nothing but what all facts share, it is the measured
    one; it lies above where a source draws attention from both sides alike."""
    right, left = parity.even + parity.odd, parity.even - parity.odd
    nulls = [Parity((right + left[other]) / 2, (right - left[other]) / 2).selectivity() for other in other_facts(pairs)]
    return torch.stack(nulls).mean(0)


def measure_planes(model: HookedTransformer, pairs: Sequence[QueryPair]) -> list[dict[str, float]]:
    """First-layer energy per plane: its share in how scores vary, the mean square of its odd part, and what that would
    be for the same sizes with uniformly distributed phases, ½ |z_p|² sin²(delta theta_p) / d_head."""
    rope = require_rope(model)
    shares = plane_spectrum(model, pairs)[0].mean(0)
    odd = rope_parity(model, pairs).odd[:, 0].pow(2).mean((0, 1))
    z = plane_products(compute_content(model, [pair.forward for pair in pairs]), rope)[:, 0].to(torch.complex128)
    distance = torch.tensor([abs(pair.forward.offset) for pair in pairs], dtype=torch.float64)
    turned = (distance[:, None] * rope.theta).sin().pow(2)[:, None]
    uniform = (z.abs().pow(2) * turned / 2 / model.cfg.head_dim).mean((0, 1))
    return [
        {
            "plane": plane,
            "wavelength": 2 * torch.pi / theta,
            "energy_share": shares[plane].item(),
            "odd_energy": odd[plane].item(),
            "odd_uniform": uniform[plane].item(),
        }
        for plane, theta in enumerate(rope.theta.tolist())
    ]


def at_stage(group: pd.DataFrame, stage: str) -> pd.DataFrame:
    """One row per run: its first or last checkpoint, or the one after the first where its reverse probability is
    highest."""
    if stage == "reverse peak":
        return group.loc[where_trained(group).groupby("run")["reverse_probability"].idxmax()]
    return where(group, step=group["step"].min() if stage == "initial" else group["step"].max())


def where_trained(group: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(group[group["step"] > 0])


def summarize(result: Result) -> dict[str, Estimate]:
    frame = result.frame
    summary = {}
    for scheme in SCHEMES:
        group = where(frame, kind="run", scheme=scheme)
        for stage in STAGES:
            at = at_stage(group, stage)
            for quantity in ("selectivity", "null", "reverse_probability"):
                summary[f"{scheme} / {stage} / {quantity}"] = mean_estimate(at[quantity])
            excess = at["selectivity"] - at["null"]
            summary[f"{scheme} / {stage} / selectivity over null"] = mean_estimate(excess)
        peak, end = (at_stage(group, stage).set_index("run") for stage in STAGES[1:])
        for quantity in ("selectivity", "reverse_probability"):
            change = end[quantity] - peak[quantity]
            summary[f"{scheme} / change of {quantity} after the reverse peak"] = mean_estimate(change)
    planes = where(frame, kind="plane")
    for stage, step in (("initial", frame["step"].min()), ("end", frame["step"].max())):
        at = where(planes, step=step)
        totals = at.groupby("run")[["odd_energy", "odd_uniform"]].sum()
        ratio = totals["odd_energy"] / totals["odd_uniform"]
        summary[f"rope / {stage} / odd energy over that of uniform phases"] = mean_estimate(ratio)
        for plane, group in at.groupby("plane"):
            summary[f"rope / {stage} / energy share of plane {plane:.0f}"] = mean_estimate(group["energy_share"])
    return summary


def takeaway(result: Result) -> str:
    summary = result.summary

    def moved(scheme: str) -> str:
        selectivity, reverse = (
            [summary[f"{scheme} / {stage} / {quantity}"].value for stage in ("reverse peak", "end")]
            for quantity in ("selectivity", "reverse_probability")
        )
        return f"{scheme} {selectivity[0]:.2f} to {selectivity[1]:.2f} ({reverse[0]:.2g} to {reverse[1]:.2g})"

    ratio = [summary[f"rope / {stage} / odd energy over that of uniform phases"].value for stage in ("initial", "end")]
    return (
        "Selectivity, and in brackets reverse probability, from where reverse prediction is best to the end: "
        f"{', '.join(map(moved, SCHEMES))}. The odd energy of rope heads goes from {ratio[0]:.2f} to {ratio[1]:.2f} of "
        "what uniform phases would give."
    )


def draw(result: Result) -> go.Figure:
    frame = result.frame
    runs = where(frame, kind="run")
    thirds = ("energy by plane, rope", "odd energy by plane, rope", "each run at the end")
    figure = make_subplots(
        3,
        len(SCHEMES),
        specs=[[{}] * 6, [{}] * 6, [{"colspan": 2}, None, *[{"colspan": 2, "l": 0.06}, None] * 2]],
        subplot_titles=[*SCHEMES, *[""] * 6, *thirds],
        horizontal_spacing=0.035,
        vertical_spacing=0.13,
        row_heights=[0.3, 0.3, 0.4],
    )
    for col, scheme in enumerate(SCHEMES, start=1):
        group = where_trained(where(runs, scheme=scheme))
        legends = ("legend", "legend2") if col == 1 else (None, None)
        for row, quantity, name, color in (
            (1, "selectivity", "measured", BLUE),
            (1, "null", "null: right of one fact, left of another", GREY),
            (2, "forward_probability", "forward query", FORWARD),
            (2, "reverse_probability", "reverse query", REVERSE),
        ):
            measured = group[group[quantity].notna()]
            if len(measured):
                points = curve(measured, "step", quantity)
                add_curve(figure, points, "step", name=name, color=color, row=row, col=col, legend=legends[row - 1])
        steps, chance = group["step"].tolist(), group["chance"].iloc[0]
        add_level(figure, steps, chance, name="chance", color=CHANCE, row=2, col=col, legend=legends[1])
    figure.update_xaxes(TRAINING_STEPS, showticklabels=False, row=1)
    figure.update_xaxes(TRAINING_STEPS, title_text="training step", row=2)
    figure.update_yaxes(range=[-0.03, 1.03], showticklabels=False)
    figure.update_yaxes(title_text="direction selectivity<br>(odd share of energy)", showticklabels=True, row=1, col=1)
    figure.update_yaxes(title_text="probability of<br>answer", showticklabels=True, row=2, col=1)
    _draw_planes(figure, where(frame, kind="plane"))
    _draw_runs(figure, runs)
    figure.update_layout(legend=legend_at(0.5, 0.75), legend2=legend_at(0.5, 0.36))
    figure.update_layout(legend3=legend_at(0.5, -0.08), legend4=legend_at(0.5, -0.115))
    figure.update_layout(height=1250)
    return figure


def _draw_planes(figure: go.Figure, planes: pd.DataFrame) -> None:
    wavelengths = sorted(planes["wavelength"].unique())
    for stage, step, color in (("before", planes["step"].min(), SKY), ("after", planes["step"].max(), VERMILION)):
        at = where(planes, step=step)
        for col, quantity in ((1, "energy_share"), (3, "odd_energy")):
            legend = "legend3" if col == 1 else None
            points = curve(at, "wavelength", quantity)
            add_curve(figure, points, "wavelength", name=stage, color=color, row=3, col=col, legend=legend)
        name, points = f"{stage}, uniform phases", curve(at, "wavelength", "odd_uniform")
        add_curve(figure, points, "wavelength", name=name, color=color, row=3, col=3, dash="dot", legend="legend3")
    equal = {"name": "equal shares", "color": CHANCE, "legend": "legend3"}
    add_level(figure, wavelengths, 1 / len(wavelengths), row=3, col=1, **equal)
    shown = {"type": "log", "tickvals": [10, 100, 1000, 10_000], "ticktext": ["10", "100", "1k", "10k"]}
    for col in (1, 3):
        figure.update_xaxes(shown, title_text="wavelength of the plane (positions)", row=3, col=col)
    shares = {"range": None, "rangemode": "tozero", "showticklabels": True, "title_text": "share of the energy"}
    figure.update_yaxes(shares, row=3, col=1)
    odd = {"type": "log", "range": None, "showticklabels": True, "dtick": 2, "exponentformat": "power"}
    figure.update_yaxes(odd, title_text="mean square of the odd part<br>(score²)", row=3, col=3)


def _draw_runs(figure: go.Figure, runs: pd.DataFrame) -> None:
    for scheme, color in COLORS.items():
        end = at_stage(where(runs, scheme=scheme), "end").dropna(subset="selectivity")
        if end.empty:
            continue
        trace = go.Scatter(
            x=end["selectivity"],
            y=end["reverse_probability"],
            mode="markers",
            marker={"color": color, "size": 10, "opacity": 0.75},
            name=scheme,
            legend="legend4",
            customdata=end["seed"],
            hovertemplate=f"{scheme}, seed %{{customdata}}<br>%{{x:.3g}}, reverse %{{y:.3g}}<extra></extra>",
        )
        figure.add_trace(trace, row=3, col=5)
    figure.update_xaxes(title_text="direction selectivity", row=3, col=5)
    reverse = {"type": "log", "range": None, "showticklabels": True, "dtick": 1}
    figure.update_yaxes(reverse, title_text="reverse probability", row=3, col=5)


ANALYSIS = Analysis(
    name="route_parity",
    question="Do heads learn to tell left from right, and does reverse prediction fall as they do?",
    configs=scheme_grid,
    measure=measure,
    when=second_checkpoints,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=35,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
