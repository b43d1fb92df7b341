"""The reverse query before and after four edits and activation patching, each beside the same edit elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from mdm_interp import Analysis, Estimate, HookedTransformer, QueryPair, Result, Run, Summary, TrainConfig, where
from mdm_interp.experiments.grids import SCHEMES, depth_grid, scheme_grid
from mdm_interp.experiments.scope import trained_stages
from mdm_interp.interventions import (
    Effect,
    ablate_routes,
    ablate_storage,
    effect_of_patches,
    patch_heads,
    patch_positions,
    position_roles,
    project_even_routes,
    transplant_routes,
)
from mdm_interp.models.positions import POSITION_SCHEMES
from mdm_interp.viz import (
    CHANCE,
    FORWARD,
    GOLD,
    INDIGO,
    MAGENTA,
    OLIVE,
    PROBABILITY,
    REVERSE,
    Panels,
    between,
    sample_size,
    shown,
    with_n,
)
from mdm_interp.viz.words import counted

EDITS = {
    "transplant": transplant_routes,
    "even": project_even_routes,
    "storage": ablate_storage,
    "route": ablate_routes,
}
GAP = 0.1
"""Nats between forward and reverse query from which it makes sense to ask for the share that an edit recovers."""
EXACT = 1e-4
"""Nats within which the transplanted prediction counts as the forward one."""
RELATIVE = [scheme for scheme in SCHEMES if POSITION_SCHEMES[scheme].relative]


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    union = [*scheme_grid(seeds), *depth_grid(seeds)]
    return list({config.digest(): config for config in union}.values())


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give one row per edit; for the patches (`head`, `position`) also per layer and place, a head or a position's
    role. Probabilities and log-probabilities (nats) are means over the pairs."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    # An absolute scheme has no even routes.
    edits = {name: edit for name, edit in EDITS.items() if name != "even" or model.pos_embed.relative}
    effects = {name: edit(model, pairs) for name, edit in edits.items()}
    rows = [{"edit": name, "layer": 0, "place": "all", **effect.columns} for name, effect in effects.items()]
    return rows + patch_rows(model, pairs, effects["transplant"])


def patch_rows(model: HookedTransformer, pairs: Sequence[QueryPair], unpatched: Effect) -> list[dict[str, Any]]:
    """Give the rows of both kinds of patches."""
    each = torch.eye(model.cfg.n_heads, dtype=torch.bool)[:, None].expand(-1, len(pairs), -1)
    heads = {str(head + 1): at for head, at in enumerate(each)}
    patched = {
        "head": (patch_heads(model, pairs), heads),
        "position": (patch_positions(model, pairs), position_roles(pairs)),
    }
    return [
        {"edit": edit, "layer": layer, "place": place, **effect_of_patches(changes, unpatched, layer, at).columns}
        for edit, (changes, places) in patched.items()
        for layer in range(model.cfg.n_layers)
        for place, at in places.items()
    ]


def recovered(frame: pd.DataFrame, of: str) -> pd.Series:
    """Compute the share of the gap in log-probability between forward and reverse query that `of` closes; NaN where the
    gap is below `GAP`."""
    gap = frame["log_forward"] - frame["log_before"]
    return ((frame[of] - frame["log_before"]) / gap).where(gap > GAP)


def summarize(result: Result) -> Summary:
    """Summarize what each edit makes of the reverse query and which share of the gap it recovers, with its control as
    null; of the transplant also both queries, and in how many runs it gives the forward prediction exactly."""
    frame = result.frame[result.frame["edit"].isin(list(EDITS))]
    frame = frame.assign(
        after_null=frame["control"],
        recovered=recovered(frame, "log_after"),
        recovered_null=recovered(frame, "log_control"),
        exact=(frame["deviation"] < EXACT).astype(float),
    )
    model, transplant = ("scheme", "n_layers", "mlp", "stage"), where(frame, edit="transplant")
    edited = Summary.of(frame, (*model, "edit"), ("after", "recovered"))
    return edited + Summary.of(transplant, model, ("forward", "before", "exact", "deviation"))


def takeaway(result: Result) -> str:
    """Say whether the forward query's route closes the gap where there is one: its whole interval is above 0."""
    end = result.summary.where(stage="end")
    gaps = [entry for entry in end.where("recovered", edit="transplant") if entry.effect.n]
    closed = [entry for entry in gaps if entry.effect.side == "above"]
    left = max(entry.effect.value for entry in end.where("after", edit="storage"))
    told = "Nothing: no run answers worse in reverse than forward"
    if gaps:
        some = f"in {len(closed)} of {len(gaps)} settings where runs answer worse in reverse"
        told = f"Not shown: {some}, the forward query's route measurably closes the gap"
        if closed:
            by = between(entry.effect.value for entry in closed)
            told = f"The route: {some}, that of the forward query measurably closes {by} of the gap in nats"
            told += " (in one layer by construction)" * any(entry.of["n_layers"] == 1 for entry in closed)
    n = sample_size(entry.effect for entry in end.where("before"))
    return f"{told}. Without the source's value, {left:.2f} or less is left of the reverse answer's probability ({n})."


