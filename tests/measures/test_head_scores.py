"""Head scores are the measures' own, pair by pair, and say why one is missing."""

from __future__ import annotations

import pytest
import torch
from helpers import random_model
from model_helpers import mirrored_pairs

from mdm_interp.errors import UserError
from mdm_interp.measures.evidence import compute_evidence
from mdm_interp.measures.gradients import gram
from mdm_interp.measures.head_scores import SCORES, head_scores
from mdm_interp.measures.lens import lens, other_answers
from mdm_interp.measures.parity import score_parity
from mdm_interp.measures.routes import compute_routes
from mdm_interp.measures.sinks import sinks

PAIRS = mirrored_pairs(causal=False)
FORWARD, REVERSE = [pair.forward for pair in PAIRS], [pair.reverse for pair in PAIRS]


def test_every_score_is_the_measures_own() -> None:
    model = random_model(mask_token_id=0)
    found = head_scores(model, PAIRS)
    assert list(found.by_pair) == list(found.over_pairs) == list(SCORES)
    assert found.undefined == {}
    shape = (len(PAIRS), model.cfg.n_layers, model.cfg.n_heads)
    assert {scores.shape for scores in found.by_pair.values()} == {shape}
    assert torch.equal(found.by_pair["reverse route"], compute_routes(model, REVERSE).pattern)
    for at, query in enumerate(FORWARD):
        alone = compute_evidence(model, [query], torch.tensor(query.answer))[0, ..., 0]
        assert found.by_pair["forward evidence"][at] == pytest.approx(alone, abs=1e-5)
    attributed = lens(model, REVERSE, other_answers(PAIRS, REVERSE)).heads
    assert found.by_pair["reverse attribution"] == pytest.approx(attributed, nan_ok=True)
    taken = (sinks(model, FORWARD).readout + sinks(model, REVERSE).readout) / 2
    assert torch.equal(found.by_pair["sink share"], taken)
    cosine = gram(model, FORWARD, REVERSE).cosine(["V", "O"], [1]).diagonal()
    for head in range(model.cfg.n_heads):
        assert torch.equal(found.by_pair["storage alignment"][:, 1, head], cosine)
    parity = score_parity(model, PAIRS)
    assert found.by_pair["odd share"] == pytest.approx(parity.odd**2 / (parity.even**2 + parity.odd**2))
    assert found.over_pairs["odd share"] == pytest.approx(parity.selectivity())
    assert found.over_pairs["forward route"] == pytest.approx(found.by_pair["forward route"].mean(0))


def test_hooks_act() -> None:
    model = random_model(mask_token_id=0)

    def off(z: torch.Tensor, hook: object) -> torch.Tensor:
        z[:, :, 1] = 0
        return z

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", off)]):
        found = head_scores(model, PAIRS)
    assert (found.by_pair["forward attribution"][:, 1, 1].nan_to_num() == 0).all()
    assert (found.by_pair["forward attribution"][:, 1, 0].nan_to_num() != 0).any()


def test_a_missing_score_says_why() -> None:
    found = head_scores(random_model(attention="causal"), mirrored_pairs(causal=True))
    assert list(found.undefined) == ["odd share"]
    assert "an ARM's" in found.undefined["odd share"]
    assert "odd share" not in found.by_pair
    with pytest.raises(UserError, match=r"^query_pairs: .* got none"):
        head_scores(random_model(), [])
