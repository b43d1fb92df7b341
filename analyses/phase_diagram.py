"""The map: where reverse prediction holds, by the number of heads and every other quantity that may decide it, and what
of a half-trained model tells where it will.

A setting is answered in reverse where training has come to a forward probability of 0.9; what should explain that is
measured where it first came to 0.5. `phase_diagram.yaml` is the whole map, a sweep; `reproduce` makes a coarse one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from mdm_interp import Analysis, Result, Run, Summary, TrainConfig, where
from mdm_interp.experiments.grids import MANY_HEADS, every_third, is_quick
from mdm_interp.experiments.scope import Moment, reaching, stages
from mdm_interp.experiments.sweep import Point, Sweep
from mdm_interp.interventions import transplant_routes
from mdm_interp.measures.gradients import ROUTING, STORAGE, gradient_alignment
from mdm_interp.measures.heads import compute_contributions, specialisation
from mdm_interp.measures.parity import direction_selectivity, score_parity
from mdm_interp.stats.correlations import rank_correlation
from mdm_interp.stats.estimates import NOTHING
from mdm_interp.stats.held_out import halvings_estimate, held_out_r2
from mdm_interp.stats.summary import Entry
from mdm_interp.viz import DIVERGING, GOLD, OLIVE, REVERSE, Page, Panels, Place, routes, settings_map
from mdm_interp.viz.words import counted, counted_of, sample_size

SWEEP = Sweep.model_validate(yaml.safe_load((resources.files("analyses") / "phase_diagram.yaml").read_text()))
HEADS: list[int] = SWEEP.grid["model.n_heads"]
LEARNT = 0.9
"""Forward probability at which settings are compared."""
ENOUGH = 24
"""Settings from which it makes sense to ask what predicts the border."""
BORDER = 0.5
"""Share of it from which reverse queries count as answered."""

AXES = {
    "training": ("steps",),
    "facts": ("facts.n_entities",),
    "other facts both ways": ("facts.world", "facts.reversed_share"),
    "around a fact": ("facts.filler", "facts.seq_len", "facts.gap"),
    "a head": ("model.d_head", "model.rotary_base"),
    "depth": ("model.n_layers", "model.d_mlp"),
    "noise": ("weight_decay", "facts.noise"),
}
"""The quantities, and the fields that set them."""

EXPLAINING = {
    "specialisation": "heads specialised",
    "odd_share": "odd share of the route",
    "alignment": "gradients aligned",
    "storage_share": "storage's share of it",
    "route_gap": "lost to the route",
}
"""What is measured at half-way, and what readers know it as."""
QUANTITIES = {
    "reverse": f"reverse probability, at forward {LEARNT:g}",
    **{name: f"{text}, at forward 0.5" for name, text in EXPLAINING.items()},
}
"""What the map shows."""
UNITS = {"reverse": "probability", "route_gap": "probability", "alignment": "cosine"}
"""What the others are not shares of."""
KNOWN = {
    "forward_end": "forward probability at the end",
    "exposures": "exposures until forward 0.9",
    "reverse_early": "reverse probability half-way",
}
"""What would do without looking inside."""


@dataclass(frozen=True)
class Column:
    """One setting of the map, with any number of heads."""

    axis: str
    name: str
    runs: dict[str, int]
    """The number of heads of each run, by its digest."""


@cache
def columns() -> tuple[Column, ...]:
    """Return the columns of the whole map."""
    return columns_of(SWEEP)


def columns_of(sweep: Sweep) -> tuple[Column, ...]:
    """Return a column for each point of a sweep."""
    found = []
    for point in sweep.points or ():
        configs = Sweep(base=sweep.base, grid=sweep.grid, points=[point]).configs
        runs = {config.digest(): config.model.n_heads for config in configs}
        found.append(Column(axis_of(point), name_of(point), runs))
    return tuple(found)


def axis_of(point: Point) -> str:
    """Return the axis of the last field that a point sets, or nothing for what the others differ from."""
    return next((axis for axis, fields in AXES.items() if list(point)[-1:] and list(point)[-1] in fields), "")


def name_of(point: Point) -> str:
    """Name a setting by what it changes."""
    said = {
        "steps": "{:,} steps".format,
        "facts.n_entities": "{} facts".format,
        "facts.filler": {"none": "no filler", "constant": "one filler token"}.get,
        "facts.seq_len": "length {}".format,
        "facts.gap": lambda gap: f"gaps {gap[0]}–{gap[1]}",
        "model.d_head": "{} dimensions".format,
        "model.rotary_base": lambda base: f"base 1e{np.log10(base):.0f}",
        "model.n_layers": "{} layers".format,
        "model.d_mlp": lambda width: "MLP",
        "weight_decay": "decay {:g}".format,
        "facts.noise": "noise {:.0%}".format,
    }
    if "facts.world" in point:
        return f"{point['facts.reversed_share']:.0%} both ways"
    return ", ".join(str(said[field](value)) for field, value in point.items()) or "base setting"


def coarse(seeds: Sequence[int]) -> list[TrainConfig]:
    """Return the coarse map, for every third seed: what the others differ from, every depth, and the largest share of
    other facts both ways, with 1 and with 4 heads. A quick run has depth with 1 head only, and no other facts both
    ways."""
    of = {axis: [point for point in SWEEP.points or () if axis_of(point) == axis] for axis in ("", *AXES)}
    few, deep = list(every_third(seeds)), of["depth"]

    def with_heads(heads: list[int], points: list[Point]) -> list[TrainConfig]:
        return Sweep(base=SWEEP.base, grid={"model.n_heads": heads, "seed": few}, points=points).configs

    if is_quick(seeds):
        return [*with_heads([1], [*of[""], *deep]), *with_heads([MANY_HEADS], of[""])]
    return with_heads([1, MANY_HEADS], [*of[""], *of["other facts both ways"][-1:], *deep])


def moments(run: Run) -> list[Moment]:
    """Give half-way, where the setting is learnt, and the end."""
    learnt = reaching(run, LEARNT)
    early, end = stages(run, ["early"]), stages(run, ["end"])
    return [*early, *([("learnt", learnt)] if learnt else []), *end]


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give one row, with what explains reverse prediction and the null of each."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    candidates = run.facts.candidates([pair.forward for pair in pairs])
    specialised = specialisation(compute_contributions(model, pairs, candidates)).model
    selective = direction_selectivity(score_parity(model, pairs), pairs)
    gradients = gradient_alignment(model, pairs)
    aligned = gradients.pair_cosine(STORAGE).map(lambda cosine: cosine.nanmean().item())
    stored, routed = (gradients.gram.within(components) for components in (STORAGE, ROUTING))
    transplanted = transplant_routes(model, pairs)
    lost = transplanted.after.map(lambda log: (log.exp() - transplanted.before.exp()).mean().item())
    others = gradients.other_facts
    return [
        {
            "exposures": step * run.config.batch_size / run.config.facts.n_facts,
            "specialisation": specialised.effect.item(),
            "specialisation_null": specialised.null.nanmean().item(),
            "odd_share": selective.effect.nanmean().item(),
            "odd_share_null": selective.null.nanmean().item(),
            "alignment": aligned.effect,
            "alignment_null": aligned.null,
            "storage_share": share(stored.diagonal().sum().item(), routed.diagonal().sum().item()),
            "storage_share_null": share(stored[others].sum().item(), routed[others].sum().item()),
            "route_gap": lost.effect,
            "route_gap_null": lost.null,
        }
    ]


def share(one: float, other: float) -> float:
    """Return one part's share of what two parts bring, whatever their signs: -1 to 1."""
    return one / (abs(one) + abs(other)) if one or other else float("nan")


