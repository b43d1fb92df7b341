"""What is timed: each row is some work, done in several ways, one of which counts as 1."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from analyses import large_model_coupling, large_model_prediction
from benchmarks.peers import (
    PlainTransformer,
    bridge,
    llama,
    llama_mask,
    products_by_backward,
    products_by_func,
    with_weights_of,
)
from benchmarks.probe import cost, open_random_probe, queries_of, run_bare
from benchmarks.timing import Calls
from mdm_interp.config import Attention, ModelConfig, TrainConfig
from mdm_interp.data.queries import Query, QueryPair, collate
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments.grids import CYCLE, TWO_ROLE
from mdm_interp.experiments.subjects import Probe
from mdm_interp.inference.prediction import query_loss
from mdm_interp.meaning import meaning
from mdm_interp.measures.capture import capture
from mdm_interp.measures.gradients import gradient_alignment
from mdm_interp.models import layers
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.training.trainees import Ensemble, Trainee

OURS, SDPA, EAGER = "mdm_interp", "Hugging Face, sdpa", "Hugging Face, eager with output_attentions"
PLAIN, PLAIN_EXPLICIT = "plain PyTorch, sdpa", "plain PyTorch, explicit attention"
BRIDGE, BARE = "TransformerBridge", "bare forward and backward"


@dataclass(frozen=True)
class Setting:
    """Where and how large the work is."""

    device: str = "cpu"
    quick: bool = False
    """Whether sizes are those of a test, which say nothing about time."""

    def model(self, **changes: Any) -> ModelConfig:
        """Return the shape of a Llama with 8 layers, d_model 1024 and 16 heads that share 4 keys."""
        shape = {"n_layers": 8, "d_model": 1024, "n_heads": 16, "n_key_value_heads": 4, "d_mlp": 2816, "d_vocab": 8192}
        shape |= {"gated_mlp": True, "act_fn": "silu", "n_ctx": 4096, "device": self.device} | changes
        if self.quick:
            shape |= {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_mlp": 24, "d_vocab": 40}
            shape["n_key_value_heads"] = min(shape["n_key_value_heads"] or 4, 2)
        return ModelConfig.model_validate(shape)

    def positions(self, n: int) -> int:
        return min(n, 12) if self.quick else n

    def facts(self, n: int) -> int:
        return min(n, 4) if self.quick else n

    def tokens(self, cfg: ModelConfig, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, cfg.d_vocab, shape, generator=generator).to(self.device)


@dataclass(frozen=True)
class Row:
    """Work that is timed."""

    work: str
    one: str
    """The variant whose time is 1."""
    target: float | None
    """What :data:`OURS` should take at most; None if nothing is asked of it."""
    variants: Callable[..., Iterator[Calls]]
    """Generator that yields the variants."""
    repeats: int = 7
    unit: Literal["seconds", "GB"] = "seconds"
    """What is measured: how long a call takes, or its peak of memory, which it returns."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """What the generator gets besides the setting."""

    @contextmanager
    def calls(self, setting: Setting) -> Iterator[Calls]:
        """Give the variants."""
        yield from self.variants(setting, **self.given)

    def digest(self) -> str:
        """Return the digest of the code that is measured, of peers and settings, too."""
        functions = [given for given in self.given.values() if callable(given)]
        settings = {name: given for name, given in self.given.items() if not callable(given)}
        return meaning(partial(self.variants, **settings), *functions).digest


ROWS: dict[str, Row] = {}


def row(
    name: str,
    work: str,
    one: str,
    target: float | None,
    repeats: int = 7,
    unit: Literal["seconds", "GB"] = "seconds",
    **given: Any,
) -> Callable:
    """Add a row, whose variants the decorated generator yields, given `given`."""

    def add(variants: Callable[..., Iterator[Calls]]) -> Callable[..., Iterator[Calls]]:
        ROWS[name] = Row(work, one, target, variants, repeats, unit, given)
        return variants

    return add


def no_grad(calls: Calls) -> Calls:
    return {name: torch.no_grad()(call) for name, call in calls.items()}


# ---- one forward pass


@row("causal-1024", "forward, causal, 1 x 1024", SDPA, 1.0, 5, attention="causal", n_pos=1024)
@row("forward-1024", "forward, 1 x 1024", SDPA, 1.0, 5, attention="bidirectional", n_pos=1024)
@row("forward-64", "forward, 1 x 64", SDPA, 1.0, 25, attention="bidirectional", n_pos=64)
def forward(setting: Setting, attention: Attention, n_pos: int) -> Iterator[Calls]:
    cfg = setting.model(attention=attention)
    peer, eager = llama(cfg, attn_implementation="sdpa"), llama(cfg, attn_implementation="eager")
    model, plain, bridged = with_weights_of(peer, cfg), PlainTransformer(cfg), bridge(cfg)
    tokens = setting.tokens(cfg, 1, setting.positions(n_pos))
    mask = llama_mask(cfg, tokens)
    yield no_grad(
        {
            OURS: lambda: model(tokens),
            SDPA: lambda: peer(tokens, attention_mask=mask).logits,
            EAGER: lambda: eager(tokens, attention_mask=mask, output_attentions=True).logits,
            PLAIN: lambda: plain(tokens),
            BRIDGE: lambda: bridged(tokens),
        }
    )


@row("routes-4096", "routes at 4 readout positions, every layer and head, 1 x 4096", SDPA, 1.0, 3, n_pos=4096)
@row("routes-1024", "routes at 4 readout positions, every layer and head, 1 x 1024", SDPA, 1.0, 5, n_pos=1024)
def routes(setting: Setting, n_pos: int) -> Iterator[Calls]:
    cfg = setting.model()
    peer = llama(cfg, attn_implementation="sdpa")
    model, (query,) = with_weights_of(peer, cfg), random_queries(1, setting.positions(n_pos), cfg, span=4)
    batch = collate([query], cfg)
    mask = llama_mask(cfg, batch.tokens)
    calls: dict[str, Callable[[], object]] = {
        OURS: lambda: capture(model, batch, lambda view: view.pattern),
        SDPA: lambda: peer(batch.tokens, attention_mask=mask),
    }
    if n_pos < 4096:  # whose patterns take 9 GB
        eager = llama(cfg, attn_implementation="eager")
        calls[EAGER] = lambda: eager(batch.tokens, attention_mask=mask, output_attentions=True)
    yield no_grad(calls)


@row("readout", "the same, vocabulary 126,464, 1 x 256", f"{OURS}, forward with all logits", 0.85)
def readout(setting: Setting) -> Iterator[Calls]:
    cfg = setting.model(d_vocab=126464)
    model, (query,) = with_weights_of(llama(cfg), cfg), random_queries(1, setting.positions(256), cfg, span=4)
    batch = collate([query], cfg)
    yield no_grad(
        {
            OURS: lambda: capture(model, batch, lambda view: view.pattern),
            f"{OURS}, forward with all logits": lambda: model(batch.tokens),
        }
    )


@row("cache", "cache every activation, 4 x 256", SDPA, 1.1)
def cache(setting: Setting) -> Iterator[Calls]:
    cfg = setting.model()
    peer, tokens = llama(cfg, attn_implementation="sdpa"), setting.tokens(cfg, 4, setting.positions(256))
    model, bridged, mask = with_weights_of(peer, cfg), bridge(cfg), llama_mask(cfg, tokens)
    yield no_grad(
        {
            OURS: lambda: model.run_with_cache(tokens),
            SDPA: lambda: peer(tokens, attention_mask=mask),
            BRIDGE: lambda: bridged.run_with_cache(tokens),
        }
    )


# ---- training


@row("training-3", "training step, one layer, d_model 128, 4 heads, 100 x 3", PLAIN, 0.75, 200, batch=100, n_pos=3)
@row("training-12", "training step, one layer, d_model 128, 4 heads, 256 x 12", PLAIN, 0.7, 60, batch=256, n_pos=12)
def training(setting: Setting, batch: int, n_pos: int) -> Iterator[Calls]:
    cfg = ModelConfig(d_model=128, n_heads=4, d_vocab=101, n_ctx=n_pos, device=setting.device)
    models = {
        OURS: HookedTransformer(cfg),
        PLAIN: PlainTransformer(cfg),
        PLAIN_EXPLICIT: PlainTransformer(cfg, fused=False),
    }
    tokens = setting.tokens(cfg, setting.facts(batch), n_pos)
    yield {name: training_step(model, tokens) for name, model in models.items()}


@row("attention-256", "training step, one layer, d_model 64, explicit attention, 64 x 256", "fused", None, n_pos=256)
@row("attention-64", "training step, one layer, d_model 64, explicit attention, 64 x 64", "fused", None, 25, n_pos=64)
@row("attention-16", "training step, one layer, d_model 64, explicit attention, 64 x 16", "fused", None, 60, n_pos=16)
def attention(setting: Setting, n_pos: int) -> Iterator[Calls]:
    """Explicit attention should be the faster one below `mdm_interp.models.layers.FUSED_FROM` positions, not above."""
    n_pos = setting.positions(n_pos)
    cfg = ModelConfig(d_model=64, n_heads=4, d_vocab=101, n_ctx=n_pos, device=setting.device)
    tokens, kept = setting.tokens(cfg, 64, n_pos), layers.FUSED_FROM

    def calls(fused_from: int) -> Callable[[], None]:
        step = training_step(HookedTransformer(cfg), tokens)

        def call() -> None:
            layers.FUSED_FROM = fused_from
            step()

        return call

    try:
        yield {OURS: calls(sys.maxsize), "fused": calls(1)}
    finally:
        layers.FUSED_FROM = kept


def training_step(model: torch.nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    """Return one step: forward, backward, optimiser."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()

    return step


