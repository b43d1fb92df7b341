"""The rows behind the ledger: what is measured where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers import planted_result, tiny_run

from analyses import signatures
from mdm_interp.experiments.grids import CYCLE
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import SCOPE, scope_of
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.summary import Entry, Summary


def test_every_setting_is_measured_at_every_stage_it_has(tiny_result: Callable[[str], Result]) -> None:
    frame = tiny_result("signatures").frame
    keys = ["run", "stage"]
    assert not frame.duplicated(keys).any()
    assert set(frame["stage"]) >= {"initial", "end"}
    shared = frame["objective"] != "causal"
    for name in signatures.SHOWN:
        for column in (name, f"{name}_null"):
            defined = shared if name in ("position", "transplant", "route", "score") else shared | ~shared
            assert frame.loc[defined, column].notna().all(), column
            assert frame.loc[~defined, column].isna().all(), column


def test_the_summary_is_the_mean_over_seeds(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("signatures")
    for record in result.frame[[*SCOPE, "stage"]].drop_duplicates().to_dict("records"):
        group = result.frame.merge(result.frame.__class__([record]))
        for name in signatures.SHOWN:
            found = result.summary.contrast(name, **{str(column): value for column, value in record.items()})
            assert found.effect.n == found.null.n == group[name].count()
            if found.effect.n:
                assert found.effect.value == pytest.approx(group[name].mean(), rel=1e-5)
                assert found.null.value == pytest.approx(group[f"{name}_null"].mean(), rel=1e-5)


ABOUT = scope_of(tiny_run(CYCLE, "none", "any_order", 0).model, "relation_cycle", "any_order")
NULL = Estimate(0.5, 0.4, 0.6, 3)
ABOVE, BELOW, AMONG = (Estimate(value, value - 0.1, value + 0.1, 3) for value in (0.9, 0.1, 0.55))


def planted(**effects: Estimate) -> Result:
    entries = [
        Entry(name, {**ABOUT, "stage": stage}, effects.get(name, AMONG) if stage == "end" else AMONG, NULL)
        for name in signatures.SHOWN
        for stage in ("initial", "end")
    ]
    rows = [{**ABOUT, "stage": "end", "seed": 0, "reverse_probability": 0.5, **dict.fromkeys(signatures.LINKED, 0.5)}]
    return planted_result("signatures", rows, summarize=lambda result: Summary(entries))


def test_the_takeaway_counts_what_is_on_the_papers_side() -> None:
    """Of seven signatures, four have their sides by the paper, two of them below the null."""
    said = signatures.takeaway(planted(evidence=ABOVE, route=ABOVE, position=BELOW, transplant=BELOW))
    assert said.startswith("At the end of training 57% of signatures and settings are surely on the paper's side")
    assert "0% before it: most often “evidence (z-score)” (100%)" in said and said.endswith("n = 3 seeds).")
    wrong = signatures.takeaway(planted(evidence=BELOW, route=AMONG, position=ABOVE))
    assert wrong.startswith("At the end of training 0%")


def test_cells_show_a_sign_and_numbers_where_the_pointer_is() -> None:
    figure: Any = signatures.draw(planted(evidence=ABOVE, position=ABOVE)).figure()
    before, _, end = (trace for trace in figure.data if trace.type == "heatmap")
    assert set(before.text[0]) == {"?"} and list(end.y) == ["relation_cycle, any_order NoPE, 1 layer, 2 heads of 8"]
    assert dict(zip(signatures.SHOWN, end.text[0], strict=True)) == {
        **dict.fromkeys(signatures.SHOWN, "?"),
        "evidence": "+",
        "position": "−",
    }
    assert end.customdata[0][0] == "0.9 [0.8, 1], null 0.5 [0.4, 0.6], n = 3"
