"""How much of the evidence in values depends on where its source is, over training and under six position schemes; and
layer by layer in deeper models, where evidence also holds what the context made of the source.

Shares are index / (1 + index): position's part in the variance of evidence over tokens and positions together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from mdm_interp import Analysis, Result, Run, Summary, TrainConfig, first_and_last, stages, where
from mdm_interp.experiments.grids import SCHEMES, depth_grid, scheme_grid
from mdm_interp.experiments.scope import STAGES, Moment, second_checkpoints
from mdm_interp.measures.evidence import as_share, evidence_matrix, pair_position_index, position_share
from mdm_interp.models.positions import POSITION_SCHEMES
from mdm_interp.viz import CHANCE, GREEN, GREY, PROBABILITY, PURPLE, SCHEME_COLORS, TRAINING_STEPS, Panel, Panels

UNRELATED = 0.5
"""The pair share when evidence in the two places has equal variance and is uncorrelated: half of it is position's."""
DEEP = {2: GREEN, 4: PURPLE}
DASHES = {"alibi": "dash", "none": "dot", "t5_bias": "dashdot"}
"""Of the schemes whose curves lie on that of rope."""


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    return [*scheme_grid(seeds), *(config for config in depth_grid(seeds) if config.model.n_layers in DEEP)]


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give one row per layer; of models of several layers the pair share only."""
    model, pairs = run.model(step), run.query_pairs(n_contexts=1)
    entities, positions = torch.arange(run.config.facts.n_entities), torch.arange(run.config.facts.seq_len)
    shares = {"share": float("nan"), "share_null": float("nan")}
    if model.cfg.n_layers == 1:
        found = position_share(evidence_matrix(model, entities, entities, positions))
        shares = {"share": found.effect, "share_null": found.null}
    per_layer = pair_position_index(model, pairs, entities).tolist()
    return [{"layer": layer, **shares, "pair_share": as_share(index)} for layer, index in enumerate(per_layer)]


def when(run: Run) -> list[Moment]:
    """Give every second checkpoint of a model of one layer, the stages of a deeper one."""
    return second_checkpoints(run) if run.config.model.n_layers == 1 else stages(run)


def summarize(result: Result) -> Summary:
    """Summarise one-layer models at their first and last checkpoint, and deeper ones by layer."""
    one, deep = where(result.frame, n_layers=1), result.frame[result.frame["n_layers"] > 1]
    largest = one.groupby(["scheme", "run"])["share"].max().reset_index(name="largest_share")
    return (
        Summary.of(first_and_last(one), ("scheme", "stage"), ("share", "pair_share"))
        + Summary.of(largest, ("scheme",), ("largest_share",))
        + Summary.of(deep, ("scheme", "n_layers", "mlp", "stage", "layer"), ("pair_share",))
    )


def takeaway(result: Result) -> str:
    summary = result.summary

    def share(scheme: str, stage: str) -> float:
        return summary.at("share", scheme=scheme, stage=stage).value

    relative = [scheme for scheme in SCHEMES if POSITION_SCHEMES[scheme].relative]
    largest = max(summary.at("largest_share", scheme=scheme).value for scheme in relative)
    moved = [
        f"{scheme} {share(scheme, 'initial'):.2f} to {share(scheme, 'end'):.2f}"
        for scheme in SCHEMES
        if scheme not in relative
    ]
    null = min(summary.null("share", scheme=scheme, stage="end").value for scheme in SCHEMES)
    ended = summary.where("pair_share", stage="end")
    above = [entry.effect.value for entry in ended if entry.of.get("layer", 0) > 0]
    deeper = f"between {min(above):.2g} and {max(above):.2g}" if above else "unmeasured"
    return (
        f"Position's share in first-layer evidence is at most {largest:.2g} under {', '.join(relative)}; training "
        f"moves it from {', '.join(moved)} (shuffled: {null:.2f} or more). In the upper layers of deeper models, the "
        f"share between the two places of a pair, context included, ends {deeper}."
    )


def draw(result: Result) -> Panels:
    panels, one = Panels(), where(result.frame, n_layers=1)
    trained, share = one[one["step"] > 0], {**PROBABILITY, "title": "position's share of<br>the evidence's variance"}
    titles = ["one layer, over all positions", "one layer, within pairs", "one layer, end of training"]
    row = panels.row(titles, y=share, widths=[2, 1, 1], ticks_height=90)
    for panel, quantity in zip(row, ("share", "pair_share"), strict=False):
        panel.x(**TRAINING_STEPS)
        for scheme, color in SCHEME_COLORS.items():
            group = where(trained, scheme=scheme)
            panel.curve(group, "step", quantity, name=scheme, color=color, dash=DASHES.get(scheme, "solid"))
    row[0].curve(trained, "step", "share_null", name="null: shuffled", color=GREY, dash="dot")
    row[1].level(UNRELATED, name="unrelated evidence in the two places", color=CHANCE)
    _draw_end(row[2], where(one, step=one["step"].max()))
    layers = {"title": "layer", "tickvals": list(range(1, max(DEEP) + 1)), "range": [0.7, max(DEEP) + 0.3]}
    deep = result.frame[result.frame["n_layers"] > 1]
    settings = {
        f"{scheme}, {'with MLP' if mlp else 'attention only'}": where(deep, scheme=scheme, mlp=mlp)
        for scheme in dict.fromkeys(deep["scheme"])
        for mlp in (False, True)
    }
    row = panels.row(list(settings), x=layers, y=share) if settings else []
    for panel, group in zip(row, settings.values(), strict=True):
        _draw_layers(panel, group.assign(layer=group["layer"] + 1))
    return panels


def _draw_end(panel: Panel, end: pd.DataFrame) -> None:
    """Draw both shares of every scheme."""
    for place, scheme in enumerate(SCHEMES):
        rows = where(end, scheme=scheme).assign(place=place)
        for shift, quantity in ((-0.12, "share"), (0.12, "pair_share")):
            panel.points(rows, "place", quantity, name=scheme, color=SCHEME_COLORS[scheme], shift=shift)
    panel.x(title="left: all positions; right: pairs", tickangle=45)
    panel.x(tickvals=list(range(len(SCHEMES))), ticktext=list(SCHEMES))


def _draw_layers(panel: Panel, group: pd.DataFrame) -> None:
    """Draw the pair share of deeper models at every stage."""
    for n_layers, color in DEEP.items():
        for stage, dash in zip(STAGES, ("dot", "dash", "solid"), strict=True):
            rows, name = where(group, n_layers=n_layers, stage=stage), f"{n_layers}-layer, {stage}"
            panel.points(rows, "layer", "pair_share", name=name, color=color, dash=dash)
    panel.level(UNRELATED, name="unrelated evidence in the two places", color=CHANCE, x=(1, max(DEEP)))


ANALYSIS = Analysis(
    name="position_invariance",
    question="Does what is stored know where it is?",
    configs=configs,
    measure=measure,
    when=when,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=50,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
