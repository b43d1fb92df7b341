"""Which other fact a null takes in place of a pair's own: every rule, and what it is for.

    other_facts         each one in turn that is asked for the same side: where another fact costs no pass of the model
    draw_other_facts    a random one that is asked alike: where each costs a pass (patches)
    two_before          that of the pair two places before: where the order of a world's pairs is given
    next_answers        the answer that comes next among those that could be the answer: where answers are compared
    of_unrelated_facts  all that share no name with it: in natural language, where a sibling's name would be no mistake

The rules choose differently, and results are measured with each. Four more are where they are used.
:meth:`~mdm_interp.measures.gradients.alignment.Alignment.pair_cosine` takes all pairs of different facts, whatever they
are asked for, since it has them all; :meth:`~mdm_interp.measures.gradients.alignment.Alignment.fact_cosine` takes for
every pair the mean over all other facts asked for the same side.
:func:`~mdm_interp.measures.gradients.layers.layer_cosines` takes the other half of the facts, since it has means only.
:meth:`~mdm_interp.stats.resampling.FactSample.partners` shuffles clusters of facts, the own included, so that a
correlation over them is 0 in the mean.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mdm_interp.data.queries import QueryPair
from mdm_interp.errors import UserError
from mdm_interp.stats.resampling import FactSample

Given = TypeVar("Given", bound=Hashable)


def other_facts(query_pairs: Sequence[QueryPair]) -> Iterator[Int[Tensor, "pair"]]:
    """Give, in every rotation of the facts but the first, another fact's pair that is asked for the same side.

    A pair whose side has fewer facts meets them several times, its own never. Of facts that are asked in several
    contexts, each context meets its own.

    Args:
        query_pairs: Of each side two facts or more.

    Raises:
        UserError: a side has one fact only.
    """
    asked: dict[str, dict[int, list[int]]] = {}
    for i, pair in enumerate(query_pairs):
        asked.setdefault(pair.side, {}).setdefault(pair.fact, []).append(i)
    for side, facts in asked.items():
        if len(facts) < 2:
            raise UserError(
                f"query_pairs: one fact is asked for its {side} entity, and a null takes others; give two or more"
            )
    for shift in range(1, max(map(len, asked.values()), default=1)):
        other = list(range(len(query_pairs)))
        for facts in asked.values():
            contexts = list(facts.values())
            step = 1 + (shift - 1) % (len(contexts) - 1)
            for own, met in zip(contexts, contexts[-step:] + contexts[:-step], strict=True):
                for context, pair in enumerate(own):
                    other[pair] = met[context % len(met)]
        yield torch.tensor(other, dtype=torch.long)


def draw_other_facts(
    query_pairs: Sequence[QueryPair], alike: Callable[[QueryPair], Hashable], seed: int
) -> list[int | None]:
    """Draw for every pair one of another fact, as its place among the pairs; None where there is none.

    Args:
        alike: What both must have in common: the side that is asked for, say.
    """
    fitting = [
        [i for i, other in enumerate(query_pairs) if other.fact != pair.fact and alike(other) == alike(pair)]
        for pair in query_pairs
    ]
    return draw(fitting, seed)


def draw(choices: Sequence[Sequence[Given]], seed: int) -> list[Given | None]:
    """Draw one of each, all from one seed; None where there is nothing to choose."""
    chooser = random.Random(seed)
    return [chooser.choice(fitting) if fitting else None for fitting in choices]


def two_before(query_pairs: Sequence[QueryPair]) -> Int[Tensor, "pair"]:
    """Take for every pair the one two places before: if the pairs ask for both sides of each fact in turn, the same
    side of the fact before, and if they ask for one side, the last fact but one."""
    return torch.arange(len(query_pairs)).roll(2)


def next_answers(own: Int[Tensor, "query"], rivals: Bool[Tensor, "query answer"]) -> Int[Tensor, "query"]:
    """Take for every query the first rival after its own answer, and from the start again after the last; its own where
    there is none."""
    n_answers = rivals.shape[1]
    steps = (torch.arange(n_answers) - own[:, None]) % n_answers
    return torch.where(rivals.any(1), steps.masked_fill(~rivals, n_answers).argmin(1), own)


def of_unrelated_facts(
    query_pairs: Sequence[QueryPair], sides: Sequence[Hashable], given: Sequence[Given]
) -> list[list[Given]]:
    """List for every pair what others are given that ask for the same side, and whose facts share no name with its own,
    directly or through other facts. What several pairs of one cluster of facts are given is listed once.

    Args:
        sides: What each pair asks for.
        given: What belongs to each pair: its source, say.
    """
    clusters = FactSample.of(query_pairs).clusters.tolist()
    known = dict.fromkeys(zip(sides, clusters, given, strict=True))
    return [
        [what for side, cluster, what in known if side == own_side and cluster != own]
        for own_side, own in zip(sides, clusters, strict=True)
    ]