def settings_of(result: Result) -> pd.DataFrame:
    """Return a row per setting and number of heads, each number a mean over seeds; NaN where a setting is not learnt.

    `runs` are its runs; settings that several axes have in common are in one row per axis.
    """
    frame, rows, known = result.frame, [], set[str]()
    explaining = [*EXPLAINING, *(f"{name}_null" for name in EXPLAINING)]
    others = ["exposures", "forward_probability", "reverse_probability"]
    frame = frame.astype(dict.fromkeys([*explaining, *others], float))
    for column in columns():
        at = frame.assign(n_heads=frame["run"].map(column.runs)).dropna(subset=["n_heads"])
        if at.empty or set(at["run"]) <= known:  # nothing of its own
            continue
        known |= set(at["run"])
        for n_heads, of_setting in at.groupby("n_heads"):
            early, learnt, end = (where(of_setting, stage=stage) for stage in ("early", "learnt", "end"))
            if len(learnt) < of_setting["run"].nunique():  # a mean of those seeds alone that learnt it would flatter it
                learnt = learnt[:0]
            rows.append(
                {
                    **{"axis": column.axis, "setting": column.name, "n_heads": int(n_heads)},
                    "runs": tuple(of_setting["run"].unique()),
                    "reverse": learnt["reverse_probability"].mean(),
                    **{name: early[name].mean() for name in explaining},
                    "forward_end": end["forward_probability"].mean(),
                    "reverse_end": end["reverse_probability"].mean(),
                    "exposures": learnt["exposures"].mean(),
                    "reverse_early": early["reverse_probability"].mean(),
                }
            )
    return pd.DataFrame(rows)


