"""Which statements help a reverse query of natural-language facts: its own fact's, more than unrelated ones, and
through which part.

A gradient step on a sentence that states a fact lowers or raises each query's loss. The sentences are those of other
templates than the query's. A fact's own share the answer's name with its query, which alone may help; so do those of
another fact with that name, which are the null: of the same child's other parent, say.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mdm_interp import CheckpointAnalysis, Probe, Result, Summary, where
from mdm_interp.data.queries import Direction, QueryPair, queries_of
from mdm_interp.experiments.claims import ClaimTest
from mdm_interp.experiments.scope import scope_of
from mdm_interp.experiments.subjects import KINDS, demos
from mdm_interp.measures.gradients import GROUPS, Influence, influence
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.resampling import FactSample
from mdm_interp.viz import CHANCE, CLUSTERS, FORWARD, REVERSE, Mark, Panels, draw_answers
from mdm_interp.viz.words import counted_of, sample_size

N_DRAWS = 4
"""How many masked copies of a sentence its gradient is averaged over."""
DIRECTIONS: dict[Direction, str] = {"forward": FORWARD, "reverse": REVERSE}
LABELS = {
    direction: (
        f"{direction} query, its own fact's sentences",
        f"{direction} query, another fact's with the answer's name",
    )
    for direction in DIRECTIONS
}


def measure(probe: Probe) -> list[dict[str, Any]]:
    """Give one row per kind, direction, group of components (and `all`), and cluster of facts that share names.

    `ahead` is the share of unrelated facts whose sentences the own ones beat in lowering the query's loss, less one
    half; null: of another fact that has the answer's name. `influence` is what the own ones lower the loss by, in nats
    per unit of step, in the mean; null: that of unrelated ones.
    """
    rows: list[dict[str, Any]] = []
    cfg = probe.model.cfg
    for kind in KINDS:
        pairs, templates = probe.pairs(kind), probe.prompts[kind].templates
        sample = FactSample.of(pairs, templates)
        stated = {
            (fact, template): pair.forward.statement
            for fact, template, pair in zip(sample.facts.tolist(), templates, pairs, strict=True)
        }
        queries = [query for direction in DIRECTIONS for query in queries_of(pairs, direction)]
        found = influence(probe.model, list(stated.values()), queries, n_draws=N_DRAWS)
        scope = scope_of(cfg, f"{probe.name}, {kind}", "causal" if cfg.is_causal else "any_order")
        for group, lowered in by_group(found).items():
            of_facts = by_fact(lowered, list(stated), sample, templates * len(DIRECTIONS))
            for direction, by_query in zip(DIRECTIONS, of_facts.split(len(pairs), dim=1), strict=True):
                about = {**scope, "stage": "end", "kind": kind, "direction": direction, "group": group}
                columns = compare(by_query, pairs, direction, sample)
                rows += [
                    {**about, "seed": cluster, **{name: values[cluster].item() for name, values in columns.items()}}
                    for cluster in range(sample.n_clusters)
                ]
    return rows


def by_group(found: Influence) -> dict[str, Float[Tensor, "sentence query"]]:
    """Sum influence within each group of components that the model has, and over all."""
    held = {component for _, component in found.parts}
    groups = [group for group in GROUPS if held & set(GROUPS[group])]
    return {group: found.group(group) for group in groups} | {"all": found.total}


def by_fact(
    lowered: Float[Tensor, "sentence query"], stated: list[tuple[int, int]], sample: FactSample, asked: list[int]
) -> Float[Tensor, "fact query"]:
    """Take for every query the mean over each fact's sentences in other templates than its own; over all of them where
    there is one template only.

    Args:
        stated: Fact and template of every sentence.
        asked: The template of every query.
    """
    facts, templates = torch.tensor(stated).T
    apart = templates[:, None] != torch.tensor(asked)
    apart |= ~apart.any(0)
    per_fact = (facts == torch.arange(sample.n_facts)[:, None]).double()
    return per_fact @ (lowered * apart) / (per_fact @ apart.double())


def compare(
    lowered: Float[Tensor, "fact query"], pairs: list[QueryPair], direction: Direction, sample: FactSample
) -> dict[str, Float[Tensor, "cluster"]]:
    """Compare each query's own fact, those with its answer's name, and unrelated ones, in the mean over the queries of
    each fact, and over a cluster's facts."""
    names: list[set[tuple[int, ...]]] = [set() for _ in range(sample.n_facts)]
    for fact, pair in zip(sample.facts.tolist(), pairs, strict=True):
        names[fact] |= {pair.reverse.answer, pair.reverse.source}
    rows = []
    for column, fact, pair in zip(lowered.unbind(1), sample.facts.tolist(), pairs, strict=True):
        answer = getattr(pair, direction).answer
        sharing = torch.tensor([answer in of_fact for of_fact in names])
        sharing[fact] = False
        others = column[sample.of_facts != sample.of_facts[fact]]
        own, null = column[fact], column[sharing].mean()
        rows.append(torch.stack([ahead_of(others, own), ahead_of(others, null), own, others.mean()]))
    per_cluster = sample.per_cluster(torch.stack(rows))
    return dict(zip(("ahead", "ahead_null", "influence", "influence_null"), per_cluster.T, strict=True))


