"""Gradients per query and component, their alignment, and what a step down the forward loss does to the reverse one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import random_model
from torch import Tensor
from torch.testing import assert_close

from mdm_interp.config import FactConfig, Objective
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.measures.gradients.alignment import Alignment, gradient_alignment
from mdm_interp.measures.gradients.components import COMPONENTS, ROUTING, STORAGE, component_of
from mdm_interp.measures.gradients.first_order import (
    FirstOrder,
    contrast_steps,
    direction_cosine,
    first_order,
    inner_products,
    mean_gradient,
    random_direction,
)
from mdm_interp.measures.gradients.gram import Gram, gram
from mdm_interp.models.transformer import HookedTransformer

MASK = 12
# Lengths and spans differ, so a batch of them is padded; all sources are on the left, so an ARM can be asked as well.
QUERIES = [
    Query((4, 7, MASK), (3,), (2, 3), (0, 1)),
    Query((5, 9, 1, MASK, MASK, 2), (8, 6), (3, 5), (0, 2)),
    Query((1, 10, 2, MASK), (0,), (3, 4), (1, 3)),
]
# Between them they have every parameter there is, and each position scheme that has any.
MODELS: dict[str, dict[str, Any]] = {
    "attention only": {"n_layers": 1},
    "t5, layer norm, biases": {
        "position": "t5_bias",
        "normalization_type": "LN",
        "qkv_bias": True,
        "d_mlp": 20,
        "n_key_value_heads": 2,
    },
    "learned, gated, tied": {
        "position": "learned",
        "d_mlp": 20,
        "gated_mlp": True,
        "act_fn": "silu",
        "tie_word_embeddings": True,
    },
    "no norm": {"position": "sinusoidal", "normalization_type": None, "d_mlp": 20},
    "causal": {"position": "alibi", "attention": "causal", "qkv_bias": True},
}
ABSENT = {
    "attention only": {"position", "MLP"},
    "t5, layer norm, biases": set(),
    "learned, gated, tied": {"unembedding"},
    "no norm": {"position", "norms"},
    "causal": {"position", "MLP"},
}


def component_by_path(name: str) -> str:
    """From the module a parameter sits in."""
    module, leaf = name.rsplit(".", 1)
    modules = {"embed": "embedding", "pos_embed": "position", "unembed": "unembedding", "ln_final": "norms"}
    parts = {"mlp": "MLP", "ln1": "norms", "ln2": "norms"}
    return modules.get(module) or parts.get(module.split(".")[-1]) or leaf.split("_")[1]


def double_model(name: str = "attention only", **changes: Any) -> HookedTransformer:
    return random_model(dtype="float64", **{**MODELS[name], **changes})


def loss_of(model: HookedTransformer, query: Query) -> Tensor:
    """Cross-entropy of the answer, from the unpadded sequence."""
    logits = model(torch.tensor([query.tokens]))[0]
    rows = [at - 1 if model.cfg.is_causal else at for at in range(*query.answer_span)]
    return F.cross_entropy(logits[rows], torch.tensor(query.answer), reduction="sum")


def flat_gradient(model: HookedTransformer, loss: Tensor, component: str = "all") -> Tensor:
    """With respect to one component's parameters, or to all of them, component by component."""
    chosen = [
        parameter
        for wanted in (COMPONENTS if component == "all" else [component])
        for name, parameter in model.named_parameters()
        if component_by_path(name) == wanted
    ]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, chosen, retain_graph=True)])


def world_pairs(objective: Objective = "any_order") -> list[QueryPair]:
    """Each fact in two contexts, and as an MDM from both sides."""
    return FactWorld(FactConfig(n_entities=6, n_filler=3, seq_len=5, gap=(2, 4)), seed=1).query_pairs(objective)


def two_answers(pairs: list[QueryPair]) -> list[QueryPair]:
    """For a vocabulary of two tokens: both queries of a pair are the same, and only one of them can be right."""
    asked = [replace(pair.forward, tokens=tuple(token % 2 for token in pair.forward.tokens)) for pair in pairs]
    return [
        QueryPair(replace(query, answer=(0,)), replace(query, answer=(1,)), pair.fact, pair.side)
        for query, pair in zip(asked, pairs, strict=True)
    ]