def summarize(result: Result) -> Summary:
    settings = settings_of(result)
    learnt = settings.drop_duplicates("runs").dropna(subset=["reverse", *EXPLAINING, *KNOWN])
    summary = Summary.of(settings, ("axis", "setting", "n_heads"), ("reverse", *EXPLAINING, *KNOWN))
    answered = (learnt["reverse"] >= BORDER * LEARNT).astype(float)
    summary += Summary.of(learnt.assign(answered=answered), ("n_heads",), ("answered",))
    if len(learnt) < ENOUGH:
        return summary
    axes = learnt["axis"].replace("", next(iter(AXES)))  # what the others differ from is one with the first
    explained = {name: held_out_r2(learnt[name], learnt["reverse"], axes) for name in (*EXPLAINING, *KNOWN)}
    for name, values in explained.items():
        summary += Summary([Entry("explained", {"by": name}, halvings_estimate(values, axes.nunique()))])
        for known in KNOWN:
            more = halvings_estimate(values - explained[known], axes.nunique())
            summary += Summary([Entry("explained_more", {"by": name, "than": known}, more)])
    return summary


def takeaway(result: Result) -> str:
    summary, settings = result.summary, settings_of(result)
    answered = {entry.of["n_heads"]: entry.effect for entry in summary.where("answered")}
    told = [
        f"in {counted_of(round(one.value * one.n), one.n, 'settings')} with {counted(n_heads, 'head')}"
        for n_heads, one in sorted(answered.items())[:: max(1, len(answered) - 1)]  # the fewest heads and the most
    ]
    size = sample_size([replace(NOTHING, n=len(runs)) for runs in settings["runs"]])
    holds = f"Reverse queries are answered {' and '.join(told) or 'in no setting'} ({size} each)"
    if not len(summary.where("explained")):
        return f"{holds}. {_goes_along(settings)}"
    best = max(EXPLAINING, key=lambda name: summary.at("explained", by=name).value)
    sides = {known: summary.at("explained_more", by=best, than=known).side for known in KNOWN}
    surely = all(side == "above" for side in sides.values())
    return (
        f"{holds}. Of what a half-trained model shows inside, “{EXPLAINING[best]}” predicts it best "
        f"({summary.at('explained', by=best).value:.0%} of the variance), "
        f"{'surely' if surely else 'not surely'} better than without looking inside."
    )


def _goes_along(settings: pd.DataFrame) -> str:
    """Say of a part of the map what goes along with its answers, which is not yet to predict them."""
    known = settings.dropna(subset=["reverse", *EXPLAINING])
    open_end = f"What predicts it is open: {counted(len(known), 'setting')} are too few to tell"
    ranks = {name: rank_correlation(known[name], known["reverse"]) for name in EXPLAINING}
    defined = [name for name in ranks if np.isfinite(ranks[name])]
    if not defined:
        return f"{open_end}."
    best = max(defined, key=lambda name: abs(ranks[name]))
    return f"{open_end}; “{EXPLAINING[best]}” goes along with it most (rank correlation {ranks[best]:.2f})."


