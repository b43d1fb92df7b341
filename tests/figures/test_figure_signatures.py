"""The rows behind the ledger: what is measured where."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from analyses import signatures
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import SCOPE


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
