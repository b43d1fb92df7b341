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
    COLORS,
    CORRELATION,
    FORWARD,
    PROBABILITY,
    REVERSE,
    TRAINING_STEPS,
    VARIANT_COLORS,
    Panels,
)

DISTANCES = (1, 2, 3, 4, 5, 6, 7)
PREDICTIONS = {"measured": COLORS[0], "spectrum": COLORS[3], "isotropic": COLORS[2]}


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

    def moved(scheme: str, quantity: str = "measured") -> str:
        initial, end = (summary.at(quantity, scheme=scheme, stage=stage).value for stage in ("initial", "end"))
        return f"{scheme} from {initial:.2f} to {end:.2f}"

    def spread(of: str) -> str:
        at = {"scheme": "rope", "stage": "end"}
        return f"{summary.at(of, **at).value:.0%} (isotropic ones {summary.null(of, **at).value:.0%})"

    def fallen(scheme: str) -> str:
        forward, reverse = (summary.at(name, scheme=scheme, stage="over training").value for name in FALLS)
        return f"{scheme} {forward:.2f} and {reverse:.2f}"

    measured, spectrum, isotropic = (summary.at(name, stage="end", distance=2).value for name in PREDICTIONS)
    return (
        f"Training moves the correlation of forward and reverse rows for {', '.join(map(moved, MDM_SCHEMES))}; that of "
        f"raw scores at sources, which leaves out what all sources share, for {moved('rope', 'raw')}. At distance 2, "
        f"trained rope heads measure {measured:.2f}; their spectrum predicts {spectrum:.2f}, isotropy {isotropic:.2f}. "
        f"Trained rope queries spread over {spread('q')} of a head's dimensions and keys over {spread('k')}. Attention "
        f"to the source ends below its peak by, forward and in reverse: {', '.join(map(fallen, MDM_SCHEMES))}."
    )


def draw(result: Result) -> Panels:
    panels, frame, seed = Panels(), result.frame, result.frame["seed"].min()
    moments = {"before": frame["step"].min(), "after": frame["step"].max()}
    titles = [f"scores {moment}, rope, seed {seed}" for moment in moments]
    of_scores = panels.row(titles, x={"title": "forward score"}, y={"title": "reverse score"}, one_y=False, height=300)
    for panel, step in zip(of_scores, moments.values(), strict=True):
        scores = where(frame, kind="score", step=step)
        for head in sorted(scores["head"].astype(int).unique()):
            group = where(scores, head=head)
            symbols = group["side"].map({"left": "circle", "right": "x-thin-open"})
            look: dict[str, Any] = {"color": COLORS[head], "opacity": 0.7, "symbol": symbols}
            sides = group["side"] + " entity"
            panel.dots(group, "forward", "reverse", name=f"head {head}", label=sides.tolist(), **look)
    titles = [*(f"correlation at a distance, {moment}" for moment in moments), "over training (dotted: raw scores)"]
    correlation = {**CORRELATION, "title": "correlation"}
    *by_distance, over_training = panels.row(titles, y=correlation, widths=[1, 1, 1.3], height=300)
    for panel, step in zip(by_distance, moments.values(), strict=True):
        panel.x(title="distance (positions)")
        for prediction, color in PREDICTIONS.items():
            rows, dash = where(frame, kind="distance", step=step), "solid" if prediction == "measured" else "dash"
            panel.curve(rows, "distance", prediction, name=prediction, color=color, dash=dash)
    trained = where(frame[frame["step"] > 0], kind="correlation")
    over_training.x(**TRAINING_STEPS)
    for name in trained["variant"].unique():
        rows, color = where(trained, variant=name), VARIANT_COLORS[name]
        dash = "dash" if name == "MDM none" else "solid"  # it lies on alibi
        over_training.curve(rows, "step", "measured", name=name, color=color, dash=dash)
        over_training.curve(rows, "step", "raw", name=f"{name}, raw scores", color=color, dash="dot", listed=False)
    over_training.level(0.0, name="unrelated sides", color=CHANCE)
    titles = [f"attention to the source, {scheme}" for scheme in MDM_SCHEMES]
    share = {**PROBABILITY, "title": "share of attention"}
    for panel, scheme in zip(panels.row(titles, x=TRAINING_STEPS, y=share, height=260), MDM_SCHEMES, strict=True):
        for direction, color, dash in (("forward", FORWARD, "solid"), ("reverse", REVERSE, "dot")):
            rows, name = where(trained, scheme=scheme), f"{direction} query"
            panel.curve(rows, "step", f"{direction}_attention", name=name, color=color, dash=dash)
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
