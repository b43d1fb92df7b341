"""The rows behind the ledger: what is measured where, and that each number is what it is called."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import random_model

from analyses import signatures
from mdm_interp.config import FactConfig
from mdm_interp.facts import FactWorld
from mdm_interp.prediction import query_loss
from mdm_interp.presets import SCOPE, scope_label
from mdm_interp.queries import collate
from mdm_interp.results import Result

FACTS = FactConfig(n_entities=6, n_filler=4, seq_len=6)


def test_every_setting_is_measured_at_every_stage_it_has(tiny_result: Callable[[str], Result]) -> None:
    frame = tiny_result("signatures").frame
    keys = ["run", "stage"]
    assert not frame.duplicated(keys).any()
    assert set(frame["stage"]) >= {"initial", "end"}
    shared = frame["objective"] != "causal"
    for name in signatures.SHOWN:
        for column in (name, f"{name}_null"):
            defined = shared if name in ("position", "transplant", "route") else shared | ~shared
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


def test_descent_is_the_cosine_of_the_storage_gradients_for_a_short_step() -> None:
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
    assert signatures.descent(model, pairs)["descent"] == pytest.approx(cosine, abs=5e-3)


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
