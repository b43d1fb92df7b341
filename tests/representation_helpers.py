"""Planted representations: of one entry per fact, or of two."""

from __future__ import annotations

import torch
from torch import Tensor

from mdm_interp.config import FactConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.measures.representations import Questions, mean_cosines, probe_accuracy

N_CONTEXTS = 8
WORLD = FactWorld(FactConfig(n_entities=30, n_filler=4), seed=0)
PAIRS = WORLD.query_pairs(n_contexts=N_CONTEXTS)
QUESTIONS = Questions(PAIRS, WORLD)
PROBES = ("forward_to_forward", "forward_to_reverse", "reverse_to_reverse")
D = 60


def entries(generator: torch.Generator, noise: float = 0.02) -> Tensor:
    """A random vector per question, the same in each context but for noise, centred."""
    each = torch.randn(len(WORLD.facts), 1, 2, D, generator=generator, dtype=torch.float64)
    all_contexts = each.expand(-1, N_CONTEXTS, -1, -1).reshape(-1, D)
    read = all_contexts + noise * torch.randn(len(PAIRS), D, generator=generator, dtype=torch.float64)
    return read - read.mean(0)


def compared(forward: Tensor, reverse: Tensor) -> dict[str, float]:
    """The columns of `two_slots` that two sets of representations give."""
    columns, seen = mean_cosines(forward, reverse, QUESTIONS), {"forward": forward, "reverse": reverse}
    for probe in PROBES:
        trained, read = probe.split("_to_")
        found = probe_accuracy(seen[trained], seen[read], QUESTIONS)
        columns |= {probe: found.effect, f"{probe}_null": found.null}
    return columns
