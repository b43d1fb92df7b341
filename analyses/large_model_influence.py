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
from mdm_interp.data.queries import Direction, QueryPair
from mdm_interp.experiments.claims import ClaimTest
from mdm_interp.experiments.scope import scope_of
from mdm_interp.experiments.subjects import KINDS, demos
from mdm_interp.measures.gradients import GROUPS, Influence, influence
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.resampling import FactSample
from mdm_interp.viz import CHANCE, FORWARD, REVERSE, Panels

N_DRAWS = 4
"""How many masked copies of a sentence its gradient is averaged over."""
DIRECTIONS: dict[Direction, str] = {"forward": FORWARD, "reverse": REVERSE}


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
        queries = [getattr(pair, direction) for direction in DIRECTIONS for pair in pairs]
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
    summary = result.summary.where(direction="reverse")

    def counted(found: list[Estimate]) -> int:
        return sum(estimate.side == "above" for estimate in found)

    def told(group: str) -> str:
        ahead, beyond = ([entry.effect for entry in summary.where(q, group=group)] for q in ("ahead", "beyond"))
        ahead, beyond = ([one for one in found if one.n > 1] for found in (ahead, beyond))
        if not ahead:
            return "nothing to compare"
        values = [one.value for one in ahead]
        over_name = f", and ahead of the other fact in {counted(beyond)} of {len(beyond)}" if beyond else ""
        return f"{min(values):+.2f} to {max(values):+.2f}, above 0 in {counted(ahead)} of {len(ahead)} cases{over_name}"

    return (
        "How far a fact's own sentences are ahead of unrelated facts' in lowering its reverse query's loss, from −½ "
        "(behind all) to ½ (ahead of all), and whether they are also ahead of another fact's with the answer's name. "
        f"Through storage: {told('storage')}. Through routing: {told('routing')}. All in all: {told('all')}."
    )


def draw(result: Result) -> Panels:
    panels, summary = Panels(), result.summary
    groups = [group for group in (*GROUPS, "all") if group in set(result.frame["group"])]
    for kind in KINDS:
        shown = list(dict.fromkeys(where(result.frame, kind=kind)["checkpoint"]))
        y = {"range": [-0.55, 0.7], "title": "ahead of<br>unrelated"}
        titles = [f"{checkpoint}, {kind}".replace(", ", ",<br>") for checkpoint in shown]
        row = panels.row(titles, x={"title": "through", "tickangle": 60}, y=y, ticks_height=110) if shown else []
        for panel, checkpoint in zip(row, shown, strict=True):
            for place, (direction, color) in enumerate(DIRECTIONS.items()):
                of = {"checkpoint": checkpoint, "kind": kind, "direction": direction}
                for look_up, name, symbol in (
                    (summary.at, f"{direction} query, its own fact's sentences", "circle"),
                    (summary.null, f"{direction} query, another fact's with the answer's name", "x-thin-open"),
                ):
                    found = {group: look_up("ahead", group=group, **of) for group in groups}
                    look: dict[str, Any] = {"color": color, "symbol": symbol, "shift": 0.3 * place - 0.15}
                    panel.estimates(found, name=name, upright=True, **look)
            panel.level(0.0, name="in the middle", color=CHANCE, x=[-0.5, len(groups) - 0.5], listed=False)
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
    of_twins=True,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
