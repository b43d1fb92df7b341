"""The paper's claims, each measured with its null in every setting and at every stage of training: the rows that the
claims ledger is computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from mdm_interp.data.queries import QueryPair
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.analysis import Analysis
from mdm_interp.experiments.claims import ClaimTest, LinkTest
from mdm_interp.experiments.grids import every_run
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import SCOPE, STAGES, scope_label
from mdm_interp.interventions.effects import transplant_routes
from mdm_interp.measures.evidence import compute_evidence, evidence_scores, place_index
from mdm_interp.measures.gradients.alignment import STORAGE, gradient_alignment
from mdm_interp.measures.routes import route_correlation, score_correlation, score_correlation_null
from mdm_interp.models.positions import SCHEMES as POSITIONS
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.estimates import Estimate, mean_estimate
from mdm_interp.stats.tables import where
from mdm_interp.training.runs import Run
from mdm_interp.viz.plots import add_estimates
from mdm_interp.viz.theme import BLUE, CHANCE, legend_at
from mdm_interp.viz.theme import SCHEMES as COLORS

SINGLE_SIDED = ("source_only", "target_only")


def measure(run: Run, step: int) -> list[dict[str, Any]]:
    """Every signature beside its null; NaN where it is undefined (an ARM's routes)."""
    return [signatures(run.model(step), run.query_pairs(n_contexts=1), run.facts)]


def signatures(model: HookedTransformer, pairs: Sequence[QueryPair], world: FactWorld) -> dict[str, float]:
    """Measure every signature of a model and its null; NaN where the pairs share neither answer nor source.

    Of a deeper model, evidence and the share of place are those of the layer where they are largest, and so are their
    nulls; routes are averaged over layers and heads; gradients are of all layers together.
    """
    measured = evidence(model, pairs, world) | alignment(model, pairs)
    if all(pair.shared for pair in pairs):
        measured |= routes(model, pairs) | position(model, pairs, world) | transplant(model, pairs)
    names = ("route", "score", "position", "transplant")
    return dict.fromkeys((f"{name}{suffix}" for name in names for suffix in ("", "_null")), float("nan")) | measured


def evidence(model: HookedTransformer, pairs: Sequence[QueryPair], world: FactWorld) -> dict[str, float]:
    """Evidence for the true answer in the reverse query, in standard deviations above its role's mean, in the layer
    where it is largest; null: of the answer of another fact, likewise."""
    reverse = [pair.reverse for pair in pairs]
    true, other = evidence_scores(model, reverse, world.candidates(reverse))
    return {"evidence": true.max().item(), "evidence_null": other.max().item()}


def routes(model: HookedTransformer, pairs: Sequence[QueryPair]) -> dict[str, float]:
    """Correlation of forward and mirrored reverse rows of scores, mean over layers and heads, whose null is 0 (keys
    dealt at random); and of the raw scores at sources, whose null takes the reverse scores of other facts."""
    return {
        "route": route_correlation(model, pairs).nanmean().item(),
        "route_null": 0.0,
        "score": score_correlation(model, pairs).nanmean().item(),
        "score_null": score_correlation_null(model, pairs).nanmean().item(),
    }


def position(model: HookedTransformer, pairs: Sequence[QueryPair], world: FactWorld) -> dict[str, float]:
    """Share of the variance of evidence that the two places of a pair make, in the layer where it is largest; null: the
    reverse query of each pair taken from the next, another source's."""
    targets = torch.arange(world.config.n_entities)
    forward = compute_evidence(model, [pair.forward for pair in pairs], targets).sum(2)
    reverse = compute_evidence(model, [pair.reverse for pair in pairs], targets).sum(2)
    shares = {"position": place_index(forward, reverse), "position_null": place_index(forward, reverse.roll(2, 0))}
    return {name: (index / (1 + index)).max().item() for name, index in shares.items()}


def transplant(model: HookedTransformer, pairs: Sequence[QueryPair]) -> dict[str, float]:
    """Distance (nats, mean absolute) of the reverse query's prediction, given the forward query's route, from the
    forward prediction, relative to the control's, which is given the route to a random other position; null: the same
    of the reverse query left as it is."""
    effect = transplant_routes(model, pairs)
    away = (effect.control - effect.forward).abs().mean().item()
    left = {"transplant": effect.after, "transplant_null": effect.before}
    return {name: (value - effect.forward).abs().mean().item() / away for name, value in left.items()}


def alignment(model: HookedTransformer, pairs: Sequence[QueryPair]) -> dict[str, float]:
    """Cosine in V and O of each pair's own forward and reverse gradients, mean over pairs, and of different facts' (its
    null); and of the gradients of the mean forward and the mean reverse loss, whose null is 0."""
    aligned = gradient_alignment(model, pairs).within(STORAGE)
    return {
        "alignment": aligned.matched()[-1].nanmean().item(),
        "alignment_null": aligned.mismatched()[-1].nanmean().item(),
        "mean_alignment": aligned.mean_cosine()[-1].item(),
        "mean_alignment_null": 0.0,
    }


SHOWN = {
    "evidence": "evidence<br>(z-score)",
    "position": "share<br>of place",
    "transplant": "distance,<br>transplant",
    "route": "route<br>correlation",
    "score": "raw score<br>correlation",
    "alignment": "gradients<br>of pairs",
    "mean_alignment": "mean<br>gradients",
}
LINKED = {
    "alignment": "gradient alignment (cosine of pairs, V and O)",
    "route": "route correlation",
    "evidence": "evidence for the answer (z-score)",
}
"""The signatures that are held against reverse prediction over settings."""


def summarize(result: Result) -> dict[str, Estimate]:
    frame, summary = result.frame, {}
    for scope in frame[[*SCOPE, "stage"]].drop_duplicates().to_dict("records"):
        label, group = scope_label(scope), where(frame, **scope)
        for name in SHOWN:
            if group[name].notna().any():
                for column in (name, f"{name}_null"):
                    summary[f"{label} / {column}"] = mean_estimate(group[column])
    return summary


def takeaway(result: Result) -> str:
    summary = result.summary
    ends = [name for name in summary if name.endswith(tuple(f"end / {signature}" for signature in SHOWN))]
    known = [name for name in ends if summary[name].n > 1]
    clear = sum(
        summary[name].low > summary[f"{name}_null"].high or summary[name].high < summary[f"{name}_null"].low
        for name in known
    )
    return (
        f"At the end of training the interval of the signature lies clear of its null's in {clear} of {len(known)} "
        "combinations of setting and signature with several seeds; which way, and whether by enough, is what the "
        "ledger says."
    )


def settings_at(result: Result, stage: str) -> pd.DataFrame:
    """One row per setting at a stage: the means over seeds, and the setting's name."""
    at = where(result.frame, stage=stage)
    points = at.groupby(list(SCOPE), sort=False)[[*LINKED, "reverse_probability"]].mean().reset_index()
    return points.assign(setting=[scope_label(row) for row in points.to_dict("records")])


def draw(result: Result) -> go.Figure:
    settings = result.frame[list(SCOPE)].drop_duplicates().to_dict("records")
    width, height = len(SHOWN), 520 + 26 * len(settings)
    thirds = [{"colspan": 2}, None] * len(LINKED) + [None] * (width - 2 * len(LINKED))
    figure = make_subplots(
        2,
        width,
        specs=[thirds, [{}] * width],
        row_heights=[330 / height, 1 - 330 / height],
        horizontal_spacing=0.02,
        vertical_spacing=90 / height,
    )
    _draw_links(figure, settings_at(result, "end"))
    symbols = dict(zip(STAGES, ("circle-open", "diamond-open", "circle"), strict=True))
    for col, name in enumerate(SHOWN, start=1):
        for stage, symbol in symbols.items():
            for column, color, kind in ((name, BLUE, "effect"), (f"{name}_null", CHANCE, "null")):
                estimates = {
                    scope_label(setting): result.summary[key]
                    for setting in settings
                    if (key := f"{scope_label({**setting, 'stage': stage})} / {column}") in result.summary
                }
                mark: dict[str, Any] = {
                    "symbol": symbol,
                    "row": 2,
                    "col": col,
                    "legend": "legend" if col == 1 else None,
                }
                add_estimates(figure, estimates, name=f"{kind}, {stage}", color=color, **mark)
        figure.update_xaxes(title_text=SHOWN[name], title_font_size=13, nticks=3, tickangle=0, row=2, col=col)
        # A signature that some settings lack has them all the same, so that rows lie in line.
        order = {"type": "category", "categoryorder": "array", "categoryarray": list(map(scope_label, settings))}
        figure.update_yaxes(order, range=[len(settings) - 0.5, -0.5], row=2, col=col)
        figure.update_yaxes(tickfont_size=11, showticklabels=col == 1, row=2, col=col)
    figure.update_yaxes(title_text="setting", row=2, col=1)
    figure.update_layout(legend=legend_at(0.3, -80 / height), legend2={"x": 0.88, "y": 1.0})
    figure.update_layout(height=height)
    return figure


def _draw_links(figure: go.Figure, points: pd.DataFrame) -> None:
    """One panel per linked signature, one point per setting."""
    for place, name in enumerate(LINKED):
        for scheme, color in COLORS.items():
            of_scheme = where(points, scheme=scheme).dropna(subset=[name])
            trace = go.Scatter(
                x=of_scheme[name],
                y=of_scheme["reverse_probability"],
                mode="markers",
                marker={"color": color, "size": 8},
                name=scheme,
                legend="legend2",
                legendgroup=scheme,
                showlegend=place == 0 and len(of_scheme) > 0,
                customdata=of_scheme["setting"],
                hovertemplate="%{customdata}: %{x:.3g}, %{y:.3g}<extra></extra>",
            )
            figure.add_trace(trace, row=1, col=1 + 2 * place)
        figure.update_xaxes(title_text=SHOWN[name], title_font_size=13, nticks=5, row=1, col=1 + 2 * place)
        figure.update_yaxes(range=[-0.03, 1.03], showticklabels=place == 0, row=1, col=1 + 2 * place)
    figure.update_yaxes(title_text="reverse probability,<br>each setting at the end", row=1, col=1)


# ---- which rows decide which claim, and what a line of them can say


def mirrored(scope: Mapping[str, Any]) -> bool:
    """Whether a reverse query is a mirror image of its forward query to the model: one layer that sees both sides, and
    scores that do not tell them apart."""
    return scope["n_layers"] == 1 and scope["scheme"] in ("alibi", "none") and scope["objective"] != "causal"


def same_values(scope: Mapping[str, Any]) -> bool:
    """Whether values cannot depend on position: one layer under a relative scheme."""
    return scope["n_layers"] == 1 and POSITIONS[scope["scheme"]].relative


def over_the_arm(result: Result) -> pd.DataFrame:
    """Log ratio of an any-order MDM's reverse probability to that of the ARM of its world and seed, which has RoPE and
    the fewest heads (one); null: of another seed's ARM to that of this one."""
    frame, place = result.frame, ["world", "reversed_share", "stage", "seed"]
    arms = where(frame, objective="causal", scheme="rope")
    arms = where(arms, n_heads=arms["n_heads"].min())[[*place, "reverse_probability"]].rename(
        columns={"reverse_probability": "arm"}
    )
    others = arms.groupby(place[:3], sort=False)["arm"].transform(lambda column: column.to_numpy()[_next(len(column))])
    joined = where(frame, objective="any_order").merge(arms.assign(other=others), on=place)
    return joined.assign(
        log_ratio=np.log(joined["reverse_probability"] / joined["arm"]),
        log_ratio_null=np.log(joined["other"] / joined["arm"]),
    )


def _next(count: int) -> np.ndarray:
    return np.roll(np.arange(count), -1)


def not_shared(result: Result) -> pd.DataFrame:
    """What an any-order MDM keeps in reverse of its forward probability, where each side can have heads or values of
    its own: several heads whose scores tell sides apart, or absolute positions."""
    frame = where(result.frame, objective="any_order", reversed_share=0.0)
    absolute = ~frame["scheme"].map(lambda scheme: POSITIONS[str(scheme)].relative).to_numpy(dtype=bool)
    told_apart = ~frame["scheme"].isin(["alibi", "none"]).to_numpy() & (frame["n_heads"].to_numpy() > 1)
    chosen = pd.DataFrame(frame[absolute | told_apart])
    return chosen.assign(kept=chosen["reverse_probability"] / chosen["forward_probability"], kept_null=1.0)


def single_sided(result: Result) -> pd.DataFrame:
    """The rows of models that were never trained in any order."""
    return pd.DataFrame(result.frame[result.frame["objective"].isin(SINGLE_SIDED)])


CLAIMS = (
    ClaimTest(
        claim="0",
        measure="log ratio of an any-order MDM's reverse probability to the ARM's of the same world and seed",
        effect="log_ratio",
        null="log_ratio_null",
        null_is="the ARM of another seed",
        side="above",
        margin=0.7,
        rows=over_the_arm,
        identity=mirrored,
    ),
    ClaimTest(
        claim="1",
        measure="not sufficient: reverse over forward probability of an any-order MDM in which each side can have "
        "heads or values of its own",
        effect="kept",
        null="kept_null",
        null_is="forward and reverse answered alike",
        side="below",
        margin=0.5,
        rows=not_shared,
    ),
    ClaimTest(
        claim="1",
        measure="not necessary: reverse probability of an MDM in which only one side was ever masked",
        effect="reverse_probability",
        null="chance",
        null_is="chance: the answer's role known, nothing else",
        side="above",
        margin=0.05,
        rows=single_sided,
        identity=mirrored,
    ),
    ClaimTest(
        claim="2",
        measure="share of the variance of evidence made by where the source stands (largest over layers)",
        effect="position",
        null="position_null",
        null_is="the reverse query of another source",
        side="below",
        margin=0.05,
        identity=same_values,
    ),
    ClaimTest(
        claim="3",
        measure="distance from the forward prediction left when the reverse query is given the forward route, "
        "relative to a random route's",
        effect="transplant",
        null="transplant_null",
        null_is="the reverse query's own route",
        side="below",
        margin=0.05,
        identity=same_values,
    ),
    ClaimTest(
        claim="4",
        measure="evidence for the true answer in the reverse query (standard deviations above its role's mean, largest "
        "over layers)",
        effect="evidence",
        null="evidence_null",
        null_is="the answer of another fact",
        side="above",
        margin=0.5,
    ),
    ClaimTest(
        claim="5",
        measure="correlation of forward and mirrored reverse rows of scores over all keys, row means subtracted (mean "
        "over layers and heads)",
        effect="route",
        null="route_null",
        null_is="keys dealt at random: 0",
        side="above",
        margin=0.3,
        identity=mirrored,
    ),
    ClaimTest(
        claim="6",
        measure="cosine of a pair's forward and reverse gradients in V and O",
        effect="alignment",
        null="alignment_null",
        null_is="the reverse gradient of another fact",
        side="above",
        margin=0.1,
        identity=mirrored,
    ),
    ClaimTest(
        claim="6",
        measure="cosine of the gradients of the mean forward and the mean reverse loss in V and O",
        effect="mean_alignment",
        null="mean_alignment_null",
        null_is="0: unrelated directions",
        side="above",
        margin=0.1,
        identity=mirrored,
    ),
    *(
        LinkTest(
            claim="7",
            measure=f"rank correlation over settings of {label} with reverse probability",
            signature=signature,
            outcome="reverse_probability",
            margin=0.1,
        )
        for signature, label in LINKED.items()
    ),
)
"""Margins are conventional small or medium effects (a correlation of 0.1 or 0.3, half a standard deviation, 5 %, a
factor of 2), the same in every setting. When they were stated: those of claims 1 (not necessary) to 6 before the first
ledger was computed, though earlier figures of some quantities had been seen by then. Changed after a look at results:
the second measure of claim 6 (twice), the measure of claim 5, and the rule that an effect has to clear its margin by
itself. Claim 0, `not sufficient` and the rank correlations over settings were added after that look."""

ANALYSIS = Analysis(
    name="signatures",
    question="Where do the paper's signatures show, and when?",
    configs=every_run,
    measure=measure,
    summarize=summarize,
    takeaway=takeaway,
    draw=draw,
    claims=CLAIMS,
    order=5,
)

if __name__ == "__main__":
    from mdm_interp.cli import run_one

    run_one(ANALYSIS)