def draw(result: Result) -> Panels:
    """Draw where reverse queries are answered, and below it what may explain that."""
    panels, settings = Panels(), settings_of(result)
    columns = spaced(settings[["axis", "setting"]].drop_duplicates())
    few = len(columns) < 12
    x = {"type": "category", "tickangle": 0 if few else 60, "tickfont": {"size": 15 if few else 12}, "title": "setting"}
    x["tickvals"] = [name for name in columns if name.strip()]
    y = {"type": "category", "tickfont": {"size": 14}, "title": "heads", "showgrid": False}
    for quantity, title in QUANTITIES.items():
        main, last = quantity == "reverse", quantity == list(QUANTITIES)[-1]
        size = 60 if main else 26
        height = max(3 * size, size * settings["n_heads"].nunique())
        title = f"{title} ({BORDER * LEARNT:g} or more: answered; –: not learnt in all seeds)" if main else title
        labels = {"ticks": main or last, "ticks_height": 30 if few else 110}
        (panel,) = panels.row([title], x={**x, "showgrid": False}, y=y, height=height, **labels)
        written = settings[quantity].map("{:.2f}".format).str.replace(r"^(-?)0\.", r"\1.", regex=True)
        written = written.replace("nan", "–")
        table, text = (
            settings.assign(cell=cells)
            .pivot(index="n_heads", columns="setting", values="cell")
            .sort_index()
            .reindex(columns=columns)
            .rename(index=str)
            for cells in (settings[quantity], written)
        )
        middle = 0.5 if main else 0.0
        colors = [[0, "#F7F7F7"], [1, REVERSE]] if main else DIVERGING
        look = {"limit": 1 - middle, "middle": middle, "colors": colors, "scale": UNITS.get(quantity, "share")}
        panel.matrix(table, text=text.fillna(""), **look)
        panel.scale.update(colorbar={"nticks": 3, "tickfont": {"size": 12}})
    if len(result.summary.where("explained")):
        title = "What predicts reverse probability along axes that it was not fitted to"
        x = {"title": "share of variance explained (R²)", "range": [-0.55, 1.05], "zeroline": True}
        (panel,) = panels.row([title], x=x, y={"title": "measured", "autorange": "reversed"}, height=240)
        for names, label, color in ((EXPLAINING, "looking inside", OLIVE), (KNOWN, "without looking inside", GOLD)):
            found = {text: result.summary.at("explained", by=name) for name, text in names.items()}
            panel.estimates(found, name=label, color=color)
    return panels


def spaced(shown: pd.DataFrame) -> list[str]:
    """Return the settings in order, with an empty column between axes."""
    names: list[str] = []
    for at, (_, of_axis) in enumerate(shown.groupby("axis", sort=False)):
        names += [*([" " * at] if at else []), *of_axis["setting"]]
    return names


def pages(result: Result, root: Path) -> Iterator[tuple[str, Page]]:
    """Give the map to walk through, and of the first run of each place its routes."""
    places, inside = [], dict[str, str]()
    for of_place in settings_of(result).to_dict("records"):
        first = Run.open(of_place["runs"][0], root)
        metrics = first.metrics()
        if first.folder.name not in inside:
            inside[first.folder.name] = f"inside_{first.folder.name}.html"
            yield inside[first.folder.name], routes(first, first.query_pairs()[0])
        curves = {"step": [max(row["step"], 1) for row in metrics]}
        curves |= {name: [row[f"{name}_probability"] for row in metrics] for name in ("forward", "reverse")}
        place = {name: of_place[name] for name in ("axis", "setting", "n_heads", "runs")}
        values = {name: of_place[name] for name in QUANTITIES}
        places.append(Place(**place, values=values, curves=curves, inside=inside[first.folder.name]))
    yield "settings_map.html", settings_map(places, QUANTITIES, about=takeaway(result))


ANALYSIS = Analysis(
    name="phase_diagram",
    question="Where are reverse queries answered, and what predicts it?",
    configs=coarse,
    measure=measure,
    when=moments,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    pages=pages,
    settings={"learnt": LEARNT},
    order=14,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
