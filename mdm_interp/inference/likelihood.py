"""The likelihood of sentences, or of a part of them given the rest, as masked diffusion models bound it.

told = bound(model, [query.statement for query in queries], [query.answer_span for query in queries])
told.value, told.error                         # nats, and the standard error over the draws
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mdm_interp.data.queries import Span
from mdm_interp.data.sentences import mask_copies
from mdm_interp.inference.prediction import answer_loss
from mdm_interp.models.bridge import hooked
from mdm_interp.models.inputs import require_numbers
from mdm_interp.shards import shared_out

N_DRAWS = 128
"""As many as LLaDA's evaluation takes."""


@dataclass(frozen=True)
class Likelihood:
    """An estimate of a lower bound on log-probabilities, in nats; of a causal model these themselves."""

    value: Float[Tensor, "sentence"]
    error: Float[Tensor, "sentence"]
    """The standard error over the draws, which are spread over the numbers of masks and so err less; 0 of a causal
    model, NaN for a single draw."""
    n_draws: int
    seed: int


@shared_out("sentences", "spans")
@torch.no_grad()
def bound(
    model: Any,
    sentences: Sequence[Sequence[int]],
    spans: Sequence[Span] | None = None,
    *,
    n_draws: int = N_DRAWS,
    seed: int = 0,
    kept: Collection[int] = (),
) -> Likelihood:
    """Estimate the masked-diffusion bound on each sentence's log-probability, or on that of a span given the rest.

    Of the L tokens asked for, l are masked at random, and their log-probability counts L / l times; the numbers l are
    spread evenly over the draws. This is the form of LLaDA's evaluation.

    Args:
        spans: What of each sentence is asked for; default: all of it.
        seed: Draws the masks.
        kept: Tokens that are never masked, such as special ones.

    Raises:
        UserError: there are no sentences or no draws, or a sentence has too many tokens, none to predict, or one
            outside of the vocabulary.

    Source: arXiv 2502.09992, eq. 6.
    """
    model = hooked(model)
    copies = mask_copies(sentences, model.cfg, n_draws=n_draws, seed=seed, kept=kept, spans=spans)
    losses = [
        require_numbers(
            answer_loss(model(batch.tokens, attention_mask=batch.attention_mask, readout=batch.readout), batch),
            model.cfg.dtype,
        )
        for batch in copies.batches
    ]
    each = -(torch.cat(losses).double() * copies.weight)
    each = each.view(len(sentences), -1) * (1 if model.cfg.is_causal else n_draws)
    error = (each.var(1, correction=0) / (n_draws - 1)).sqrt()  # a single draw: 0 / 0
    return Likelihood(each.mean(1), torch.zeros_like(error) if model.cfg.is_causal else error, n_draws, seed)
