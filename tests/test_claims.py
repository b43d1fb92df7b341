"""The ledger: rules, verdicts, and for each claim a planted model in which it is false and must come out so."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats as scipy_stats

from analyses import signatures
from mdm_interp.analysis import discover, ledger
from mdm_interp.claims import CLAIMS, ClaimTest, counts, judge, p_value, save_ledger
from mdm_interp.config import FactConfig, ModelConfig
from mdm_interp.facts import FactWorld
from mdm_interp.files import UserError
from mdm_interp.model import HookedTransformer
from mdm_interp.prediction import predict
from mdm_interp.presets import SCOPE
from mdm_interp.queries import Query, QueryPair
from mdm_interp.results import Result

FACTS = FactConfig(n_entities=30, n_filler=4, seq_len=6)
SEEDS = range(5)
PLACE = {"world": "planted", "scheme": "rope", "objective": "any_order", "n_layers": 1, "mlp": False, "stage": "end"}
ABOVE = ClaimTest(claim="5", measure="m", null_is="none", effect="effect", null="null", side="above", margin=0.3)
BELOW = replace(ABOVE, side="below", margin=0.05)


def result_of(rows: Sequence[dict[str, Any]], name: str = "planted") -> Result:
    return Result(name, "Planted?", {}, list(SEEDS), {}, [{**PLACE, **row} for row in rows], {})


def rows_of(effects: Sequence[float], null: float = 0.0, **where: Any) -> list[dict[str, Any]]:
    return [{"seed": seed, "effect": effect, "null": null, **where} for seed, effect in enumerate(effects)]


def verdicts_of(test: ClaimTest, rows: Sequence[dict[str, Any]]) -> list[str]:
    return [verdict.verdict for verdict in judge([(result_of(rows), [test])], (*SCOPE, "stage"))]


@pytest.mark.parametrize(
    ("test", "effects", "expected"),
    [
        (ABOVE, [0.8, 0.9, 0.85, 0.8], "holds"),
        (ABOVE, [0.1, 0.12, 0.09, 0.1], "fails"),
        (ABOVE, [0.1, 0.6, 0.2, 0.4], "inconclusive"),
        (ABOVE, [0.9], "inconclusive"),
        (ABOVE, [1.0, 1.0, 1.0], "holds"),
        (BELOW, [0.0, 0.0, 0.0], "holds"),
        (BELOW, [0.5, 0.6, 0.55], "fails"),
        (BELOW, [0.01, 0.3, 0.02], "inconclusive"),
    ],
)
def test_a_verdict_follows_from_effect_null_and_margin(test: ClaimTest, effects: list[float], expected: str) -> None:
    assert verdicts_of(test, rows_of(effects)) == [expected]


def test_a_high_null_takes_the_claim_away() -> None:
    assert verdicts_of(ABOVE, rows_of([0.8, 0.9, 0.85, 0.8], null=0.75)) == ["fails"]


def test_the_p_value_is_scipys() -> None:
    drawn = np.random.default_rng(0).normal(0.3, 1.0, 8)
    t = drawn.mean() / (drawn.std(ddof=1) / 8**0.5)
    assert p_value(drawn) == pytest.approx(2 * scipy_stats.t.sf(abs(t), 7))
    assert (p_value(drawn[:1]), p_value(np.zeros(4)), p_value(np.ones(4))) == (1.0, 1.0, 0.0)


def test_many_verdicts_are_adjusted_together() -> None:
    """Of 40 scopes without an effect, some look significant one by one."""
    generator = np.random.default_rng(1)
    rows = [
        row for i in range(40) for row in rows_of((0.3 + generator.normal(0, 0.1, 5)).tolist(), scheme=f"scheme {i}")
    ]
    found = judge([(result_of(rows), [ABOVE])], (*SCOPE, "stage"))
    single = [p_value(ABOVE.excess(group)) for _, group in pd.DataFrame(rows).groupby("scheme", sort=False)]
    assert min(single) < 0.05
    assert {verdict.verdict for verdict in found} == {"inconclusive"}
    assert [verdict.p for verdict in found] == pytest.approx(scipy_stats.false_discovery_control(single))


def test_scopes_are_judged_apart_and_seeds_counted_once() -> None:
    early = rows_of([0.8, 0.9, 0.85], stage="early")
    late = rows_of([0.0, 0.1, 0.05], stage="end")
    undefined = rows_of([float("nan")] * 3, stage="initial")
    found = judge([(result_of([*early, *early, *late, *undefined]), [ABOVE])], (*SCOPE, "stage"))
    assert [(verdict.scope["stage"], verdict.verdict) for verdict in found] == [("early", "holds"), ("end", "fails")]
    assert [verdict.effect.n for verdict in found] == [3, 3]
    assert found[0].effect.value == pytest.approx(0.85)
    table = counts(found)
    assert table.loc["5"].to_dict() == {"holds": 1, "fails": 1, "inconclusive": 0}


def test_a_ledger_is_written_as_plain_json(tmp_path: Path) -> None:
    found = judge([(result_of(rows_of([0.8, 0.9, 0.85])), [ABOVE])], (*SCOPE, "stage"))
    save_ledger(found, tmp_path / "claims.json")
    (line,) = json.loads((tmp_path / "claims.json").read_text())
    assert line["claim"] == {"id": "5", "sentence": CLAIMS["5"]}
    assert line["scope"] == PLACE
    assert set(line["effect"]) == {"value", "low", "high", "n"}
    assert (line["verdict"], line["figure"]) == ("holds", "planted")
    assert "exceeds the null by 0.3" in line["rule"]


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (replace(ABOVE, claim="9"), "claim: '9' in analysis 'planted' is not one of 1, 2"),
        (replace(ABOVE, null="nothing"), "lacks column 'nothing', which claim 5 reads; add it"),
    ],
)
def test_a_test_that_cannot_be_judged_is_named(test: ClaimTest, message: str) -> None:
    with pytest.raises(UserError, match=message):
        verdicts_of(test, rows_of([0.5, 0.6]))


def test_every_claim_is_tested_and_its_sentence_is_one() -> None:
    tested = {test.claim for analysis in discover() for test in analysis.claims}
    assert tested == set(CLAIMS)


# ---- each claim's measure on models in which the claim is false, and in which it is true


def model_of(seed: int, position: Any = "rope", attention: Any = "bidirectional") -> HookedTransformer:
    config = ModelConfig(
        d_model=32,
        n_heads=2,
        d_vocab=FACTS.d_vocab,
        n_ctx=FACTS.seq_len,
        position=position,
        attention=attention,
        mask_token_id=FACTS.mask_token_id,
    )
    return HookedTransformer(config, generator=torch.Generator().manual_seed(seed))


def measured(plant: Callable[[int], HookedTransformer]) -> list[dict[str, Any]]:
    """The signatures of a planted model under every seed."""
    rows = []
    for seed in SEEDS:
        world, model = FactWorld(FACTS, seed), plant(seed)
        pairs = world.query_pairs(n_contexts=1)
        asked = predict(model, [pair.reverse for pair in pairs]).probability.mean().item()
        about = {"seed": seed, "reverse_probability": asked, "chance": world.chance, "objective": "source_only"}
        rows.append({**about, **signatures.signatures(model, pairs, world)})
    return rows


def judged(claim: str, rows: Sequence[dict[str, Any]], column: str | None = None) -> list[str]:
    (test,) = [test for test in signatures.CLAIMS if test.claim == claim and column in (None, test.effect)]
    return verdicts_of(test, rows)


def places_in_values(seed: int) -> HookedTransformer:
    """What is stored depends on where it stands more than on what stands there."""
    model = model_of(seed, position="learned")
    with torch.no_grad():
        model.pos_embed.W_pos *= 20
    return model


def odd_only(seed: int) -> HookedTransformer:
    """Every plane of the key is a quarter turn from the mask's query, so scores tell sides apart and nothing else."""
    model = model_of(seed)
    mask = model.W_E[FACTS.mask_token_id].detach()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        attention = model.blocks[0].attn
        half = attention.W_Q.shape[-1] // 2
        unit = mask / mask.norm()
        attention.W_Q.zero_()
        attention.W_Q[:, :, :half] = unit[:, None]  # real
        attention.W_K[:, :, :half] = 0
        attention.W_K[:, :, half:] = torch.randn(attention.W_K[:, :, half:].shape, generator=generator)  # imaginary
    return model


