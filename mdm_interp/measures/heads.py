"""Heads: what each brings to an answer, and whether it serves one side of the readout only.

A head's *contribution* to a query is its routes times its evidence, summed over all key positions, toward the answer
less the mean over other tokens, in logits: positive means that the head raises the answer's logit above the others'.
Formulas: docs/theory.md, section 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mdm_interp.data.queries import Query, QueryPair, batches, require_shared
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.measures.evidence import compute_evidence, decompose_logits
from mdm_interp.measures.routes import compute_routes
from mdm_interp.models.bridge import hooked
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.correlations import correlate
from mdm_interp.stats.estimates import LEVEL, Contrast

N_EXCHANGES = 200
"""Random exchanges of forward and reverse contributions that a null is made of."""


@dataclass(frozen=True)
class Contributions:
    """What each head brings to a pair's two queries, in logits."""

    forward: Float[Tensor, "pair layer head"]
    reverse: Float[Tensor, "pair layer head"]
    asks_left: Bool[Tensor, "pair"]
    """Whether the answer is the left entity of its fact: the forward query's source is then right of its mask."""

    def means(self) -> tuple[Float[Tensor, "side layer head"], Float[Tensor, "side layer head"]]:
        """Return the mean forward and the mean reverse contribution to left and to right answers, in this order; NaN
        where no pair asks for that side."""
        sides = self.asks_left, ~self.asks_left
        forward, reverse = (torch.stack([x[asked].mean(0) for asked in sides]) for x in (self.forward, self.reverse))
        return forward, reverse

    def shares(self) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
        """Return each head's mean forward and reverse contribution over the sum of all heads' absolute ones, -1 to 1;
        they add up to 1 where no head lowers the answers' logits."""
        forward, reverse = (x.mean(0) / x.mean(0).abs().sum() for x in (self.forward, self.reverse))
        return forward, reverse


def compute_contributions(
    model: HookedModel, query_pairs: Sequence[QueryPair], others: Int[Tensor, "pair other"]
) -> Contributions:
    """Measure each head's contribution to the answers of forward and reverse queries.

    Summed over heads, and with the same of embedding, MLPs and biases, it is the difference in logits exactly.

    Args:
        query_pairs: Of one answer token each.
        others: The tokens that each answer is compared with. The entities of its role (`FactWorld.candidates`) tell
            whether a head knows the fact; a single wrong token tells what it holds against that one.

    Raises:
        UserError: there are no pairs, their queries do not share answer and source (an ARM's), or an answer has
            several tokens.

    Source: docs/theory.md, section 12.
    """
    tokens, contrast = _contrast(query_pairs, others)
    forward, reverse = (
        _contribution(hooked(model), queries, tokens, contrast)
        for queries in ([pair.forward for pair in query_pairs], [pair.reverse for pair in query_pairs])
    )
    return Contributions(forward, reverse, _asks_left(query_pairs))


@dataclass(frozen=True)
class Specialisation:
    """How far heads serve one side only, 0 (both alike) to 1 (one only), beside what it would be if sides had no
    effect: the contributions of each pair's two queries exchanged at random, for all heads at once. Nulls have an axis
    of draws in front."""

    head: Contrast[Float[Tensor, "*draw layer head"]]
    model: Contrast[Float[Tensor, "*draw"]]
    """Of all heads together."""

    def side_specific(self) -> Bool[Tensor, "layer head"]:
        """Tell which heads are more one-sided than 95 % of their null."""
        return self.head.effect > _exceeded(self.head.null)


def _exceeded(null: Float[Tensor, "draw *place"]) -> Float[Tensor, "*place"]:
    """Return what 95 % of a null stay below."""
    return null.nanquantile(LEVEL, dim=0)


