"""Whether the forward and the reverse query of a fact end in one representation, or in two that share nothing: cosines
against other facts, and linear probes trained on one direction and tested on the other.

A representation is the normalised final residual at the readout, less its mean over all forward (or all reverse)
queries: what a whole direction shares says nothing about a fact. One entry per fact predicts that both queries of a
fact lie closer than those of other facts, and that a probe carries over; two entries predict neither, while a probe
trained on reverse queries still reads them.

A source and a relation determine the answer, so a probe may read them instead of anything stored: the stage `initial`,
where nothing is stored, says how well. Every source stands in two facts, on either side of its mask; what the model
answers to the reverse query of one fact may be the entity of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from mdm_interp.config import TrainConfig
from mdm_interp.data.queries import Query, QueryPair, batches
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.grids import grid, variant_of
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import STAGES
from mdm_interp.inference.prediction import predict
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.tables import curve, where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import add_level, add_points
from mdm_interp.viz.theme import BLUE, CHANCE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, legend_at

N_CONTEXTS = 8
"""Draws of place and filler per fact: probes are trained on half of them and tested on the other half."""
RIDGE = 0.01
"""Penalty of a probe, as a share of the mean variance per dimension."""
N_PERMUTATIONS = 20

COSINES = {
    "other_context": ("same fact, both forward (ceiling)", SKY),
    "same_fact": ("same fact", BLUE),
    "same_answer": ("same answer, other fact", GREEN),
    "same_source": ("same source, other fact", ORANGE),
    "same_relation": ("null: same relation, other fact", GREY),
}
"""What a forward representation is compared with: a reverse one, except for the ceiling. The null asks for the same
side of another fact of the same relation."""
PROBES = {
    "forward_to_forward": ("trained forward, read forward", SKY),
    "forward_to_reverse": ("trained forward, read in reverse", VERMILION),
    "reverse_to_reverse": ("trained in reverse, read in reverse", PURPLE),
}

ANSWERS = {
    "reverse_probability": ("true answer", VERMILION),
    "other_fact_probability": ("answer of the source's other fact", ORANGE),
}


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    return [config for config in grid(seeds, ["relation_cycle"]) if config.objective == "any_order"]


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Mean cosines, probe accuracies (`…_null`: labels permuted over facts) and chance."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=N_CONTEXTS)
    forward = representations(model, [pair.forward for pair in pairs])
    reverse = representations(model, [pair.reverse for pair in pairs])
    cosines = mean_cosines(forward, reverse, pairs, run.facts)
    probed = probe_accuracies(forward, reverse, pairs, run.facts)
    return [{"variant": variant_of(run.config), **cosines, **probed, **answers(model, pairs, run.facts)}]


@torch.no_grad()
def representations(model: HookedTransformer, queries: Sequence[Query]) -> Float[Tensor, "query d_model"]:
    """The normalised final residual at each query's first readout position, less its mean over the queries."""
    name, read = "ln_final.hook_normalized", []
    for batch in batches(queries, model.cfg):
        _, cache = model.run_with_cache(batch.tokens, attention_mask=batch.attention_mask, names_filter=[name])
        read.append(batch.at_readout(cache[name])[:, 0].double().cpu())
    stacked = torch.cat(read)
    return stacked - stacked.mean(0)


def by_question(x: Float[Tensor, "query d_model"]) -> Float[Tensor, "question context d_model"]:
    """Representations by question (fact and side that is asked for) and context, from the order that pairs come in."""
    return rearrange(x, "(fact context side) d -> (fact side) context d", context=N_CONTEXTS, side=2)


def _questions(pairs: Sequence[QueryPair]) -> list[QueryPair]:
    """One pair per question, in the order of `by_question`."""
    return [pair for place, pair in enumerate(pairs) if place % (2 * N_CONTEXTS) < 2]


def relations(pairs: Sequence[QueryPair], world: FactWorld) -> dict[str, Bool[Tensor, "question other"]]:
    """Which question shares what with which other one; `pairs` holds one pair per question."""
    fact = torch.tensor([pair.fact for pair in pairs])
    answer, source = (torch.tensor([getattr(pair.forward, name)[0] for pair in pairs]) for name in ("answer", "source"))
    kind = _kind(pairs, world)

    def same(x: Int[Tensor, "question"]) -> Tensor:
        return x[:, None] == x[None, :]

    return {
        "same_fact": same(fact) & same(kind),
        "same_answer": ~same(fact) & same(answer),
        "same_source": ~same(fact) & same(source),
        "same_relation": ~same(fact) & same(kind),
    }


def _kind(pairs: Sequence[QueryPair], world: FactWorld) -> Int[Tensor, "question"]:
    """A number per relation and side that is asked for."""
    return torch.tensor([2 * int(world.facts[pair.fact, 1]) + (pair.side == "right") for pair in pairs])


