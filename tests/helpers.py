"""Tiny seeded models, and the analyses' grid made of tiny runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from analyses import phase_diagram
from mdm_interp.config import DemoConfig, FactConfig, ModelConfig, TrainConfig
from mdm_interp.experiments import grids, scope, subjects
from mdm_interp.experiments.analysis import Analysis, discover
from mdm_interp.experiments.results import Result, TrainedOrigin, tidy
from mdm_interp.experiments.subjects import Lab
from mdm_interp.experiments.sweep import Sweep
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.summary import Entry, Summary
from mdm_interp.training.loop import train
from mdm_interp.training.runs import Run

ROOT = Path(__file__).parents[1]
"""The repository."""

REAL = {name: getattr(grids, name) for name in ("WORLDS", "small_model", "pool_world", "QUICK_SEEDS")}
REAL["WORLDS"] = dict(grids.WORLDS)
REAL_DEMOS = dict(subjects.DEMOS)
REAL_LEARNT, REAL_MAP, REAL_MAP_LEARNT = scope.LEARNT, phase_diagram.SWEEP, phase_diagram.LEARNT
"""What :func:`tiny_grid` replaces, as it was."""

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.5}
YARN |= {"attention_factor": 1.2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 0.5, "high_freq_factor": 2.0}
"""Scaled rotary embeddings whose planes of 4 dimensions and more are slowed down wholly, in part and not at all."""
EXPERTS = {"num_experts": 6, "experts_per_token": 2, "d_expert": 10, "n_shared": 1, "n_groups": 3, "topk_groups": 2}
EXPERTS |= {"n_dense_layers": 1, "routed_scale": 2.5}
TINY: dict[str, Any] = {"d_model": 16, "n_heads": 4, "n_layers": 2, "d_vocab": 13, "n_ctx": 12}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**TINY, **changes})


def random_model(*, seed: int = 0, **changes: Any) -> HookedTransformer:
    """A model in which no gain is 1 and no bias 0, so that no term of the computation can be left out unnoticed."""
    generator = seeded(seed)
    model = HookedTransformer(tiny_config(**{"initializer_range": 0.4, **changes}), generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rsplit(".", 1)[-1] in ("w", "b", "b_Q", "b_K", "b_V"):
                parameter += 0.4 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def random_tokens(*, batch: int = 2, pos: int = 7, d_vocab: int = TINY["d_vocab"], seed: int = 1) -> Tensor:
    return torch.randint(d_vocab, (batch, pos), generator=seeded(seed))


# ---- the analyses' grid, of models that train in a blink


def tiny_run(
    facts: FactConfig,
    position: Any,
    objective: Any,
    seed: int,
    *,
    n_layers: int = 1,
    n_heads: int = 2,
    d_head: int | None = None,
    rotary_base: float = 10_000.0,
    mlp: bool = False,
    attention: Any = None,
    mask_rate: float | None = None,
) -> TrainConfig:
    """In place of `grids.small_model`."""
    model = ModelConfig(
        d_model=16,
        n_heads=n_heads,
        d_head=d_head,
        n_layers=n_layers,
        d_mlp=16 if mlp else None,
        d_vocab=facts.d_vocab,
        n_ctx=facts.seq_len,
        position=position,
        rotary_base=rotary_base,
        attention=attention or ("causal" if objective == "causal" else "bidirectional"),
        readout_shift=-1 if objective == "causal" else 0,
    )
    trained: dict[str, Any] = {"steps": 30, "batch_size": 16, "warmup": 1, "n_checkpoints": 4}
    return TrainConfig(model=model, facts=facts, objective=objective, seed=seed, mask_rate=mask_rate, **trained)


def tiny_pool_world(both_ways: float) -> FactConfig:
    """In place of `grids.pool_world`."""
    return FactConfig(
        world=grids.POOL, n_entities=20, n_filler=4, seq_len=6, filler="random", gap=(2, 4), reversed_share=both_ways
    )


def train_here(configs: Sequence[TrainConfig], *, root: Path, device: str, workers: int | None) -> list[Run]:
    """`train_all` without its processes, which take longer to start than these runs take."""
    return [train(config, root=root, device=device, progress=False) for config in configs]


TINY_DEMO = DemoConfig(n_families=6, n_control=2, n_bpe=300, d_model=16, n_layers=2, d_mlp=16, steps=8)


TINY_MAP = Sweep(
    base={
        "model": {"d_model": 16},
        "facts": {"n_entities": 9, "n_filler": 4},
        **{"steps": 150, "batch_size": 16, "lr": 1e-2, "warmup": 1, "n_checkpoints": 8},
    },
    grid={"model.n_heads": [1, 2, 4, 8], "seed": [0, 1]},
    points=[
        {},
        {"facts.world": "symmetric_pool", "facts.n_entities": 20, "facts.reversed_share": 0.5},
        {"model.n_layers": 2},
    ],
)
"""In place of the whole map."""


def one_after_the_other(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    *,
    workers: Any,
    show: Callable[[Any], Any],
    finished: Callable[[Future[Any]], Any] = Future.result,
) -> None:
    """`side_by_side` without its processes."""
    for task in tasks:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*task, show))
        except Exception as error:
            future.set_exception(error)
        finished(future)


@contextlib.contextmanager
def tiny_grid() -> Iterator[None]:
    """The grids of `experiments.grids`, and the demo checkpoints, made tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(grids.WORLDS, "relation_cycle", FactConfig(n_entities=9, n_filler=4))
        patch.setitem(grids.WORLDS, "two_role", FactConfig(world="two_role", filler="none", seq_len=3, n_entities=8))
        patch.setattr(grids, "small_model", tiny_run)
        patch.setattr(grids, "pool_world", tiny_pool_world)
        patch.setattr(grids, "QUICK_SEEDS", 1)  # so that two seeds have every setting
        patch.setattr(scope, "LEARNT", 0.15)  # what so short a training reaches
        patch.setattr(phase_diagram, "LEARNT", 0.18)
        patch.setattr(phase_diagram, "SWEEP", TINY_MAP)
        columns = phase_diagram.columns_of(REAL_MAP) + phase_diagram.columns_of(TINY_MAP)  # committed results, too
        patch.setattr(phase_diagram, "columns", lambda: columns)
        patch.setattr(subjects, "train_all", train_here)
        for world in subjects.DEMOS:
            patch.setitem(subjects.DEMOS, world, TINY_DEMO.model_copy(update={"world": world}))
        patch.setattr(subjects, "side_by_side", one_after_the_other)
        yield


