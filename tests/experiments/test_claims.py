"""The ledger: rules, verdicts, and for each claim planted models in which it is false and in which it is true."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ledger_helpers import ABOVE, BELOW, PLACE, result_of, rows_of
from scipy import stats as scipy_stats

from mdm_interp.config import FactConfig, ModelConfig
from mdm_interp.data.queries import QueryPair
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.experiments import paper
from mdm_interp.experiments.analysis import discover, ledger
from mdm_interp.experiments.claims import (
    CLAIMS,
    ClaimTest,
    LinkTest,
    Verdict,
    counts,
    judge,
    p_value,
    save_ledger,
)
from mdm_interp.experiments.findings import tables
from mdm_interp.experiments.grids import MDM_SCHEMES
from mdm_interp.experiments.paper import RULES
from mdm_interp.experiments.results import Result
from mdm_interp.interventions.effects import transplant_routes
from mdm_interp.measures import signatures
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.estimates import Contrast

FACTS = FactConfig(n_entities=30, n_filler=4, seq_len=6)
SEEDS = range(20)
"""How many planted models there are of a kind; a simulated ledger draws 5 or 10 of them."""


def verdicts_of(test: Any, rows: Sequence[dict[str, Any]]) -> list[str]:
    return [verdict.verdict for verdict in judge([(result_of(rows), [test])])]


@pytest.mark.parametrize(
    ("test", "effects", "null", "expected"),
    [
        (ABOVE, [0.8, 0.9, 0.85, 0.8], 0.0, "holds"),
        (ABOVE, [0.1, 0.12, 0.09, 0.1], 0.0, "fails"),
        (ABOVE, [0.1, 0.6, 0.2, 0.4], 0.0, "inconclusive"),
        (ABOVE, [0.9], 0.0, "inconclusive"),
        (ABOVE, [1.0, 1.0, 1.0], 0.0, "holds"),
        # Far above a null that is negative is not yet above the margin itself.
        (ABOVE, [-0.28, -0.3, -0.26, -0.28], -0.65, "fails"),
        # What all facts share is no failure of a claim that is true, and no support of one about facts.
        (ABOVE, [0.998, 0.997, 0.999, 0.998], 0.996, "inconclusive"),
        (ABOVE, [0.8, 0.9, 0.85, 0.8], 0.75, "inconclusive"),
        (ABOVE, [0.8, 0.9, 0.85, 0.8], 1.2, "fails"),
        (BELOW, [0.0, 0.0, 0.0], 0.0, "holds"),
        (BELOW, [0.5, 0.6, 0.55], 0.0, "fails"),
        (BELOW, [0.01, 0.3, 0.02], 0.0, "inconclusive"),
    ],
)
def test_a_verdict_follows_from_effect_null_and_margin(
    test: ClaimTest, effects: list[float], null: float, expected: str
) -> None:
    assert verdicts_of(test, rows_of(effects, null)) == [expected]


def test_the_p_value_is_scipys() -> None:
    drawn = np.random.default_rng(0).normal(0.3, 1.0, 8)
    t = drawn.mean() / (drawn.std(ddof=1) / 8**0.5)
    assert p_value(drawn) == pytest.approx(2 * scipy_stats.t.sf(abs(t), 7))
    assert (p_value(np.zeros(4)), p_value(np.ones(4))) == (1.0, 0.0)


def test_p_is_that_of_the_bar_cleared_least_surely_or_twice_that_of_the_one_missed() -> None:
    effect, null = np.array([0.9, 1.0, 0.8, 0.95]), np.array([0.1, 0.4, 0.2, 0.3])
    frame = pd.DataFrame({"effect": effect, "null": null})
    assert ABOVE.lean(frame) == (pytest.approx(max(p_value(effect - 0.3), p_value(effect - null - 0.3))), "holds")
    low = pd.DataFrame({"effect": effect - 0.9, "null": null - 0.9})
    assert ABOVE.lean(low) == (pytest.approx(2 * p_value(effect - 0.9 - 0.3)), "fails")


def test_many_verdicts_are_adjusted_together() -> None:
    """Of 40 scopes without an effect, some look significant one by one."""
    generator = np.random.default_rng(1)
    rows = [
        row for i in range(40) for row in rows_of((0.3 + generator.normal(0, 0.1, 5)).tolist(), scheme=f"scheme {i}")
    ]
    test = replace(BELOW, margin=0.3)
    found = judge([(result := result_of(rows), [test])])
    single = [test.lean(group)[0] for _, group in result.frame.groupby("scheme", sort=False)]
    assert min(single) < 0.05
    assert {verdict.verdict for verdict in found} == {"inconclusive"}
    assert [verdict.p for verdict in found] == pytest.approx(scipy_stats.false_discovery_control(single))


def test_what_cannot_be_tested_costs_the_others_nothing() -> None:
    """Lines of one seed, controls and identities do not enter the adjustment of what could come out either way."""
    strong = rows_of([0.4, 0.5, 0.45, 0.5])
    alone = [row for i in range(30) for row in rows_of([0.31], scheme=f"one seed {i}")]
    before = [row for i in range(30) for row in rows_of([0.1, 0.6, 0.2], scheme=f"untrained {i}", stage="initial")]
    (only,) = judge([(result_of(strong), [ABOVE])])
    found = judge([(result_of([*alone, *strong, *before]), [ABOVE])])
    (same,) = [verdict for verdict in found if verdict.scope["scheme"] == "rope"]
    assert (same.p, same.verdict) == (only.p, only.verdict)
    assert all(math.isnan(v.p) and v.verdict == "inconclusive" for v in found if "one seed" in v.scope["scheme"])
    assert {v.role for v in found if "untrained" in v.scope["scheme"]} == {"untrained"}


def test_scopes_are_judged_apart_and_seeds_counted_once() -> None:
    early = rows_of([0.8, 0.9, 0.85], stage="early")
    late = rows_of([0.0, 0.1, 0.05], stage="end")
    undefined = rows_of([float("nan")] * 3, stage="initial")
    found = judge([(result_of([*early, *early, *late, *undefined]), [ABOVE])])
    assert [(verdict.scope["stage"], verdict.verdict) for verdict in found] == [("early", "holds"), ("end", "fails")]
    assert [verdict.effect.n for verdict in found] == [3, 3]
    assert found[0].effect.value == pytest.approx(0.85)
    table = counts(found)
    assert table.loc["5"].to_dict() == {
        "holds": 1, "fails": 1, "inconclusive": 0, "identity": 0, "arm": 0, "untrained": 0,
    }  # fmt: skip


def test_an_arm_that_fails_confirms_the_paper_and_an_identity_says_nothing() -> None:
    test = replace(ABOVE, identity=lambda scope: scope["scheme"] == "none")
    rows = [*rows_of([0.0, 0.1, 0.05], objective="causal"), *rows_of([0.8, 0.9, 0.85], scheme="none")]
    rows += rows_of([0.0, 0.1, 0.05])
    found = judge([(result_of(rows), [test])])
    said = {(v.role, v.verdict): v.reading for v in found}
    assert said == {
        ("arm", "fails"): "confirms the paper",
        ("identity", "holds"): "",
        ("test", "fails"): "contradicts the paper",
    }
    assert "- **5**, m: planted, any_order rope, 1 layer, 2 heads of 16\n" in tables(found)
    table = counts(found).loc["5"]
    assert (table["fails"], table["identity"], table["arm"]) == (1, 1, 1)


def test_a_ledger_is_written_as_plain_json(tmp_path: Path) -> None:
    found = judge([(result_of([*rows_of([0.8, 0.9, 0.85]), *rows_of([0.5], scheme="alibi")]), [ABOVE])])
    save_ledger(found, tmp_path / "claims.json")
    line, alone = json.loads((tmp_path / "claims.json").read_text())
    assert line["claim"] == {"id": "5", "sentence": CLAIMS["5"]}
    assert line["scope"] == PLACE
    assert set(line["effect"]) == {"value", "low", "high", "n"}
    assert (line["verdict"], line["figure"], line["reading"]) == ("holds", "planted", "supports the paper")
    assert "exceeds 0.3 and its null by 0.3" in line["rule"]
    assert (alone["p"], alone["effect"]["low"]) == (None, None)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (replace(ABOVE, claim="x"), "claim: 'x' in analysis 'planted' is not one of 0, 1, 2"),
        (replace(ABOVE, null="nothing"), "lacks column 'nothing', which claim 5 reads; add it"),
    ],
)
def test_a_test_that_cannot_be_judged_is_named(test: ClaimTest, message: str) -> None:
    with pytest.raises(UserError, match=message):
        verdicts_of(test, rows_of([0.5, 0.6]))


def test_every_claim_is_tested_and_its_sentence_is_one() -> None:
    tested = {test.claim for analysis in discover() for test in analysis.claims}
    assert tested == set(CLAIMS)


# ---- signatures against reverse prediction, over settings

LINK = LinkTest(claim="7", measure="m", signature="effect", outcome="reverse_probability", margin=0.1)
N_HEADS = (1, 2, 3, 4, 6, 8, 12, 16)


def settings_of(signature: Callable[[str, int, float], float], seeds: int = 5, noise: float = 0.02) -> list[dict]:
    """Eight settings under each of four schemes, whose reverse probability is drawn once per setting, higher under some
    schemes."""
    generator, rows = np.random.default_rng(3), []
    for (i, scheme), n_heads in itertools.product(enumerate(MDM_SCHEMES), N_HEADS):
        reverse = 0.2 * i + 0.3 * generator.random()
        for seed in range(seeds):
            jitter = noise * generator.normal(size=2)
            measured = {"effect": signature(scheme, n_heads, reverse) + jitter[0], "null": 0.0}
            measured["reverse_probability"] = reverse + jitter[1]
            rows.append({**measured, "scheme": scheme, "n_heads": n_heads, "seed": seed})
    return rows


def links(rows: Sequence[dict[str, Any]]) -> dict[str, Verdict]:
    return {verdict.scope["scheme"]: verdict for verdict in judge([(result_of(rows), [LINK])])}


def test_a_signature_that_goes_with_reverse_prediction_holds_and_its_opposite_fails() -> None:
    for sign, expected in ((1, "holds"), (-1, "fails")):
        found = links(settings_of(lambda scheme, heads, reverse, sign=sign: sign * reverse))
        assert {scheme: found[scheme].verdict for scheme in MDM_SCHEMES} == dict.fromkeys(MDM_SCHEMES, expected)
        together = found["all schemes"]
        rows = pd.DataFrame(settings_of(lambda scheme, heads, reverse, sign=sign: sign * reverse))
        points = rows.groupby(["scheme", "n_heads"])[["effect", "reverse_probability"]].mean()
        expected_value: Any = scipy_stats.spearmanr(*points.to_numpy().T)
        assert together.effect.value == pytest.approx(expected_value.statistic)
        assert together.effect.n == len(points) == 32


def test_arbitrary_constants_of_the_schemes_get_no_verdict() -> None:
    """Four schemes are four draws, however many settings share each."""
    found = []
    for order in itertools.permutations([0.1, 0.3, 0.5, 0.9]):
        constants = {str(scheme): value for scheme, value in zip(MDM_SCHEMES, order, strict=True)}
        verdicts = links(settings_of(lambda scheme, heads, reverse, of=constants: of[scheme], noise=1e-4))
        assert set(verdicts) == {"all schemes"}  # within a scheme there is nothing to rank
        found.append(verdicts["all schemes"].verdict)
    assert len(found) == 24 and found.count("inconclusive") >= 22


def test_a_signature_unrelated_to_reverse_prediction_gets_no_verdict() -> None:
    generator = np.random.default_rng(0)
    drawn = {(scheme, heads): generator.random() for scheme in MDM_SCHEMES for heads in N_HEADS}
    found = links(settings_of(lambda scheme, heads, reverse: drawn[scheme, heads]))
    assert [verdict.verdict for verdict in found.values()] == ["inconclusive"] * 5


# ---- each claim's measure on models in which the claim is false, and in which it is true


def model_of(seed: int, position: Any = "rope", d_model: int = 32) -> HookedTransformer:
    config = ModelConfig(
        d_model=d_model,
        n_heads=2,
        d_vocab=FACTS.d_vocab,
        n_ctx=FACTS.seq_len,
        position=position,
        mask_token_id=FACTS.mask_token_id,
    )
    return HookedTransformer(config, generator=torch.Generator().manual_seed(seed))


def pairs_of(seed: int) -> list[QueryPair]:
    return FactWorld(FACTS, seed).query_pairs(n_contexts=1)[:24]


def places_in_values(seed: int) -> HookedTransformer:
    """What is stored depends on where it is more than on what is there."""
    model = model_of(seed, position="learned")
    with torch.no_grad():
        model.pos_embed.W_pos *= 20
    return model


SPANNED = FactConfig(n_entities=30, n_filler=4, seq_len=3)
"""Facts that fill their sequences: what is between the entities lies on the other side of the other readout."""


def odd_only(seed: int) -> HookedTransformer:
    """Every plane of a key is a quarter turn from the mask's query, so scores tell sides apart and nothing else."""
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


