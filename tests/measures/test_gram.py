"""Inner products of all queries' gradients, against each query's own gradient by autograd."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EXPERTS, LLAMA3, YARN, random_model, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import SHAPE, llama_bridge, mirrored_pairs, native_peer
from scheme_helpers import XPos
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mdm_interp.data.queries import Query, collate
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import query_loss
from mdm_interp.measures.gradients import asked, backward
from mdm_interp.measures.gradients.backward import SourceAttention
from mdm_interp.measures.gradients.components import Part, part_of
from mdm_interp.measures.gradients.gram import Gram, gram
from mdm_interp.models.bridge import hooked
from mdm_interp.models.positions import PositionScheme, Which
from mdm_interp.models.transformer import HookedTransformer

MASK = 12
# Lengths and spans differ, so a batch of them is padded; all sources are on the left, so an ARM can be asked as well.
QUERIES = [
    Query((4, 7, MASK), (3,), (2, 3), (0, 1)),
    Query((5, 9, 1, MASK, MASK, 2), (8, 6), (3, 5), (0, 2)),
    Query((1, 10, 2, MASK), (0,), (3, 4), (1, 3)),
    Query((1, 7, 7, 1, MASK), (7,), (4, 5), (0, 1)),
]
GATED: dict[str, Any] = {"d_mlp": 20, "gated_mlp": True, "act_fn": "silu"}
MODELS: dict[str, dict[str, Any]] = {
    "attention only": {},
    "one layer": {"n_layers": 1},
    "grouped heads": {"n_key_value_heads": 2, "d_mlp": 20},
    "part of a head rotates": {"rotary_dim": 2, "rotary_adjacent_pairs": True},
    "layer norm, biases": {"normalization_type": "LN", "qkv_bias": True, "d_mlp": 20},
    "gated": GATED,
    "tied": {"tie_word_embeddings": True, "d_mlp": 20},
    "no norm": {"position": "sinusoidal", "normalization_type": None, "d_mlp": 20, "initializer_range": 0.2},
    "no position": {"position": "none"},
    "alibi, causal": {"position": "alibi", "attention": "causal", "qkv_bias": True},
    "t5": {"position": "t5_bias", "n_key_value_heads": 2},
    "t5, causal": {"position": "t5_bias", "attention": "causal"},
    "learned, tied": {"position": "learned", "tie_word_embeddings": True, **GATED},
    "learned, causal": {"position": "learned", "attention": "causal", "normalization_type": "LN"},
    "normalised heads": {"use_qk_norm": True, "n_key_value_heads": 2, "rotary_scaling": YARN, **GATED},
    "normalised, causal": {"use_qk_norm": True, "position": "alibi", "attention": "causal", "qkv_bias": True},
    "blocks": {"attention": "block_causal", "block_size": 2, "rotary_scaling": LLAMA3, "d_head": 8},
    "experts": {"experts": EXPERTS, "use_qk_norm": True, "rotary_dim": 2, "n_key_value_heads": 2, **GATED},
    "experts, blocks": {"experts": {**EXPERTS, "n_shared": 0}, "attention": "block_causal", "block_size": 4, **GATED},
    "fewer predictions": {"d_vocab_out": 12, "d_mlp": 20},
    "as Dream": {"readout_shift": -1, "n_key_value_heads": 2, "qkv_bias": True, **GATED},
}


def double_model(name: str = "gated", **changes: Any) -> HookedTransformer:
    return random_model(dtype="float64", **{**MODELS[name], **changes})


def by_autograd(model: Any, queries: list[Query]) -> dict[Part, Tensor]:
    """Each query's gradient of its own unpadded sequence, with one backward pass each."""
    model = hooked(model)
    parameters = dict(model.named_parameters())
    rows: dict[Part, list[list[Tensor]]] = {}
    for query in queries:
        batch = collate([query], model.cfg)
        wanted = [parameter.requires_grad for parameter in parameters.values()]
        for parameter in parameters.values():
            parameter.requires_grad_()
        loss = query_loss(model(batch.tokens), batch).sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for parameter, want in zip(parameters.values(), wanted, strict=True):
            parameter.requires_grad_(want)
        of_query: dict[Part, list[Tensor]] = {}
        for name, grad in zip(parameters, grads, strict=True):
            of_query.setdefault(part_of(name), []).append(grad.flatten())
        for part, flat in of_query.items():
            rows.setdefault(part, []).append(flat)
    gradients = {part: torch.stack([torch.cat(flat) for flat in found]).double() for part, found in rows.items()}
    return {part: gradient @ gradient.T for part, gradient in gradients.items()}