def alignment_of(forward: Tensor, reverse: Tensor, facts: list[int], sides: str = "") -> Alignment:
    """One component, from gradients `[pair size]`; each pair is asked for its left or right entity (l or r)."""
    gradients = torch.cat([forward, reverse]).double()
    pairs = [
        QueryPair(QUERIES[0], QUERIES[0], fact, "left" if side == "l" else "right")
        for fact, side in zip(facts, sides or "l" * len(facts), strict=True)
    ]
    squares = gradients.pow(2).sum(1)[None].split(len(pairs), dim=1)
    inner = forward.double() @ reverse.double().T
    return Alignment(Gram(((None, "embedding"),), inner[None], *squares), tuple(pairs))


def products_of(alignment: Alignment, component: str) -> tuple[Tensor, Tensor, Tensor]:
    """Forward with reverse, each forward with itself, each reverse with itself."""
    within, found = None if component == "all" else [component], alignment.gram
    chosen = [i for i, (_, part) in enumerate(found.parts) if within is None or part in within]
    return found.within(within), found.left_squares[chosen].sum(0), found.right_squares[chosen].sum(0)


def mean_cosine(model: HookedTransformer, pairs: list[QueryPair], components: list[str] | None = None) -> float:
    forward, reverse = ([getattr(pair, way) for pair in pairs] for way in ("forward", "reverse"))
    return direction_cosine(mean_gradient(model, forward), mean_gradient(model, reverse), components or COMPONENTS)


# ---- gradients per query


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_belongs_to_one_component(name: str) -> None:
    model = double_model(name)
    for path, _ in model.named_parameters():
        assert component_of(path) == component_by_path(path)
    found = gram(model, QUERIES[:1])
    assert set(found.components) == set(COMPONENTS) - ABSENT[name]
    assert len(set(found.parts)) == len(found.parts) == len(found.inner)


def test_whatever_a_position_scheme_of_ones_own_learns_is_position() -> None:
    model = double_model()
    model.pos_embed.strength = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    assert gram(model, QUERIES[:1]).within(["position"]).tolist() == [[0.0]]  # nothing uses it


def test_a_parameter_of_no_component_is_not_passed_over() -> None:
    with pytest.raises(KeyError, match="W_new"):
        component_of("blocks.0.attn.W_new")


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_each_query_alone(name: str) -> None:
    """Against autograd on unpadded sequences, component by component."""
    model = double_model(name)
    found, losses = gram(model, QUERIES), [loss_of(model, query) for query in QUERIES]
    for component in found.components:
        expected = torch.stack([flat_gradient(model, loss, component) for loss in losses])
        assert (expected.abs().amax(1) > 1e-6).all()
        assert_close(found.within([component]), expected @ expected.T, atol=1e-9, rtol=1e-9)


# ---- alignment


@pytest.mark.parametrize(
    ("name", "objective"), [("learned, gated, tied", "any_order"), ("causal", "causal")], ids=["MDM", "ARM"]
)
def test_alignment_is_what_the_concatenated_gradients_say(name: str, objective: Objective) -> None:
    model, pairs = double_model(name), world_pairs(objective)
    alignment = gradient_alignment(model, pairs)
    assert list(alignment.query_pairs) == pairs and len({pair.fact for pair in pairs}) == 6
    assert list(alignment.components) == [component for component in COMPONENTS if component not in ABSENT[name]]
    forward_loss, reverse_loss = (
        [loss_of(model, query) for query in queries]
        for queries in ([pair.forward for pair in pairs], [pair.reverse for pair in pairs])
    )
    for component in (alignment.components[0], "V", "all"):
        within = None if component == "all" else [component]
        forward = torch.stack([flat_gradient(model, loss, component) for loss in forward_loss])
        reverse = torch.stack([flat_gradient(model, loss, component) for loss in reverse_loss])
        inner, forward_square, reverse_square = products_of(alignment, component)
        assert_close(inner, forward @ reverse.T, atol=1e-9, rtol=1e-9)
        assert_close(forward_square, forward.pow(2).sum(1), atol=1e-9, rtol=1e-9)
        assert_close(reverse_square, reverse.pow(2).sum(1), atol=1e-9, rtol=1e-9)
        cosine = F.cosine_similarity(forward[:, None], reverse[None], dim=-1)
        null = [cosine[i, j] for i, one in enumerate(pairs) for j, other in enumerate(pairs) if one.fact != other.fact]
        assert_close(alignment.pair_cosine(within).effect, cosine.diagonal(), atol=1e-9, rtol=0)
        assert_close(alignment.pair_cosine(within).null, torch.stack(null), atol=1e-9, rtol=0)
        mean = F.cosine_similarity(forward.mean(0), reverse.mean(0), dim=0)
        assert mean_cosine(model, pairs, within) == pytest.approx(mean.item(), abs=1e-9)


