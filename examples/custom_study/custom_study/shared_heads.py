"""Silencing heads: whether the head that a model needs most for its forward answers is the one it needs in reverse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mdm_interp import (
    Analysis,
    HookedTransformer,
    Query,
    Result,
    Run,
    Summary,
    TrainConfig,
    predict,
    queries_of,
    stages,
)
from mdm_interp.data.queries import Direction
from mdm_interp.experiments.grids import MANY_HEADS, head_grid
from mdm_interp.viz import CHANCE, FORWARD, REVERSE, Panels

QUERIES: dict[Direction, str] = {"forward": FORWARD, "reverse": REVERSE}


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    """Give the MDMs that the report's own figures train anyway: their width shared out among four heads, under four
    position schemes."""
    return [
        config
        for config in head_grid(seeds)
        if config.objective == "any_order" and config.model.n_heads == MANY_HEADS
        if MANY_HEADS * config.model.head_dim == config.model.d_model
    ]


@contextmanager
def silenced_head(model: HookedTransformer, layer: int, head: int) -> Iterator[None]:
    """Let one head write nothing inside."""

    def silence(z: Float[Tensor, "batch pos head d_head"], hook: HookPoint) -> Float[Tensor, "batch pos head d_head"]:
        edited = z.clone()
        edited[:, :, head] = 0
        return edited

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", silence)]):
        yield


def drops(model: HookedTransformer, queries: Sequence[Query]) -> Float[Tensor, "query head"]:
    """Compute by how many nats each answer's log-probability falls when one head is silenced, for the heads of all
    layers, layer by layer. It is negative where the head was in the way."""
    whole, after = predict(model, queries).log_probability, []
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            with silenced_head(model, layer, head):
                after.append(predict(model, queries).log_probability)
    return whole[:, None] - torch.stack(after, dim=1)


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Give one row per direction: the mean drop (nats) for the head that the forward queries need most, and for the
    other heads (their mean), the control.

    The head is chosen on one half of the facts and measured on the other, and the other way round: on the facts it is
    chosen on, the largest of several drops is too large.
    """
    rows = []
    model, pairs = run.model(step), run.query_pairs()
    odd = torch.tensor([pair.fact % 2 == 1 for pair in pairs])
    fallen = {side: drops(model, queries_of(pairs, side)) for side in QUERIES}
    chosen = [int(fallen["forward"][half].mean(0).argmax()) for half in (odd, ~odd)]
    for side, drop in fallen.items():
        means = [drop[half].mean(0) for half in (~odd, odd)]
        of_chosen = [mean[head] for mean, head in zip(means, chosen, strict=True)]
        of_others = [(mean.sum() - own) / (len(mean) - 1) for mean, own in zip(means, of_chosen, strict=True)]
        halves = {"chosen": torch.stack(of_chosen), "others": torch.stack(of_others)}
        rows.append({"query": side, **{name: half.mean().item() for name, half in halves.items()}})
    return rows


def summarize(result: Result) -> Summary:
    """Give means over runs, one per seed."""
    frame = result.frame.assign(difference=result.frame["chosen"] - result.frame["others"])
    return Summary.of(frame, ("scheme", "query"), ("chosen", "others", "difference"))


def takeaway(result: Result) -> str:
    def said(scheme: str) -> str:
        reverse = {"scheme": scheme, "query": "reverse"}
        chosen, others = (result.summary.at(head, **reverse).value for head in ("chosen", "others"))
        return f"{chosen:.2g} under {scheme} (other heads {others:.2g})"

    return (
        "Nats that the reverse answer loses without the head that forward answers need most: "
        f"{', '.join(map(said, dict.fromkeys(result.frame['scheme'])))}."
    )


def draw(result: Result) -> Panels:
    panels = Panels()
    y = {"title": "drop of the answer's log-probability<br>without the head (nats)"}
    row = panels.row([f"{side} query" for side in QUERIES], x={"title": "position scheme"}, y=y, height=380)
    for panel, (side, color) in zip(row, QUERIES.items(), strict=True):
        for head, name, shade, symbol in (
            ("chosen", f"head that forward queries need most, {side} query", color, "circle"),
            ("others", "control: the other heads", CHANCE, "diamond-open"),
        ):
            schemes = dict.fromkeys(result.frame["scheme"])
            estimates = {scheme: result.summary.at(head, scheme=scheme, query=side) for scheme in schemes}
            panel.estimates(estimates, name=name, color=shade, symbol=symbol, upright=True)
    return panels


ANALYSIS = Analysis(
    name="shared_heads",
    question="Does the head that answers forward answer in reverse too?",
    configs=configs,
    measure=measure,
    when=partial(stages, which=["end"]),
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    order=200,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
