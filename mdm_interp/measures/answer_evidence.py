"""Evidence for names: what a source's value writes toward its own answer, against the answers of other facts.

A token that every source writes toward, or a source that writes toward every name, would look like knowledge. Both are
taken out: of every token the mean over sources, of every source the mean over the other answers. A token of an answer
that is in the source too, such as a family name, is left out where answers are compared: writing it is copying.

Sign and unit are those of :mod:`mdm_interp.measures.evidence`: positive raises the logits, the final norm's scale is
left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mdm_interp.data.queries import Query, QueryPair, batches
from mdm_interp.errors import UserError
from mdm_interp.measures.capture import LayerView, capture, on_cpu
from mdm_interp.measures.evidence import readout_directions
from mdm_interp.measures.nulls import next_answers
from mdm_interp.models.bridge import hooked
from mdm_interp.models.inputs import require_numbers
from mdm_interp.models.layers import per_query_head
from mdm_interp.models.protocol import HookedModel
from mdm_interp.shards import shared_out
from mdm_interp.stats.estimates import Contrast
from mdm_interp.stats.resampling import Draws, FactSample


@dataclass(frozen=True)
class AnswerEvidence:
    """Evidence that each query's source gives, per layer and head; without a head axis, all heads of a layer summed.

    NaN where there is nothing to compare: fewer than two other answers, or no token that the source lacks.
    """

    own: Float[Tensor, "query layer *head"]
    """Toward the answer: summed over its tokens and the source's, nothing taken out."""
    specific: Contrast[Float[Tensor, "query layer *head"]]
    """Toward the answer, beyond what other sources write toward it and what this one writes toward other answers; null:
    the same of another fact's answer in its place."""
    beaten: Contrast[Float[Tensor, "query layer *head"]]
    """Share of the other answers that the answer has more evidence than; ties count half. Null: the same of another
    fact's answer."""

    @classmethod
    def of(cls, judged: Float[Tensor, "5 query layer *head"]) -> AnswerEvidence:
        """Name what :meth:`_Contest.judge` computed."""
        own, specific, beaten, null_specific, null_beaten = judged
        return cls(own, Contrast(specific, null_specific), Contrast(beaten, null_beaten))


@torch.no_grad()
def answer_evidence(
    model: HookedModel, queries: Sequence[Query], contexts: Int[Tensor, "query"] | None = None
) -> tuple[AnswerEvidence, AnswerEvidence]:
    """Compute the evidence for each query's answer along the direct path, against the answers of the other queries in
    its context.

    Only values at the source are kept of a forward pass, and only the answers' rows of the unembedding are read.

    Args:
        queries: Those with the same source are not compared with each other.
        contexts: Which queries are asked in the same way; default: all.

    Returns:
        By head, and with all heads of a layer summed.

    Raises:
        UserError: there are no queries.

    Source: docs/theory.md, section 11.
    """
    if not queries:
        raise UserError("queries: evidence for answers needs several queries, got none")
    model = hooked(model)
    contexts = torch.zeros(len(queries), dtype=torch.long) if contexts is None else contexts
    contests = [_Contest.of(model, queries, (contexts == context).nonzero().flatten()) for context in contexts.unique()]
    by_head, by_layer = [], []
    for layer, v in enumerate(_source_values(model, queries)):
        W_O = model.blocks[layer].attn.W_O
        v = per_query_head(v, W_O.shape[0], dim=1).to(model.W_U.device)
        of_heads, of_layer = v.new_empty(5, *v.shape[:2]), v.new_empty(5, *v.shape[:1])
        for contest in contests:
            written = contest.written(v[contest.members], W_O)
            of_heads[:, contest.members] = contest.judge(written).mT
            of_layer[:, contest.members] = contest.judge(written.sum(0))
        by_head.append(of_heads)
        by_layer.append(of_layer)
    heads, layers = on_cpu(by_head, dim=2), on_cpu(by_layer, dim=2)
    require_numbers(layers[0], model.cfg.dtype)  # where values are not, logits are not
    return AnswerEvidence.of(heads), AnswerEvidence.of(layers)


def fact_place_index(
    forward: Float[Tensor, "pair layer"],
    reverse: Float[Tensor, "pair layer"],
    query_pairs: Sequence[QueryPair],
    sample: FactSample,
) -> Draws:
    """Compute how much a layer's evidence depends on place: its variance over the two places of a pair, over its
    variance over facts within contexts; NaN where pairs share no source.

    In one context it is :func:`~mdm_interp.measures.evidence.place_index` of a single target.

    Args:
        forward: Each source's evidence for its own answer, where the forward query has it.
        reverse: The same where the reverse query has it.

    Source: docs/theory.md, section 7.
    """
    if not all(pair.shared for pair in query_pairs):
        return Draws.nothing(forward.shape[1:])
    middle = (forward + reverse) / 2
    for context in sample.members():
        middle[context] -= middle[context].mean(0)
    return sample.ratio(((forward - reverse) / 2).pow(2), middle.pow(2))


