"""Models that are trained as one batched model become what they would have become alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mdm_interp.config import FactConfig, ModelConfig, TrainConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments import grids
from mdm_interp.provenance import made_with
from mdm_interp.training import loop
from mdm_interp.training.loop import Progressed, ensembles, estimate_seconds, last_end, train, train_all
from mdm_interp.training.runs import Run
from mdm_interp.training.trainees import Ensemble, Trainee, shape_of

FACTS = FactConfig(n_entities=6, n_filler=4, seq_len=5)


def tiny(seed: int = 0, objective: Any = "any_order", steps: int = 12, **changes: Any) -> TrainConfig:
    optimizer = {name: changes.pop(name) for name in ("lr", "weight_decay", "warmup", "grad_clip") if name in changes}
    attention = "causal" if objective == "causal" else "bidirectional"
    sizes = {"d_model": 16, "n_heads": 2, "d_vocab": FACTS.d_vocab, "n_ctx": FACTS.seq_len, "attention": attention}
    model = ModelConfig(**{**sizes, **changes})
    return TrainConfig(
        model=model,
        facts=FACTS,
        objective=objective,
        seed=seed,
        steps=steps,
        batch_size=8,
        n_checkpoints=5,
        **{"warmup": 3, **optimizer},
    )


def trainees(configs: list[TrainConfig]) -> list[Trainee]:
    return [Trainee(config, FactWorld(config.facts, config.seed), "cpu") for config in configs]


VARIANTS: dict[str, list[TrainConfig]] = {
    scheme: [tiny(seed, position=scheme, dtype="float64") for seed in range(3)]
    for scheme in ("rope", "alibi", "none", "learned", "t5_bias", "sinusoidal")
}
VARIANTS["deep, with MLPs"] = [tiny(seed, n_layers=3, d_mlp=24, dtype="float64") for seed in range(2)]
VARIANTS["gated MLP, tied"] = [
    tiny(seed, d_mlp=24, gated_mlp=True, tie_word_embeddings=True, dtype="float64") for seed in range(2)
]
VARIANTS["grouped queries"] = [tiny(seed, n_heads=4, n_key_value_heads=2, dtype="float64") for seed in range(2)]
VARIANTS["causal"] = [tiny(seed, "causal", dtype="float64") for seed in range(2)]
VARIANTS["settings of their own"] = [
    tiny(0, lr=1e-2, dtype="float64"),
    tiny(1, "source_only", weight_decay=0.5, grad_clip=0.05, dtype="float64"),
    tiny(2, "target_only", lr=1e-2, dtype="float64"),
    tiny(3, warmup=9, dtype="float64"),
]


@pytest.mark.parametrize("name", VARIANTS)
def test_members_become_what_they_would_alone(name: str) -> None:
    together, alone = trainees(VARIANTS[name]), trainees(VARIANTS[name])
    ensemble = Ensemble(together)
    for step in range(1, 101):
        losses = ensemble.advance(step)
        for loss, one in zip(losses.tolist(), alone, strict=True):
            assert loss == pytest.approx(one.advance(step).item(), abs=1e-9)
    ensemble.update_members()
    for member, one in zip(together, alone, strict=True):
        for mine, theirs in zip(member.model.parameters(), one.model.parameters(), strict=True):
            assert_close(mine, theirs, atol=1e-9, rtol=0)
            held, expected = member.optimizer.state[mine], one.optimizer.state[theirs]
            assert held.keys() == expected.keys()
            for key in held:
                assert_close(held[key], expected[key], atol=1e-9, rtol=0)
        assert torch.equal(member.generator.get_state(), one.generator.get_state())


def test_one_that_has_begun_to_learn_is_not_stacked_with_one_that_has_not() -> None:
    one, other = trainees([tiny(0), tiny(1)])
    other.advance(1)
    with pytest.raises(ValueError, match="members: 1 of 2 have begun to learn; stack those at one step"):
        Ensemble([one, other])


def test_a_copy_goes_on_as_its_original_does() -> None:
    (one,) = trainees([tiny(0)])
    losses = [one.advance(step).item() for step in (1, 2)]
    other = one.copy()
    assert other.advance(3).item() == one.advance(3).item() != losses[1]
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine is not theirs


def train_together(configs: list[TrainConfig], root: Path, stop: int | None = None) -> list[Run]:
    """Train an ensemble in this process, and interrupt it at a step."""

    def report(progressed: Progressed) -> None:
        if progressed.step == stop:
            raise KeyboardInterrupt

    runs = [Run.of(config, root) for config in configs]
    loop._train(runs, "cpu", report)
    return runs


def weights(run: Run) -> bytes:
    return run.checkpoint_path(run.config.steps).read_bytes()


def test_an_interrupted_ensemble_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "REPORT_STEPS", 1)
    configs = [tiny(seed) for seed in range(3)]
    whole = train_together(configs, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_together(configs, tmp_path / "resumed", stop=7)
    resumed = train_together(configs, tmp_path / "resumed")
    for one, other in zip(whole, resumed, strict=True):
        assert one.finished and weights(one) == weights(other)
        assert one.metrics() == other.metrics()
        assert {made_by["ensemble"] for made_by in made_with(other.folder)} == {3}


def test_the_one_that_is_left_goes_on_from_what_it_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may save a later state meanwhile, where the file system has no locks."""
    monkeypatch.setattr(loop, "REPORT_STEPS", 1)
    configs = [tiny(seed) for seed in range(2)]
    whole = train_together(configs, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_together(configs, tmp_path / "left", stop=7)
    reads = list[Run]()
    load_state = Run.load_state
    monkeypatch.setattr(Run, "load_state", lambda run, *given: (reads.append(run), load_state(run, *given))[1])
    (left,) = train_together(configs[:1], tmp_path / "left")
    assert weights(left) == weights(whole[0]) and reads == [left]


def test_members_at_different_steps_are_trained_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three were interrupted, and one is finished already."""
    monkeypatch.setattr(loop, "REPORT_STEPS", 1)
    configs = [tiny(seed, dtype="float64") for seed in range(4)]
    train(configs[0], root=tmp_path, progress=False)
    with pytest.raises(KeyboardInterrupt):
        train_together(configs[1:3], tmp_path, stop=7)
    for run in train_together(configs, tmp_path):
        alone = train(run.config, root=tmp_path / "alone", progress=False)
        for name, weight in run.model().state_dict().items():
            assert_close(weight, alone.model().state_dict()[name], atol=1e-9, rtol=0)


def runs_of(configs: list[TrainConfig]) -> list[Run]:
    return [Run.of(config, "nowhere") for config in configs]


def test_what_is_batched_has_one_shape_and_is_dealt_out_evenly() -> None:
    many, wide = [tiny(seed) for seed in range(10)], [tiny(seed, d_model=512) for seed in range(2)]
    deep = [tiny(seed, n_layers=2) for seed in range(2)]
    mixed = [tiny(3, "source_only"), tiny(4, lr=0.1)]
    found = ensembles(runs_of([*wide, *many, *deep, *mixed]), "cpu", workers=2)
    sizes = sorted(len(together) for together in found)
    assert sizes == [1, 1, 2, 6, 6]
    assert {run.config.digest() for together in found for run in together} == {
        config.digest() for config in [*wide, *many, *deep, *mixed]
    }
    (only, other) = ensembles(runs_of(many), "cpu", workers=2)
    assert len(only) == len(other) == 5
    assert len(ensembles(runs_of(wide), "cuda", workers=1)) == 1
    assert [len(together) for together in ensembles(runs_of(many[:1]), "cpu", workers=2)] == [1]


def seconds(runs: list[Run]) -> float:
    return estimate_seconds(runs[0].config, len(runs))


def by_size(runs: list[Run], workers: int) -> list[list[Run]]:
    """How work was divided before it was estimated: ensembles of 8, the deepest first."""
    shapes: dict[Any, list[Run]] = {}
    for run in runs:
        batched = run.config.model.n_layers * run.config.model.d_model <= 128
        shapes.setdefault(shape_of(run.config) if batched else run.folder, []).append(run)
    split = [np.array_split(np.array(alike, dtype=object), math.ceil(len(alike) / 8)) for alike in shapes.values()]
    parts = [list(part) for parts in split for part in parts]
    return sorted(parts, key=lambda part: len(part) * part[0].config.model.n_layers, reverse=True)


@pytest.mark.parametrize("workers", [2, 5, 16])
@pytest.mark.parametrize("n_seeds", [3, 10])
def test_the_last_worker_idles_little(n_seeds: int, workers: int) -> None:
    """A few expensive shapes and many cheap ones: as near to the bound as ensembles allow, and nearer than before."""
    shapes = [{"d_model": 256, "n_layers": 2}, {"d_model": 64}, {"d_model": 16}, {"d_model": 16, "position": "alibi"}]
    configs = [tiny(seed, steps=200, **shape) for shape in shapes for seed in range(n_seeds)]
    configs += [tiny(seed, steps=3000) for seed in range(n_seeds)]
    runs = runs_of(configs)
    found = ensembles(runs, "cpu", workers)
    assert sorted(run.folder for part in found for run in part) == sorted(run.folder for run in runs)
    taken = [seconds(part) for part in found]
    assert taken == sorted(taken, reverse=True)
    end, bound = last_end(taken, workers), max(sum(taken) / workers, max(taken))
    assert end <= 1.1 * bound
    assert end <= 1.001 * last_end([seconds(part) for part in by_size(runs, workers)], workers)


@pytest.mark.parametrize(("seeds", "workers", "idle"), [(3, 2, 0.06), (10, 2, 0.06), (10, 16, 0.15)])
def test_reproduce_is_divided_no_worse_than_before(real_grid: None, seeds: int, workers: int, idle: float) -> None:
    """With 16 workers each has four parts, the longest of half its share: they cannot all end together."""
    runs = runs_of(grids.every_run(range(seeds)))
    found = ensembles(runs, "cpu", workers)
    end = last_end([seconds(part) for part in found], workers)
    assert end <= 1.01 * last_end([seconds(part) for part in by_size(runs, workers)], workers)
    assert end <= (1 + idle) * max(sum(map(seconds, found)) / workers, seconds(found[0]))
    if workers == 2:
        assert sum(map(seconds, found)) <= 1.02 * sum(map(seconds, by_size(runs, workers))), "ensembles are not whole"


def test_whoever_is_free_takes_the_next_task() -> None:
    assert last_end([4.0, 3.0, 2.0, 1.0], 2) == 5
    assert last_end([1.0, 1.0, 4.0], 2) == 5
    assert last_end([], 3) == 0


@pytest.mark.slow
def test_train_all_batches_what_has_one_shape(tmp_path: Path) -> None:
    configs = [tiny(seed) for seed in range(3)] + [tiny(0, "causal")]
    runs = train_all(configs, root=tmp_path, workers=2)
    assert [made_with(run.folder)[0].get("ensemble") for run in runs] == [3, 3, 3, None]
    assert all(run.finished for run in runs)


def test_long_sequences_are_batched_too() -> None:
    """From 64 positions on a model alone takes the fused kernel."""
    facts = FactConfig(n_entities=6, n_filler=4, seq_len=70)
    configs = [
        tiny(seed, d_vocab=facts.d_vocab, n_ctx=70, dtype="float64").model_copy(update={"facts": facts})
        for seed in range(2)
    ]
    together, alone = trainees(configs), trainees(configs)
    ensemble = Ensemble(together)
    for step in range(1, 4):
        for loss, one in zip(ensemble.advance(step).tolist(), alone, strict=True):
            assert loss == pytest.approx(one.advance(step).item(), abs=1e-9)
