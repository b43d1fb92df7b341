"""Routes, evidence and gradient alignment layer by layer, in models of 1, 2 and 4 layers with and without MLPs; and how
much of the evidence depends on where its source is.

Evidence is read along the direct path only: what a source's value writes straight into the logits. A deeper model may
answer by other paths, which these measures do not see. In upper layers it also holds what the context made of the
source.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch

from mdm_interp import Analysis, Contrast, Result, Run, Summary, mean_estimate, where
from mdm_interp.experiments.claims import ClaimTest
from mdm_interp.experiments.grids import DEPTHS, depth_grid
from mdm_interp.experiments.scope import SCOPE
from mdm_interp.measures.evidence import as_share, evidence_scores, pair_position_index
from mdm_interp.measures.gradients import layer_cosines
from mdm_interp.measures.routes import route_correlation
from mdm_interp.stats.resampling import places_above
from mdm_interp.viz import (
    CHANCE,
    CORRELATION,
    FORWARD,
    PROBABILITY,
    REVERSE,
    SEQUENTIAL,
    SHADES,
    Panel,
    Panels,
    between,
    sample_size,
    shown,
    with_n,
)

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
ROWS = {
    "route": SIGNATURES["route"],
    "evidence": SIGNATURES["evidence"],
    "pair_share": "position's share<br>of its variance",
    **{name: SIGNATURES[name] for name in PARTS},
}
"""What is drawn of every layer. The pair share is index / (1 + index), with the index of
:func:`~mdm_interp.measures.evidence.pair_position_index`."""
UNRELATED = 0.5
"""The pair share when evidence in the two places has equal variance and is uncorrelated: half of it is position's."""
LOOKS = dict(zip(DEPTHS, zip(SHADES[1:], ("solid", "dash", "dashdot"), strict=True), strict=True))
"""How models of each depth are drawn."""
BY = ("scheme", "mlp", "n_layers", "stage")


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give one row per layer, with every signature and its null, and the pair share; the null of a route correlation is
    0, that of keys dealt at random."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    routes, reverse = route_correlation(model, pairs).nanmean(1), [pair.reverse for pair in pairs]
    measured = {
        **layer_cosines(model, pairs, PARTS),
        "route": Contrast(routes, torch.zeros_like(routes)),
        "evidence": evidence_scores(model, reverse, run.facts.candidates(reverse)),
    }
    places = pair_position_index(model, pairs, torch.arange(run.config.facts.n_entities)).tolist()
    return [
        {
            "layer": layer,
            "pair_share": as_share(places[layer]),
            **{name: found.effect[layer].item() for name, found in measured.items()},
            **{f"{name}_null": found.null[layer].item() for name, found in measured.items()},
        }
        for layer in range(model.cfg.n_layers)
    ]


def summarize(result: Result) -> Summary:
    """Give the probabilities of each model and stage, and per layer the pair share and how far each signature exceeds
    its null."""
    frame = result.frame.astype({f"{name}{of}": float for name in SIGNATURES for of in ("", "_null")})
    frame = frame.assign(above_chance=frame["reverse_probability"] - frame["chance"])
    excess = {f"{name}_excess": frame[name] - frame[f"{name}_null"] for name in SIGNATURES}
    of_models = Summary.of(where(frame, layer=0), BY, ("forward_probability", "reverse_probability", "above_chance"))
    return of_models + Summary.of(frame.assign(**excess), (*BY, "layer"), (*excess, "pair_share"))


def above_null(result: Result) -> pd.DataFrame:
    """Return for each signature and layer whether it is above its null at the end, adjusted for looking at all layers
    of its scheme. Layers of one model decide nothing and are left out."""
    rows = []
    for signature in SIGNATURES:
        for scheme in dict.fromkeys(result.frame["scheme"]):
            entries = result.summary.where(f"{signature}_excess", scheme=scheme, stage="end")
            known = [entry for entry in entries if entry.effect.n > 1]
            above = places_above([entry.effect.p_above_zero for entry in known])
            rows += [
                {**one.of, "signature": signature, "above": bool(is_above)}
                for one, is_above in zip(known, above, strict=True)
            ]
    return pd.DataFrame(rows, columns=["signature", *BY, "layer", "above"])


def takeaway(result: Result) -> str:
    """Say in how many layers each signature is above its null, and what is answered with MLPs."""
    above, end = above_null(result), result.summary.where("reverse_probability", stage="end")
    said, answered, schemes = [], [], list(dict.fromkeys(result.frame["scheme"]))
    for scheme in schemes:
        found: dict[str, list[str]] = {}
        for signature, share in where(above, scheme=scheme).groupby("signature", sort=False)["above"].mean().items():
            amount = "all" if share == 1 else "most" if share > 0.5 else "some" if share > 0 else "none"
            found.setdefault(amount, []).append(SAID[str(signature)])
        listed = ", ".join(f"{' and '.join(names)} in {amount}" for amount, names in found.items())
        listed = listed.replace(" gradients and", " and")
        said.append(f"{shown(scheme)}: {listed or 'one seed decides nothing'}.")
        values = between(entry.effect.value for entry in end.where(scheme=scheme, mlp=True))
        answered.append(f"{values} ({shown(scheme)})")
    n = sample_size(entry.effect for entry in end)
    return f"Layers above the null. {' '.join(said)} With MLPs the reverse query gets {', '.join(answered)}; {n}."