def assert_same(found: Gram, expected: dict[Part, Tensor], tolerance: float = 1e-9) -> None:
    assert set(found.parts) == set(expected)
    for part, inner in zip(found.parts, found.inner, strict=True):
        scale = expected[part].abs().max().item()
        assert_close(inner, expected[part], atol=tolerance * max(scale, 1.0), rtol=tolerance)


# ---- against autograd


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_autograds_gradients(name: str) -> None:
    model = double_model(name)
    found = gram(model, QUERIES)
    assert found.inner.dtype == torch.float64
    assert_same(found, by_autograd(model, QUERIES))
    assert (found.inner.diagonal(dim1=1, dim2=2).amax(1) > 0).all()


@pytest.mark.parametrize("name", ["layer norm, biases", "gated", "alibi, causal", "grouped heads"])
def test_biases_that_weight_processing_adds_count_with_their_weights(name: str) -> None:
    model, generator = double_model(name), seeded(3)
    model.process_weights_()
    model.add_biases()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.rsplit(".", 1)[-1].startswith("b_"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    assert {"b_O", "b_U"} <= {path.rsplit(".", 1)[-1] for path, _ in model.named_parameters()}
    assert_same(gram(model, QUERIES), by_autograd(model, QUERIES))


@pytest.mark.parametrize("name", ["learned, tied", "t5", "as Dream", "alibi, causal"])
@pytest.mark.parametrize("few", [1, 3])
def test_batches_and_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch, name: str, few: int) -> None:
    model = double_model(name)
    whole = gram(model, QUERIES)
    monkeypatch.setattr(asked, "TOKENS", 6 * few)  # queries of at most 6, so few at a time
    monkeypatch.setattr(backward, "KEPT", 6000)  # some of the activations are kept, and the others computed again
    assert_close(gram(model, QUERIES).inner, whole.inner, atol=1e-9, rtol=1e-9)
    sides = gram(model, QUERIES[:1], QUERIES[1:])
    assert_close(sides.inner, whole.inner[:, :1, 1:], atol=1e-9, rtol=1e-9)


def test_a_query_that_is_asked_twice_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = double_model(), list[int]()
    whole = gram(model, QUERIES)

    def counted(model: Any, asked: Any, *options: Any) -> Any:
        rows.append(sum(len(one.owner) for one in asked))
        return backward.layer_by_layer(model, asked, *options)

    monkeypatch.setattr(sys.modules[gram.__module__], "layer_by_layer", counted)
    for left, right in (([2, 0, 2], [1, 3, 1, 0]), ([3, 3], None)):
        rows.clear()
        found = gram(model, [QUERIES[at] for at in left], None if right is None else [QUERIES[at] for at in right])
        right = left if right is None else right
        assert_close(found.inner, whole.inner[:, left][:, :, right], atol=1e-9, rtol=1e-9)
        assert_close(found.left_squares, whole.left_squares[:, left], atol=1e-9, rtol=1e-9)
        assert_close(found.right_squares, whole.right_squares[:, right], atol=1e-9, rtol=1e-9)
        assert sum(rows) == len(set(left)) + (0 if right is left else len(set(right)))


def test_one_long_query_does_not_make_batches_small() -> None:
    lengths = [3] * 500 + [801] + [6] * 400
    queries = [Query((*[1] * (length - 1), MASK), (3,), (length - 1, length), (0, 1)) for length in lengths]
    found = asked.ask(queries, random_model(n_ctx=900), n_draws=1, seed=0, kept=())
    starts = [0, 341, 500, 501, 671, 841, 901]
    assert [(one.place.start, one.place.stop) for one in found] == list(itertools.pairwise(starts))
    assert all(one.batch.tokens.numel() <= asked.TOKENS for one in found)