def mean_cosines(
    forward: Float[Tensor, "query d_model"],
    reverse: Float[Tensor, "query d_model"],
    pairs: Sequence[QueryPair],
    world: FactWorld,
) -> dict[str, float]:
    """Mean cosine of forward representations with those of `COSINES`, never in the same context."""
    half = N_CONTEXTS // 2
    f, r = (by_question(torch.nn.functional.normalize(x, dim=-1)) for x in (forward, reverse))
    f_early, f_late, r_late = f[:, :half].mean(1), f[:, half:].mean(1), r[:, half:].mean(1)
    cosine = f_early @ r_late.T  # of the means of unit vectors: the mean over contexts of the cosines
    masks = relations(_questions(pairs), world)
    ceiling = (f_early * f_late).sum(-1).mean().item()
    return {"other_context": ceiling} | {name: cosine[mask].mean().item() for name, mask in masks.items()}


def answers(model: HookedTransformer, pairs: Sequence[QueryPair], world: FactWorld) -> dict[str, float]:
    """Mean probability, in reverse queries, of the true answer and of the other entity that the source has a fact with:
    the one that training showed on the side of the mask."""
    questions = _questions(pairs)
    other = relations(questions, world)["same_source"].int().argmax(1)
    elsewhere = {(q.fact, q.side): questions[i].forward.answer for q, i in zip(questions, other.tolist(), strict=True)}
    confused = [replace(pair.reverse, answer=elsewhere[pair.fact, pair.side]) for pair in pairs]
    asked = {"reverse_probability": [pair.reverse for pair in pairs], "other_fact_probability": confused}
    return {name: predict(model, queries).probability.mean().item() for name, queries in asked.items()}


def probe_accuracies(
    forward: Float[Tensor, "query d_model"],
    reverse: Float[Tensor, "query d_model"],
    pairs: Sequence[QueryPair],
    world: FactWorld,
) -> dict[str, float]:
    """How often a ridge probe picks the true answer among the entities of its role, in contexts it was not trained on;
    and how often when its training labels are permuted over the facts of the same relation and side."""
    questions = _questions(pairs)
    answer, kind = torch.tensor([pair.forward.answer[0] for pair in questions]), _kind(questions, world)
    generator = torch.Generator().manual_seed(0)
    labels = answer.repeat(1 + N_PERMUTATIONS, 1)
    for row in labels[1:]:
        shuffled = (kind + torch.rand(len(kind), generator=generator)).argsort()  # within a kind only
        row[kind.argsort(stable=True)] = answer[shuffled]
    role = world.candidates([pair.forward for pair in questions])
    half = N_CONTEXTS // 2
    both = {"forward": by_question(forward), "reverse": by_question(reverse)}
    accuracies = {}
    for name in PROBES:
        trained, read = name.split("_to_")
        weights = ridge(both[trained][:, :half], labels, world.config.n_entities)
        scores = einsum(
            both[read][:, half:],
            weights,
            "question context d, labelling d entity -> labelling question context entity",
        )
        candidates = scores.gather(-1, role[None, :, None].expand(*scores.shape[:3], -1))
        chosen = role[torch.arange(len(role))[:, None], candidates.argmax(-1)]
        right = (chosen == answer[:, None]).double().mean((1, 2))
        accuracies |= {name: right[0].item(), f"{name}_null": right[1:].mean().item()}
    return accuracies


def ridge(
    x: Float[Tensor, "question context d_model"], labels: Int[Tensor, "labelling question"], n_classes: int
) -> Float[Tensor, "labelling d_model class"]:
    """Weights (X^T X + penalty)^-1 X^T Y from representations to one-hot labels, one set per labelling."""
    gram = einsum(x, x, "question context d, question context e -> d e")
    penalty = RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=x.dtype)
    one_hot = torch.nn.functional.one_hot(labels, n_classes).to(x.dtype)
    hits = einsum(x, one_hot, "question context d, labelling question entity -> labelling d entity")
    return torch.linalg.solve(gram + penalty, hits)


def summarize(result: Result) -> dict[str, Estimate]:
    frame, summary = result.frame, {}
    measured = [*COSINES, *PROBES, *(f"{probe}_null" for probe in PROBES), *ANSWERS]
    for variant in _variants(result):
        for stage in STAGES:
            at = where(frame, variant=variant, stage=stage)
            for column in measured:
                summary[f"{variant} / {stage} / {column}"] = mean_estimate(at[column])
            excess = {"same_fact over same_relation": at["same_fact"] - at["same_relation"]}
            excess |= {f"{probe} over null": at[probe] - at[f"{probe}_null"] for probe in PROBES}
            summary |= {f"{variant} / {stage} / {name}": mean_estimate(over) for name, over in excess.items()}
    summary["chance"] = mean_estimate(frame.groupby("seed")["chance"].first())
    return summary


