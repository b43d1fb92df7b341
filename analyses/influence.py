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

from mdm_interp import Analysis, Contrast, Estimate, Result, Run, Summary, mean_estimate, where
from mdm_interp.data.queries import Direction, Query, QueryPair, queries_of
from mdm_interp.experiments.claims import ClaimTest
from mdm_interp.experiments.grids import VARIANTS, cycle_grid, variant_of
from mdm_interp.experiments.paper import mirrored
from mdm_interp.experiments.scope import trained_stages
from mdm_interp.measures.gradients import influence
from mdm_interp.viz import CHANCE, FORWARD, REVERSE, Panel, Panels, between, opening, sample_size, shown, told
from mdm_interp.viz.words import ANSWER

N_DRAWS = 8
"""How many masked copies of a sentence its gradient is averaged over."""
GROUPS = ("storage", "routing", "embeddings", "norms")
DIRECTIONS: dict[Direction, str] = {"forward": FORWARD, "reverse": REVERSE}
STAGES = {"early": "forward half learnt", "end": "end of training"}


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give one row per direction and group of components, and one for all (`all`).

    `ahead` is the share of unrelated facts' sentences that the own one beats in lowering the query's loss, less one
    half; null: of the sentence of another fact that has the answer. `influence` is what the own one lowers the loss by,
    in nats per unit of step; null: the mean over unrelated ones.
    """
    shown, asked = split_contexts(run.query_pairs())
    sentences = [pair.forward.statement for pair in shown]
    queries = [query for direction in DIRECTIONS for query in queries_of(asked, direction)]
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
    """Say for whom the own sentence is ahead of unrelated ones and, by paired seeds, of that with the same answer."""
    asked = where(result.frame, stage="end", direction="reverse", group="all")
    own = {variant: where(asked, variant=variant) for variant in VARIANTS}
    ahead = {variant: mean_estimate(rows["ahead"]) for variant, rows in own.items()}
    beyond = {variant: mean_estimate(rows["ahead"] - rows["ahead_null"]) for variant, rows in own.items()}
    answers = {}
    for variant in VARIANTS:
        sides = {ahead[variant].side, beyond[variant].side}
        answers[variant] = ANSWER["above" if sides == {"above"} else "below" if "below" in sides else "undecided"]

    def beaten(answer: str) -> str:
        found = [ahead[variant].value + 0.5 for variant in VARIANTS if answers[variant] == answer]
        return f"{between(found)} ({answer})"

    shares = ", ".join(map(beaten, dict.fromkeys(answers.values())))
    return (
        f"{opening(told(answers))}; yes: it helps more than unrelated sentences and than another one with the same "
        f"answer. Share of the unrelated ones that it beats: {shares}; {sample_size(ahead.values())}."
    )


NULL = "null of the query to its left: another fact's sentence with the same answer"
MARKS = {
    ("forward", "own"): ("forward query, its own fact's sentence", FORWARD, "circle"),
    ("forward", "null"): (NULL, CHANCE, "x-thin-open"),
    ("reverse", "own"): ("reverse query, its own fact's sentence", REVERSE, "circle"),
    ("reverse", "null"): (NULL, CHANCE, "x-thin-open"),
}


def draw(result: Result) -> Panels:
    panels, groups = Panels(), [*GROUPS, "all"]

    def found(of: str, **at: str) -> Estimate:
        return result.summary.at("ahead", **at) if of == "own" else result.summary.null("ahead", **at)

    def mark(panel: Panel, places: dict[str, dict[str, str]], listed: bool) -> None:
        """Draw both queries and their nulls at places, of which each is an entry of the summary."""
        for i, ((direction, of), (name, color, symbol)) in enumerate(MARKS.items()):
            estimates = {place: found(of, direction=direction, **at) for place, at in places.items()}
            look: dict[str, Any] = {"color": color, "symbol": symbol, "shift": 0.2 * (i - 1.5), "upright": True}
            panel.estimates(estimates, name=name, size=9 if listed else 7, listed=listed, **look)
        panel.level(0.0, name="in the middle", color=CHANCE, x=[-0.5, len(places) - 0.5], listed=False)

    y: dict[str, Any] = {"range": [-0.55, 0.55]}
    x = {"title": "model"}
    (main,) = panels.row(
        ["through all parts, end of training"],
        x=x,
        y={**y, "title": "share of unrelated sentences<br>beaten, less one half"},
        height=300,
        ticks_height=52,
    )
    variants = {}
    for variant in VARIANTS:
        at = {"variant": variant, "stage": "end", "group": "all"}
        n = found("own", direction="reverse", **at).n
        variants[f"{shown(variant)}<br>n = {n}"] = at
    mark(main, variants, listed=True)
    for stage, title in reversed(STAGES.items()):
        last = stage == "early"
        titles = [""] * len(VARIANTS) if last else list(map(shown, VARIANTS))
        row = panels.row(
            titles,
            x={"title": "through", "tickangle": 60},
            y={**y, "title": f"the same,<br>{title}"},
            ticks=last,
            ticks_height=110,
            height=170,
        )
        for panel, variant in zip(row, VARIANTS, strict=True):
            mark(panel, {group: {"variant": variant, "stage": stage, "group": group} for group in groups}, listed=False)
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
    detail_of="learning_path",
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
