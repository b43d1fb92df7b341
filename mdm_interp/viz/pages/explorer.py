"""The explorer: every head of a model at a glance, and what there is to see of each: for many facts, along training,
and beside another model or an edit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mdm_interp.data.queries import Query, QueryBatch, QueryPair, batches
from mdm_interp.errors import UserError, require_some
from mdm_interp.inference.denoising import denoise
from mdm_interp.inference.prediction import predict
from mdm_interp.measures.capture import LayerView, capture
from mdm_interp.measures.evidence import evidence_matrix
from mdm_interp.measures.head_scores import SCORES, head_scores
from mdm_interp.measures.parity import plane_parity
from mdm_interp.measures.rope import require_rope
from mdm_interp.measures.routes import score_matrix
from mdm_interp.models.inputs import forbid_mask
from mdm_interp.training.runs import Run
from mdm_interp.viz.pages.attention import MAX_ENTRIES, logits_after_layers, shortened
from mdm_interp.viz.pages.code import call, first_pairs, saving
from mdm_interp.viz.pages.page import Page, as_lists, packed, packed_signed
from mdm_interp.viz.pages.routes import evenly
from mdm_interp.viz.pages.subject import Prompt, Subject, after, joined
from mdm_interp.viz.theme import shown
from mdm_interp.viz.words import counted, heads_in_layers

MAX_PAIRS = 24
"""How many of a run's pairs are shown unless others are asked for."""
MAX_TOKENS = 64
"""How many tokens the maps of a head's scores and evidence have at most."""
LIKELIEST = 3
"""How many tokens the logit lens names at each position."""
SIDES = ("forward", "reverse")
OF_LAYERS = ("storage alignment", "routing alignment")
"""Scores that are one number of a layer, repeated for its heads."""

Number = int | float
Hooks = Sequence[tuple[str, Callable]]
"""As `model.hooks(fwd_hooks=...)` takes them: names of hooks, and what edits the activation there."""


