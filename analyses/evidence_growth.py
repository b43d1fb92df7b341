"""Evidence for the true answer over training, and the entity-by-entity evidence matrix before and after."""

from __future__ import annotations

from typing import Any, Literal

from mdm_interp import Analysis, Result, Run, Summary, all_checkpoints, first_and_last, where
from mdm_interp.experiments.grids import VARIANTS, cycle_grid, variant_of
from mdm_interp.measures.evidence import margin_and_rank, relation_evidence
from mdm_interp.viz import (
    CHANCE,
    FORWARD,
    REVERSE,
    TRAINING_STEPS,
    Panels,
    between,
    opening,
    sample_size,
    shown,
    told,
    with_n,
)

SOURCES: dict[str, Literal["left", "right"]] = {"A given B": "right", "B given A": "left"}
"""The evidence matrices of facts `A r B`, and on which side their sources are."""
MATRICES = {"MDM rope": ("A given B",), "ARM rope": ("B given A", "A given B")}
"""Whose matrices are shown: an MDM reads A given B in both directions; an ARM reads B given A when asked forward and A
given B when asked in reverse."""


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Measure margin and rank per query kind; of the first seed, before and after, matrices of the first relation."""
    model, pairs, world, variant = run.model(step), run.query_pairs(), run.facts, variant_of(run.config)
    asked = {"forward": [pair.forward for pair in pairs], "reverse": [pair.reverse for pair in pairs]}
    rows: list[dict[str, Any]] = []
    for kind, queries in asked.items():
        margin, rank = margin_and_rank(model, queries, world.candidates(queries))
        measured = {"margin": margin.mean().item(), "rank": rank.float().mean().item()}
        rows.append({"query": kind, **measured, "chance_rank": (len(world.role(0)) + 1) / 2})
    if run.config.seed == 0 and step in (run.steps[0], run.steps[-1]):
        for cells in MATRICES.get(variant, ()):
            matrix = relation_evidence(model, world, int(world.facts[0, 1]), SOURCES[cells])
            rows += [{"query": cells, **cell} for cell in matrix]
    return [{"variant": variant, **row} for row in rows]


def summarize(result: Result) -> Summary:
    frame = result.frame.dropna(subset=["margin"])
    by_chance = Summary.of(frame.drop_duplicates("seed"), (), ("chance_rank",))
    return Summary.of(first_and_last(frame), ("variant", "query", "stage"), ("margin", "rank")) + by_chance


def takeaway(result: Result) -> str:
    """Say in whom the reverse query reads evidence for the answer: the whole interval of its rank is better than
    chance."""
    summary, chance = result.summary, result.summary.at("chance_rank").value
    ranks = {variant: summary.at("rank", variant=variant, query="reverse", stage="end") for variant in VARIANTS}
    answers = {
        variant: "yes" if rank.high < chance else "no" if rank.low > chance else "undecided"
        for variant, rank in ranks.items()
    }
    of_mdms, (of_arm,) = (
        [rank.value for variant, rank in ranks.items() if variant.startswith("MDM") == mdm] for mdm in (True, False)
    )
    forward = summary.at("rank", variant="ARM rope", query="forward", stage="end").value
    return (
        f"{opening(told(answers))}. Among {2 * chance - 1:.0f} entities of its role, the true answer's evidence in the "
        f"reverse query ends at mean rank {between(of_mdms, '.1f')} in MDMs, at {of_arm:.1f} in the ARM (forward "
        f"{forward:.1f}, by chance {chance:.3g}; {sample_size(ranks.values())})."
    )


def draw(result: Result) -> Panels:
    panels, frame = Panels(), result.frame
    curves = frame[frame["margin"].notna() & (frame["step"] > 0)]
    chance, lowest = curves["chance_rank"].iloc[0], {"range": [1.15 * curves["rank"].max(), 0]}
    margins = {"range": [curves["margin"].min() - 1, 1.1 * curves["margin"].max()]}
    rows = (
        ("rank", 300, {**lowest, "title": "rank of the true answer<br>(1 is best)"}, chance, "by chance"),
        ("margin", 180, {**margins, "title": "margin over the<br>strongest other<br>(logits × σ)"}, 0.0, "no margin"),
    )
    for quantity, height, y, level, name in rows:
        best = quantity == "rank"
        titles = [with_n(variant, where(curves, variant=variant)) if best else "" for variant in VARIANTS]
        row = panels.row(titles, x=TRAINING_STEPS, y=y, height=height)
        for panel, variant in zip(row, VARIANTS, strict=True):
            for query, color, dash in (("forward", FORWARD, "solid"), ("reverse", REVERSE, "dash")):
                group = where(curves, variant=variant, query=query)
                panel.curve(group, "step", quantity, name=f"{query} query", color=color, dash=dash, listed=best)
            panel.level(level, name=name, color=CHANCE, listed=best)
    _draw_matrices(panels, result)
    return panels


def _draw_matrices(panels: Panels, result: Result) -> None:
    cells = result.frame.dropna(subset=["evidence"])
    first, last, limit = cells["step"].min(), cells["step"].max(), float(cells["evidence"].abs().max())
    matrices = {
        f"{shown('MDM rope')}, before<br>A given B": ("MDM rope", "A given B", first),
        f"{shown('MDM rope')}, after<br>A given B": ("MDM rope", "A given B", last),
        f"{shown('ARM rope')}, after<br>B given A (trained)": ("ARM rope", "B given A", last),
        f"{shown('ARM rope')}, after<br>A given B (reverse)": ("ARM rope", "A given B", last),
    }
    unmarked = {"showticklabels": False, "ticks": ""}
    row = panels.row(list(matrices), x={**unmarked, "title": "source"}, y=unmarked, one_y=False, height=260)
    for panel, (variant, query, step) in zip(row, matrices.values(), strict=True):
        group = where(cells, variant=variant, query=query, step=step)
        table = group.pivot(index="target", columns="source", values="evidence")
        in_order = table.reindex(index=group["target"].unique(), columns=group["source"].unique())
        panel.matrix(in_order, limit=limit, scale="evidence" if panel is row[-1] else None)
    row[0].y(title="answer<br>(one seed)")


ANALYSIS = Analysis(
    name="evidence_growth",
    question="Does forward training store evidence that the reverse query reads?",
    configs=cycle_grid,
    measure=measure,
    when=all_checkpoints,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=20,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