def _variants(result: Result) -> list[str]:
    return list(dict.fromkeys(result.frame["variant"]))


def two_entries(summary: Mapping[str, Estimate], variant: str) -> bool:
    """Whether a variant ends as two entries predict: a fact's queries no closer than the null, nothing carried over by
    the forward-trained probe, and yet a reverse-trained one reads above its null (95 % intervals)."""
    end = f"{variant} / end / "
    carried = max(summary[f"{end}same_fact over same_relation"].low, summary[f"{end}forward_to_reverse over null"].low)
    return carried <= 0 < summary[f"{end}reverse_to_reverse over null"].low


def takeaway(result: Result) -> str:
    summary = result.summary
    variants = [key.split(" / ")[0] for key in summary if key.endswith(" / end / same_fact")]

    def value(variant: str, column: str, stage: str = "end") -> str:
        return f"{summary[f'{variant} / {stage} / {column}'].value:.2f}"

    def listed(column: str) -> str:
        return ", ".join(f"{value(v, column)} ({v})" for v in variants)

    carried = ", ".join(
        f"{value(v, 'forward_to_reverse')} ({v}, untrained {value(v, 'forward_to_reverse', 'initial')})"
        for v in variants
    )
    read = min(variants, key=lambda v: summary[f"{v} / end / reverse_to_reverse"].value)
    confused = max(variants, key=lambda v: summary[f"{v} / end / other_fact_probability"].value)
    separate = [variant for variant in variants if two_entries(summary, variant)]
    return (
        f"End of training: a fact's forward and reverse representation have cosine {listed('same_fact')}; with another "
        f"fact {listed('same_relation')}. A probe trained forward gets {carried} of reverse answers right, one trained "
        f"in reverse at least {value(read, 'reverse_to_reverse')}. {confused} gives the answer of the source's other "
        f"fact probability {value(confused, 'other_fact_probability')}. "
        f"As two entries predict: {', '.join(separate) or 'none'}."
    )


def draw(result: Result) -> go.Figure:
    frame, variants = result.frame, _variants(result)
    figure = make_subplots(
        3, len(variants), subplot_titles=variants, horizontal_spacing=0.02, vertical_spacing=0.14, shared_xaxes=True
    )
    nulls = frame[[f"{probe}_null" for probe in PROBES]].mean(axis=1)
    frame = frame.assign(place=frame["stage"].map(STAGES.index), probe_null=nulls)
    rows = (COSINES, {**PROBES, "probe_null": ("null: labels permuted", GREY)}, ANSWERS)
    for col, variant in enumerate(variants, start=1):
        group = where(frame, variant=variant)
        for row, marks in enumerate(rows, start=1):
            legend = ("legend", "legend2", "legend3")[row - 1] if col == 1 else None
            for i, (column, (name, color)) in enumerate(marks.items()):
                points, shift = curve(group, "place", column), 0.05 * (i - len(marks) / 2)
                place: dict[str, Any] = {"row": row, "col": col, "shift": shift, "legend": legend}
                add_points(figure, points, "place", name=name, color=color, **place)
        ends, chance, legend = [0, len(STAGES) - 1], group["chance"].iloc[0], "legend3" if col == 1 else None
        add_level(figure, ends, chance, name="chance", color=CHANCE, row=3, col=col, legend=legend)
    shown = [stage for stage in STAGES if stage in set(frame["stage"])]
    figure.update_xaxes(tickvals=[STAGES.index(stage) for stage in shown], ticktext=shown, range=[-0.4, 2.4])
    figure.update_xaxes(title_text="stage of training", showticklabels=True)
    figure.update_yaxes(range=[-0.03, 1.03])
    figure.update_yaxes(range=[frame[list(COSINES)].min(axis=None) - 0.05, 1.05], row=1)
    for col in range(2, len(variants) + 1):
        figure.update_yaxes(showticklabels=False, col=col)
    titles = ("mean cosine of centred<br>representations", "share of answers that a<br>linear probe gets right")
    for row, title in enumerate((*titles, "probability in the<br>reverse query"), start=1):
        figure.update_yaxes(title_text=title, row=row, col=1)
    figure.update_layout(legend=legend_at(0.5, 0.685), legend2=legend_at(0.5, 0.3), legend3=legend_at(0.5, -0.08))
    figure.update_layout(height=1300)
    return figure


ANALYSIS = Analysis(
    name="two_slots",
    question="Are the forward and the reverse query of one fact represented alike?",
    configs=configs,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    settings={"n_contexts": N_CONTEXTS, "ridge": RIDGE, "n_permutations": N_PERMUTATIONS},
    order=95,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
