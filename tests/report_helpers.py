"""A small figure, its result and verdicts, for whoever tests what is written of them."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from helpers import planted_result

from mdm_interp.experiments.claims import CLAIMS, READINGS, Verdict
from mdm_interp.experiments.results import Result
from mdm_interp.stats.estimates import NOTHING, Estimate
from mdm_interp.stats.summary import Entry, Summary
from mdm_interp.viz.panels import TRAINING_STEPS, Panels
from mdm_interp.viz.theme import CHANCE, FORWARD, REVERSE, title_height, titled

NAN = float("nan")
QUESTION = "Is <script>alert(1)</script> & \"more\" than 'less'?"
TAKEAWAY = "One is more than nothing."
SUMMARY = Summary(
    [
        Entry("share", {"scheme": "a < b"}, Estimate(0.123456, 0.1, 0.25, 3), Estimate(0.05, 0.0, 0.1, 3)),
        Entry("chance", {}, NOTHING),
    ]
)
CURVE = pd.DataFrame({"step": [1, 10, 100], "value": [0.1, 0.4, 0.9], "low": [0.0, 0.3, 0.8], "high": [0.2, 0.5, 1.0]})
CURVE["n"] = 3


def result(name: str = "tiny", question: str = QUESTION, **changed: Any) -> Result:
    rows = changed.pop("rows", [{"seed": 0, "value": 1.0}])
    summary = changed.pop("summary", SUMMARY)
    parts = {"versions": {"code": "c0de"}, "seeds": [0, 1, 2], "summarize": lambda result: summary}
    return planted_result(name, rows, question=question, **parts | changed)


def panels() -> Panels:
    made = Panels()
    curves, matrix = made.row(["curves", "matrix"], x=TRAINING_STEPS, one_y=False, height=300)
    curves.curve(CURVE, "step", name="forward", color=FORWARD)
    curves.curve(CURVE, "step", name="reverse", color=REVERSE, dash="dash", listed=False)
    curves.level(0.5, name="chance", color=CHANCE)
    table = pd.DataFrame([[1.0, -1.0], [0.0, 0.5]], index=["A0", "A1"], columns=["B0", "B1"])
    matrix.matrix(table, limit=1.0, scale="logits")
    matrix.x(title=None, type="category", tickvals=None, ticktext=None)
    return made


def drawing(question: str = QUESTION) -> go.Figure:
    return titled(panels().figure(title_height(TAKEAWAY)), question, TAKEAWAY)


SETTING: dict[str, Any] = {
    "world": "w",
    "reversed_share": 0.0,
    "scheme": "rope",
    "rotary_base": 1e4,
    "objective": "any_order",
    "n_layers": 1,
    "n_heads": 1,
    "d_head": 64,
    "mlp": False,
    "mask_rate": 0.0,
    "attention": "bidirectional",
}


def verdict(claim: str, scheme: str, outcome: Any, measure: str = "measure", role: Any = "test") -> Verdict:
    scope = {**SETTING, "scheme": scheme, "stage": "end"}
    of = {"id": claim, "sentence": CLAIMS[claim]}
    number = Estimate(0.5, 0.4, 0.6, 5)
    reading = READINGS.get((role, outcome), "")
    return Verdict(of, scope, role, measure, number, number, "null", 0.01, outcome, reading, "rule", "tiny")