def unrelated_logits(seed: int) -> HookedTransformer:
    """No token's direction has a part in another's, so that gradients meet in the answers alone."""
    model = model_of(seed, "none", d_model=64)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        model.W_U[:] = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0][:, : FACTS.d_vocab]
    return model


def opposed(pairs: Sequence[QueryPair]) -> list[QueryPair]:
    """Reverse queries that ask the very same questions for what is no entity: learning one unlearns the other."""
    others = range(FACTS.n_entities, FACTS.d_vocab)
    asked = [replace(pair.forward, answer=(others[i % len(others)],)) for i, pair in enumerate(pairs)]
    return [replace(pair, reverse=query) for pair, query in zip(pairs, asked, strict=True)]


def storing(seed: int, share: float) -> HookedTransformer:
    """The source's value writes toward its own answer, or away from it where `share` is negative."""
    model, world = model_of(seed, "none"), FactWorld(FACTS, seed)
    with torch.no_grad():
        attention, written = model.blocks[0].attn, torch.zeros(FACTS.d_vocab, model.cfg.d_model)
        for left, _, right in world.facts.tolist():
            written[left], written[right] = written[left] + model.W_U[:, right], written[right] + model.W_U[:, left]
        x = torch.nn.functional.normalize(model.W_E, dim=-1) * model.cfg.d_model**0.5
        through = share * torch.linalg.lstsq(x, written).solution  # what a value has to be turned into
        u, s, v = torch.linalg.svd(through)
        width = attention.W_V.shape[-1]
        for head in range(2):
            kept = slice(head * width, (head + 1) * width)
            attention.W_V[head] += u[:, kept] * s[kept]
            attention.W_O[head] += v[kept]
    return model