def untouched(position: Any) -> Callable[[int], HookedTransformer]:
    return lambda seed: model_of(seed, position)


@pytest.mark.parametrize(
    ("claim", "false", "true"),
    [
        ("2", places_in_values, untouched("rope")),
        ("3", places_in_values, untouched("t5_bias")),
        ("5", odd_only, untouched("alibi")),
    ],
)
def test_a_false_claim_fails_and_a_true_one_holds(
    claim: str, false: Callable[[int], HookedTransformer], true: Callable[[int], HookedTransformer]
) -> None:
    assert judged(claim, measured(false)) == ["fails"]
    assert judged(claim, measured(true)) == ["holds"]


def test_claims_1_and_4_fail_in_models_that_stored_nothing() -> None:
    rows = measured(untouched("alibi"))
    assert judged("1", rows) == ["fails"]
    assert judged("4", rows) == ["fails"]
    told = [{**row, "reverse_probability": 0.9, "evidence": row["evidence_null"] + 2} for row in rows]
    assert judged("1", told) == ["holds"]
    assert judged("4", told) == ["holds"]


def contradicted(pairs: Sequence[QueryPair]) -> list[QueryPair]:
    """Reverse queries that ask the very same question for another answer: learning one unlearns the other."""
    others = [*pairs[2:], *pairs[:2]]
    return [
        QueryPair(
            pair.forward,
            Query(pair.forward.tokens, other.forward.answer, pair.forward.answer_span, pair.forward.source_span),
            pair.fact,
            pair.side,
        )
        for pair, other in zip(pairs, others, strict=True)
    ]


@pytest.mark.parametrize(("plant", "expected"), [(contradicted, "fails"), (list, "holds")])
def test_claim_6_fails_where_forward_and_reverse_contradict(
    plant: Callable[..., list[QueryPair]], expected: str
) -> None:
    rows = []
    for seed in SEEDS:
        model, pairs = model_of(seed, "none"), plant(FactWorld(FACTS, seed).query_pairs(n_contexts=1))
        rows.append({"seed": seed, **signatures.alignment(model, pairs), **signatures.descent(model, pairs)})
    assert judged("6", rows, "alignment") == [expected]
    assert judged("6", rows, "descent") == [expected]


def test_the_ledger_reads_the_results_of_the_analyses_that_test_claims(tiny_result: Callable[[str], Result]) -> None:
    judging = [analysis for analysis in discover() if analysis.claims]
    found = ledger(judging, {analysis.name: tiny_result(analysis.name) for analysis in judging})
    assert [verdict.claim["id"] for verdict in found] == sorted(verdict.claim["id"] for verdict in found)
    assert {verdict.figure for verdict in found} == {analysis.name for analysis in judging}
    assert {verdict.scope["stage"] for verdict in found} >= {"initial", "end"}
    assert all(
        verdict.scope["objective"] in ("source_only", "target_only") for verdict in found if verdict.claim["id"] == "1"
    )
    undefined = {"2", "3", "5"}
    assert not any(verdict.claim["id"] in undefined for verdict in found if verdict.scope["objective"] == "causal")