def ahead_of(others: Float[Tensor, "other"], one: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the share of others that are smaller, a tie counting as half, less one half; NaN without both."""
    beaten = (one > others).double() + 0.5 * (one == others)
    return torch.where(one.isnan(), torch.nan, beaten).mean() - 0.5


def summarize(result: Result) -> Summary:
    frame = result.frame.assign(beyond=result.frame["ahead"] - result.frame["ahead_null"])
    return Summary.of(frame, ("checkpoint", "kind", "direction", "group"), ("ahead", "influence", "beyond"))


def takeaway(result: Result) -> str:
    def of(quantity: str, group: str) -> list[Estimate]:
        """Return what has an interval."""
        found = result.summary.where(quantity, direction="reverse", group=group)
        return [entry.effect for entry in found if entry.effect.n > 1]

    def counted(group: str) -> str:
        sides = [estimate.side for estimate in of("beyond", group)]
        return counted_of(sides.count("above"), len(sides), "cases")

    ahead, beyond = of("ahead", "all"), of("beyond", "all")
    if not ahead:
        return "Too few facts to compare one with another."
    least = min(estimate.value for estimate in ahead) + 0.5
    answer = "Yes" if all(one.side == "above" for one in ahead) else "Not for sure"
    told = f"{answer}: they beat {least:.0%} or more of unrelated facts' sentences ({sample_size(ahead, CLUSTERS)})"
    if not beyond:
        return f"{told}."
    joined = "and" if any(one.side == "above" for one in beyond) else "but"
    return (
        f"{told}, {joined} are surely ahead of another fact's with the answer's name in {counted('all')}; through "
        f"storage alone, in {counted('storage')}."
    )


def draw(result: Result) -> Panels:
    """Draw the reverse query through all components, and below it both queries through each."""
    panels, summary = Panels(), result.summary
    groups = [group for group in (*GROUPS, "all") if group in set(result.frame["group"])]
    of: dict[str, Any] = {"direction": "reverse", "group": "all"}
    marks = [
        Mark("ahead", "reverse query, its own fact's sentences", REVERSE, of=of),
        Mark("ahead_null", "another fact's with the answer's name", CHANCE, "x-thin", of=of),
    ]
    x = {"title": "share of unrelated facts' sentences beaten, less ½", "zeroline": True, "rangemode": "tozero"}
    draw_answers(panels, summary, "all components", marks, x)
    for kind in KINDS:
        shown = list(dict.fromkeys(where(result.frame, kind=kind)["checkpoint"]))
        y = {"range": [-0.6, 0.6], "title": "share beaten,<br>less ½"}
        titles = [f"{checkpoint}, {kind}".replace(", ", ",<br>") for checkpoint in shown]
        row = panels.row(titles, x={"title": "through", "tickangle": 60}, y=y, ticks_height=110) if shown else []
        for panel, checkpoint in zip(row, shown, strict=True):
            for place, (direction, color) in enumerate(DIRECTIONS.items()):
                at = {"checkpoint": checkpoint, "kind": kind, "direction": direction}
                own, other = LABELS[direction]
                for look_up, name, symbol, aside in (
                    (summary.at, own, "circle", -0.09),
                    (summary.null, other, "x-thin", 0.09),
                ):
                    found = {group: look_up("ahead", group=group, **at) for group in groups}
                    look: dict[str, Any] = {"color": color, "symbol": symbol, "shift": 0.4 * place - 0.2 + aside}
                    panel.estimates(found, name=name, upright=True, size=7, **look)
            panel.level(0.0, name="as many beaten as not", color=CHANCE, x=[-0.5, len(groups) - 0.5])
    return panels


ANALYSIS = CheckpointAnalysis(
    name="large_model_influence",
    question="Do the sentences that state a fact help its reverse query more than others do?",
    configs=demos,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    claims=[
        ClaimTest(
            claim="6",
            measure="how far ahead of unrelated facts' sentences a fact's own are in lowering its reverse query's loss "
            "through V and O (share of those facts beaten, less one half)",
            effect="ahead",
            null="ahead_null",
            null_is="the sentences of another fact with the answer's name",
            side="above",
            margin=0.1,
            rows=lambda result: where(result.frame, direction="reverse", group="storage"),
            unit="clusters of facts",
        )
    ],
    settings={"draws": N_DRAWS},
    order=235,
    detail_of="large_model_coupling",
    of_twins=True,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
