"""Which facts' sentences help a reverse query: its own fact's, more than unrelated ones, and through which part.

Every fact's sentence is shown once, in words that no query uses, and a gradient step on it lowers or raises each
query's loss. A fact's own sentence shares the answer's name with its query, which alone may help; so does the sentence
of another fact with that name, which is the null.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mdm_interp import Analysis, Contrast, Result, Run, Summary, where
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.experiments.claims import ClaimTest
from mdm_interp.experiments.grids import VARIANTS, cycle_grid, variant_of
from mdm_interp.experiments.paper import mirrored
from mdm_interp.experiments.scope import trained_stages
from mdm_interp.measures.gradients import influence
from mdm_interp.viz import CHANCE, FORWARD, REVERSE, Panels

N_DRAWS = 8
"""How many masked copies of a sentence its gradient is averaged over."""
GROUPS = ("storage", "routing", "embeddings", "norms")
DIRECTIONS = {"forward": FORWARD, "reverse": REVERSE}
STAGES = {"early": "forward half learnt", "end": "end of training"}


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give one row per direction and group of components, and one for all (`all`).

    `ahead` is the share of unrelated facts' sentences that the own one beats in lowering the query's loss, less one
    half; null: of the sentence of another fact that has the answer. `influence` is what the own one lowers the loss by,
    in nats per unit of step; null: the mean over unrelated ones.
    """
    shown, asked = split_contexts(run.query_pairs())
    sentences = [pair.forward.statement for pair in shown]
    queries = [getattr(pair, direction) for direction in DIRECTIONS for pair in asked]
    found = influence(run.model(step), sentences, queries, n_draws=N_DRAWS)
    numbers = {group: found.group(group) for group in GROUPS} | {"all": found.total}
    facts = [pair.fact for pair in shown]
    rows = []
    for group, lowered in numbers.items():
        for at, direction in enumerate(DIRECTIONS):
            one = compare(lowered[:, at * len(asked) :][:, : len(asked)], sentences, facts, asked, direction)
            rows.append({"variant": variant_of(run.config), "direction": direction, "group": group, **one})
    return rows


def split_contexts(pairs: list[QueryPair]) -> tuple[list[QueryPair], list[QueryPair]]:
    """Return one pair of each fact, in its first context, and all pairs of the last: what is asked shares neither place
    nor filler with what is shown."""
    first: dict[int, QueryPair] = {}
    last: dict[tuple[int, str], QueryPair] = {}
    for pair in pairs:
        first.setdefault(pair.fact, pair)
        last[pair.fact, pair.side] = pair
    return list(first.values()), list(last.values())


def compare(
    lowered: Float[Tensor, "sentence query"],
    sentences: list[tuple[int, ...]],
    facts: list[int],
    asked: list[QueryPair],
    direction: str,
) -> dict[str, float]:
    """Compare own, answer-sharing and unrelated sentences, in the mean over queries."""
    ahead: list[Contrast[float]] = []
    influences: list[Contrast[float]] = []
    for column, pair in zip(lowered.unbind(1), asked, strict=True):
        query: Query = getattr(pair, direction)
        answer, source = query.answer[0], query.source[0]
        own = torch.tensor([fact == pair.fact for fact in facts])
        sharing = torch.tensor([answer in sentence for sentence in sentences]) & ~own
        unrelated = torch.tensor([not {answer, source} & set(sentence) for sentence in sentences])
        beaten = [
            ((one > column[unrelated]).double().mean() + 0.5 * (one == column[unrelated]).double().mean()).item() - 0.5
            for one in (column[own].mean(), column[sharing].mean())
        ]
        ahead.append(Contrast(*beaten))
        influences.append(Contrast(column[own].mean().item(), column[unrelated].mean().item()))
    return {
        f"{name}{ending}": sum(values) / len(values)
        for name, found in (("ahead", ahead), ("influence", influences))
        for ending, values in (("", [one.effect for one in found]), ("_null", [one.null for one in found]))
    }


def summarize(result: Result) -> Summary:
    return Summary.of(result.frame, ("variant", "stage", "direction", "group"), ("ahead", "influence"))


def takeaway(result: Result) -> str:
    def told(group: str) -> str:
        of = {"stage": "end", "direction": "reverse", "group": group}
        found = {variant: result.summary.contrast("ahead", variant=variant, **of) for variant in VARIANTS}
        return ", ".join(f"{variant} {one.effect.value:+.2f} ({one.null.value:+.2f})" for variant, one in found.items())

    return (
        "How far a fact's own sentence is ahead of unrelated ones in lowering its reverse query's loss at the end of "
        "training, from −½ (behind all) to ½ (ahead of all); in brackets the sentence of another fact with the same "
        f"answer. Through storage: {told('storage')}. Through routing: {told('routing')}. All in all: {told('all')}."
    )


def draw(result: Result) -> Panels:
    panels, summary, groups = Panels(), result.summary, [*GROUPS, "all"]
    for stage, title in STAGES.items():
        last = stage == "end"
        y = {"range": [-0.55, 0.55], "title": f"ahead of unrelated,<br>{title}"}
        titles = list(VARIANTS) if stage == "early" else [""] * len(VARIANTS)
        row = panels.row(titles, x={"title": "through", "tickangle": 60}, y=y, ticks=last, ticks_height=110)
        for panel, variant in zip(row, VARIANTS, strict=True):
            for place, (direction, color) in enumerate(DIRECTIONS.items()):
                of = {"variant": variant, "stage": stage, "direction": direction}
                for look_up, name, symbol in (
                    (summary.at, f"{direction} query, its own fact's sentence", "circle"),
                    (summary.null, f"{direction} query, another fact's with the same answer", "x-thin-open"),
                ):
                    found = {group: look_up("ahead", group=group, **of) for group in groups}
                    panel.estimates(
                        found, name=name, color=color, symbol=symbol, shift=0.3 * place - 0.15, upright=True
                    )
            panel.level(0.0, name="in the middle", color=CHANCE, x=[-0.5, len(groups) - 0.5], listed=False)
    return panels


ANALYSIS = Analysis(
    name="influence",
    question="Does a fact's own sentence help its reverse query more than other sentences do?",
    configs=cycle_grid,
    measure=measure,
    when=trained_stages,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    claims=[
        ClaimTest(
            claim="6",
            measure="how far ahead of unrelated facts' sentences the own one is in lowering the reverse query's loss "
            "through V and O (share of them beaten, less one half)",
            effect="ahead",
            null="ahead_null",
            null_is="the sentence of another fact with the same answer",
            side="above",
            margin=0.1,
            rows=lambda result: where(result.frame, direction="reverse", group="storage"),
            identity=mirrored,
        )
    ],
    settings={"draws": N_DRAWS},
    order=67,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
