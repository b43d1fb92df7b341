"""Annotations are enforced while tests run: were they not, many a test would prove less than it seems to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.results import tidy
from mdm_interp.models.layers import per_query_head, precise
from mdm_interp.stats.estimates import Estimate
from mdm_interp.training.losses import arm_loss

WRONG: Any = torch.zeros(3, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: tidy(WRONG),
        lambda: precise(torch.zeros(2, dtype=torch.long)),
        lambda: arm_loss(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long)),
        lambda: Estimate("one", 0.0, 0.0, 1),  # type: ignore[arg-type]
        lambda: FactWorld(WRONG, seed=0),
    ],
    ids=["a type", "a dtype", "sizes that differ", "a dataclass", "a class"],
)
def test_what_an_annotation_forbids_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError):
        call()


def test_a_size_is_the_same_within_a_call_and_may_be_another_in_the_next() -> None:
    for n_kv_heads in (1, 2):
        assert per_query_head(torch.zeros(3, n_kv_heads), 4, dim=1).shape == (3, 4)
