"""Direction selectivity of heads over training beside what their models answer in reverse, under six position schemes;
and, for rope, which planes the content is in and which of them tell left from right."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mdm_interp import Analysis, Result, Run, Summary, first_and_last, where
from mdm_interp.experiments.grids import SCHEMES, scheme_grid
from mdm_interp.experiments.scope import second_checkpoints
from mdm_interp.measures.parity import direction_selectivity, plane_energy, score_parity
from mdm_interp.viz import (
    BLUE,
    CHANCE,
    FORWARD,
    GREY,
    PROBABILITY,
    REVERSE,
    SCHEME_COLORS,
    SKY,
    TRAINING_STEPS,
    VERMILION,
    Panel,
    Panels,
)

OF_RUN = ("selectivity", "null")
OF_PLANE = ("plane", "wavelength", "energy_share", "odd_energy", "odd_uniform")
MOMENTS = ("initial", "reverse peak", "end")


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give two kinds of rows: one `run` (selectivity: mean over heads); under rope, before and after, `plane` for each
    plane (mean over heads)."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    selectivity = direction_selectivity(score_parity(model, pairs), pairs)
    of_run = {"selectivity": selectivity.effect.nanmean().item(), "null": selectivity.null.nanmean().item()}
    rows: list[dict[str, Any]] = [{"kind": "run", **of_run}]
    if run.config.model.position == "rope" and step in (run.steps[0], run.steps[-1]):
        energy = {name: values.tolist() for name, values in vars(plane_energy(model, pairs)).items()}
        rows += [
            {"kind": "plane", "plane": plane, **dict(zip(energy, values, strict=True))}
            for plane, values in enumerate(zip(*energy.values(), strict=True))
        ]
    return [{**dict.fromkeys(OF_RUN + OF_PLANE, float("nan")), **row} for row in rows]


def at_moments(rows: pd.DataFrame) -> pd.DataFrame:
    """Return three rows per run: its first and last checkpoint, and the one after the first where its reverse
    probability is highest."""
    steps = rows.groupby("run", sort=False)["step"]
    peaks = rows[rows["step"] > 0].groupby("run", sort=False)["reverse_probability"].idxmax()
    places = zip(MOMENTS, (steps.idxmin(), peaks, steps.idxmax()), strict=True)
    return pd.concat([rows.loc[at].assign(moment=moment) for moment, at in places])


def summarize(result: Result) -> Summary:
    """Summarise runs at their moments and how they change from the reverse peak to the end; and planes at the first
    and the last checkpoint."""
    frame, of_run = result.frame, ["selectivity", "reverse_probability"]
    runs = at_moments(where(frame, kind="run"))
    runs = runs.assign(selectivity_null=runs["null"], over_null=runs["selectivity"] - runs["null"])
    peak, end = (where(runs, moment=moment).set_index(["scheme", "run"])[of_run] for moment in MOMENTS[1:])
    changes = (end - peak).add_prefix("change_of_").reset_index()
    planes = first_and_last(where(frame, kind="plane"))
    totals = planes.groupby(["stage", "run"])[["odd_energy", "odd_uniform"]].sum()
    ratios = (totals["odd_energy"] / totals["odd_uniform"]).reset_index(name="odd_over_uniform")
    return (
        Summary.of(runs, ("scheme", "moment"), (*of_run, "over_null"))
        + Summary.of(changes, ("scheme",), [f"change_of_{name}" for name in of_run])
        + Summary.of(ratios, ("stage",), ("odd_over_uniform",))
        + Summary.of(planes, ("stage", "plane"), ("energy_share",))
    )


def takeaway(result: Result) -> str:
    summary = result.summary

    def moved(scheme: str) -> str:
        selectivity, reverse = (
            [summary.at(quantity, scheme=scheme, moment=moment).value for moment in MOMENTS[1:]]
            for quantity in ("selectivity", "reverse_probability")
        )
        return f"{scheme} {selectivity[0]:.2f} to {selectivity[1]:.2f} ({reverse[0]:.2g} to {reverse[1]:.2g})"

    initial, end = (summary.at("odd_over_uniform", stage=stage).value for stage in ("initial", "end"))
    return (
        "Selectivity, and in brackets reverse probability, from where reverse prediction is best to the end: "
        f"{', '.join(map(moved, SCHEMES))}. The odd energy of rope heads goes from {initial:.2f} to {end:.2f} of "
        "what uniform phases would give."
    )


def draw(result: Result) -> Panels:
    panels, runs = Panels(), where(result.frame, kind="run")
    trained = runs[runs["step"] > 0]
    by_selectivity = panels.row(SCHEMES, x=TRAINING_STEPS, y=PROBABILITY, ticks=False)
    by_probability = panels.row([""] * len(SCHEMES), x=TRAINING_STEPS, y=PROBABILITY)
    by_selectivity[0].y(title="direction selectivity<br>(odd share of energy)")
    by_probability[0].y(title="probability of<br>answer")
    for selectivity, probability, scheme in zip(by_selectivity, by_probability, SCHEMES, strict=True):
        group = where(trained, scheme=scheme)
        selectivity.curve(group, "step", "selectivity", name="measured", color=BLUE)
        selectivity.curve(group, "step", "null", name="null: right of one fact, left of another", color=GREY)
        probability.curve(group, "step", "forward_probability", name="forward query", color=FORWARD)
        probability.curve(group, "step", "reverse_probability", name="reverse query", color=REVERSE)
        probability.level(group["chance"].iloc[0], name="chance", color=CHANCE)
    thirds = ["energy by plane, rope", "odd energy by plane, rope", "each run at the end"]
    shares, odd, ends = panels.row(thirds, one_y=False, height=350)
    _draw_planes(shares, odd, where(result.frame, kind="plane"))
    _draw_runs(ends, where(at_moments(runs), moment="end").dropna(subset="selectivity"))
    return panels


def _draw_planes(shares: Panel, odd: Panel, planes: pd.DataFrame) -> None:
    for stage, step, color in (("before", planes["step"].min(), SKY), ("after", planes["step"].max(), VERMILION)):
        at = where(planes, step=step)
        shares.curve(at, "wavelength", "energy_share", name=stage, color=color)
        odd.curve(at, "wavelength", "odd_energy", name=stage, color=color)
        odd.curve(at, "wavelength", "odd_uniform", name=f"{stage}, uniform phases", color=color, dash="dot")
    shares.level(1 / planes["wavelength"].nunique(), name="equal shares", color=CHANCE)
    for panel in (shares, odd):
        panel.x(type="log", tickvals=[10, 100, 1000, 10_000], ticktext=["10", "100", "1k", "10k"])
        panel.x(title="wavelength of the plane (positions)")
    shares.y(title="share of the energy", rangemode="tozero")
    odd.y(title="mean square of the odd part (score²)", type="log", dtick=2, exponentformat="power")


def _draw_runs(panel: Panel, end: pd.DataFrame) -> None:
    for scheme, color in SCHEME_COLORS.items():
        rows = where(end, scheme=scheme)
        look: dict[str, Any] = {"color": color, "size": 10, "opacity": 0.75}
        seeds = [f"seed {seed}" for seed in rows["seed"]]
        panel.dots(rows, "selectivity", "reverse_probability", name=scheme, label=seeds, **look)
    panel.x(title="direction selectivity")
    panel.y(title="reverse probability", **PROBABILITY)


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
