"""Times of calls that are compared, taken in turn in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np


def measure(calls: Mapping[str, Callable[[], object]], repeats: int, warm_up: int) -> dict[str, np.ndarray]:
    """Measure the seconds of each call, `[repeats]` each. The order is swapped each time, so that whatever else the
    machine does falls on all alike.

    Args:
        warm_up: How many times each is called before anything is measured.
    """
    seconds: dict[str, list[float]] = {kind: [] for kind in calls}
    for repeat in range(-warm_up, repeats):
        for kind in sorted(calls, reverse=repeat % 2 == 0):
            start = time.perf_counter()
            calls[kind]()
            if repeat >= 0:
                seconds[kind].append(time.perf_counter() - start)
    return {kind: np.array(values) for kind, values in seconds.items()}
