"""Routes, evidence and gradient alignment layer by layer, in models of 1, 2 and 4 layers with and without MLPs.

Evidence is read along the direct path only: what a source's value writes straight into the logits. A deeper model may
answer by other paths, which these measures do not see.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch

from mdm_interp import Analysis, Contrast, Result, Run, Summary, where
from mdm_interp.experiments.claims import ClaimTest
from mdm_interp.experiments.grids import DEPTHS, depth_grid
from mdm_interp.experiments.scope import SCOPE
from mdm_interp.measures.evidence import evidence_scores
from mdm_interp.measures.gradients import layer_cosines
from mdm_interp.measures.routes import route_correlation
from mdm_interp.stats.resampling import places_above
from mdm_interp.viz import CHANCE, CORRELATION, FORWARD, GREEN, ORANGE, PROBABILITY, PURPLE, REVERSE, Panel, Panels

PARTS = {"VO": ("V", "O"), "QK": ("Q", "K"), "MLP": ("MLP",)}
"""The components of a layer whose gradients are compared, by what they do: store, route, transform."""
SIGNATURES = {
    "route": "route correlation",
    "evidence": "evidence for the<br>answer (z-score)",
    "VO": "gradient cosine,<br>V and O",
    "QK": "gradient cosine,<br>Q and K",
    "MLP": "gradient cosine,<br>MLP",
}
"""Columns measured per layer (their nulls: `…_null`), and how the figure calls them."""
COLORS = dict(zip(DEPTHS, (GREEN, ORANGE, PURPLE), strict=True))
SHOWN_STAGES = {"early": "dash", "end": "solid"}
BY = ("scheme", "mlp", "n_layers", "stage")


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give one row per layer, with every signature and its null; the null of a route correlation is 0, that of keys
    dealt at random."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    routes, reverse = route_correlation(model, pairs).nanmean(1), [pair.reverse for pair in pairs]
    measured = {
        **layer_cosines(model, pairs, PARTS),
        "route": Contrast(routes, torch.zeros_like(routes)),
        "evidence": evidence_scores(model, reverse, run.facts.candidates(reverse)),
    }
    return [
        {
            "layer": layer,
            **{name: found.effect[layer].item() for name, found in measured.items()},
            **{f"{name}_null": found.null[layer].item() for name, found in measured.items()},
        }
        for layer in range(model.cfg.n_layers)
    ]


def summarize(result: Result) -> Summary:
    """Give the probabilities of each model and stage, and per layer how far each signature exceeds its null."""
    frame = result.frame.astype({f"{name}{of}": float for name in SIGNATURES for of in ("", "_null")})
    frame = frame.assign(above_chance=frame["reverse_probability"] - frame["chance"])
    excess = {f"{name}_excess": frame[name] - frame[f"{name}_null"] for name in SIGNATURES}
    of_models = Summary.of(where(frame, layer=0), BY, ("forward_probability", "reverse_probability", "above_chance"))
    return of_models + Summary.of(frame.assign(**excess), (*BY, "layer"), tuple(excess))


def takeaway(result: Result) -> str:
    end = result.summary.where(stage="end")

    def counted(name: str, scheme: str) -> str:
        layers = [entry.effect for entry in end.where(f"{name}_excess", scheme=scheme)]
        above = places_above([estimate.p_above_zero for estimate in layers])
        return f"{above.sum()} of {sum(estimate.n > 1 for estimate in layers)}"

    def probability(scheme: str, mlp: bool) -> str:
        values = [end.at("reverse_probability", scheme=scheme, mlp=mlp, n_layers=n, stage="end") for n in measured]
        return ", ".join(f"{estimate.value:.2g}" for estimate in values)

    measured = sorted({entry.of["n_layers"] for entry in end.where("reverse_probability")})
    depths = ", ".join(map(str, measured))
    said = [
        f"{scheme}: routes in {counted('route', scheme)}, evidence in {counted('evidence', scheme)}, "
        f"gradients of V and O in {counted('VO', scheme)}, of Q and K in {counted('QK', scheme)}, of MLPs in "
        f"{counted('MLP', scheme)}; reverse probability {probability(scheme, False)} with {depths} layers, "
        f"{probability(scheme, True)} with MLPs"
        for scheme in dict.fromkeys(result.frame["scheme"])
    ]
    return f"Layers above the null at the end of training, adjusted for looking at all of them. {'. '.join(said)}."


def draw(result: Result) -> Panels:
    frame = result.frame.assign(layer_number=result.frame["layer"] + 1)
    groups = {
        f"{scheme}, {'with MLP' if mlp else 'attention only'}": where(frame, scheme=scheme, mlp=mlp)
        for scheme in dict.fromkeys(frame["scheme"])
        for mlp in (False, True)
    }
    panels = Panels()
    x = {"title": "layers of the model", "tickvals": DEPTHS}
    row = panels.row(list(groups), x=x, y={**PROBABILITY, "title": "probability of<br>answer"})
    for panel, group in zip(row, groups.values(), strict=True):
        models = where(group, layer=0)
        for side, color, shift in (("forward", FORWARD, 0.0), ("reverse", REVERSE, 0.08)):
            for stage, dash in SHOWN_STAGES.items():
                name, points = f"{side} query, {stage}", where(models, stage=stage)
                panel.points(points, "n_layers", f"{side}_probability", name=name, color=color, dash=dash, shift=shift)
        panel.level(models["chance"].iloc[0], name="chance", color=CHANCE, x=DEPTHS)
    layers = list(range(1, max(DEPTHS) + 1))
    x = {"title": "layer", "tickvals": layers, "range": [0.6, max(DEPTHS) + 0.4]}
    scores = frame[["evidence", "evidence_null"]]
    reach = {"range": [scores.min(axis=None) - 0.2, scores.max(axis=None) + 0.2]}
    for signature, title in SIGNATURES.items():
        y = {**(reach if signature == "evidence" else CORRELATION), "title": title}
        shown = {name: group for name, group in groups.items() if signature != "MLP" or group["mlp"].all()}
        titles = list(shown) if signature == "MLP" else [""] * len(shown)
        row = panels.row(titles, x=x, y=y, ticks=signature in ("QK", "MLP"))
        for panel, group in zip(row, shown.values(), strict=True):
            _draw_signature(panel, group, signature)
    return panels


def _draw_signature(panel: Panel, group: pd.DataFrame, signature: str) -> None:
    for i, (n_layers, color) in enumerate(COLORS.items()):
        models, shift = where(group, n_layers=n_layers), 0.08 * (i - 1)
        for stage, dash in SHOWN_STAGES.items():
            points, name = where(models, stage=stage), f"{n_layers}-layer, {stage}"
            panel.points(points, "layer_number", signature, name=name, color=color, dash=dash, shift=shift)
        null, listed = f"{signature}_null", n_layers == max(COLORS)
        look: dict[str, Any] = {"color": CHANCE, "dash": "dot", "shift": shift, "listed": listed}
        panel.points(where(models, stage="end"), "layer_number", null, name="null at the end", **look)


def halves(result: Result) -> pd.DataFrame:
    """Return for each deep model and stage by how much its first half of layers is more aligned than its second; null:
    the same of unrelated facts."""
    deep = result.frame[result.frame["n_layers"] > 1].astype({"VO": float, "VO_null": float})
    first = deep["layer"] < deep["n_layers"] / 2
    keys, names = [*SCOPE, "stage", "seed"], ["VO", "VO_null"]
    early, late = (deep[half].groupby(keys, sort=False)[names].mean() for half in (first, ~first))
    return (early - late).reset_index()


def least_coupled(result: Result) -> pd.DataFrame:
    """Return the row of the layer in which each deep model is least aligned."""
    deep = result.frame[result.frame["n_layers"] > 1].astype({"VO": float, "VO_null": float})
    return deep.loc[deep.groupby([*SCOPE, "stage", "seed"], sort=False)["VO"].idxmin()]


CLAIMS = tuple(
    ClaimTest(
        claim="6",
        measure=f"cosine of the gradients of the mean forward and the mean reverse loss in V and O, {of}",
        effect="VO",
        null="VO_null",
        null_is="forward over half of the facts with reverse over the other half",
        side="above",
        margin=margin,
        rows=rows,
    )
    for of, margin, rows in (
        ("in a deep model's first half of layers less its second", 0.0, halves),
        ("in the layer of a deep model where it is least", 0.1, least_coupled),
    )
)
"""What the authors report of depth: alignment in every layer, and more of it in early ones."""

ANALYSIS = Analysis(
    name="depth",
    question="Do the signatures survive in deeper models with MLPs?",
    configs=depth_grid,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    claims=CLAIMS,
    order=80,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
