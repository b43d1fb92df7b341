"""What the residual stream at the readout would answer after each layer, and what wrote the answer there.

    seen = lens(model, queries, others)
    seen.probability.effect                        # [query layer]: of the answer, if the model ended there
    seen.heads                                     # [query layer head]: nats that each head adds to the answer's logit

Where a model shifts its predictions, the readout is one before the mask. Formulas: docs/theory.md, section 15.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mdm_interp.data.queries import Query, QueryBatch, QueryPair, batches
from mdm_interp.errors import UserError
from mdm_interp.measures.evidence import readout_directions
from mdm_interp.measures.nulls import draw, of_unrelated_facts
from mdm_interp.models.bridge import hooked
from mdm_interp.models.inputs import forbid_mask, require_numbers
from mdm_interp.models.layers import precise
from mdm_interp.models.protocol import HookedModel
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.shards import shared_out
from mdm_interp.stats.estimates import Contrast

Other = tuple[int, ...] | None
"""An answer with as many tokens as a query's own; None where there is none."""


@dataclass(frozen=True)
class Lens:
    """Means over an answer's tokens, each read at its own readout. What is compared with another answer is NaN where
    there is none as long."""

    probability: Contrast[Float[Tensor, "query layer"]]
    """Of the answer, if the final norm and the unembedding came right after the layer; null: of the other answer."""
    correct: Float[Tensor, "query layer"]
    """Share of the tokens that are the likeliest there, the mask left out."""
    heads: Float[Tensor, "query layer head"]
    """Nats that a head adds to the answer's logits, less those it adds to the other answer's."""
    mlps: Float[Tensor, "query layer"]
    """The same of MLPs, or experts; 0 where there is none."""
    rest: Float[Tensor, "query"]
    """The same of all else: the embedding, and biases where there are any."""

    @property
    def appears(self) -> Float[Tensor, "query"]:
        """The first layer from which on all of the answer's tokens are the likeliest; NaN where the last has others."""
        wrong = (self.correct < 1).double()
        last_wrong = (wrong * torch.arange(1, wrong.shape[1] + 1)).amax(1)
        return last_wrong.masked_fill(wrong[:, -1] > 0, torch.nan)


def other_answers(query_pairs: Sequence[QueryPair], queries: Sequence[Query]) -> list[Other]:
    """Draw for the query of each pair the answer of an unrelated fact that is asked for the same side and has as many
    tokens."""
    answers = [query.answer for query in queries]
    unrelated = of_unrelated_facts(query_pairs, [pair.side for pair in query_pairs], answers)
    fitting = [
        [other for other in of_others if len(other) == len(own) and other != own]
        for own, of_others in zip(answers, unrelated, strict=True)
    ]
    return draw(fitting, seed=0)


@shared_out("queries", "others")
@torch.no_grad()
def lens(model: HookedModel, queries: Sequence[Query], others: Sequence[Other]) -> Lens:
    """Read every layer at the readout, and attribute the final logits to heads and MLPs.

    Attribution holds the final norm's scale as it is, so that its parts add up to the difference of the logits.

    Args:
        others: For each query, the answer that its own is compared with (:func:`other_answers`).

    Raises:
        UserError: there are no queries, or as many others as queries are not given.

    Source: docs/theory.md, section 15; nostalgebraist, "interpreting GPT: the logit lens", 2020; Elhage et al., A
    mathematical framework for transformer circuits, 2021.
    """
    if not queries or len(others) != len(queries):
        raise UserError(f"others: {len(others)} for {len(queries)} queries; give one for each of at least one query")
    model, parts, start = hooked(model), [], 0
    for batch in batches(queries, model.cfg):
        parts.append(_read(model, batch, others[start : start + len(batch.tokens)]))
        start += len(batch.tokens)
    probability, null, correct, heads, mlps, rest = (torch.cat(of_all) for of_all in zip(*parts, strict=True))
    return Lens(Contrast(probability, null), correct, heads, mlps, rest)


