"""Whether attention prefers the same tokens from either side over training, and how much the source gets of it; the raw
scores at sources, before and after training, and their correlation against distance; and how far queries and keys are
from the isotropic and independent ones of the paper's theorem."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from mdm_interp import Analysis, Result, Run, Summary, all_checkpoints, first_and_last, where
from mdm_interp.experiments.claims import ClaimTest
from mdm_interp.experiments.grids import MDM_SCHEMES, cycle_mdm_grid, variant_of
from mdm_interp.experiments.scope import SCOPE
from mdm_interp.measures import routes
from mdm_interp.measures.rope import distance_correlation, isotropy
from mdm_interp.stats.correlations import correlate
from mdm_interp.viz import (
    CHANCE,
    CORRELATION,
    FORWARD,
    GOLD,
    INDIGO,
    MAGENTA,
    OLIVE,
    PROBABILITY,
    REVERSE,
    SCHEME_COLORS,
    TRAINING_STEPS,
    Panels,
    alike,
    shown,
)
from mdm_interp.viz.words import joined, sample_size, side_of

DISTANCES = (1, 2, 3, 4, 5, 6, 7)
PREDICTIONS = {"measured": (OLIVE, "solid"), "spectrum": (GOLD, "dash"), "isotropic": (INDIGO, "dash")}
SIDES = {"left": "circle", "right": "x-thin-open"}


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give four kinds of rows: one `correlation` (`measured` of whole rows, `raw` of the scores at sources; and the
    source's share of attention); before and after, one `premise` (means over heads); under rope, before and after,
    `distance` for each distance, of raw scores; and of the first seed `score` for each query pair and head."""
    model, pairs = run.model(step), run.query_pairs()
    there = routes.compute_routes(model, [pair.forward for pair in pairs])
    back = routes.compute_routes(model, [pair.reverse for pair in pairs])
    forward, reverse = there.scores, back.scores
    correlations = {
        "measured": routes.route_correlation(model, pairs).nanmean().item(),
        "raw": correlate(forward, reverse).nanmean().item(),
        "forward_attention": there.pattern.mean().item(),
        "reverse_attention": back.pattern.mean().item(),
    }
    rows: list[dict[str, Any]] = [{"kind": "correlation", **correlations}]
    if step in (run.steps[0], run.steps[-1]):
        found = vars(isotropy(model, pairs))
        effects = {name: contrast.effect.mean().item() for name, contrast in found.items()}
        rows += [
            {"kind": "premise", **effects, **{f"{name}_null": of.null.mean().item() for name, of in found.items()}}
        ]
    if run.config.model.position == "rope" and step in (run.steps[0], run.steps[-1]):
        predicted = distance_correlation(model, pairs, torch.tensor(DISTANCES, dtype=torch.float64))
        rows += [
            {
                "kind": "distance",
                "distance": distance,
                "measured": predicted.measured[i].mean().item(),
                "spectrum": predicted.spectrum[i].mean().item(),
                "isotropic": predicted.isotropic[i].item(),
            }
            for i, distance in enumerate(DISTANCES)
        ]
        if run.config.seed == 0:
            heads = range(run.config.model.n_heads)
            rows += [
                {"kind": "score", "head": head, "side": pair.side, "forward": there[head], "reverse": back[head]}
                for pair, there, back in zip(pairs, forward[:, 0].tolist(), reverse[:, 0].tolist(), strict=True)
                for head in heads
            ]
    return [{"variant": variant_of(run.config), **row} for row in rows]


def summarize(result: Result) -> Summary:
    """Summarise the first and the last checkpoint: of whole rows and of raw scores, by distance, and of the theorem's
    premise; and how attention to the source falls after its peak."""
    at_ends = first_and_last(result.frame)
    shapes = peaks(result)
    return (
        Summary.of(where(at_ends, kind="correlation"), ("scheme", "stage"), ("measured", "raw"))
        + Summary.of(where(at_ends, kind="distance"), ("stage", "distance"), tuple(PREDICTIONS))
        + Summary.of(where(at_ends, kind="premise"), ("scheme", "stage"), ("q", "k", "overlap"))
        + Summary.of(shapes, ("scheme", "stage"), tuple(FALLS))
    )


FALLS = {"forward_fall": "forward_attention", "reverse_fall": "reverse_attention"}


def peaks(result: Result) -> pd.DataFrame:
    """Return for each run how far its attention to the source ends below the peak that it had risen to, forward and in
    reverse; null: how much it varies over the second half of training."""
    rows = []
    for scope, run in where(result.frame, kind="correlation").groupby([*SCOPE, "seed"], sort=False):
        run = run.sort_values("step")
        curves = run[list(FALLS.values())].to_numpy(dtype=float)
        late = curves[run["step"].to_numpy() >= run["step"].max() / 2]
        rises, falls = curves.max(0) - curves[0], curves.max(0) - curves[-1]
        found = dict(zip(FALLS, np.minimum(rises, falls), strict=True))
        found |= {f"{name}_null": varies for name, varies in zip(FALLS, np.ptp(late, axis=0), strict=True)}
        rows.append({**dict(zip([*SCOPE, "seed"], scope, strict=True)), "stage": "over training", **found})
    return pd.DataFrame(rows)


