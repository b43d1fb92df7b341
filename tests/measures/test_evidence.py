"""Evidence: the exact readout, position invariance, the direct path, and the coupling of two losses through it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import einsum
from helpers import random_model, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mdm_interp.config import FactConfig, ModelConfig
from mdm_interp.data.queries import Query, QueryPair, collate
from mdm_interp.data.worlds import FactWorld
from mdm_interp.errors import UserError
from mdm_interp.measures.evidence import (
    as_share,
    compute_evidence,
    decompose_logits,
    evidence_matrix,
    evidence_scores,
    margin_and_rank,
    pair_position_index,
    position_index,
    position_share,
    readout_directions,
    relation_evidence,
    storage_coupling,
)
from mdm_interp.models.layers import Norm
from mdm_interp.models.positions import POSITION_SCHEMES, PositionScheme
from mdm_interp.models.transformer import HookedTransformer

MASK = 12
VOCAB = torch.arange(13)
RELATIVE = ["rope", "alibi", "t5_bias", "none"]
MLPS: dict[str, dict[str, Any]] = {
    "no MLP": {},
    "plain": {"d_mlp": 20, "act_fn": "relu"},
    "gated": {"d_mlp": 20, "gated_mlp": True, "act_fn": "silu"},
}
SPAN_PAIRS = [
    # one token each, and among the filler token 0, which fills shorter queries up
    QueryPair(Query((MASK, 0, 5), (3,), (0, 1), (2, 3)), Query((5, 0, MASK), (3,), (2, 3), (0, 1)), 0, "left"),
    # two source tokens, and one of them among the filler too; longer than the others, so they are padded
    QueryPair(
        Query((9, MASK, 1, 5, 6, 5), (4,), (1, 2), (3, 5)),
        Query((9, 5, 6, 5, 1, MASK), (4,), (5, 6), (1, 3)),
        1,
        "left",
    ),
    # two answer tokens
    QueryPair(
        Query((2, 1, MASK, MASK), (7, 8), (2, 4), (0, 1)), Query((MASK, MASK, 1, 2), (7, 8), (0, 2), (3, 4)), 2, "right"
    ),
]

configs = st.fixed_dictionaries(
    {
        "attention": st.sampled_from(["bidirectional", "causal"]),
        "normalization_type": st.sampled_from(["RMS", "LN", None]),
        "n_layers": st.integers(1, 3),
        "n_key_value_heads": st.sampled_from([1, 2, 4]),
        "qkv_bias": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def random_queries(cfg: ModelConfig, seed: int, count: int = 3) -> list[Query]:
    """Spans of one to three tokens at random places of sequences of different lengths."""
    draw = random.Random(seed)
    queries = []
    for _ in range(count):
        n_source, n_answer = draw.randint(1, 2), draw.randint(1, 3)
        before, between, after = draw.randint(1, 2), draw.randint(0, 2), draw.randint(0, 2)
        if cfg.is_causal or draw.random() < 0.5:
            source, answer = before, before + n_source + between
        else:
            answer, source = before, before + n_answer + between
        tokens = [draw.randrange(MASK) for _ in range(before + n_source + between + n_answer + after)]
        asked = tuple(tokens[answer : answer + n_answer])
        tokens[answer : answer + n_answer] = [MASK] * n_answer
        queries.append(Query(tuple(tokens), asked, (answer, answer + n_answer), (source, source + n_source)))
    return queries


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest expected value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def normalised(x: Tensor, norm: object) -> Tensor:
    """One vector `[d_model]` through RMSNorm or LayerNorm, or unchanged."""
    if not isinstance(norm, Norm):
        return x
    x = x if norm.b is None else x - x.mean()
    x = x / ((x**2).mean() + norm.eps).sqrt() * norm.w
    return x if norm.b is None else x + norm.b


def direction_by_hand(model: HookedTransformer, token: int) -> Tensor:
    """u_t * gain; LayerNorm removes the mean of whatever is read along it."""
    norm = model.ln_final
    if not isinstance(norm, Norm):
        return model.W_U[:, token]
    direction = model.W_U[:, token] * norm.w
    return direction if norm.b is None else direction - direction.mean()


def token_evidence(model: HookedTransformer, head: int, target: int, source: int, position: int) -> Tensor:
    """G_h[t, s; j] of the first layer, one number, from the weights."""
    attn = model.blocks[0].attn
    kv_head = head // (model.cfg.n_heads // model.cfg.kv_heads)
    x = model.W_E[source] if model.pos_embed.relative else model.W_E[source] + model.W_pos[position]
    value = normalised(x, model.blocks[0].ln1) @ attn.W_V[kv_head]
    biases = dict(attn.named_parameters(recurse=False))
    value = value + biases["b_V"][kv_head] if "b_V" in biases else value
    return value @ attn.W_O[head] @ direction_by_hand(model, target)


# ---- exact readout


@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@settings(derandomize=True, deadline=None, max_examples=10)
@given(changes=configs, mlp=st.sampled_from(list(MLPS)))
def test_the_parts_add_up_to_the_logits(
    position: str, dtype: str, tolerance: float, changes: dict[str, Any], mlp: str
) -> None:
    model = random_model(position=position, dtype=dtype, **{**changes, **MLPS[mlp]})
    batch = collate(random_queries(model.cfg, changes["seed"]), model.cfg)
    targets = torch.randperm(13, generator=seeded(changes["seed"]))[:5]
    with torch.no_grad():
        logits = batch.at_readout(model(batch.tokens, attention_mask=batch.attention_mask))[..., targets]
    assert relative_error(decompose_logits(model, batch, targets).total(), logits) <= tolerance


@pytest.mark.parametrize("part", ["embedding", "heads", "mlps", "bias"])
def test_no_part_can_be_left_out(part: str) -> None:
    model = random_model(normalization_type="LN", d_mlp=20)
    batch = collate(random_queries(model.cfg, 0), model.cfg)
    parts = decompose_logits(model, batch, VOCAB)
    without = replace(parts, **{part: torch.zeros_like(getattr(parts, part))})
    assert relative_error(without.total(), parts.total()) > 0.01


@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
@pytest.mark.parametrize("norm", ["RMS", "LN", None])
def test_one_layer_reads_route_times_evidence(position: str, norm: str | None) -> None:
    model = random_model(
        position=position,
        normalization_type=norm,
        n_layers=1,
        n_key_value_heads=2,
        qkv_bias=True,
        d_mlp=20,
        dtype="float64",
    )
    batch = collate(random_queries(model.cfg, 3, count=2), model.cfg)
    assert batch.attention_mask is not None
    n_pos, targets = batch.tokens.shape[1], torch.tensor([5, 0])
    parts = decompose_logits(model, batch, targets)
    evidence = evidence_matrix(model, VOCAB, targets, torch.arange(n_pos))
    _, cache = model.run_with_cache(batch.tokens, attention_mask=batch.attention_mask)
    heads = torch.zeros_like(parts.heads)
    for query, span, _, head, key, target in heads.ne(1).nonzero().tolist():
        row = int(batch.readout[query, span])
        sigma = 1.0 if norm is None else cache["ln_final.hook_scale"][query, row, 0]
        route = cache["pattern", 0][query, head, row, key]
        token = int(batch.tokens[query, key])
        heads[query, span, 0, head, key, target] = route * evidence[head, target, token, key] / sigma
    assert heads.abs().max() > 0.01
    assert_close(parts.heads, heads, atol=1e-10, rtol=0)


# ---- evidence and position


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal"])
@pytest.mark.parametrize("norm", ["RMS", "LN", None])
def test_evidence_matrix_is_its_formula(position: str, norm: str | None) -> None:
    model = random_model(
        position=position,
        normalization_type=norm,
        n_layers=1,
        n_key_value_heads=2,
        qkv_bias=norm == "LN",
        dtype="float64",
    )
    sources, targets, positions = torch.tensor([4, 11, 4]), torch.tensor([2, 0]), torch.tensor([7, 0])
    got = evidence_matrix(model, sources, targets, positions)
    expected = torch.zeros(4, 2, 3, 2, dtype=torch.float64)
    for head, t, s, j in expected.ne(1).nonzero().tolist():
        expected[head, t, s, j] = token_evidence(model, head, int(targets[t]), int(sources[s]), int(positions[j]))
    assert_close(got, expected, atol=1e-10, rtol=0)
    assert torch.equal(evidence_matrix(model, sources, targets), got[..., 1:])  # position 0 unless asked otherwise


@pytest.mark.parametrize("norm", ["RMS", "LN"])
def test_readout_directions_read_the_normalised_residual(norm: str) -> None:
    """Along its direction, divided by the scale, any residual gives its logit up to the norm's bias."""
    model = random_model(normalization_type=norm, dtype="float64")
    assert isinstance(model.ln_final, Norm)
    resid = torch.randn(16, dtype=torch.float64, generator=seeded(0))
    centred = resid - resid.mean() if norm == "LN" else resid
    scale = ((centred**2).mean() + model.cfg.eps).sqrt()
    bias = 0 if model.ln_final.b is None else model.ln_final.b @ model.W_U
    logits = normalised(resid, model.ln_final) @ model.W_U
    assert_close(readout_directions(model) @ resid / scale + bias, logits, atol=1e-10, rtol=0)
    assert torch.equal(readout_directions(model, torch.tensor([3, 1])), readout_directions(model)[[3, 1]])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
