"""Reverse probability of facts whose source training shows on one side only, against the share of other facts that it
shows both ways.

In `relation_cycle` every entity stands left in one relation and right in another, which trains the routes to it from
both sides. In `symmetric_pool` every entity stands in one fact: only other facts can teach a model to look for a source
on the side where training never showed this one. As gaps are free, an ARM cannot know where the answer comes, so its
forward probability stays well below 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import exp
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mdm_interp.config import TrainConfig
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.grids import BOTH_WAYS, POOL_CONTRASTS, POOL_MODELS, pool_grid
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import LEARNT, Moment, checkpoints, metrics_at, stages
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.tables import curve, where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import TRAINING_STEPS, add_curve, add_level, add_points
from mdm_interp.viz.theme import BLUE, CHANCE, PURPLE, SKY, VERMILION, legend_at

COLORS = dict(zip(POOL_MODELS, (BLUE, SKY, PURPLE, VERMILION), strict=True))
MDMS = [name for name, (_, objective, *_) in POOL_MODELS.items() if objective != "causal"]
(ARM,) = POOL_MODELS.keys() - MDMS
ROPE, LEARNED = POOL_CONTRASTS
MOST = BOTH_WAYS[-1]


def model_of(config: TrainConfig) -> str:
    """The name of a run's model, as in `POOL_MODELS`."""
    shape = (config.model.position, config.objective, config.model.head_dim, config.model.rotary_base)
    return next(name for name, settings in POOL_MODELS.items() if settings == shape)


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """The metrics that training recorded."""
    return [{"model": model_of(run.config), **metrics_at(run, step)}]


def when(run: Run) -> list[Moment]:
    """Every checkpoint, and the stages."""
    return [*checkpoints(run), *stages(run)]


def summarize(result: Result) -> dict[str, Estimate]:
    frame = result.frame

    def by_seed(name: str, share: float, stage: str = "end", query: str = "reverse") -> pd.Series:
        at = where(frame, model=name, reversed_share=share, stage=stage)
        return at.set_index("seed")[f"{query}_probability"]

    summary = {"chance": mean_estimate(frame.groupby("seed")["chance"].first())}
    for share in BOTH_WAYS:
        for name in POOL_MODELS:
            key = f"{name}, {share:.0%} both ways"
            for stage in ("early", "end"):
                for query in ("forward", "reverse"):
                    values = by_seed(name, share, stage, query)
                    summary[f"{key} / {stage} {query}_probability"] = mean_estimate(values)
            reverse = by_seed(name, share)
            summary[f"{key} / end reverse above chance"] = mean_estimate(reverse - summary["chance"].value)
            summary[f"{key} / end forward - reverse"] = mean_estimate(by_seed(name, share, query="forward") - reverse)
            if share:
                summary[f"{key} / end reverse gained over 0%"] = mean_estimate(reverse - by_seed(name, 0.0))
            if name != ARM:
                ratio = np.log(reverse / by_seed(ARM, share))
                summary[f"{key} / end log ratio of reverse to the ARM's"] = mean_estimate(ratio)
        for stage in ("early", "end"):
            difference = by_seed(LEARNED, share, stage) - by_seed(ROPE, share, stage)
            summary[f"learned - rope, {share:.0%} both ways / {stage} reverse_probability"] = mean_estimate(difference)
    return summary


def takeaway(result: Result) -> str:
    """Say what the intervals over seeds say: an effect is there if its whole interval is on one side of 0."""
    summary = result.summary
    return f"{_suffices(summary)} {_gained(summary)} {_separates(summary)}"


def side(estimate: Estimate) -> str:
    """The side of 0 on which the whole interval is, if on one; a single seed has no interval."""
    return "above" if estimate.low > 0 else "below" if estimate.high < 0 else "undecided"


def agreed(sides: Iterable[str]) -> str:
    """The side that all are on, if they are on one."""
    (first, *others) = set(sides)
    return "undecided" if others else first


def answered(summary: Mapping[str, Estimate], name: str) -> str:
    """Whether a model answers in reverse though no fact is shown both ways: above chance and, unless the answer is only
    "in part", not below its forward probability."""
    above_chance = side(summary[f"{name}, 0% both ways / end reverse above chance"])
    if above_chance == "above":
        return "in part" if side(summary[f"{name}, 0% both ways / end forward - reverse"]) == "above" else "yes"
    return "no" if above_chance == "below" else "undecided"


def _suffices(summary: Mapping[str, Estimate]) -> str:
    """Whether it suffices to show a source on one side."""

    def values(query: str) -> list[float]:
        return [summary[f"{name}, 0% both ways / end {query}_probability"].value for name in MDMS]

    answers, chance = [answered(summary, name) for name in MDMS], f"chance {summary['chance'].value:.2g}"
    if agreed(answers) == "undecided":
        each = zip(answers, MDMS, values("reverse"), strict=True)
        listed = ", ".join(f"{answer} for {name} ({value:.2g})" for answer, name, value in each)
        return f"If training shows it on one side only: {listed}; {chance}."
    reverse, forward = (f"{min(values(query)):.2g} to {max(values(query)):.2g}" for query in ("reverse", "forward"))
    return f"{agreed(answers).capitalize()}: every MDM then answers at {reverse} (forward {forward}, {chance})."


