"""The trajectory analysis: what is masked, what the null is, and rows that are the library's measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_config
from probe_helpers import result_of, tiny_probe

from analyses import trajectory as analysis
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe
from mdm_interp.measures.trajectory import denoise_answers
from mdm_interp.stats.resampling import FactSample

MASK = 12


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return tiny_probe(tmp_path_factory.mktemp("trajectory"), "dream", twin="qwen2", facts=4)


@pytest.fixture(scope="module")
def result(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return result_of(analysis.ANALYSIS, [probe], tmp_path_factory.mktemp("result"))


def test_all_but_the_source_is_masked() -> None:
    query = Query((3, 1, 2, MASK, MASK, 4, 11, 5), (6, 7), (3, 5), (1, 3))
    for shift, kept in ((0, MASK), (-1, 3)):
        masked = analysis.source_only(query, tiny_config(mask_token_id=MASK, readout_shift=shift), special={11, MASK})
        assert masked.tokens == (kept, 1, 2, MASK, MASK, MASK, 11, MASK)
        assert (masked.answer, masked.answer_span, masked.source_span) == ((6, 7), (3, 5), (1, 3))


def test_another_source_may_have_any_length() -> None:
    query = Query((3, 1, 2, MASK, MASK, 4), (6, 7), (3, 5), (1, 3))
    assert analysis.with_source(query, (8, 9, 10)) == Query((3, 8, 9, 10, MASK, MASK, 4), (6, 7), (4, 6), (1, 4))
    query = Query((MASK, 4, 1, 2), (6,), (0, 1), (2, 4))
    assert analysis.with_source(query, (8,)) == Query((MASK, 4, 8), (6,), (0, 1), (2, 3))


def test_the_null_shares_side_and_no_name_even_through_other_facts() -> None:
    def pair(answer: int, source: int, side: Any, fact: int) -> QueryPair:
        query = Query((source, 4, MASK), (answer,), (2, 3), (0, 1))
        return QueryPair(query, query, fact, side)

    asked = [(1, 5, "left"), (2, 5, "left"), (1, 6, "left"), (3, 7, "right"), (9, 8, "left"), (8, 10, "left")]
    pairs = [pair(*values, fact) for fact, values in enumerate(asked)]
    chosen = analysis.other_sources(pairs, n_ctx=3)
    assert all(source in ((8,), (10,)) for source in chosen[:3]) and chosen[3] is None
    assert all(source in ((5,), (6,)) for source in chosen[4:])  # not each other's: 8 is the answer of one
    assert analysis.other_sources([pairs[0], pairs[4]], n_ctx=2) == [None, None]


def test_rows_are_the_librarys_measures_over_facts(probe: Probe, result: Result) -> None:
    cfg, tokenizer = probe.model.cfg, probe.model.tokenizer
    assert len({tuple(row) for row in result.rows}) == 1
    assert len(result.rows) == 2 * 2 * (2 * analysis.STAGES * (cfg.n_layers + 1) + 3)
    pairs = probe.pairs("relational")
    queries = [analysis.source_only(pair.reverse, cfg, set(tokenizer.all_special_ids)) for pair in pairs]
    watched = denoise_answers(probe.model, queries, analysis.STAGES)
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
        assert [row[name] for name in vars(estimate)] == pytest.approx(list(vars(estimate).values()), rel=1e-4)
        assert row["facts"] == row["clusters"] == 4


def test_a_fact_against_itself_makes_no_difference(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "other_sources", lambda pairs, n_ctx: [pair.forward.source for pair in pairs])
    for row in analysis.measure(replace(probe, twin=None)):
        for name in ("value", "low", "high", "n"):
            np.testing.assert_allclose(row[name], row[f"null_{name}"], rtol=1e-4)


def test_another_source_does_make_one(result: Result) -> None:
    different = [row["value"] != row["null_value"] for row in result.rows if row["measure"] == "evidence"]
    assert np.mean(different) > 0.9


def test_twins_are_asked_if_they_have_masks(tmp_path: Path) -> None:
    arm = tiny_probe(tmp_path, "qwen2", twin="llada", facts=2)
    measured = result_of(analysis.ANALYSIS, [arm], tmp_path)
    assert {row["checkpoint"] for row in measured.rows} == {"tiny-llada"}
    nothing = result_of(analysis.ANALYSIS, [replace(arm, twin=None)], tmp_path)
    assert nothing.rows == [] and nothing.summary == {}
    figure: Any = analysis.ANALYSIS.figure(nothing)
    assert "Causal models have no denoising trajectory" in figure.layout.title.subtitle.text


def test_the_summary_is_of_the_rows(result: Result) -> None:
    together = [row for row in result.rows if row["layer"] is None]
    assert len(result.summary) == 2 * len(together)
    (row,) = (
        row
        for row in together
        if (row["kind"], row["direction"], row["measure"], row["stage"]) == ("positional", "forward", "route", 1)
    )
    summary = result.summary["tiny-dream / positional / forward / route, stage 2 of 5 / null"]
    assert vars(summary) == {name: row[f"null_{name}"] for name in ("value", "low", "high", "n")}


def test_the_figure_shows_every_checkpoint_and_layer(result: Result) -> None:
    rows = [
        {**row, "checkpoint": name, "layer": None if row["layer"] is None else row["layer"] + shift}
        for name in ("one", "two")
        for row in result.rows
        for shift in range(0, 32, 2)
        if row["layer"] is not None or shift == 0
    ]
    deep = replace(result, rows=rows)
    figure: Any = analysis.draw(deep)
    heat = [trace for trace in figure.data if trace.type == "heatmap"]
    assert [trace.z.shape for trace in heat] == [(32, analysis.STAGES)] * 4
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert [title for title in titles if "above" not in title and title] == [
        f"{name}, {kind}" for name in ("one", "two") for kind in KINDS
    ]