def row_of(**measured: Contrast[float]) -> dict[str, Any]:
    """A row of results, as the rules read it."""
    effects = {name: found.effect for name, found in measured.items()}
    return effects | {f"{name}_null": found.null for name, found in measured.items()}


def route_rows(plant: Callable[[int], HookedTransformer]) -> list[dict[str, Any]]:
    asked = {seed: FactWorld(SPANNED, seed).query_pairs(n_contexts=1) for seed in SEEDS}
    return [row_of(route=signatures.route(plant(seed), pairs)) for seed, pairs in asked.items()]


def position_rows(plant: Callable[[int], HookedTransformer]) -> list[dict[str, Any]]:
    worlds = {seed: FactWorld(FACTS, seed) for seed in SEEDS}
    return [row_of(position=signatures.position(plant(s), pairs_of(s), world)) for s, world in worlds.items()]


def transplant_rows(plant: Callable[[int], HookedTransformer]) -> list[dict[str, Any]]:
    return [row_of(transplant=transplant_routes(plant(seed), pairs_of(seed)).distance()) for seed in SEEDS]


def evidence_rows(plant: Callable[[int], HookedTransformer]) -> list[dict[str, Any]]:
    worlds = {seed: FactWorld(FACTS, seed) for seed in SEEDS}
    return [row_of(evidence=signatures.evidence(plant(s), pairs_of(s), world)) for s, world in worlds.items()]