def test_components_sum_to_the_whole() -> None:
    alignment = gradient_alignment(double_model("t5, layer norm, biases"), world_pairs())
    assert alignment.components == COMPONENTS
    parts = [products_of(alignment, component) for component in COMPONENTS]
    for of_parts, whole in zip(zip(*parts, strict=True), products_of(alignment, "all"), strict=True):
        assert_close(torch.stack(of_parts).sum(0), whole, atol=1e-12, rtol=1e-12)


def test_a_query_is_aligned_with_itself() -> None:
    pairs = [replace(pair, reverse=pair.forward) for pair in world_pairs()]
    model = double_model()
    same = gradient_alignment(model, pairs)
    ones = torch.ones(len(pairs), dtype=torch.float64)
    for within in (None, *([component] for component in same.components)):
        assert_close(same.pair_cosine(within).effect, ones, atol=1e-9, rtol=0)
        assert mean_cosine(model, pairs, within) == pytest.approx(1, abs=1e-9)


def test_where_there_are_two_answers_learning_one_unlearns_the_other() -> None:
    opposed = gradient_alignment(double_model(d_vocab=2), two_answers(world_pairs()))
    for within in (None, *([component] for component in opposed.components)):
        cosine = opposed.pair_cosine(within).effect
        assert_close(cosine, -torch.ones_like(cosine), atol=1e-9, rtol=0)


def test_planted_gradients_are_aligned_opposed_or_neither() -> None:
    forward = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    reverse = torch.tensor([[6.0, 8.0], [-2.0, 0.0], [5.0, 0.0]], dtype=torch.float64)
    alignment = alignment_of(forward, reverse, [0, 0, 1])
    assert alignment.pair_cosine().effect.tolist() == pytest.approx([1, -1, 0])
    # forward 0 with reverse 2, forward 1 with reverse 2, forward 2 with reverse 0 and with reverse 1
    assert alignment.pair_cosine().null.tolist() == pytest.approx([0.6, 1, 0.8, 0])
    opposite = alignment_of(forward, -2 * forward, [0, 1, 2])
    assert opposite.pair_cosine().effect.tolist() == pytest.approx([-1, -1, -1])


