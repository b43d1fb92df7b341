"""Forward and reverse probability when training masks any entity, only one of the two, or predicts from left to right:
every objective under every position scheme.

In this world every entity stands in two facts. Under single-sided masking a source has one answer only; under any-order
masking it has two, which the model may tell apart by the relation or by the side of the mask. A reverse query that is
answered under one and not under the other may owe it to that, not to the number of orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mdm_interp.config import Objective, TrainConfig
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.grids import MDM_SCHEMES, OBJECTIVES, objective_grid
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import Moment, checkpoints, metrics_at, trained_stages
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.tables import curve, where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import TRAINING_STEPS, add_curve, add_level
from mdm_interp.viz.theme import BLUE, CHANCE, GREEN, ORANGE, VERMILION, legend_at

COLORS: dict[Objective, str] = {
    "any_order": BLUE,
    "source_only": GREEN,
    "target_only": ORANGE,
    "causal": VERMILION,
}
SINGLE_SIDED: tuple[Objective, ...] = ("source_only", "target_only")
TABLES = {"early": "first learnt forward", "highest": "highest of training", "end": "end of training"}
"""The heat maps: how the summary calls a reverse probability, and the panel's title."""


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    return objective_grid(seeds, ["relation_cycle"])


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """The metrics that training recorded."""
    return [metrics_at(run, step)]


def when(run: Run) -> list[Moment]:
    """Every checkpoint, and the trained stages."""
    return [*checkpoints(run), *trained_stages(run)]


def summarize(result: Result) -> dict[str, Estimate]:
    frame, summary = result.frame, {}
    for objective in OBJECTIVES:
        for scheme in MDM_SCHEMES:
            setting = f"{objective} / {scheme}"
            for stage in ("early", "end"):
                at = where(frame, objective=objective, scheme=scheme, stage=stage)
                for quantity in ("forward_probability", "reverse_probability"):
                    summary[f"{setting} / {stage} {quantity}"] = mean_estimate(at[quantity])
                above = at["reverse_probability"] - at["chance"]
                summary[f"{setting} / {stage} reverse above chance"] = mean_estimate(above)
            path = where(frame, objective=objective, scheme=scheme, stage="checkpoint")
            peak = path.groupby("seed")["reverse_probability"].max()
            summary[f"{setting} / highest reverse_probability"] = mean_estimate(peak)
    summary["chance"] = mean_estimate(frame.groupby("seed")["chance"].first())
    return summary


def takeaway(result: Result) -> str:
    summary = result.summary

    def split(objectives: Sequence[Objective]) -> str:
        above, failing = [], []
        for objective in objectives:
            for scheme in MDM_SCHEMES:
                cleared = summary[f"{objective} / {scheme} / end reverse above chance"].low > 0
                value = summary[f"{objective} / {scheme} / end reverse_probability"].value
                (above if cleared else failing).append((value, f"{objective} {scheme} ({value:.2g})"))
        values = [value for value, _ in above]
        between = f" ({min(values):.3g} to {max(values):.3g})" if values else ""
        exceptions = (
            f", not in {', '.join(name for _, name in failing)}" if 0 < len(failing) <= len(MDM_SCHEMES) else ""
        )
        return f"in {len(above)} of {len(above) + len(failing)} settings{between}{exceptions}"

    return (
        f"At the end of training, reverse queries are answered above chance ({summary['chance'].value:.2g}) by "
        f"single-sided masking {split(SINGLE_SIDED)}; by any-order masking {split(['any_order'])}; "
        f"by left-to-right prediction {split(['causal'])}."
    )


def draw(result: Result) -> go.Figure:
    tables = {table: cells for table in TABLES if (cells := _cells(result.summary, table))}
    width = 12 // len(tables)
    curves = [{"colspan": 3} if i % 3 == 0 else None for i in range(12)]
    heat = [{"colspan": width} if i % width == 0 else None for i in range(12)]
    titles = [*MDM_SCHEMES, *[""] * len(MDM_SCHEMES), *[f"reverse probability, {TABLES[table]}" for table in tables]]
    figure = make_subplots(
        3,
        12,
        specs=[curves, curves, heat],
        subplot_titles=titles,
        horizontal_spacing=0.03,
        vertical_spacing=0.1,
        row_heights=[0.33, 0.33, 0.34],
    )
    frame = where(result.frame[result.frame["step"] > 0], stage="checkpoint")
    for row, side in enumerate(("forward", "reverse"), start=1):
        for place, scheme in enumerate(MDM_SCHEMES):
            at: dict[str, Any] = {"row": row, "col": 1 + 3 * place}
            legend = "legend" if row == 1 and place == 0 else None
            for objective, color in COLORS.items():
                group = where(frame, objective=objective, scheme=scheme)
                points = curve(group, "step", f"{side}_probability")
                add_curve(figure, points, "step", name=objective, color=color, legend=legend, **at)
            steps, chance = frame["step"].tolist(), frame["chance"].iloc[0]
            name = "chance: the answer's role known, nothing else"
            add_level(figure, steps, chance, name=name, color=CHANCE, legend=legend, **at)
            figure.update_xaxes(TRAINING_STEPS, showticklabels=row == 2, **at)
            figure.update_xaxes(title_text="training step" if row == 2 else None, **at)
            figure.update_yaxes(range=[-0.03, 1.03], showticklabels=place == 0, **at)
        figure.update_yaxes(title_text=f"{side} query:<br>probability of answer", row=row, col=1)
    for place, cells in enumerate(tables.values()):
        last = place == len(tables) - 1
        scale = {"title": {"text": "probability"}, "len": 0.3, "y": 0.13, "tickfont": {"size": 15}} if last else None
        trace = go.Heatmap(
            x=[scheme for _, scheme, _ in cells],
            y=[objective for objective, _, _ in cells],
            z=[estimate.value for *_, estimate in cells],
            text=[f"{e.value:.2f}" + (f"<br>{e.low:.2f} to {e.high:.2f}" if e.n > 1 else "") for *_, e in cells],
            zmin=0,
            zmax=1,
            colorscale=[[0, "#F7F7F7"], [1, BLUE]],
            texttemplate="%{text}",
            textfont={"size": 14},
            showscale=last,
            colorbar=scale,
            hovertemplate="%{y}, %{x}: %{z:.3g}<extra></extra>",
        )
        figure.add_trace(trace, row=3, col=1 + width * place)
        order = {"categoryorder": "array", "categoryarray": list(OBJECTIVES), "autorange": "reversed"}
        figure.update_yaxes(order, showticklabels=place == 0, row=3, col=1 + width * place)
        figure.update_xaxes(title_text="position scheme", row=3, col=1 + width * place)
    figure.update_yaxes(title_text="objective", row=3, col=1)
    figure.update_layout(legend=legend_at(0.5, -0.09))
    figure.update_layout(height=1200)
    return figure


def _cells(summary: dict[str, Estimate], table: str) -> list[tuple[str, str, Estimate]]:
    """Objective, scheme and reverse probability of the settings that have one."""
    cells = [(o, s, summary[f"{o} / {s} / {table} reverse_probability"]) for o in OBJECTIVES for s in MDM_SCHEMES]
    return [cell for cell in cells if cell[2].n]


ANALYSIS = Analysis(
    name="objective_ablation",
    question="Is any-order masking what makes reverse queries answerable?",
    configs=configs,
    measure=measure,
    when=when,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=15,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
