"""The reverse query before and after four edits and activation patching, each beside the same edit elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool
from plotly.subplots import make_subplots
from torch import Tensor

from mdm_interp.config import TrainConfig
from mdm_interp.data.queries import QueryPair
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.grids import DEPTHS, SCHEMES, depth_grid, scheme_grid
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import trained_stages
from mdm_interp.interventions.effects import (
    Effect,
    ablate_routes,
    ablate_storage,
    project_even_routes,
    transplant_routes,
)
from mdm_interp.interventions.patching import Patching, patch_heads, patch_positions
from mdm_interp.models.positions import SCHEMES as POSITION_SCHEMES
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.tables import where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import add_estimates, add_matrix
from mdm_interp.viz.theme import FORWARD, GREEN, GREY, REVERSE, legend_at

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
TRAINED = ("early", "end")
"""The stages at which something is learnt."""
GAP = 0.1
"""Nats between forward and reverse query from which it makes sense to ask for the share that an edit recovers."""
EXACT = 1e-4
"""Nats within which the transplanted prediction counts as the forward one."""
RELATIVE = [scheme for scheme in SCHEMES if POSITION_SCHEMES[scheme].relative]
DEEP = [n_layers for n_layers in DEPTHS if n_layers > 1]


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    union = [*scheme_grid(seeds), *depth_grid(seeds)]
    return list({config.digest(): config for config in union}.values())


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """One row per edit; for the patches (`head`, `position`) also per layer and place, a head or a position's role.
    Probabilities and log-probabilities (nats) are means over the pairs."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    found = edit_effects(model, pairs)
    described = [described_as(edit, effect) for edit, effect in found.items()]
    return described + patch_rows(model, pairs, found["transplant"])


def edit_effects(model: HookedTransformer, pairs: Sequence[QueryPair]) -> dict[str, Effect]:
    """What each edit does; an absolute scheme has no even routes."""
    return {name: edit(model, pairs) for name, edit in EDITS.items() if name != "even" or model.pos_embed.relative}


def roles(pairs: Sequence[QueryPair]) -> dict[str, Bool[Tensor, "pair pos"]]:
    """Which positions of each reverse query hold what; the relation follows the left entity."""
    positions = torch.arange(len(pairs[0].reverse.tokens))
    answer, source = (
        torch.tensor([span[0] for span in spans])[:, None]
        for spans in ([pair.reverse.answer_span for pair in pairs], [pair.reverse.source_span for pair in pairs])
    )
    held = {
        "readout": positions == answer,
        "source": positions == source,
        "relation": positions == torch.minimum(answer, source) + 1,
    }
    return {**held, "filler": ~(held["readout"] | held["source"] | held["relation"])}


def patch_rows(model: HookedTransformer, pairs: Sequence[QueryPair], unpatched: Effect) -> list[dict[str, Any]]:
    """The rows of both kinds of patches."""
    each = torch.eye(model.cfg.n_heads, dtype=torch.bool)[:, None].expand(-1, len(pairs), -1)
    heads = {str(head + 1): at for head, at in enumerate(each)}
    patched = {"head": (patch_heads(model, pairs), heads), "position": (patch_positions(model, pairs), roles(pairs))}
    return [
        described_as(edit, patch_effect(unpatched, patching, layer, at), layer, place)
        for edit, (patching, places) in patched.items()
        for layer in range(model.cfg.n_layers)
        for place, at in places.items()
    ]


def patch_effect(unpatched: Effect, patching: Patching, layer: int, at: Bool[Tensor, "pair place"]) -> Effect:
    """One layer's patches at the chosen places as an effect, one entry per pair and place."""
    forward, before = (x[:, None].expand(at.shape)[at] for x in (unpatched.forward, unpatched.before))
    change, control = (x[:, layer][at] for x in (patching.change, patching.control))
    return Effect(forward, before, before + change, before + control)


def described_as(edit: str, effect: Effect, layer: int = 0, place: str = "all") -> dict[str, Any]:
    """The columns of an effect. `layer` and `place` say something of patches only."""
    queries = {name: getattr(effect, name) for name in ("forward", "before", "after", "control")}
    return {
        "edit": edit,
        "layer": layer,
        "place": place,
        **{name: value.exp().nanmean().item() for name, value in queries.items()},
        **{f"log_{name}": value.nanmean().item() for name, value in queries.items()},
        "deviation": (effect.after - effect.forward).abs().max().item(),
    }


