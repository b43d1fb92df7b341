"""Masking, the two losses, and the denoising loop."""

from __future__ import annotations

from itertools import pairwise
from math import exp, log
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare, kstest
from torch import Tensor

from mdm_interp.config import ModelConfig, Objective
from mdm_interp.data.worlds import FactBatch
from mdm_interp.errors import UserError
from mdm_interp.inference.denoising import Trajectory, denoise
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.training.losses import arm_loss, mask_tokens, mdm_loss, training_loss

Order = Literal["confidence", "random", "left_to_right"]
ORDERS: tuple[Order, ...] = ("confidence", "random", "left_to_right")
SMALLEST_P = 1e-3  # see test_facts.py
MASK = 4
"""Mask token of the stub models below, the last of five tokens."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Stub:
    """A model that gives these logits [pos d_vocab] to every sequence and remembers what it was shown."""

    def __init__(self, logits: Tensor, shift: Literal[0, -1] = 0, mask: int = MASK) -> None:
        self.logits = logits
        self.cfg = ModelConfig(
            d_model=2, n_heads=1, d_vocab=logits.shape[1], n_ctx=len(logits), mask_token_id=mask, readout_shift=shift
        )
        self.shown: list[Tensor] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        self.shown.append(tokens.clone())
        return self.logits.expand(len(tokens), -1, -1).clone()


def confident(certainties: list[float], favourites: list[int], **options: Literal[0, -1]) -> Stub:
    """At position i token `favourites[i]` has probability `certainties[i]`; tokens 0 to 3 share the rest evenly."""
    probabilities = torch.empty(len(certainties), 5)
    for at, (certainty, favourite) in enumerate(zip(certainties, favourites, strict=True)):
        probabilities[at] = (1 - certainty) / 3
        probabilities[at, favourite] = certainty
    probabilities[:, MASK] = 0.9  # the mask looks tempting and must never be taken
    return Stub(probabilities.log(), **options)


# ---- masking


def test_the_masked_share_is_t_and_t_is_uniform() -> None:
    tokens = torch.zeros(20_000, 16, dtype=torch.long)
    noisy, masked, t = mask_tokens(tokens, MASK, generator())
    assert torch.equal(noisy == MASK, masked) and t.shape == (20_000, 1)
    assert bool((t > 0).all() and (t <= 1).all())
    assert kstest(t[:, 0].numpy(), "uniform").pvalue > SMALLEST_P
    share = masked.float().mean(1)
    for tenth in range(10):  # 2000 sequences of 16 tokens in each: standard error at most 0.003
        rows = (t[:, 0] > tenth / 10) & (t[:, 0] <= (tenth + 1) / 10)
        assert abs(float((share - t[:, 0])[rows].mean())) < 0.012
    pattern = masked[:, :2].float() - t  # given t, neighbours are masked independently
    assert abs(float((pattern[:, 0] * pattern[:, 1]).mean())) < 4 * 0.25 / 20_000**0.5


@pytest.mark.parametrize(("drawn", "t", "share"), [(0.0, 1.0, 1.0), (1 - 2**-24, 2**-24, 0.0)], ids=["least", "most"])
def test_t_is_never_0(monkeypatch: pytest.MonkeyPatch, drawn: float, t: float, share: float) -> None:
    """At the ends of what torch.rand can draw, where a t of 0 would make the weight 1/t infinite."""
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(torch.Size(_flat(shape)), drawn))
    _, masked, got = mask_tokens(torch.zeros(2, 3, dtype=torch.long), MASK, generator())
    assert got.flatten().tolist() == [t, t] and float(masked.float().mean()) == share


def _flat(shape: tuple) -> tuple[int, ...]:
    return tuple(shape[0]) if isinstance(shape[0], torch.Size) else shape


def test_only_maskable_tokens_are_masked_and_the_others_are_kept() -> None:
    tokens = torch.randint(4, (500, 6), generator=generator(1))
    maskable = torch.zeros(500, 6, dtype=torch.bool)
    maskable[:, 2] = maskable[::2, 5] = True
    noisy, masked, _ = mask_tokens(tokens, MASK, generator(), maskable)
    assert not bool((masked & ~maskable).any()) and bool(masked[:, 2].any() and masked[::2, 5].any())
    assert torch.equal(noisy, torch.where(masked, MASK, tokens))
    everything = mask_tokens(tokens, MASK, generator())[1]
    assert torch.equal(masked, everything & maskable)


# ---- losses


def test_mdm_loss_is_the_double_sum() -> None:
    logits = torch.randn(3, 4, 5, generator=generator(), dtype=torch.float64)
    tokens = torch.randint(5, (3, 4), generator=generator(1))
    masked = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    t = torch.tensor([[0.5], [0.1], [0.9]], dtype=torch.float64)
    total = 0.0
    for row in range(3):
        for at in range(4):
            if masked[row, at]:
                scores = [exp(score) for score in logits[row, at].tolist()]
                total += -log(scores[int(tokens[row, at])] / sum(scores)) / float(t[row])
    assert float(mdm_loss(logits, tokens, masked, t)) == pytest.approx(total / 12, rel=1e-12)


def test_arm_loss_is_the_double_sum() -> None:
    logits = torch.randn(3, 4, 5, generator=generator(), dtype=torch.float64)
    tokens = torch.randint(5, (3, 4), generator=generator(1))
    total = 0.0
    for row in range(3):
        for at in range(3):
            scores = [exp(score) for score in logits[row, at].tolist()]
            total += -log(scores[int(tokens[row, at + 1])] / sum(scores))
    assert float(arm_loss(logits, tokens)) == pytest.approx(total / 9, rel=1e-12)


def test_mdm_loss_is_unbiased() -> None:
    """Two tokens, and a model whose logits depend on which are masked: its loss at position i is c_i(pattern).

    A pattern with k masks has probability t^k (1-t)^(2-k) and weight 1/t, so its integral over t is 1/2 for k = 1
    and for k = 2 alike. Divided by the length 2, the expectation is (c_0(10) + c_1(01) + c_0(11) + c_1(11)) / 4: the
    mean cross-entropy of filling the two in either order.

    Tolerance: one draw has a variance of c^2 / 4 times the integral of (1-t)/t, which diverges as -log(t) only. Over
    2e6 draws that makes a standard error near 0.002.
    """
    table = torch.randn(2, 2, 2, 3, generator=generator(5))  # [is 0 masked, is 1 masked, pos, d_vocab]
    tokens = torch.tensor([2, 0])
    cost = -table.log_softmax(-1)[..., [0, 1], tokens]
    exact = float(cost[1, 0, 0] + cost[0, 1, 1] + cost[1, 1, 0] + cost[1, 1, 1]) / 4
    draws, losses = generator(6), []
    for _ in range(10):
        _, masked, t = mask_tokens(tokens.expand(200_000, 2), 3, draws)
        logits = table[masked[:, 0].long(), masked[:, 1].long()]
        losses.append(float(mdm_loss(logits, tokens.expand(200_000, 2), masked, t)))
    assert sum(losses) / len(losses) == pytest.approx(exact, abs=0.01)


BATCH = FactBatch(
    torch.tensor([[0, 1, 2, 3, 0], [3, 0, 1, 1, 2]]).repeat(20_000, 1),
    torch.tensor([0, 1]).repeat(20_000),
    torch.tensor([2, 4]).repeat(20_000),
)


@pytest.mark.parametrize(
    ("objective", "maskable", "expected"),
    [
        ("any_order", [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]], log(5)),
        ("source_only", [[0], [1]], log(5) / 5),
        ("target_only", [[2], [4]], log(5) / 5),
    ],
)
def test_an_mdm_objective_masks_what_it_may(objective: Objective, maskable: list[list[int]], expected: float) -> None:
    """Uniform logits cost log(5) a token, and E[masked / t] is 1, so the loss is log(5) times the maskable share."""
    stub = Stub(torch.zeros(5, 5))
    loss = training_loss(stub, BATCH, objective, generator())
    (noisy,) = stub.shown
    changed = noisy != BATCH.tokens
    for row in range(2):
        assert changed[row::2].any(0).nonzero().flatten().tolist() == maskable[row]
    assert set(noisy[changed].tolist()) == {MASK}
    assert float(loss) == pytest.approx(expected, rel=0.05)
    again = training_loss(stub, BATCH, objective, generator())
    assert torch.equal(loss, again) and not torch.equal(loss, training_loss(stub, BATCH, objective, generator(1)))


def test_left_to_right_masks_a_token_and_all_after_it_and_predicts_that_one() -> None:
    """Each position is as likely as any other, so the loss is the mean over all of them."""
    logits = torch.randn(5, 5, generator=generator())
    stub = Stub(logits)
    loss = training_loss(stub, BATCH, "left_to_right", generator())
    (seen,) = stub.shown
    first = (seen == MASK).long().argmax(1)
    assert torch.equal(seen == MASK, torch.arange(5) >= first[:, None])
    assert torch.equal(seen[seen != MASK], BATCH.tokens[seen != MASK])
    assert (first.bincount(minlength=5) / len(first)).tolist() == pytest.approx([0.2] * 5, abs=0.01)
    expected = F.cross_entropy(logits.repeat(2, 1), BATCH.tokens[:2].flatten())
    assert float(loss) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize("rate", [0.15, 0.5, 1.0])
def test_a_fixed_rate_masks_as_often_and_weighs_all_alike(rate: float) -> None:
    tokens = torch.zeros(40_000, 5, dtype=torch.long)
    noisy, masked, t = mask_tokens(tokens, MASK, generator(), rate=rate)
    assert torch.equal(noisy == MASK, masked) and t.unique().tolist() == pytest.approx([rate])
    assert masked.float().mean(0).tolist() == pytest.approx([rate] * 5, abs=0.01)
    uniform = mdm_loss(torch.zeros(40_000, 5, 5), tokens, masked, t)
    assert float(uniform) == pytest.approx(log(5), rel=0.02)


def test_the_causal_objective_masks_nothing_and_predicts_the_next_token() -> None:
    logits = torch.randn(5, 5, generator=generator())
    stub = Stub(logits, shift=-1)
    draws = generator()
    before = draws.get_state()
    loss = training_loss(stub, BATCH, "causal", draws)
    assert torch.equal(stub.shown[0], BATCH.tokens) and torch.equal(draws.get_state(), before)
    log_probs = logits.log_softmax(-1).tolist()
    rows = BATCH.tokens[:2].tolist()
    expected = sum(-log_probs[at][row[at + 1]] for row in rows for at in range(4)) / 8
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_gradients_come_from_masked_positions_only() -> None:
    logits = torch.randn(2, 3, 5, generator=generator(), requires_grad=True)
    masked = torch.tensor([[True, False, False], [False, False, False]])
    mdm_loss(logits, torch.tensor([[1, 2, 3], [1, 2, 3]]), masked, torch.full((2, 1), 0.25)).backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(-1).gt(0).tolist() == masked.tolist()
    probabilities = logits[0, 0].softmax(-1) - torch.eye(5)[1]
    assert torch.allclose(logits.grad[0, 0], probabilities / 0.25 / 6)  # (p - 1{answer}) / t / (batch * length)


# ---- denoising


def filled(trajectory: Trajectory, step: int, row: int = 0) -> list[int]:
    return (trajectory.filled_at[row] == step).nonzero().flatten().tolist()


def test_confidence_fills_the_most_certain_position_first() -> None:
    stub = confident([0.5, 0.9, 0.4, 0.7], [0, 1, 2, 3])
    trajectory = denoise(stub, torch.full((1, 4), MASK), steps=4)
    assert [filled(trajectory, step) for step in (1, 2, 3, 4)] == [[1], [3], [0], [2]]
    assert trajectory.tokens[:, 0].tolist() == [
        [MASK, MASK, MASK, MASK],
        [MASK, 1, MASK, MASK],
        [MASK, 1, MASK, 3],
        [0, 1, MASK, 3],
        [0, 1, 2, 3],
    ]
    assert trajectory.probability[0].tolist() == pytest.approx([0.5, 0.9, 0.4, 0.7])
    assert [shown[0].tolist() for shown in stub.shown] == trajectory.tokens[:-1, 0].tolist()


def test_left_to_right_ignores_certainty() -> None:
    trajectory = denoise(
        confident([0.5, 0.9, 0.4, 0.7], [0, 1, 2, 3]),
        torch.tensor([[MASK, 3, MASK, MASK]]),
        steps=3,
        order="left_to_right",
    )
    assert trajectory.filled_at.tolist() == [[1, 0, 2, 3]]


def test_random_order_takes_every_order_equally_often() -> None:
    stub = confident([0.5, 0.9, 0.4], [0, 1, 2])
    trajectory = denoise(stub, torch.full((6000, 3), MASK), steps=3, order="random", generator=generator())
    orders = (trajectory.filled_at * torch.tensor([16, 4, 1])).sum(1)  # a number per order
    _, counts = orders.unique(return_counts=True)
    assert len(counts) == 6 and chisquare(counts).pvalue > SMALLEST_P
    assert bool((trajectory.tokens[-1] == torch.tensor([0, 1, 2])).all())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("n_masks", "steps", "expected"),
    [
        (5, 1, [5]),
        (5, 2, [3, 2]),
        (5, 3, [2, 2, 1]),
        (5, 5, [1, 1, 1, 1, 1]),
        (3, 7, [1, 1, 1]),
        (3, 10**22, [1, 1, 1]),
        (0, 4, []),
    ],
)
def test_each_step_fills_an_equal_share_of_what_is_left(
    order: Order, n_masks: int, steps: int, expected: list[int]
) -> None:
    tokens = torch.tensor([[MASK] * n_masks + [2] * (6 - n_masks)])
    trajectory = denoise(
        confident([0.5, 0.9, 0.4, 0.7, 0.6, 0.8], [0, 1, 2, 3, 0, 1]),
        tokens,
        steps=steps,
        order=order,
        generator=generator(),
    )
    left = [int((state == MASK).sum()) for state in trajectory.tokens]
    assert left[0] == n_masks and left[-1] == 0
    assert [before - after for before, after in pairwise(left)] == expected


def test_every_row_has_its_own_share() -> None:
    tokens = torch.tensor([[MASK, MASK, MASK, MASK], [0, MASK, 0, MASK], [1, 2, 3, 0]])
    trajectory = denoise(confident([0.5, 0.9, 0.4, 0.7], [0, 1, 2, 3]), tokens, steps=2)
    assert trajectory.filled_at.tolist() == [[2, 1, 2, 1], [0, 1, 0, 2], [0, 0, 0, 0]]
    assert trajectory.tokens[-1].tolist() == [[0, 1, 2, 3], [0, 1, 0, 3], [1, 2, 3, 0]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shift", [0, -1])
def test_a_trajectory_tells_one_story(order: Order, temperature: float, shift: Literal[0, -1]) -> None:
    """A real model's tokens, steps and probabilities, recomputed step by step from the states alone."""
    cfg = ModelConfig(d_model=8, n_heads=2, d_vocab=7, n_ctx=6, mask_token_id=6, readout_shift=shift)
    model = HookedTransformer(cfg, generator=generator()).requires_grad_(False)
    start = torch.randint(6, (8, 6), generator=generator(1))
    given = torch.rand(8, 6, generator=generator(2)) < 0.3
    given[:, 0] = True
    start = torch.where(given, start, 6)
    original = start.clone()
    trajectory = denoise(model, start, steps=3, order=order, temperature=temperature, generator=generator(3))
    assert torch.equal(start, original) and torch.equal(trajectory.tokens[0], original)
    assert torch.equal(trajectory.filled_at == 0, given)
    assert bool((trajectory.probability[given] == 1).all())
    final = trajectory.tokens[-1]
    assert not bool((final == 6).any())
    for step, state in enumerate(trajectory.tokens):
        assert torch.equal(state, torch.where(trajectory.filled_at <= step, final, 6))
    seen = torch.stack([model(state) for state in trajectory.tokens])[..., :6].softmax(-1)  # the mask, 6, is left out
    for row, at in (~given).nonzero().tolist():
        probabilities = seen[int(trajectory.filled_at[row, at]) - 1, row, at + shift]
        token = int(final[row, at])
        assert float(trajectory.probability[row, at]) == pytest.approx(float(probabilities[token]), abs=1e-6)
        if temperature == 0:
            assert token == int(probabilities.argmax())


