"""What all inner products of queries' gradients cost, beside one bare forward and backward pass over the same queries.

    python -m benchmarks.gradients [--pairs 32] [--layers 8] [--width 256] [--positions 8 16 32] [--repeats 15]

Both run in one process, in turn, the order swapped each time, so that whatever else the machine does falls on both
alike. The bare pass is a training step's: logits everywhere, and the gradient of every weight. `ratio` is the median
time of `gradient_alignment` over that of the bare pass; the interval is the interquartile range of the ratio pair by
pair.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.timing import measure
from mdm_interp.config import ModelConfig
from mdm_interp.data.queries import Query, QueryPair, collate
from mdm_interp.inference.prediction import query_loss
from mdm_interp.measures.gradients import gradient_alignment
from mdm_interp.models.transformer import HookedTransformer


def random_pairs(count: int, n_pos: int, d_vocab: int) -> list[QueryPair]:
    """Return pairs of random tokens, whose answer and source are as far apart as half of the sequence."""
    generator, pairs = torch.Generator().manual_seed(0), []
    near, far = n_pos // 4, n_pos // 4 + n_pos // 2
    for fact in range(count):
        tokens = torch.randint(1, d_vocab, (n_pos,), generator=generator).tolist()
        queries = []
        for at, source in ((near, far), (far, near)):
            masked = [0 if place == at else token for place, token in enumerate(tokens)]
            queries.append(Query(tuple(masked), (tokens[at],), (at, at + 1), (source, source + 1)))
        forward, reverse = queries
        pairs.append(QueryPair(forward, reverse, fact, "left"))
    return pairs


def make_calls(options: argparse.Namespace, n_pos: int) -> dict[str, Callable[[], object]]:
    """Return the two calls that are compared."""
    cfg = ModelConfig(
        d_model=options.width,
        n_heads=8,
        n_layers=options.layers,
        d_mlp=4 * options.width if options.mlp else None,
        d_vocab=options.vocabulary,
        n_ctx=n_pos,
    )
    model = HookedTransformer(cfg, generator=torch.Generator().manual_seed(0))
    pairs = random_pairs(options.pairs, n_pos, cfg.d_vocab)
    batch = collate([pair.forward for pair in pairs] + [pair.reverse for pair in pairs], cfg)

    def bare() -> None:
        query_loss(model(batch.tokens), batch).sum().backward()
        model.zero_grad()

    return {"bare": bare, "gram": lambda: gradient_alignment(model, pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description="All inner products of gradients against one bare pass.")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--mlp", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--positions", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.layers} layers of {options.width}")
    print(f"{'positions':>9} {'bare ms':>8} {'gram ms':>8} {'ratio':>6}  interquartile range")
    for n_pos in options.positions:
        seconds = measure(make_calls(options, n_pos), options.repeats, warm_up=2)
        bare, gram = (float(np.median(seconds[kind])) for kind in ("bare", "gram"))
        low, high = np.percentile(seconds["gram"] / seconds["bare"], [25, 75])
        print(f"{n_pos:>9} {1e3 * bare:>8.1f} {1e3 * gram:>8.1f} {gram / bare:>6.2f}  [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
