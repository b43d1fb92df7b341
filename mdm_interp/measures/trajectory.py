"""What a model does at the answer while the sentence around it is denoised.

    queries = [source_only(pair.reverse, model.cfg) for pair in pairs]
    watched = denoise_answers(model, queries, stages=5)       # queries with any tokens masked besides the answer
    watched.route                                             # [query stage layer]

The null is the same sentences with another fact's source (:func:`other_sources`, :func:`with_source`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mdm_interp.config import ModelConfig
from mdm_interp.data.queries import Query, QueryBatch, QueryPair, answer_positions, batches
from mdm_interp.inference.denoising import Trajectory, denoise
from mdm_interp.measures.capture import LayerView, capture, on_cpu
from mdm_interp.measures.evidence import readout_directions
from mdm_interp.measures.nulls import draw, of_unrelated_facts
from mdm_interp.models.bridge import hooked
from mdm_interp.models.layers import per_query_head
from mdm_interp.models.protocol import HookedModel
from mdm_interp.shards import shared_out

ENDINGS = ("correct", "probability", "filled_at")
"""What is known of each answer once it is filled."""


def source_only(query: Query, cfg: ModelConfig, special: Collection[int] = ()) -> Query:
    """Return the query with everything masked but its source, special tokens and, in a shifted model, position 0, which
    has no prediction.

    Args:
        special: The tokenizer's special tokens.
    """
    mask = query.tokens[query.answer_span[0]]
    given = {*range(*query.source_span), *range(-(cfg.readout_shift or 0))}
    tokens = [token if at in given or token in special else mask for at, token in enumerate(query.tokens)]
    return replace(query, tokens=tuple(tokens))


def with_source(query: Query, source: tuple[int, ...]) -> Query:
    """Return the query with another source, of any length."""
    (start, stop), (first, last) = query.answer_span, query.source_span
    tokens = (*query.tokens[:first], *source, *query.tokens[last:])
    moved = len(source) - (last - first) if start >= last else 0
    return Query(tokens, query.answer, (start + moved, stop + moved), (first, first + len(source)))


def other_sources(query_pairs: Sequence[QueryPair], n_ctx: int) -> list[tuple[int, ...] | None]:
    """Draw for every pair the source of an unrelated fact; None where there is none, or none that the context holds."""
    sources = [pair.forward.source for pair in query_pairs]
    longest = [max(len(pair.forward.tokens), len(pair.reverse.tokens)) for pair in query_pairs]
    others = of_unrelated_facts(query_pairs, [pair.side for pair in query_pairs], sources)
    fitting = [
        [source for source in of_others if length - len(own) + len(source) <= n_ctx]
        for own, length, of_others in zip(sources, longest, others, strict=True)
    ]
    return draw(fitting, seed=0)


@dataclass(frozen=True)
class Denoised:
    """What happened at the answers while their sentences were denoised. Stages are means over the states in which a
    token of the answer is still masked, NaN where there is no such state."""

    route: Float[Tensor, "query stage layer"]
    """Share of attention from readouts of the answer's masked tokens (mean) to the source (sum); mean over heads."""
    evidence: Float[Tensor, "query stage layer"]
    """What the source's values write toward the whole answer, summed over the tokens of both and over heads; the final
    norm's scale is left out."""
    filled_at: Float[Tensor, "query"]
    """Share of the way at which the answer's tokens were filled, mean over them."""
    probability: Float[Tensor, "query"]
    """Of the true tokens, just before their places were filled, mean over them."""
    correct: Float[Tensor, "query"]
    """Share of the answer's places that were filled with the true tokens."""

    @property
    def columns(self) -> dict[tuple[str, int | None, int | None], Float[Tensor, "query"]]:
        """Every value by measure, stage and layer. Without a layer it is that of all layers together, the mean of the
        routes and the sum of the evidence; endings have no stage either."""
        found: dict[tuple[str, int | None, int | None], Tensor] = {}
        for name, together in (("route", torch.mean), ("evidence", torch.sum)):
            values = getattr(self, name).double()
            for stage in range(values.shape[1]):
                found[name, stage, None] = together(values[:, stage], dim=-1)
                found |= {(name, stage, layer): values[:, stage, layer] for layer in range(values.shape[2])}
        return found | {(name, None, None): getattr(self, name) for name in ENDINGS}