def test_a_shifted_model_is_read_one_position_earlier() -> None:
    """Position i's logits favour token i: unshifted that is what is filled, shifted it is its neighbour's."""
    options = {"certainties": [0.9, 0.8, 0.7, 0.6], "favourites": [0, 1, 2, 3]}
    tokens = torch.tensor([[3, MASK, MASK, MASK]])
    plain, shifted = confident(**options), confident(**options, shift=-1)
    assert denoise(plain, tokens, steps=3).tokens[-1].tolist() == [[3, 1, 2, 3]]
    trajectory = denoise(shifted, tokens, steps=3)
    assert trajectory.tokens[-1].tolist() == [[3, 0, 1, 2]]
    assert trajectory.probability[0].tolist() == pytest.approx([1.0, 0.9, 0.8, 0.7])
    assert trajectory.filled_at.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_tempered_softmax(temperature: float) -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    stub = Stub(torch.cat([probabilities.log(), torch.tensor([9.0])])[None])
    trajectory = denoise(stub, torch.full((5000, 1), MASK), steps=1, temperature=temperature, generator=generator())
    counts = trajectory.tokens[-1].flatten().bincount(minlength=5)
    assert counts[MASK] == 0
    tempered = probabilities.double() ** (1 / temperature)
    assert chisquare(counts[:4], 5000 * tempered / tempered.sum()).pvalue > SMALLEST_P
    said = probabilities[trajectory.tokens[-1]]  # the model's probability, whatever the temperature
    assert torch.allclose(trajectory.probability, said)


