"""Representations: whether the forward and the reverse query of a fact end in one, or in two that share nothing.

A query's *representation* is the normalised final residual at its readout, less the mean over all queries of its
direction: what a whole direction shares says nothing about a fact. One entry per fact predicts that both queries of a
fact lie closer than those of other facts, and that a linear probe trained on forward queries reads reverse ones. Two
entries predict neither, while a probe trained on reverse queries still reads them.

A source and a relation determine the answer, so a probe may read them instead of anything stored: an untrained model
says how well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mdm_interp.data.queries import Query, QueryPair, batches, require_shared
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.models.bridge import hooked
from mdm_interp.models.protocol import HookedModel
from mdm_interp.stats.estimates import Contrast

RIDGE = 0.01
"""Penalty of a probe, as a share of the mean variance per dimension."""
N_PERMUTATIONS = 20
"""Permutations of the labels that a probe's null is made of."""


@torch.no_grad()
def compute_representations(model: HookedModel, queries: Sequence[Query]) -> Float[Tensor, "query d_model"]:
    """Return the normalised final residual at each query's first readout position, less its mean over the queries."""
    model, read = hooked(model), []
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    name = last if model.cfg.normalization_type is None else "ln_final.hook_normalized"
    for batch in batches(queries, model.cfg):
        _, cache = model.run_with_cache(batch.tokens, attention_mask=batch.attention_mask, names_filter=[name])
        read.append(batch.at_readout(cache[name])[:, 0].double().cpu())
    stacked = torch.cat(read)
    return stacked - stacked.mean(0)


class Questions:
    """Query pairs by what they ask. A question is a fact and the side of its answer, asked in several contexts."""

    def __init__(self, query_pairs: Sequence[QueryPair], world: FactWorld) -> None:
        """Group pairs.

        Args:
            query_pairs: Of `world`, each question in as many contexts as any other.

        Raises:
            UserError: there are no pairs, their queries do not share answer and source (an ARM's), or a question has
                one context only or fewer than another.
        """
        require_shared(query_pairs, "what two questions share")
        places: dict[tuple[int, str], list[int]] = {}
        for place, pair in enumerate(query_pairs):
            places.setdefault((pair.fact, pair.side), []).append(place)
        counts = sorted(map(len, places.values()))
        if counts[0] < 2 or counts[0] < counts[-1]:
            raise UserError(
                f"query_pairs: questions are asked in {counts[0]} to {counts[-1]} contexts; ask each in as many as the "
                "others, and in two or more"
            )
        asked = [query_pairs[first] for first, *_ in places.values()]
        self.places: Int[Tensor, "question context"] = torch.tensor(list(places.values()))
        """Where a question's queries are among those of all pairs."""
        self.fact: Int[Tensor, "question"] = torch.tensor([pair.fact for pair in asked])
        self.answer: Int[Tensor, "question"] = torch.tensor([pair.forward.answer[0] for pair in asked])
        self.source: Int[Tensor, "question"] = torch.tensor([pair.forward.source[0] for pair in asked])
        relations = [int(world.facts[pair.fact, 1]) for pair in asked]
        self.kind: Int[Tensor, "question"] = torch.tensor(
            [2 * relation + (pair.side == "right") for relation, pair in zip(relations, asked, strict=True)]
        )
        """A number for the relation and the side that is asked for."""
        self.candidates: Int[Tensor, "question candidate"] = world.candidates([pair.forward for pair in asked])
        """The entities of the answer's role."""

    def halves(
        self, x: Float[Tensor, "query d"]
    ) -> tuple[Float[Tensor, "question _ d"], Float[Tensor, "question _ d"]]:
        """Arrange what belongs to the pairs' queries by question and context, and split the contexts into halves."""
        half = self.places.shape[1] // 2
        return x[self.places[:, :half]], x[self.places[:, half:]]

    def shared(self) -> dict[str, Bool[Tensor, "question other"]]:
        """Tell which question is which other one's (`same_fact`), and which ones of another fact have the same answer,
        source, or relation and side (`same_answer`, `same_source`, `same_relation`)."""

        def same(x: Int[Tensor, "question"]) -> Bool[Tensor, "question other"]:
            return x[:, None] == x[None, :]

        elsewhere = ~same(self.fact)
        return {
            "same_fact": ~elsewhere & same(self.kind),
            "same_answer": elsewhere & same(self.answer),
            "same_source": elsewhere & same(self.source),
            "same_relation": elsewhere & same(self.kind),
        }


def mean_cosines(
    forward: Float[Tensor, "query d_model"], reverse: Float[Tensor, "query d_model"], questions: Questions
) -> dict[str, float]:
    """Return the mean cosine of forward representations with the reverse ones of questions that share something
    (:meth:`Questions.shared`), and with forward ones of the same question (`other_context`, the ceiling); always of two
    contexts. `same_relation` is the null of `same_fact`."""
    early, late = (half.mean(1) for half in questions.halves(torch.nn.functional.normalize(forward, dim=-1)))
    _, reverse_late = questions.halves(torch.nn.functional.normalize(reverse, dim=-1))
    cosine = early @ reverse_late.mean(1).T  # of the means of unit vectors: the mean over contexts of the cosines
    ceiling = (early * late).sum(-1).mean().item()
    return {"other_context": ceiling} | {name: cosine[mask].mean().item() for name, mask in questions.shared().items()}


def probe_accuracy(
    trained: Float[Tensor, "query d_model"], read: Float[Tensor, "query d_model"], questions: Questions
) -> Contrast[float]:
    """Return how often a linear probe picks the true answer among the entities of its role, in contexts that it was not
    trained on; null: its training labels are permuted over the facts of the same relation and side, mean over
    `N_PERMUTATIONS`.

    Args:
        trained: Representations of one direction, on half of whose contexts the probe is trained.
        read: Those of the same or the other direction, from whose other contexts it reads.
    """
    answer, kind, role = questions.answer, questions.kind, questions.candidates
    generator = torch.Generator().manual_seed(0)
    labels = answer.repeat(1 + N_PERMUTATIONS, 1)
    for row in labels[1:]:
        shuffled = (kind + torch.rand(len(kind), generator=generator)).argsort()  # within a kind only
        row[kind.argsort(stable=True)] = answer[shuffled]
    (seen, _), (_, unseen) = questions.halves(trained), questions.halves(read)
    weights = ridge_weights(seen, labels, int(role.max()) + 1)
    scores = einsum(unseen, weights, "question context d, labelling d entity -> labelling question context entity")
    among = scores.gather(-1, role[None, :, None].expand(*scores.shape[:3], -1))
    chosen = role[torch.arange(len(role))[:, None], among.argmax(-1)]
    right = (chosen == answer[:, None]).double().mean((1, 2))
    return Contrast(right[0].item(), right[1:].mean().item())


def ridge_weights(
    x: Float[Tensor, "question context d_model"], labels: Int[Tensor, "labelling question"], n_classes: int
) -> Float[Tensor, "labelling d_model class"]:
    """Solve for a linear probe's weights, one set per labelling, with X the representations and Y the labels, one-hot:

    (X^T X + penalty)^-1 X^T Y.
    """
    gram = einsum(x, x, "question context d, question context e -> d e")
    penalty = RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=x.dtype)
    one_hot = torch.nn.functional.one_hot(labels, n_classes).to(x.dtype)
    hits = einsum(x, one_hot, "question context d, labelling question entity -> labelling d entity")
    return torch.linalg.solve(gram + penalty, hits)
