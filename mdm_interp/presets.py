"""The settings that the figures are made in, by name."""

from __future__ import annotations

from collections.abc import Sequence

from mdm_interp.config import FactConfig, ModelConfig, Objective, Scheme, TrainConfig

CYCLE = FactConfig(world="relation_cycle", filler="random")
"""Three roles in a cycle, random filler around the fact: attention has something to choose."""

TWO_ROLE = FactConfig(world="two_role", filler="none", seq_len=3)
"""The fact and nothing else: attention has almost nothing to choose."""

WORLDS = {"relation_cycle": CYCLE, "two_role": TWO_ROLE}

MDM_SCHEMES: tuple[Scheme, ...] = ("rope", "alibi", "none", "learned")


def one_layer(facts: FactConfig, position: Scheme, objective: Objective, seed: int) -> TrainConfig:
    """A one-layer attention-only model of 4 heads, trained on `facts`."""
    attention = "causal" if objective == "causal" else "bidirectional"
    model = ModelConfig(
        d_model=64, n_heads=4, d_vocab=facts.d_vocab, n_ctx=facts.seq_len, position=position, attention=attention
    )
    return TrainConfig(model=model, facts=facts, objective=objective, seed=seed)


VARIANTS: dict[str, tuple[Scheme, Objective]] = {
    **{f"MDM {scheme}": (scheme, "any_order") for scheme in MDM_SCHEMES},
    "ARM rope": ("rope", "causal"),
}
"""What the figures compare: MDMs under four position schemes, and an ARM."""


def variant_of(config: TrainConfig) -> str:
    """The name of a run's variant, as in `VARIANTS`."""
    return f"{'ARM' if config.objective == 'causal' else 'MDM'} {config.model.position}"


def grid(seeds: Sequence[int], worlds: Sequence[str] = tuple(WORLDS)) -> list[TrainConfig]:
    """Every variant in every world under every seed."""
    return [
        one_layer(WORLDS[world], position, objective, seed)
        for seed in seeds
        for world in worlds
        for position, objective in VARIANTS.values()
    ]