ONE_BY_ONE = "the same runs one by one"


@row("ensemble-3-wide", "step of 8 runs, d_model 128, 4 heads, 100 x 3", ONE_BY_ONE, 0.55, 25, d_model=128, batch=100)
@row("ensemble-3", "step of 8 runs, d_model 32, 16 x 3", ONE_BY_ONE, 0.35, 60, d_model=32, batch=16)
@row("ensemble-8-many", "step of 16 runs, d_model 64, 64 x 8", ONE_BY_ONE, None, 25, d_model=64, batch=64, runs=16)
@row("ensemble-8", "step of 8 runs, d_model 64, 64 x 8", ONE_BY_ONE, 0.55, 25, d_model=64, batch=64)
def ensemble(setting: Setting, d_model: int, batch: int, runs: int = 8) -> Iterator[Calls]:
    """Data and masks are drawn, too."""
    facts = CYCLE if batch == 64 else TWO_ROLE
    n_heads = 4 if d_model == 128 else 1
    model = ModelConfig(d_model=d_model, n_heads=n_heads, d_vocab=facts.d_vocab, n_ctx=facts.seq_len)
    configs = [TrainConfig(model=model, facts=facts, batch_size=batch, seed=seed) for seed in range(runs)]

    def trainees() -> list[Trainee]:
        return [Trainee(config, FactWorld(config.facts, config.seed), setting.device) for config in configs]

    alone, together, step = trainees(), Ensemble(trainees()), count(configs[0].warmup)

    def one_by_one() -> None:
        for trainee in alone:
            trainee.advance(next(step))

    yield {OURS: lambda: together.advance(next(step)), ONE_BY_ONE: one_by_one}