def test_stored_evidence_knows_position_under_absolute_schemes_only(position: str, seed: int) -> None:
    model = random_model(position=position, qkv_bias=True, seed=seed)
    index = position_index(evidence_matrix(model, VOCAB, VOCAB, torch.arange(12)))
    assert index == 0.0 if position in RELATIVE else index > 0.01


@pytest.mark.parametrize(
    ("sources", "targets", "positions", "message"),
    [
        ([3, -1], [2], [0], r"sources: id -1 at \[1\] is outside the vocabulary of 13"),
        ([3], [2, 5, 13], [0], r"tokens: id 13 at \[2\] is outside the vocabulary of 13"),
        ([3], [2], [1, -1], "positions: -1 is outside the context; give 0 to 11"),
        ([3], [2], [12], "positions: 12 is outside the context; give 0 to 11"),
    ],
)
def test_tokens_and_positions_that_are_not_there_have_no_evidence(
    sources: list[int], targets: list[int], positions: list[int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evidence_matrix(random_model(position="learned"), *map(torch.tensor, (sources, targets, positions)))


def test_what_a_scheme_of_ones_own_adds_to_the_residual_stream_is_part_of_the_embedding() -> None:
    """And one that is absolute by its bias alone adds nothing to it."""

    class Sided(PositionScheme):
        relative = False

        def bias(self, query_pos: Tensor, key_pos: Tensor) -> Tensor:
            return (key_pos / 4).expand(self.cfg.n_heads, len(query_pos), -1)

    model = random_model(position="none", dtype="float64")
    model.pos_embed = Sided(model.cfg)
    batch = collate([pair.forward for pair in SPAN_PAIRS], model.cfg)
    with torch.no_grad():
        expected = batch.at_readout(model(batch.tokens, attention_mask=batch.attention_mask))
    got = decompose_logits(model, batch, VOCAB).total()
    assert_close(got[batch.answered], expected[batch.answered], atol=1e-9, rtol=0)


def test_position_index_by_hand() -> None:
    """Source 0 moves from 1 to 3 (variance 1), source 1 stays at 5; their means 2 and 5 have variance 9/4."""
    evidence = torch.tensor([[[[1.0, 3.0], [5.0, 5.0]]]])
    assert position_index(evidence) == pytest.approx((1 / 2) / (9 / 4))
    shares = torch.cat([evidence - 7, torch.full_like(evidence, 7)])  # only the sum over heads counts
    assert position_index(shares) == pytest.approx((1 / 2) / (9 / 4))
    moving = torch.tensor([0.0, 4.0]).expand(1, 1, 2, 2)
    assert position_index(torch.cat([evidence[..., :1] + moving, -moving])) == 0.0


def test_position_index_notices_one_entry_that_moves() -> None:
    evidence = evidence_matrix(random_model(dtype="float64"), VOCAB, VOCAB, torch.arange(4)).clone()
    assert position_index(evidence) == 0.0
    evidence[2, 5, 3] += 0.1 * torch.arange(4)  # variance 0.01 * 5/4 in one of 169 entries
    tokens = evidence.sum(0).mean(-1).flatten().tolist()
    mean = sum(tokens) / 169
    over_tokens = sum((value - mean) ** 2 for value in tokens) / 169
    assert position_index(evidence) == pytest.approx(0.0125 / 169 / over_tokens)


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_first_layer_evidence_of_a_query_is_the_matrix_at_the_source(position: str, n_layers: int) -> None:
    model = random_model(position=position, n_layers=n_layers, n_key_value_heads=2, qkv_bias=True, dtype="float64")
    queries, targets = random_queries(model.cfg, 1, count=5), torch.tensor([1, 6, 3])
    assert {len(query.source) for query in queries} == {1, 2}
    got = compute_evidence(model, queries, targets)[:, 0]
    for row, query in enumerate(queries):
        at_source = [
            evidence_matrix(model, torch.tensor([query.tokens[at]]), targets, torch.tensor([at]))[..., 0, 0]
            for at in range(*query.source_span)
        ]
        assert_close(got[row], torch.stack(at_source).sum(0), atol=1e-10, rtol=0)


def test_last_layer_evidence_is_what_attending_to_the_source_does_to_the_logits() -> None:
    """Measured: one head's pattern is overwritten, to read the source or nothing; without a norm nothing rescales."""
    model = random_model(normalization_type=None, n_key_value_heads=2, qkv_bias=True, dtype="float64")
    query = Query((3, MASK, 8, 5, 6), (2,), (1, 2), (3, 5))
    got = compute_evidence(model, [query], VOCAB)[0, 1]

    def logits_with(head: int, attended: float) -> Tensor:
        def overwrite(pattern: Tensor, hook: object) -> Tensor:
            edited = pattern.clone()
            edited[:, head, 1] = 0
            edited[:, head, 1, 3:5] = attended
            return edited

        tokens = torch.tensor([query.tokens])
        return model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", overwrite)])[0, 1]

    with torch.no_grad():
        measured = torch.stack([logits_with(head, 1.0) - logits_with(head, 0.0) for head in range(4)])
    assert measured.abs().min() > 1e-3
    assert_close(got, measured, atol=1e-10, rtol=0)


def test_the_share_of_planted_positions_and_its_null() -> None:
    """Known variances: tokens 1, positions 0, 1 and 3, eight positions."""
    generator = seeded(0)
    tokens = torch.randn(1, 60, 60, 1, generator=generator, dtype=torch.float64)
    places = torch.randn(1, 60, 60, 8, generator=generator, dtype=torch.float64)
    places = places - places.mean(-1, keepdim=True)
    places = places / places.pow(2).mean().sqrt()
    for variance in (0, 1, 3):
        share = position_share(tokens + variance**0.5 * places)
        assert share.effect == pytest.approx(variance / (1 + variance), abs=0.02)
        assert share.null == pytest.approx(7 / 8, abs=0.02), "shuffled: 7 of 8 parts are within an entry"


def test_the_share_of_an_index_is_that_of_its_parts() -> None:
    assert [as_share(index) for index in (0.0, 1.0, 3.0)] == [0.0, 0.5, 0.75]


def test_a_relations_evidence_is_the_matrix_at_its_facts() -> None:
    world = FactWorld(FactConfig(n_entities=9, n_filler=4), seed=0)
    facts = world.config
    model = random_model(d_vocab=facts.d_vocab, n_ctx=facts.seq_len, mask_token_id=facts.mask_token_id)
    relation = int(world.facts[-1, 1])
    whole, names = evidence_matrix(model, torch.arange(9), torch.arange(9)).sum(0)[..., 0], world.token_names
    of_relation = [fact for fact in world.facts.tolist() if fact[1] == relation]
    assert 1 < len(of_relation) < len(world.facts)
    for source, (there, other) in {"left": (0, 2), "right": (2, 0)}.items():
        rows = relation_evidence(model, world, relation, source)  # type: ignore[arg-type]
        expected = [(target[other], origin[there]) for target in of_relation for origin in of_relation]
        assert [(row["target"], row["source"]) for row in rows] == [(names[t], names[s]) for t, s in expected]
        values = [whole[target, origin].item() for target, origin in expected]
        assert [row["evidence"] for row in rows] == pytest.approx(values, abs=1e-5)


# ---- storage coupling


def loss_from_evidence(model: HookedTransformer, query: Query, evidence: Tensor) -> Tensor:
    """The query's loss with routes and scales frozen, as a function of evidence `[head t token]`."""
    _, cache = model.run_with_cache(torch.tensor([query.tokens]))
    directions = torch.stack([direction_by_hand(model, token) for token in range(13)])
    norm, loss = model.ln_final, torch.zeros((), dtype=evidence.dtype)
    for row, answer in zip(query.readout(model.cfg), query.answer, strict=True):
        routed = einsum(
            cache["pattern", 0][0, :, row].detach(),
            evidence[:, :, list(query.tokens)],
            "head key_pos, head t key_pos -> t",
        )
        sigma = cache["ln_final.hook_scale"][0, row].detach() if isinstance(norm, Norm) else 1.0
        bias = norm.b @ model.W_U if isinstance(norm, Norm) and norm.b is not None else 0.0
        logits = (directions @ cache["resid_pre", 0][0, row] + routed) / sigma + bias
        assert_close(logits, model(torch.tensor([query.tokens]))[0, row], atol=1e-10, rtol=0)
        loss = loss + F.cross_entropy(logits, torch.tensor(answer))
    return loss


@pytest.mark.parametrize("norm", ["RMS", "LN", None])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_storage_coupling_is_the_inner_product_of_gradients_with_respect_to_evidence(
    position: str, norm: str | None
) -> None:
    model = random_model(position=position, normalization_type=norm, n_layers=1, n_key_value_heads=2, dtype="float64")
    evidence = evidence_matrix(model, VOCAB, VOCAB)[..., 0].requires_grad_()
    expected = []
    for pair in SPAN_PAIRS:
        forward, reverse = (
            torch.autograd.grad(loss_from_evidence(model, query, evidence), evidence)[0][
                :, :, list(pair.reverse.source)
            ]
            for query in (pair.forward, pair.reverse)
        )
        expected.append((forward * reverse).sum((1, 2)))
    got = storage_coupling(model, SPAN_PAIRS)[:, 0]
    assert got.abs().max() > 1e-3
    assert_close(got, torch.stack(expected), atol=1e-9, rtol=0)


def test_a_column_counts_once_however_often_its_token_stands_in_the_source() -> None:
    forward, reverse = Query((MASK, 1, 5, 5), (3,), (0, 1), (2, 4)), Query((5, 5, 1, MASK), (3,), (3, 4), (0, 2))
    twice = QueryPair(forward, reverse, 0, "left")
    # The same sequences, so the same gradient in the one column there is.
    once = QueryPair(replace(forward, source_span=(2, 3)), replace(reverse, source_span=(0, 1)), 0, "left")
    coupled = storage_coupling(random_model(), [twice, once])
    assert_close(coupled[0], coupled[1])


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("norm", ["RMS", "LN", None])
def test_storage_coupling_has_its_closed_form(n_layers: int, norm: str | None) -> None:
    model = random_model(n_layers=n_layers, normalization_type=norm, position="learned", d_mlp=20, dtype="float64")
    pair, (answer,) = SPAN_PAIRS[0], SPAN_PAIRS[0].forward.answer

    def measured(query: Query) -> tuple[Tensor, Tensor, Tensor]:
        """Routes [layer head], the final scale and the probabilities."""
        with torch.no_grad():
            logits, cache = model.run_with_cache(torch.tensor([query.tokens]))
        row, source = query.answer_span[0], query.source_span[0]
        routes = torch.stack([cache["pattern", layer][0, :, row, source] for layer in range(n_layers)])
        scale = torch.tensor(1.0) if norm is None else cache["ln_final.hook_scale"][0, row]
        return routes, scale, logits[0, row].softmax(-1)

    (route_f, sigma_f, p_f), (route_r, sigma_r, p_r) = measured(pair.forward), measured(pair.reverse)
    others = sum(p_f[t] * p_r[t] for t in range(13) if t != answer)
    expected = route_f * route_r / (sigma_f * sigma_r) * ((1 - p_f[answer]) * (1 - p_r[answer]) + others)
    assert expected.min() > 0
    assert_close(storage_coupling(model, [pair])[0], expected, atol=1e-9, rtol=0)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(changes=configs, position=st.sampled_from(list(POSITION_SCHEMES)), gap=st.integers(2, 4))
def test_storage_coupling_is_never_negative(changes: dict[str, Any], position: str, gap: int) -> None:
    model = random_model(position=position, **{**changes, "attention": "bidirectional"})
    world = FactWorld(FactConfig(n_entities=6, n_filler=2, seq_len=6, gap=gap), changes["seed"])
    assert world.config.d_vocab <= 13
    coupled = storage_coupling(model, world.query_pairs())
    assert coupled.shape == (24, changes["n_layers"], 4)
    assert coupled.min() >= 0 and coupled.max() > 0


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
def test_storage_coupling_of_an_arm_is_exactly_zero(position: str, n_layers: int) -> None:
    """Its forward query reads column A, its reverse query column B; an MDM's pairs of the same world do couple."""
    world = FactWorld(FactConfig(n_entities=6, n_filler=2, seq_len=6, gap=(2, 4)), 0)
    changes: dict[str, Any] = {"position": position, "n_layers": n_layers}
    causal = storage_coupling(random_model(attention="causal", **changes), world.query_pairs("causal"))
    assert causal.count_nonzero() == 0
    both_ways = storage_coupling(random_model(**changes), world.query_pairs("target_only"))
    assert causal.shape == both_ways.shape and both_ways.sum((1, 2)).min() > 0


def test_storage_coupling_by_hand_and_its_opposites() -> None:
    """Uniform routes (1/4) and predictions (1/13), no norm: 1/16 times the inner product of the two errors."""
    model = random_model(normalization_type=None, position="none", n_layers=1, dtype="float64")
    with torch.no_grad():
        model.blocks[0].attn.W_Q.zero_()
        model.W_U.zero_()
    forward, reverse = Query((MASK, 1, 2, 5), (3,), (0, 1), (3, 4)), Query((5, 1, 2, MASK), (3,), (3, 4), (0, 1))
    shared = QueryPair(forward, reverse, 0, "left")
    other_answer = QueryPair(forward, replace(reverse, answer=(4,)), 0, "left")
    other_source = QueryPair(forward, replace(reverse, tokens=(6, 1, 2, MASK)), 0, "left")
    read_as_filler = QueryPair(replace(forward, tokens=(MASK, 1, 6, 5)), other_source.reverse, 0, "left")
    expected = {
        "shared": ((12 / 13) ** 2 + 12 / 13**2) / 16,
        "another answer": (-2 * (12 / 13) * (1 / 13) + 11 / 13**2) / 16,
        "another source": 0.0,
        "the reverse query's source among the forward query's filler": ((12 / 13) ** 2 + 12 / 13**2) / 16,
    }
    assert expected["another answer"] < 0
    got = storage_coupling(model, [shared, other_answer, other_source, read_as_filler])[:, 0]
    assert_close(got, torch.tensor(list(expected.values()), dtype=torch.float64)[:, None].expand(4, 4))


def test_pairs_are_coupled_alike_wherever_they_stand_in_a_long_list() -> None:
    """The list is worked through in chunks, each padded to its own longest query and widest source."""
    model = random_model(dtype="float64")
    coupled = storage_coupling(model, SPAN_PAIRS * 90)
    assert_close(coupled, storage_coupling(model, SPAN_PAIRS).repeat(90, 1, 1), atol=1e-12, rtol=0)
    alone = torch.cat([storage_coupling(model, [pair]) for pair in SPAN_PAIRS])
    assert_close(coupled[:3], alone, atol=1e-12, rtol=0)
    assert coupled.std(0).min() > 0


# ---- the position index of the two places that a pair compares

WORLD_PAIRS = FactWorld(FactConfig(n_entities=6, n_filler=3, seq_len=7, gap=(2, 4)), seed=1).query_pairs()


@settings(max_examples=15, deadline=None)
@given(
    position=st.sampled_from(sorted(POSITION_SCHEMES)),
    norm=st.sampled_from(["RMS", "LN", None]),
    seed=st.integers(0, 99),
)
def test_the_pair_index_is_0_in_the_first_layer_of_relative_schemes_only(position: str, norm: str, seed: int) -> None:
    model = random_model(position=position, normalization_type=norm, seed=seed)
    index = pair_position_index(model, WORLD_PAIRS, VOCAB[:6])
    assert index.shape == (2,)
    if position in RELATIVE:
        assert index[0] == 0
    else:
        assert index[0] > 1e-3
    if position == "none":
        assert index[1] < 1e-10, "without position, a swap of two tokens is no change of context"
    else:
        assert index[1] > 1e-6, "the context that a deeper layer has read was changed"


def test_the_pair_index_by_plain_loops() -> None:
    model, targets = random_model(position="learned", n_layers=1, dtype="float64"), VOCAB[:6]

    def evidence(query: Query, target: int) -> float:
        source, at = query.source[0], query.source_span[0]
        return sum(token_evidence(model, head, target, source, at).item() for head in range(4))

    places = [
        (evidence(pair.forward, target), evidence(pair.reverse, target))
        for pair in WORLD_PAIRS
        for target in targets.tolist()
    ]
    means = [(f + r) / 2 for f, r in places]
    centre = sum(means) / len(means)
    over_places = sum(((f - m) ** 2 + (r - m) ** 2) / 2 for (f, r), m in zip(places, means, strict=True)) / len(means)
    over_tokens = sum((m - centre) ** 2 for m in means) / len(means)
    assert pair_position_index(model, WORLD_PAIRS, targets).item() == pytest.approx(over_places / over_tokens)


def test_the_pair_index_needs_a_shared_source() -> None:
    arm = FactWorld(FactConfig(n_entities=6, n_filler=3, seq_len=7), seed=1).query_pairs("causal")
    with pytest.raises(UserError, match="query_pairs: pair position index is undefined for pairs that share neither"):
        pair_position_index(random_model(), arm, VOCAB)


# ---- the answer's evidence among its candidates


def test_evidence_scores_by_plain_loops_and_their_sign() -> None:
    world = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)
    facts, queries = world.config, [pair.reverse for pair in world.query_pairs(n_contexts=1)]
    model = random_model(d_vocab=facts.d_vocab, n_ctx=facts.seq_len, mask_token_id=facts.mask_token_id)
    scores = evidence_scores(model, queries, world.candidates(queries))
    evidence = compute_evidence(model, queries, torch.arange(12)).sum(2)
    for layer in range(2):
        true, other = [], []
        for i, query in enumerate(queries):
            answer, role = query.answer[0], list(world.role(query.answer[0]))
            candidates = [evidence[i, layer, entity].item() for entity in role]
            center = sum(candidates) / len(role)
            spread = (sum((c - center) ** 2 for c in candidates) / len(role)) ** 0.5
            z = [(c - center) / spread for c in candidates]
            true.append(z[role.index(answer)])
            other.append(z[(role.index(answer) + 1) % len(role)])
        assert scores.effect[layer].item() == pytest.approx(sum(true) / len(true), abs=1e-4)
        assert scores.null[layer].item() == pytest.approx(sum(other) / len(other), abs=1e-4)
    with torch.no_grad():
        model.W_U.neg_()  # what spoke for a token now speaks against it
    turned = evidence_scores(model, queries, world.candidates(queries))
    assert_close(turned.effect, -scores.effect, atol=1e-4, rtol=0)


def test_margin_and_rank_by_plain_loops() -> None:
    world = FactWorld(FactConfig(n_entities=12, n_filler=4), seed=0)
    facts, queries = world.config, [pair.reverse for pair in world.query_pairs(n_contexts=1)]
    model = random_model(d_vocab=facts.d_vocab, n_ctx=facts.seq_len, mask_token_id=facts.mask_token_id)
    margin, rank = margin_and_rank(model, queries, world.candidates(queries))
    evidence = compute_evidence(model, queries, torch.arange(12)).sum((1, 2)).tolist()
    for i, query in enumerate(queries):
        (answer,) = query.answer
        others = [evidence[i][entity] for entity in world.role(answer) if entity != answer]
        assert margin[i].item() == pytest.approx(evidence[i][answer] - max(others), abs=1e-4)
        assert rank[i].item() == 1 + sum(other > evidence[i][answer] for other in others)
    assert set(rank.tolist()) == {1, 2, 3, 4}, "some are best and some are worst"
    assert ((margin > 0) == (rank == 1)).all()


@torch.no_grad()
def test_the_evidence_matrix_of_a_deeper_layer_reads_the_embedding_alone() -> None:
    """With nothing written by the layer before, that is what the layer's values are made of."""
    model = random_model(dtype="float64")
    model.blocks[0].attn.W_O.zero_()
    if model.blocks[0].mlp is not None:
        model.blocks[0].mlp.W_out.zero_()
    sources, targets = torch.tensor([3, 7]), torch.tensor([1, 2, 5])
    _, cache = model.run_with_cache(sources[None])
    directions = (model.state_dict()["ln_final.w"][:, None] * model.W_U[:, targets]).T
    written = einsum(cache["v", 1][0], model.W_O[1], directions, "s h d, h d m, t m -> h t s")
    assert evidence_matrix(model, sources, targets, layer=1)[..., 0] == pytest.approx(written, abs=1e-6)
