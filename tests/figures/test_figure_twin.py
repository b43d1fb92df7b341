"""Twins: both are asked the same words, heads are paired by place, and agreement can come out either way."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from probe_helpers import result_of, tiny_probe, traces
from scipy.stats import spearmanr

from analyses import twin
from mdm_interp.data.queries import Direction
from mdm_interp.errors import UserError
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe
from mdm_interp.measures.answer_evidence import answer_evidence
from mdm_interp.measures.routes import compute_routes


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return tiny_probe(tmp_path_factory.mktemp("twins"), "dream", twin="qwen2")


@pytest.fixture(scope="module")
def result(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return result_of(twin.ANALYSIS, [probe], tmp_path_factory.mktemp("result"))


def rows_of(result: Result, **equal: Any) -> list[dict[str, Any]]:
    return [row for row in result.rows if all(row[name] == value for name, value in equal.items())]


@pytest.mark.parametrize(("kind", "direction"), list(itertools.product(KINDS, get_args(Direction))))
def test_both_are_asked_for_the_last_name_in_the_same_words(probe: Probe, kind: Any, direction: Any) -> None:
    assert probe.twin is not None
    mine, theirs, sample = probe.asked_alike(kind, direction)
    assert 20 <= len(mine) == len(theirs) <= 8 * 3 and sample.n_facts == 8
    for one, other in zip(mine, theirs, strict=True):
        stop = one.answer_span[1]
        assert one.tokens[: one.answer_span[0]] == other.tokens[: other.answer_span[0]]
        assert (one.answer, one.source, one.answer_span) == (other.answer, other.source, other.answer_span)
        assert one.source_span[1] <= one.answer_span[0] and len(other.tokens) == stop
    kept = {pair.fact for pair in probe.pairs(kind)}
    answers = {query.answer for query in mine}
    named = {
        pair.forward.answer
        for pair in probe.pairs(kind)
        if pair.side == ("right" if direction == "forward" else "left")
    }
    assert answers == named and len(kept) == 8


def test_a_question_that_one_cannot_be_asked_is_left_out(probe: Probe) -> None:
    assert probe.twin is not None
    prompts = probe.twin.prompts["positional"]
    fewer = replace(prompts, pairs=prompts.pairs[4:], templates=prompts.templates[4:])
    other = replace(probe.twin, prompts={**probe.twin.prompts, "positional": fewer})
    mine, theirs, _ = replace(probe, twin=other).asked_alike("positional", "forward")
    assert len(mine) == len(theirs) == 20
    none = replace(other, prompts={**other.prompts, "positional": replace(fewer, pairs=[], templates=[])})
    with pytest.raises(UserError, match="can be asked no positional query both"):
        replace(probe, twin=none).asked_alike("positional", "forward")


def test_rows_are_those_of_each_model_by_itself(probe: Probe, result: Result) -> None:
    assert probe.twin is not None
    assert len(result.rows) == 4 * (2 * (8 + 1) + 1)
    assert len({tuple(row) for row in result.rows}) == len({frozenset(row) for row in result.rows}) == 1
    for kind, direction in itertools.product(KINDS, get_args(Direction)):
        *asked, sample = probe.asked_alike(kind, direction)
        models = {"value": probe.model, "twin_value": probe.twin.model}
        for (name, model), queries in zip(models.items(), asked, strict=True):
            at = {"kind": kind, "direction": direction}
            route = compute_routes(model, queries).pattern
            heads = rows_of(result, **at, what="route", layer=1, head=2)
            assert heads[0][name] == pytest.approx(sample.mean(route).value[1, 2].item(), rel=1e-4)
            evidence, of_layers = answer_evidence(model, queries, sample.contexts)
            (row,) = rows_of(result, **at, what="evidence", layer=0, head=3)
            assert row[name] == pytest.approx(sample.mean(evidence.beaten.effect).value[0, 3].item(), rel=1e-4)
            (row,) = rows_of(result, **at, what="layer_evidence")
            assert row[name] == pytest.approx(sample.mean(of_layers.beaten.effect).value.mean().item(), rel=1e-4)


def test_agreement_is_the_rank_correlation_of_the_rows(result: Result) -> None:
    for what in twin.HEADS:
        heads = [
            row for row in rows_of(result, kind="positional", direction="forward", what=what) if row["head"] is not None
        ]
        expected: Any = spearmanr([row["value"] for row in heads], [row["twin_value"] for row in heads])
        (whole,) = rows_of(result, kind="positional", direction="forward", what=what, layer=None)
        assert whole["agreement"] == pytest.approx(expected.statistic, abs=1e-5)
        of = {"checkpoint": "tiny-dream", "kind": "positional", "direction": "forward", "what": what}
        assert result.summary.at("agreement", **of).value == whole["agreement"]
        assert result.summary.null("agreement", **of).value == whole["agreement_null"]


def test_a_model_is_its_own_twin(probe: Probe, tmp_path: Path) -> None:
    result = result_of(twin.ANALYSIS, [replace(probe, twin=probe)], tmp_path)
    for row in result.rows:
        assert (row["value"], row["value_low"]) == (row["twin_value"], row["twin_value_low"])
        assert row["facts"] == row["clusters"] == row["value_n"] == 8
    for what in twin.HEADS:
        of = {"checkpoint": "tiny-dream", "kind": "relational", "direction": "reverse", "what": what}
        estimate = result.summary.at("agreement", **of)
        assert (estimate.value, estimate.low) == (pytest.approx(1), pytest.approx(1))


def test_other_shapes_are_not_paired_and_the_figure_says_so(tmp_path: Path) -> None:
    result = result_of(twin.ANALYSIS, [tiny_probe(tmp_path, "llada", twin="qwen2", n_layers=3)], tmp_path)
    assert all(row["head"] is None and row["agreement"] is None and not row["paired"] for row in result.rows)
    assert all(row["value"] is not None and row["twin_value"] is not None for row in result.rows)
    figure = twin.draw(result).figure()
    assert len([text for trace in traces(figure, mode="text") for text in trace.text]) == 3 + 2
    assert "no head can be paired" in twin.takeaway(result)


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_the_figure_shows_every_checkpoint(result: Result, checkpoints: int) -> None:
    rows = [{**row, "checkpoint": f"model {copy}"} for copy in range(checkpoints) for row in result.rows]
    many = replace(result, rows=rows)
    figure = twin.draw(many).figure()
    scattered = [trace for trace in traces(figure, type="scatter") if trace.marker.colorscale]
    assert [len(trace.x) for trace in scattered] == [8] * 2 * checkpoints
    listed = [trace.name for trace in traces(figure, showlegend=True)]
    assert sorted(listed) == sorted(set(listed)) and {"masked model", "its twin", "route", "evidence"} <= set(listed)


def test_the_takeaway_counts_agreement_beyond_that_of_shuffled_heads(result: Result) -> None:
    def told(**agreement: float) -> str:
        rows = [
            {**row, "agreement": value, "agreement_low": value - 0.1, "agreement_high": value + 0.1, **null}
            if row["what"] in agreement and row["layer"] is None
            else row
            for row in result.rows
            for value in [agreement.get(row["what"], 0.0)]
        ]
        return twin.takeaway(replace(result, rows=rows))

    null = {"agreement_null": 0.0, "agreement_null_low": -0.2, "agreement_null_high": 0.2}
    assert told(route=0.9, evidence=0.8).startswith("Yes: they agree surely more than shuffled heads in all 8 cases")
    assert told(route=0.9, evidence=0.0).startswith("Only in part: ")
    assert told(route=-0.9, evidence=0.0).startswith(
        "No: they agree surely more than shuffled heads in none of 8 cases"
    )
    assert "correlate in route by 0.90 and in evidence by 0.80" in told(route=0.9, evidence=0.8)


def test_without_a_twin_there_is_nothing_to_compare(probe: Probe) -> None:
    with pytest.raises(UserError, match="twin: tiny-dream has none"):
        twin.ANALYSIS.measure(replace(probe, twin=None))