def alignment_rows(asked: Callable[[Sequence[QueryPair]], Sequence[QueryPair]]) -> list[dict[str, Any]]:
    return [row_of(**signatures.alignment(unrelated_logits(seed), asked(pairs_of(seed)))) for seed in SEEDS]


def untouched(position: Any) -> Callable[[int], HookedTransformer]:
    return lambda seed: model_of(seed, position)


def told(low: float, high: float, name: str = "reverse_probability", **more: Any) -> list[dict[str, Any]]:
    """What a run's metrics would say, drawn anew for every seed."""
    drawn = np.random.default_rng(5).uniform(low, high, len(SEEDS))
    return [{name: value, **more} for value in drawn.tolist()]


def against_arms(mdm: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    arms = told(1e-4, 1e-3, objective="causal", n_heads=1, d_head=64)
    return [*mdm, *({**row, "seed": seed} for seed, row in enumerate(arms))]


PLANTED: dict[str, tuple[str, Callable[[], list[dict]], Callable[[], list[dict]]]] = {
    "0": ("log_ratio", lambda: told(1e-4, 1e-3), lambda: told(0.5, 0.9)),
    "1, not sufficient": (
        "kept",
        lambda: told(0.8, 0.9, forward_probability=0.95),
        lambda: told(0.0, 0.1, forward_probability=0.95),
    ),
    "1, not necessary": (
        "reverse_probability",
        lambda: told(0.0, 0.05, objective="source_only", chance=0.1),
        lambda: told(0.5, 0.9, objective="source_only", chance=0.1),
    ),
    "2": ("position", lambda: position_rows(places_in_values), lambda: position_rows(untouched("rope"))),
    "3": ("transplant", lambda: transplant_rows(places_in_values), lambda: transplant_rows(untouched("t5_bias"))),
    "4": (
        "evidence",
        lambda: evidence_rows(lambda s: storing(s, -3.0)),
        lambda: evidence_rows(lambda s: storing(s, 3.0)),
    ),
    "5": ("route", lambda: route_rows(odd_only), lambda: route_rows(untouched("alibi"))),
    "6": ("alignment", lambda: alignment_rows(opposed), lambda: alignment_rows(list)),
    "6, mean": ("mean_alignment", lambda: alignment_rows(opposed), lambda: alignment_rows(list)),
}
"""Per claim the column that its measure is in, a world in which the claim is false by construction, and one in which it
is true."""


@pytest.mark.slow
@pytest.mark.parametrize("claim", list(PLANTED))
def test_a_false_claim_fails_and_a_true_one_holds_in_95_of_100_ledgers(claim: str) -> None:
    column, *worlds = PLANTED[claim]
    (test,) = [test for test in RULES if isinstance(test, ClaimTest) and test.effect == column]
    generator = np.random.default_rng(0)
    for plant, expected in zip(worlds, ("fails", "holds"), strict=True):
        planted = [{"seed": seed, **row} for seed, row in enumerate(plant())]
        for n in (5, 10):
            found = []
            for _ in range(100):
                drawn = set(generator.choice(len(SEEDS), n, replace=False).tolist())
                rows = against_arms(planted) if claim == "0" else planted
                found += verdicts_of(test, [row for row in rows if row["seed"] in drawn])
            assert found.count(expected) >= 95, (expected, n, found)


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "expected"), [(1, "holds"), (-1, "fails")])
@pytest.mark.parametrize("n", [5, 10])
def test_claim_7_over_settings_and_over_training_in_95_of_100_ledgers(sign: int, expected: str, n: int) -> None:
    found = []
    for draw in range(100):
        generator = np.random.default_rng(draw)
        rows = []
        for heads in N_HEADS:
            reverse = generator.random()
            for seed in range(n):
                noise = 0.1 * generator.normal(size=2)
                row = {"effect": sign * reverse + noise[0], "reverse_probability": reverse + noise[1]}
                rows.append({**row, "n_heads": heads, "seed": seed})
        (verdict,) = [v for v in judge([(result_of(rows), [LINK])]) if v.scope["scheme"] == "rope"]
        found.append(verdict.verdict)
    assert found.count(expected) >= 95
    over = paper.LINK_RULES[0]
    found = []
    for draw in range(100):
        generator = np.random.default_rng(draw)
        rows = []
        for seed in range(n):
            for step in range(10):
                wave = generator.random()
                row = {name: sign * wave + 0.1 * generator.normal() for name in paper.SIGNATURES}
                row |= {"forward_probability": step / 10, "reverse_probability": wave}
                rows.append({**row, "seed": seed, "step": step, "stage": "checkpoint"})
        found += verdicts_of(over, rows)
    assert found.count(expected) >= 95