def takeaway(result: Result) -> str:
    summary = result.summary
    measured = {
        scheme: [summary.at("measured", scheme=scheme, stage=stage) for stage in ("initial", "end")]
        for scheme in MDM_SCHEMES
    }
    wholly = [scheme for scheme, ends in measured.items() if all(round(end.value, 2) == 1 for end in ends)]

    def moved(scheme: str) -> str:
        initial, end = measured[scheme]
        way = {"above": "rises", "below": "falls", "undecided": "goes"}[side_of(end, initial)]
        unsure = ", no sure change" if way == "goes" else ""
        return f"under {shown(scheme)} it {way} from {initial.value:.2f} to {end.value:.2f}{unsure}"

    whole = f"Wholly under {joined([shown(scheme) for scheme in wholly])}" if wholly else ""
    rest = "; else in part" if wholly else "In part"
    others = "; ".join(moved(scheme) for scheme in MDM_SCHEMES if scheme not in wholly)
    size = sample_size([end for ends in measured.values() for end in ends])
    part = f"{rest}. Over training, the correlation of the two sides' scores: {others}" if others else ""
    return f"{whole}{part} ({size})."


def draw(result: Result) -> Panels:
    """Draw the correlation over training, and below it attention, raw scores and distance."""
    panels, frame, seed = Panels(), result.frame, result.frame["seed"].min()
    moments = {"before": frame["step"].min(), "after": frame["step"].max()}
    trained = where(frame[frame["step"] > 0], kind="correlation")
    size = sample_size([entry.effect for entry in result.summary.where("measured", stage="end")])
    titles = [f"forward and reverse rows of scores ({size})", "raw scores at sources only"]
    correlation = {**CORRELATION, "title": "correlation of<br>the two sides"}
    row = panels.row(titles, x=TRAINING_STEPS, y=correlation, widths=[1.6, 1], height=360)
    for panel, quantity in zip(row, ("measured", "raw"), strict=True):
        for names, scheme in alike(trained, quantity):
            panel.curve(where(trained, scheme=scheme), "step", quantity, name=names, color=SCHEME_COLORS[scheme])
        panel.level(0.0, name="unrelated sides", color=CHANCE)
    titles = [f"attention, {shown(scheme)}" for scheme in MDM_SCHEMES]
    share = {**PROBABILITY, "title": "share of attention<br>at the source"}
    for panel, scheme in zip(panels.row(titles, x=TRAINING_STEPS, y=share, height=170), MDM_SCHEMES, strict=True):
        for direction, color, dash in (("forward", FORWARD, "solid"), ("reverse", REVERSE, "dot")):
            rows, name = where(trained, scheme=scheme), f"{direction} query"
            panel.curve(rows, "step", f"{direction}_attention", name=name, color=color, dash=dash)
    titles = [
        *(f"RoPE, {moment} training" for moment in moments),
        *(f"scores {moment}, seed {seed}" for moment in moments),
    ]
    *by_distance, before, after = panels.row(titles, one_y=False, height=230)
    for panel, step in zip(by_distance, moments.values(), strict=True):
        panel.x(title="distance (positions)")
        panel.y(**CORRELATION, title="raw scores: correlation")
        at = where(frame, kind="distance", step=step)
        for prediction, (color, dash) in PREDICTIONS.items():
            panel.curve(at, "distance", prediction, name=prediction, color=color, dash=dash)
    for panel, step in ((before, moments["before"]), (after, moments["after"])):
        panel.x(title="forward score")
        panel.y(title="reverse score")
        scores = where(frame, kind="score", step=step)
        for side, symbol in SIDES.items():
            group = where(scores, side=side)
            heads = [f"head {head:.0f}" for head in group["head"]]
            look: dict[str, Any] = {"color": MAGENTA, "opacity": 0.7, "symbol": symbol}
            panel.dots(group, "forward", "reverse", name=f"a pair that asks for the {side} entity", label=heads, **look)
    return panels


CLAIMS = tuple(
    ClaimTest(
        claim="9",
        measure=f"how far the {direction} share of attention at the source ends below the peak that it had risen to",
        effect=f"{direction}_fall",
        null=f"{direction}_fall_null",
        null_is="how much it varies over the second half of training",
        side="above",
        margin=0.05,
        rows=peaks,
    )
    for direction in ("forward", "reverse")
)

ANALYSIS = Analysis(
    name="route_correlation",
    question="Does what draws attention to a source draw it from either side?",
    configs=cycle_mdm_grid,
    measure=measure,
    when=all_checkpoints,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    claims=CLAIMS,
    settings={"distances": list(DISTANCES)},
    order=30,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
