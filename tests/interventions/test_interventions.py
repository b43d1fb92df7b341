"""Interventions: what an edit does equals what the mathematics says, its hooks go, and mistakes are named."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import mirrored_pairs

from mdm_interp import interventions
from mdm_interp.config import FactConfig, ModelConfig
from mdm_interp.data.queries import Query, QueryPair, collate
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import predict
from mdm_interp.interventions.edits import (
    ablated_routes,
    ablated_storage,
    even_routes,
    shared_routes,
    transplanted_routes,
)
from mdm_interp.interventions.effects import (
    Effect,
    ablate_routes,
    ablate_storage,
    edit_heads,
    other_positions,
    project_even_routes,
    share_routes,
    transplant_routes,
)
from mdm_interp.interventions.patching import patch_heads, patch_positions
from mdm_interp.measures.routes import compute_routes
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.estimates import Contrast

FACTS = FactConfig(n_entities=6, n_filler=4, seq_len=7, gap=(2, 4))
CALLS = (transplant_routes, share_routes, project_even_routes, ablate_storage, ablate_routes)


def pairs_of(facts: FactConfig = FACTS, seed: int = 0) -> list[QueryPair]:
    return FactWorld(facts, seed).query_pairs()


def model_for(facts: FactConfig = FACTS, **changes: Any) -> HookedTransformer:
    fields = {"n_layers": 1, "d_vocab": facts.d_vocab, "n_ctx": facts.seq_len, "mask_token_id": facts.mask_token_id}
    return random_model(**{**fields, **changes})


@settings(max_examples=30, deadline=None)
@given(
    position=st.sampled_from(["rope", "alibi", "t5_bias", "none"]),
    norm=st.sampled_from(["RMS", "LN", None]),
    heads=st.sampled_from([(4, 4, 4), (4, 2, 8), (2, 1, 6)]),
    qkv_bias=st.booleans(),
    adjacent=st.booleans(),
    d_mlp=st.sampled_from([None, 12]),
    gap=st.integers(2, 5),
    world=st.sampled_from(["relation_cycle", "symmetric_pool"]),
    seed=st.integers(0, 99),
)
def test_the_forward_route_brings_back_the_forward_prediction(
    position: str,
    norm: str | None,
    heads: tuple[int, int, int],
    qkv_bias: bool,
    adjacent: bool,
    d_mlp: int | None,
    gap: int,
    world: Any,
    seed: int,
) -> None:
    facts = FactConfig(world=world, n_entities=6, n_filler=4, seq_len=7, gap=gap)
    model = model_for(
        facts,
        position=position,
        normalization_type=norm,
        n_heads=heads[0],
        n_key_value_heads=heads[1],
        d_head=heads[2],
        qkv_bias=qkv_bias,
        rotary_adjacent_pairs=adjacent,
        d_mlp=d_mlp,
        seed=seed,
    )
    effect = transplant_routes(model, pairs_of(facts, seed))
    torch.testing.assert_close(effect.after.effect, effect.forward, rtol=1e-5, atol=1e-5)
    assert (effect.after.null - effect.forward).abs().max() > 1e-3, "any route would do"


@pytest.mark.parametrize("changes", [{"position": "learned"}, {"position": "rope", "n_layers": 2}])
def test_the_forward_route_is_not_enough_where_values_know_their_place(changes: dict[str, Any]) -> None:
    effect = transplant_routes(model_for(**changes), pairs_of())
    assert (effect.after.effect - effect.forward).abs().max() > 1e-2


def test_the_control_gives_the_sources_share_to_another_position() -> None:
    model, pair = model_for(position="rope"), pairs_of()[0]
    other = other_positions(pair.reverse, model.cfg)[0][0]
    _, given_ = model.run_with_cache(torch.tensor([pair.forward.tokens]))
    with transplanted_routes(model, [pair], at=torch.arange(FACTS.seq_len)[None] == other):
        _, taken = model.run_with_cache(torch.tensor([pair.reverse.tokens]))
    forward = given_["pattern", 0][0, :, pair.forward.answer_span[0]]
    reverse = taken["pattern", 0][0, :, pair.reverse.answer_span[0]]
    assert torch.equal(reverse[:, other], forward[:, pair.forward.source_span[0]])
    assert torch.equal(reverse[:, pair.reverse.source_span[0]], forward[:, other])
    assert torch.equal(reverse[:, pair.reverse.answer_span[0]], forward[:, pair.forward.answer_span[0]])


@pytest.mark.parametrize("position", ["rope", "alibi", "t5_bias", "none"])
def test_even_routes_are_the_mean_of_the_scores_to_both_sides(position: str) -> None:
    """In one layer, the mean over forward and reverse scores of the same content is the even part by definition."""
    model, pairs = model_for(position=position, n_key_value_heads=2), pairs_of()
    forward = compute_routes(model, [pair.forward for pair in pairs]).scores
    reverse = compute_routes(model, [pair.reverse for pair in pairs]).scores
    queries = [pair.reverse for pair in pairs]
    with even_routes(model, pairs):
        projected = compute_routes(model, queries).scores
    torch.testing.assert_close(projected, (forward + reverse) / 2, rtol=1e-5, atol=1e-5)
    moved = (project_even_routes(model, pairs).after.effect - predict(model, queries).log_probability).abs().max()
    assert moved < 1e-5 if position in ("alibi", "none") else moved > 1e-3


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_of_two_heads_sharing_is_exchanging_what_they_store(position: str) -> None:
    """Independent: the transplant in a model whose two heads have each other's values and outputs."""
    model, pairs = model_for(position=position, n_heads=2), pairs_of()
    exchanged = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("W_V", "W_O"):
            weight = exchanged.get_parameter(f"blocks.0.attn.{name}")
            weight.copy_(weight.flip(0))
    expected, effect = transplant_routes(exchanged, pairs), share_routes(model, pairs)
    torch.testing.assert_close(effect.after.effect, expected.after.effect, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(effect.after.null, expected.after.null, rtol=1e-5, atol=1e-5)
    assert (effect.after.effect - effect.forward).abs().max() > 1e-2


def test_a_head_gets_the_mean_route_of_its_layers_other_heads() -> None:
    model, pair = model_for(position="rope", n_layers=2), pairs_of()[0]
    _, given_ = model.run_with_cache(torch.tensor([pair.forward.tokens]))
    with shared_routes(model, [pair], layers=[1]):
        _, taken = model.run_with_cache(torch.tensor([pair.reverse.tokens]))
    answer, source = pair.forward.answer_span[0], pair.forward.source_span[0]
    forward, reverse = given_["pattern", 1][0, :, answer], taken["pattern", 1][0, :, source]
    for head in range(4):
        others = forward[[other for other in range(4) if other != head]].mean(0)
        torch.testing.assert_close(reverse[head, answer], others[source])
        torch.testing.assert_close(reverse[head, source], others[answer])
        elsewhere = [place for place in range(FACTS.seq_len) if place not in (answer, source)]
        torch.testing.assert_close(reverse[head, elsewhere], others[elsewhere])


def test_where_heads_attend_alike_shared_routes_are_their_own() -> None:
    model, pairs = model_for(position="rope"), pairs_of()
    with torch.no_grad():
        for name in ("W_Q", "W_K"):
            weight = model.get_parameter(f"blocks.0.attn.{name}")
            weight.copy_(weight[:1].expand_as(weight))
    effect = share_routes(model, pairs)
    torch.testing.assert_close(effect.after.effect, effect.forward, rtol=1e-5, atol=1e-5)
    assert (effect.before - effect.forward).abs().max() > 1e-2


def test_only_chosen_heads_lose_their_odd_part() -> None:
    model, pairs = model_for(position="rope", n_layers=2), pairs_of()
    queries = [pair.reverse for pair in pairs]
    plain = compute_routes(model, queries).scores
    with even_routes(model, pairs):
        whole = compute_routes(model, queries).scores
    with even_routes(model, pairs, heads=[(0, 1), (0, 3)]):
        some = compute_routes(model, queries).scores
    assert torch.equal(some[:, 0, [0, 2]], plain[:, 0, [0, 2]])
    assert torch.equal(some[:, 0, [1, 3]], whole[:, 0, [1, 3]])
    assert (whole[:, 0] - plain[:, 0]).abs().amax((0, 1)) > 1e-3
    every = [(layer, head) for layer in range(2) for head in range(4)]
    torch.testing.assert_close(
        project_even_routes(model, pairs, heads=every).after.effect, project_even_routes(model, pairs).after.effect
    )
    none = project_even_routes(model, pairs, heads=[])
    assert torch.equal(none.after.effect, none.before) and torch.equal(none.after.null, none.before)


def test_the_control_of_chosen_heads_is_as_many_others() -> None:
    """Of 8 heads 4 are left for 4, and none fits 5. Those of another seed are others again."""
    model, pairs = model_for(position="rope", n_layers=2), pairs_of()
    first, rest = [(0, head) for head in range(4)], [(1, head) for head in range(4)]
    effect = project_even_routes(model, pairs, heads=first)
    torch.testing.assert_close(effect.after.null, project_even_routes(model, pairs, heads=rest).after.effect)
    assert project_even_routes(model, pairs, heads=[*first, (1, 0)]).after.null.isnan().all()
    controls = [project_even_routes(model, pairs, seed, heads=first[:1]).after.null for seed in range(8)]
    own = effect.before[None].expand(7, -1)
    alone = torch.stack([project_even_routes(model, pairs, heads=[head]).after.effect for head in [*first[1:], *rest]])
    assert all((alone - control).abs().amax(1).min() < 1e-5 for control in controls)
    assert len({round(control.sum().item(), 4) for control in controls}) > 1
    assert (alone - own).abs().amax(1).min() > 1e-5, "a head without odd part tells nothing"


def test_several_heads_are_edited_as_their_number_and_scheme_allow() -> None:
    pairs, specific = pairs_of(), torch.tensor([[False, True, False, True]])
    model = model_for(position="rope")
    effects = edit_heads(model, pairs, specific)
    for name, effect in {
        "shared": share_routes(model, pairs),
        "even": project_even_routes(model, pairs, heads=[(0, 1), (0, 3)]),
    }.items():
        assert torch.equal(effects[name].after.effect, effect.after.effect)
        assert torch.equal(effects[name].after.null, effect.after.null)
    assert list(edit_heads(model_for(position="learned"), pairs, specific)) == ["shared"]
    assert list(edit_heads(model_for(position="rope", n_heads=1), pairs, specific[:, :1])) == ["even"]


def test_a_cut_route_is_a_sequence_without_its_source() -> None:
    """Independent: without positions, not to see the source is to read a sequence that lacks it."""
    model, pairs = model_for(position="none"), pairs_of()
    effect = ablate_routes(model, pairs)
    for pair, after in zip(pairs[:6], effect.after.effect[:6], strict=True):
        start = pair.reverse.source_span[0]
        tokens = pair.reverse.tokens[:start] + pair.reverse.tokens[start + 1 :]
        asked = pair.reverse.answer_span[0] - (start < pair.reverse.answer_span[0])
        log_probs = model(torch.tensor([tokens]))[0, asked].log_softmax(-1)
        torch.testing.assert_close(after, log_probs[pair.reverse.answer[0]], rtol=1e-4, atol=1e-5)


def test_ablated_storage_removes_route_times_evidence_of_the_source() -> None:
    model, pairs = model_for(position="rope", normalization_type=None), pairs_of()
    batch = collate([pair.reverse for pair in pairs], model.cfg)
    logits, cache = model.run_with_cache(batch.tokens)
    written = torch.einsum("bihd,hdm->bihm", cache["v", 0], model.W_O[0]) @ model.W_U  # [pair key_pos head d_vocab]
    rows = batch.at_readout(cache["pattern", 0].transpose(1, 2))[:, 0]  # [pair head key_pos]
    at = batch.source.nonzero()[:, 1]
    pair = torch.arange(len(pairs))
    removed = (rows[pair, :, at][..., None] * written[pair, at]).sum(1)
    expected = (batch.at_readout(logits)[:, 0] - removed).log_softmax(-1).gather(1, batch.answer)[:, 0]
    torch.testing.assert_close(ablate_storage(model, pairs).after.effect, expected, rtol=1e-4, atol=1e-5)


def test_patching_every_head_of_one_layer_is_the_transplant() -> None:
    """With one head, its output at the readout is all that the forward route brings."""
    model, pairs = model_for(position="rope", n_heads=1, normalization_type=None), pairs_of()
    effect = transplant_routes(model, pairs)
    change = patch_heads(model, pairs).effect[:, 0, 0]
    torch.testing.assert_close(change, effect.forward - effect.before, rtol=1e-4, atol=1e-5)


def test_patched_positions_matter_where_they_hold_something_else() -> None:
    model, pairs = model_for(position="rope", n_layers=2), pairs_of()
    patched = patch_positions(model, pairs)
    assert patched.effect.shape == (len(pairs), 2, FACTS.seq_len)
    assert patched.effect[:, 0].abs().max() < 1e-5, "before the first layer mirrored positions hold the same"
    assert patched.effect[:, 1].abs().max() > 1e-3
    assert patched.null[:, 0].nan_to_num().abs().max() > 1e-3


def test_the_patching_control_comes_from_another_fact_in_the_same_places_or_is_undefined() -> None:
    """A fact twice in one place has no other to take from; a second fact there gives what it holds."""
    model, pairs = model_for(position="rope"), pairs_of()
    assert patch_positions(model, [pairs[0], pairs[0]]).null.isnan().all()
    assert patch_heads(model, [pairs[0], pairs[0]]).null.isnan().all()
    forward, reverse = pairs[0].forward, pairs[0].reverse
    (at,), (back,) = range(*forward.source_span), range(*reverse.source_span)
    tokens = (*forward.tokens[:at], (forward.tokens[at] + 1) % 6, *forward.tokens[at + 1 :])
    swapped = (*reverse.tokens[:back], tokens[at], *reverse.tokens[back + 1 :])
    other = QueryPair(replace(forward, tokens=tokens), replace(reverse, tokens=swapped), 99, pairs[0].side)
    control = patch_positions(model, [pairs[0], other]).null[0, 0]
    told = predict(model, [reverse, replace(reverse, tokens=swapped)]).log_probability
    torch.testing.assert_close(control[back], told[1] - told[0], rtol=1e-4, atol=1e-5)
    assert control[[place for place in range(FACTS.seq_len) if place != back]].abs().max() < 1e-5


@settings(max_examples=10, deadline=None)
@given(position=st.sampled_from(["rope", "alibi", "t5_bias", "none"]), seed=st.integers(0, 99))
def test_spans_of_several_tokens_swap_whole(position: str, seed: int) -> None:
    forward = Query((5, 12, 12, 0, 3, 4, 8, 9), (1, 2), (1, 3), (4, 6))
    reverse = Query((5, 3, 4, 0, 12, 12, 8, 9), (1, 2), (4, 6), (1, 3))
    model = random_model(n_layers=1, position=position, seed=seed)
    effect = transplant_routes(model, [QueryPair(forward, reverse, 0, "left")])
    torch.testing.assert_close(effect.after.effect, effect.forward, rtol=1e-5, atol=1e-5)
    free, needed = other_positions(reverse, model.cfg)
    assert (free, needed) == ([0, 3, 6, 7], 2)


def test_a_shifted_model_is_edited_where_it_reads() -> None:
    """Readout one position before the mask: only that row of the pattern changes, and no control takes it."""
    model, pairs = model_for(position="rope", readout_shift=-1), pairs_of()
    pair = next(p for p in pairs if min(p.forward.answer_span[0], p.reverse.answer_span[0]) > 0)
    with ablated_routes(model, [pair]):
        _, edited = model.run_with_cache(torch.tensor([pair.reverse.tokens]))
    _, plain = model.run_with_cache(torch.tensor([pair.reverse.tokens]))
    moved = (edited["pattern", 0] - plain["pattern", 0]).abs().amax((0, 1, 3))
    assert moved.nonzero()[:, 0].tolist() == [pair.reverse.answer_span[0] - 1]
    assert edited["pattern", 0][0, :, pair.reverse.answer_span[0] - 1, pair.reverse.source_span[0]].max() == 0
    assert pair.reverse.answer_span[0] - 1 not in other_positions(pair.reverse, model.cfg)[0]


def test_an_edit_of_no_layer_is_none_and_of_one_layer_stays_there() -> None:
    model, pairs = model_for(position="rope", n_layers=2), pairs_of()
    tokens = torch.tensor([pair.reverse.tokens for pair in pairs])
    plain = model(tokens)
    edits = (transplanted_routes, shared_routes, even_routes, ablated_storage)
    for editing in (*edits, ablated_routes):
        with editing(model, pairs, layers=[]):
            assert torch.equal(model(tokens), plain)
        with editing(model, pairs, layers=[1]):
            _, cache = model.run_with_cache(tokens)
        _, clean = model.run_with_cache(tokens)
        assert torch.equal(cache["resid_post", 0], clean["resid_post", 0])
        assert not torch.allclose(cache["resid_post", 1], clean["resid_post", 1])


@pytest.mark.parametrize("call", CALLS)
def test_hooks_go_and_numbers_are_log_probabilities(call: Any) -> None:
    model, pairs = model_for(position="rope", n_layers=2), pairs_of()
    before = model(torch.tensor([pairs[0].reverse.tokens]))
    effect: Effect = call(model, pairs)
    assert torch.equal(model(torch.tensor([pairs[0].reverse.tokens])), before)
    torch.testing.assert_close(effect.before, predict(model, [pair.reverse for pair in pairs]).log_probability)
    torch.testing.assert_close(effect.forward, predict(model, [pair.forward for pair in pairs]).log_probability)
    assert torch.equal(call(model, pairs).after.null, effect.after.null), "the control is drawn from its seed"
    assert not torch.allclose(effect.after.null, effect.after.effect)


def test_hooks_go_after_an_exception() -> None:
    model, pairs = model_for(), pairs_of()
    with pytest.raises(RuntimeError), ablated_routes(model, pairs):
        raise RuntimeError
    assert not any(hook.has_hooks() for hook in model.hook_dict.values())


def test_what_cannot_be_edited_is_named() -> None:
    model, pairs = model_for(position="learned"), pairs_of()
    with pytest.raises(UserError, match="position scheme 'learned' is absolute"):
        project_even_routes(model, pairs)
    two = Query((9, 9, 1, 2), (3, 4), (0, 2), (2, 3))
    back = Query((1, 2, 9, 9), (3, 4), (2, 4), (0, 1))
    with pytest.raises(UserError, match="only pairs that swap them mirror"):
        transplant_routes(model, [QueryPair(two, back, 0, "left")])
    short = Query((9, 1), (3,), (0, 1), (1, 2))
    with pytest.raises(UserError, match="needs 1 positions besides answer, source and readout, a query has 0"):
        ablate_storage(model, [QueryPair(short, Query((1, 9), (3,), (1, 2), (0, 1)), 0, "left")])
    arm = FactWorld(FACTS, 0).query_pairs("causal")
    causal = HookedTransformer(
        ModelConfig(d_model=8, n_heads=2, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len, attention="causal")
    )
    with pytest.raises(UserError, match="undefined for pairs that share neither"):
        transplant_routes(causal, arm)
    with pytest.raises(UserError, match="its layers have one head each, and shared routes are other heads'"):
        share_routes(model_for(position="rope", n_heads=1), pairs)
    with pytest.raises(UserError, match=r"\(0, 4\) is no head of the model; give a layer below 1 and a head below 4"):
        project_even_routes(model_for(position="rope"), pairs, heads=[(0, 4)])
    del model.hook_dict["blocks.0.attn.hook_v"]
    with pytest.raises(UserError, match=r"no hook 'blocks\.0\.attn\.hook_v', which this intervention edits"):
        ablate_storage(model, pairs)


def test_the_distance_of_an_effect_by_hand() -> None:
    """The control is 3 nats from the forward answers, the edited answers are 1 and 0.5, those left alone 3 and 6."""
    forward = torch.tensor([-1.0, -2.0])
    after = Contrast(forward - torch.tensor([1.0, -0.5]), forward - 3)
    distance = Effect(forward, forward + torch.tensor([-3.0, 6.0]), after).distance()
    assert (distance.effect, distance.null) == (pytest.approx(0.75 / 3), pytest.approx(4.5 / 3))


@torch.no_grad()
def test_the_effect_of_any_edit_is_beside_that_of_its_control() -> None:
    model = random_model(mask_token_id=0, dtype="float64")
    pairs = mirrored_pairs(causal=False)

    def without(head: int) -> list[Any]:
        def silence(z: torch.Tensor, hook: Any) -> torch.Tensor:
            z = z.clone()
            z[:, :, head] = 0
            return z

        return [("blocks.1.attn.hook_z", silence)]

    found = interventions.effect(model, pairs, without(0), without(1))
    batch = collate([pair.reverse for pair in pairs], model.cfg)
    for measured, hooks in ((found.before, []), (found.after.effect, without(0)), (found.after.null, without(1))):
        logits = model.run_with_hooks(batch.tokens, fwd_hooks=hooks)
        expected = batch.at_readout(logits)[:, 0].log_softmax(-1).gather(1, batch.answer)[:, 0]
        torch.testing.assert_close(measured, expected.to(measured))
    assert interventions.effect(model, pairs, without(0)).after.null.isnan().all()


def test_the_effect_of_an_edit_of_pairs_is_that_of_its_call() -> None:
    model, pairs = random_model(mask_token_id=0, dtype="float64"), mirrored_pairs(causal=False)
    ours, own = (
        interventions.effect(model, pairs, interventions.even_routes),
        interventions.project_even_routes(model, pairs),
    )
    torch.testing.assert_close(ours.after.effect, own.after.effect)


def test_an_edit_of_a_hook_that_is_not_there_is_refused_and_leaves_none() -> None:
    model = random_model(mask_token_id=0)
    with pytest.raises((UserError, KeyError, AssertionError), match="hook_zz"):
        interventions.effect(model, mirrored_pairs(causal=False), [("blocks.0.attn.hook_zz", lambda x, hook: x)])
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
