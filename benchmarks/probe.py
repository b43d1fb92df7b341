"""What probing a checkpoint of LLaDA-8B's shapes costs, next to running it.

    python -m benchmarks.probe [--width 16] [--layers 32] [--facts 100] [--device cpu] [--dtype float32] [--repeats 3]
        [--only large_model_coupling]

A checkpoint with random weights is written, 1/`width` as wide as LLaDA-8B (1 is full size: give it a GPU of 80 GB, and
16 GB of disk), loaded, and asked invented facts, each stated once, by every analysis of `mdm-interp probe`. In the same
process a bare forward pass over the same queries runs, and a forward and backward pass, in the same batches; each
analysis' seconds and peak memory are printed with their ratios to these. All run once before they are timed. Memory is
the GPU's, or, on Linux, the process'.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from analyses import (
    large_model_coupling,
    large_model_influence,
    large_model_lens,
    large_model_prediction,
    large_model_routes,
    large_model_sinks,
    large_model_storage,
    trajectory,
)
from mdm_interp.checkpoints import load_checkpoint, save_checkpoint
from mdm_interp.config import DemoConfig, ModelConfig
from mdm_interp.data.people import make_people
from mdm_interp.data.prompts import PARENT_CHILD, FactTable
from mdm_interp.data.queries import Query, batches
from mdm_interp.experiments.subjects import KINDS, Probe
from mdm_interp.inference.prediction import query_loss
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.training.text import make_model_config, make_tokenizer

ANALYSES = (
    large_model_routes,
    large_model_storage,
    large_model_coupling,
    large_model_influence,
    large_model_prediction,
    large_model_lens,
    large_model_sinks,
    trajectory,
)
"""Those of one checkpoint: of `mdm-interp probe`."""


def open_random_probe(
    folder: Path,
    width: int,
    layers: int,
    n_facts: int,
    device: str,
    dtype: str = "float32",
    *,
    d_vocab: int = 126464,
) -> Probe:
    """Write a checkpoint of LLaDA-8B's shapes with random weights, load it, and ask it invented facts."""
    config = DemoConfig(n_families=n_facts // 2 + 1, n_control=1)
    people = make_people(config)
    tokenizer = make_tokenizer(people.sentences(), config)
    cfg = ModelConfig(
        d_model=4096 // width,
        n_heads=max(1, 32 // width),
        d_head=128,
        n_layers=layers,
        d_mlp=12288 // width,
        d_vocab=d_vocab,
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
    model = load_checkpoint(folder, device=device)
    return Probe.of("random", model, FactTable(dict(enumerate(facts)), stated, ()))


def queries_of(probe: Probe) -> list[Query]:
    return [query for kind in KINDS for pair in probe.pairs(kind) for query in (pair.forward, pair.reverse)]


@dataclass(frozen=True)
class Cost:
    seconds: float
    memory: float
    """Its peak, in GB."""


def cost(call: Callable[[], object], device: str) -> Cost:
    """Measure what one call takes."""
    reset_peak(device)
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return Cost(time.perf_counter() - start, peak_memory(device))


def reset_peak(device: str) -> None:
    gc.collect()
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to what is resident now
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> float:
    """Return the peak since :func:`reset_peak`, in GB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e9


def run_bare(model: HookedTransformer, queries: list[Query], backward: bool) -> None:
    """Run the model on queries in batches, all logits computed; backward to every weight."""
    for batch in batches(queries, model.cfg):
        with torch.set_grad_enabled(backward):
            loss = query_loss(model(batch.tokens, attention_mask=batch.attention_mask), batch).sum()
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
    parser.add_argument("--only", action="append", help="an analysis; may be given again")
    given = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        probe = open_random_probe(Path(folder), given.width, given.layers, given.facts, given.device, given.dtype)
    making, model, queries = time.perf_counter() - start, probe.model, queries_of(probe)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e9
    print(
        f"weights {weights:.2f} GB, written and loaded in {making:.1f} s; {given.facts} facts, {len(queries)} queries"
    )

    def timed(call: Callable[[], object]) -> Cost:
        call()
        costs = [cost(call, given.device) for _ in range(given.repeats)]
        return Cost(statistics.median(c.seconds for c in costs), statistics.median(c.memory for c in costs))

    bare = {}
    for name, backward in (("forward", False), ("forward and backward", True)):
        bare[name] = timed(partial(run_bare, model, queries, backward))
        print(describe(f"bare {name}", bare[name], given.facts, {}), flush=True)
    costs = []
    for module in (
        one for one in ANALYSES if not given.only or one.ANALYSIS.name in given.only
    ):  # not what is installed: where there is a checkout only, nothing is
        costs.append(timed(partial(module.measure, probe)))
        print(describe(module.ANALYSIS.name, costs[-1], given.facts, bare), flush=True)
    whole = Cost(sum(c.seconds for c in costs), max(c.memory for c in costs))
    print(describe("all analyses", whole, given.facts, bare))


def describe(name: str, cost: Cost, n_facts: int, bare: dict[str, Cost]) -> str:
    parts = [f"{name:<26} {cost.seconds / n_facts:8.3f} s per fact, peak {cost.memory:6.2f} GB"]
    parts += [
        f"{cost.seconds / than.seconds:5.1f} and {cost.memory / than.memory:4.2f} x bare {what}"
        for what, than in bare.items()
    ]
    return ", ".join(parts)


if __name__ == "__main__":
    main()
