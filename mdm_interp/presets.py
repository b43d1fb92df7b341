"""The settings that the figures are made in, by name: worlds, models, and the grids of runs that analyses share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mdm_interp.config import FactConfig, ModelConfig, Objective, Scheme, TrainConfig
from mdm_interp.runs import Run

CYCLE = FactConfig(world="relation_cycle", filler="random")
"""Three roles in a cycle, random filler around the fact: attention has something to choose."""

TWO_ROLE = FactConfig(world="two_role", filler="none", seq_len=3)
"""The fact and nothing else: attention has almost nothing to choose."""

WORLDS = {"relation_cycle": CYCLE, "two_role": TWO_ROLE}

MDM_SCHEMES: tuple[Scheme, ...] = ("rope", "alibi", "none", "learned")
OTHER_SCHEMES: tuple[Scheme, ...] = ("t5_bias", "sinusoidal")
SCHEMES = MDM_SCHEMES + OTHER_SCHEMES

QUICK_SEEDS, FULL_SEEDS = 3, 10

LEARNT = 0.5
"""Forward probability from which a model counts as having learnt its facts: the stage `early` begins there."""
STAGES = ("initial", "early", "end")


def small_model(
    facts: FactConfig, position: Scheme, objective: Objective, seed: int, *, n_layers: int = 1, mlp: bool = False
) -> TrainConfig:
    """A model of 4 heads and width 64, attention-only unless `mlp`, trained on `facts`."""
    attention = "causal" if objective == "causal" else "bidirectional"
    d_model = 64
    model = ModelConfig(
        d_model=d_model,
        n_heads=4,
        n_layers=n_layers,
        d_mlp=4 * d_model if mlp else None,
        d_vocab=facts.d_vocab,
        n_ctx=facts.seq_len,
        position=position,
        attention=attention,
    )
    return TrainConfig(model=model, facts=facts, objective=objective, seed=seed)


VARIANTS: dict[str, tuple[Scheme, Objective]] = {
    **{f"MDM {scheme}": (scheme, "any_order") for scheme in MDM_SCHEMES},
    "ARM rope": ("rope", "causal"),
}
"""What most figures compare: MDMs under four position schemes, and an ARM."""


def variant_of(config: TrainConfig) -> str:
    """The name of a run's variant, as in `VARIANTS`."""
    return f"{'ARM' if config.objective == 'causal' else 'MDM'} {config.model.position}"


# ---- grids of runs. A run that stands in several is trained once.


def every_second(seeds: Sequence[int]) -> Sequence[int]:
    """Half of the seeds, at least one: for grids that would otherwise take too long."""
    return seeds[: max(1, len(seeds) // 2)]


def is_quick(seeds: Sequence[int]) -> bool:
    """Whether a run has so few seeds because it has to end soon."""
    return len(seeds) <= QUICK_SEEDS


def grid(seeds: Sequence[int], worlds: Sequence[str] = tuple(WORLDS)) -> list[TrainConfig]:
    """Every variant in every world under every seed."""
    return [
        small_model(WORLDS[world], position, objective, seed)
        for seed in seeds
        for world in worlds
        for position, objective in VARIANTS.values()
    ]


def scheme_grid(seeds: Sequence[int]) -> list[TrainConfig]:
    """MDMs under all six position schemes, in the world with filler; a quick run has `OTHER_SCHEMES` for every second
    seed."""
    others = every_second(seeds) if is_quick(seeds) else seeds
    return [
        small_model(WORLDS["relation_cycle"], scheme, "any_order", seed)
        for seed in seeds
        for scheme in (SCHEMES if seed in others else MDM_SCHEMES)
    ]


OBJECTIVES: tuple[Objective, ...] = ("any_order", "source_only", "target_only", "causal")


def objective_grid(seeds: Sequence[int], worlds: Sequence[str] = tuple(WORLDS)) -> list[TrainConfig]:
    """Every objective under every position scheme of `MDM_SCHEMES` in every world. In `two_role`, the control, and in a
    quick run for every second seed. Any-order masking gives a source of `relation_cycle` two answers, single-sided
    masking one; in `two_role` every objective gives it one."""
    return [
        small_model(WORLDS[world], scheme, objective, seed)
        for world in worlds
        for seed in (every_second(seeds) if world == "two_role" or is_quick(seeds) else seeds)
        for objective in OBJECTIVES
        for scheme in MDM_SCHEMES
    ]


DEPTHS = (1, 2, 4)
DEPTH_SCHEMES: tuple[Scheme, ...] = ("rope", "alibi")


def depth_grid(seeds: Sequence[int]) -> list[TrainConfig]:
    """MDMs of 1, 2 and 4 layers, with and without MLP, under `DEPTH_SCHEMES`, in the world with filler; for every
    second seed, as deep models train for long."""
    return [
        small_model(WORLDS["relation_cycle"], scheme, "any_order", seed, n_layers=n_layers, mlp=mlp)
        for seed in every_second(seeds)
        for scheme in DEPTH_SCHEMES
        for n_layers in DEPTHS
        for mlp in (False, True)
    ]


def every_run(seeds: Sequence[int]) -> list[TrainConfig]:
    """The union of all grids, each run once; a quick one leaves out the objectives' control world."""
    worlds = ("relation_cycle",) if is_quick(seeds) else tuple(WORLDS)
    union = [*grid(seeds), *scheme_grid(seeds), *objective_grid(seeds, worlds), *depth_grid(seeds)]
    return list({config.digest(): config for config in union}.values())


# ---- what a row says of the run it was measured on


SCOPE = ("world", "scheme", "objective", "n_layers", "mlp")
"""The columns that say in which setting something was measured; a claim is judged in each by itself."""


def scope_label(scope: Mapping[str, Any]) -> str:
    """A scope in a few words: world, objective, scheme, depth and, if it has one, the training stage."""
    depth = f"{scope['n_layers']} layer{'s' if scope['n_layers'] > 1 else ''}{' + MLP' if scope['mlp'] else ''}"
    stage = f", {scope['stage']}" if "stage" in scope else ""
    return f"{scope['world']}, {scope['objective']} {scope['scheme']}, {depth}{stage}"


def about(run: Run) -> dict[str, Any]:
    """The columns that every row begins with: the scope, seed and run."""
    config = run.config
    return {
        "world": config.facts.world,
        "scheme": config.model.position,
        "objective": config.objective,
        "n_layers": config.model.n_layers,
        "mlp": not config.model.attn_only,
        "seed": config.seed,
        "run": run.folder.name,
    }


def stages(run: Run) -> dict[str, int]:
    """The step of each training stage: `initial`, `early` (the first checkpoint whose forward probability reaches
    `LEARNT`; absent if none does) and `end`."""
    learnt = [row["step"] for row in run.metrics() if row["forward_probability"] >= LEARNT]
    return {"initial": run.steps[0], **({"early": learnt[0]} if learnt else {}), "end": run.steps[-1]}
