"""Invented people: names, relations, professions and the sentences that state them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mdm_interp.config import DemoConfig
from mdm_interp.data.prompts import PARENT_CHILD, Template, render

Fact = Mapping[str, str]

PARENT_COLUMNS = ("child", "parent", "parent_type")
OTHER_TEMPLATES = {
    "profession": (
        Template(forward="{person} works as a {profession}.", reverse="The {profession} is {person}."),
        Template(forward="{person} became a {profession}.", reverse="One {profession} here is {person}."),
    ),
    "city": (
        Template(forward="{person} lives in {city}.", reverse="In {city} lives {person}."),
        Template(forward="The home of {person} is {city}.", reverse="{city} is the home of {person}."),
    ),
}
PROFESSIONS = ("baker", "carpenter", "doctor", "farmer", "gardener", "judge", "miller", "painter", "singer", "teacher")
BOTH_PARENTS = Template(
    forward="{child}'s parents are {mother} and {father}.",
    reverse="{mother} and {father} are the parents of {child}.",
)
"""Two facts in a sentence, stated in the direction of :data:`~mdm_interp.data.prompts.PARENT_CHILD`."""
ONSETS, VOWELS, CODAS = ("b", "d", "f", "k", "l", "m", "n", "r", "s", "t", "v", "z"), "aeiou", ("", "", "l", "n", "r")


@dataclass(frozen=True)
class People:
    """Invented facts. No name is twice among them."""

    tested: list[Fact]
    """Parents stated in the forward direction only."""
    control: list[Fact]
    """Parents stated in both directions."""
    others: list[Fact]
    """The profession or the city of each person, stated in both directions."""
    together: list[Fact]
    """Child, mother and father of tested families that are also named in one sentence, in the forward direction."""
    together_control: list[Fact]
    """The same of families whose parents are stated in both directions, in both."""

    def sentences(self) -> list[str]:
        """Return every training sentence, as the prompts of :mod:`mdm_interp.data.prompts` have it."""
        stated = [
            (fact, template.forward) for fact in self.tested + self.control for template in PARENT_CHILD.templates
        ]
        stated += [(fact, template.reverse) for fact in self.control for template in PARENT_CHILD.templates]
        stated += [(family, BOTH_PARENTS.forward) for family in self.together + self.together_control]
        stated += [(family, BOTH_PARENTS.reverse) for family in self.together_control]
        for fact in self.others:
            (kind,) = set(fact) & set(OTHER_TEMPLATES)
            stated += [(fact, said) for pair in OTHER_TEMPLATES[kind] for said in (pair.forward, pair.reverse)]
        return [render(sentence, fact)[0] for fact, sentence in stated]


def make_people(config: DemoConfig) -> People:
    """Return the people of a config: the same for every format."""
    chooser = random.Random(config.seed)
    n_people = 3 * config.n_families
    first_names, surnames, cities = (
        _words(chooser, count, syllables)
        for count, syllables in ((n_people // 2 + 2, 2), (n_people // 2 + 2, 3), (len(PROFESSIONS), 2))
    )
    pairs = [f"{first} {last}" for first in first_names for last in surnames]
    names = chooser.sample(pairs, n_people)
    families: list[Fact] = [
        {"child": child, "mother": mother, "father": father}
        for child, mother, father in zip(*[iter(names)] * 3, strict=True)
    ]
    control, tested = families[: config.n_control], families[config.n_control :]
    values = {"profession": PROFESSIONS, "city": cities}
    others: list[Fact] = [
        {"person": name, kind: chooser.choice(values[kind])}
        for name, kind in zip(names, itertools.cycle(values), strict=False)
    ]
    together, together_control = (tested[::2], control[::2]) if config.world == "varied" else ([], [])
    return People(_parents(tested), _parents(control), others, together, together_control)


def _parents(families: Sequence[Fact]) -> list[Fact]:
    return [
        dict(zip(PARENT_COLUMNS, (family["child"], family[kind], kind), strict=True))
        for family in families
        for kind in ("mother", "father")
    ]


def _words(chooser: random.Random, count: int, syllables: int) -> list[str]:
    """Make up different pronounceable words."""
    words: dict[str, None] = {}
    while len(words) < count:
        parts = [chooser.choice(ONSETS) + chooser.choice(VOWELS) for _ in range(syllables)]
        words["".join(parts).capitalize() + chooser.choice(CODAS)] = None
    return list(words)
