"""What probing a checkpoint of LLaDA-8B's shapes costs, next to running it.

    python -m benchmarks.probe [--width 16] [--layers 32] [--facts 100] [--device cpu] [--dtype float32] [--repeats 3]

A checkpoint with random weights is written, 1/`width` as wide as LLaDA-8B (1 is full size: give it a GPU of 80 GB, and
16 GB of disk), loaded, and asked invented facts, each stated once, by every analysis of `mdm-interp probe`. The same
process times a bare forward pass over the same queries, and a forward and backward pass, one query at a time;
`x forward` and `x backward` are the analysis' seconds over the medians of these. Memory is the peak of the GPU, or of
the process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mdm_interp.analysis import discover
from mdm_interp.checkpoints import load_checkpoint, save_checkpoint
from mdm_interp.config import ModelConfig
from mdm_interp.demo import DemoConfig, make_model_config, make_people, make_tokenizer
from mdm_interp.model import HookedTransformer
from mdm_interp.prediction import query_loss
from mdm_interp.probing import KINDS, CheckpointAnalysis, Probe
from mdm_interp.prompts import PARENT_CHILD, FactTable
from mdm_interp.queries import Query, batches


def write_random_checkpoint(folder: Path, width: int, layers: int, n_facts: int, device: str, dtype: str) -> FactTable:
    """A checkpoint of LLaDA-8B's shapes, and invented facts."""
    config = DemoConfig(n_families=n_facts // 2 + 1, n_control=1)
    people = make_people(config)
    tokenizer = make_tokenizer(people.sentences(), config)
    cfg = ModelConfig(
        d_model=4096 // width,
        n_heads=max(1, 32 // width),
        d_head=128,
        n_layers=layers,
        d_mlp=12288 // width,
        d_vocab=126464,
        n_ctx=4096,
        rotary_base=5e5,
        gated_mlp=True,
        act_fn="silu",
        mask_token_id=make_model_config(tokenizer, config).mask_token_id,
        device=device,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
    )
    model = HookedTransformer(cfg, init_weights=False).to_empty(device=device)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02) if "W_" in name else torch.nn.init.ones_(parameter)
    model.tokenizer = tokenizer
    save_checkpoint(model, folder, format="llada")
    facts = [dict(fact) for fact in people.tested[:n_facts]]
    stated = PARENT_CHILD.model_copy(update={"templates": PARENT_CHILD.templates[:1]})
    return FactTable(dict(enumerate(facts)), stated, ())


def seconds(call: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(device: str) -> float:
    """GB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def run_bare(model: HookedTransformer, queries: list[Query], size: int, backward: bool) -> None:
    for batch in batches(queries, model.cfg, size=size):
        with torch.set_grad_enabled(backward):
            loss = query_loss(model(batch.tokens, batch.attention_mask), batch).sum()
        if backward:
            loss.backward()
            model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds per fact and memory of probing a checkpoint.")
    parser.add_argument("--width", type=int, default=16, help="divide LLaDA-8B's width by this")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = write_random_checkpoint(Path(folder), given.width, given.layers, given.facts, given.device, given.dtype)
        loading = time.perf_counter()
        model = load_checkpoint(folder, device=given.device)
        loading = time.perf_counter() - loading
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e9
    probe = Probe.of("random", model, table)
    queries = [query for kind in KINDS for pair in probe.pairs(kind) for query in (pair.forward, pair.reverse)]
    print(f"weights {weights:.2f} GB, loaded in {loading:.1f} s; {given.facts} facts, {len(queries)} queries")
    bare = {}
    for name, size, backward in (("forward", 64, False), ("backward", 1, True)):
        times = [seconds(lambda: run_bare(model, queries, size, backward), given.device) for _ in range(given.repeats)]  # noqa: B023
        bare[name] = statistics.median(times)
        print(f"bare {name:<22} {bare[name] / given.facts:8.3f} s per fact, peak {peak_memory(given.device):.2f} GB")
    total = 0.0
    for analysis in discover():
        if isinstance(analysis, CheckpointAnalysis) and not analysis.needs_twin:
            took = seconds(lambda: analysis.measure([probe]), given.device)  # noqa: B023  # pyright: ignore
            total += took
            print(
                f"{analysis.name:<27} {took / given.facts:8.3f} s per fact, {took / bare['forward']:6.1f} x forward, "
                f"{took / bare['backward']:5.1f} x backward, peak {peak_memory(given.device):.2f} GB"
            )
    print(f"all analyses {total / given.facts:22.3f} s per fact, {total / bare['forward']:6.1f} x forward")


if __name__ == "__main__":
    main()
