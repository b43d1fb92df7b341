"""Which other fact a null takes: every other one in turn, or one at random.

What belongs to one fact is held against what belongs to another that was asked in the same way. Nulls over facts in
natural language, which may share names, shuffle clusters of them: :class:`~mdm_interp.stats.resampling.FactSample`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mdm_interp.data.queries import QueryPair
from mdm_interp.errors import UserError


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
        other = torch.arange(len(query_pairs))
        for facts in asked.values():
            contexts = list(facts.values())
            step = 1 + (shift - 1) % (len(contexts) - 1)
            for own, met in zip(contexts, contexts[-step:] + contexts[:-step], strict=True):
                other[own] = torch.tensor(met)[torch.arange(len(own)) % len(met)]
        yield other


def draw_other_facts(
    query_pairs: Sequence[QueryPair], alike: Callable[[QueryPair], Hashable], seed: int
) -> list[int | None]:
    """Draw for every pair one of another fact, as its place among the pairs; None where there is none.

    Args:
        alike: What both must have in common: the side that is asked for, say.
    """
    chooser, drawn = random.Random(seed), list[int | None]()
    for pair in query_pairs:
        fits = [i for i, other in enumerate(query_pairs) if other.fact != pair.fact and alike(other) == alike(pair)]
        drawn.append(chooser.choice(fits) if fits else None)
    return drawn