def recovered(frame: pd.DataFrame, of: str) -> pd.Series:
    """Share of the gap in log-probability between forward and reverse query that `of` closes; NaN where the gap is
    below `GAP`."""
    gap = frame["log_forward"] - frame["log_before"]
    return ((frame[of] - frame["log_before"]) / gap).where(gap > GAP)


def summarize(result: Result) -> dict[str, Estimate]:
    """Per setting, stage and edit: what it was, becomes and becomes under the control, and the share of the gap
    recovered by either; for the transplant also in how many runs it gives the forward prediction exactly."""
    summary = {}
    edits = result.frame[result.frame["edit"].isin(list(EDITS))]
    for (scheme, n_layers, mlp, stage), group in edits.groupby(["scheme", "n_layers", "mlp", "stage"], sort=False):
        named = setting(str(scheme), int(n_layers), bool(mlp), str(stage))
        for edit in [edit for edit in EDITS if edit in set(group["edit"])]:
            at = where(group, edit=edit)
            for query in ("forward", "before") if edit == "transplant" else ():
                summary[f"{named} / {query}"] = mean_estimate(at[query])
            for quantity in ("after", "control"):
                summary[f"{named} / {edit} / {quantity}"] = mean_estimate(at[quantity])
                share = recovered(at, f"log_{quantity}")
                summary[f"{named} / {edit} / gap recovered, {quantity}"] = mean_estimate(share)
            if edit == "transplant":
                exact = (at["deviation"] < EXACT).astype(float)
                summary[f"{named} / {edit} / exact"] = mean_estimate(exact)
                summary[f"{named} / {edit} / largest deviation"] = mean_estimate(at["deviation"])
    return summary


def setting(scheme: str, n_layers: int = 1, mlp: bool = False, stage: str = "end") -> str:
    """How the summary calls a model of the grid at a stage."""
    return f"{scheme}, {n_layers} layer{'s' if n_layers > 1 else ''}{' + MLP' if mlp else ''}, {stage}"


def takeaway(result: Result) -> str:
    summary = result.summary

    def value(quantity: str, *model: Any) -> str:
        return f"{summary[f'{setting(*model)} / {quantity}'].value:.2g}"

    def told(*model: Any) -> str:
        return f"{value('before', *model)} to {value('transplant / after', *model)}"

    def exact(*settings: str) -> str:
        keys = [f"{name} / transplant / exact" for name in settings]
        found = [summary[key] for key in keys if key in summary]
        return f"{sum(round(share.value * share.n) for share in found)} of {sum(share.n for share in found)}"

    deepest = max(n for n in DEPTHS if f"{setting('rope', n, True)} / before" in summary)
    one = exact(*(setting(scheme, 1, mlp) for scheme in RELATIVE for mlp in (False, True)))
    deep = exact(*(setting(scheme, n_layers, mlp) for scheme in RELATIVE for n_layers in DEEP for mlp in (False, True)))
    absolute = exact(*(setting(scheme) for scheme in SCHEMES if scheme not in RELATIVE))
    even = ", ".join(f"{value('even / after', scheme)} ({scheme})" for scheme in RELATIVE)
    return (
        f"The forward query's route takes a one-layer model's mean reverse probability from "
        f"{', '.join(f'{told(scheme)} ({scheme})' for scheme in SCHEMES)}, and {told('rope', deepest, True)} in "
        f"{deepest} layer{'s' if deepest > 1 else ''} with MLP (rope). Every answer is then the forward one, to "
        f"{EXACT:g} nats, in {one} one-layer runs with a relative scheme, {absolute} with an absolute "
        f"one, {deep} deeper runs. The even part of the reverse route takes it to {even}."
    )


