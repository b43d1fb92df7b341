"""Silencing heads: whether the head that a model needs most for its forward answers is the one it needs in reverse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mdm_interp.config import ModelConfig, TrainConfig
from mdm_interp.data.queries import Query
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.grids import MANY_HEADS, MDM_SCHEMES, head_grid
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import Moment, stages
from mdm_interp.inference.prediction import predict
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.tables import where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import add_estimates
from mdm_interp.viz.theme import FORWARD, GREY, REVERSE, legend_at

QUERIES = {"forward": FORWARD, "reverse": REVERSE}


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    """MDMs of four heads that the report's own figures train anyway, under four position schemes."""
    any_order = [config for config in head_grid(seeds) if config.objective == "any_order"]
    return [config for config in any_order if config.model.n_heads == MANY_HEADS and shares_width(config.model)]


def shares_width(model: ModelConfig) -> bool:
    """Whether its heads share the width out among them; the grid has wider ones as well."""
    return model.n_heads * model.head_dim == model.d_model


@contextmanager
def silenced_head(model: HookedTransformer, layer: int, head: int) -> Iterator[None]:
    """Inside it, one head writes nothing."""

    def silence(z: Float[Tensor, "batch pos head d_head"], hook: HookPoint) -> Float[Tensor, "batch pos head d_head"]:
        edited = z.clone()
        edited[:, :, head] = 0
        return edited

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", silence)]):
        yield


def drops(model: HookedTransformer, queries: Sequence[Query]) -> Float[Tensor, "query head"]:
    """By how many nats each answer's log-probability falls when one head is silenced; the heads of all layers, layer by
    layer. Negative where the head stood in the way."""
    whole, after = predict(model, queries).log_probability, []
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            with silenced_head(model, layer, head):
                after.append(predict(model, queries).log_probability)
    return whole[:, None] - torch.stack(after, dim=1)


def when(run: Run) -> list[Moment]:
    """The end of training."""
    return stages(run, ["end"])


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """One row per direction: the mean drop (nats) for the head that the forward queries need most, and for the other
    heads (their mean), the control.

    The head is chosen on one half of the facts and measured on the other, and the other way round: on the facts it is
    chosen on, the largest of several drops is too large.
    """
    rows = []
    model, pairs = run.model(step), run.query_pairs()
    odd = torch.tensor([pair.fact % 2 == 1 for pair in pairs])
    fallen = {side: drops(model, [getattr(pair, side) for pair in pairs]) for side in QUERIES}
    chosen = [int(fallen["forward"][half].mean(0).argmax()) for half in (odd, ~odd)]
    for side, drop in fallen.items():
        means = [drop[half].mean(0) for half in (~odd, odd)]
        of_chosen = [mean[head] for mean, head in zip(means, chosen, strict=True)]
        of_others = [(mean.sum() - own) / (len(mean) - 1) for mean, own in zip(means, of_chosen, strict=True)]
        halves = {"chosen": torch.stack(of_chosen), "others": torch.stack(of_others)}
        rows.append({"query": side, **{name: half.mean().item() for name, half in halves.items()}})
    return rows


def summarize(result: Result) -> dict[str, Estimate]:
    """Means over runs, one per seed."""
    summary = {}
    for scheme in MDM_SCHEMES:
        for side in QUERIES:
            rows = where(result.frame, scheme=scheme, query=side)
            for head in ("chosen", "others"):
                summary[f"{scheme} / {side} / {head}"] = mean_estimate(rows[head])
            summary[f"{scheme} / {side} / chosen over others"] = mean_estimate(rows["chosen"] - rows["others"])
    return summary


def takeaway(result: Result) -> str:
    summary = result.summary

    def said(scheme: str) -> str:
        chosen, others = (summary[f"{scheme} / reverse / {head}"].value for head in ("chosen", "others"))
        return f"{chosen:.2g} under {scheme} (other heads {others:.2g})"

    return (
        "Nats that the reverse answer loses without the head that forward answers need most: "
        f"{', '.join(map(said, MDM_SCHEMES))}."
    )


def draw(result: Result) -> go.Figure:
    figure = make_subplots(1, len(QUERIES), shared_yaxes=True, subplot_titles=[f"{side} query" for side in QUERIES])
    for col, (side, color) in enumerate(QUERIES.items(), start=1):
        for head, name, shade, symbol in (
            ("chosen", f"head that forward queries need most, {side} query", color, "circle"),
            ("others", "control: the other heads", GREY, "diamond-open"),
        ):
            estimates = {scheme: result.summary[f"{scheme} / {side} / {head}"] for scheme in MDM_SCHEMES}
            legend = "legend" if head == "chosen" or col == 1 else None
            add_estimates(
                figure,
                estimates,
                name=name,
                color=shade,
                symbol=symbol,
                row=1,
                col=col,
                upright=True,
                legend=legend,
            )
        figure.update_xaxes(title_text="position scheme", row=1, col=col)
    figure.update_yaxes(title_text="drop of the answer's log-probability<br>without the head (nats)", row=1, col=1)
    return figure.update_layout(legend=legend_at(0.5, -0.16), height=620)


ANALYSIS = Analysis(
    name="shared_heads",
    question="Does the head that answers forward answer in reverse too?",
    configs=configs,
    measure=measure,
    when=when,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=200,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