def test_the_ledger_reads_the_results_of_the_analyses_that_test_claims(tiny_result: Callable[[str], Result]) -> None:
    judging = [analysis for analysis in discover() if analysis.claims]
    found = ledger(judging, {analysis.name: tiny_result(analysis.name) for analysis in judging})
    assert [verdict.claim["id"] for verdict in found] == sorted(verdict.claim["id"] for verdict in found)
    assert "signatures" in {verdict.figure for verdict in found} <= {analysis.name for analysis in judging}
    assert {verdict.scope["stage"] for verdict in found} >= {"initial", "end"}
    undefined = {"0", "1", "2", "3", "5"}
    assert not any(verdict.claim["id"] in undefined for verdict in found if verdict.scope["objective"] == "causal")
    for verdict in found:
        scope = verdict.scope
        if scope["world"] is None:
            continue
        control = scope["objective"] == "causal" and scope["stage"] != "initial" and verdict.claim["id"] != "8"
        assert (verdict.role == "arm") == control
        alone = scope["n_layers"] == 1 and scope["objective"] != "causal"
        if verdict.claim["id"] in ("2", "3") and alone:
            assert (verdict.role == "identity") == (scope["scheme"] not in ("learned", "sinusoidal"))
        if verdict.claim["id"] in ("5", "6") and alone and scope["scheme"] in ("alibi", "none"):
            assert verdict.role == "identity"
