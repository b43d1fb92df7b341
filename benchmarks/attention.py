"""Which attention is faster on this CPU: explicit softmax, or PyTorch's fused kernel?

    python -m benchmarks.attention [--repeats 30] [--threads 1] [--positions 8 16 32 64 128 256]

A training step (forward, backward, optimiser) of a small model runs both ways side by side: one process, in turn, the
order swapped each time, so that whatever else the machine does falls on both alike. `ratio` is the median time of the
explicit step over that of the fused one, so above 1 the fused one is faster; the interval is the interquartile range
of the ratio pair by pair. `mdm_interp.models.layers.FUSED_FROM` should be where it crosses 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.timing import measure
from mdm_interp.config import ModelConfig
from mdm_interp.models import layers
from mdm_interp.models.transformer import HookedTransformer

FUSED_FROM = {"explicit": sys.maxsize, "fused": 1}


def make_step(n_pos: int, batch: int) -> Callable[[], None]:
    """Return one training step of a one-layer attention-only model on random tokens."""
    generator = torch.Generator().manual_seed(0)
    model = HookedTransformer(ModelConfig(d_model=64, n_heads=4, d_vocab=101, n_ctx=n_pos), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(model.cfg.d_vocab, (batch, n_pos), generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()

    return step


def make_calls(n_pos: int, batch: int) -> dict[str, Callable[[], None]]:
    """Return a training step of either kind."""

    def make(kind: str) -> Callable[[], None]:
        step = make_step(n_pos, batch)

        def call() -> None:
            layers.FUSED_FROM = FUSED_FROM[kind]
            step()

        return call

    return {kind: make(kind) for kind in FUSED_FROM}


def main() -> None:
    parser = argparse.ArgumentParser(description="Explicit against fused attention, one training step.")
    parser.add_argument("--positions", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {options.batch}; times are medians")
    print(f"{'positions':>9} {'explicit ms':>12} {'fused ms':>9} {'ratio':>6}  interquartile range")
    for n_pos in options.positions:
        seconds = measure(make_calls(n_pos, options.batch), options.repeats, warm_up=3)
        explicit, fused = (float(np.median(seconds[kind])) for kind in ("explicit", "fused"))
        low, high = np.percentile(seconds["explicit"] / seconds["fused"], [25, 75])
        print(
            f"{n_pos:>9} {1e3 * explicit:>12.2f} {1e3 * fused:>9.2f} {explicit / fused:>6.2f}  [{low:.2f}, {high:.2f}]"
        )


if __name__ == "__main__":
    main()