def draw(result: Result) -> go.Figure:
    panels = [(scheme, 1, False) for scheme in SCHEMES]
    panels += [("rope", n_layers, mlp) for mlp in (False, True) for n_layers in DEPTHS if mlp or n_layers > 1]
    panels += [("alibi", max(DEPTHS), True)]
    titles = [f"{scheme}, {n} layer{'s' if n > 1 else ''}{' with MLP' if mlp else ''}" for scheme, n, mlp in panels]
    deepest = f"rope, {max(DEPTHS)} layers: position patched"
    wide = [{"colspan": 3}, None, None] * 2
    figure = make_subplots(
        6,
        12,
        specs=[[{"colspan": 4}, *[None] * 3] * 3] * 4 + [[None] * 12, [*[{"colspan": 2}, None] * 2, None, None, *wide]],
        row_heights=[1, 1, 1, 1, 0.35, 1.1],
        subplot_titles=[*titles, "rope: head patched", "control", deepest, "control"],
        horizontal_spacing=0.02,
        vertical_spacing=0.035,
    )
    frame = where(result.frame, stage="end")
    for i, (scheme, n_layers, mlp) in enumerate(panels):
        row, col = i // 3 + 1, 4 * (i % 3) + 1
        _draw_edits(figure, where(frame, scheme=scheme, n_layers=n_layers, mlp=mlp), row, col, listed=i == 0)
        title = "probability of answer" if col == 1 else None
        figure.update_yaxes(range=[-0.04, 1.04], showticklabels=col == 1, title_text=title, row=row, col=col)
        title = "query, or edit of the reverse query" if row == 4 else None
        figure.update_xaxes(title_text=title, showticklabels=row == 4, tickangle=0, tickfont_size=12, row=row, col=col)
    rope = where(frame, scheme="rope", mlp=False)
    deep = where(rope, n_layers=max(DEPTHS), edit="position").assign(layer_number=lambda rows: rows["layer"] + 1)
    _draw_patches(figure, where(rope, n_layers=1, edit="head"), "seed", "head", columns=(1, 3), scale_at=0.335)
    _draw_patches(figure, deep, "layer_number", "position", columns=(7, 10), scale_at=1.0)
    figure.update_layout(legend=legend_at(0.5, 0.237))
    figure.update_layout(height=1750)
    return figure


def _draw_edits(figure: go.Figure, at: pd.DataFrame, row: int, col: int, listed: bool) -> None:
    places = ["forward", "reverse", *NAMES.values()]
    edits = {name: where(at, edit=edit) for edit, name in NAMES.items() if edit in set(at["edit"])}
    plain = where(at, edit="transplant")
    for name, color, symbol, points in (
        ("forward query", FORWARD, "circle", {"forward": plain["forward"]}),
        ("reverse query", REVERSE, "circle", {"reverse": plain["before"]}),
        ("reverse query, edited", GREEN, "circle", {name: rows["after"] for name, rows in edits.items()}),
        ("control: edited elsewhere", GREY, "x-thin", {name: rows["control"] for name, rows in edits.items()}),
    ):
        estimates = {place: mean_estimate(seeds) for place, seeds in points.items()}
        mark: dict[str, Any] = {"symbol": symbol, "size": 12, "upright": True, "legend": "legend" if listed else None}
        add_estimates(figure, estimates, name=name, color=color, row=row, col=col, **mark)
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=places, row=row, col=col)
    figure.update_xaxes(range=[-0.5, len(places) - 0.5], row=row, col=col)


def _draw_patches(
    figure: go.Figure, patches: pd.DataFrame, y: str, x: str, columns: tuple[int, int], scale_at: float
) -> None:
    """Mean change by the patch and, beside it, by its control, over the seeds that a cell holds. The colours span the
    patch's own changes: a control may exceed them."""
    changes = [patches[f"log_{kind}"].astype(float) - patches["log_before"] for kind in ("after", "control")]
    tables = [patches.assign(change=change).pivot_table("change", y, "place", sort=False) for change in changes]
    limit = tables[0].abs().max(axis=None)
    scale = {"title": "nats", "len": 0.19, "y": 0.075, "x": scale_at, "thickness": 12}
    for col, table in zip(columns, tables, strict=True):
        first, at = col == columns[0], dict[str, Any](row=6, col=col)
        if np.isfinite(table.to_numpy()).all() and not table.empty:
            names = {"x": table.columns.astype(str).tolist(), "y": table.index.astype(str).tolist()}
            add_matrix(figure, table.to_numpy(), limit=limit, colorbar=None if first else scale, **names, **at)
        figure.update_xaxes(title_text=x, type="category", tickfont_size=13, **at)
        title = y.split("_")[0] if first else None
        figure.update_yaxes(title_text=title, type="category", showticklabels=first, **at)


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
