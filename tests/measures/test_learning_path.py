"""The change of mean losses along the way of the weights, split by part: it adds up, and each part is the integral."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_model
from model_helpers import native_peer
from torch import Tensor

from mdm_interp.config import FactConfig
from mdm_interp.data.queries import Query, batches
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import query_loss
from mdm_interp.measures.gradients import LearningPath
from mdm_interp.measures.gradients.components import part_of
from mdm_interp.models.bridge import hooked

WORLD = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)
PAIRS = WORLD.query_pairs(n_contexts=1)
LOSSES = {"forward": [pair.forward for pair in PAIRS], "reverse": [pair.reverse for pair in PAIRS]}


SIZES: dict[str, Any] = {
    "d_vocab": WORLD.config.d_vocab,
    "n_ctx": WORLD.config.seq_len,
    "mask_token_id": WORLD.config.mask_token_id,
}


def model_of_facts(**changes: Any) -> Any:
    return random_model(dtype="float64", **{**SIZES, "n_layers": 1, "position": "learned", **changes})


def mean_loss(model: Any, queries: Sequence[Query]) -> Tensor:
    (batch,) = batches(queries, model.cfg)
    return query_loss(model(batch.tokens), batch).mean()


def directions(model: Any, size: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [size * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]


@torch.no_grad()
def move(model: Any, along: Sequence[Tensor], share: float) -> None:
    for parameter, direction in zip(model.parameters(), along, strict=True):
        parameter += share * direction


@pytest.mark.parametrize("d_mlp", [None, 24])
def test_each_part_is_the_integral_of_its_gradient_along_the_way(d_mlp: int | None) -> None:
    """Against Gauss-Legendre quadrature of the gradient along a straight line, written out here."""
    model = model_of_facts(d_mlp=d_mlp, n_layers=2)
    along = directions(model, 0.02)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    expected: dict[Any, float] = {}
    at = 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        move(model, along, node - at)
        at = node
        grads = torch.autograd.grad(mean_loss(model, LOSSES["reverse"]), list(model.parameters()))
        for (name, _), grad, direction in zip(model.named_parameters(), grads, along, strict=True):
            expected[part_of(name)] = expected.get(part_of(name), 0.0) + weight * (grad * direction).sum().item()
    move(model, along, -at)
    path = LearningPath(model, LOSSES)
    for _ in range(128):
        move(model, along, 1 / 128)
        path.advance()
    assert set(path.parts) == set(expected)
    for part, found in zip(path.parts, path.learnt["reverse"].tolist(), strict=True):
        assert found == pytest.approx(expected[part], abs=2e-5)
    assert path.learnt["reverse"].sum().item() == pytest.approx(path.change["reverse"], abs=2e-5)


def test_a_long_step_is_halved_until_its_parts_add_up() -> None:
    found = {}
    for tolerance in (1e-6, float("inf")):
        model = model_of_facts()
        along, path = directions(model, 0.2), LearningPath(model, LOSSES, tolerance=tolerance)
        move(model, along, 1.0)
        weights = [parameter.clone() for parameter in model.parameters()]
        path.advance()
        assert all(torch.equal(now, then) for now, then in zip(model.parameters(), weights, strict=True))
        found[tolerance] = {name: path.change[name] - path.learnt[name].sum().item() for name in LOSSES}
    for name in LOSSES:
        assert abs(found[float("inf")][name]) > 0.01
        assert abs(found[1e-6][name]) < 1e-4


def test_what_is_missing_shrinks_with_the_square_of_the_steps() -> None:
    missing = []
    for steps in (8, 16, 32):
        model = model_of_facts()
        along = directions(model, 0.1)
        path = LearningPath(model, LOSSES, tolerance=float("inf"))
        for _ in range(steps):
            move(model, along, 1 / steps)
            path.advance()
        missing.append(abs(path.learnt["forward"].sum().item() - path.change["forward"]))
    assert missing[1] < missing[0] / 3 and missing[2] < missing[1] / 3


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_the_parts_add_up_whatever_the_optimizer(optimizer: Any) -> None:
    model = model_of_facts()
    before = {name: mean_loss(model, queries).item() for name, queries in LOSSES.items()}
    path, descent = LearningPath(model, LOSSES), optimizer(model.parameters(), lr=1e-2)
    for _ in range(30):
        descent.zero_grad()
        mean_loss(model, LOSSES["forward"]).backward()
        descent.step()
        path.advance()
    for name, queries in LOSSES.items():
        change = mean_loss(model, queries).item() - before[name]
        assert path.change[name] == pytest.approx(change, abs=1e-12)
        assert path.learnt[name].sum().item() == pytest.approx(change, rel=0.02)
    assert path.change["forward"] < -0.1


def test_half_precision_is_followed_in_float32() -> None:
    """In bfloat16 a small step would be lost in the rounding of the losses."""
    model = random_model(**SIZES, n_layers=1, dtype="bfloat16")
    path, descent = LearningPath(model, LOSSES), torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(2):
        descent.zero_grad()
        mean_loss(model, LOSSES["forward"]).backward()
        descent.step()
        path.advance()
    for name in LOSSES:
        assert path.change[name] != 0
        assert path.learnt[name].sum().item() == pytest.approx(path.change[name], abs=1e-3)


def test_parts_that_never_add_up_are_told() -> None:
    model = model_of_facts()
    path = LearningPath(model, LOSSES, tolerance=0.0)
    move(model, directions(model, 0.1), 1.0)
    with pytest.warns(
        UserWarning, match=r"^losses: the parts of this step's change of '(for|re).+ the tolerance of 0; take"
    ):
        path.advance()


def test_only_what_moves_learns() -> None:
    model = model_of_facts()
    model.W_E.requires_grad_(False)
    path = LearningPath(model, LOSSES)
    assert (None, "embedding") not in path.parts
    with torch.no_grad():
        model.blocks[0].attn.W_V += 0.1
    path.advance()
    moved = {part for part, value in zip(path.parts, path.learnt["reverse"].tolist(), strict=True) if value}
    assert moved == {(0, "V")}
    assert path.within("reverse", ["V", "O"]) == path.learnt["reverse"].sum().item()
    assert path.within("reverse", ["embedding"]) == 0


def test_a_bridge_learns_alike() -> None:
    model = random_model(**SIZES, n_layers=1, rotary_adjacent_pairs=True)
    found = []
    for one in (model, hooked(native_peer(model))):
        path = LearningPath(one, LOSSES)
        with torch.no_grad():
            for parameter in dict(one.named_parameters()).values():
                parameter *= 1.01
        path.advance()
        found.append({part: value for part, value in zip(path.parts, path.learnt["reverse"].tolist(), strict=True)})
    ours, theirs = found
    for part in ((0, "O"), (None, "embedding"), (None, "unembedding"), (0, "norms")):
        assert ours[part] == pytest.approx(theirs[part], abs=1e-4)


def test_a_loss_of_nothing_and_a_frozen_model_are_refused() -> None:
    model = model_of_facts()
    with pytest.raises(UserError, match=r"losses: 'empty' has no queries"):
        LearningPath(model, {**LOSSES, "empty": []})
    with pytest.raises(UserError, match=r"losses: none"):
        LearningPath(model, {})
    with pytest.raises(UserError, match="no parameter requires a gradient"):
        LearningPath(model.requires_grad_(False), LOSSES)
