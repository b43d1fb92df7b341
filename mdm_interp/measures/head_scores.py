"""Head scores: of every head, the numbers by which it is worth looking at, for each query pair.

    found = head_scores(model, query_pairs)
    found.by_pair["reverse route"]                 # [pair layer head]
    found.over_pairs["odd share"]                  # [layer head]
    found.undefined                                # {"odd share": "query_pairs: …"}: an ARM's pairs share no source

All but the odd share are averaged over pairs; that is a share of energies, which add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.errors import UserError
from mdm_interp.measures.evidence import compute_evidence
from mdm_interp.measures.gradients import ROUTING, STORAGE, gram
from mdm_interp.measures.lens import lens, other_answers
from mdm_interp.measures.parity import score_parity
from mdm_interp.measures.routes import compute_routes
from mdm_interp.measures.sinks import sinks
from mdm_interp.models.bridge import hooked
from mdm_interp.models.protocol import HookedModel

SCORES = {
    "forward route": "share of its attention that the readout gives the source, in the forward query",
    "reverse route": "share of its attention that the readout gives the source, in the reverse query",
    "odd share": "share of the score's energy that tells left from right: 0 when sides do not matter",
    "forward evidence": "what the source's value writes toward the answer's logit, before the final norm, forward",
    "reverse evidence": "what the source's value writes toward the answer's logit, before the final norm, in reverse",
    "forward attribution": "what the head adds to the answer's logit, less another fact's answer, forward",
    "reverse attribution": "what the head adds to the answer's logit, less another fact's answer, in reverse",
    "sink share": "share of the readout's attention that sinks take, mean over both queries",
    "storage alignment": "cosine of the forward and the reverse gradient of V and O; of the layer, its heads together",
    "routing alignment": "cosine of the forward and the reverse gradient of Q and K; of the layer, its heads together",
}
"""What each score says. The two alignments are one number for a layer, repeated for its heads."""


@dataclass(frozen=True)
class HeadScores:
    """Scores by the names of :data:`SCORES`; NaN where a head has none."""

    by_pair: dict[str, Float[Tensor, "pair layer head"]]
    over_pairs: dict[str, Float[Tensor, "layer head"]]
    undefined: dict[str, str]
    """Why a score is not there, as the measure that refuses says it."""


def head_scores(model: HookedModel, query_pairs: Sequence[QueryPair]) -> HeadScores:
    """Score every head. Hooks on the model act.

    Raises:
        UserError: there are no pairs, or the model cannot be asked them.
    """
    if not query_pairs:
        raise UserError("query_pairs: heads are scored by what they do with some pair, got none; give one or more")
    model = hooked(model)
    forward, reverse = [pair.forward for pair in query_pairs], [pair.reverse for pair in query_pairs]
    found: dict[str, Float[Tensor, "pair layer head"]] = {}
    undefined: dict[str, str] = {}
    for side, queries in (("forward", forward), ("reverse", reverse)):
        found[f"{side} route"] = compute_routes(model, queries).pattern
        found[f"{side} evidence"] = _evidence(model, queries)
        found[f"{side} attribution"] = lens(model, queries, other_answers(query_pairs, queries)).heads
    gradients = gram(model, forward, reverse)
    for name, components in (("storage alignment", STORAGE), ("routing alignment", ROUTING)):
        layers = [gradients.cosine(components, [layer]).diagonal() for layer in range(model.cfg.n_layers)]
        found[name] = torch.stack(layers, dim=1)[..., None].expand(-1, -1, model.cfg.n_heads)
    try:
        found["sink share"] = (sinks(model, forward).readout + sinks(model, reverse).readout) / 2
    except UserError as error:
        undefined["sink share"] = str(error)
    over_pairs = {name: scores.nanmean(0) for name, scores in found.items()}
    try:
        parity = score_parity(model, query_pairs)
    except UserError as error:
        undefined["odd share"] = str(error)
    else:
        found["odd share"] = parity.odd**2 / (parity.even**2 + parity.odd**2)
        over_pairs["odd share"] = parity.selectivity()
    names = [name for name in SCORES if name in found]
    return HeadScores({name: found[name] for name in names}, {name: over_pairs[name] for name in names}, undefined)


def _evidence(model: HookedModel, queries: Sequence[Query]) -> Float[Tensor, "query layer head"]:
    """Compute the evidence that each query's source gives for all tokens of the query's own answer together."""
    targets = torch.tensor(sorted({token for query in queries for token in query.answer}))
    times = torch.stack([(targets == token).double() for query in queries for token in query.answer])
    own = torch.stack([of_query.sum(0) for of_query in times.split([len(query.answer) for query in queries])])
    evidence = compute_evidence(model, queries, targets)
    return einsum(evidence, own.to(evidence), "query layer head target, query target -> query layer head")
