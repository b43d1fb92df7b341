"""Whether the forward and the reverse query of a fact end in one representation, or in two that share nothing: cosines
against other facts, and linear probes trained on one direction and tested on the other.

What one entry per fact predicts, and what two: :mod:`mdm_interp.measures.representations`. The stage `initial`, where
nothing is stored, says how well a probe reads source and relation. Every source is in two facts, on either side of
its mask; what the model answers to the reverse query of one fact may be the entity of the other.
"""

from __future__ import annotations

from typing import Any

from mdm_interp import Analysis, Estimate, Result, Run, Summary, where
from mdm_interp.experiments.grids import cycle_mdm_grid, variant_of
from mdm_interp.experiments.scope import STAGES
from mdm_interp.inference.prediction import compare_answers
from mdm_interp.measures.representations import (
    N_PERMUTATIONS,
    RIDGE,
    Questions,
    compute_representations,
    mean_cosines,
    probe_accuracy,
)
from mdm_interp.viz import (
    CHANCE,
    GOLD,
    INDIGO,
    MAGENTA,
    OLIVE,
    PROBABILITY,
    REVERSE,
    Panels,
    listed,
    opening,
    sample_size,
    told,
    with_n,
)
from mdm_interp.viz.theme import PURPLE, SKY
from mdm_interp.viz.words import ANSWER

N_CONTEXTS = 8
"""Draws of place and filler per fact: probes are trained on half of them and tested on the other half."""

COSINES = {
    "other_context": ("same fact, both forward (ceiling)", INDIGO),
    "same_fact": ("same fact", MAGENTA),
    "same_answer": ("same answer, other fact", OLIVE),
    "same_source": ("same source, other fact", GOLD),
    "same_relation": ("null: same relation, other fact", CHANCE),
}
"""What a forward representation is compared with: a reverse one, except for the ceiling. The null asks for the same
side of another fact of the same relation."""
PROBES = {
    "forward_to_forward": ("trained forward, read forward", SKY),
    "forward_to_reverse": ("trained forward, read in reverse", REVERSE),
    "reverse_to_reverse": ("trained in reverse, read in reverse", PURPLE),
}
"""Stored results are known by these values, of which the figure takes no colours: they mean schemes."""
PROBE_COLORS = (INDIGO, REVERSE, MAGENTA)
ANSWERS = {
    "reverse_probability": ("true answer of the reverse query", REVERSE),
    "other_fact_probability": ("answer of the source's other fact", GOLD),
}


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Measure mean cosines, probe accuracies (`…_null`: labels permuted over facts), and the mean probability, in
    reverse queries, of the true answer and of the other entity that the source has a fact with: the one that training
    showed on the side of the mask."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=N_CONTEXTS)
    asked = {"forward": [pair.forward for pair in pairs], "reverse": [pair.reverse for pair in pairs]}
    seen = {direction: compute_representations(model, queries) for direction, queries in asked.items()}
    questions = Questions(pairs, run.facts)
    row = {"variant": variant_of(run.config), **mean_cosines(seen["forward"], seen["reverse"], questions)}
    for probe in PROBES:
        trained, read = probe.split("_to_")
        accuracy = probe_accuracy(seen[trained], seen[read], questions)
        row |= {probe: accuracy.effect, f"{probe}_null": accuracy.null}
    answered = compare_answers(model, pairs, run.facts)
    named = {"reverse_probability": "reverse_probability", "other_fact_probability": "rival_probability"}
    return [row | {column: answered[name] for column, name in named.items()}]


def summarize(result: Result) -> Summary:
    frame = result.frame.assign(same_fact_null=result.frame["same_relation"])
    over = {f"{name}_over_null": frame[name] - frame[f"{name}_null"] for name in ("same_fact", *PROBES)}
    quantities = [*COSINES, *PROBES, *ANSWERS, *over]
    chance = frame.groupby("seed")["chance"].first().reset_index()
    return Summary.of(frame.assign(**over), ("variant", "stage"), quantities) + Summary.of(chance, (), ("chance",))


