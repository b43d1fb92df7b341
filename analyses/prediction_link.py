"""Whether gradient alignment, route correlation and evidence go with reverse prediction: over training within a run,
and across runs at each stage, beyond what forward prediction says already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.depth import evidence_scores
from mdm_interp.analysis import Analysis
from mdm_interp.claims import ClaimTest
from mdm_interp.config import TrainConfig
from mdm_interp.coupling import inner_products, mean_gradient
from mdm_interp.presets import MDM_SCHEMES, SCOPE, STAGES, WORLDS, about, grid, stages
from mdm_interp.results import Result
from mdm_interp.routing import route_correlation
from mdm_interp.runs import Run
from mdm_interp.stats import Estimate, bootstrap_mean, partial_rank_correlation, rank_correlation, where
from mdm_interp.viz.theme import BLUE, CHANCE, legend_at, titled
from mdm_interp.viz.theme import VARIANTS as COLORS

SIGNATURES = {
    "alignment": "gradient alignment (cosine)",
    "route": "route correlation",
    "evidence": "evidence for the answer (z-score)",
}
CONSTANT = 0.01
"""A signature that varies less than this over a run is constant, and has no rank worth correlating."""


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    return [config for config in grid(seeds) if config.objective == "any_order"]


def measure(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per run and checkpoint: the signatures and both probabilities; `stage` where the checkpoint is one."""
    rows = []
    for run in runs:
        pairs, metrics = run.query_pairs(n_contexts=1), {entry["step"]: entry for entry in run.metrics()}
        named = {step: stage for stage, step in reversed(stages(run).items())}
        for step in sorted({*run.steps[::2], *named}):
            model = run.model(step)
            forward = mean_gradient(model, [pair.forward for pair in pairs])
            reverse = mean_gradient(model, [pair.reverse for pair in pairs])
            size = inner_products(forward, forward)["all"] * inner_products(reverse, reverse)["all"]
            rows.append(
                {
                    **about(run),
                    "step": step,
                    "stage": named.get(step),
                    "alignment": inner_products(forward, reverse)["all"] / size**0.5,
                    "route": route_correlation(model, pairs).nanmean().item(),
                    "evidence": evidence_scores(model, pairs, run.facts)[0].mean().item(),
                    "forward_probability": metrics[step]["forward_probability"],
                    "reverse_probability": metrics[step]["reverse_probability"],
                }
            )
    return rows


def link_over_training(frame: pd.DataFrame, signature: str) -> pd.DataFrame:
    """Per run: partial rank correlation over checkpoints of the signature with reverse probability, given forward
    probability (`effect`), and of the next seed's signature at the same steps (`null`), which shares the course of
    training and nothing else. NaN where the signature is constant, or where forward probability leaves nothing."""
    rows = []
    for scope in frame[list(SCOPE)].drop_duplicates().to_dict("records"):
        runs = [run.sort_values("step") for _, run in where(frame, **_named(scope)).groupby("seed")]
        for run, other in zip(runs, [*runs[1:], *runs[:1]], strict=True):
            same = run.merge(other[["step", signature]], on="step", suffixes=("", "_other"))
            rows.append(
                {
                    **_named(scope),
                    "stage": "over training",
                    "seed": run["seed"].iloc[0],
                    "effect": _partial(same, signature),
                    "null": _partial(same, f"{signature}_other"),
                }
            )
    return pd.DataFrame(rows)


