"""The reverse query before and after four edits and activation patching, each beside the same edit elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from mdm_interp import Analysis, HookedTransformer, QueryPair, Result, Run, Summary, TrainConfig, mean_estimate, where
from mdm_interp.experiments.grids import DEPTHS, SCHEMES, depth_grid, scheme_grid
from mdm_interp.experiments.scope import counted, trained_stages
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
from mdm_interp.viz import FORWARD, GREEN, GREY, PROBABILITY, REVERSE, Panel, Panels

EDITS = {
    "transplant": transplant_routes,
    "even": project_even_routes,
    "storage": ablate_storage,
    "route": ablate_routes,
}
NAMES = {
    "transplant": "forward<br>route",
    "even": "even<br>route",
    "storage": "no source<br>value",
    "route": "no route",
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
    summary = result.summary.where(stage="end")

    def after(edit: str, of: dict[str, Any]) -> str:
        return f"{summary.at('after', edit=edit, **of).value:.2g}"

    def told(scheme: str, n_layers: int = 1, mlp: bool = False) -> str:
        of = {"scheme": scheme, "n_layers": n_layers, "mlp": mlp, "stage": "end"}
        return f"{summary.at('before', **of).value:.2g} to {after('transplant', of)}"

    def exact(relative: bool, deep: bool) -> str:
        found = [
            entry.effect
            for entry in summary.where("exact")
            if (entry.of["scheme"] in RELATIVE) == relative and (entry.of["n_layers"] > 1) == deep
        ]
        return f"{sum(round(share.value * share.n) for share in found)} of {sum(share.n for share in found)}"

    deepest = max(entry.of["n_layers"] for entry in summary.where("before", scheme="rope", mlp=True))
    one_layer = {"n_layers": 1, "mlp": False, "stage": "end"}
    even = ", ".join(f"{after('even', {**one_layer, 'scheme': scheme})} ({scheme})" for scheme in RELATIVE)
    return (
        f"The forward query's route takes a one-layer model's mean reverse probability from "
        f"{', '.join(f'{told(scheme)} ({scheme})' for scheme in SCHEMES)}, and {told('rope', deepest, True)} in "
        f"{counted(deepest, 'layer')} with MLP (rope). Every answer is then the forward one, to "
        f"{EXACT:g} nats, in {exact(True, deep=False)} one-layer runs with a relative scheme, "
        f"{exact(False, deep=False)} with an absolute one, {exact(True, deep=True)} deeper runs. The even part of the "
        f"reverse route takes it to {even}."
    )


def draw(result: Result) -> Panels:
    panels, frame = Panels(), where(result.frame, stage="end")
    models = [(scheme, 1, False) for scheme in SCHEMES]
    models += [("rope", n_layers, mlp) for mlp in (False, True) for n_layers in DEPTHS if mlp or n_layers > 1]
    models += [("alibi", n_layers, True) for n_layers in DEPTHS if n_layers > 1]
    models = [of for of in models if of in frame.set_index(["scheme", "n_layers", "mlp"]).index]
    places = ["forward", "reverse", *NAMES.values()]
    x = {"type": "category", "categoryarray": places, "range": [-0.5, len(places) - 0.5], "tickangle": 0}
    x |= {"title": "query, or edit of the reverse query", "tickfont": {"size": 12}}
    for start in range(0, len(models), 3):
        shown, last = models[start : start + 3], start + 3 >= len(models)
        titles = [f"{scheme}, {counted(n, 'layer')}{' with MLP' if mlp else ''}" for scheme, n, mlp in shown]
        row = panels.row(titles, x=x, y={**PROBABILITY, "title": "probability of answer"}, ticks=last, ticks_height=40)
        for panel, (scheme, n_layers, mlp) in zip(row, shown, strict=True):
            _draw_edits(panel, where(frame, scheme=scheme, n_layers=n_layers, mlp=mlp))
    rope = where(frame, scheme="rope", mlp=False)
    deepest = rope["n_layers"].max()
    titles = ["rope: head patched", "control", f"rope, {deepest} layers: position patched", "control"]
    row = panels.row(titles, x={"type": "category"}, y={"type": "category"}, widths=[1.0, 1.0, 1.5, 1.5], one_y=False)
    _draw_patches(row[:2], where(rope, n_layers=1, edit="head"), "seed", "head")
    deep = where(rope, n_layers=deepest, edit="position")
    _draw_patches(row[2:], deep.assign(layer=deep["layer"] + 1), "layer", "position")
    return panels


def _draw_edits(panel: Panel, frame: pd.DataFrame) -> None:
    """Draw both queries, and the reverse one under every edit and its control."""
    edits = {name: where(frame, edit=edit) for edit, name in NAMES.items() if (frame["edit"] == edit).any()}
    plain = where(frame, edit="transplant")
    for name, color, symbol, seeds in (
        ("forward query", FORWARD, "circle", {"forward": plain["forward"]}),
        ("reverse query", REVERSE, "circle", {"reverse": plain["before"]}),
        ("reverse query, edited", GREEN, "circle", {name: rows["after"] for name, rows in edits.items()}),
        ("control: edited elsewhere", GREY, "x-thin", {name: rows["control"] for name, rows in edits.items()}),
    ):
        estimates = {place: mean_estimate(values) for place, values in seeds.items()}
        panel.estimates(estimates, name=name, color=color, symbol=symbol, size=12, upright=True)


def _draw_patches(row: Sequence[Panel], patches: pd.DataFrame, y: str, x: str) -> None:
    """Draw the mean change by the patch and, beside it, by its control, over the seeds that a cell holds. The colours
    span the patch's own changes: a control may exceed them."""
    changes = [patches[f"log_{kind}"].astype(float) - patches["log_before"] for kind in ("after", "control")]
    tables = [patches.assign(change=change).pivot_table("change", y, "place", sort=False) for change in changes]
    for panel, table, scale in zip(row, tables, (None, "nats"), strict=True):
        panel.x(title=x, tickfont={"size": 13})
        panel.y(title=y if scale is None else None, showticklabels=scale is None)
        if not table.empty:
            panel.matrix(table, limit=tables[0].abs().max(axis=None), scale=scale)


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
