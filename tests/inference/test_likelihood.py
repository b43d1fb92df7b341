"""The masked-diffusion bound, against the exact one where that can be enumerated, and against causal models."""

from __future__ import annotations

from itertools import combinations
from math import comb

import pytest
import torch
from helpers import random_model
from torch.testing import assert_close

from mdm_interp.errors import UserError
from mdm_interp.inference.likelihood import N_DRAWS, bound

MASK = 12
SENTENCES = [(4, 7, 3, 1), (5, 9, 1, 8, 2)]


def exact(model, tokens: tuple[int, ...], span: range) -> float:
    """The bound itself: over every number of masks and every choice of them."""
    shift, total = model.cfg.readout_shift, 0.0
    for count in range(1, len(span) + 1):
        for masked in combinations(span, count):
            noisy = torch.tensor([[MASK if at in masked else token for at, token in enumerate(tokens)]])
            told = model(noisy)[0].log_softmax(-1)
            own = torch.stack([told[at + shift, tokens[at]] for at in masked]).sum()
            total += own.item() / count / comb(len(span), count)  # L / l, in the mean over L numbers l
    return total


@pytest.mark.parametrize("shift", [0, -1])
def test_the_estimate_is_of_the_exact_bound(shift: int) -> None:
    model = random_model(dtype="float64", mask_token_id=MASK, readout_shift=shift)
    found = bound(model, SENTENCES, n_draws=2000, seed=3)
    for value, error, tokens in zip(found.value, found.error, SENTENCES, strict=True):
        expected = exact(model, tokens, range(-shift, len(tokens)))
        assert abs(value.item() - expected) < 4 * error.item() < 0.5
    assert (found.n_draws, found.seed, N_DRAWS) == (2000, 3, 128)


def test_a_span_is_predicted_given_the_rest() -> None:
    model = random_model(dtype="float64", mask_token_id=MASK)
    spans = [(1, 2), (1, 3)]
    found = bound(model, SENTENCES, spans, n_draws=400)
    told = model(torch.tensor([[4, MASK, 3, 1]]))[0, 1].log_softmax(-1)[7]
    assert_close(found.value[0], told.detach(), atol=1e-9, rtol=0)
    assert found.error[0] < 1e-9, "one token has one way of being masked"
    assert abs(found.value[1].item() - exact(model, SENTENCES[1], range(1, 3))) < 4 * found.error[1].item()


def test_draws_are_repeatable_and_more_of_them_err_less() -> None:
    model = random_model(mask_token_id=MASK)
    first, again, other = (bound(model, SENTENCES, n_draws=32, seed=seed).value for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    alone = bound(model, SENTENCES[1:], n_draws=32, seed=1).value
    assert_close(alone, first[1:], msg="a sentence's draws depend on others")
    few, many = (bound(model, SENTENCES, n_draws=n).error for n in (16, 1024))
    assert (many < few / 3).all()
    assert bound(model, SENTENCES, n_draws=1).error.isnan().all()


def test_a_causal_model_says_it_exactly() -> None:
    model = random_model(attention="causal", dtype="float64")
    found = bound(model, SENTENCES, n_draws=5)
    for value, tokens in zip(found.value, SENTENCES, strict=True):
        told = model(torch.tensor([tokens]))[0].log_softmax(-1)
        own = torch.stack([told[at - 1, tokens[at]] for at in range(1, len(tokens))]).sum()
        assert_close(value, own.detach(), atol=1e-9, rtol=0)
    assert not found.error.any()


def test_special_tokens_are_given_and_mistakes_named() -> None:
    model = random_model(dtype="float64", mask_token_id=MASK)
    kept = bound(model, [(4, 7)], n_draws=3, kept=[4])
    assert_close(kept.value, bound(model, [(4, 7)], [(1, 2)], n_draws=3).value)
    with pytest.raises(UserError, match="n_draws: 0 draws say nothing"):
        bound(model, SENTENCES, n_draws=0)
    with pytest.raises(UserError, match="sentences: number 0 has 2 tokens, 0 to predict"):
        bound(model, [(4, 7)], kept=[4, 7])
