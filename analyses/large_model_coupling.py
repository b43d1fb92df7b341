"""Alignment of forward and reverse gradients of natural-language facts, layer by layer, against other facts' reverse
gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mdm_interp import CheckpointAnalysis, Probe, Result, Summary, where
from mdm_interp.data.queries import QueryPair
from mdm_interp.experiments.claims import ClaimTest
from mdm_interp.experiments.scope import scope_of
from mdm_interp.experiments.subjects import KINDS, Kind, demos
from mdm_interp.measures.answers import Side
from mdm_interp.measures.gradients import ROUTING, STORAGE, Alignment, gradient_alignment
from mdm_interp.stats.estimates import Contrast
from mdm_interp.stats.resampling import FactSample, places_above, rows_at
from mdm_interp.stats.tables import estimates_in
from mdm_interp.viz import CHANCE, CLUSTERS, PART_COLORS, Mark, Panel, Panels, draw_answers, share_scale
from mdm_interp.viz.words import sample_size, span

V_AND_O = "storage (V, O)"
GROUPS = {V_AND_O: STORAGE, "routing (Q, K)": ROUTING, "MLP": ("MLP",)}
"""What is shown of each layer."""
WHOLE = {
    "embedding": ("embedding",),
    "unembedding": ("unembedding",),
    "all": ("embedding", "position", "Q", "K", "V", "O", "norms", "MLP", "unembedding"),
}
"""What is measured over all layers together."""
COLORS = {V_AND_O: PART_COLORS["storage"], "routing (Q, K)": PART_COLORS["routing"], "MLP": PART_COLORS["MLP"]}
NULL = "null: V and O of another fact"
BY = ("checkpoint", "kind", "group")


def measure(probe: Probe) -> list[dict[str, Any]]:
    """Give one row per checkpoint, kind, layer and group of components, and one per group over all layers (layer null).

    `cosine_null` is the mean cosine with the reverse gradients of all other facts that are asked for the same side, `p`
    the one-sided chance of so large an excess of the mean cosine over it if there were none, not adjusted, and
    `positive` the share of cosines above 0. `cosine_n` and `cosine_null_n` count the independent clusters of facts
    behind a cosine, and `facts` and `clusters` all there are.

    Of a model with several layers there is one more row per cluster of facts that share names, which `seed` numbers:
    the cosine in V and O in the first half of the layers less that in the second (`halves`), and that in the layer
    where the other half of the clusters has the least (`least`); nulls as above.
    """
    rows: list[dict[str, Any]] = []
    cfg = probe.model.cfg
    layers = list(range(cfg.n_layers))
    for kind, sides in align(probe).items():
        sample = FactSample.of([pair for alignment in sides for pair in alignment.query_pairs])
        places = [(layer, [layer], name, GROUPS[name]) for layer in layers for name in GROUPS]
        places += [(None, None, name, parts) for name, parts in (GROUPS | WHOLE).items()]
        for layer, within, name, components in places:
            if not set(sides[0].components) & set(components):
                continue
            cosine = fact_cosine(sides, components, within)
            columns = {
                "cosine": cosine.map(sample.mean),
                "p": sample.mean(cosine.effect - cosine.null).p_above_zero,
                "positive": sample.mean((cosine.effect > 0).double()).value,
            }
            rows += rows_at(columns, (), {"kind": kind, "layer": layer, "group": name, **sample.counts})
        if cfg.n_layers > 1:
            scope = scope_of(cfg, f"{probe.name}, {kind}", "causal" if cfg.is_causal else "any_order")
            rows += [{**scope, "stage": "end", "kind": kind, **row} for row in by_cluster(sides, layers, sample)]
    return rows


def align(probe: Probe) -> dict[Kind, list[Alignment]]:
    """Compare the gradients of all pairs that are asked for the same side. Other pairs are never compared here. The
    kinds of reverse query go together, as they have forward queries in common."""
    found: dict[Kind, list[Alignment]] = {kind: [] for kind in KINDS}
    for side in get_args(Side):
        by_kind: dict[Kind, list[QueryPair]] = {
            kind: [pair for pair in probe.pairs(kind) if pair.side == side] for kind in KINDS
        }
        pairs = [pair for of_kind in by_kind.values() for pair in of_kind]
        if not pairs:
            continue
        together, start = gradient_alignment(probe.model, pairs), 0
        for kind, of_kind in by_kind.items():
            if of_kind:
                found[kind].append(together.among(range(start, start + len(of_kind))))
            start += len(of_kind)
    return found


def fact_cosine(
    sides: Sequence[Alignment], components: Sequence[str], layers: Sequence[int] | None
) -> Contrast[Float[Tensor, "pair"]]:
    """Compute the cosines of the pairs of all sides, one side after the other."""
    each = [alignment.fact_cosine(components, layers) for alignment in sides]
    return Contrast(torch.cat([cosine.effect for cosine in each]), torch.cat([cosine.null for cosine in each]))


def by_cluster(sides: Sequence[Alignment], layers: list[int], sample: FactSample) -> list[dict[str, Any]]:
    """Compare layers within each cluster of facts: the halves of the model, and the layer of least alignment, which is
    looked for in every second cluster and read in the others."""
    each = [fact_cosine(sides, STORAGE, [layer]) for layer in layers]
    own, null = (
        sample.per_cluster(torch.stack(of_layers, -1))
        for of_layers in zip(*((c.effect, c.null) for c in each), strict=True)
    )
    least = [own[1 - fold :: 2].nanmean(0).nan_to_num(torch.inf).argmin() for fold in (0, 1)]
    half, columns = (len(layers) + 1) // 2, dict[str, Float[Tensor, "cluster"]]()
    for name, values in (("", own), ("_null", null)):
        columns[f"halves{name}"] = values[:, :half].nanmean(1) - values[:, half:].nanmean(1)
        columns[f"least{name}"] = torch.stack([row[least[cluster % 2]] for cluster, row in enumerate(values)])
    return [
        {"seed": cluster, **{name: values[cluster].item() for name, values in columns.items()}}
        for cluster in range(sample.n_clusters)
    ]


def summarize(result: Result) -> Summary:
    """Give the cosines of all layers together, and the share of layers in which a group's exceeds its null, all layers
    looked at (:func:`~mdm_interp.stats.resampling.places_above`); a share has no interval."""
    whole, layers = result.frame[result.frame["layer"].isna()], result.frame.dropna(subset="layer")
    whole = whole.dropna(subset="group")
    shares = [
        {
            **dict(zip(BY, of, strict=True)),
            "share_above": places_above(group["p"].to_numpy()).mean(),
            "share_above_n": group["cosine_n"].min(),
        }
        for of, group in layers.groupby(list(BY), sort=False)
        if group["p"].notna().any()
    ]
    return Summary.read(whole, BY, ("cosine",)) + Summary.read(pd.DataFrame(shares), BY, ("share_above",))


def takeaway(result: Result) -> str:
    cosines = [entry for entry in result.summary.where("cosine", group=V_AND_O) if entry.null and entry.null.n]
    shares = [entry.effect for entry in result.summary.where("share_above", group=V_AND_O)]
    if not shares:
        return "Too few facts to compare one with another."
    least, most = (end(share.value for share in shares) for end in (min, max))
    layers = "every layer" if least == 1 else f"{span(shares, '.0%')} of its layers" if most else "no layer for sure"
    return (
        f"In {layers}, through V and O: over all layers, a fact's forward and reverse gradients there have a cosine of "
        f"{span(entry.effect for entry in cosines)}, those of two facts {span(entry.null for entry in cosines)} "
        f"({sample_size([entry.effect for entry in cosines], CLUSTERS)})."
    )


def draw(result: Result) -> Panels:
    panels, layers = Panels(), result.frame.dropna(subset="layer")
    marks = [
        *(Mark("cosine", group, color, of={"group": group}) for group, color in COLORS.items()),
        Mark("cosine_null", NULL, CHANCE, "x-thin", of={"group": V_AND_O}),
    ]
    x = {"title": "cosine of forward and reverse gradients", "zeroline": True}
    whole = result.summary.where("cosine")
    draw_answers(panels, whole, "all layers together", marks, x)
    checkpoints = list(dict.fromkeys(result.frame["checkpoint"]))
    drawn: list[Panel] = []
    for checkpoint in checkpoints:
        x: dict[str, Any] = {"title": "layer" if checkpoint == checkpoints[-1] else None}
        x["dtick"] = 1 if layers["layer"].max() < 12 else 4
        row = panels.row([f"{checkpoint}, {kind} reverse" for kind in KINDS], x=x, y={"title": "cosine"}, height=170)
        drawn += row
        for panel, kind in zip(row, KINDS, strict=True):
            for group, color in COLORS.items():
                shown = where(layers, checkpoint=checkpoint, kind=kind, group=group)
                panel.curve(estimates_in(shown, "cosine"), "layer", name=group, color=color)
            of_v_and_o = where(layers, checkpoint=checkpoint, kind=kind, group=V_AND_O)
            panel.curve(estimates_in(of_v_and_o, "cosine_null"), "layer", name=NULL, color=CHANCE, dash="dot")
    share_scale([panel for panel in drawn if panel.traces()] or drawn)
    return panels


def clusters(result: Result) -> pd.DataFrame:
    """Return the rows of clusters of facts."""
    return pd.DataFrame([row for row in result.rows if row.get("seed") is not None])


CLAIMS = tuple(
    ClaimTest(
        claim="6",
        measure=f"cosine of a fact's forward and reverse gradients in V and O, {of}",
        effect=name,
        null=f"{name}_null",
        null_is="with other facts' reverse gradients that are asked for the same side",
        side="above",
        margin=margin,
        rows=clusters,
        unit="clusters of facts",
    )
    for of, name, margin in (
        ("in a checkpoint's first half of layers less its second", "halves", 0.0),
        ("in the layer of a checkpoint where other facts have the least", "least", 0.1),
    )
)
"""What the authors report of depth: alignment in every layer, and more of it in early ones."""

ANALYSIS = CheckpointAnalysis(
    name="large_model_coupling",
    question="In which layers does a step down a fact's forward loss lower its reverse loss?",
    configs=demos,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    claims=CLAIMS,
    order=230,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
