"""A small figure, its result and verdicts, for whoever tests what is written of them."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from helpers import planted_result
from plotly.subplots import make_subplots

from mdm_interp.experiments.claims import CLAIMS, READINGS, Verdict
from mdm_interp.experiments.results import Result
from mdm_interp.stats.estimates import Estimate
from mdm_interp.viz.plots import TRAINING_STEPS, add_curve, add_level, add_matrix
from mdm_interp.viz.theme import CHANCE, FORWARD, REVERSE, legend_at, titled

NAN = float("nan")
QUESTION = "Is <script>alert(1)</script> & \"more\" than 'less'?"
TAKEAWAY = "One is more than nothing."
SUMMARY = {"a < b": Estimate(0.123456, 0.1, 0.25, 3), "absent": Estimate(NAN, NAN, NAN, 0)}
CURVE = pd.DataFrame({"step": [1, 10, 100], "value": [0.1, 0.4, 0.9], "low": [0.0, 0.3, 0.8], "high": [0.2, 0.5, 1.0]})
CURVE["n"] = 3


def result(name: str = "tiny", question: str = QUESTION, **changed: Any) -> Result:
    rows = changed.pop("rows", [{"seed": 0, "value": 1.0}])
    summary = changed.pop("summary", SUMMARY)
    parts = {"versions": {"code": "c0de"}, "seeds": [0, 1, 2], "summarize": lambda result: summary}
    return planted_result(name, rows, question=question, **parts | changed)


def drawing(question: str = QUESTION) -> go.Figure:
    figure = make_subplots(1, 2, subplot_titles=["curves", "matrix"])
    add_curve(figure, CURVE, "step", name="forward", color=FORWARD, row=1, col=1, legend="legend")
    add_curve(figure, CURVE, "step", name="reverse", color=REVERSE, row=1, col=1, dash="dash")
    add_level(figure, [1.0, 100.0], 0.5, name="chance", color=CHANCE, row=1, col=1, legend="legend")
    matrix = pd.DataFrame([[1.0, -1.0], [0.0, 0.5]]).to_numpy()
    add_matrix(figure, matrix, x=["B0", "B1"], y=["A0", "A1"], limit=1.0, row=1, col=2, colorbar={"len": 0.5})
    figure.update_xaxes(TRAINING_STEPS, title_text="training step", row=1, col=1)
    figure.update_layout(legend=legend_at(0.2, -0.2), height=600)
    return titled(figure, question, TAKEAWAY)


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
}


def verdict(claim: str, scheme: str, outcome: Any, measure: str = "measure", role: Any = "test") -> Verdict:
    scope = {**SETTING, "scheme": scheme, "stage": "end"}
    of = {"id": claim, "sentence": CLAIMS[claim]}
    number = Estimate(0.5, 0.4, 0.6, 5)
    reading = READINGS.get((role, outcome), "")
    return Verdict(of, scope, role, measure, number, number, "null", 0.01, outcome, reading, "rule", "tiny")
