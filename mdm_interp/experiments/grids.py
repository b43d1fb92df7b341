"""The settings that the figures are made in, by name: worlds, models, and the grids of runs that analyses share."""

from __future__ import annotations

from collections.abc import Sequence

from mdm_interp.config import Attention, FactConfig, ModelConfig, Objective, Scheme, TrainConfig

CYCLE = FactConfig(world="relation_cycle", filler="random")
"""Three roles in a cycle, random filler around the fact: attention has something to choose."""

TWO_ROLE = FactConfig(world="two_role", filler="none", seq_len=3)
"""The fact and nothing else: attention has almost nothing to choose."""

DISTANT = FactConfig(gap=(2, 32), seq_len=40)
"""The cycle with facts spread over up to 32 positions, for heads of 64 or 128 dimensions."""

WORLDS = {"relation_cycle": CYCLE, "two_role": TWO_ROLE}

MDM_SCHEMES: tuple[Scheme, ...] = ("rope", "alibi", "none", "learned")
OTHER_SCHEMES: tuple[Scheme, ...] = ("t5_bias", "sinusoidal")
SCHEMES = MDM_SCHEMES + OTHER_SCHEMES

QUICK_SEEDS, FULL_SEEDS = 3, 10


def small_model(
    facts: FactConfig,
    position: Scheme,
    objective: Objective,
    seed: int,
    *,
    n_layers: int = 1,
    n_heads: int = 1,
    d_head: int | None = None,
    rotary_base: float = 10_000.0,
    mlp: bool = False,
    attention: Attention | None = None,
    mask_rate: float | None = None,
) -> TrainConfig:
    """Return a model of width 64, attention-only unless `mlp`, trained on `facts`.

    By default it has one head: the theory is about a single attention map.

    Args:
        d_head: Default: the width shared out among the heads.
        attention: Default: causal for an ARM, otherwise bidirectional.
    """
    d_model = 64
    model = ModelConfig(
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_head,
        n_layers=n_layers,
        d_mlp=4 * d_model if mlp else None,
        d_vocab=facts.d_vocab,
        n_ctx=facts.seq_len,
        position=position,
        rotary_base=rotary_base,
        attention=attention or ("causal" if objective == "causal" else "bidirectional"),
        readout_shift=-1 if objective == "causal" else 0,
    )
    return TrainConfig(model=model, facts=facts, objective=objective, seed=seed, mask_rate=mask_rate)


VARIANTS: dict[str, tuple[Scheme, Objective]] = {
    **{f"MDM {scheme}": (scheme, "any_order") for scheme in MDM_SCHEMES},
    "ARM rope": ("rope", "causal"),
}
"""What most figures compare: MDMs under four position schemes, and an ARM."""
SIDELESS: tuple[Scheme, ...] = ("alibi", "none")
"""Schemes whose scores cannot tell sides apart: a reverse query is answered as its mirror image."""
OF_FEW_SEEDS = OTHER_SCHEMES + SIDELESS
"""Schemes that one-head MDMs have for every second seed only."""


def variant_of(config: TrainConfig) -> str:
    """Return the name of a run's variant, as in `VARIANTS`."""
    return f"{'ARM' if config.objective == 'causal' else 'MDM'} {config.model.position}"


# ---- grids of runs. A run that is in several is trained once.


