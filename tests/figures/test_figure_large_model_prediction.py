"""Prediction on checkpoints: rows are what the model answers, the null is other facts' answers, and either can win."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_helpers import llama_bridge
from probe_helpers import result_of, tiny_probe

from analyses import large_model_prediction as analysis
from mdm_interp.data.prompts import render
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe
from mdm_interp.inference.prediction import Filled, Order, infill, infill_any_length, orders, predict
from mdm_interp.models.bridge import hooked
from mdm_interp.stats.resampling import FactSample


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return tiny_probe(tmp_path_factory.mktemp("prediction"), "dream", twin="qwen2", facts=4)


@pytest.fixture(scope="module")
def result(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return result_of(analysis.ANALYSIS, [probe], tmp_path_factory.mktemp("result"))


def rows_of(result: Result, **equal: Any) -> list[dict[str, Any]]:
    return [row for row in result.rows if all(row[name] == value for name, value in equal.items())]


def test_rows_are_every_order_of_either_model(probe: Probe, result: Result) -> None:
    assert len({tuple(row) for row in result.rows}) == 1 and next(iter(result.rows[0])) == "checkpoint"
    dream, qwen2 = (rows_of(result, checkpoint=f"tiny-{name}") for name in ("dream", "qwen2"))
    assert len(dream) == 2 * 2 * 2 * 3 * 4  # kinds, directions, sides, orders, measures (exact match twice)
    assert len(qwen2) == 2 * 2 * 4
    assert {row["order"] for row in qwen2} == {"left_to_right"}
    assert {(row["direction"], row["asked"]) for row in qwen2} == {("forward", "right"), ("reverse", "left")}
    for row in result.rows:
        assert row["low"] <= row["value"] <= row["high"] and row["n"] <= 4 == row["clusters"]
        assert {(r["order"], r["length"], r["measure"]) for r in dream} >= {
            (row["order"], row["length"], row["measure"])
        }


def by_facts(values: Any, asked: list[analysis.Question]) -> float:
    facts: dict[int, list[float]] = {}
    for question, value in zip(asked, values, strict=True):
        facts.setdefault(question.pair.fact, []).append(float(value))
    return float(np.mean([np.mean(of_fact) for of_fact in facts.values()]))


@pytest.mark.parametrize("name", ["dream", "qwen2"])
def test_rows_are_what_the_model_answers(probe: Probe, result: Result, name: str) -> None:
    member = probe if name == "dream" else probe.twin
    assert member is not None
    everything = analysis.questions(member)
    longest = max(len(question.query.answer) for question in everything)
    for kind, direction, side in (("positional", "reverse", "left"), ("relational", "forward", "right")):
        asked = [q for q in everything if (q.kind, q.direction, q.asked) == (kind, direction, side)]
        queries = [question.query for question in asked]
        for order in orders(member.model.cfg)[-2:]:
            at = {"checkpoint": f"tiny-{name}", "kind": kind, "direction": direction, "asked": side, "order": order}
            read, filled = predict(member.model, queries, order), infill(member.model, queries, order)
            guessed = infill_any_length(
                member.model, queries, order, longest=longest, ends=[question.ends for question in asked]
            )
            (row,) = rows_of(result, **at, measure="log-likelihood")
            assert row["value"] == pytest.approx(by_facts(read.log_probability, asked), rel=1e-4)
            (row,) = rows_of(result, **at, measure="rank")
            assert row["value"] == pytest.approx(math.exp(by_facts(read.rank.double().log(), asked)), rel=1e-4)
            assert row["facts"] == row["clusters"] == row["n"] == 4
            for length, answers in (("known", filled), ("unknown", guessed)):
                right = [answer.tokens == query.answer for answer, query in zip(answers, queries, strict=True)]
                (row,) = rows_of(result, **at, measure="exact match", length=length)
                assert row["value"] == pytest.approx(by_facts(right, asked)) and row["queries"] == len(queries)


def test_a_causal_answer_ends_where_its_sentence_goes_on(probe: Probe) -> None:
    assert probe.twin is not None
    tokenizer = probe.twin.model.tokenizer
    for question in analysis.questions(probe.twin):
        assert tokenizer.eos_token_id in question.ends and len(question.ends) == 2
        (after,) = question.ends - {tokenizer.eos_token_id}
        text = tokenizer.decode([*question.query.tokens, after])
        table = probe.twin.prompts[question.kind].table
        values = dict(table.rows[question.pair.fact])
        if question.direction == "reverse" and question.kind == "positional":
            values |= {"child": values["parent"], "parent": values["child"]}
        stated = [sentence for t in table.templates.templates for sentence in (t.forward, t.reverse)]
        assert any(render(sentence, values)[0].startswith(text) for sentence in stated)
    assert all(not question.ends for question in analysis.questions(probe))


def question(answer: tuple[int, ...], source: tuple[int, ...], fact: int) -> analysis.Question:
    query = Query((*source, *[9] * len(answer)), answer, (len(source), len(source) + len(answer)), (0, len(source)))
    return analysis.Question(query, QueryPair(query, query, fact, "right"), "positional", "forward", "right")


def test_the_null_shares_no_name_even_through_other_facts() -> None:
    names = [((1, 2), (5,)), ((3, 4), (5,)), ((1, 2), (6,)), ((7,), (8,)), ((9,), (7,))]
    asked = [question(answer, source, fact) for fact, (answer, source) in enumerate(names)]
    alike, every = (analysis.other_answers(asked, same_length=same) for same in (True, False))
    assert alike == [[], [], [], [], []]
    assert every[:3] == [[(7,), (9,)]] * 3
    assert every[3] == every[4] == [(1, 2), (3, 4), (1, 2)]  # 7 is the answer of one and the source of the other
    assert analysis.other_answers([*asked, question((10,), (11,), 5)], same_length=True)[3] == [(10,)]
    filled = [Filled((1, 2), (0.0, 0.0))] * 5
    own, null = analysis.matches(filled, [q.query for q in asked], every)
    assert own.tolist() == [1, 1, 1, 0, 0]  # the first two are the same words, and have two right answers
    assert null.tolist() == pytest.approx([0, 0, 0, 2 / 3, 2 / 3])


def test_a_model_that_knows_is_found_to_know(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers given by hand: all right, and none another fact's."""

    def knows(model: Any, queries: list[Query], order: Order, **given: Any) -> list[Filled]:
        return [Filled(query.answer, (0.0,) * len(query.answer)) for query in queries]

    monkeypatch.setattr(analysis, "infill", knows)
    monkeypatch.setattr(analysis, "infill_any_length", knows)
    rows = [row for row in analysis.measure(probe) if row["measure"] == "exact match"]
    assert {row["value"] for row in rows} == {1.0}
    assert {row["null_value"] for row in rows if row["null_n"]} == {0.0}