def each_gradient(model: HookedTransformer, losses: Tensor) -> Tensor:
    parameters = list(model.parameters())
    found = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([grad.flatten() for grad in of_query]) for of_query in found])


@pytest.mark.parametrize("name", ["gated", "tied", "as Dream", "experts"])
@pytest.mark.parametrize("place", ["hook point", "block"])
@pytest.mark.parametrize("edit", ["mix", "by row"])
def test_a_hook_may_edit_padding_and_tell_rows_apart(name: str, place: str, edit: str) -> None:
    """It may carry something to padding and back, whose gradients count then; and it finds rows in the order given."""
    model, asked_twice = double_model(name), [QUERIES[at] for at in (1, 0, 3, 2, 1)]
    by_row = torch.randn(5, 1, model.cfg.d_model, generator=seeded(1), dtype=torch.float64)

    def edited(tensor: Tensor, *, hook: Any = None) -> Tensor:
        return tensor + (tensor.mean(1, keepdim=True) if edit == "mix" else by_row)

    if place == "hook point":
        model.blocks[0].hook_resid_post.add_hook(edited)
    else:

        def after(module: Any, given: Any, out: Tensor) -> Tensor:
            return edited(out)

        model.blocks[0].register_forward_hook(after)
    batch = collate(asked_twice, model.cfg)
    losses = query_loss(model(batch.tokens, attention_mask=batch.attention_mask), batch)
    each = each_gradient(model, losses)
    assert_close(gram(model, asked_twice).within(), each @ each.T, atol=1e-9, rtol=1e-9)


def test_a_loss_finds_queries_in_the_order_given() -> None:
    model, targets = double_model(), torch.tensor([3, 9, 1, 5])

    def loss(logits: Tensor, batch: Any) -> Tensor:
        return -logits[:, 0].log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    asked_so = [QUERIES[at] for at in (1, 0, 3, 2)]
    batch = collate(asked_so, model.cfg)
    losses = loss(batch.at_readout(model(batch.tokens, attention_mask=batch.attention_mask)), batch)
    each = each_gradient(model, losses)
    assert_close(gram(model, asked_so, loss=loss).within(), each @ each.T, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kept", [0, 2**27])
def test_long_sequences_run_fused(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(backward, "KEPT", kept)
    tokens = torch.randint(12, (2, 70), generator=seeded(0)).tolist()
    queries = [
        Query((*tokens[0], MASK), (3,), (70, 71), (0, 1)),
        Query((*tokens[1][:66], MASK), (5,), (66, 67), (8, 9)),
    ]
    for position in ("t5_bias", "rope"):
        model = random_model(dtype="float64", position=position, n_ctx=80, n_layers=1)
        assert_same(gram(model, queries), by_autograd(model, queries))


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
    d_mlp=st.sampled_from([None, 5, 20]),
    position=st.sampled_from(["rope", "learned", "t5_bias", "alibi"]),
    norm=st.sampled_from(["RMS", "LN", None]),
    causal=st.booleans(),
    tied=st.booleans(),
)
def test_whatever_the_shapes(
    data: st.DataObject, heads: tuple[int, int], d_mlp: int | None, position: Any, norm: Any, causal: bool, tied: bool
) -> None:
    """And a matrix of inner products is symmetric, and no product exceeds the norms'."""
    model = random_model(
        dtype="float64",
        d_model=8,
        n_heads=heads[0],
        n_key_value_heads=heads[1],
        d_mlp=d_mlp,
        position=position,
        normalization_type=norm,
        attention="causal" if causal else "bidirectional",
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    queries = []
    for _ in range(data.draw(st.integers(1, 4))):
        length, span = data.draw(st.integers(4, 8)), data.draw(st.integers(1, 2))
        tokens = data.draw(st.lists(st.integers(0, 11), min_size=length, max_size=length))
        start = data.draw(st.integers(2, length - span))
        answer = tuple(data.draw(st.lists(st.integers(0, 11), min_size=span, max_size=span)))
        queries.append(Query(tuple(tokens), answer, (start, start + span), (0, 1)))
    found = gram(model, queries)
    assert_same(found, by_autograd(model, queries))
    assert_close(found.inner, found.inner.transpose(1, 2), atol=1e-9, rtol=1e-9)
    norms = found.inner.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    assert (found.inner.abs() <= norms[:, :, None] * norms[:, None, :] * (1 + 1e-9) + 1e-9).all()


def test_another_loss() -> None:
    """The logit of the answer's first token."""
    model = double_model()
    found = gram(model, QUERIES, loss=lambda rows, batch: rows[:, 0].gather(1, batch.answer[:, :1]).squeeze(1))
    gradients = []
    for query in QUERIES:
        logit = model(torch.tensor([query.tokens]))[0, query.answer_span[0], query.answer[0]]
        gradients.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(logit, list(model.parameters()))]))
    flat = torch.stack(gradients)
    assert_close(found.within(), flat @ flat.T, atol=1e-9, rtol=1e-9)


