"""What a model answers: where answers end, what the null is, that every question is asked, and means over facts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from probe_helpers import tiny_probe

from mdm_interp.data.prompts import render
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.inference.prediction import Filled, orders, predict
from mdm_interp.measures.answers import Question, answer_all, matches, mean_over_facts, other_answers, questions
from mdm_interp.stats.resampling import FactSample


def test_a_causal_answer_ends_where_its_sentence_goes_on(tmp_path: Path) -> None:
    probe = tiny_probe(tmp_path, "dream", twin="qwen2", facts=4)
    assert probe.twin is not None
    tokenizer = probe.twin.model.tokenizer
    for asked in questions(probe.twin.model, probe.twin.prompts):
        assert tokenizer.eos_token_id in asked.ends and len(asked.ends) == 2
        (after,) = asked.ends - {tokenizer.eos_token_id}
        text = tokenizer.decode([*asked.query.tokens, after])
        table = probe.twin.prompts[asked.kind].table
        values = dict(table.rows[asked.pair.fact])
        if asked.direction == "reverse" and asked.kind == "positional":
            values |= {"child": values["parent"], "parent": values["child"]}
        stated = [sentence for t in table.templates.templates for sentence in (t.forward, t.reverse)]
        assert any(render(sentence, values)[0].startswith(text) for sentence in stated)
    assert all(not asked.ends for asked in questions(probe.model, probe.prompts))


def question(answer: tuple[int, ...], source: tuple[int, ...], fact: int) -> Question:
    query = Query((*source, *[9] * len(answer)), answer, (len(source), len(source) + len(answer)), (0, len(source)))
    return Question(query, QueryPair(query, query, fact, "right"), "positional", "forward", "right")


def test_the_null_shares_no_name_even_through_other_facts() -> None:
    names = [((1, 2), (5,)), ((3, 4), (5,)), ((1, 2), (6,)), ((7,), (8,)), ((9,), (7,))]
    asked = [question(answer, source, fact) for fact, (answer, source) in enumerate(names)]
    alike, every = (other_answers(asked, same_length=same) for same in (True, False))
    assert alike == [[], [], [], [], []]
    assert every[:3] == [[(7,), (9,)]] * 3
    assert every[3] == every[4] == [(1, 2), (3, 4), (1, 2)]  # 7 is the answer of one and the source of the other
    assert other_answers([*asked, question((10,), (11,), 5)], same_length=True)[3] == [(10,)]
    filled = [Filled((1, 2), (0.0, 0.0))] * 5
    found = matches(filled, [q.query for q in asked], every)
    assert found.effect.tolist() == [1, 1, 1, 0, 0]  # the first two are the same words, and have two right answers
    assert found.null.tolist() == pytest.approx([0, 0, 0, 2 / 3, 2 / 3])


def test_ranks_are_averaged_as_logarithms_over_clusters() -> None:
    names = [((1,), (5,)), ((2,), (5,)), ((3,), (6,)), ((4,), (7,)), ((9,), (8,))]  # the first two share a source
    sample = FactSample.of([question(answer, source, fact).pair for fact, (answer, source) in enumerate(names)])
    ranks = np.array([1.0, 2.0, 4.0, 1e5, np.nan])
    estimate = mean_over_facts(sample, ranks, "rank")
    assert estimate.value == pytest.approx((1 * 2 * 4 * 1e5) ** (1 / 4)) and estimate.n == 3
    assert 0 < estimate.low < estimate.value < estimate.high
    assert estimate.high / estimate.value == pytest.approx(estimate.value / estimate.low)
    exact = mean_over_facts(sample, np.array([1.0, 1.0, 0.0, np.nan, np.nan]), "exact match")
    assert exact.value == pytest.approx(2 / 3) and exact.n == 2
    assert mean_over_facts(sample, np.full(5, np.nan), "rank").n == 0


@pytest.mark.slow
def test_the_same_question_is_answered_alike_wherever_it_is_asked(tmp_path: Path) -> None:
    probe = tiny_probe(tmp_path, "dream", facts=4)
    asked = questions(probe.model, probe.prompts)
    again = [*asked[:3], *(replace(one, kind="relational") for one in reversed(asked))]
    once, twice = answer_all(probe.model, asked), answer_all(probe.model, again)
    assert {order for order, _, _ in once} == {*orders(probe.model.cfg), "bound"} and len(once) == 3 * 4 + 1
    for (order, _, measure), values in once.items():
        assert len(values.effect) == len(values.null) == len(asked)
        if measure == "log-likelihood":
            if order != "bound":
                read = predict(probe.model, [one.query for one in asked], order).log_probability
                np.testing.assert_allclose(values.effect, read, rtol=1e-4)
            found = twice[order, "known", measure].effect
            np.testing.assert_allclose(found, [*values.effect[:3], *values.effect[::-1]], rtol=1e-4)
            assert len(set(values.null.round(4)) - set(values.effect.round(4))) > len(asked) / 4