@torch.no_grad()
def explore(
    model: Any,
    query_pairs: Sequence[QueryPair] | None = None,
    *,
    steps: Sequence[int] | None = None,
    edits: Mapping[str, Hooks] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Page:
    """Return a map of all layers and heads by any of :data:`~mdm_interp.measures.head_scores.SCORES`, and of the head
    chosen there: its attention in both queries of a pair, its score in each RoPE plane, what it stores and seeks for
    every token, and the facts it serves best; beside them the logit lens and the denoising of the pair.

        viz.explore(run)                                                   # all along its training
        viz.explore(model, pairs, edits={"head 0 off": [("blocks.0.attn.hook_z", silence)]})
        viz.explore({"RoPE": run, "ALiBi": other})                         # side by side, with differences

    Args:
        model: A HookedTransformer or TransformerBridge; a Run, of which all checkpoints are shown, or as many as fit;
            or several of these by name.
        query_pairs: What is asked; default: the first :data:`MAX_PAIRS` pairs of the run.
        steps: Which checkpoints of runs; default: all.
        edits: Hooks by name. Each makes one more model to compare, the first one's last checkpoint under these hooks.
        report: Told after each state of a model how many are measured, and of how many.

    Raises:
        UserError: there are no pairs, a query does not fit a model, models differ in their layers, heads or
            vocabulary, two have one name, a run has no such checkpoint, or the page would hold more than
            :data:`~mdm_interp.viz.pages.attention.MAX_ENTRIES` entries.
    """
    series = _series_of(model, steps, edits or {})
    first = series[0]
    given = query_pairs
    if query_pairs is None:
        if not isinstance(first.given, Run):
            raise UserError("query_pairs: a model by itself does not say what to ask it; give pairs")
        query_pairs = first.given.query_pairs(n_contexts=1)[:MAX_PAIRS]
    require_some("query_pairs", query_pairs)
    cfg = first.subject.model.cfg
    prompts = [{side: first.subject.prompt(getattr(pair, side)) for side in SIDES} for pair in query_pairs]
    offset = max(1, abs(query_pairs[0].forward.offset))
    asked = _Asked(query_pairs, prompts, _tokens_to_map(cfg, query_pairs, len(series)), offset)
    asked.fit(cfg, series)
    measured: list[dict[str, Any]] = []
    total = sum(len(one.steps) or 1 for one in series)
    for one in series:
        for state in one.states():
            measured.append(asked.measure(one.subject, state))
            if report is not None:
                report(len(measured), total)
    data = {
        "layers": list(range(cfg.n_layers)),
        "heads": list(range(cfg.n_heads)),
        "scores": [{"name": name, "about": about} for name, about in SCORES.items()],
        "of_layers": list(OF_LAYERS),
        "series": [one.told() for one in series],
        "states": measured,
        "pairs": [asked.told(first.subject, at) for at in range(len(query_pairs))],
        "tokens": list(first.subject.names(asked.tokens)),
        "offset": asked.offset,
        "names": asked.names(first.subject),
    }
    title = f"Explorer: {' and '.join(after(one.name, one.steps) for one in series)}"
    return Page("explorer", title, _about(data, measured, series), ("plotly",), data, _code(series, given, steps))


@dataclass
class _Series:
    """A model, or a run's models, as one choice of the page."""

    name: str
    given: Any
    subject: Subject
    edit: str = ""
    """What the edit is called, if it is one."""
    hooks: Hooks = ()
    steps: list[int] = field(default_factory=list)
    """Of a run; of others there is one state."""

    def __post_init__(self) -> None:
        if isinstance(self.given, Run):
            self.steps = self.given.steps

    def told(self) -> dict[str, Any]:
        """Return what the page says of it besides its states."""
        model = self.subject.model
        return {
            "name": self.name,
            "steps": self.steps,
            "reach": model.cfg.reach,
            "wavelengths": _wavelengths(model),
        }

    def states(self) -> Iterator[Any]:
        """Return each model, with its hooks on."""
        if isinstance(self.given, Run):
            yield from (self.given.model(step) for step in self.steps)
            return
        model = self.subject.model
        with model.hooks(fwd_hooks=list(self.hooks)) if self.hooks else nullcontext():
            yield model


def _series_of(model: Any, steps: Sequence[int] | None, edits: Mapping[str, Hooks]) -> list[_Series]:
    """Return all that can be chosen on the page: the models, then the first one under each edit."""
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    if not models:
        raise UserError("model: got none to explore; give a model, a Run, or several by name")
    series = []
    for name, given in models.items():
        subject = Subject.of(given)
        series.append(_Series(name or subject.name, given, subject))
    for one in series:
        if steps is not None and one.steps:
            one.steps = [step for step in one.steps if step in steps]
            if missing := sorted({*steps} - {*one.steps}):
                raise UserError(f"steps: {one.name} has no checkpoint {missing[0]}; give some of {one.given.steps}")
    first = series[0]
    series += [_Series(f"{first.name}, {name}", None, first.subject, name, hooks) for name, hooks in edits.items()]
    _check_alike(series)
    return series


def _check_alike(series: Sequence[_Series]) -> None:
    """Refuse models that cannot be laid side by side."""
    names = [one.name for one in series]
    if len(set(names)) < len(names):
        raise UserError(f"edits: two models of the page are called {max(names, key=names.count)!r}; rename one")
    shapes = [
        {key: getattr(one.subject.model.cfg, key) for key in ("n_layers", "n_heads", "d_vocab")} for one in series
    ]
    for one, shape in zip(series, shapes, strict=True):
        if shape != shapes[0]:
            raise UserError(
                f"model: {one.name!r} has {shape} and {names[0]!r} {shapes[0]}; compare models that are alike in these"
            )


def _tokens_to_map(cfg: Any, query_pairs: Sequence[QueryPair], n_series: int) -> list[int]:
    """Return the tokens that maps show: of a small vocabulary all, else those of the pairs, as many as fit."""
    n_heads = cfg.n_layers * cfg.n_heads
    most = min(MAX_TOKENS, math.isqrt(MAX_ENTRIES // (4 * 3 * n_heads * n_series)))
    masks = [] if cfg.mask_token_id is None else [cfg.mask_token_id]
    in_pairs = [
        token
        for pair in query_pairs
        for query in (pair.forward, pair.reverse)
        for token in (*query.answer, *query.source)
    ]
    every = [*masks, *in_pairs, *(range(cfg.d_vocab) if cfg.d_vocab <= most else ())]
    chosen = list(dict.fromkeys(every))[:most]
    return sorted(chosen) if cfg.d_vocab <= most else chosen


@dataclass
class _Asked:
    """What every state of a page is asked, and how its answers are written down."""

    pairs: Sequence[QueryPair]
    prompts: Sequence[Mapping[str, Prompt]]
    tokens: Sequence[int]
    offset: int
    """How far apart the maps of scores have their tokens."""
    whole: bool = True
    """Whether patterns are whole, or rows of the readouts only."""
    seen: dict[int, int] = field(default_factory=dict)
    """Tokens that the lens or denoising names, and their places in the page's list."""

    def rows(self, at: int, side: str) -> list[int]:
        prompt = self.prompts[at][side]
        return list(range(len(prompt.tokens))) if self.whole else list(prompt.readout)

    def fit(self, cfg: Any, series: Sequence[_Series]) -> None:
        """Leave out rows, then checkpoints, until the page is not too large."""
        planes = cfg.rotary_dim // 2 if cfg.turns_planes else 0

        def of_state() -> int:
            patterns = sum(
                len(self.rows(at, side)) * len(self.prompts[at][side].tokens)
                for at in range(len(self.pairs))
                for side in SIDES
            )
            per_head = patterns + 2 * planes * len(self.pairs) + 3 * len(self.tokens) ** 2
            return cfg.n_layers * cfg.n_heads * per_head

        self.whole = of_state() * sum(len(one.steps) or 1 for one in series) <= MAX_ENTRIES
        fitting = MAX_ENTRIES // of_state() // len(series)
        if not fitting:
            raise UserError(
                f"query_pairs: {len(self.pairs)} pairs of {len(series)} models with {cfg.n_layers} layers x "
                f"{cfg.n_heads} heads are more than the {MAX_ENTRIES:,} entries a page holds; give fewer"
            )
        for one in series:
            one.steps = evenly(one.steps, fitting) if one.steps else []

    def measure(self, subject: Subject, model: Any) -> dict[str, Any]:
        """Return all that the page shows of one state of a model."""
        scores = head_scores(model, self.pairs)
        queries = {side: [getattr(pair, side) for pair in self.pairs] for side in SIDES}
        try:
            parity = plane_parity(model, self.pairs)
            planes, reason = {"even": _by_pair(parity.even), "odd": _by_pair(parity.odd)}, ""
        except UserError as error:
            planes, reason = None, str(error)
        return {
            "scores": {name: as_lists(of_pairs) for name, of_pairs in scores.by_pair.items()},
            "overall": {name: as_lists(mean) for name, mean in scores.over_pairs.items()},
            "undefined": scores.undefined,
            "probability": {side: as_lists(predict(model, asked).probability) for side, asked in queries.items()},
            "patterns": {side: self._together(side, partial(self._patterns, model)) for side in SIDES},
            "planes": planes,
            "no_planes": reason,
            "maps": self._maps(model),
            "lens": {side: self._together(side, partial(self._lens, model)) for side in SIDES},
            "denoised": {side: self._denoised(model, asked) for side, asked in queries.items()},
        }

    def _together(self, side: str, measure: Callable[[QueryBatch], list[Any]]) -> list[Any]:
        """Measure all prompts of a side, those of one length in one pass, and return what is found of each in order."""
        found: dict[int, Any] = {}
        alike: dict[tuple[int, int], list[int]] = {}
        for at, prompt in enumerate(self.prompts):
            alike.setdefault((len(prompt[side].tokens), len(self.rows(at, side))), []).append(at)
        for places in alike.values():
            each = [self.prompts[at][side].batch(self.rows(at, side), "cpu") for at in places]
            fields = ("tokens", "readout", "answer", "answered", "source")
            whole = {field: torch.cat([getattr(batch, field) for batch in each]) for field in fields}
            found |= zip(places, measure(QueryBatch(attention_mask=None, **whole)), strict=True)
        return [found[at] for at in range(len(self.prompts))]

    def _patterns(self, model: Any, batch: QueryBatch) -> list[list[str]]:
        """Return the attention of each prompt's rows, layer by layer."""

        def reduce(view: LayerView) -> list[str]:
            return [packed(rows.transpose(0, 1)) for rows in view.pattern]

        _, layers = capture(model, batch.to(torch.device(model.cfg.device)), reduce)
        return [list(of_prompt) for of_prompt in zip(*layers, strict=True)]

    def _maps(self, model: Any) -> dict[str, Any]:
        """Return, layer by layer, what every head would write toward every token if it read each other one, and how
        strongly it would read that on its right and on its left; of the direct path from the embedding."""
        tokens = torch.tensor(self.tokens, device=model.W_E.device)

        def every(of_layer: Callable[[int], Tensor]) -> list[Any]:
            return [packed_signed(of_layer(layer)) for layer in range(model.cfg.n_layers)]

        maps = {"evidence": every(lambda layer: evidence_matrix(model, tokens, tokens, layer=layer)[..., 0])}
        try:
            for side, offset in (("right", self.offset), ("left", -self.offset)):
                maps[side] = every(lambda layer, offset=offset: score_matrix(model, tokens, tokens, offset, layer))
        except UserError:  # a bridge's
            pass
        return maps

    def _lens(self, model: Any, batch: QueryBatch) -> list[list[list[list[Number]]]]:
        """Return for each prompt, layer and position the likeliest tokens, each followed by its probability."""
        layers = [
            [self._likeliest(model, of_prompt) for of_prompt in logits]
            for logits in logits_after_layers(model, batch.tokens.to(model.cfg.device))
        ]
        return [list(of_prompt) for of_prompt in zip(*layers, strict=True)]

    def _likeliest(self, model: Any, logits: Float[Tensor, "pos d_vocab"]) -> list[list[Number]]:
        mask = None if model.cfg.is_causal else model.cfg.mask_token_id
        top = forbid_mask(logits, mask).softmax(-1).topk(min(LIKELIEST, logits.shape[-1]))
        return [
            [
                part
                for token, share in zip(tokens, shares, strict=True)
                for part in (self._place(token), round(share, 4))
            ]
            for tokens, shares in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def _denoised(self, model: Any, queries: Sequence[Query]) -> list[list[list[Number]]]:
        """Return for each query what filled each mask, the most certain first: step, position, token, probability.
        Nothing in an ARM."""
        cfg, told = model.cfg, []
        if cfg.is_causal or cfg.mask_token_id is None:
            return [[] for _ in queries]
        for batch in batches(queries, cfg):
            n_masks = int((batch.tokens == cfg.mask_token_id).sum(1).max())
            done = denoise(model, batch.tokens, steps=max(n_masks, 1), attention_mask=batch.attention_mask)
            for tokens, steps, certain in zip(
                done.tokens[-1].tolist(), done.filled_at.tolist(), done.probability.tolist(), strict=True
            ):
                filled = sorted((step, position) for position, step in enumerate(steps) if step)
                told.append([[step, at, self._place(tokens[at]), round(certain[at], 4)] for step, at in filled])
        return told

    def _place(self, token: int) -> int:
        return self.seen.setdefault(token, len(self.seen))

    def names(self, subject: Subject) -> list[str]:
        """Return how the tokens of the lens and of denoising read."""
        return list(subject.names(list(self.seen)))

    def told(self, subject: Subject, at: int) -> dict[str, Any]:
        """Return a pair: what it is called, and its two prompts."""
        answer = joined(subject.names(self.pairs[at].forward.answer)).strip()
        prompts = {side: prompt.marks() | {"rows": self.rows(at, side)} for side, prompt in self.prompts[at].items()}
        return {"name": f"{shortened(self.prompts[at]['forward'])} → {answer}", **prompts}


def _by_pair(values: Float[Tensor, "pair layer head plane"]) -> list[Any]:
    return [packed_signed(of_pair) for of_pair in values]


def _wavelengths(model: Any) -> list[float] | None:
    """Return after how many positions each RoPE plane has turned once; none without RoPE."""
    try:
        return as_lists(2 * math.pi / require_rope(model).theta)
    except UserError:
        return None


def _code(series: Sequence[_Series], pairs: Sequence[QueryPair] | None, steps: Sequence[int] | None) -> str:
    """Return Python that makes the page, of the `pairs` and `steps` that were given."""
    models, edits, first = [one for one in series if not one.edit], [one.edit for one in series if one.edit], series[0]
    variables = ["model"] if len(models) == 1 else [f"model_{at}" for at in range(len(models))]
    lines = [one.subject.opening(variable) for one, variable in zip(models, variables, strict=True)]
    named = ", ".join(f"{one.name!r}: {variable}" for one, variable in zip(models, variables, strict=True))
    unnamed = [one.name for one in models] == [first.subject.name] and not isinstance(first.given, Subject)
    arguments = ["model" if unnamed else f"{{{named}}}"]
    if pairs is not None:
        lines.append(f"pairs = {first_pairs(first.given, variables[0], pairs)}")
        arguments.append("pairs")
    if edits:
        hooks = ", ".join(f"{name!r}: …" for name in edits)
        lines.append(
            f"# edits, {{{hooks}}}, holds functions, which cannot be written here: define it before you run this."
        )
        arguments.append("edits=edits")
    return saving(call("viz.explore", *arguments, steps=None if steps is None else list(steps)), *lines)


def _about(data: Mapping[str, Any], measured: Sequence[Mapping[str, Any]], series: Sequence[_Series]) -> str:
    """Return what the page shows, and which head of the first model's last state carries most."""
    first, last = series[0], measured[max(len(series[0].steps) - 1, 0)]
    schemes = " and ".join(dict.fromkeys(shown(one.subject.model.cfg.position) for one in series))
    shape, pairs = heads_in_layers(len(data["layers"]), len(data["heads"])), counted(len(data["pairs"]), "query pair")
    said = f"{schemes}, {shape}, {pairs}" + (
        f", {len(first.steps)} steps of training. " if len(first.steps) > 1 else ". "
    )
    route = torch.tensor([[value or 0.0 for value in row] for row in last["overall"]["forward route"]])
    layer, head = divmod(int(route.argmax()), route.shape[1])
    reverse = last["overall"]["reverse route"][layer][head] or 0.0
    return said + (
        f"Head {head} of layer {layer} has the strongest forward route: it gives the source {100 * route.max():.3g}% "
        f"of its attention, and in the reverse query {100 * reverse:.3g}%."
    )