def attention_to_source(model: Any, query: Query, layer: int, head: int | None) -> Tensor:
    seen: dict[str, Tensor] = {}
    name = f"blocks.{layer}.attn.hook_pattern"
    model.run_with_hooks(torch.tensor([query.tokens]), fwd_hooks=[(name, lambda x, hook: seen.update({name: x}))])
    rows = [position + model.cfg.readout_shift for position in range(*query.answer_span)]
    shares = seen[name][0][:, rows, query.source_span[0] : query.source_span[1]].sum(-1)
    return shares.mean() if head is None else shares[head].mean()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("layer", "head"), [(0, 1), (-1, None)])
def test_attention_to_the_source(name: str, layer: int, head: int | None) -> None:
    """What lies above the layer has no say in it, nor have its values."""
    model = double_model(name)
    layer %= model.cfg.n_layers
    found = gram(model, QUERIES, loss=SourceAttention(layer, head))
    parameters = {path: parameter for path, parameter in model.named_parameters() if parameter.requires_grad}
    flat: dict[Part, list[Tensor]] = {}
    for query in QUERIES:
        share = attention_to_source(model, query, layer, head)
        grads = torch.autograd.grad(share, list(parameters.values()), allow_unused=True, materialize_grads=True)
        of_query: dict[Part, list[Tensor]] = {}
        for path, grad in zip(parameters, grads, strict=True):
            of_query.setdefault(part_of(path), []).append(grad.flatten())
        for part, parts in of_query.items():
            flat.setdefault(part, []).append(torch.cat(parts))
    stacked = {part: torch.stack(rows) for part, rows in flat.items()}
    expected = {part: rows @ rows.T for part, rows in stacked.items()}
    for part, inner in zip(found.parts, found.inner, strict=True):
        scale = expected[part].abs().max().item()
        assert_close(inner, expected[part], atol=1e-9 * scale, rtol=1e-9)
    assert (found.within(("Q",), [layer]).diagonal() > 0).all()
    assert not found.within(("V", "O"), [layer]).any()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((2, None), r"^loss: the model has no layer 2 \(SourceAttention\.layer\); give 0 to 1$"),
        ((-1, 0), "no layer -1"),
        ((0, 4), "no head 4"),
    ],
)
def test_attention_that_is_not_there(asked: tuple[int, int | None], said: str) -> None:
    with pytest.raises(UserError, match=said):
        gram(double_model(), QUERIES, loss=SourceAttention(*asked))


def test_attention_of_a_bridge_is_refused() -> None:
    with pytest.raises(UserError, match="bridge's attention"):
        gram(native_peer(random_model(**SHAPE)), QUERIES, loss=SourceAttention(0))


# ---- position schemes of one's own