def two_entries(summary: Summary, variant: str) -> bool:
    """Tell whether a variant ends as two entries predict: a fact's queries are no closer than the null, a probe trained
    forward carries nothing over, and yet one trained in reverse reads above its null (95 % intervals)."""

    def above_null(quantity: str) -> bool:
        return summary.at(f"{quantity}_over_null", variant=variant, stage="end").side == "above"

    carried = above_null("same_fact") or above_null("forward_to_reverse")
    return not carried and above_null("reverse_to_reverse")


def takeaway(result: Result) -> str:
    """Say in whom both queries are alike: closer than the null, and a probe trained forward reads the reverse one."""
    variants = list(result.frame["variant"].unique())

    def found(quantity: str, stage: str = "end") -> list[Estimate]:
        return [result.summary.at(quantity, variant=variant, stage=stage) for variant in variants]

    over = zip(found("same_fact_over_null"), found("forward_to_reverse_over_null"), strict=True)
    sides = [{near.side, carried.side} for near, carried in over]
    answers = [ANSWER[next(iter(of)) if len(of) == 1 else "undecided"] for of in sides]
    same, other, probe, untrained = (
        [estimate.value for estimate in found(*of)]
        for of in (
            ("same_fact",),
            ("same_relation",),
            ("forward_to_reverse",),
            ("forward_to_reverse", "initial"),
        )
    )
    two = [variant for variant in variants if two_entries(result.summary, variant)]
    return (
        f"{opening(told(dict(zip(variants, answers, strict=True))))}: a fact's two representations have cosine "
        f"{min(same):.2f} or more, unrelated ones {max(other):.2f} or less ({sample_size(found('same_fact'))}). A "
        f"probe trained forward gets {min(probe):.2f} or more of reverse answers right (untrained: up to "
        f"{max(untrained):.2f}).{f' As two entries predict: {listed(two)}.' if two else ''}"
    )


def draw(result: Result) -> Panels:
    panels, frame, variants = Panels(), result.frame, list(result.frame["variant"].unique())
    nulls = frame[[f"{probe}_null" for probe in PROBES]].mean(axis=1)
    frame = frame.assign(place=frame["stage"].map(STAGES.index), probe_null=nulls)
    x = {"title": "stage of training", "tickvals": [0, 1, 2], "ticktext": list(STAGES), "range": [-0.4, 2.4]}
    lowest = frame[list(COSINES)].min(axis=None) - 0.05
    drawn = zip(PROBES.items(), PROBE_COLORS, strict=True)
    probes = {probe: (name, color) for (probe, (name, _)), color in drawn}
    probes["probe_null"] = "null: labels permuted", CHANCE
    rows = (
        (COSINES, 300, {"range": [lowest, 1.05], "title": "cosine of a forward and<br>a reverse representation"}),
        (probes, 170, {**PROBABILITY, "title": "share of answers<br>that a linear probe<br>gets right"}),
        (ANSWERS, 170, {**PROBABILITY, "title": "probability in the<br>reverse query"}),
    )
    for marks, height, y in rows:
        titles = [with_n(variant, where(frame, variant=variant)) for variant in variants]
        titles = titles if marks is COSINES else [""] * len(variants)
        row = panels.row(titles, x=x, y=y, ticks=marks is not probes, height=height)
        for panel, variant in zip(row, variants, strict=True):
            group = where(frame, variant=variant)
            for i, (quantity, (name, color)) in enumerate(marks.items()):
                look = {"color": color, "shift": 0.09 * (i - (len(marks) - 1) / 2)}  # many are 1 in the end
                panel.points(group, "place", quantity, name=name, dash=DASHES[i], **look)
            if marks is ANSWERS:
                panel.level(group["chance"].iloc[0], name="chance", color=CHANCE, x=[0, 2])
    return panels


DASHES = ("solid", "dash", "dot", "dashdot", "solid")


ANALYSIS = Analysis(
    name="two_slots",
    question="Are the forward and the reverse query of one fact represented alike?",
    configs=cycle_mdm_grid,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    settings={"n_contexts": N_CONTEXTS, "ridge": RIDGE, "n_permutations": N_PERMUTATIONS},
    order=95,
    detail_of="evidence_growth",
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