@dataclass(frozen=True)
class _Contest:
    """The queries of one context, the answers that each one's own is compared with, and by which tokens."""

    members: Int[Tensor, "query"]
    """Which of all queries they are."""
    directions: Float[Tensor, "token d_model"]
    """Of every token of their answers."""
    counts: Float[Tensor, "answer token"]
    """How often each token is in an answer."""
    counted: Float[Tensor, "query token"]
    """0 where the source has the token."""
    own: Int[Tensor, "query"]
    other: Int[Tensor, "query"]
    """The rival that is the null (:func:`~mdm_interp.measures.nulls.next_answers`)."""
    against: Float[Tensor, "query answer"]
    """1 where the own answer and the other are compared with this one."""

    @classmethod
    def of(cls, model: HookedModel, all_queries: Sequence[Query], members: Int[Tensor, "query"]) -> _Contest:
        queries = [all_queries[member] for member in members.tolist()]
        answers = {answer: at for at, answer in enumerate(dict.fromkeys(query.answer for query in queries))}
        sources = {source: at for at, source in enumerate(dict.fromkeys(query.source for query in queries))}
        tokens = torch.tensor(sorted({token for answer in answers for token in answer}))
        counts = torch.stack([(torch.tensor(answer)[:, None] == tokens).sum(0) for answer in answers]).float()
        counted = torch.stack([~torch.isin(tokens, torch.tensor(query.source)) for query in queries]).float()
        own = torch.tensor([answers[query.answer] for query in queries])
        source = torch.tensor([sources[query.source] for query in queries])
        linked = torch.zeros(len(sources), len(answers), dtype=torch.bool)
        linked[source, own] = True
        rivals = ~linked[source] & (counted @ counts.T > 0)
        other = next_answers(own, rivals)
        against = rivals.float().scatter(1, other[:, None], 0.0)
        directions = readout_directions(model, tokens.to(model.W_U.device))
        members, *parts = (part.to(directions.device) for part in (members, counts, counted, own, other, against))
        return cls(members, directions, *parts)

    def written(
        self, v: Float[Tensor, "query head d_head"], W_O: Float[Tensor, "head d_head d_model"]
    ) -> Float[Tensor, "head query token"]:
        """Return what each head writes toward every token."""
        return v.transpose(0, 1).to(self.directions) @ (W_O.to(self.directions) @ self.directions.T)

    def judge(self, written: Float[Tensor, "*head query token"]) -> Float[Tensor, "5 *head query"]:
        """Compute the measures of :class:`AnswerEvidence` from what heads, or all of a layer, write toward every token:
        all of the answer, then those that another fact's answer has too."""
        counts, counted, against = (part.to(written) for part in (self.counts, self.counted, self.against))
        usual = (written * counted).sum(-2, keepdim=True) / counted.sum(0).clamp(min=1)
        toward = ((written - usual) * counted) @ counts.T  # [*head query answer]
        each, compared = torch.arange(len(self.own), device=toward.device), against.sum(1)
        undefined = (compared == 0) | ((counted * counts[self.own]).sum(1) == 0)
        judged = [(written * counts[self.own]).sum(-1)]
        for chosen in (self.own, self.other):
            given = toward[..., each, chosen, None]
            beaten = (toward < given).to(toward) + 0.5 * (toward == given).to(toward)
            for number in (
                given.squeeze(-1) - (toward * against).sum(-1) / compared,
                (beaten * against).sum(-1) / compared,
            ):
                judged.append(number.masked_fill(undefined, torch.nan))
        return torch.stack(judged)


@shared_out("queries")
@torch.no_grad()
def _source_values(model: HookedModel, queries: Sequence[Query]) -> list[Float[Tensor, "query kv_head d_head"]]:
    """Return the values at each query's source, summed over its tokens; one entry per layer."""

    def read(view: LayerView) -> Float[Tensor, "query kv_head d_head"]:
        source = view.batch.source.to(view.v)
        return einsum(view.v, source, "query pos kv_head d_head, query pos -> query kv_head d_head")

    kept = [capture(model, batch, read)[1] for batch in batches(queries, model.cfg)]
    return [torch.cat(of_layer) for of_layer in zip(*kept, strict=True)]