class Turning(PositionScheme):
    """Learns what queries are multiplied with, by position, and keys the other way round."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.strength = nn.Parameter(torch.linspace(0.5, 1.5, cfg.n_ctx, dtype=torch.float64))

    def rotate(self, x: Tensor, positions: Tensor, which: Which) -> Tensor:
        strength = self.strength if which == "q" else self.strength.flip(0)
        return x * strength[positions, None, None]


class Everything(PositionScheme):
    """Adds what it learns to the embedding, and to all scores."""

    relative = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.W_pos = nn.Parameter(torch.randn(cfg.n_ctx, cfg.d_model, dtype=torch.float64, generator=seeded(0)))
        self.slope, self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64)), nn.Parameter(torch.ones(3))

    def embed(self, positions: Tensor) -> Tensor:
        return self.W_pos[positions] * self.slope[0]

    def bias(self, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        return (-self.slope[1] * (key_pos[None, :] - query_pos[:, None]).abs()).expand(self.cfg.n_heads, -1, -1)


@pytest.mark.parametrize(("scheme", "built_as"), [(Turning, "rope"), (XPos, "rope"), (Everything, "learned")])
def test_schemes_of_ones_own(scheme: type[PositionScheme], built_as: str) -> None:
    model = random_model(dtype="float64", position=built_as, n_key_value_heads=2)
    model.pos_embed = scheme(model.cfg)
    assert_same(gram(model, QUERIES), by_autograd(model, QUERIES))


# ---- hooks of the user's act


def twice(x: Tensor, *, hook: Any) -> Tensor:
    return 2 * x


def without_the_first_dimension(x: Tensor, *, hook: Any) -> Tensor:
    x[..., 0] = 0
    return x


HOOKS = [
    "hook_embed",
    "blocks.0.hook_resid_pre",
    "blocks.1.ln1.hook_normalized",
    "blocks.1.ln2.hook_scale",
    "blocks.0.attn.hook_q",
    "blocks.1.attn.hook_rot_k",
    "blocks.0.attn.hook_attn_scores",
    "blocks.1.attn.hook_pattern",
    "blocks.0.attn.hook_z",
    "blocks.1.attn.hook_result",
    "blocks.1.hook_attn_out",
    "blocks.0.hook_q_input",
    "blocks.1.hook_v_input",
    "blocks.0.hook_mlp_in",
    "blocks.0.mlp.hook_pre",
    "blocks.1.mlp.hook_pre_linear",
    "blocks.0.mlp.hook_post",
    "blocks.1.hook_mlp_out",
    "blocks.1.hook_resid_post",
    "ln_final.hook_normalized",
]


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("edit", [twice, without_the_first_dimension], ids=["in its place", "in place"])
@pytest.mark.parametrize("kept", [0, 2**27], ids=["again", "kept"])
def test_hooks_act(monkeypatch: pytest.MonkeyPatch, name: str, edit: Any, kept: int) -> None:
    if edit is without_the_first_dimension and name.endswith(("hook_scale", "hook_pattern")):
        pytest.skip("nothing can be divided by 0, and autograd itself needs softmax's output as it was")
    monkeypatch.setattr(backward, "KEPT", kept)
    model = double_model("gated", n_key_value_heads=2)
    with model.hooks(fwd_hooks=[(name, edit)]):
        assert_same(gram(model, QUERIES), by_autograd(model, QUERIES))


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"])
def test_what_a_hook_cuts_off_has_no_gradient_and_what_comes_after_has(name: str) -> None:
    model = double_model("gated")
    queries = [QUERIES[1], Query((7, 9, 3, 4, MASK, 2), (6,), (4, 5), (0, 2))]

    def put(x: Tensor, *, hook: Any) -> Tensor:
        return torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view(x.shape[1:]).expand_as(x)

    with model.hooks(fwd_hooks=[(name, put)]):
        assert_same(gram(model, queries), by_autograd(model, queries))


# ---- the model is left as it was, and no gradient of a weight is there at any time


class Computed(TorchDispatchMode):
    """Counts the tensors of given sizes that are computed; views and copies are not."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.count = sizes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given and "clone" not in str(func):
                self.count += x.numel() in self.sizes
        return out


@contextmanager
def no_gradient_of_a_weight(model: HookedTransformer) -> Iterator[None]:
    """Nothing of a weight's size is computed."""
    with Computed({parameter.numel() for parameter in model.parameters() if parameter.ndim > 1}) as seen:
        yield
    assert seen.count == 0


