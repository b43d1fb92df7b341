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
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe
from mdm_interp.inference.likelihood import bound
from mdm_interp.inference.prediction import Filled, Filling, infill, infill_any_length, orders, predict
from mdm_interp.measures.answers import Question, questions
from mdm_interp.models.bridge import hooked
from mdm_interp.stats.tables import estimate_in

CASE = ("relational", "reverse", "left")
COLUMNS = ("value", "value_low", "value_high", "value_n")


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
    # kinds, directions, sides; orders, measures (exact match twice); the bound's likelihood
    assert len(dream) == 2 * 2 * 2 * (3 * 4 + 1)
    assert len(qwen2) == 2 * 2 * 4
    assert {row["order"] for row in qwen2} == {"left_to_right"}
    assert {(row["direction"], row["asked"]) for row in qwen2} == {("forward", "right"), ("reverse", "left")}
    for row in result.rows:
        assert row["value_low"] <= row["value"] <= row["value_high"] and row["value_n"] <= 4 == row["clusters"]
        assert {(r["order"], r["length"], r["measure"]) for r in dream} >= {
            (row["order"], row["length"], row["measure"])
        }


def by_facts(values: Any, asked: list[Question]) -> float:
    facts: dict[int, list[float]] = {}
    for question, value in zip(asked, values, strict=True):
        facts.setdefault(question.pair.fact, []).append(float(value))
    return float(np.mean([np.mean(of_fact) for of_fact in facts.values()]))


def test_the_bound_is_of_the_answer_given_the_rest(probe: Probe, result: Result) -> None:
    asked = [q for q in questions(probe.model, probe.prompts) if (q.kind, q.direction, q.asked) == CASE]
    found = bound(probe.model, [q.query.statement for q in asked], [q.query.answer_span for q in asked], n_draws=256)
    (row,) = rows_of(result, **dict(zip(("kind", "direction", "asked"), CASE, strict=True)), order="bound")
    assert (row["checkpoint"], row["measure"]) == ("tiny-dream", "log-likelihood")
    assert row["value"] == pytest.approx(by_facts(found.value, asked), rel=0.05)
    assert row["value_null"] < 0


@pytest.mark.parametrize("name", ["dream", "qwen2"])
def test_rows_are_what_the_model_answers(probe: Probe, result: Result, name: str) -> None:
    member = probe if name == "dream" else probe.twin
    assert member is not None
    everything = questions(member.model, member.prompts)
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
            assert row["facts"] == row["clusters"] == row["value_n"] == 4
            for length, answers in (("known", filled), ("unknown", guessed)):
                right = [answer.tokens == query.answer for answer, query in zip(answers, queries, strict=True)]
                (row,) = rows_of(result, **at, measure="exact match", length=length)
                assert row["value"] == pytest.approx(by_facts(right, asked)) and row["queries"] == len(queries)


def test_a_model_that_knows_is_found_to_know(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers given by hand: all right, and none another fact's."""

    def knows(model: Any, fillings: list[Filling]) -> list[Filled]:
        answers = [filling.query.answer for filling in fillings]
        return [Filled(answer, (0.0,) * len(answer), (1,) * len(answer)) for answer in answers]

    monkeypatch.setattr("mdm_interp.measures.answers.fill", knows)
    monkeypatch.setattr("mdm_interp.measures.answers.attempts", lambda query, longest, cfg: [query])
    rows = [row for row in analysis.measure(probe) if row["measure"] == "exact match"]
    assert {row["value"] for row in rows} == {1.0}
    assert {row["value_null"] for row in rows if row["value_null_n"]} == {0.0}


def test_nothing_is_learnt_in_random_weights(result: Result) -> None:
    """The true answer is no likelier than another fact's: the intervals of both overlap everywhere but by accident."""
    rows = [row for row in rows_of(result, measure="log-likelihood") if row["value_null_n"]]
    estimates = [(estimate_in(row, "value"), estimate_in(row, "value_null")) for row in rows]
    overlapping = [own.low <= null.high and null.low <= own.high for own, null in estimates]
    assert np.mean(overlapping) > 0.5
    assert max(row["value"] for row in rows_of(result, measure="exact match")) == 0


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
    assert len(result.summary) == len(result.rows)
    of = {"checkpoint": "tiny-dream", "kind": "relational", "direction": "reverse", "asked": "left"}
    of |= {"order": "confidence", "length": "unknown", "measure": "exact match"}
    (row,) = rows_of(result, **of)
    assert vars(result.summary.at("value", **of)) == {
        key: row[column] for key, column in zip(("value", "low", "high", "n"), COLUMNS, strict=True)
    }
    assert result.summary.null("value", **of) == estimate_in(row, "value_null")


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
        *(f"{kind} reverse<br>n = 4 clusters of facts" for kind in KINDS),
        *(f"tiny-dream {i}, {kind}" for i in range(count) for kind in KINDS),
    ]
    assert list(figure.layout.yaxis.ticktext) == [f"tiny-dream {i}" for i in range(count)]
    assert sum(trace.showlegend is not False for trace in figure.data) == 4 + 5
    assert str(torch.nan) not in figure.layout.title.subtitle.text


@pytest.mark.parametrize(
    ("forward", "reverse", "said"),
    [
        (
            0.9,
            0.2,
            "Forward yes, in reverse seldom: forward, at least 90% of the names are exactly right, in reverse at ",
        ),
        (0.9, 0.7, "Forward yes, in reverse it depends: "),
        (0.2, 0.2, "Forward not always, in reverse seldom: "),
    ],
)
@pytest.mark.parametrize("null", [0.0, 0.2])
def test_the_takeaway_says_what_is_answered(
    result: Result, forward: float, reverse: float, said: str, null: float
) -> None:
    rows = [
        {**row, "value": value, "value_low": value, "value_high": value, "value_null": null, "value_null_high": null}
        for row in rows_of(result, checkpoint="tiny-dream")
        for value in [forward if row["direction"] == "forward" else reverse]
    ]
    found = analysis.takeaway(replace(result, rows=rows))
    assert found.startswith(said) and f"at most {reverse:.0%}" in found
    assert f"in {'all' if reverse > null else 'none of'} 4 cases" in found


def test_one_fact_alone_has_no_null(tmp_path: Path) -> None:
    alone = result_of(analysis.ANALYSIS, [tiny_probe(tmp_path, "qwen2", facts=1)], tmp_path)
    assert {row["value_null_n"] for row in alone.rows} == {0}
    assert {row["value_null"] for row in alone.rows} == {None}
    analysis.draw(alone).figure()
