"""Head specialisation's rows are what the measures say, its summary follows from them, and each answer can come out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import random_model

from analyses import head_specialisation
from mdm_interp.config import FactConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.grids import MANY_HEADS
from mdm_interp.experiments.results import Result, tidy
from mdm_interp.experiments.scope import STAGES, scope_label
from mdm_interp.inference.prediction import predict
from mdm_interp.interventions.effects import project_even_routes
from mdm_interp.measures.heads import Specialisation, compute_contributions, specialisation

WORLD = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)
PAIRS = WORLD.query_pairs(n_contexts=1)


def model(**changes: Any) -> Any:
    facts = WORLD.config
    fields = {"n_layers": 1, "d_vocab": facts.d_vocab, "n_ctx": facts.seq_len, "mask_token_id": facts.mask_token_id}
    return random_model(**{**fields, **changes})


def test_every_run_has_a_row_per_stage_and_one_per_head_unless_it_is_an_arm(
    tiny_result: Callable[[str], Result],
) -> None:
    result = tiny_result("head_specialisation")
    assert result.settings == {"n_contexts": 1, "n_exchanges": 200, "gap": 0.1}
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in result.rows:
        runs.setdefault(row["run"], []).append(row)
    assert {row["n_heads"] for row in result.rows} == {1, 2, 4, 8}
    for rows in runs.values():
        models, stages = [row for row in rows if row["kind"] == "model"], {row["stage"] for row in rows}
        assert {"initial", "end"} <= stages <= set(STAGES)
        arm, n_heads = models[0]["objective"] == "causal", models[0]["n_heads"]
        assert len(rows) == len(models) * (1 if arm else 1 + n_heads)
        for row in models:
            assert 0 < row["reverse_probability"] < row["reverse_role"] <= 1
            assert (row["index"] is None) == arm and row["head"] is None
            assert (row["shared_after"] is None) == (arm or n_heads == 1)
            assert (row["even_after"] is None) == (arm or row["scheme"] == "learned")
            if not arm:
                of_stage = [head for head in rows if head["kind"] == "head" and head["stage"] == row["stage"]]
                n_twice = sum(model["stage"] == row["stage"] for model in models)  # a run may be listed twice
                found = sum(head["specific"] for head in of_stage) / n_twice
                assert row["specific_heads"] == pytest.approx(found, rel=1e-4)


def test_answers_are_split_into_role_and_answer_given_the_role() -> None:
    """By hand from whole predictions: a role is all its entities' probabilities."""
    net = model(position="rope")
    row, logs = head_specialisation.answers(net, WORLD, PAIRS), {}
    for kind in ("forward", "reverse"):
        queries = [getattr(pair, kind) for pair in PAIRS]
        among = [
            predict(net, [replace(query, answer=(entity,)) for entity in WORLD.role(query.answer[0])]).probability.sum()
            for query in queries
        ]
        role, answer = torch.stack(among), predict(net, queries).probability
        assert row[f"{kind}_probability"] == pytest.approx(answer.mean().item(), rel=1e-5)
        assert row[f"{kind}_role"] == pytest.approx(role.mean().item(), rel=1e-5)
        assert row[f"{kind}_in_role"] == pytest.approx((answer / role).mean().item(), rel=1e-5)
        logs[kind] = role.log().mean().item(), answer.log().mean().item()
    assert row["gap_role"] == pytest.approx(logs["forward"][0] - logs["reverse"][0], abs=1e-5)
    assert row["gap_role"] + row["gap_in_role"] == pytest.approx(logs["forward"][1] - logs["reverse"][1], abs=1e-5)
    assert row["chance"] == 1 / 4