def specialisation(contributions: Contributions, seed: int = 0) -> Specialisation:
    """Compute the specialisation index of each head and of the whole model, with mean F forward and R reverse
    contribution to the answers of side a:

        sum_a |F_a - R_a| / sum_a (|F_a| + |R_a|),

    for the whole model with both sums over heads too. It is NaN for a head that contributes nothing.

    Source: docs/theory.md, section 12.
    """
    apart, together = contributions.forward - contributions.reverse, contributions.forward + contributions.reverse
    generator = torch.Generator().manual_seed(seed)
    exchanged = torch.rand(N_EXCHANGES, len(apart), generator=generator) < 0.5
    sign = torch.cat([exchanged.new_zeros(1, len(apart)), exchanged]).to(apart) * -2 + 1
    above, below = torch.zeros(2, len(sign), *apart.shape[1:], dtype=apart.dtype)
    for asked in filter(Tensor.any, (contributions.asks_left, ~contributions.asks_left)):
        difference = einsum(sign[:, asked], apart[asked], "draw pair, pair layer head -> draw layer head").abs()
        above = above + difference / asked.sum()
        # |F| + |R| is the larger of |F + R| and |F - R|, and exchanging leaves F + R as it is.
        below = below + torch.maximum(difference, together[asked].sum(0).abs()) / asked.sum()
    head, model = above / below, above.sum((1, 2)) / below.sum((1, 2))
    return Specialisation(Contrast(head[0], head[1:]), Contrast(model[0], model[1:]))


@dataclass(frozen=True)
class Reading:
    """What each head reads of the source and what it stores about it."""

    right: Float[Tensor, "layer head"]
    """Share of attention that a source right of the readout gets, mean over forward and reverse queries."""
    left: Float[Tensor, "layer head"]
    """The same of a source left of the readout."""
    left_evidence: Float[Tensor, "layer head"]
    """Mean evidence for left answers, whose source training shows on the right of the readout."""
    right_evidence: Float[Tensor, "layer head"]
    """Mean evidence for right answers, whose source training shows on the left of the readout."""
    follows: Float[Tensor, "layer head"]
    """Correlation over pairs of evidence with how much more attention the source gets in the forward than in the
    reverse query. Positive: the head stores more about the sources that it attends to from their trained side only.
    0 where what is stored does not depend on the side."""
    model_follows: Float[Tensor, ""]
    """The same over all pairs and heads, each head about its own mean."""


def compute_reading(model: HookedModel, query_pairs: Sequence[QueryPair], others: Int[Tensor, "pair other"]) -> Reading:
    """Measure what each head attends to from either side, what evidence it holds for the answers of either side, and
    whether the second follows the first. Evidence is unrouted, for the answer less the mean of `others`, where the
    source is in the forward query.

    Raises:
        UserError: there are no pairs, their queries do not share answer and source (an ARM's), or an answer has
            several tokens.

    Source: docs/theory.md, section 12.
    """
    tokens, contrast = _contrast(query_pairs, others)
    forward, reverse = [pair.forward for pair in query_pairs], [pair.reverse for pair in query_pairs]
    evidence = compute_evidence(model, forward, tokens)
    evidence = einsum(evidence, contrast.to(evidence), "pair layer head token, pair token -> pair layer head")
    routes = compute_routes(model, [*forward, *reverse]).pattern
    stands_right = torch.tensor([query.offset > 0 for query in (*forward, *reverse)])
    asks_left = _asks_left(query_pairs)
    more = routes[: len(forward)] - routes[len(forward) :]
    centred = [(x - x.mean(0)).flatten() for x in (more, evidence)]
    return Reading(
        right=routes[stands_right].mean(0),
        left=routes[~stands_right].mean(0),
        left_evidence=evidence[asks_left].mean(0),
        right_evidence=evidence[~asks_left].mean(0),
        follows=correlate(more, evidence),
        model_follows=correlate(*centred),
    )