@dataclass
class _Watched:
    """A model that keeps, of every pass, what its layers do at the answers of a batch."""

    model: HookedModel
    batch: QueryBatch
    toward: Float[Tensor, "query d_model"]
    """What raises the logits of an answer's tokens, summed over them."""
    layers: list[Float[Tensor, "2 query layer"]] = field(default_factory=list)
    """Route and evidence."""
    truth: list[Float[Tensor, "query span"]] = field(default_factory=list)
    """Probability of the true tokens."""

    @property
    def cfg(self) -> ModelConfig:
        return self.model.cfg

    def __call__(self, tokens: Int[Tensor, "query pos"], **given: Any) -> Float[Tensor, "query pos d_vocab"]:
        batch = self.batch
        masked = (tokens.gather(1, answer_positions(batch, self.cfg)) == self.cfg.mask_token_id) & batch.answered

        def reduce(view: LayerView) -> Float[Tensor, "2 query"]:
            there, toward = masked.to(view.v.device), self.toward.to(view.v.device)
            routed = (view.pattern * view.batch.source[:, None, None]).sum(-1).mean(-1)
            route = (routed * there).sum(1) / there.sum(1)  # NaN once nothing is masked
            W_O = self.model.blocks[view.layer].attn.W_O.to(toward)
            v = einsum(view.v, view.batch.source.to(view.v), "query pos kv_head d, query pos -> query kv_head d")
            v = per_query_head(v.to(toward), W_O.shape[0], dim=1)
            written = einsum(toward, W_O, "query d_model, head d d_model -> query head d")
            evidence = (v * written).sum((1, 2)).masked_fill(~there.any(1), torch.nan)
            return torch.stack([route.to(evidence), evidence])

        logits, layers = capture(self.model, replace(batch, tokens=tokens), reduce, all_logits=True)
        rows = batch.at_readout(logits)
        probs = rows.softmax(-1, dtype=self.toward.dtype).gather(-1, batch.answer[..., None]).squeeze(-1)
        self.layers.append(on_cpu(layers, dim=-1))
        self.truth.append(probs.cpu())
        return logits


@shared_out("queries")
@torch.no_grad()
def denoise_answers(model: HookedModel, queries: Sequence[Query], stages: int) -> Denoised:
    """Fill all the masks of every query, one per step, the most certain first, and watch its answer.

    Args:
        stages: Equal parts of the way from all masked to all filled.

    Raises:
        UserError: the model is no MDM, or does not say what its mask token is.
    """
    model, parts = hooked(model), []
    for batch in batches(queries, model.cfg):
        directions = readout_directions(model, batch.answer.flatten()).unflatten(0, batch.answer.shape)
        toward = (directions.to(batch.answered.device) * batch.answered[..., None]).sum(1)
        watched = _Watched(model, batch, toward)
        # With no fewer steps than masks, each step fills one.
        steps = batch.tokens.shape[1]
        trajectory = denoise(watched, batch.tokens, steps=steps, attention_mask=batch.attention_mask)
        parts.append(_summed_up(watched, trajectory, stages))
    return Denoised(*(torch.cat([getattr(part, name.name) for part in parts]) for name in fields(Denoised)))


def _summed_up(watched: _Watched, trajectory: Trajectory, stages: int) -> Denoised:
    batch, places = watched.batch, answer_positions(watched.batch, watched.cfg)
    answered, n_masks = batch.answered.cpu(), trajectory.filled_at.amax(1).cpu()
    layers, truth = torch.stack(watched.layers, dim=2), torch.stack(watched.truth, dim=1)  # [2 query step layer]
    stage = torch.arange(layers.shape[2]) * stages // n_masks[:, None]  # of the state before each step
    in_stage = [torch.where((stage == s)[None, ..., None], layers, torch.nan).nanmean(2) for s in range(stages)]
    route, evidence = torch.stack(in_stage, dim=2)
    filled_at, final = (x.gather(1, places).cpu() for x in (trajectory.filled_at, trajectory.tokens[-1]))
    before = (filled_at - 1).clamp(min=0)[:, None]
    ends = {
        "filled_at": filled_at / n_masks[:, None],
        "probability": truth.gather(1, before).squeeze(1),
        "correct": (final == batch.answer.cpu()).double(),
    }
    ends = {name: (values * answered).sum(1).double() / answered.sum(1) for name, values in ends.items()}
    return Denoised(route, evidence, **ends)