@pytest.mark.parametrize("objective", ["any_order", "causal"])
def test_the_rival_is_what_training_shows_beside_the_source_on_that_side(objective: Any) -> None:
    pairs = WORLD.query_pairs(objective, n_contexts=1)
    facts = {(left, right) for left, _, right in WORLD.facts.tolist()}
    forward = head_specialisation.rivals(WORLD, [pair.forward for pair in pairs])[:, 0].tolist()
    assert forward == [pair.forward.answer[0] for pair in pairs]
    reverse = head_specialisation.rivals(WORLD, [pair.reverse for pair in pairs])[:, 0].tolist()
    for pair, rival in zip(pairs, reverse, strict=True):
        source = pair.reverse.source[0]
        assert rival not in WORLD.role(pair.reverse.answer[0])
        assert ((source, rival) if pair.reverse.offset < 0 else (rival, source)) in facts


def test_heads_and_edits_are_what_the_measures_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two heads that count as side-specific; of a random model none does."""
    monkeypatch.setattr(Specialisation, "side_specific", lambda found: torch.tensor([[False, True, False, True]]))
    net = model(position="rope")
    of_model, of_heads = head_specialisation.compare_heads(net, WORLD, PAIRS)
    candidates = WORLD.candidates([pair.forward for pair in PAIRS])
    contributions = compute_contributions(net, PAIRS, candidates)
    found = specialisation(contributions)
    assert [row["head"] for row in of_heads if row["specific"]] == [1, 3]
    assert of_model["specific_heads"] == 2
    effect = project_even_routes(net, PAIRS, heads=[(0, 1), (0, 3)])
    for kind in ("after", "control"):
        assert of_model[f"even_{kind}"] == pytest.approx(getattr(effect, kind).exp().mean().item(), rel=1e-5)
    left = contributions.asks_left
    for row in of_heads:
        head = int(row["head"])
        assert row["index"] == pytest.approx(found.head[0, head].item())
        assert row["forward_left"] == pytest.approx(contributions.forward[left, 0, head].mean().item())
        assert row["reverse_right"] == pytest.approx(contributions.reverse[~left, 0, head].mean().item())
        assert 0 < row["attention_left"] < 1 and 0 < row["attention_right"] < 1
    assert sum(abs(row["forward_share"]) for row in of_heads) == pytest.approx(1, rel=1e-5)
    rival = compute_contributions(net, PAIRS, head_specialisation.rivals(WORLD, [pair.reverse for pair in PAIRS]))
    assert [row["reverse_rival"] for row in of_heads] == pytest.approx(rival.reverse.mean(0)[0].tolist(), rel=1e-5)
    assert of_model["rival_index"] == pytest.approx(specialisation(rival).model.item(), rel=1e-5)
    assert of_model["index_null"] == pytest.approx(found.model_null.mean().item(), rel=1e-5)


def mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def test_the_summary_follows_from_the_rows(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("head_specialisation")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in result.rows:
        if row["kind"] == "model":
            groups.setdefault(scope_label(row), []).append(row)
    quantities = (*head_specialisation.ANSWERS, *head_specialisation.INDICES, *head_specialisation.EDITS)
    for label, rows in groups.items():
        expected = {name: mean([row[name] for row in rows]) for name in quantities}
        total = [row["gap_role"] + row["gap_in_role"] for row in rows]
        shares = [row["gap_role"] / gap for row, gap in zip(rows, total, strict=True) if gap > 0.1]
        expected["lost_in_role"] = mean(shares)  # type: ignore[arg-type]
        known = [row for row in rows if row["even_after"] is not None]
        expected["even_gain"] = mean([row["even_after"] - row["reverse_probability"] for row in known])
        for name, value in expected.items():
            key = f"{label} / {name}"
            assert result.summary[key].value == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), key
    assert len(result.summary) == len(groups) * (len(quantities) + 2) + 4
    lost = []
    for seed in (0, 1):
        by_heads = {
            n_heads: mean(
                [
                    row["reverse_probability"]
                    for row in result.rows
                    if (row["kind"], row["stage"], row["objective"]) == ("model", "end", "any_order")
                    and (row["scheme"], row["seed"], row["n_heads"]) == ("rope", seed, n_heads)
                    and n_heads * row["d_head"] == row["d_model"]
                ]
            )
            for n_heads in (1, MANY_HEADS)
        }
        lost.append(by_heads[1] - by_heads[MANY_HEADS])
    key = f"rope / reverse_probability lost by {MANY_HEADS} heads"
    assert result.summary[key].value == pytest.approx(mean(lost), rel=1e-4, abs=1e-7)


def planted(result: Result, n_seeds: int = 3, **many: dict[str, float]) -> str:
    """The takeaway if one head answers in reverse, and models of many heads, by scheme, have these columns."""
    rows = []
    for row in result.rows:
        if row["kind"] == "model" and row["seed"] == 0 and row["objective"] == "any_order":
            for seed in range(n_seeds):
                new = {**row, "seed": seed, "reverse_probability": 0.9 - 0.01 * seed, "even_after": 0.9}
                if row["scheme"] in many and row["n_heads"] == MANY_HEADS:
                    new |= {name: value * (1 + 0.01 * seed) for name, value in many[row["scheme"]].items()}
                rows.append(new)
    changed = replace(result, rows=tidy(rows))
    return head_specialisation.takeaway(changed)


LOST = {
    "reverse_probability": 0.05,
    "rival_probability": 0.5,
    "gap_role": 5.0,
    "gap_in_role": 0.5,
    "even_after": 0.6,
}
STORED = {**LOST, "gap_role": 0.5, "gap_in_role": 5.0}
KEPT = {"reverse_probability": 0.87, "even_after": 0.87}


def test_the_takeaway_names_what_is_lost_or_that_nothing_is(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("head_specialisation")
    choice = planted(result, rope=LOST, learned=LOST)
    assert choice.startswith("It is lost, mostly because the side of the source decides which of its two partners")
    assert "0.89 (rope), 0.89 (learned) with 1 head, 0.05 (rope), 0.05 (learned) with 4" in choice
    assert "bring it back to 0.61." in choice
    elsewhere = {**LOST, "rival_probability": 0.01}
    told = planted(result, rope=elsewhere, learned=elsewhere)
    assert told.startswith("It is lost, mostly because an answer of another role is given.")
    storage = planted(result, rope=STORED, learned=STORED)
    assert storage.startswith("It is lost, mostly because heads no longer share what they store.")
    equal = {**LOST, "gap_role": 2.0, "gap_in_role": 2.0}
    assert planted(result, rope=equal, learned=equal).startswith("It is lost, and no single part of the answer")
    assert planted(result, rope=KEPT, learned=KEPT).startswith("Nothing: it is not lost.")
    assert planted(result, n_seeds=1, rope=LOST, learned=LOST).startswith("Too few runs to say")
    both = planted(result, rope=LOST, learned=STORED)
    assert both.startswith("rope: It is lost, mostly because the side") and "; learned: It is lost, mostly be" in both
    in_vain = {**LOST, "even_after": 0.05}
    assert "do not measurably change it: 0.05." in planted(result, rope=in_vain, learned=LOST)


def test_the_figure_draws_what_the_summary_says(tiny_result: Callable[[str], Result]) -> None:
    result = tiny_result("head_specialisation")
    traces: Any = head_specialisation.draw(result).data
    reverse = next(trace for trace in traces if trace.name == "reverse query" and trace.legend == "legend")
    drawn = dict(zip([1, 2, 4, 8], reverse.y, strict=True))
    for n_heads, value in drawn.items():
        (key,) = [
            name
            for name in result.summary
            if f"any_order rope, 1 layer, {n_heads} head" in name
            and f" of {16 // n_heads}, end / reverse_probability" in name
        ]
        assert value == pytest.approx(result.summary[key].value, rel=1e-4)
    settings = [trace for trace in traces if trace.legend == "legend2" and trace.mode == "markers"]
    labels = {scope_label({name: x for name, x in row.items() if name != "stage"}) for row in result.rows}
    assert all(set(trace.customdata) == {label for label in labels if "any_order" in label} for trace in settings)
