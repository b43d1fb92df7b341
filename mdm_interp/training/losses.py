"""Training losses of masked diffusion and of next-token prediction.

The masked loss follows LLaDA (arXiv 2502.09992, eq. 3): draw t ~ U(0, 1], mask every token with probability t, and
weight the cross-entropy of the masked tokens by 1/t.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mdm_interp.config import Objective
from mdm_interp.data.worlds import FactBatch


def mask_tokens(
    tokens: Int[Tensor, "batch pos"],
    mask_token_id: int,
    generator: torch.Generator,
    maskable: Bool[Tensor, "batch pos"] | None = None,
    rate: float | None = None,
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"], Float[Tensor, "batch 1"]]:
    """Mask each (maskable) token with probability t ~ U(0, 1], one t per sequence, or with one `rate` for all.

    Returns:
        The masked tokens, which ones were masked, and t.
    """
    t = 1 - torch.rand(len(tokens), 1, generator=generator) if rate is None else torch.full((len(tokens), 1), rate)
    masked = torch.rand(tokens.shape, generator=generator) < t
    masked = masked if maskable is None else masked & maskable
    return torch.where(masked, mask_token_id, tokens), masked, t


def mdm_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    masked: Bool[Tensor, "batch pos"],
    t: Float[Tensor, "batch 1"],
) -> Float[Tensor, ""]:
    """Compute the cross-entropy of the masked tokens in nats, weighted 1/t, divided by batch * length."""
    losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    return (losses.view_as(tokens) * masked / t).mean()


def arm_loss(logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Compute the next-token cross-entropy in nats, averaged over batch and positions."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Drawn(NamedTuple):
    """A batch as a model is trained on it: what it sees, and which tokens it is to predict. An ARM sees all."""

    inputs: Int[Tensor, "*member batch pos"]
    tokens: Int[Tensor, "*member batch pos"]
    masked: Bool[Tensor, "*member batch pos"]
    t: Float[Tensor, "*member batch 1"]
    """With which probability a token was to be predicted."""


def draw(
    batch: FactBatch,
    objective: Objective,
    model: Any,
    generator: torch.Generator,
    mask_rate: float | None = None,
) -> Drawn:
    """Draw what is masked of a batch under `objective`; all is on the CPU, as `generator` is.

    Args:
        mask_rate: As in :class:`~mdm_interp.config.TrainConfig`.
    """
    tokens = batch.tokens
    if objective == "causal":
        return Drawn(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool), torch.ones(len(tokens), 1))
    positions, mask = torch.arange(tokens.shape[1]), model.cfg.mask_token_id
    if objective == "left_to_right":  # one token of each sequence: all of them, on average
        first = (torch.rand(len(tokens), 1, generator=generator) * len(positions)).long()
        noisy = torch.where(positions >= first, mask, tokens)
        return Drawn(noisy, tokens, positions == first, torch.full((len(tokens), 1), 1 / len(positions)))
    maskable = None
    if objective != "any_order":
        maskable = positions == (batch.left if objective == "source_only" else batch.right)[:, None]
    noisy, masked, t = mask_tokens(tokens, mask, generator, maskable, mask_rate)
    return Drawn(noisy, tokens, masked, t)


def drawn_loss(logits: Float[Tensor, "batch pos d_vocab"], drawn: Drawn, objective: Objective) -> Float[Tensor, ""]:
    """Compute the loss of one batch from a model's logits."""
    if objective == "causal":
        return arm_loss(logits, drawn.tokens)
    return mdm_loss(logits, drawn.tokens, drawn.masked, drawn.t)


def training_loss(model: Any, batch: FactBatch, objective: Objective, generator: torch.Generator) -> Float[Tensor, ""]:
    """Compute the loss of one batch under `objective`; `generator` (on the CPU) draws the masks."""
    drawn = Drawn(*(tensor.to(model.cfg.device) for tensor in draw(batch, objective, model, generator)))
    return drawn_loss(model(drawn.inputs), drawn, objective)


class LastLosses:
    """The first and the last losses of a training, which tell whether it has exploded though all numbers are finite.

    It has if the median of the last 25 is above four times the first loss and above four times log(d_vocab), the loss
    of a model that knows nothing. More than half of those batches then give the right tokens probabilities below the
    fourth power of chance, which no model in training does, whatever it has yet to learn. Single batches do, as a rare
    small t weighs a token 1/t, and so might a mean with one of them in it.
    """

    LAST, FACTOR = 25, 4.0

    def __init__(self, d_vocab: int) -> None:
        self.of_chance, self.first = math.log(d_vocab), math.nan
        self.last = deque[float](maxlen=self.LAST)

    def add(self, loss: float) -> None:
        """Note the loss of a step; of every step, or of those that one looks at."""
        if math.isnan(self.first):
            self.first = loss
        self.last.append(loss)

    @property
    def exploded(self) -> bool:
        most = self.FACTOR * max(self.of_chance, self.first)
        return len(self.last) == self.LAST and median(self.last) > most

    def get_state(self) -> Float[Tensor, " loss"]:
        """Return what is to be saved with the weights, to go on from."""
        return torch.tensor([self.first, *self.last], dtype=torch.float64)

    def set_state(self, state: Float[Tensor, " loss"]) -> None:
        """Go on from what was saved."""
        self.first, *last = state.tolist()
        self.last = deque(last, maxlen=self.LAST)
