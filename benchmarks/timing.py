"""Times of calls that are compared, taken in turn in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

Calls = Mapping[str, Callable[[], Any]]


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = stopwatch()
    call()
    return stopwatch() - start


def measure(
    calls: Calls, repeats: int, warm_up: int = 1, of: Callable[[Callable[[], Any]], float] = seconds
) -> dict[str, np.ndarray]:
    """Measure each call, `[repeats]` each. The order is swapped each time, so that whatever else the machine does falls
    on all alike.

    Args:
        warm_up: How many times each is called before anything is measured.
        of: What is measured of a call.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-warm_up, repeats):
        for name in sorted(calls, reverse=repeat % 2 == 0):
            value = of(calls[name])
            if repeat >= 0:
                found[name].append(value)
    return {name: np.array(values) for name, values in found.items()}


def stopwatch() -> float:
    """Return the time in seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