def compare_heads(
    model: HookedModel, query_pairs: Sequence[QueryPair], world: FactWorld
) -> tuple[dict[str, Float[Tensor, "layer head"]], dict[str, Float[Tensor, ""]]]:
    """Measure all of this for each head, by name, and for the whole model, and count the side-specific heads.

    `index`, with the mean of its null and what 95 % of that stay below (`…_null`, `…_null_high`), is of contributions
    within the answer's role, `rival_index` of those against the source's other partner; `specific` is 1 for a
    side-specific head. Contributions (`forward_left`, `reverse_rival`, …) and evidence are means over pairs, in logits.
    `left` and `right` are the answer's side in its fact, except in `attention_…`, where they are the source's side of
    the readout.

    Args:
        query_pairs: Of `world`, a relation_cycle (:meth:`~mdm_interp.data.worlds.FactWorld.rivals`).

    Raises:
        UserError: as in :func:`compute_contributions`.

    Source: docs/theory.md, section 12.
    """
    candidates = world.candidates([pair.forward for pair in query_pairs])
    rivals = world.rivals([pair.reverse for pair in query_pairs])
    role, rival = (compute_contributions(model, query_pairs, others) for others in (candidates, rivals))
    reading = compute_reading(model, query_pairs, candidates)
    of_role, of_rival = specialisation(role), specialisation(rival)
    heads = {
        "specific": of_role.side_specific().double(),
        **{
            f"{query}_{side}": mean
            for query, means in zip(("forward", "reverse"), role.means(), strict=True)
            for side, mean in zip(("left", "right"), means, strict=True)
        },
        **dict(zip(("forward_share", "reverse_share"), role.shares(), strict=True)),
        **{"forward_rival": rival.forward.mean(0), "reverse_rival": rival.reverse.mean(0)},
        **{"attention_right": reading.right, "attention_left": reading.left},
        **{"evidence_left": reading.left_evidence, "evidence_right": reading.right_evidence},
        **_indices(of_role.head, of_rival.head),
        "follows": reading.follows,
    }
    whole = {**_indices(of_role.model, of_rival.model), "follows": reading.model_follows}
    return heads, {**whole, "specific_heads": heads["specific"].sum()}


def _indices(
    role: Contrast[Float[Tensor, "..."]], rival: Contrast[Float[Tensor, "..."]]
) -> dict[str, Float[Tensor, "*place"]]:
    return {
        "index": role.effect,
        "index_null": role.null.nanmean(0),
        "index_null_high": _exceeded(role.null),
        "rival_index": rival.effect,
        "rival_index_null": rival.null.nanmean(0),
    }


def _asks_left(query_pairs: Sequence[QueryPair]) -> Bool[Tensor, "pair"]:
    return torch.tensor([pair.side == "left" for pair in query_pairs])


def _contrast(
    query_pairs: Sequence[QueryPair], others: Int[Tensor, "pair other"]
) -> tuple[Int[Tensor, "token"], Float[Tensor, "pair token"]]:
    """Return the tokens that answers are compared with, and the weights that take each pair's answer less the mean of
    its others."""
    require_shared(query_pairs, "what a head brings to both queries")
    longest = max(len(pair.forward.answer) for pair in query_pairs)
    if longest > 1:
        raise UserError(f"query_pairs: an answer has {longest} tokens; heads are compared for answers of one token")
    answers = torch.tensor([pair.forward.answer for pair in query_pairs])
    tokens, columns = torch.cat([answers, others], dim=1).unique(return_inverse=True)
    weights = torch.full(columns.shape, -1 / others.shape[1], dtype=torch.float64)
    weights[:, 0] = 1
    return tokens, torch.zeros(len(answers), len(tokens), dtype=torch.float64).scatter_add(1, columns, weights)


@torch.no_grad()
def _contribution(
    model: HookedModel, queries: Sequence[Query], tokens: Int[Tensor, "token"], contrast: Float[Tensor, "query token"]
) -> Float[Tensor, "query layer head"]:
    collected, tokens = [], tokens.to(model.W_U.device)
    for batch in batches(queries, model.cfg):
        written = decompose_logits(model, batch, tokens).heads[:, 0].sum(3).cpu()
        weights, contrast = contrast[: len(written)].to(written), contrast[len(written) :]
        collected.append(einsum(written, weights, "query layer head token, query token -> query layer head"))
    return torch.cat(collected)