# ---- gradients, and probes of a large model's shape


@row("gradients", "all gradient inner products of 32 x 32 pairs, 8 layers, d_model 256, 1 x 16", BARE, 0.85)
def gradients(setting: Setting) -> Iterator[Calls]:
    cfg = setting.model(d_model=256, n_heads=8, n_key_value_heads=8, d_mlp=1024, d_vocab=1000)
    model = HookedTransformer(cfg)
    pairs = random_pairs(setting.facts(32), setting.positions(16), cfg)
    batch = collate(list(chain.from_iterable((pair.forward, pair.reverse) for pair in pairs)), cfg)

    def bare() -> None:
        query_loss(model(batch.tokens), batch).sum().backward()
        model.zero_grad()

    yield {
        OURS: lambda: gradient_alignment(model, pairs),
        BARE: bare,
        "one backward pass for each query": lambda: products_by_backward(model, batch),
        "torch.func, one gradient for each query": lambda: products_by_func(model, batch),
    }


PREDICTION, COUPLING = large_model_prediction.measure, large_model_coupling.measure
FORWARD = "bare forward"


@row(
    "prediction",
    "large_model_prediction, LLaDA-8B's shape / 16, 100 facts",
    FORWARD,
    30.0,
    3,
    analysis=PREDICTION,
    backward=False,
)
@row(
    "coupling", "large_model_coupling, LLaDA-8B's shape / 16, 100 facts", BARE, 1.0, 3, analysis=COUPLING, backward=True
)
def probe(setting: Setting, analysis: Callable[[Probe], object], backward: bool) -> Iterator[Calls]:
    of_random = large_probe(setting)
    model, queries = of_random.model, queries_of(of_random)
    yield {
        OURS: lambda: analysis(of_random),
        BARE if backward else FORWARD: lambda: run_bare(model, queries, backward=backward),
    }


