"""The rows behind the ledger: what is measured where, and that each number is what it is called."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import planted_result, random_model

from analyses import signatures
from mdm_interp.config import FactConfig
from mdm_interp.data.queries import collate
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import SCOPE, scope_label
from mdm_interp.inference.prediction import query_loss
from mdm_interp.measures.evidence import evidence_scores, pair_position_index

FACTS = FactConfig(n_entities=6, n_filler=4, seq_len=6)


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
            key = f"{scope_label({str(k): v for k, v in record.items()})} / {name}"
            if group[name].notna().any():
                assert result.summary[key].value == pytest.approx(group[name].mean(), rel=1e-5)
            else:
                assert key not in result.summary


def test_the_mean_alignment_is_the_cosine_of_the_storage_gradients() -> None:
    model = random_model(n_layers=1, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len).to(torch.float64)
    pairs = FactWorld(FACTS, 0).query_pairs(n_contexts=1)
    gradients = []
    for queries in ([pair.forward for pair in pairs], [pair.reverse for pair in pairs]):
        batch = collate(queries, model.cfg)
        attention = model.blocks[0].attn
        loss = query_loss(model(batch.tokens), batch).mean()
        parts = torch.autograd.grad(loss, [attention.W_V, attention.W_O])
        gradients.append(torch.cat([part.flatten() for part in parts]))
    cosine = torch.cosine_similarity(*gradients, dim=0).item()
    assert signatures.alignment(model, pairs)["mean_alignment"] == pytest.approx(cosine, abs=1e-6)


def test_evidence_and_place_are_of_the_layer_where_they_are_largest() -> None:
    """One rule for both claims about evidence, and for their nulls."""
    world = FactWorld(FACTS, 0)
    pairs = world.query_pairs(n_contexts=1)
    reverse = [pair.reverse for pair in pairs]
    model = random_model(n_layers=2, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len, position="learned")
    true, other = evidence_scores(model, reverse, world.candidates(reverse))
    found = signatures.evidence(model, pairs, world)
    assert found == {"evidence": pytest.approx(max(true.tolist())), "evidence_null": pytest.approx(max(other.tolist()))}
    index = pair_position_index(model, pairs, torch.arange(FACTS.n_entities)).max().item()
    assert signatures.position(model, pairs, world)["position"] == pytest.approx(index / (1 + index), rel=1e-5)


PLACE = {"reversed_share": 0.0, "rotary_base": 1e4, "n_layers": 1, "d_head": 64, "mlp": False, "stage": "end"}


def planted(rows: list[dict]) -> Result:
    return planted_result("signatures", [{**PLACE, **row} for row in rows], seeds=[0, 1])


def test_an_mdm_is_held_against_the_arm_of_its_world_and_seed() -> None:
    mdm = {"world": "w", "scheme": "learned", "objective": "any_order", "n_heads": 4}
    arm = {"world": "w", "scheme": "rope", "objective": "causal", "n_heads": 1}
    rows = [{**mdm, "seed": seed, "reverse_probability": 0.5} for seed in (0, 1, 2)]
    rows += [{**arm, "seed": seed, "reverse_probability": 0.01 * (seed + 1)} for seed in (0, 1)]
    rows.append({**arm, "seed": 0, "reverse_probability": 0.9, "world": "another"})
    rows.append({**arm, "seed": 0, "reverse_probability": 0.9, "scheme": "alibi"})
    found = signatures.over_the_arm(planted(rows)).sort_values("seed")
    assert found["seed"].tolist() == [0, 1]  # seed 2 has no ARM
    assert found["log_ratio"].tolist() == pytest.approx([np.log(50), np.log(25)])
    assert found["log_ratio_null"].tolist() == pytest.approx([np.log(2), -np.log(2)])


def test_the_rows_that_test_sufficiency_are_those_in_which_sides_may_have_their_own() -> None:
    def row(scheme: str, n_heads: int, **more: object) -> dict:
        asked = {"forward_probability": 0.8, "reverse_probability": 0.2}
        return {
            "world": "w",
            "objective": "any_order",
            "scheme": scheme,
            "n_heads": n_heads,
            "seed": 0,
            **asked,
            **more,
        }

    chosen = [row("rope", 2), row("t5_bias", 4), row("learned", 1), row("sinusoidal", 1), row("learned", 4)]
    others = [row("rope", 1), row("alibi", 4), row("none", 4), row("rope", 4, objective="source_only")]
    others.append(row("learned", 1, reversed_share=0.5))
    found = signatures.not_shared(planted([*chosen, *others]))
    assert list(zip(found["scheme"], found["n_heads"], strict=True)) == [(r["scheme"], r["n_heads"]) for r in chosen]
    assert found["kept"].tolist() == pytest.approx([0.25] * 5)


def test_place_has_no_share_in_relative_evidence_and_all_of_it_where_only_place_is_stored() -> None:
    world = FactWorld(FACTS, 0)
    pairs = world.query_pairs(n_contexts=1)
    relative = random_model(n_layers=1, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len)
    assert signatures.position(relative, pairs, world)["position"] == 0
    absolute = random_model(n_layers=1, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len, position="learned")
    with torch.no_grad():
        absolute.embed.W_E[: FACTS.n_entities] = absolute.embed.W_E[0]
    shares = signatures.position(absolute, pairs, world)
    assert 0.1 < shares["position"] <= 1
    assert np.isfinite(list(shares.values())).all()