ROUTES = {
    ("forward", ""): ("forward query", FORWARD, "circle"),
    ("before", ""): ("reverse query", REVERSE, "circle"),
    ("after", "transplant"): ("reverse, along the forward query's route", OLIVE, "circle"),
    ("null", "transplant"): ("control of the edit to its left", CHANCE, "x-thin-open"),
    ("after", "even"): ("reverse, along the even part of its route", GOLD, "circle"),
    ("null", "even"): ("control of the edit to its left", CHANCE, "x-thin-open"),
}
CUTS = {
    ("before", ""): ("reverse query as it is", REVERSE, "circle"),
    ("after", "storage"): ("reverse, source without value", MAGENTA, "circle"),
    ("null", "storage"): ("control of the cut to its left", CHANCE, "x-thin-open"),
    ("after", "route"): ("reverse, source not attended to", INDIGO, "circle"),
    ("null", "route"): ("control of the cut to its left", CHANCE, "x-thin-open"),
}
"""What both rows show side by side: quantity and edit, and the name, colour and mark of it."""


def draw(result: Result) -> Panels:
    panels, end = Panels(), result.summary.where(stage="end")
    models = [entry.of for entry in end.where("before")]
    plain = [of for of in models if of["n_layers"] == 1 and not of["mlp"]]
    deeper = sorted((of for of in models if of not in plain), key=lambda of: (of["scheme"], of["mlp"], of["n_layers"]))
    groups = {"1 layer, attention only": plain, "deeper, or with MLP": deeper}
    groups = {title: group for title, group in groups.items() if group}
    widths = [len(group) for group in groups.values()]
    for marks, height in ((ROUTES, 340), (CUTS, 220)):
        x, y = {"title": "model"}, {**PROBABILITY, "title": "probability of answer,<br>end of training"}
        titles = list(groups) if marks is ROUTES else [""] * len(groups)
        row = panels.row(titles, x=x, y=y, height=height, ticks_height=4 * 24, widths=widths)
        for panel, group in zip(row, groups.values(), strict=True):
            for i, ((quantity, edit), (name, color, symbol)) in enumerate(marks.items()):
                found = {_label(of, end): _estimate(end, of, quantity, edit) for of in group}
                shift = 0.14 * (i - (len(marks) - 1) / 2)
                panel.estimates(found, name=name, color=color, symbol=symbol, shift=shift, upright=True)
    _draw_patches(panels, result)
    return panels


def _label(of: Mapping[str, Any], end: Summary) -> str:
    deep = of["n_layers"] > 1 or of["mlp"]
    parts = [counted(of["n_layers"], "layer")] * deep + ["MLP"] * of["mlp"]
    return "<br>".join([shown(of["scheme"]), *parts, f"n = {end.at('before', **of).n}"])


def _estimate(end: Summary, of: Mapping[str, Any], quantity: str, edit: str) -> Estimate:
    """Return one estimate of a model; absolute schemes have no even routes."""
    if not edit:
        return end.at(quantity, **of)
    return end.null("after", edit=edit, **of) if quantity == "null" else end.at("after", edit=edit, **of)


def _draw_patches(panels: Panels, result: Result) -> None:
    """Draw the mean change by patching a head's output or a position's residual in the deepest model, and by its
    control. Colours are bent, so that they tell the patch's own changes from none and hold those of a control."""
    frame = where(result.frame, stage="end", scheme="rope", mlp=False)
    deep = where(frame, n_layers=frame["n_layers"].max())
    patches = deep[deep["edit"].isin(["head", "position"])]
    heads = pd.to_numeric(patches["place"], errors="coerce") - 1  # rows count them from 1
    place = patches["place"].mask(patches["edit"] == "head", heads.map("head {:.0f}".format))
    name = with_n(f"rope, {counted(int(deep['n_layers'].iloc[0]), 'layer')}", deep)
    titles = [f"{name}: change by patching", "by the same patch elsewhere (control)"]
    row = panels.row(titles, x={"title": "patched"}, y={"title": "layer", "dtick": 1}, height=200)
    changes = [patches[f"log_{kind}"].astype(float) - patches["log_before"] for kind in ("after", "control")]
    tables = [
        patches.assign(change=change, place=place).pivot_table("change", "layer", "place", sort=False)
        for change in changes
    ]
    limit = max(table.abs().max(axis=None) for table in tables)
    for panel, table, scale in zip(row, tables, (None, "nats"), strict=True):
        texts = (table.round(2) + 0.0).map("{:+.2f}".format)
        panel.matrix(_bent(table), limit=_bent(limit), scale=scale, text=texts, hover="layer %{y}, %{x}: %{text} nats")
    ticks = np.array([-10, -1, -0.1, 0, 0.1, 1, 10])
    row[-1].scale.update(colorbar={"tickvals": _bent(ticks), "ticktext": [f"{tick:g}" for tick in ticks]})


def _bent(nats: Any) -> Any:
    return np.arcsinh(nats / 0.05)


ANALYSIS = Analysis(
    name="interventions",
    question="What has to be changed for the reverse query to be answered?",
    configs=configs,
    measure=measure,
    when=trained_stages,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=70,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
