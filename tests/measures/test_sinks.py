"""Sinks: planted ones are found, nothing else is, and routes are what is left of attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import random_model
from torch import Tensor
from torch.testing import assert_close

from mdm_interp.data.queries import Query
from mdm_interp.errors import UserError
from mdm_interp.inference.denoising import denoise
from mdm_interp.measures.routes import compute_routes
from mdm_interp.measures.sinks import THRESHOLD, _drawn, _moved_along, sinks, watch_sinks
from mdm_interp.measures.trajectory import source_only

MASK = 12
QUERIES = [
    Query((1, 4, 5, 6, 7, 8, MASK, 2), (3,), (6, 7), (2, 4)),
    Query((1, 4, 5, MASK, MASK), (3, 9), (3, 5), (1, 2)),
]


def planted(model: Any, edit: Callable[[Tensor], Tensor]) -> AbstractContextManager[Any]:
    return model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: edit(x))])


def test_attention_spread_evenly_has_no_sink() -> None:
    model = random_model(mask_token_id=MASK)
    with planted(model, lambda x: (x > 0) / (x > 0).sum(-1, keepdim=True)):
        found = sinks(model, QUERIES)
    assert not found.share.effect[:, 1].any() and not found.count[:, 1].any()
    assert_close(found.routes[:, 1], torch.tensor([[2 / 8] * 4, [1 / 5] * 4]))


def test_a_planted_sink_is_found_and_set_aside() -> None:
    """Head 2 gives position 0 three quarters of every row, and the rest evenly: 0.75 n more than the others receive."""

    def edit(pattern: Tensor) -> Tensor:
        even = (pattern > 0) / (pattern > 0).sum(-1, keepdim=True)
        even[:, 2] *= 0.25
        even[:, 2, :, 0] += 0.75
        return even

    model = random_model(mask_token_id=MASK)
    with planted(model, edit):
        found = sinks(model, QUERIES, threshold=4.0)
    at_first = 0.75 + 0.25 / 8
    assert found.count[:, 1].tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    assert found.share.effect[0, 1, 2].item() == pytest.approx(at_first)
    assert found.readout[0, 1, 2].item() == pytest.approx(at_first)
    assert found.routes[0, 1, 2].item() == pytest.approx((0.25 * 2 / 8) / (1 - at_first))
    assert found.where[:, 1].tolist() == [0, 0]
    with planted(model, edit):
        lower = sinks(model, QUERIES)
    assert THRESHOLD == 3 < 0.75 * 5 and lower.count[1, 1].tolist() == [0, 0, 1, 0]


def test_a_source_that_is_a_sink_has_no_route_beside_sinks() -> None:
    def edit(pattern: Tensor) -> Tensor:
        even = torch.zeros_like(pattern)
        even[..., 2] = 1.0
        return even

    model = random_model(mask_token_id=MASK)
    with planted(model, edit):
        found = sinks(model, QUERIES[:1])
    assert found.routes[0, 1].isnan().all() and (found.share.effect[0, 1] == 1).all()


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_without_sinks_a_route_is_the_route(attention: str) -> None:
    model = random_model(attention=attention, mask_token_id=MASK if attention == "bidirectional" else None)
    queries = QUERIES if attention == "bidirectional" else [Query((4, 7, 3), (3,), (2, 3), (0, 1))]
    found = sinks(model, queries, threshold=100.0)
    expected = compute_routes(model, queries).pattern.to(found.routes)
    assert_close(found.routes, expected, atol=1e-6, rtol=1e-5)
    assert_close(found.source, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_the_null_reads_as_much_elsewhere(attention: str) -> None:
    """All rows read position 0 alone: moved along, they meet where chance has it, and on no position that a row cannot
    read."""
    causal = attention == "causal"
    query = Query((1, *[4] * 22, 5 if causal else MASK), (5,), (23, 24), (2, 4))

    def edit(pattern: Tensor) -> Tensor:
        only = 1e-9 * (pattern > 0)
        only[..., 0] = 1.0
        return only / only.sum(-1, keepdim=True)

    model = random_model(attention=attention, mask_token_id=None if causal else MASK, n_ctx=24)
    with planted(model, edit):
        found = sinks(model, [query])
    pattern = edit(torch.ones(1, 1, 24, 24).tril() if causal else torch.ones(1, 1, 24, 24))
    moved = _moved_along(pattern, torch.ones(1, 24, dtype=torch.bool), _drawn(24))
    assert_close(moved.sum(-1), torch.ones(1, 1, 24))
    assert not causal or not moved.triu(1).any()
    assert moved.sum(2).amax() < 8
    assert (found.share.effect[0, 1] > 0.999).all() and (found.share.null[0, 1] < 0.5).all()


def test_sinks_are_watched_while_a_sentence_is_denoised() -> None:
    """Each state by itself has the sinks that were watched; a query with fewer masks stays as it was filled."""
    model = random_model(mask_token_id=MASK)
    queries = [source_only(query, model.cfg) for query in QUERIES]
    watched = watch_sinks(model, queries, steps=6, threshold=1.0)
    assert watched.share.effect.shape == (2, 7, model.cfg.n_layers)
    for i, query in enumerate(queries):
        tokens = denoise(model, torch.tensor([query.tokens]), steps=6).tokens
        states = [*tokens, *[tokens[-1]] * (7 - len(tokens))]
        for state, filled in enumerate(states):
            alone = sinks(model, [replace(query, tokens=tuple(filled[0].tolist()))], threshold=1.0)
            assert_close(watched.share.effect[i, state], alone.share.effect[0].mean(-1), atol=1e-6, rtol=1e-5)
            assert_close(watched.share.null[i, state], alone.share.null[0].mean(-1), atol=1e-6, rtol=1e-5)
            assert watched.where[i, state].tolist() == alone.where[0].tolist()
    assert len(denoise(model, torch.tensor([queries[1].tokens]), steps=6).tokens) < 7


def test_only_what_denoises_is_watched() -> None:
    with pytest.raises(UserError, match="denoising needs bidirectional attention"):
        watch_sinks(random_model(attention="causal"), [Query((4, 7, 3), (3,), (2, 3), (0, 1))], steps=2)
    with pytest.raises(UserError, match="queries: sinks are those of some text"):
        watch_sinks(random_model(mask_token_id=MASK), [], steps=2)


def test_padding_neither_reads_nor_is_read() -> None:
    model = random_model(mask_token_id=MASK)
    together, alone = sinks(model, QUERIES, 1.0), sinks(model, QUERIES[1:], 1.0)
    for name in ("count", "readout", "source", "routes"):
        assert_close(getattr(together, name)[1:], getattr(alone, name), atol=1e-6, rtol=1e-5, equal_nan=True)
    for kind in ("effect", "null"):
        assert_close(getattr(together.share, kind)[1:], getattr(alone.share, kind), atol=1e-6, rtol=1e-5)


def test_no_queries_are_refused() -> None:
    with pytest.raises(UserError, match="queries: sinks are those of some text, got no queries"):
        sinks(random_model(), [])