def test_the_null_of_a_fact_is_the_mean_over_other_facts_asked_for_the_same_side() -> None:
    forward = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    reverse = torch.tensor([[6.0, 8.0], [-2.0, 0.0], [5.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    cosine = alignment_of(forward, reverse, [0, 0, 1, 2], "lrlr").fact_cosine()
    assert cosine.effect[:3].tolist() == pytest.approx([1, -1, 0]) and cosine.effect[3].isnan()
    # forward 0 with reverse 2 and forward 2 with reverse 0; forward 3 with reverse 1, as reverse 3 has no direction
    assert cosine.null[[0, 2, 3]].tolist() == pytest.approx([0.6, 0.8, -(0.5**0.5)]) and cosine.null[1].isnan()
    three = alignment_of(forward[:3], reverse[:3], [0, 1, 2]).fact_cosine()
    assert three.null.tolist() == pytest.approx([(-0.6 + 0.6) / 2, (0.6 + 1) / 2, (0.8 + 0) / 2])


def test_a_zero_gradient_has_no_direction() -> None:
    forward = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    alignment = alignment_of(forward, forward.flip(0), [0, 1])
    assert alignment.pair_cosine().effect.isnan().all() and alignment.gram.cosine()[1, 0].item() == pytest.approx(1)


@pytest.mark.parametrize("name", ["t5, layer norm, biases", "causal"])
def test_spans_and_padding_do_not_disturb_the_alignment(name: str) -> None:
    model = double_model(name)
    pairs = [QueryPair(one, other, 0, "right") for one, other in zip(QUERIES, QUERIES[1:] + QUERIES[:1], strict=True)]
    together, alone = gradient_alignment(model, pairs), [gradient_alignment(model, [pair]) for pair in pairs]
    for within in (None, *([component] for component in together.components)):
        expected = torch.cat([alignment.pair_cosine(within).effect for alignment in alone])
        assert_close(together.pair_cosine(within).effect, expected, atol=1e-9, rtol=0)


# ---- first order


@pytest.mark.parametrize("side", ["aligned", "opposed"])
@pytest.mark.parametrize(("name", "objective"), [("attention only", "any_order"), ("causal", "causal")])
def test_a_small_step_down_the_forward_loss_moves_the_reverse_loss_as_predicted(
    name: str, objective: Objective, side: str
) -> None:
    """By minus the step times the mean inner product; for all parameters, and for those of one component alone."""
    step, pairs = 1e-6, world_pairs(objective)
    model = double_model(name, d_vocab=13 if side == "aligned" else 2)
    pairs = pairs if side == "aligned" else two_answers(pairs)
    alignment = gradient_alignment(model, pairs)

    def mean_loss(queries: list[Query]) -> Tensor:
        return torch.stack([loss_of(model, query) for query in queries]).mean()

    forward, reverse = [pair.forward for pair in pairs], [pair.reverse for pair in pairs]
    parameters = dict(model.named_parameters())
    gradient = dict(zip(parameters, torch.autograd.grad(mean_loss(forward), list(parameters.values())), strict=True))
    before = {path: parameter.detach().clone() for path, parameter in parameters.items()}
    with torch.no_grad():
        start = mean_loss(reverse)
        for component in (*alignment.components, "all"):
            inner = alignment.gram.within(None if component == "all" else [component]).mean().item()
            for path, parameter in parameters.items():
                moves = component in ("all", component_by_path(path))
                parameter.copy_(before[path] - step * gradient[path] * moves)
            change = (mean_loss(reverse) - start).item()
            assert change == pytest.approx(-step * inner, rel=0.01)
            if component == "all":
                assert (change < 0) == (side == "aligned")


def mean_losses(model: HookedTransformer, pairs: list[QueryPair]) -> dict[str, Tensor]:
    return {
        kind: torch.stack([loss_of(model, getattr(pair, kind)) for pair in pairs]).mean()
        for kind in ("forward", "reverse")
    }


def one_step(slopes: list[float]) -> FirstOrder:
    """Planted: -eta predicted, `slopes` times as much measured, at steps 1, 2, 3, ...; twice that of the forward loss,
    if everything moved."""
    etas = torch.arange(1.0, len(slopes) + 1)
    predicted = -etas[None].repeat(2, 1)
    return FirstOrder(("V", "all"), etas, predicted, predicted, -etas * torch.tensor(slopes), -etas, 2.0)


@pytest.mark.parametrize("name", ["learned, gated, tied", "causal"])
def test_the_mean_gradient_is_that_of_the_mean_loss(name: str) -> None:
    model = double_model(name)
    got = mean_gradient(model, QUERIES)
    loss = torch.stack([loss_of(model, query) for query in QUERIES]).mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for (path, _), wanted in zip(model.named_parameters(), expected, strict=True):
        assert_close(got[path], wanted, atol=1e-10, rtol=1e-9)
    inner = inner_products(got, got)
    assert list(inner) == [*(part for part in COMPONENTS if part not in ABSENT[name]), "all"]
    assert inner["all"] == pytest.approx(sum(part.pow(2).sum().item() for part in expected))


@pytest.mark.parametrize("components", [None, STORAGE, ROUTING, ("unembedding",)], ids=str)
@pytest.mark.parametrize(
    ("name", "objective"), [("t5, layer norm, biases", "any_order"), ("causal", "causal")], ids=["MDM", "ARM"]
)
def test_the_prediction_is_autograds_directional_derivative(
    name: str, objective: Objective, components: tuple[str, ...] | None
) -> None:
    """Of both losses, along the forward gradient; and the slope tends to 1."""
    model, pairs = double_model(name), world_pairs(objective)
    step = first_order(model, pairs, [1e-6, 1e-5], components)
    gradient = torch.autograd.grad(mean_losses(model, pairs)["forward"], list(model.parameters()))
    moved = components or COMPONENTS
    paths = [path for path, _ in model.named_parameters()]
    tangent = {path: part * (component_by_path(path) in moved) for path, part in zip(paths, gradient, strict=True)}
    values = {path: parameter.detach() for path, parameter in model.named_parameters()}
    for kind, got in (("reverse", step.predicted), ("forward", step.predicted_forward)):

        def loss(values: dict[str, Tensor], kind: str = kind) -> Tensor:
            def logits_of(query: Query) -> Tensor:
                return torch.func.functional_call(model, values, (torch.tensor([query.tokens]),))[0]

            asked = [getattr(pair, kind) for pair in pairs]
            rows = [query.answer_span[0] - model.cfg.is_causal for query in asked]
            log_probs = [logits_of(query)[row].log_softmax(-1) for query, row in zip(asked, rows, strict=True)]
            answers = [query.answer[0] for query in asked]
            return -torch.stack([row[answer] for row, answer in zip(log_probs, answers, strict=True)]).mean()

        slope = torch.func.jvp(loss, (values,), (tangent,))[1]
        assert got[-1].tolist() == pytest.approx([-1e-6 * slope.item(), -1e-5 * slope.item()], rel=1e-8)
    assert_close(step.predicted[:-1].sum(0), step.predicted[-1], atol=0, rtol=1e-12)
    assert step.slope()[0].item() == pytest.approx(1, abs=1e-4)
    assert step.forward[0].item() == pytest.approx(step.predicted_forward[-1, 0].item(), rel=1e-3)
    assert step.components == (*(part for part in moved if part not in ABSENT[name]), "all")


@pytest.mark.parametrize("components", [None, ROUTING], ids=str)
def test_only_what_is_chosen_moves_and_the_model_stays(components: tuple[str, ...] | None) -> None:
    """A large step, against one taken by hand on the weights themselves."""
    model, pairs, eta = double_model(), world_pairs(), 0.05
    got = first_order(model, pairs, [eta], components)
    before = mean_losses(model, pairs)
    gradient = torch.autograd.grad(before["forward"], list(model.parameters()))
    untouched = [parameter.detach().clone() for parameter in model.parameters()]
    again = first_order(model, pairs, [eta], components)
    assert all(torch.equal(old, new) for old, new in zip(untouched, model.parameters(), strict=True))
    assert torch.equal(again.reverse, got.reverse)
    with torch.no_grad():
        for (path, parameter), part in zip(model.named_parameters(), gradient, strict=True):
            if components is None or component_by_path(path) in components:
                parameter -= eta * part
    after = mean_losses(model, pairs)
    assert got.reverse.item() == pytest.approx((after["reverse"] - before["reverse"]).item(), rel=1e-9)
    assert got.forward.item() == pytest.approx((after["forward"] - before["forward"]).item(), rel=1e-9)
    assert got.slope().item() != pytest.approx(1, abs=1e-3), "a step of that size is not infinitesimal"


def test_a_float32_model_is_stepped_in_float64() -> None:
    small = first_order(random_model(n_layers=1), world_pairs(), [1e-6])
    assert small.slope().item() == pytest.approx(1, abs=1e-4)


def test_where_learning_one_answer_unlearns_the_other_the_reverse_loss_rises() -> None:
    opposed = first_order(double_model(d_vocab=2), two_answers(world_pairs()), [1e-6])
    assert opposed.forward.item() < 0 < opposed.reverse.item()
    assert opposed.slope().item() == pytest.approx(1, abs=1e-4)


def test_a_cosine_of_directions_by_hand() -> None:
    one = {"blocks.0.attn.W_V": torch.tensor([3.0, 0.0]), "blocks.0.attn.W_O": torch.tensor([4.0])}
    other = {"blocks.0.attn.W_V": torch.tensor([0.0, 1.0]), "blocks.0.attn.W_O": torch.tensor([1.0])}
    assert direction_cosine(one, other, ["V", "O"]) == pytest.approx(4 / (5 * 2**0.5))
    assert direction_cosine(one, other, ["V"]) == 0
    assert direction_cosine(one, other, ["O", "MLP"]) == 1
    assert math.isnan(direction_cosine(one, other, ["MLP"]))


def test_a_random_step_has_the_gradients_size_and_not_its_effect() -> None:
    model, pairs = double_model(), world_pairs()
    gradient = mean_gradient(model, [pair.forward for pair in pairs])
    null = random_direction(gradient, seed=0)
    assert inner_products(null, null) == pytest.approx(inner_products(gradient, gradient))
    assert all(torch.equal(null[name], again) for name, again in random_direction(gradient, seed=0).items())
    effects = [first_order(model, pairs, [1e-6], direction=random_direction(gradient, seed)) for seed in range(20)]
    learnt = first_order(model, pairs, [1e-6]).forward.item()
    assert abs(sum(effect.forward.item() for effect in effects) / 20) < 0.1 * abs(learnt)
    assert [effect.slope().item() for effect in effects] == pytest.approx([1] * 20, abs=1e-2)


@pytest.mark.parametrize(
    ("slopes", "end"),
    [([1.0, 1.05, 0.92, 0.5], 3), ([1.0, 1.2, 1.0], 1), ([0.8, 1.0], None), ([1.0, 0.95], 2)],
    ids=["leaves", "leaves and returns", "never in", "never out"],
)
def test_the_regime_ends_where_the_slope_first_leaves_it(slopes: list[float], end: float | None) -> None:
    assert one_step(slopes).slope().tolist() == pytest.approx(slopes)
    assert one_step(slopes).regime_end() == pytest.approx(float("nan") if end is None else end, nan_ok=True)
    assert one_step(slopes).regime_end(tolerance=1.0) == len(slopes)


def test_a_transfer_is_the_drop_of_one_loss_over_the_first_order_drop_of_the_other() -> None:
    assert one_step([1.0, -3.0]).transfer().tolist() == [0.5, -1.5]
    assert one_step([1.0, -3.0]).predicted_transfer().tolist() == [0.5, 0.5]


def test_the_transfers_of_parts_are_of_the_whole_models_drop_and_add_up() -> None:
    """A part lowers the forward loss by less than everything does."""
    model, pairs, etas = double_model(), world_pairs(), [1e-6, 1e-5]
    whole = first_order(model, pairs, etas)
    assert whole.predicted_forward[-1].tolist() == pytest.approx([-eta * whole.steepness for eta in etas])
    storage, rest = (
        first_order(model, pairs, etas, [component for component in whole.components[:-1] if chosen(component)])
        for chosen in (lambda component: component in STORAGE, lambda component: component not in STORAGE)
    )
    assert storage.steepness == whole.steepness > -storage.predicted_forward[-1, 0].item() / etas[0]
    summed = storage.predicted_transfer() + rest.predicted_transfer()
    assert_close(summed, whole.predicted_transfer(), atol=1e-12, rtol=1e-9)
    assert whole.transfer().tolist() == pytest.approx(whole.predicted_transfer().tolist(), rel=1e-3)


def test_a_step_is_compared_with_a_random_one_of_its_size() -> None:
    """Both of the components that the model has."""
    model, pairs, eta = double_model(), world_pairs(), 1e-6
    found = contrast_steps(model, pairs, [eta], (*STORAGE, "MLP"), seed=5)
    assert found.effect.components == found.null.components == (*STORAGE, "all")
    taken = first_order(model, pairs, [eta], STORAGE)
    assert_close(found.effect.reverse, taken.reverse, atol=0, rtol=0)
    gradient = mean_gradient(model, [pair.forward for pair in pairs])
    at_random = first_order(model, pairs, [eta], STORAGE, direction=random_direction(gradient, seed=5))
    assert_close(found.null.reverse, at_random.reverse, atol=0, rtol=0)
    assert abs(found.null.forward.item()) < 0.5 * abs(found.effect.forward.item())
    assert not torch.equal(contrast_steps(model, pairs, [eta], STORAGE, seed=6).null.reverse, found.null.reverse)


def test_no_pairs_have_no_alignment() -> None:
    with pytest.raises(UserError, match="query_pairs: gradients need at least one pair, got none"):
        gradient_alignment(double_model(), [])


def test_where_nothing_is_predicted_there_is_no_slope() -> None:
    zero = replace(one_step([1.0, 1.0]), predicted=torch.zeros(2, 2))
    assert zero.slope().isnan().all() and torch.tensor(zero.regime_end()).isnan()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_pairs": []}, "query_pairs: a mean loss needs at least one pair"),
        ({"etas": []}, "etas: expected positive step sizes"),
        ({"etas": [1e-3, 0.0]}, "etas: expected positive step sizes, got"),
        ({"components": ("V", "MLP")}, "components: the model has no 'MLP'; choose among embedding, Q, K"),
    ],
    ids=["no pairs", "no steps", "a step of 0", "no such component"],
)
def test_a_step_that_cannot_be_taken_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        first_order(**{"model": double_model(), "query_pairs": world_pairs(), "etas": [1e-3], **changes})
