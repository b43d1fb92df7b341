"""The paper's claims, each measured with its null in every setting and at every stage of training: the rows that the
claims ledger is computed from."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mdm_interp import Analysis, Contrast, Result, Run, Summary, where
from mdm_interp.experiments.grids import every_run
from mdm_interp.experiments.paper import LINKED, RULES
from mdm_interp.experiments.scope import SCOPE, STAGES, scope_label
from mdm_interp.interventions import transplant_routes
from mdm_interp.measures.signatures import alignment, evidence, position, route, score
from mdm_interp.viz import BLUE, CHANCE, PROBABILITY, SCHEME_COLORS, Panels

SHOWN = {
    "evidence": "evidence<br>(z-score)",
    "position": "share<br>of place",
    "transplant": "distance,<br>transplant",
    "route": "route<br>correlation",
    "score": "raw score<br>correlation",
    "alignment": "gradients<br>of pairs",
    "mean_alignment": "mean<br>gradients",
}
SYMBOLS = dict(zip(STAGES, ("circle-open", "diamond-open", "circle"), strict=True))
UNDEFINED = Contrast(float("nan"), float("nan"))


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give every signature beside its null; NaN where the pairs share neither answer nor source (an ARM's)."""
    model, pairs, world = run.model(step), run.query_pairs(n_contexts=1), run.facts
    found = dict.fromkeys(("route", "score", "position", "transplant"), UNDEFINED)
    if all(pair.shared for pair in pairs):
        found["route"], found["score"] = route(model, pairs), score(model, pairs)
        found["position"] = position(model, pairs, world)
        found["transplant"] = transplant_routes(model, pairs).distance()
    found |= {"evidence": evidence(model, pairs, world), **alignment(model, pairs)}
    return [{key: value for name, of in found.items() for key, value in ((name, of.effect), (f"{name}_null", of.null))}]


def summarize(result: Result) -> Summary:
    return Summary.of(result.frame, (*SCOPE, "stage"), tuple(SHOWN))


def takeaway(result: Result) -> str:
    known = [entry for entry in result.summary.where(stage="end") if entry.effect.n > 1]
    clear = [e for e in known if e.null and (e.effect.low > e.null.high or e.effect.high < e.null.low)]
    return (
        f"At the end of training the interval of the signature lies clear of its null's in {len(clear)} of "
        f"{len(known)} combinations of setting and signature with several seeds; which way, and whether by enough, is "
        "what the ledger says."
    )


def settings_at(result: Result, stage: str) -> pd.DataFrame:
    """Give one row per setting at a stage: the means over seeds, and the setting's name."""
    at = where(result.frame, stage=stage)
    points = at.groupby(list(SCOPE), sort=False)[[*LINKED, "reverse_probability"]].mean().reset_index()
    return points.assign(setting=[scope_label(row) for row in points.to_dict("records")])


def draw(result: Result) -> Panels:
    panels, points = Panels(), settings_at(result, "end")
    y = {**PROBABILITY, "title": "reverse probability,<br>each setting at the end"}
    for panel, name in zip(panels.row([""] * len(LINKED), y=y, height=270), LINKED, strict=True):
        panel.x(title=SHOWN[name], nticks=5)
        for scheme, color in SCHEME_COLORS.items():
            dots = where(points, scheme=scheme).dropna(subset=[name])
            panel.dots(dots, name, "reverse_probability", name=scheme, label=[*dots["setting"]], color=color, size=8)
    settings = result.frame[list(SCOPE)].drop_duplicates().to_dict("records")
    labels = list(map(scope_label, settings))
    # A signature that some settings lack has them all the same, so that rows lie in line.
    order = {"type": "category", "categoryorder": "array", "categoryarray": labels, "range": [len(labels) - 0.5, -0.5]}
    y, summary = {**order, "title": "setting", "tickfont": {"size": 11}}, result.summary
    for panel, name in zip(panels.row([""] * len(SHOWN), y=y, height=26 * len(labels)), SHOWN, strict=True):
        panel.x(title={"text": SHOWN[name], "font": {"size": 13}}, nticks=3, tickangle=0)
        for stage, symbol in SYMBOLS.items():
            for kind, look_up, color in (("effect", summary.at, BLUE), ("null", summary.null, CHANCE)):
                found = {label: look_up(name, **of, stage=stage) for label, of in zip(labels, settings, strict=True)}
                panel.estimates(found, name=f"{kind}, {stage}", color=color, symbol=symbol)
    return panels


ANALYSIS = Analysis(
    name="signatures",
    question="Where do the paper's signatures show, and when?",
    configs=every_run,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    claims=RULES,
    order=5,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
