"""The paper's signatures of a model, each one number beside its null.

Evidence and the share of place are those of the layer where they are largest, and so are their nulls; routes are
averaged over layers and heads; gradients are of all layers together. Formulas: docs/theory.md, sections 2, 3, 5 and 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mdm_interp.data.queries import QueryPair
from mdm_interp.data.worlds import FactWorld
from mdm_interp.measures.evidence import as_share, compute_evidence, evidence_scores, place_index
from mdm_interp.measures.gradients.alignment import gradient_alignment
from mdm_interp.measures.gradients.components import STORAGE
from mdm_interp.measures.gradients.first_order import direction_cosine, mean_gradient
from mdm_interp.measures.nulls import two_before
from mdm_interp.measures.routes import route_correlation, score_correlation
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.estimates import Contrast


def evidence(model: HookedModel, query_pairs: Sequence[QueryPair], world: FactWorld) -> Contrast[float]:
    """Return the evidence for the true answer in the reverse query, in standard deviations above its role's mean; null:
    that for the answer of another fact.

    Source: docs/theory.md, section 2.
    """
    reverse = [pair.reverse for pair in query_pairs]
    return evidence_scores(model, reverse, world.candidates(reverse)).map(lambda scores: scores.max().item())


def position(model: HookedModel, query_pairs: Sequence[QueryPair], world: FactWorld) -> Contrast[float]:
    """Return the share of the variance of evidence that the two places of a pair make; null: with the reverse query of
    the pair two before in place of each pair's own.

    Args:
        query_pairs: One context per fact, in the order in which the world gives them.

    Source: docs/theory.md, section 7.
    """
    targets = torch.arange(world.config.n_entities)
    forward = compute_evidence(model, [pair.forward for pair in query_pairs], targets).sum(2)
    reverse = compute_evidence(model, [pair.reverse for pair in query_pairs], targets).sum(2)
    paired = Contrast(reverse, reverse[two_before(query_pairs)])
    return paired.map(lambda reverse: as_share(place_index(forward, reverse)).max().item())


def route(model: HookedModel, query_pairs: Sequence[QueryPair]) -> Contrast[float]:
    """Return the correlation of forward and mirrored reverse rows of scores; its null is 0, that of keys dealt at
    random.

    Source: docs/theory.md, section 3.
    """
    return Contrast(route_correlation(model, query_pairs).nanmean().item(), 0.0)


def score(model: HookedModel, query_pairs: Sequence[QueryPair]) -> Contrast[float]:
    """Return the correlation of raw forward and reverse scores at sources; null: with the reverse scores of other
    facts.

    Source: docs/theory.md, section 3.
    """
    return score_correlation(model, query_pairs).map(lambda correlation: correlation.nanmean().item())


def alignment(model: HookedModel, query_pairs: Sequence[QueryPair]) -> dict[str, Contrast[float]]:
    """Return two cosines of forward and reverse gradients in V and O: `alignment` is of each pair's own, mean over
    pairs, and its null of different facts'; `mean_alignment` is of the mean losses' gradients, and its null is 0.

    Source: docs/theory.md, section 5.
    """
    aligned = gradient_alignment(model, query_pairs)
    forward = mean_gradient(model, [pair.forward for pair in query_pairs])
    reverse = mean_gradient(model, [pair.reverse for pair in query_pairs])
    return {
        "alignment": aligned.pair_cosine(STORAGE).map(lambda cosine: cosine.nanmean().item()),
        "mean_alignment": Contrast(direction_cosine(forward, reverse, STORAGE), 0.0),
    }
