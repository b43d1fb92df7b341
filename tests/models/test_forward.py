"""What the forward pass returns, losses of both kinds, and runs that begin or end inside the model."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import random_model, random_tokens, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import HUGGING_FACE_NAMES, copy_weights, hugging_face_peer, padded
from torch import Tensor
from torch.testing import assert_close

from mdm_interp.errors import UserError
from mdm_interp.inference.denoising import denoise
from mdm_interp.models.positions import POSITION_SCHEMES
from mdm_interp.models.transformer import HookedTransformer, Output
from mdm_interp.training.losses import mdm_loss

MASK = 12
close = partial(assert_close, atol=1e-5, rtol=1e-5)
exactly = partial(assert_close, atol=0, rtol=0)


def causal_model(**changes: Any) -> Any:
    return random_model(**{"attention": "causal", "d_mlp": 24, **changes})


def mdm(**changes: Any) -> Any:
    return random_model(**{"mask_token_id": MASK, "d_mlp": 24, **changes})


def true_tokens(*, batch: int = 3, seed: int = 4) -> Tensor:
    """Without mask tokens."""
    return random_tokens(batch=batch, d_vocab=MASK, seed=seed)


def some_masked(tokens: Tensor) -> Tensor:
    """Two mask tokens in the first row, one in the second, none in the third."""
    masked = tokens.clone()
    masked[0, 2] = masked[0, 5] = masked[1, 3] = MASK
    return masked


# ---- what comes back


@pytest.mark.parametrize("tie", [False, True])
def test_logits_are_computed_where_they_are_read(tie: bool) -> None:
    """Hooks see all positions, whatever is read."""
    model, tokens = mdm(tie_word_embeddings=tie), true_tokens()
    readout = torch.tensor([[0, 6], [3, 3], [5, 1]])
    whole = model(tokens)
    expected = torch.stack([whole[row, at] for row, at in enumerate(readout)])
    close(model(tokens, readout=readout), expected)
    logits, cache = model.run_with_cache(tokens, readout=readout)
    close(logits, expected)
    assert cache["ln_final.hook_normalized"].shape == (3, 7, model.cfg.d_model)
    for refused in ({"return_type": "loss"}, {"return_type": None}, {"stop_at_layer": 0}):
        with pytest.raises(UserError, match=r"readout: only logits can be those of some positions"):
            model(tokens, readout=readout, **refused)


def test_return_types_are_logits_their_loss_both_and_nothing() -> None:
    model, tokens = causal_model(), random_tokens()
    logits, loss = model(tokens), model(tokens, return_type="loss")
    assert logits.shape == (2, 7, 13) and loss.shape == ()
    both = model(tokens, return_type="both")
    assert isinstance(both, Output)
    exactly(both.logits, logits)
    exactly(both.loss, loss)
    exactly(loss, model.loss_fn(logits, tokens))
    first, second = both  # as a pair, too
    assert first is both.logits and second is both.loss
    assert model(tokens, return_type=None) is None
    exactly(model(tokens, "both", True).loss, model(tokens, "loss", loss_per_token=True))


def test_without_logits_the_layers_run_and_the_readout_does_not() -> None:
    seen: list[str] = []
    model = causal_model()
    model.add_hook(lambda name: name.endswith(("resid_post", "hook_scale")), lambda x, hook: seen.append(hook.name))
    model(random_tokens(), return_type=None)
    assert seen[-1] == "blocks.1.hook_resid_post" and "ln_final.hook_scale" not in seen


@pytest.mark.parametrize("wrong", ["logit", "Loss", "", 0, True])
def test_an_unknown_return_type_is_refused_before_anything_runs(unchecked: None, wrong: Any) -> None:
    model = causal_model()
    model.add_hook("hook_embed", lambda x, hook: pytest.fail("it ran"))
    with pytest.raises(UserError, match=rf"return_type: {wrong!r} is none of 'logits', 'loss', 'both' and None"):
        model(random_tokens(), return_type=wrong)


def test_a_mask_as_second_argument_is_refused(unchecked: None) -> None:
    tokens = random_tokens()
    with pytest.raises(UserError, match=r"return_type: a tensor is none of .* \(a mask is given as attention_mask=\)"):
        causal_model()(tokens, torch.ones_like(tokens))


# ---- the causal loss


def test_the_causal_loss_is_the_cross_entropy_of_each_next_token() -> None:
    model, tokens = causal_model(), random_tokens(batch=3)
    logits = model(tokens)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(3, 6)
    close(model(tokens, return_type="loss"), expected.mean())
    close(model(tokens, return_type="loss", loss_per_token=True), expected)
    by_hand = -logits[1, 3].softmax(-1)[tokens[1, 4]].log()
    close(expected[1, 3], by_hand)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
def test_the_loss_of_a_padded_batch_is_the_mean_over_the_tokens_that_each_text_predicts(
    side: str, position: str
) -> None:
    model, tokens, lengths = causal_model(position=position), random_tokens(batch=3), [7, 4, 2]
    real = padded(side, lengths)
    with torch.no_grad():
        losses = [model(tokens[i, real[i]][None], return_type="loss", loss_per_token=True)[0] for i in range(3)]
        assert [len(each) for each in losses] == [6, 3, 1]
        for mask in (real, real.long()):
            close(model(tokens, return_type="loss", attention_mask=mask), torch.cat(losses).mean())
        per_token = model(tokens, return_type="loss", loss_per_token=True, attention_mask=real)
        predicted = real[:, 1:] & real[:, :-1]
        close(per_token[predicted], torch.cat(losses))
        assert (per_token[~predicted] == 0).all()


@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 4, 2]])
@pytest.mark.parametrize("tied", [False, True])
def test_the_causal_loss_equals_that_of_transformers(lengths: list[int], tied: bool) -> None:
    model = causal_model(
        gated_mlp=True, act_fn="silu", n_key_value_heads=2, eps=1e-6, tie_word_embeddings=tied, initializer_range=0.3
    )
    peer = hugging_face_peer(model)
    copy_weights(model, peer, HUGGING_FACE_NAMES)
    tokens, real = random_tokens(batch=3), padded("right", lengths)
    with torch.no_grad():
        theirs = peer(input_ids=tokens, attention_mask=real.long(), labels=tokens.masked_fill(~real, -100)).loss
        ours = model(tokens, return_type="loss", attention_mask=real)
    assert theirs > 1
    assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_losses_are_summed_in_float32_at_least() -> None:
    model, tokens = causal_model(dtype="bfloat16"), random_tokens()
    loss = model(tokens, return_type="loss")
    assert loss.dtype == torch.float32
    exactly(loss, model.loss_fn(model(tokens).float(), tokens))
    assert causal_model(dtype="float64")(tokens, return_type="loss").dtype == torch.float64
    masked = some_masked(true_tokens())
    assert mdm(dtype="float16")(masked, return_type="loss", targets=true_tokens()).dtype == torch.float32


def test_tokens_of_32_bits_have_the_loss_of_those_of_64() -> None:
    tokens, model = random_tokens(), causal_model()
    exactly(model(tokens.int(), return_type="loss"), model(tokens, return_type="loss"))
    truth, model = true_tokens(), mdm()
    expected = model(some_masked(truth), return_type="loss", targets=truth)
    exactly(model(some_masked(truth).int(), return_type="loss", targets=truth.int()), expected)


# ---- the masked diffusion loss


@pytest.mark.parametrize("shift", [0, -1])
def test_the_masked_loss_is_the_mean_over_each_sequences_masks_and_then_over_sequences(shift: int) -> None:
    model, truth = mdm(readout_shift=shift), true_tokens()
    masked = some_masked(truth)
    with torch.no_grad():
        log_probs = model(masked).log_softmax(-1)
        loss = {(row, pos): -log_probs[row, pos + shift, truth[row, pos]] for row, pos in [(0, 2), (0, 5), (1, 3)]}
        expected = ((loss[0, 2] + loss[0, 5]) / 2 + loss[1, 3]) / 2  # the third sequence has no mask, and no say
        close(model(masked, return_type="loss", targets=truth), expected)
        per_token = model(masked, return_type="loss", loss_per_token=True, targets=truth)
        by_hand = torch.zeros(3, 7)
        for place, value in loss.items():
            by_hand[place] = value
        close(per_token, by_hand)
        exactly(model(masked, return_type="both", targets=truth).logits, model(masked))  # which no shift moves


def test_true_tokens_are_read_at_mask_tokens_only() -> None:
    model, truth = mdm(), true_tokens()
    masked = some_masked(truth)
    elsewhere = torch.where(masked == MASK, truth, -100)  # what transformers has for no label
    for per_token in (False, True):
        exactly(
            model(masked, return_type="loss", loss_per_token=per_token, targets=elsewhere),
            model(masked, return_type="loss", loss_per_token=per_token, targets=truth),
        )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shift", [0, -1])
def test_mask_tokens_in_padding_do_not_count(side: str, shift: int) -> None:
    model, truth, lengths = mdm(readout_shift=shift), true_tokens(), [7, 5, 4]
    real = padded(side, lengths)
    masked = truth.clone()
    for row, length in enumerate(lengths):
        masked[row, real[row].nonzero()[length - 2]] = MASK
    masked[~real] = MASK
    with torch.no_grad():
        alone = [model(masked[i, real[i]][None], return_type="loss", targets=truth[i, real[i]][None]) for i in range(3)]
        close(model(masked, return_type="loss", targets=truth, attention_mask=real), torch.stack(alone).mean())
        per_token = model(masked, return_type="loss", loss_per_token=True, targets=truth, attention_mask=real)
    assert (per_token > 0).equal((masked == MASK) & real)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_over_all_masks_the_loss_has_the_mean_of_the_masked_diffusion_objective(length: int) -> None:
    """LLaDA's: t ~ U(0, 1], each token masked with probability t, the loss weighted 1/t and divided by the length; for
    every pattern a polynomial in t, which Gauss-Legendre integrates exactly. Ours: as many masks as a number that is
    uniform on 1..length, at places drawn evenly, and their mean loss."""
    model, truth = mdm(dtype="float64"), true_tokens(batch=1)[:, :length]
    patterns = [torch.tensor([bits]) for bits in itertools.product([False, True], repeat=length) if any(bits)]
    nodes, weights = np.polynomial.legendre.leggauss(6)
    by_time, by_count = 0.0, 0.0
    with torch.no_grad():
        for pattern in patterns:
            logits, count = model(truth.masked_fill(pattern, MASK)), int(pattern.sum())
            for node, weight in zip(nodes, weights, strict=True):
                t = (node + 1) / 2
                chance = t**count * (1 - t) ** (length - count)
                loss = mdm_loss(logits, truth, pattern, torch.tensor([[t]], dtype=torch.float64))
                by_time += weight / 2 * chance * float(loss)
            loss = model.loss_fn(logits, truth.masked_fill(pattern, MASK), targets=truth)
            by_count += float(loss) / math.comb(length, count) / length
    assert by_count == pytest.approx(by_time, rel=1e-12)
    assert by_count > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": None}, r"loss: a masked diffusion model's is of the true tokens at mask tokens; put .* \(12\)"),
        ({"input": true_tokens()}, r"loss: a masked diffusion model's is of the true tokens at mask tokens"),
        ({"attention_mask": some_masked(true_tokens()) != MASK}, r"loss: a masked diffusion model's is of the true"),
        ({"targets": true_tokens()[:, :6]}, r"targets: expected the shape of tokens \[3, 7\], got \[3, 6\]"),
        ({"targets": true_tokens()[:1]}, r"targets: expected the shape of tokens \[3, 7\], got \[1, 7\]"),
        ({"targets": true_tokens()[0]}, r"targets: expected the shape of tokens \[3, 7\], got \[7\]"),
        ({"targets": true_tokens() + 100}, r"targets: id 1\d\d at \[0, 2\] is outside the vocabulary of 13"),
        ({"targets": true_tokens().float()}, "targets: expected token ids as int64, got float32"),
    ],
)
def test_a_masked_loss_that_cannot_be_computed_is_refused(
    unchecked: None, change: dict[str, Any], message: str
) -> None:
    asked = {"input": some_masked(true_tokens()), "targets": true_tokens(), **change}
    with pytest.raises(UserError, match=message):
        mdm()(return_type="loss", **asked)


def test_targets_of_a_causal_model_are_refused() -> None:
    with pytest.raises(UserError, match="targets: a causal model's loss is of the tokens themselves; leave targets"):
        causal_model()(random_tokens(), return_type="loss", targets=random_tokens())


def test_a_model_without_mask_token_has_no_loss() -> None:
    with pytest.raises(UserError, match=r"put cfg.mask_token_id \(None\) where they are"):
        random_model()(true_tokens(), return_type="loss", targets=true_tokens())


@pytest.mark.parametrize(
    ("masked_at", "real"),
    [(0, None), (0, padded("right", [5])), (3, padded("left", [4])), (3, torch.arange(7)[None] != 2)],
    ids=["first token", "padding behind it", "padding before it", "a gap before it"],
)
def test_a_shifted_model_predicts_no_token_that_none_comes_before(masked_at: int, real: Tensor | None) -> None:
    model, truth = mdm(readout_shift=-1), true_tokens(batch=1)
    masked = truth.clone()
    masked[0, masked_at] = MASK
    message = rf"tokens: position {masked_at} is masked, but has no prediction in a shifted model; give its token"
    with pytest.raises(UserError, match=message):
        model(masked, return_type="loss", targets=truth, attention_mask=real)
    with pytest.raises(UserError, match=message):
        denoise(model, masked, steps=1, attention_mask=real)
    plain = mdm()
    assert plain(masked, return_type="loss", targets=truth, attention_mask=real) > 0
    assert (denoise(plain, masked, steps=1, attention_mask=real).tokens[-1] != MASK).all()


@pytest.mark.parametrize("asked", [causal_model(), mdm()], ids=["causal", "mdm"])
def test_loss_fn_refuses_logits_of_other_tokens(unchecked: None, asked: HookedTransformer) -> None:
    tokens = some_masked(true_tokens())
    logits = asked(tokens)
    with pytest.raises(UserError, match=r"tokens: expected \[3, 7\] as the logits, got \[3, 6\]"):
        asked.loss_fn(logits, tokens[:, 1:])
    with pytest.raises(UserError, match=r"tokens: id 13 at \[0, 0\] is outside the vocabulary"):
        asked.loss_fn(logits, tokens.clone().fill_(13))
    with pytest.raises(UserError, match=r"attention_mask: expected the shape of tokens"):
        asked.loss_fn(logits, tokens, torch.ones(3, 6))


# ---- enter and leave at a layer

N_LAYERS = 3
LAYERS = list(range(-N_LAYERS, N_LAYERS + 1))


def layered(**changes: Any) -> Any:
    return random_model(**{"n_layers": N_LAYERS, "d_mlp": 24, "n_key_value_heads": 2, **changes})


def index(layer: int) -> int:
    return layer + N_LAYERS if layer < 0 else layer


def of_layers(names: Iterable[str], start: int, stop: int) -> set[str]:
    """Those of the hooks that are in these layers."""
    at = {name: re.match(r"blocks\.(\d+)\.", name) for name in names}
    return {name for name, layer in at.items() if layer and start <= int(layer[1]) < stop}


@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_entering_with_what_was_left_gives_the_whole_run(position: str, attention: str, side: str) -> None:
    model, tokens = layered(position=position, attention=attention), random_tokens()
    mask = None if side == "none" else padded(side, [7, 4])
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, attention_mask=mask)
        for layer in LAYERS:
            resid = model(tokens, stop_at_layer=layer, attention_mask=mask)
            last = index(layer) == N_LAYERS
            exactly(resid, cache["resid_post", N_LAYERS - 1] if last else cache["resid_pre", index(layer)])
            exactly(model(resid, start_at_layer=layer, attention_mask=mask), logits)
            for later in LAYERS:
                if index(later) >= index(layer):
                    part = model(resid, start_at_layer=layer, stop_at_layer=later, attention_mask=mask)
                    exactly(part, model(tokens, stop_at_layer=later, attention_mask=mask))


def test_no_layers_at_all_give_what_enters_the_first() -> None:
    for position in POSITION_SCHEMES:
        model, tokens, mask = layered(position=position), random_tokens(), padded("left", [7, 4])
        embedded = model.input_to_embed(tokens, attention_mask=mask.long())
        exactly(model(tokens, stop_at_layer=0, attention_mask=mask), embedded.residual)
        exactly(embedded.tokens, tokens)
        assert embedded.attention_mask is not None and embedded.attention_mask.equal(mask)
        assert embedded.shortformer_pos_embed is None
        assert model.input_to_embed(tokens).attention_mask is None
        resid, _, _, real = embedded  # in the classic order
        exactly(model(resid, start_at_layer=0, attention_mask=real), model(tokens, attention_mask=mask))


@pytest.mark.parametrize("layer", LAYERS)
def test_hooks_of_skipped_layers_do_not_fire_and_caches_of_the_others_are_equal(layer: int) -> None:
    model, tokens = layered(position="learned"), random_tokens()
    at, embeds = index(layer), {"hook_embed", "hook_pos_embed"}
    final = {"ln_final.hook_scale", "ln_final.hook_normalized"}
    with torch.no_grad():
        logits, whole = model.run_with_cache(tokens)
        resid, before = model.run_with_cache(tokens, stop_at_layer=layer)
        entered, after = model.run_with_cache(resid, start_at_layer=layer)
        _, one = model.run_with_cache(resid, start_at_layer=layer, stop_at_layer=min(at + 1, N_LAYERS))
        fired: list[str] = []
        model.run_with_hooks(
            resid, start_at_layer=layer, fwd_hooks=[(lambda name: True, lambda x, hook: fired.append(hook.name))]
        )
    exactly(entered, logits)
    assert set(before) == embeds | of_layers(whole, 0, at)
    assert set(after) == of_layers(whole, at, N_LAYERS) | final
    assert set(one) == of_layers(whole, at, at + 1)
    assert set(after) <= set(fired) and not any(name in before for name in fired)
    for cache in (before, after, one):
        for name in cache:
            exactly(cache[name], whole[name])
    assert model.list_hooks() == {}


def test_edits_count_in_the_layers_that_run_and_in_no_other() -> None:
    model, tokens = layered(), random_tokens()

    def double(x: Tensor, hook: Any) -> Tensor:
        return 2 * x

    with torch.no_grad():
        resid = model(tokens, stop_at_layer=1)
        edited = model.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_attn_out", double)])
        exactly(model.run_with_hooks(resid, start_at_layer=1, fwd_hooks=[("blocks.2.hook_attn_out", double)]), edited)
        exactly(
            model.run_with_hooks(resid, start_at_layer=1, fwd_hooks=[("blocks.0.hook_attn_out", double)]),
            model(tokens),
        )
        exactly(model.run_with_hooks(tokens, stop_at_layer=1, fwd_hooks=[("ln_final.hook_scale", double)]), resid)
        both = [("blocks.0.hook_attn_out", double), ("blocks.2.attn.hook_z", double)]
        left = model.run_with_hooks(tokens, stop_at_layer=2, fwd_hooks=both)
        exactly(
            model.run_with_hooks(left, start_at_layer=2, fwd_hooks=both), model.run_with_hooks(tokens, fwd_hooks=both)
        )


def test_what_leaves_at_a_layer_is_the_residual_stream_whatever_return_type_says() -> None:
    model, tokens = layered(attention="causal"), random_tokens()
    for return_type in ("logits", "loss", "both", None):
        exactly(model(tokens, return_type=return_type, stop_at_layer=1), model(tokens, stop_at_layer=1))


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_the_loss_of_a_run_that_enters_at_a_layer_is_of_the_tokens_given(attention: str) -> None:
    model, truth = layered(attention=attention, mask_token_id=MASK), true_tokens()
    tokens, mask = some_masked(truth), padded("right", [7, 5, 6])
    targets = {} if attention == "causal" else {"targets": truth}
    with torch.no_grad():
        resid = model(tokens, stop_at_layer=1, attention_mask=mask)
        given: dict[str, Any] = {"attention_mask": mask, "return_type": "both", **targets}
        for per_token in (False, True):
            entered = model(resid, start_at_layer=1, tokens=tokens, loss_per_token=per_token, **given)
            whole = model(tokens, loss_per_token=per_token, **given)
            exactly(entered.logits, whole.logits)
            exactly(entered.loss, whole.loss)


def test_gradients_go_back_to_what_entered_and_to_later_layers_only() -> None:
    model, tokens = layered(attention="causal"), random_tokens()
    model(tokens, return_type="loss").backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(whole) == len(list(model.parameters()))
    model.zero_grad()
    _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True, names_filter="blocks.1.hook_resid_pre")
    model.zero_grad(set_to_none=True)
    resid = model(tokens, stop_at_layer=1).detach().requires_grad_()
    model(resid, start_at_layer=1, tokens=tokens, return_type="loss").backward()
    assert resid.grad is not None and resid.grad.abs().max() > 1e-4
    close(resid.grad, cache["blocks.1.hook_resid_pre_grad"])
    for name, parameter in model.named_parameters():
        if name.startswith(("blocks.0.", "embed.")):
            assert parameter.grad is None, name
        else:
            close(parameter.grad, whole[name])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_run_in_any_parts_is_the_run(data: st.DataObject) -> None:
    model = layered(position=data.draw(st.sampled_from(list(POSITION_SCHEMES))), attention="causal")
    tokens, mask = random_tokens(), padded(data.draw(st.sampled_from(["left", "right"])), [7, 3])
    cuts = sorted(data.draw(st.lists(st.integers(0, N_LAYERS), max_size=4)))
    with torch.no_grad():
        x, entry = model(tokens, stop_at_layer=0, attention_mask=mask), 0
        for cut in cuts:
            given_as = cut - N_LAYERS if cut < N_LAYERS and data.draw(st.booleans()) else cut
            x, entry = model(x, start_at_layer=entry, stop_at_layer=given_as, attention_mask=mask), cut
        exactly(model(x, start_at_layer=entry, attention_mask=mask), model(tokens, attention_mask=mask))


RESID = torch.randn(2, 7, 16, generator=seeded(3))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"input": random_tokens()}, r"input: start_at_layer takes the residual stream \[batch pos 16\], got shape"),
        ({"input": RESID[0]}, r"input: start_at_layer takes the residual stream \[batch pos 16\], got shape \[7, 16\]"),
        ({"input": RESID[..., :8]}, r"input: start_at_layer takes .* got shape \[2, 7, 8\]; compute it with input_to"),
        ({"input": "a text"}, r"input: start_at_layer takes the residual stream \[batch pos 16\], got str"),
        ({"input": RESID.double()}, r"input: got torch.float64, and the model is in torch.float32; convert one"),
        ({"input": RESID.long()}, r"input: got torch.int64, and the model is in torch.float32; convert one"),
        ({"input": RESID.repeat(1, 2, 1)}, r"input: 14 positions exceed n_ctx 12"),
        ({"start_at_layer": 4}, r"start_at_layer: the model has no layer 4; give -3 to 3"),
        ({"start_at_layer": -4}, r"start_at_layer: the model has no layer -4; give -3 to 3"),
        ({"stop_at_layer": 4}, r"stop_at_layer: the model has no layer 4; give -3 to 3"),
        ({"stop_at_layer": 0}, r"stop_at_layer: 0 comes before start_at_layer 1; give a later layer"),
        ({"stop_at_layer": -3}, r"stop_at_layer: -3 comes before start_at_layer 1; give a later layer"),
        ({"return_type": "loss"}, r"tokens: the loss is of tokens, and only the residual stream is known; give tokens"),
        (
            {"return_type": "loss", "tokens": random_tokens(pos=6)},
            r"tokens: expected \[2, 7\] as the logits, got \[2, 6\]",
        ),
        ({"return_type": "loss", "tokens": random_tokens() + 9}, r"tokens: id \d+ at .* is outside the vocabulary"),
        ({"attention_mask": torch.ones(2, 6)}, r"attention_mask: expected the shape of tokens \[2, 7\], got \[2, 6\]"),
        ({"attention_mask": torch.zeros(2, 7)}, r"attention_mask: got float32, and only booleans or integers"),
    ],
)
def test_a_layer_or_residual_stream_that_is_none_is_refused(
    unchecked: None, asked: dict[str, Any], message: str
) -> None:
    model = layered(attention="causal")
    with pytest.raises(UserError, match=message):
        model(**{"input": RESID, "start_at_layer": 1, **asked})


def test_a_layer_to_stop_at_that_is_none_is_refused_without_start_too() -> None:
    for layer in (4, -4):
        with pytest.raises(UserError, match=rf"stop_at_layer: the model has no layer {layer}; give -3 to 3"):
            layered()(random_tokens(), stop_at_layer=layer)


def test_other_tokens_than_the_inputs_are_refused() -> None:
    model, tokens = random_model(attention="causal"), random_tokens()
    assert torch.equal(model(tokens, "loss", tokens=tokens), model(tokens, "loss"))
    with pytest.raises(
        UserError, match="tokens: not what input has; leave them out, or give start_at_layer a residual"
    ):
        model(tokens, "loss", tokens=tokens.roll(1, dims=1))