def planted_result(name: str, rows: Sequence[dict[str, Any]], **changed: Any) -> Result:
    """A result of one's own rows."""
    origin = TrainedOrigin(kind="runs", runs=[], first_seed=[])
    parts: dict[str, Any] = {"question": "Planted?", "origin": origin, "settings": {}, "seeds": [0], "versions": {}}
    return Result(**{"name": name, "rows": tidy(rows), **parts, **changed})


def with_summary(result: Result, *planted: Entry) -> Result:
    """A result of the same rows, with some estimates of its summary planted."""
    there = {(one.quantity, frozenset(one.of.items())) for one in planted}
    kept = [one for one in result.summary if (one.quantity, frozenset(one.of.items())) not in there]
    return replace(result, summarize=lambda result: Summary([*kept, *planted]))


def few_of(analysis: Analysis) -> Analysis:
    """An analysis of all runs of the one-layer grid, and of one run for every other setting, of which `signatures` has
    more than twice as many as any other."""
    if analysis.name != "signatures":
        return analysis

    def configs(seeds: Sequence[int]) -> list[TrainConfig]:
        grid = {config.digest() for config in grids.grid(seeds)}
        return [config for config in analysis.configs(seeds) if config.seed == 0 or config.digest() in grid]

    return replace(analysis, configs=configs)


class TinyResults:
    """The installed analyses' results on the tiny grid, each measured when first asked for, by whichever process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lab, self.out = folder, Lab(n_seeds=2, root=folder / "store"), folder / "out"
        self.results: dict[str, Result] = {}

    def __call__(self, name: str) -> Result:
        if name not in self.results:
            (analysis,) = [analysis for analysis in discover() if analysis.name == name]
            self.folder.mkdir(exist_ok=True)
            with FileLock(self.folder / f"{name}.lock"):
                self.results[name] = few_of(analysis).result(self.lab, self.out)
        return self.results[name]
