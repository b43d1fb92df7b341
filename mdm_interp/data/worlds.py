"""Synthetic worlds of facts `A r B`, their training sequences and their query pairs.

    two_role        every entity is on one side only: the first half always left, the second always right
    relation_cycle  K roles in a cycle: an entity of role k is on the left in relation k, on the right in k - 1
    symmetric_pool  one pool of entities, every fact a random ordered pair, no entity in two facts

A sequence is the fact `A r … B` at a random place among filler. Only forward facts are trained, except for the
`reversed_share` that is also shown as `B r … A`; those facts are never tested.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import torch
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mdm_interp.config import Attention, FactConfig, Objective
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.errors import UserError, require_one_of, require_some


@dataclass(frozen=True)
class FactBatch:
    """Training sequences, nothing masked yet."""

    tokens: Int[Tensor, "batch pos"]
    left: Int[Tensor, "batch"]
    """Position of the left entity."""
    right: Int[Tensor, "batch"]


class FactWorld:
    """The facts that `config` and `seed` make. Tokens are numbered entities, relations, filler, mask."""

    def __init__(self, config: FactConfig, seed: int) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.facts: Int[Tensor, "fact 3"] = self._draw_facts(generator)
        """Left entity, relation, right entity."""
        self.reversed: Bool[Tensor, "fact"] = torch.zeros(len(self.facts), dtype=torch.bool)
        """Facts that training also shows with the sides swapped."""
        self.reversed[torch.randperm(len(self.facts), generator=generator)[: config.n_reversed]] = True
        self._context_seed = seed

    def _draw_facts(self, generator: torch.Generator) -> Int[Tensor, "fact 3"]:
        config = self.config
        if config.world == "relation_cycle":
            roles = torch.arange(config.n_entities).view(config.n_roles, -1)
            shuffled = [roles[(k + 1) % config.n_roles] for k in range(config.n_roles)]
            right = torch.cat([role[torch.randperm(len(role), generator=generator)] for role in shuffled])
            left, relation = roles.flatten(), torch.arange(config.n_roles).repeat_interleave(roles.shape[1])
        else:
            half = config.n_entities // 2
            order = torch.randperm(config.n_entities, generator=generator)
            if config.world == "two_role":  # sides fixed by number: shuffle who belongs to whom only
                order = torch.cat([torch.arange(half), half + torch.randperm(half, generator=generator)])
            left, right, relation = order[:half], order[half:], torch.zeros(half, dtype=torch.long)
        return torch.stack([left, config.n_entities + relation, right], dim=1)

    def role(self, entity: int) -> range:
        """Return the entities that could be where `entity` is: its own role, or the whole pool."""
        n_roles = {"two_role": 2, "relation_cycle": self.config.n_roles, "symmetric_pool": 1}[self.config.world]
        size = self.config.n_entities // n_roles
        first = entity // size * size
        return range(first, first + size)

    def candidates(self, queries: Sequence[Query]) -> Int[Tensor, "query candidate"]:
        """Return the entities of each answer's role, in order.

        Raises:
            UserError: there are no queries.
        """
        require_some("queries", queries)
        return torch.tensor([list(self.role(query.answer[0])) for query in queries])

    def rivals(self, queries: Sequence[Query]) -> Int[Tensor, "query 1"]:
        """Find the entity that a forward fact has where each query asks, beside its source: the answer of a forward
        query, in a reverse query the source's other partner.

        Raises:
            UserError: there are no queries, or no fact has the source on that side; in a `relation_cycle` alone every
                entity is on both.
        """
        require_some("queries", queries)
        shown = {}
        for left, _, right in self.facts.tolist():
            shown[left, "left"], shown[right, "right"] = right, left
        found = []
        for query in queries:
            place = query.source[0], "right" if query.offset > 0 else "left"
            if place not in shown:
                raise UserError(
                    f"queries: no fact has {self.token_names[place[0]]} on the {place[1]}, so nothing rivals the "
                    "answer; ask in a relation_cycle, whose entities are on both sides"
                )
            found.append([shown[place]])
        return torch.tensor(found)

    @property
    def chance(self) -> float:
        """Probability that a guesser who knows only the answer's role gives the answer."""
        return 1 / len(self.role(0))

    @property
    def token_names(self) -> list[str]:
        """A readable name per token: `A3` is the fourth entity of the first role, `r1` a relation, `f0` filler."""
        size = len(self.role(0))
        few = self.config.n_entities // size <= 26
        roles = [chr(ord("A") + role) if few else f"E{role}_" for role in range(self.config.n_entities // size)]
        entities = [f"{roles[entity // size]}{entity % size}" for entity in range(self.config.n_entities)]
        relations = [f"r{relation}" for relation in range(self.config.n_relations)]
        return entities + relations + [f"f{filler}" for filler in range(self.config.filler_tokens)] + ["[M]"]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """What reads and writes texts of this world: its token names with spaces between them."""
        names = self.token_names
        words = Tokenizer(models.WordLevel({name: token for token, name in enumerate(names)}))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=words, mask_token=names[-1], clean_up_tokenization_spaces=False)

    def sample(self, batch_size: int, generator: torch.Generator) -> FactBatch:
        """Draw random facts at random places among filler, each fact as often as any other; a share `noise` of them
        with whatever right entity."""

        def draw(high: int | Tensor) -> Tensor:
            """Draw integers from 0 up to `high`, exclusive."""
            return (torch.rand(batch_size, generator=generator, dtype=torch.float64) * high).long()

        config, (low, high) = self.config, self.config.gaps
        chosen = draw(len(self.facts))
        facts = self.facts[chosen]
        swap = self.reversed[chosen] & (draw(2) == 1)
        facts = torch.where(swap[:, None], facts[:, [2, 1, 0]], facts)
        if config.noise:
            size, wrong = len(self.role(0)), torch.rand(batch_size, generator=generator) < config.noise
            right = facts[:, 2] // size * size + draw(size)
            facts = torch.stack([*facts[:, :2].unbind(1), torch.where(wrong, right, facts[:, 2])], dim=1)
        gap = low + draw(high - low + 1)
        left = draw(config.seq_len - gap)
        right = left + gap
        filler = torch.rand(batch_size, config.seq_len, generator=generator) * max(config.filler_tokens, 1)
        tokens = config.n_entities + config.n_relations + filler.long()
        rows = torch.arange(batch_size)
        tokens[rows, left], tokens[rows, left + 1], tokens[rows, right] = facts.unbind(1)
        return FactBatch(tokens, left, right)

    def query_pairs(
        self, objective: Objective = "any_order", n_contexts: int = 2, *, attention: Attention = "bidirectional"
    ) -> list[QueryPair]:
        """Return the pairs whose forward query `objective` trains and whose reverse query nothing trained.

        An MDM is asked for both entities of a fact (`source_only`, `target_only`, `left_to_right`: for the one that it
        learns from the other). The forward and the reverse query of a pair differ in the two entity positions only;
        under `left_to_right` all that comes after the fact is masked. An ARM (`causal`), or whatever has causal
        attention, is asked for B after `A r` and, in reverse, for A after `B r`: that pair shares neither answer nor
        source.

        Args:
            n_contexts: How many draws of place, gap and filler each fact is asked in (fewer if there are not as many).
            attention: Of the model that is asked.

        Raises:
            UserError: the objective or the attention is unknown.
        """
        require_one_of("objective", objective, get_args(Objective))
        require_one_of("attention", attention, get_args(Attention))
        sides = {
            "any_order": ("left", "right"),
            "source_only": ("left",),
            "target_only": ("right",),
            "left_to_right": ("right",),
            "causal": ("right",),
        }
        from_left = objective == "causal" or attention == "causal"
        chooser = random.Random(self._context_seed)
        pairs = []
        for fact, (left, relation, right) in enumerate(self.facts.tolist()):
            if self.reversed[fact]:
                continue
            for tokens, at in self._contexts(chooser, n_contexts):
                tokens[at[0] + 1] = relation
                if objective == "left_to_right":
                    tokens[at[1] + 1 :] = [self.config.mask_token_id] * (len(tokens) - at[1] - 1)
                for side in ("right",) if from_left else sides[objective]:
                    answer, source = (left, right) if side == "left" else (right, left)
                    asked, given = at if side == "left" else at[::-1]
                    forward = self._query(tokens, answer, asked, source, given)
                    if from_left:
                        reverse = self._query(tokens, source, asked, answer, given)
                    else:
                        reverse = self._query(tokens, answer, given, source, asked)
                    pairs.append(QueryPair(forward, reverse, fact, side))
        return pairs

    def _contexts(self, chooser: random.Random, count: int) -> list[tuple[list[int], tuple[int, int]]]:
        """Draw up to `count` different contexts: filler tokens, and the positions of the two entities."""
        config = self.config
        first = config.n_entities + config.n_relations
        contexts: dict[tuple, tuple[list[int], tuple[int, int]]] = {}
        for _ in range(4 * count):
            gap = chooser.randint(*config.gaps)
            left = chooser.randrange(config.seq_len - gap)
            tokens = [first + chooser.randrange(max(config.filler_tokens, 1)) for _ in range(config.seq_len)]
            for at in (left, left + 1, left + gap):  # the fact is there: no filler, so no difference
                tokens[at] = config.mask_token_id
            contexts.setdefault((tuple(tokens), left, gap), (tokens, (left, left + gap)))
            if len(contexts) == count:
                break
        return list(contexts.values())

    def _query(self, context: list[int], answer: int, asked: int, source: int, given: int) -> Query:
        tokens = list(context)
        tokens[asked], tokens[given] = self.config.mask_token_id, source
        return Query(tuple(tokens), (answer,), (asked, asked + 1), (given, given + 1))