def large_probe(setting: Setting) -> Probe:
    """Return a probe of LLaDA-8B's shape, a sixteenth as wide, about 100 facts."""
    width, depth, d_vocab = (32, 1, 700) if setting.quick else (16, 32, 126464)
    with tempfile.TemporaryDirectory() as folder:
        return open_random_probe(Path(folder), width, depth, setting.facts(100), setting.device, d_vocab=d_vocab)


@row(
    "memory",
    "peak memory of large_model_coupling, LLaDA-8B's shape / 16, 100 facts",
    FORWARD,
    1.3,
    1,
    "GB",
    analysis=COUPLING,
)
def memory(setting: Setting, analysis: Callable[[Probe], object]) -> Iterator[Calls]:
    """Each peak is of a process of its own, in which nothing else has run."""

    def peak(of: Callable[..., float], *args: Any) -> float:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(of, *args).result()

    yield {
        OURS: lambda: peak(_peak_of_analysis, setting, analysis),
        FORWARD: lambda: peak(_peak_of_forward, setting),
    }


def _peak_of_analysis(setting: Setting, analysis: Callable[[Probe], object]) -> float:
    of_random = large_probe(setting)
    return cost(lambda: analysis(of_random), setting.device).memory


def _peak_of_forward(setting: Setting) -> float:
    of_random = large_probe(setting)
    queries = queries_of(of_random)
    return cost(lambda: run_bare(of_random.model, queries, backward=False), setting.device).memory


def random_queries(count: int, n_pos: int, cfg: ModelConfig, span: int = 1) -> list[Query]:
    """Return queries of random tokens, the answer in their first half and the source in the second."""
    generator, queries = torch.Generator().manual_seed(0), []
    answer_at, source_at = n_pos // 4, n_pos // 4 + n_pos // 2
    for _ in range(count):
        tokens = torch.randint(1, cfg.d_vocab, (n_pos,), generator=generator).tolist()
        masked = [0 if answer_at <= at < answer_at + span else token for at, token in enumerate(tokens)]
        answer = tuple(tokens[answer_at : answer_at + span])
        queries.append(Query(tuple(masked), answer, (answer_at, answer_at + span), (source_at, source_at + 1)))
    return queries


def random_pairs(count: int, n_pos: int, cfg: ModelConfig) -> list[QueryPair]:
    """Return pairs of random tokens, whose sides swap answer and source."""
    pairs = []
    for fact, query in enumerate(random_queries(count, n_pos, cfg)):
        tokens, (answer_at, _), (source_at, _) = list(query.tokens), query.answer_span, query.source_span
        tokens[answer_at], tokens[source_at] = tokens[source_at], tokens[answer_at]
        pairs.append(
            QueryPair(query, Query(tuple(tokens), query.answer, query.source_span, query.answer_span), fact, "left")
        )
    return pairs
