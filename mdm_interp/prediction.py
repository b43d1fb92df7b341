"""What a model answers to a query: log-probability, rank and accuracy of the true answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mdm_interp.queries import Query, QueryBatch, batches


@dataclass(frozen=True)
class Prediction:
    """One entry per query."""

    log_probability: Float[Tensor, "query"]
    """Nats; summed over the answer's tokens."""
    rank: Int[Tensor, "query"]
    """1 is the model's first choice; of several tokens, the worst. Ties count against the answer."""

    @property
    def probability(self) -> Float[Tensor, "query"]:
        return self.log_probability.exp()

    @property
    def correct(self) -> Bool[Tensor, "query"]:
        """Whether every token of the answer is the model's first choice."""
        return self.rank == 1


def query_loss(logits: Float[Tensor, "query pos d_vocab"], batch: QueryBatch) -> Float[Tensor, "query"]:
    """Negative log-probability of each answer, in nats, summed over its tokens."""
    log_probs = batch.at_readout(logits).log_softmax(-1)
    chosen = log_probs.gather(-1, batch.answer[..., None]).squeeze(-1)
    return -(chosen * batch.answered).sum(-1)


@torch.no_grad()
def predict(model: Any, queries: Sequence[Query]) -> Prediction:
    """Ask `model` every query."""
    log_probability, rank = [], []
    for batch in batches(queries, model.cfg):
        logits = model(batch.tokens, attention_mask=batch.attention_mask)
        log_probability.append(-query_loss(logits, batch))
        rows = batch.at_readout(logits)
        beaten_by = (rows >= rows.gather(-1, batch.answer[..., None])).sum(-1)  # the answer itself included
        rank.append((beaten_by * batch.answered).amax(-1))
    return Prediction(torch.cat(log_probability).cpu(), torch.cat(rank).cpu())