def _named(scope: dict[Any, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in scope.items()}


def _partial(run: pd.DataFrame, signature: str) -> float:
    if np.ptp(run[signature]) < CONSTANT:
        return float("nan")
    return partial_rank_correlation(run[signature], run["reverse_probability"], given=run["forward_probability"])


def across_runs(frame: pd.DataFrame, signature: str, stage: str) -> pd.DataFrame:
    """Per world and seed: rank correlation over the position schemes, at a stage, of the signature with reverse
    probability. Its mean over all ways to deal the signatures to the schemes, the null, is 0. Whatever else tells the
    schemes apart is not held still: this says that both go together, not why."""
    rows = []
    for world in frame["world"].unique():
        at = where(frame, world=world, stage=stage)
        for seed, runs in at.groupby("seed"):
            x, y = runs[signature].to_numpy(dtype=float), runs["reverse_probability"].to_numpy(dtype=float)
            where_measured = {"world": world, "scheme": "all", "objective": "any_order", "n_layers": 1, "mlp": False}
            rows.append({**where_measured, "stage": stage, "seed": seed, "effect": rank_correlation(x, y), "null": 0.0})
    return pd.DataFrame(rows)


def summarize(result: Result) -> dict[str, Estimate]:
    frame, summary = result.frame, {}
    for signature in SIGNATURES:
        linked = link_over_training(frame, signature)
        for world in WORLDS:
            for scheme in MDM_SCHEMES:
                group = where(linked, world=world, scheme=scheme)
                for column in ("effect", "null"):
                    summary[f"{signature} / {world} {scheme} / over training, {column}"] = bootstrap_mean(group[column])
            for stage in STAGES:
                if (frame["stage"] == stage).any():
                    group = where(across_runs(frame, signature, stage), world=world)
                    for column in ("effect", "null"):
                        key = f"{signature} / {world} / across schemes, {stage}, {column}"
                        summary[key] = bootstrap_mean(group[column])
    return summary


def takeaway(summary: dict[str, Estimate]) -> str:
    def over(signature: str, scheme: str) -> str:
        effect, null = (
            summary[f"{signature} / relation_cycle {scheme} / over training, {column}"] for column in ("effect", "null")
        )
        return f"{effect.value:.2f} (null {null.value:.2f})" if effect.n else "undefined"

    listed = "; ".join(
        f"{signature} {over(signature, 'rope')} under rope, {over(signature, 'learned')} under learned"
        for signature in SIGNATURES
    )
    return (
        "relation_cycle, over training: partial rank correlation with reverse probability, given forward probability: "
        f"{listed}. The null takes the signature of another seed. Nothing is defined where a signature is constant, or "
        "where forward probability leaves nothing to explain."
    )


def draw(result: Result) -> go.Figure:
    frame, summary = result.frame, result.summary
    figure = make_subplots(
        2,
        len(SIGNATURES),
        subplot_titles=[f"{name}, all checkpoints" for name in SIGNATURES]
        + [f"{name}: rank correlations" for name in SIGNATURES],
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.2,
    )
    for col, (signature, label) in enumerate(SIGNATURES.items(), start=1):
        for scheme in MDM_SCHEMES:
            group = where(frame, world="relation_cycle", scheme=scheme)
            trace = go.Scatter(
                x=group[signature],
                y=group["reverse_probability"],
                mode="markers",
                marker={"color": COLORS[f"MDM {scheme}"], "size": 6, "opacity": 0.6},
                name=scheme,
                legendgroup=scheme,
                showlegend=col == 1,
                legend="legend",
                customdata=group[["seed", "step"]],
                hovertemplate="seed %{customdata[0]}, step %{customdata[1]}: %{x:.3g}, %{y:.3g}<extra></extra>",
            )
            figure.add_trace(trace, row=1, col=col)
        figure.update_xaxes(title_text=label, row=1, col=col)
        names = [name.removesuffix(", effect") for name in summary if name.startswith(f"{signature} / ")]
        names = [name for name in dict.fromkeys(names) if not name.endswith("null") and summary[f"{name}, effect"].n]
        for column, color in (("effect", BLUE), ("null", CHANCE)):
            estimates = [summary[f"{name}, {column}"] for name in names]
            shown = [(name, estimate) for name, estimate in zip(names, estimates, strict=True) if estimate.n]
            if not shown:
                continue
            trace = go.Scatter(
                x=[estimate.value for _, estimate in shown],
                y=[name.removeprefix(f"{signature} / ").replace(" / ", ", ") for name, _ in shown],
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [estimate.high - estimate.value for _, estimate in shown],
                    "arrayminus": [estimate.value - estimate.low for _, estimate in shown],
                },
                mode="markers",
                marker={"color": color, "size": 9},
                name={"effect": "own signature", "null": "null: another seed's signature, or one dealt at random"}[
                    column
                ],
                legendgroup=column,
                legend="legend2",
                showlegend=col == 1,
            )
            figure.add_trace(trace, row=2, col=col)
        figure.update_xaxes(title_text="rank correlation", range=[-1.1, 1.1], row=2, col=col)
    figure.update_yaxes(title_text="reverse probability,<br>relation_cycle", row=1, col=1)
    figure.update_yaxes(title_text="setting", tickfont_size=13, autorange="reversed", row=2, col=1)
    figure.update_layout(legend=legend_at(0.5, 0.5), legend2=legend_at(0.5, -0.08))
    return titled(figure, result.question, takeaway(summary), height=1150)


CLAIMS = tuple(
    ClaimTest(
        claim="7",
        measure=f"partial rank correlation over training of {label} with reverse probability, given forward "
        "probability",
        effect="effect",
        null="null",
        null_is="the signature of another seed at the same steps",
        side="above",
        margin=0.1,
        rows=lambda result, signature=signature: link_over_training(result.frame, signature),
    )
    for signature, label in SIGNATURES.items()
) + tuple(
    ClaimTest(
        claim="7",
        measure=f"rank correlation across position schemes of {label} with reverse probability",
        effect="effect",
        null="null",
        null_is="signatures dealt to the schemes at random",
        side="above",
        margin=0.1,
        rows=lambda result, signature=signature: pd.concat(
            across_runs(result.frame, signature, stage) for stage in STAGES if (result.frame["stage"] == stage).any()
        ),
    )
    for signature, label in SIGNATURES.items()
)

ANALYSIS = Analysis(
    name="prediction_link",
    question="Do alignment, route correlation and evidence go with reverse prediction?",
    configs=configs,
    measure=measure,
    summarize=summarize,
    draw=draw,
    claims=CLAIMS,
    settings={"constant": CONSTANT},
    order=90,
)

if __name__ == "__main__":
    ANALYSIS.main()
