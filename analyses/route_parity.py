"""Direction selectivity of heads over training beside what their models answer in reverse, under six position schemes;
and, for rope, which planes the content is in and which of them tell left from right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from mdm_interp import Analysis, Result, Run, Summary, first_and_last, where
from mdm_interp.experiments.grids import SCHEMES, scheme_grid
from mdm_interp.experiments.scope import second_checkpoints
from mdm_interp.measures.parity import direction_selectivity, plane_energy, score_parity
from mdm_interp.stats.estimates import mean_estimate
from mdm_interp.stats.tables import curve
from mdm_interp.viz import (
    CHANCE,
    PROBABILITY,
    SCHEME_COLORS,
    SHADES,
    TRAINING_STEPS,
    Panel,
    Panels,
    alike,
    shown,
)
from mdm_interp.viz.words import joined, sample_size, span

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
    summary, runs = result.summary, where(result.frame, kind="run")
    rope = where(runs, scheme="rope").astype({"selectivity": float, "null": float})
    peak = rope.groupby("step")["selectivity"].mean().idxmax()
    at_peak = where(rope, step=peak)
    highest = mean_estimate(at_peak["selectivity"])
    over_null = mean_estimate(at_peak["selectivity"] - at_peak["null"])
    end = summary.at("selectivity", scheme="rope", moment="end")
    lost = end.high < highest.low
    falling = [name for name in SCHEMES if summary.at("change_of_reverse_probability", scheme=name).side == "below"]
    told = f"{highest.value:.2f} of their energy is odd at step {peak}, {end.value:.2f} in the end"
    answer = (
        f"RoPE heads do{' for a while' if lost else ''}" if over_null.side == "above" else "RoPE heads do not for sure"
    )
    fallen = [summary.at("change_of_reverse_probability", scheme=name) for name in falling]
    reverse = (
        f"from its best, reverse probability falls by {span([replace(one, value=-one.value) for one in fallen])} under "
        f"{joined([shown(name) for name in falling])}"
        if falling
        else "reverse probability surely falls from its best under no scheme"
    )
    return f"{answer}: {told}; {reverse} ({sample_size([highest, *fallen, end])})."


def draw(result: Result) -> Panels:
    """Draw selectivity and reverse probability over training, each scheme beside its null, and the planes of RoPE."""
    panels, runs = Panels(), where(result.frame, kind="run")
    trained = runs[runs["step"] > 0]
    size = sample_size([entry.effect for entry in result.summary.where("selectivity", moment="end")])
    titles = ["do heads tell left from right?", f"is the reverse query answered? ({size})"]
    selective, answered = panels.row(titles, x=TRAINING_STEPS, y=PROBABILITY, height=330, one_y=False)
    selective.y(title="direction selectivity<br>(odd share of energy)")
    answered.y(title="reverse probability")
    for panel, quantity in ((selective, "selectivity"), (answered, "reverse_probability")):
        for names, scheme in alike(trained, quantity):
            panel.curve(where(trained, scheme=scheme), "step", quantity, name=names, color=SCHEME_COLORS[scheme])
    answered.level(trained["chance"].iloc[0], name="chance", color=CHANCE)
    titles = [shown(scheme) for scheme in SCHEMES]
    row = panels.row(titles, x=TRAINING_STEPS, y={**PROBABILITY, "title": "selectivity"}, height=150)
    for panel, scheme in zip(row, SCHEMES, strict=True):
        group = where(trained, scheme=scheme)
        panel.curve(group, "step", "selectivity", name=shown(scheme), color=SCHEME_COLORS[scheme], listed=False)
        panel.curve(group, "step", "null", name="null: right of one fact, left of another", color=CHANCE, dash="dot")
    thirds = ["energy by plane, RoPE", "odd energy by plane, RoPE", "each run at the end"]
    shares, odd, ends = panels.row(thirds, one_y=False, height=260)
    _draw_planes(shares, odd, where(result.frame, kind="plane"))
    _draw_runs(ends, where(at_moments(runs), moment="end").dropna(subset="selectivity"))
    return panels


def _draw_planes(shares: Panel, odd: Panel, planes: pd.DataFrame) -> None:
    """Draw both energies of every plane. An interval that reaches 0, where a log axis has no place, ends below it."""
    planes = planes.astype({"odd_energy": float, "odd_uniform": float, "energy_share": float})
    floor = float(planes.groupby(["step", "wavelength"])["odd_energy"].mean().min()) / 10
    for stage, step, color in (
        ("before", planes["step"].min(), SHADES[0]),
        ("after", planes["step"].max(), SHADES[-1]),
    ):
        at = where(planes, step=step)
        shares.curve(at, "wavelength", "energy_share", name=f"{stage} training", color=color)
        for quantity, name, dash in (("odd_energy", "", "solid"), ("odd_uniform", ", uniform phases", "dot")):
            points = curve(at, "wavelength", quantity)
            points = points.assign(low=points["low"].clip(lower=floor))
            odd.curve(points, "wavelength", name=f"{stage} training{name}", color=color, dash=dash)
    shares.level(1 / planes["wavelength"].nunique(), name="equal shares", color=CHANCE)
    for panel in (shares, odd):
        panel.x(type="log", tickvals=[10, 100, 1000, 10_000], ticktext=["10", "100", "1k", "10k"])
        panel.x(title="wavelength of the plane (positions)")
    shares.y(title="share of the energy", rangemode="tozero")
    odd.y(title="odd part, mean of score²", type="log", dtick=2, exponentformat="power")


def _draw_runs(panel: Panel, end: pd.DataFrame) -> None:
    for scheme, color in SCHEME_COLORS.items():
        rows = where(end, scheme=scheme)
        look: dict[str, Any] = {"color": color, "size": 10, "opacity": 0.75}
        seeds = [f"seed {seed}" for seed in rows["seed"]]
        panel.dots(rows, "selectivity", "reverse_probability", name=shown(scheme), label=seeds, listed=False, **look)
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
    detail_of="route_correlation",
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