def _gained(summary: Mapping[str, Estimate]) -> str:
    """What it brings to show other facts both ways."""

    def at_most(name: str, quantity: str) -> Estimate:
        return summary[f"{name}, {MOST:.0%} both ways / {quantity}"]

    gains = {name: at_most(name, "end reverse gained over 0%") for name in POOL_CONTRASTS}
    verb = {"above": "raises", "below": "lowers"}.get(agreed(map(side, gains.values())), "changes")
    listed = " and ".join(f"{gain} ({POOL_MODELS[name][0]})" for name, gain in gains.items())
    ratios = [exp(at_most(name, "end log ratio of reverse to the ARM's").value) for name in POOL_CONTRASTS]
    times = " and ".join(f"{float(f'{ratio:.2g}'):,g}" for ratio in ratios)
    return f"Showing {MOST:.0%} of other facts both ways {verb} that by {listed}, to {times} times the ARM's."


def _separates(summary: Mapping[str, Estimate]) -> str:
    """Whether rope or learned positions are better in reverse at each share, by paired seeds."""
    of_share = {
        share: summary[f"learned - rope, {share:.0%} both ways / end reverse_probability"] for share in BOTH_WAYS
    }
    measured = {share: difference for share, difference in of_share.items() if difference.n}
    if any(difference.n < 2 for difference in measured.values()):
        return "One seed cannot tell learned from rope."
    listed = ", ".join(f"{difference} at {share:.0%}" for share, difference in measured.items())
    better = {
        scheme: " and ".join(f"{share:.0%}" for share, difference in measured.items() if side(difference) == sign)
        for scheme, sign in (("learned", "above"), ("rope", "below"))
    }
    found = ", ".join(f"{scheme} is better at {at}" for scheme, at in better.items() if at) or "neither is better"
    concluded = "" if better["rope"] else "; relative encoding may not be what separates"
    return f"Learned minus rope: {listed}; {found}{concluded}."


def draw(result: Result) -> go.Figure:
    frame, chance = result.frame, result.summary["chance"].value
    shares = [share for share in BOTH_WAYS if (frame["reversed_share"] == share).any()]
    panels = {
        "reverse query, end of training": ("end", "reverse"),
        "forward query, end of training": ("end", "forward"),
        f"reverse query, when forward reaches {LEARNT}": ("early", "reverse"),
    }
    width = 6 // len(shares)
    figure = make_subplots(
        2,
        6,
        specs=[[{"colspan": 2}, None] * 3, ([{"colspan": width}] + [None] * (width - 1)) * len(shares)],
        subplot_titles=[*panels, *(f"reverse query, {share:.0%} both ways" for share in shares)],
        horizontal_spacing=0.04,
        vertical_spacing=0.2,
    )
    for place, (stage, query) in enumerate(panels.values()):
        _draw_ends(figure, where(frame, stage=stage), query, 1 + 2 * place)
        add_level(figure, [-0.05, 0.85], chance, name="chance", color=CHANCE, row=1, col=1 + 2 * place)
    for place, share in enumerate(shares):
        at: dict[str, Any] = {"row": 2, "col": 1 + width * place}
        trained = where(frame[frame["step"] > 0], stage="checkpoint", reversed_share=share)
        for name, color in COLORS.items():
            points = curve(where(trained, model=name), "step", "reverse_probability")
            add_curve(figure, points, "step", name=name, color=color, **at)
        add_level(figure, trained["step"].tolist(), chance, name="chance", color=CHANCE, **at)
        figure.update_xaxes(TRAINING_STEPS, title_text="training step", **at)
    named: dict[str, Any] = {"text": "chance", "font": {"color": CHANCE}, "showarrow": False, "yanchor": "bottom"}
    figure.add_annotation(named, x=0.25, y=chance, row=1, col=3)
    figure.update_yaxes(range=[-0.03, 1.03], showticklabels=False)
    figure.update_yaxes(title_text="probability of answer", showticklabels=True, col=1)
    figure.update_layout(legend=legend_at(0.5, -0.12))
    figure.update_layout(height=950)
    return figure


def _draw_ends(figure: go.Figure, staged: pd.DataFrame, query: str, col: int) -> None:
    """Means over seeds against the share shown both ways, and the seeds as dots."""
    quantity = f"{query}_probability"
    legend = "legend" if col == 1 else None
    for place, (name, color) in enumerate(COLORS.items()):
        group, shift = where(staged, model=name), 0.018 * (place - 1.5)
        if group.empty:
            continue
        seeds = go.Scatter(
            x=group["reversed_share"] + shift + 0.007,
            y=group[quantity],
            mode="markers",
            marker={"color": color, "size": 6, "opacity": 0.4},
            name=name,
            legendgroup=name,
            showlegend=False,
            customdata=group["seed"],
            hovertemplate=f"{name}, seed %{{customdata}}: %{{y:.3g}}<extra></extra>",
        )
        figure.add_trace(seeds, row=1, col=col)
        points = curve(group, "reversed_share", quantity)
        marks: dict[str, Any] = {"name": name, "color": color, "row": 1, "col": col, "legend": legend}
        add_points(figure, points, "reversed_share", shift=shift, **marks)
    shares = {"tickvals": list(BOTH_WAYS), "tickformat": ".0%", "range": [-0.06, 0.86]}
    figure.update_xaxes(shares, title_text="other facts shown both ways", row=1, col=col)


ANALYSIS = Analysis(
    name="one_sided_routes",
    question="Is a fact answered in reverse if training showed its source on one side only?",
    configs=pool_grid,
    measure=measure,
    when=when,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=14,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
