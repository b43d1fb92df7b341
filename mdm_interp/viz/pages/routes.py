"""Routes: the forward and the reverse query of a pair side by side, head by head and checkpoint by checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdm_interp.data.queries import QueryPair
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import predict
from mdm_interp.measures.capture import LayerView, capture
from mdm_interp.measures.evidence import compute_evidence
from mdm_interp.measures.parity import score_parity
from mdm_interp.measures.routes import compute_routes
from mdm_interp.training.runs import Run
from mdm_interp.viz.pages.attention import MAX_ENTRIES, shortened
from mdm_interp.viz.pages.code import one_pair
from mdm_interp.viz.pages.page import Page, as_lists, packed, places
from mdm_interp.viz.pages.subject import Prompt, Subject
from mdm_interp.viz.words import counted


@torch.no_grad()
def routes(
    model: Any, pair: QueryPair, *, layers: Iterable[int] | None = None, heads: Iterable[int] | None = None
) -> Page:
    """Return where the readouts of a pair's two queries look, how strongly at the source, and what that comes to.

    Whole patterns are shown where they fit into a page, else the rows of the readouts.

    Args:
        model: A HookedTransformer or TransformerBridge, or a Run, of which all checkpoints are shown (or, where those
            are more than a page holds, as many as fit, evenly chosen, the last among them).
        layers, heads: Which to show; default: all.

    Raises:
        UserError: a query does not fit the model, a bridge has no hook on attention scores, a layer or head is not
            there, or the choice has more than :data:`~mdm_interp.viz.pages.attention.MAX_ENTRIES` entries.
    """
    subject = Subject.of(model)
    cfg = subject.model.cfg
    queries = {"forward": pair.forward, "reverse": pair.reverse}
    rows = {side: list(query.readout(cfg)) for side, query in queries.items()}
    prompts = {side: subject.prompt(query) for side, query in queries.items()}
    lengths = {side: len(prompt.tokens) for side, prompt in prompts.items()}
    of_layers, of_heads = places(cfg.n_layers, layers, "layers"), places(cfg.n_heads, heads, "heads")
    n_heads = len(of_layers) * len(of_heads)
    if n_heads * sum(n * n for n in lengths.values()) <= MAX_ENTRIES:
        rows = {side: list(range(n)) for side, n in lengths.items()}
    fitting = MAX_ENTRIES // (n_heads * sum(len(rows[side]) * n for side, n in lengths.items()))
    if not fitting:
        raise UserError(
            f"pair: {len(of_layers)} layers x {len(of_heads)} heads x {' and '.join(map(str, lengths.values()))} "
            f"tokens are more than the {MAX_ENTRIES:,} entries a page holds; choose some by layers or heads"
        )
    steps = evenly(model.steps, fitting) if isinstance(model, Run) else []
    models = (model.model(step) for step in steps) if isinstance(model, Run) else iter([subject.model])
    checkpoints = [_measured(each, pair, prompts, rows, of_layers, of_heads) for each in models]
    data = {side: prompt.marks() | {"rows": rows[side]} for side, prompt in prompts.items()} | {
        "reach": cfg.reach,
        "layers": of_layers,
        "heads": of_heads,
        "steps": steps,
        "checkpoints": checkpoints,
    }
    both = " | ".join(shortened(prompt) for prompt in prompts.values())
    title = subject.heading(f"Routes: {both}", steps or None)
    about = _about(subject, pair, data)
    if steps and len(steps) < len(model.steps):
        about += f" Of the run's {len(model.steps)} checkpoints, {len(steps)} are shown."
    code = subject.saving(
        "viz.routes",
        one_pair(model, "model", pair),
        layers=None if layers is None else of_layers,
        heads=None if heads is None else of_heads,
    )
    return Page("routes", title, about, ("plotly",), data, code)


def evenly(steps: Sequence[int], count: int) -> list[int]:
    """Choose up to `count` of the steps: the last, the first, and evenly between."""
    chosen = np.linspace(len(steps) - 1, 0, min(count, len(steps))).round().astype(int)
    return [steps[at] for at in sorted(chosen.tolist())]


def _measured(
    model: Any,
    pair: QueryPair,
    prompts: Mapping[str, Prompt],
    rows: Mapping[str, Sequence[int]],
    layers: Sequence[int],
    heads: Sequence[int],
) -> dict[str, Any]:
    """Return one checkpoint's numbers, by query where they have one each."""

    def chosen(values: Tensor) -> Any:
        """Return [layer head] of what is shown."""
        return as_lists(values[layers][:, heads])

    def by_query(values: Iterable[Any]) -> dict[str, Any]:
        return dict(zip(prompts, values, strict=True))

    def patterns(side: str) -> list[str]:
        def reduce(view: LayerView) -> str | None:
            return packed(view.pattern[0][:, heads].transpose(0, 1)) if view.layer in layers else None

        _, of_layers = capture(model, prompts[side].batch(rows[side], model.cfg.device), reduce)
        return [pattern for pattern in of_layers if pattern is not None]

    queries = [pair.forward, pair.reverse]
    evidence = [compute_evidence(model, [query], torch.tensor(query.answer))[0].sum(-1) for query in queries]
    measured = {
        "patterns": by_query(map(patterns, prompts)),
        "route": by_query(map(chosen, compute_routes(model, queries).pattern)),
        "evidence": by_query(map(chosen, evidence)),
        "probability": by_query(as_lists(predict(model, queries).probability)),
    }
    try:
        parity = score_parity(model, [pair])
    except UserError as error:  # an ARM's pair, or one whose source stays on its side
        return measured | {"parity": None, "reason": str(error)}
    parts = {"even": parity.even[0], "odd": parity.odd[0], "selectivity": parity.selectivity()}
    return measured | {"parity": {name: chosen(part) for name, part in parts.items()}, "reason": ""}


def _about(subject: Subject, pair: QueryPair, data: Mapping[str, Any]) -> str:
    """Return what the last checkpoint does with the pair, in words."""
    last, when = data["checkpoints"][-1], f" after {data['steps'][-1]} steps" if data["steps"] else ""
    said, sides = [], ("forward", "reverse")
    forward, reverse = (np.array(last["route"][side], dtype=float) for side in sides)
    probability = np.array([last["probability"][side] for side in sides], dtype=float)
    for side, query, known in zip(sides, (pair.forward, pair.reverse), probability, strict=True):
        answer, source = (
            shortened(subject.prompt(tokens), 30).replace("\n", " ") for tokens in (query.answer, query.source)
        )
        where = "right" if query.offset > 0 else "left"
        said.append(
            f"In the {side} query the source “{source}” is to the {where} of the answer “{answer}”, which has "
            f"probability {known:.3g}{when}."
        )
    layer, head = np.unravel_index(np.nan_to_num(forward).argmax(), forward.shape)
    said.append(
        f"Of {counted(forward.size, 'head')}, head {data['heads'][head]} of layer {data['layers'][layer]} has the "
        f"strongest forward route: its readout gives the source {100 * forward[layer, head]:.3g}% of its attention, "
        f"and in the reverse query {100 * reverse[layer, head]:.3g}%."
    )
    return " ".join(said)