SAID = {"route": "routes", "evidence": "evidence", "VO": "V/O gradients", "QK": "Q/K gradients", "MLP": "MLP gradients"}
"""How sentences call the signatures."""


def draw(result: Result) -> Panels:
    panels, frame = Panels(), where(result.frame, stage="end")
    groups = {
        _kind(scheme, mlp): where(frame, scheme=scheme, mlp=mlp)
        for scheme in dict.fromkeys(frame["scheme"])
        for mlp in (False, True)
    }
    depths = {name: sorted(set(group["n_layers"])) for name, group in groups.items()}
    widths = {name: len(known) + 2 for name, known in depths.items()}
    _draw_counts(panels, above_null(result))
    x, y = {"title": "layers of the model"}, {**PROBABILITY, "title": "probability<br>of answer"}
    titles = [with_n(name, group, "n_layers").replace(" (", "<br>(") for name, group in groups.items()]
    row = panels.row(titles, x=x, y=y, widths=list(widths.values()), height=200)
    for panel, group in zip(row, groups.values(), strict=True):
        models = where(group, layer=0)
        for side, color, shift in (("forward", FORWARD, -0.1), ("reverse", REVERSE, 0.1)):
            found = {str(n): mean_estimate(rows[f"{side}_probability"]) for n, rows in models.groupby("n_layers")}
            panel.estimates(found, name=f"{side} query", color=color, shift=shift, upright=True)
        panel.level(models["chance"].iloc[0], name="chance", color=CHANCE, x=[-0.5, len(found) - 0.5])
    scores = frame[["evidence", "evidence_null"]]
    reach = {"range": [scores.min(axis=None) - 0.2, scores.max(axis=None) + 0.2]}
    ranges = {"evidence": reach, "pair_share": PROBABILITY}
    for signature, title in ROWS.items():
        y = {**ranges.get(signature, CORRELATION), "title": title}
        drawn = {name: group for name, group in groups.items() if signature != "MLP" or group["mlp"].all()}
        titles = [shown(name) if signature in ("route", "MLP") else "" for name in drawn]
        x, ticks, of_drawn = (
            {"title": "layer", "dtick": 1},
            signature in ("QK", "MLP"),
            [widths[name] for name in drawn],
        )
        row = panels.row(titles, x=x, y=y, ticks=ticks, height=150, widths=of_drawn)
        for panel, (name, group) in zip(row, drawn.items(), strict=True):
            panel.x(range=[-0.4, depths[name][-1] - 0.6])
            _draw_signature(panel, group, signature)
    return panels


def _kind(scheme: str, mlp: bool) -> str:
    return f"{scheme}, {'with MLP' if mlp else 'attention only'}"


def _draw_counts(panels: Panels, above: pd.DataFrame) -> None:
    """Draw in which share of the layers each signature is above its null."""
    named = above.assign(
        signature=above["signature"].map(SAID),
        model=[shown(_kind(one["scheme"], one["mlp"])) for one in above.to_dict("records")],
    )
    counts = named.pivot_table("above", "signature", "model", aggfunc=["mean", "sum", "count"], sort=False)
    (main,) = panels.row(["layers above the null at the end of training"], height=260, ticks_height=26)
    main.x(title="model (blank: no MLP)")
    main.y(title="signature")
    if counts.empty:
        return main.say("one seed decides nothing")
    texts = counts["sum"].fillna(0).astype(int).astype(str) + " of " + counts["count"].fillna(0).astype(int).astype(str)
    texts = texts.where(counts["mean"].notna(), "")
    main.matrix(counts["mean"], limit=0.5, middle=0.5, colors=SEQUENTIAL, scale="share", text=texts)


def _draw_signature(panel: Panel, group: pd.DataFrame, signature: str) -> None:
    for i, (n_layers, (color, dash)) in enumerate(LOOKS.items()):
        models, shift = where(group, n_layers=n_layers), 0.1 * (i - 1)
        null, listed = f"{signature}_null", n_layers == max(LOOKS)
        panel.points(models, "layer", signature, name=f"{n_layers}-layer", color=color, dash=dash, shift=shift)
        if null not in models:
            continue
        look: dict[str, Any] = {"color": CHANCE, "dash": "dot", "shift": shift + 0.05, "listed": listed}
        panel.points(models, "layer", null, name="null", **look)
    if signature == "pair_share":
        panel.level(UNRELATED, name="unrelated evidence in the two places", color=CHANCE)


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
