"""The trajectory analysis: what is masked, what the null is, and rows that are the library's measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_helpers import result_of, tiny_probe

from analyses import trajectory as analysis
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe
from mdm_interp.measures.trajectory import denoise_answers, source_only
from mdm_interp.stats.resampling import FactSample
from mdm_interp.stats.tables import as_columns, estimate_in

COLUMNS = ("value", "value_low", "value_high", "value_n")


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return tiny_probe(tmp_path_factory.mktemp("trajectory"), "dream", twin="qwen2", facts=4)


@pytest.fixture(scope="module")
def result(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return result_of(analysis.ANALYSIS, [probe], tmp_path_factory.mktemp("result"))


def test_rows_are_the_librarys_measures_over_facts(probe: Probe, result: Result) -> None:
    cfg, tokenizer = probe.model.cfg, probe.model.tokenizer
    assert len({tuple(row) for row in result.rows}) == 1
    assert len(result.rows) == 2 * 2 * (2 * analysis.N_PARTS * (cfg.n_layers + 1) + 3)
    pairs = probe.pairs("relational")
    queries = [source_only(pair.reverse, cfg, set(tokenizer.all_special_ids)) for pair in pairs]
    watched = denoise_answers(probe.model, queries, analysis.N_PARTS)
    expected = {
        ("route", 0, 1): watched.route[:, 0, 1],
        ("evidence", 2, 0): watched.evidence[:, 2, 0],
        ("route", 1, None): watched.route[:, 1].mean(-1),
        ("evidence", 1, None): watched.evidence[:, 1].sum(-1),
        ("filled_at", None, None): watched.filled_at,
        ("probability", None, None): watched.probability,
        ("correct", None, None): watched.correct,
    }
    for at, values in expected.items():
        (row,) = (
            row
            for row in result.rows
            if (row["kind"], row["direction"]) == ("relational", "reverse")
            and (row["measure"], row["stage"], row["layer"]) == at
        )
        (estimate,) = FactSample.of(pairs).mean(values).estimates()
        assert list(as_columns("value", estimate).values()) == pytest.approx([row[name] for name in COLUMNS], rel=1e-4)
        assert row["facts"] == row["clusters"] == 4


def test_a_fact_against_itself_makes_no_difference(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "other_sources", lambda pairs, n_ctx: [pair.forward.source for pair in pairs])
    for row in analysis.measure(replace(probe, twin=None)):
        for name in COLUMNS:
            np.testing.assert_allclose(row[name], row[name.replace("value", "value_null")], rtol=1e-4)


def test_another_source_does_make_one(result: Result) -> None:
    different = [row["value"] != row["value_null"] for row in result.rows if row["measure"] == "evidence"]
    assert np.mean(different) > 0.9


def test_twins_are_asked_if_they_have_masks(tmp_path: Path) -> None:
    arm = tiny_probe(tmp_path, "qwen2", twin="llada", facts=2)
    measured = result_of(analysis.ANALYSIS, [arm], tmp_path)
    assert {row["checkpoint"] for row in measured.rows} == {"tiny-llada"}
    nothing = result_of(analysis.ANALYSIS, [replace(arm, twin=None)], tmp_path)
    assert nothing.rows == [] and len(nothing.summary) == 0
    figure: Any = analysis.ANALYSIS.figure(nothing)
    assert "Causal models have no denoising trajectory" in figure.layout.title.subtitle.text
    assert [trace.text for trace in figure.data] == [(analysis.CAUSAL,)] and not figure.layout.xaxis.showticklabels


def test_the_summary_is_of_the_rows(result: Result) -> None:
    together = [row for row in result.rows if row["layer"] is None]
    assert len(result.summary) == len(together)
    (row,) = (
        row
        for row in together
        if (row["kind"], row["direction"], row["measure"], row["stage"]) == ("positional", "forward", "route", 1)
    )
    of = {"checkpoint": "tiny-dream", "kind": "positional", "direction": "forward", "measure": "route", "stage": 1}
    assert result.summary.at("value", **of) == estimate_in(row, "value")
    assert result.summary.null("value", **of) == estimate_in(row, "value_null")
    assert result.summary.null("value", **of) != result.summary.at("value", **of)


@pytest.mark.parametrize(
    ("evidence", "said"),
    [(2.0, "at every stage, the route at none. Still, at most 25%"), (0.0, "at none, the route at none.")],
)
def test_the_takeaway_says_what_is_above_its_null(result: Result, evidence: float, said: str) -> None:
    values = {"evidence": evidence, "route": 0.0, "correct": 0.25, "probability": 0.5, "filled_at": 0.5}
    rows = [
        {
            **row,
            **{"value": value, "value_low": value - 0.1, "value_high": value + 0.1},
            **{"value_null": 0.0, "value_null_low": -0.1, "value_null_high": 0.1},
        }
        for row in result.rows
        for value in [1.0 if (row["direction"], row["measure"]) == ("forward", "correct") else values[row["measure"]]]
    ]
    found = analysis.takeaway(replace(result, rows=rows))
    assert f"another fact's source {said}" in found and "forward at least 100% (n = 4 clusters" in found


def test_the_figure_shows_every_checkpoint_and_layer(result: Result) -> None:
    rows = [
        {**row, "checkpoint": name, "layer": None if row["layer"] is None else row["layer"] + shift}
        for name in ("one", "two")
        for row in result.rows
        for shift in range(0, 32, 2)
        if row["layer"] is not None or shift == 0
    ]
    deep = replace(result, rows=rows)
    figure: Any = analysis.draw(deep).figure()
    heat = [trace for trace in figure.data if trace.type == "heatmap"]
    assert [trace.z.shape for trace in heat] == [(32, analysis.N_PARTS)] * 4
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert [title for title in titles if title and "null" not in title and "n = " not in title] == [
        f"{name}, {kind}" for name in ("one", "two") for kind in KINDS
    ]