@pytest.mark.parametrize("kept", [0, 2**27])
def test_no_gradient_of_a_weight_is_made(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """In a wide model: every weight has more entries than all queries' activations."""
    monkeypatch.setattr(backward, "KEPT", kept)
    model = random_model(d_model=72, n_heads=2, d_mlp=150, d_vocab=97, dtype="float64")
    with no_gradient_of_a_weight(model):
        gram(model, QUERIES)
    with pytest.raises(AssertionError), no_gradient_of_a_weight(model):
        by_autograd(model, QUERIES)


def test_the_model_is_left_as_it_was() -> None:
    model = double_model("tied")
    first, *rest = model.parameters()
    first.grad = torch.ones_like(first)
    expected = gram(model, QUERIES).inner
    for parameter in rest:
        parameter.requires_grad_(False)
    with torch.no_grad():
        assert_close(gram(model, QUERIES).inner, expected, atol=0, rtol=0)

    def fail(rows: Tensor, batch: Any) -> Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        gram(model, QUERIES, loss=fail)
    assert torch.equal(first.grad, torch.ones_like(first)) and all(parameter.grad is None for parameter in rest)
    assert [parameter.requires_grad for parameter in model.parameters()].count(True) == 1
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["layer norm, biases", "tied", "gated"])
@pytest.mark.parametrize("in_one", [1, 7, 30])
def test_a_large_vocabulary_comes_in_parts(name: str, in_one: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of the readout at a time does not change what comes of all of it."""
    model = double_model(**MODELS[name])
    whole = gram(model, QUERIES[:2], QUERIES[1:])
    told: list[int] = []
    for what in ("LOGITS", "ERRORS"):
        monkeypatch.setattr(backward, what, in_one)
    parts = gram(model, QUERIES[:2], QUERIES[1:], report=told.append)
    for field in ("inner", "left_squares", "right_squares"):
        assert_close(getattr(parts, field), getattr(whole, field), rtol=1e-12, atol=1e-12)
    assert (len(told) > 4) == (name != "tied")


def test_it_tells_how_far_it_is() -> None:
    told: list[int] = []
    gram(double_model(), QUERIES, report=told.append)
    assert told == [1, 2, 3, 4]


# ---- bridges


def test_on_a_native_bridge() -> None:
    bridge = native_peer(random_model(**SHAPE, rotary_adjacent_pairs=True, qkv_bias=True))
    queries = [query for pair in mirrored_pairs(causal=False) for query in (pair.forward, pair.reverse)]
    queries.append(Query((1, 2, 0), (5,), (2, 3), (0, 1)))
    expected = by_autograd(bridge, queries)
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    assert_same(gram(bridge, queries), expected, tolerance=2e-6)


def test_on_a_bridge_with_learned_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One vector per place is shared by all queries."""
    bridge = native_peer(random_model(**{**SHAPE, "d_mlp": None}, position="learned"))
    queries = [pair.forward for pair in mirrored_pairs(causal=False)]
    expected = by_autograd(bridge, queries)
    assert_same(gram(bridge, queries), expected, tolerance=2e-6)
    monkeypatch.setattr("mdm_interp.data.queries.MAX_LOGITS", 3 * 6 * 13)  # three queries, then one
    assert_same(gram(bridge, queries), expected, tolerance=2e-6)


def test_on_a_hugging_face_model(tmp_path: Path) -> None:
    bridge = llama_bridge(random_model(**SHAPE, attention="causal", gated_mlp=True, act_fn="silu"), tmp_path)
    queries = [query for pair in mirrored_pairs(causal=True) for query in (pair.forward, pair.reverse)]
    assert_same(gram(bridge, queries), by_autograd(bridge, queries), tolerance=2e-6)


# ---- what is asked


def test_sums_over_parts() -> None:
    found = gram(double_model("tied"), QUERIES)
    assert_close(found.within(), found.inner.sum(0))
    in_layer = [i for i, part in enumerate(found.parts) if part in ((1, "V"), (1, "O"))]
    assert_close(found.within(("V", "O"), [1]), found.inner[in_layer].sum(0))
    outside = [i for i, (layer, _) in enumerate(found.parts) if layer is None]
    assert_close(found.within(layers=[None]), found.inner[outside].sum(0))


def test_parts_and_queries_that_are_not_there_are_named() -> None:
    model = double_model("attention only")
    with pytest.raises(UserError, match=r"^components, layers: the model has no \['position'\] in layers \[0\]"):
        gram(model, QUERIES).within(["position"], [0])
    with pytest.raises(UserError, match=r"(left|right): gradients need at least one query or sentence, got none"):
        gram(model, [])
    with pytest.raises(UserError, match=r"(left|right): gradients need at least one query or sentence, got none"):
        gram(model, QUERIES, [])