def every_second(seeds: Sequence[int]) -> Sequence[int]:
    """Return half of the seeds, at least one: for grids that would otherwise take too long."""
    return seeds[: max(1, len(seeds) // 2)]


def every_third(seeds: Sequence[int]) -> Sequence[int]:
    """Return a third of the seeds, at least one."""
    return seeds[: max(1, len(seeds) // 3)]


def is_quick(seeds: Sequence[int]) -> bool:
    """Tell whether a run has so few seeds because it has to end soon."""
    return len(seeds) <= QUICK_SEEDS


def grid(seeds: Sequence[int], worlds: Sequence[str] = tuple(WORLDS)) -> list[TrainConfig]:
    """Return every variant in every world; in `two_role`, the control, and under `OF_FEW_SEEDS` for every second
    seed."""
    few = every_second(seeds)
    return [
        small_model(WORLDS[world], position, objective, seed)
        for world in worlds
        for seed in (few if world == "two_role" else seeds)
        for position, objective in VARIANTS.values()
        if seed in few or position not in OF_FEW_SEEDS
    ]


def cycle_grid(seeds: Sequence[int]) -> list[TrainConfig]:
    """Return every variant in the world with filler."""
    return grid(seeds, ["relation_cycle"])


def cycle_mdm_grid(seeds: Sequence[int]) -> list[TrainConfig]:
    """Return every MDM of :func:`cycle_grid`."""
    return [config for config in cycle_grid(seeds) if config.objective != "causal"]


def scheme_grid(seeds: Sequence[int]) -> list[TrainConfig]:
    """Return MDMs under all six position schemes, in the world with filler; `OF_FEW_SEEDS` for every second seed."""
    few = every_second(seeds)
    return [
        small_model(WORLDS["relation_cycle"], scheme, "any_order", seed)
        for seed in seeds
        for scheme in SCHEMES
        if seed in few or scheme not in OF_FEW_SEEDS
    ]


OBJECTIVES: tuple[Objective, ...] = ("any_order", "source_only", "target_only", "causal")
CONTROL_SCHEMES: tuple[Scheme, ...] = ("rope", "learned")
"""The schemes of single-sided models in `two_role`. Under ALiBi and without positions a reverse query is a mirror image
there."""


def objective_grid(seeds: Sequence[int], worlds: Sequence[str] = tuple(WORLDS)) -> list[TrainConfig]:
    """Return every objective under every position scheme of `MDM_SCHEMES` in `relation_cycle`, and what masks one side
    only under `CONTROL_SCHEMES` in `two_role`; any-order masking for the seeds of :func:`grid`, the others for every
    second one, under `SIDELESS` schemes for every third, and in a quick run under `CONTROL_SCHEMES` alone. Any-order
    masking gives a source of `relation_cycle` two answers, single-sided masking one; in `two_role` every objective
    gives it one."""
    configs = grid(seeds, worlds)
    for world in worlds:
        control = world == "two_role"
        configs += [
            small_model(WORLDS[world], scheme, objective, seed)
            for scheme in (CONTROL_SCHEMES if control or is_quick(seeds) else MDM_SCHEMES)
            for seed in (every_third(seeds) if scheme in SIDELESS else every_second(seeds))
            for objective in (OBJECTIVES[1:3] if control else OBJECTIVES[1:])
        ]
    return list({config.digest(): config for config in configs}.values())


CELLS: dict[str, tuple[Objective, Attention]] = {
    "any order, bidirectional": ("any_order", "bidirectional"),
    "left to right, bidirectional": ("left_to_right", "bidirectional"),
    "any order, causal": ("any_order", "causal"),
    "left to right, causal": ("causal", "causal"),
}
"""Objective and attention, each with each: an MDM, both mixtures, and an ARM."""
MASK_RATES = (0.15, 0.5)
"""With which any-order masking is tried beside a rate drawn for each sequence."""


def attention_grid(seeds: Sequence[int]) -> list[TrainConfig]:
    """Return every objective with every attention, and masking at fixed rates, under rope with one head: in the world
    with filler, and in a pool of which half of the facts show that the one relation, as in `A is B`, holds either way.
    They are made for every second seed and, in the pool, for every third; in a quick run in the first world alone."""
    made = [(WORLDS["relation_cycle"], seed) for seed in every_second(seeds)]
    made += [] if is_quick(seeds) else [(pool_world(0.5), seed) for seed in every_third(seeds)]
    return [
        config
        for facts, seed in made
        for config in (
            *(small_model(facts, "rope", objective, seed, attention=seen) for objective, seen in CELLS.values()),
            *(small_model(facts, "rope", "any_order", seed, mask_rate=rate) for rate in MASK_RATES),
        )
    ]


DEPTHS = (1, 2, 4)
DEPTH_SCHEMES: tuple[Scheme, ...] = ("rope", "alibi")


def depth_grid(seeds: Sequence[int]) -> list[TrainConfig]:
    """Return MDMs of 1, 2 and 4 layers, with and without MLP, under `DEPTH_SCHEMES`, in the world with filler; for
    every third seed, as deep models train for long. The second scheme lacks the deepest, and a quick run both."""
    quick = is_quick(seeds)
    return [
        small_model(WORLDS["relation_cycle"], scheme, "any_order", seed, n_layers=n_layers, mlp=mlp)
        for seed in every_third(seeds)
        for scheme in (DEPTH_SCHEMES[:1] if quick else DEPTH_SCHEMES)
        for n_layers in (DEPTHS[:-1] if quick or scheme != DEPTH_SCHEMES[0] else DEPTHS)
        for mlp in (False, True)
    ]


HEADS = (1, 2, 4, 8)
HEAD_SCHEMES: tuple[Scheme, ...] = ("rope", "learned")
MANY_HEADS = 4
"""How many heads the contrast to one head has."""


def head_grid(seeds: Sequence[int]) -> list[TrainConfig]:
    """Return models of 1, 2, 4 and 8 heads in the world with filler: the width shared out among the heads, and 1 and 4
    heads of 16 and of 64 dimensions each, under `HEAD_SCHEMES`; and every variant with 4 heads. They are made for
    every second seed; 1 and 4 heads that share the width under rope, and 4 under learned positions, for every seed. A
    quick run has 1 and 4 heads that share the width, rope for every seed and learned positions for one."""
    quick, few = is_quick(seeds), every_second(seeds)
    counts = (1, MANY_HEADS) if quick else HEADS
    shapes: list[tuple[int, int | None]] = [(n_heads, None) for n_heads in counts]
    shapes += [] if quick else [(1, 16), (MANY_HEADS, 64)]
    made: list[tuple[int, Scheme, Objective, int, int | None]] = []
    for seed in seeds:
        for n_heads in (1, MANY_HEADS):
            made.append((seed, "rope", "any_order", n_heads, None))
        if not quick:
            made.append((seed, "learned", "any_order", MANY_HEADS, None))
        if seed in few:
            for scheme in HEAD_SCHEMES:
                for n_heads, d_head in shapes:
                    made.append((seed, scheme, "any_order", n_heads, d_head))
            for scheme, objective in () if quick else VARIANTS.values():
                made.append((seed, scheme, objective, MANY_HEADS, None))
    return [
        small_model(WORLDS["relation_cycle"], scheme, objective, seed, n_heads=n_heads, d_head=d_head)
        for seed, scheme, objective, n_heads, d_head in dict.fromkeys(made)
    ]


def path_grid(seeds: Sequence[int]) -> list[TrainConfig]:
    """Return what is followed through all of its training, in the world with filler: every variant, rope with 4 heads,
    and rope where one side only is masked; for every third seed, as each run is trained once more, and `SIDELESS`
    schemes for one. All are in other grids too. A quick run has the first variant alone."""
    made: list[tuple[Scheme, Objective, int]] = [(scheme, objective, 1) for scheme, objective in VARIANTS.values()]
    made.append(("rope", "any_order", MANY_HEADS))
    made.extend(("rope", objective, 1) for objective in OBJECTIVES[1:3])
    return [
        small_model(WORLDS["relation_cycle"], scheme, objective, seed, n_heads=n_heads)
        for seed in every_third(seeds)
        for scheme, objective, n_heads in (made[:1] if is_quick(seeds) else made)
        if seed == seeds[0] or scheme not in SIDELESS
    ]


BOTH_WAYS = (0.0, 0.5, 0.8)
"""Shares of facts that training shows both ways; the others are tested."""
POOL = "symmetric_pool"
POOL_MODELS: dict[str, tuple[Scheme, Objective, int, float]] = {
    "MDM rope, d_head 64, base 1e6": ("rope", "any_order", 64, 1e6),
    "MDM rope, d_head 16, base 1e4": ("rope", "any_order", 16, 1e4),
    "MDM learned, d_head 64": ("learned", "any_order", 64, 1e4),
    "ARM rope, d_head 64, base 1e6": ("rope", "causal", 64, 1e6),
}
"""Scheme, objective, dimensions of the one head, and RoPE's base."""


POOL_CONTRASTS = ("MDM rope, d_head 64, base 1e6", "MDM learned, d_head 64")
"""What is compared for every seed where the share is extreme; all else is for every second one."""


def pool_grid(seeds: Sequence[int]) -> list[TrainConfig]:
    """Return one-head models of a pool in which every entity is in one fact, so that training shows a tested fact's
    source on one side only, while a share of *other* facts is shown both ways. A quick run has one seed of the two
    extremes."""
    few, extremes = every_second(seeds), (BOTH_WAYS[0], BOTH_WAYS[-1])
    seeds, shares = (few, extremes) if is_quick(seeds) else (seeds, BOTH_WAYS)
    return [
        small_model(pool_world(share), scheme, objective, seed, d_head=d_head, rotary_base=base)
        for seed in seeds
        for share in shares
        for name, (scheme, objective, d_head, base) in POOL_MODELS.items()
        if seed in few or (name in POOL_CONTRASTS and share in extremes)
    ]


def pool_world(both_ways: float) -> FactConfig:
    """Return a pool of entities with random filler and free gaps, this share of whose facts training shows both
    ways."""
    return FactConfig(world=POOL, filler="random", gap=(2, 5), reversed_share=both_ways)


def every_run(seeds: Sequence[int]) -> list[TrainConfig]:
    """Return the union of all grids, each run once; a quick one leaves out the objectives' control world."""
    worlds = ("relation_cycle",) if is_quick(seeds) else tuple(WORLDS)
    union = [*grid(seeds), *scheme_grid(seeds), *objective_grid(seeds, worlds), *depth_grid(seeds)]
    union += [*head_grid(seeds), *pool_grid(seeds)]
    return list({config.digest(): config for config in union}.values())