def read_out(model: HookedModel, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
    """Compute the logits of a residual stream as the last layer's are, past all hooks; in float32 at least."""
    if isinstance(model, HookedTransformer):
        return precise(model.unembed(model.ln_final(resid.to(model.W_U.device), hooked=False)))
    return precise(model.unembed(model.ln_final(resid)))


def _read(model: HookedModel, batch: QueryBatch, others: Sequence[Other]) -> tuple[Tensor, ...]:
    """Return the parts of a :class:`Lens` for one batch."""
    seen, n_layers = _rows(model, batch), model.cfg.n_layers
    there = model.W_U.device
    answer, answered = batch.answer.to(there), batch.answered.to(there)
    known = torch.tensor([other is not None for other in others], device=there)
    other = answer.clone()
    for row, tokens in enumerate(others):
        if tokens is not None:
            other[row, : len(tokens)] = torch.tensor(tokens, device=there)

    def mean(x: Float[Tensor, "query span"], of_other: bool = False) -> Float[Tensor, "query"]:
        averaged = (x.double() * answered).sum(1) / answered.sum(1)
        return averaged.masked_fill(~known, torch.nan) if of_other else averaged

    probability, null, correct = [], [], []
    for layer in range(n_layers):
        logits = read_out(model, seen[f"blocks.{layer}.hook_resid_post"])
        probs = logits.softmax(-1)
        first = forbid_mask(logits, None if model.cfg.is_causal else model.cfg.mask_token_id).argmax(-1)
        probability.append(mean(probs.gather(-1, answer[..., None]).squeeze(-1)))
        null.append(mean(probs.gather(-1, other[..., None]).squeeze(-1), of_other=True))
        correct.append(mean((first == answer).float()))
    toward = _directions(model, answer) - _directions(model, other)
    if "ln_final.hook_scale" in seen:
        toward = toward / seen["ln_final.hook_scale"].to(toward)
    total = mean(einsum(seen["last"].to(toward), toward, "query span d, query span d -> query span"), of_other=True)
    heads, mlps = [], []
    for layer in range(n_layers):
        W_O, z = model.blocks[layer].attn.W_O.to(toward), seen[f"blocks.{layer}.attn.hook_z"].to(toward)
        written = einsum(toward, W_O, "query span d, head d_head d -> query span head d_head")
        heads.append(torch.stack([mean(of_head, of_other=True) for of_head in (z * written).sum(-1).unbind(2)], 1))
        mlp = seen.get(f"blocks.{layer}.hook_mlp_out")
        added = torch.zeros_like(toward) if mlp is None else mlp.to(toward)
        mlps.append(mean((added * toward).sum(-1), of_other=True))
    by_layer = [torch.stack(of_layers, dim=1).cpu() for of_layers in (probability, null, correct, heads, mlps)]
    require_numbers(by_layer[0], model.cfg.dtype)
    rest = total.cpu() - by_layer[3].sum((1, 2)) - by_layer[4].sum(1)
    return (*by_layer, rest)


def _directions(model: HookedModel, tokens: Int[Tensor, "query span"]) -> Float[Tensor, "query span d_model"]:
    return readout_directions(model, tokens.flatten()).unflatten(0, tokens.shape)


def _rows(model: HookedModel, batch: QueryBatch) -> dict[str, Tensor]:
    """Run the model, and keep the readout rows of what a lens needs, by hook; `last` is what the final norm divides."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor, hook: HookPoint) -> None:  # a bridge's hooks have names of their own
        seen[name] = batch.to(x.device).at_readout(x)

    layers = range(model.cfg.n_layers)
    names = [
        f"blocks.{layer}.{hook}" for layer in layers for hook in ("hook_resid_post", "attn.hook_z", "hook_mlp_out")
    ]
    names.append("ln_final.hook_scale")
    hooks = [(name, partial(keep, name)) for name in names if name in model.hook_dict]
    model.run_with_hooks(batch.tokens, attention_mask=batch.attention_mask, fwd_hooks=hooks, readout=batch.readout)
    last = precise(seen[f"blocks.{layers[-1]}.hook_resid_post"])
    centred = last - last.mean(-1, keepdim=True) if model.cfg.normalization_type == "LN" else last
    return seen | {"last": centred}
