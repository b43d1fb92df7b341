"""Influence: the training sentences that made a model answer, a forward and its reverse query side by side."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.errors import UserError
from mdm_interp.measures.gradients.components import GROUPS
from mdm_interp.measures.gradients.influence import Influence
from mdm_interp.viz.pages.attention import shortened
from mdm_interp.viz.pages.code import call, left_open, saving
from mdm_interp.viz.pages.page import Page, as_lists
from mdm_interp.viz.pages.subject import Subject, joined
from mdm_interp.viz.words import counted

WAYS, SIGNS = ("forward", "reverse"), ("helping", "hurting")


def influence(
    model: Any,
    training: Sequence[Sequence[int]],
    query_pairs: Sequence[QueryPair],
    found: Influence,
    *,
    top: int = 5,
) -> Page:
    """Return which sentences lower or raise the loss of each pair's forward and reverse query most, through what, and
    which of their tokens do.

    Args:
        model: A HookedTransformer or TransformerBridge, or a Run: it names the tokens.
        training: The sentences, as token ids.
        found: Their influence on all pairs' forward queries, then on all their reverse queries.
        top: How many sentences to show of either sign.

    Raises:
        UserError: the influence is of other sentences or queries.
    """
    n_sentences, n_queries = found.total.shape
    if (n_sentences, n_queries) != (len(training), 2 * len(query_pairs)):
        raise UserError(
            f"found: is of {n_sentences} sentences and {n_queries} queries, and there are {len(training)} and, forward "
            f"and reverse, {2 * len(query_pairs)}; measure these"
        )
    subject = Subject.of(model)
    groups = {name: found.group(name) for name in GROUPS}
    places = list(dict.fromkeys(layer for layer, _ in found.parts))
    by_layer = [[_inside(found, layer, members) for layer in places] for members in GROUPS.values()]

    def told(query: Query, at: int) -> dict[str, Any]:
        strongest = found.top(at, top)
        return subject.prompt(query).marks() | {
            sign: [
                {
                    "sentence": sentence,
                    "total": as_lists(found.total[sentence, at]),
                    "groups": [as_lists(of_group[sentence, at]) for of_group in groups.values()],
                    "layers": [
                        [None if part is None else as_lists(part[sentence, at]) for part in of_group]
                        for of_group in by_layer
                    ],
                    "tokens": as_lists(found.by_token[sentence, : len(training[sentence]), at]),
                }
                for sentence in sentences
            ]
            for sign, sentences in zip(SIGNS, strongest, strict=True)
        }

    pairs = [
        {
            "name": f"{shortened(subject.prompt(pair.forward))} {joined(subject.names(pair.forward.answer)).strip()}",
            "forward": told(pair.forward, at),
            "reverse": told(pair.reverse, at + len(query_pairs)),
        }
        for at, pair in enumerate(query_pairs)
    ]
    shown = {one["sentence"] for pair in pairs for way in WAYS for sign in SIGNS for one in pair[way][sign]}
    sentences = {sentence: list(subject.names(training[sentence])) for sentence in sorted(shown)}
    about = (
        f"Which of {counted(len(training), 'training sentence')} a gradient step on would lower or raise the loss of "
        "each query most."
    )
    layers = ["outside of layers" if layer is None else f"layer {layer}" for layer in places]
    data = {"pairs": pairs, "sentences": sentences, "groups": list(GROUPS), "layers": layers}
    made = call("viz.influence", "model", "training", "query_pairs", "found", top=top)
    code = saving(made, subject.opening(), left_open("training, query_pairs", "found, their influence,"))
    return Page("influence", subject.heading("Influence of training sentences"), about, (), data, code)


def _inside(found: Influence, layer: int | None, members: Collection[str]) -> Float[Tensor, "sentence query"] | None:
    """Sum what some components of one layer give; None where it has none of them."""
    chosen = [i for i, (at, component) in enumerate(found.parts) if at == layer and component in members]
    return found.inner[chosen].sum(0) if chosen else None