def test_nothing_is_learnt_in_random_weights(result: Result) -> None:
    """The true answer is no likelier than another fact's: the intervals of both overlap everywhere but by accident."""
    rows = [row for row in rows_of(result, measure="log-likelihood") if row["null_n"]]
    overlapping = [row["low"] <= row["null_high"] and row["null_low"] <= row["high"] for row in rows]
    assert np.mean(overlapping) > 0.5
    assert max(row["value"] for row in rows_of(result, measure="exact match")) == 0


def test_ranks_are_averaged_as_logarithms_over_clusters() -> None:
    names = [((1,), (5,)), ((2,), (5,)), ((3,), (6,)), ((4,), (7,)), ((9,), (8,))]  # the first two share a source
    sample = FactSample.of([question(answer, source, fact).pair for fact, (answer, source) in enumerate(names)])
    ranks = np.array([1.0, 2.0, 4.0, 1e5, np.nan])
    estimate = analysis.estimate_over_facts(sample, ranks, "rank")
    assert estimate.value == pytest.approx((1 * 2 * 4 * 1e5) ** (1 / 4)) and estimate.n == 3
    assert 0 < estimate.low < estimate.value < estimate.high
    assert estimate.high / estimate.value == pytest.approx(estimate.value / estimate.low)
    exact = analysis.estimate_over_facts(sample, np.array([1.0, 1.0, 0.0, np.nan, np.nan]), "exact match")
    assert exact.value == pytest.approx(2 / 3) and exact.n == 2
    assert analysis.estimate_over_facts(sample, np.full(5, np.nan), "rank").n == 0


def test_a_bridge_is_asked_like_a_model(probe: Probe, tmp_path: Path) -> None:
    from helpers import random_model

    assert probe.twin is not None
    cfg = probe.twin.model.cfg
    changes = {"attention": "causal", "gated_mlp": True, "act_fn": "silu", "d_mlp": 24, "d_vocab": cfg.d_vocab}
    model = random_model(**changes, n_ctx=cfg.n_ctx)
    bridge = hooked(llama_bridge(model, tmp_path))
    bridge.bridge.tokenizer = model.tokenizer = probe.twin.model.tokenizer
    ours, theirs = (analysis.measure(replace(probe.twin, model=of)) for of in (model, bridge))
    for mine, other in zip(ours, theirs, strict=True):
        assert other["value"] == pytest.approx(mine["value"], rel=1e-3) and other["model"] == "ARM"


def test_the_summary_is_of_the_rows(result: Result) -> None:
    assert len(result.summary) == 2 * len(result.rows)
    name = "tiny-dream / relational / reverse, asks for the left entity / confidence, length unknown / exact match"
    (row,) = rows_of(
        result,
        checkpoint="tiny-dream",
        kind="relational",
        direction="reverse",
        asked="left",
        order="confidence",
        length="unknown",
    )
    assert vars(result.summary[name]) == {key: row[key] for key in ("value", "low", "high", "n")}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_figure_shows_every_checkpoint(result: Result, count: int) -> None:
    rows = [
        {**row, "checkpoint": f"{row['checkpoint']} {i}"}
        for i in range(count)
        for row in rows_of(result, checkpoint="tiny-dream")
    ]
    several = replace(result, rows=rows)
    figure: Any = analysis.ANALYSIS.figure(several)
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert [title for title in titles if title] == [
        f"tiny-dream {i}, {kind} reverse" for i in range(count) for kind in KINDS
    ]
    assert sum(trace.showlegend is not False for trace in figure.data) == 5
    assert str(torch.nan) not in figure.layout.title.subtitle.text


def test_one_fact_alone_has_no_null(tmp_path: Path) -> None:
    alone = result_of(analysis.ANALYSIS, [tiny_probe(tmp_path, "qwen2", facts=1)], tmp_path)
    assert {row["null_n"] for row in alone.rows} == {0} and {row["null_value"] for row in alone.rows} == {None}
    analysis.draw(alone)
