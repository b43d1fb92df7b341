"""The settings that the figures are made in, by name."""

from __future__ import annotations

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
