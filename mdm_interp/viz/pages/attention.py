"""Attention patterns: every head of every layer over one prompt, of a model or as an array, through CircuitsVis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mdm_interp.data.queries import Query
from mdm_interp.errors import UserError
from mdm_interp.measures.capture import LayerView, capture
from mdm_interp.measures.lens import read_out
from mdm_interp.models.inputs import forbid_mask, require_numbers
from mdm_interp.viz.pages.code import call, left_open, prompt_code, saving
from mdm_interp.viz.pages.page import Page, packed, places
from mdm_interp.viz.pages.subject import Prompt, Subject, joined
from mdm_interp.viz.words import counted, heads_in_layers

MAX_ENTRIES = 8_000_000
"""How many entries of patterns a page holds: 2.7 bytes each, so 21 MB."""
MAX_DRAWN = 128
"""Up to how many tokens whole patterns are drawn; of longer prompts, one row at a time."""
TOP = 5
"""How many of the likeliest tokens are named for each mask."""
ROUNDED = 0.02
"""By how much a row of attention in half precision may exceed 1."""


@torch.no_grad()
def attention(
    model: Any,
    prompt: str | Sequence[int] | Tensor | Query,
    *,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    rows: Iterable[int] | None = None,
    source: str | None = None,
) -> Page:
    """Show attention patterns: the full square of a bidirectional model, the triangle of a causal one, or blocks.

    Args:
        model: A HookedTransformer or TransformerBridge, or a Run, of which the last checkpoint is taken.
        prompt: Text with `[M]` for each mask token, token ids, or a Query, whose source and answer are marked.
        layers, heads: Which to show; default: all.
        rows: Positions that attention is shown from; default: all or, where those are more than a page holds, the ones
            that masked tokens are predicted from.
        source: Words of the text to mark as the source.

    Raises:
        UserError: the prompt cannot be read, a layer, head or row is not there, or the choice has more than
            :data:`MAX_ENTRIES` entries.
    """
    subject = Subject.of(model)
    model, cfg, given = subject.model, subject.model.cfg, subject.prompt(prompt, source)
    n = len(given.tokens)
    of_layers, of_heads = places(cfg.n_layers, layers, "layers"), places(cfg.n_heads, heads, "heads")
    per_row = len(of_layers) * len(of_heads) * n
    whole = rows is None and per_row * n <= MAX_ENTRIES
    shown = places(n, rows, "rows") if whole or rows is not None else sorted(set(given.readout))
    if not shown or per_row * len(shown) > MAX_ENTRIES:
        raise UserError(
            f"prompt: {len(of_layers)} layers x {len(of_heads)} heads x {len(shown) or n} rows x {n} tokens are more "
            f"than the {MAX_ENTRIES:,} entries a page holds; choose some by layers, heads or rows"
        )

    def reduce(view: LayerView) -> str | None:
        return packed(view.pattern[0][:, of_heads].transpose(0, 1)) if view.layer in of_layers else None

    logits, captured = capture(model, given.batch(shown, cfg.device), reduce, all_logits=True)
    kind = {
        "bidirectional": "bidirectional attention",
        "causal": "causal attention: a token reads those up to it",
        "block_causal": f"attention in blocks: a token reads its own {cfg.block_size} tokens and those before them",
    }[cfg.attention]
    layers_of, heads_of = counted(cfg.n_layers, "layer"), counted(cfg.n_heads, "head")
    about = f"{len(of_layers)} of {layers_of}, {len(of_heads)} of {heads_of}, {counted(n, 'token')}, {kind}."
    if len(shown) < n:
        about += f" Attention is shown from {len(shown)} of the {n} positions."
    return _page(
        subject.heading(f"Attention: {shortened(given)}"),
        given,
        about,
        subject.saving(
            "viz.attention",
            prompt_code(prompt, given.tokens),
            layers=None if layers is None else of_layers,
            heads=None if heads is None else of_heads,
            rows=None if rows is None else shown,
            source=source,
        ),
        reach=cfg.reach,
        layers=of_layers,
        heads=of_heads,
        rows=shown,
        patterns=[pattern for pattern in captured if pattern is not None],
        filled=predictions(subject, given, logits[0][list(given.readout)]),
        lens=_after_each_layer(subject, given),
    )


def patterns(
    array: Shaped[Tensor, "*layer head query_pos key_pos"] | Shaped[np.ndarray, "*layer head query_pos key_pos"],
    tokens: Sequence[str | int],
) -> Page:
    """Show attention patterns from anywhere on the page of :func:`attention`.

        viz.patterns(cache["pattern", 0][0], ["The", " cat", " sat"])

    Args:
        array: How much of its attention each position of `query_pos` gives each of `key_pos`, as shares from 0 to 1:
            of all layers or, without their axis, of one. Where no position reads a later one in any head, the page is
            that of a causal model.
        tokens: What is at each position: a text or an id.

    Raises:
        UserError: the array has other axes, or not as many positions as there are tokens; an entry is below 0 or NaN,
            or a row adds up to more than 1; or there are more than :data:`MAX_ENTRIES` entries.
    """
    shape, n = tuple(array.shape), len(tokens)
    if len(shape) not in (3, 4) or shape[-2:] != (n, n) or 0 in shape:
        raise UserError(
            f"array: has the shape {shape} for {counted(n, 'token')}; give [layer head query_pos key_pos] or [head "
            "query_pos key_pos], with a position for each token"
        )
    if math.prod(shape) > MAX_ENTRIES:
        raise UserError(
            f"array: {math.prod(shape):,} entries are more than the {MAX_ENTRIES:,} that a page holds; choose some "
            "layers or heads"
        )
    values = array.detach().cpu().double() if isinstance(array, Tensor) else torch.tensor(array).double()
    values = values.reshape(-1, *shape[-3:])
    wrong = values[~(values >= 0)]
    if len(wrong):
        raise UserError(f"array: holds {wrong[0]:.3g}, and attention is from 0 to 1; give it as it is after softmax")
    sums = values.sum(-1)
    if (most := sums.max()) > 1 + ROUNDED:
        layer, head, row = np.unravel_index(int(sums.argmax()), sums.shape)
        raise UserError(
            f"array: row {row} of layer {layer}, head {head} adds up to {most:.3g}, and attention to 1 at most; give "
            "it as it is after softmax, with the positions that are read on the last axis"
        )
    causal = n > 1 and not values.triu(1).any()
    about = f"{heads_in_layers(len(values), shape[-3])}, {counted(n, 'token')}"
    prompt = Prompt((), tuple(map(str, tokens)), (), (), None, None)
    return _page(
        f"Attention: {shortened(prompt)}",
        prompt,
        f"{about}{', none of which reads a later one' if causal else ''}.",
        saving(
            call("viz.patterns", "array", repr(list(tokens))),
            left_open("array, the attention of this page,"),
        ),
        reach=1 if causal else None,
        layers=list(range(len(values))),
        heads=list(range(shape[-3])),
        rows=list(range(n)),
        patterns=[packed(layer.clamp(max=1)) for layer in values],
        filled=[],
        lens=[],
    )


def _page(title: str, given: Prompt, about: str, code: str, **data: Any) -> Page:
    """Return the page of patterns over a prompt."""
    data |= given.marks() | {"max_drawn": MAX_DRAWN}
    return Page("attention", title, about, ("circuitsvis",), data, code)


def predictions(subject: Subject, given: Prompt, logits: Float[Tensor, "readout d_vocab"]) -> list[dict[str, Any]]:
    """Return the likeliest tokens at each readout position, with their probabilities; the mask is never one."""
    seen = forbid_mask(logits.float(), subject.model.cfg.mask_token_id)
    top = seen.softmax(-1).topk(min(TOP, seen.shape[-1]))
    likeliest = require_numbers(top.values, subject.model.cfg.dtype)
    return [
        {"readout": row, "tokens": list(subject.names(tokens)), "probabilities": probabilities}
        for row, tokens, probabilities in zip(given.readout, top.indices.tolist(), likeliest.tolist(), strict=True)
    ]


def _after_each_layer(subject: Subject, given: Prompt) -> list[list[dict[str, Any]]]:
    """Return what the residual stream after each layer would predict, read as the last one's is."""
    model, at = subject.model, list(given.readout)
    if not at:
        return []
    tokens = given.batch(at, model.cfg.device).tokens
    return [predictions(subject, given, logits[0]) for logits in logits_after_layers(model, tokens, at)]


def logits_after_layers(
    model: Any, tokens: Int[Tensor, "prompt pos"], rows: Sequence[int] | None = None
) -> Iterator[Float[Tensor, "prompt row d_vocab"]]:
    """Give what the residual stream after each layer would predict, read as the last one's is.

    Args:
        rows: At which positions; default: at all.
    """
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    for name in names:
        yield read_out(model, cache[name] if rows is None else cache[name][:, list(rows)])


def shortened(given: Prompt, length: int = 60) -> str:
    """Return the beginning of a prompt's text."""
    spaced = "" if any(text.startswith(" ") for text in given.texts) else " "
    text = joined(given.texts, spaced).strip()
    return text if len(text) <= length else text[: length - 1] + "…"
