"""Whether gradient alignment, route correlation and evidence go with reverse prediction: over training within a run
and across seeds, and whether they do beyond what forward prediction says already. Over settings: `signatures`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from mdm_interp import Analysis, Result, Run, Summary, TrainConfig, all_checkpoints, stages, where
from mdm_interp.experiments.claims import CONSTANT
from mdm_interp.experiments.grids import MDM_SCHEMES, WORLDS, grid
from mdm_interp.experiments.paper import CORRELATIONS, LINK_RULES, SIGNATURES, Correlation, across_seeds, over_training
from mdm_interp.experiments.scope import STAGES, Moment
from mdm_interp.measures.gradients import STORAGE, direction_cosine, mean_gradient
from mdm_interp.measures.signatures import evidence, route
from mdm_interp.viz import BLUE, CHANCE, ORANGE, SCHEME_COLORS, Panels


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    return [config for config in grid(seeds) if config.objective == "any_order"]


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give the signatures of those queries that training recorded the probabilities of; alignment is the cosine of the
    gradients of the mean forward and the mean reverse loss."""
    model, pairs = run.model(step), run.query_pairs()
    forward, reverse = [pair.forward for pair in pairs], [pair.reverse for pair in pairs]
    alignment = direction_cosine(mean_gradient(model, forward), mean_gradient(model, reverse), STORAGE)
    found = {"route": route(model, pairs).effect, "evidence": evidence(model, pairs, run.facts).effect}
    return [{"alignment": alignment, **found}]


def when(run: Run) -> list[Moment]:
    """Give every second checkpoint, and the stages."""
    return [*all_checkpoints(run)[::2], *stages(run)]


def summarize(result: Result) -> Summary:
    frame, by = result.frame, ("signature", "world", "scheme", "stage")
    runs = pd.concat([over_training(frame, signature) for signature in SIGNATURES])
    at_stages = pd.concat([across_seeds(frame, signature, stage) for stage in STAGES for signature in SIGNATURES])
    return Summary.of(runs, by, CORRELATIONS) + Summary.read(at_stages, by, CORRELATIONS)


def takeaway(result: Result) -> str:
    def told(signature: str, scheme: str, kind: Correlation) -> str:
        of = {"signature": signature, "world": "relation_cycle", "scheme": scheme, "stage": "over training"}
        found = result.summary.contrast(kind, **of)
        return f"{found.effect.value:.2f} (null {found.null.value:.2f})" if found.effect.n else "undefined"

    listed = "; ".join(
        f"{signature} {told(signature, 'rope', 'plain')} under rope, given forward probability "
        f"{told(signature, 'rope', 'partial')}, under learned {told(signature, 'learned', 'plain')}, given forward "
        f"probability {told(signature, 'learned', 'partial')}"
        for signature in SIGNATURES
    )
    return (
        f"relation_cycle, over training: rank correlation with reverse probability: {listed}. The null takes the "
        "signature of another seed. Nothing is defined where a signature is constant, or where forward probability "
        "leaves nothing to explain."
    )


def draw(result: Result) -> Panels:
    panels, summary = Panels(), result.summary
    measured = where(result.frame, world="relation_cycle", stage="checkpoint")
    y: dict[str, Any] = {"title": "reverse probability,<br>relation_cycle"}
    row = panels.row([f"{name}, all checkpoints" for name in SIGNATURES], y=y, height=400)
    for panel, (signature, label) in zip(row, SIGNATURES.items(), strict=True):
        panel.x(title=label)
        for scheme in MDM_SCHEMES:
            group = where(measured, scheme=scheme)
            of = [f"seed {seed}, step {step}" for seed, step in zip(group["seed"], group["step"], strict=True)]
            look = {"color": SCHEME_COLORS[scheme], "size": 6, "opacity": 0.6}
            panel.dots(group, signature, "reverse_probability", name=scheme, label=of, **look)
    places = {
        f"{world}, {scheme}, {stage}": {"world": world, "scheme": scheme, "stage": stage}
        for stage in dict.fromkeys(entry.of["stage"] for entry in summary)
        for world in WORLDS
        for scheme in MDM_SCHEMES
    }
    y = {"title": "setting", "tickfont": {"size": 12}, "categoryorder": "array", "categoryarray": list(places)}
    y["range"] = [len(places) - 0.5, -0.5]
    x = {"title": "rank correlation", "range": [-1.1, 1.1], "zeroline": True}
    row = panels.row([f"{name}: rank correlations" for name in SIGNATURES], x=x, y=y, height=28 * len(places))
    for panel, signature in zip(row, SIGNATURES, strict=True):
        for look_up, kind, name, color in (
            (summary.at, "plain", "rank correlation", ORANGE),
            (summary.at, "partial", "given forward probability", BLUE),
            (summary.null, "partial", "null of that: another seed's signature", CHANCE),
        ):
            found = {label: look_up(kind, signature=signature, **of) for label, of in places.items()}
            panel.estimates(found, name=name, color=color)
    return panels


ANALYSIS = Analysis(
    name="prediction_link",
    question="Do alignment, route correlation and evidence go with reverse prediction?",
    configs=configs,
    measure=measure,
    when=when,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    claims=LINK_RULES,
    settings={"constant": CONSTANT},
    order=90,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
