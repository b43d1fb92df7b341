"""Sinks: planted ones are found, nothing else is, and routes are what is left of attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from helpers import random_model
from torch import Tensor
from torch.testing import assert_close

from mdm_interp.data.queries import Query
from mdm_interp.errors import UserError
from mdm_interp.measures.routes import compute_routes
from mdm_interp.measures.sinks import THRESHOLD, sinks

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
    assert not found.share[:, 1].any() and not found.count[:, 1].any()
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
    assert found.share[0, 1, 2].item() == pytest.approx(at_first)
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
    assert found.routes[0, 1].isnan().all() and (found.share[0, 1] == 1).all()


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_without_sinks_a_route_is_the_route(attention: str) -> None:
    model = random_model(attention=attention, mask_token_id=MASK if attention == "bidirectional" else None)
    queries = QUERIES if attention == "bidirectional" else [Query((4, 7, 3), (3,), (2, 3), (0, 1))]
    found = sinks(model, queries, threshold=100.0)
    assert_close(found.routes, compute_routes(model, queries).pattern.to(found.routes), atol=1e-6, rtol=1e-5)


def test_padding_neither_reads_nor_is_read() -> None:
    model = random_model(mask_token_id=MASK)
    together, alone = sinks(model, QUERIES, 1.0), sinks(model, QUERIES[1:], 1.0)
    for name in ("share", "count", "readout", "routes"):
        assert_close(getattr(together, name)[1:], getattr(alone, name), atol=1e-6, rtol=1e-5, equal_nan=True)


def test_no_queries_are_refused() -> None:
    with pytest.raises(UserError, match="queries: sinks are those of some text, got no queries"):
        sinks(random_model(), [])