def test_the_mask_is_never_chosen_however_likely_it_is() -> None:
    logits = torch.zeros(4, 5)
    logits[:, MASK] = 50.0
    for temperature in (0.0, 1.0, 30.0):
        start = torch.full((200, 4), MASK)
        final = denoise(Stub(logits), start, steps=2, temperature=temperature, generator=generator()).tokens[-1]
        assert not bool((final == MASK).any())


def test_the_mask_may_be_any_token() -> None:
    stub = Stub(torch.tensor([[9.0, 1.0, 2.0]]).repeat(2, 1), mask=0)
    assert denoise(stub, torch.tensor([[0, 1]]), steps=1).tokens[-1].tolist() == [[2, 1]]


def test_the_models_own_logits_are_left_alone() -> None:
    logits = torch.zeros(1, 4, 5)

    class Keeps(Stub):
        def __call__(self, tokens: Tensor) -> Tensor:
            return logits

    denoise(Keeps(logits[0]), torch.full((1, 4), MASK), steps=1)
    assert bool((logits == 0).all())


@pytest.mark.parametrize(
    ("options", "tokens", "steps", "message"),
    [
        ({"attention": "causal", "mask_token_id": 4}, [1, 4], 1, r"model: denoising needs bidirectional attention"),
        ({}, [1, 4], 1, r"model: .* and a mask_token_id; use an MDM"),
        ({"mask_token_id": 4}, [1, 4], 0, r"steps: 0 is too few; use at least 1"),
        ({"mask_token_id": 4, "readout_shift": -1}, [4, 1], 1, r"tokens: position 0 is masked"),
    ],
    ids=["causal", "no mask", "no steps", "position 0"],
)
def test_what_cannot_be_denoised_is_refused(options: dict, tokens: list[int], steps: int, message: str) -> None:
    model = HookedTransformer(ModelConfig(d_model=4, n_heads=1, d_vocab=5, n_ctx=2, **options))
    with pytest.raises(UserError, match=message):
        denoise(model, torch.tensor([tokens]), steps=steps)
