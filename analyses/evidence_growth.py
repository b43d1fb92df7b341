"""Evidence for the true answer over training, and the entity-by-entity evidence matrix before and after."""

from __future__ import annotations

from typing import Any, Literal

from mdm_interp import Analysis, Result, Run, Summary, all_checkpoints, first_and_last, where
from mdm_interp.experiments.grids import VARIANTS, cycle_grid, variant_of
from mdm_interp.measures.evidence import margin_and_rank, relation_evidence
from mdm_interp.viz import CHANCE, TRAINING_STEPS, VARIANT_COLORS, Panels

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
    def rank(variant: str, query: str) -> str:
        return f"{result.summary.at('rank', variant=variant, query=query, stage='end').value:.1f}"

    mdm = ", ".join(f"{rank(variant, 'reverse')} ({variant})" for variant in VARIANTS if variant.startswith("MDM"))
    return (
        f"Among the {2 * result.summary.at('chance_rank').value - 1:.0f} entities of its role, the true answer's "
        f"evidence in the reverse query ends at mean rank {mdm}; in the ARM at {rank('ARM rope', 'forward')} forward "
        f"and {rank('ARM rope', 'reverse')} in reverse."
    )


def draw(result: Result) -> Panels:
    panels, frame = Panels(), result.frame
    curves = frame[frame["margin"].notna() & (frame["step"] > 0)]
    steps = {**TRAINING_STEPS, "title": "training step (solid: forward query, dotted: reverse)"}
    titles = ["margin over the strongest other", "rank of the true answer (1 is best)"]
    margin, rank = panels.row(titles, x=steps, one_y=False, height=300)
    for panel, quantity in ((margin, "margin"), (rank, "rank")):
        for variant, color in VARIANT_COLORS.items():
            for query, dash in (("forward", "solid"), ("reverse", "dot")):
                group = where(curves, variant=variant, query=query)
                panel.curve(group, "step", quantity, name=variant, color=color, dash=dash)
    margin.level(0.0, name="margin 0", color=CHANCE)
    rank.level(curves["chance_rank"].iloc[0], name="rank by chance", color=CHANCE)
    margin.y(title="evidence margin (logits × σ)")
    rank.y(title="mean rank")
    _draw_matrices(panels, result)
    return panels


def _draw_matrices(panels: Panels, result: Result) -> None:
    cells = result.frame.dropna(subset=["evidence"])
    first, last, limit = cells["step"].min(), cells["step"].max(), float(cells["evidence"].abs().max())
    shown = {
        "MDM rope, before<br>A given B": ("MDM rope", "A given B", first),
        "MDM rope, after<br>A given B": ("MDM rope", "A given B", last),
        "ARM rope, after<br>B given A (trained)": ("ARM rope", "B given A", last),
        "ARM rope, after<br>A given B (reverse)": ("ARM rope", "A given B", last),
    }
    unmarked = {"showticklabels": False, "ticks": ""}
    row = panels.row(list(shown), x={**unmarked, "title": "source"}, y=unmarked, one_y=False, height=260)
    for panel, (variant, query, step) in zip(row, shown.values(), strict=True):
        group = where(cells, variant=variant, query=query, step=step)
        table = group.pivot(index="target", columns="source", values="evidence")
        in_order = table.reindex(index=group["target"].unique(), columns=group["source"].unique())
        panel.matrix(in_order, limit=limit, scale="evidence" if panel is row[-1] else None)
    row[0].y(title="answer")


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
