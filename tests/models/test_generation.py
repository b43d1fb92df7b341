"""Texts that models continue and fill in, against loops written by hand and transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import random_model, random_tokens, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import HUGGING_FACE_NAMES, copy_weights, hugging_face_peer
from text_helpers import BOS, EOS, MASK, PAD, SPECIAL, refused, word_tokenizer
from torch import Tensor

import mdm_interp
from mdm_interp.inference.denoising import Trajectory
from mdm_interp.models.positions import POSITION_SCHEMES
from mdm_interp.models.transformer import HookedTransformer

TEXTS = ["w1 w2 w3 w4 w5", "w3 w8", "w5 w1 w1"]
IDS = [[1, 2, 3, 4, 5], [3, 8], [5, 1, 1]]


def writing(*special: str, seed: int = 0, **changes: Any) -> HookedTransformer:
    """A random causal model with a tokenizer of words."""
    changes = {"n_ctx": 32, "attention": "causal", **changes}
    model = random_model(seed=seed, **changes)
    model.set_tokenizer(word_tokenizer(*special))
    return model


def filling(**changes: Any) -> HookedTransformer:
    """A random masked diffusion model with a tokenizer of words."""
    return writing(*SPECIAL, **{"attention": "bidirectional", "mask_token_id": MASK, **changes})


def greedy(model: HookedTransformer, ids: list[int], count: int, ends: tuple[int, ...] = ()) -> list[int]:
    """The loop as one would write it: the likeliest token, one after the other."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids


def new_ids(model: HookedTransformer, given: Any, count: int, **options: Any) -> Tensor:
    """What `generate` returns as token ids, those that were given first."""
    got = model.generate(given, count, return_type="tokens", verbose=False, **options)
    assert isinstance(got, Tensor)
    return got


def always(token: int) -> Callable[..., Tensor]:
    """A hook on what the unembedding reads that makes `token` the likeliest; see :func:`forcing`."""

    def force(normalized: Tensor, hook: Any) -> Tensor:
        normalized[:, -1] = 100.0 * torch.nn.functional.one_hot(torch.tensor(token), normalized.shape[-1])
        return normalized

    return force


def forcing(*special: str, **changes: Any) -> HookedTransformer:
    """A model whose logits are the first 13 dimensions of what `ln_final.hook_normalized` sees."""
    model = writing(*special, **changes)
    with torch.no_grad():
        model.W_U.copy_(torch.eye(16, 13))
        model.get_parameter("ln_final.w").fill_(1.0)
    return model


# ---- generate: greedy


@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
def test_greedy_generation_is_the_loop_written_by_hand(position: str) -> None:
    model, tokens = writing(position=position, d_mlp=24), random_tokens(batch=3, pos=4)
    got = new_ids(model, tokens, 8, do_sample=False)
    assert got.tolist() == [greedy(model, row, 8) for row in tokens.tolist()]


@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
@pytest.mark.parametrize("special", [("eos", "pad"), ()], ids=["with padding token", "with none"])
def test_texts_of_unequal_length_go_on_as_each_alone(position: str, special: tuple[str, ...]) -> None:
    model = writing(*special, position=position)
    expected = [model.to_string(greedy(model, ids, 6)) for ids in IDS]
    assert model.generate(TEXTS, 6, stop_at_eos=False, do_sample=False, return_type="str", verbose=False) == [
        text if not special else " ".join(word for word in str(text).split() if word not in ("</s>", "<pad>"))
        for text in expected
    ]
    tokens = model.generate(IDS, 6, stop_at_eos=False, do_sample=False, verbose=False)
    assert isinstance(tokens, Tensor)
    assert tokens[:, 5:].tolist() == [greedy(model, ids, 6)[len(ids) :] for ids in IDS]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("ends", [None, 4, [4, 7]])
def test_greedy_generation_equals_transformers(family: str, ends: Any) -> None:
    """Which keeps keys and values, pads on the left too, and is told what is real."""
    gated: dict[str, Any] = {"d_mlp": 24, "gated_mlp": True, "act_fn": "silu", "qkv_bias": family == "qwen2"}
    model = writing("pad", seed=28, n_key_value_heads=2, eps=1e-6, rotary_base=100.0, **gated)  # whose texts vary
    peer = hugging_face_peer(model, family, bos_token_id=None, eos_token_id=None)
    copy_weights(model, peer, HUGGING_FACE_NAMES)
    tokens, mask = model.to_tokens_and_mask(TEXTS, padding_side="left")
    assert mask is not None
    theirs = peer.generate(
        tokens,
        attention_mask=mask.long(),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=PAD if ends is None else 4,
    )
    ours = new_ids(model, TEXTS, 12, eos_token_id=ends, do_sample=False, use_past_kv_cache=True)
    assert len(set(ours[:, 5:].flatten().tolist())) > 5
    assert ours[:, 5:].tolist() == theirs[:, 5:].tolist()


def test_nothing_new_is_what_was_given() -> None:
    model = writing("eos", "pad")
    assert model.generate("w1 w2", 0, verbose=False) == "w1 w2"
    assert model.generate(TEXTS, 0, verbose=False) == TEXTS


@settings(deadline=None, max_examples=25)
@given(
    ids=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    count=st.integers(0, 8),
    ends=st.lists(st.integers(0, 12), max_size=3),
    sampled=st.booleans(),
)
def test_generation_keeps_what_it_was_given_and_adds_no_more_than_asked(
    ids: list[int], count: int, ends: list[int], sampled: bool
) -> None:
    got = writing().generate([ids], count, eos_token_id=ends or None, do_sample=sampled, verbose=False)
    assert isinstance(got, Tensor) and got.shape[0] == 1
    new = got[0, len(ids) :].tolist()
    assert got[0, : len(ids)].tolist() == ids and len(new) <= count
    assert len(new) == count or new[-1] in ends
    assert not set(new[:-1]) & set(ends)


# ---- generate: where it stops


def test_a_sequence_stops_at_the_tokenizers_end_token() -> None:
    model = forcing("eos")
    model.add_hook("ln_final.hook_normalized", always(EOS))
    assert new_ids(model, [1, 2], 6, do_sample=False).tolist() == [[1, 2, EOS]]
    going_on = new_ids(model, [1, 2], 6, stop_at_eos=False, do_sample=False)
    assert going_on.tolist() == [[1, 2] + [EOS] * 6]


def test_the_end_token_that_is_given_counts_in_place_of_the_tokenizers() -> None:
    model = forcing("eos")
    model.add_hook("ln_final.hook_normalized", always(EOS))
    assert new_ids(model, [1, 2], 6, eos_token_id=3, do_sample=False).shape == (1, 8)


def test_without_an_end_token_nothing_stops() -> None:
    model = forcing()
    model.add_hook("ln_final.hook_normalized", always(EOS))
    assert new_ids(model, "w1 w2", 6, do_sample=False).shape == (1, 8)


@pytest.mark.parametrize("ends", [(4,), (7, 4), (4, 7, 12), tuple(range(13))])
def test_any_of_several_end_tokens_stops_a_sequence_and_the_first_pads_it(ends: tuple[int, ...]) -> None:
    model, tokens = writing(), random_tokens(batch=6, pos=3)
    got = new_ids(model, tokens, 12, eos_token_id=ends, do_sample=False)
    alone = [greedy(model, row, 12, ends) for row in tokens.tolist()]
    longest = max(map(len, alone))
    assert got.tolist() == [row + [ends[0]] * (longest - len(row)) for row in alone]


def test_what_pads_a_sequence_after_its_end_is_in_no_text() -> None:
    """Also where the end is an ordinary word."""
    model = writing()
    alone = [greedy(model, ids, 12, (4, 7)) for ids in IDS]
    assert len(set(map(len, alone))) > 1
    got = model.generate(TEXTS, 12, eos_token_id=[4, 7], do_sample=False, verbose=False)
    assert got == [model.to_string(ids) for ids in alone]


def test_an_end_token_in_the_prompt_stops_nothing() -> None:
    model = writing("eos")
    assert new_ids(model, [1, EOS], 4, do_sample=False).tolist() == [greedy(model, [1, EOS], 4, ends=(EOS,))]


# ---- generate: what is given and returned


@pytest.mark.parametrize("prepend_bos", [True, False, None])
def test_generation_begins_with_bos_if_asked(prepend_bos: bool | None) -> None:
    model = writing("bos", default_prepend_bos=True)
    got = new_ids(model, "w1 w2", 4, do_sample=False, prepend_bos=prepend_bos)
    begin = [1, 2] if prepend_bos is False else [BOS, 1, 2]
    assert got.tolist() == [greedy(model, begin, 4)]


def test_bos_alone_can_be_continued() -> None:
    model = writing("bos")
    got = new_ids(model, "", 4, do_sample=False, prepend_bos=True)
    assert got.tolist() == [greedy(model, [BOS], 4)]


def test_output_is_as_the_input_was_given_or_as_asked() -> None:
    model = writing()
    ids = greedy(model, [1, 2], 3)
    text, options = model.to_string(ids), dict[str, Any](do_sample=False, verbose=False)
    assert model.generate("w1 w2", 3, **options) == text
    assert model.generate(["w1 w2"], 3, **options) == [text]
    assert model.generate(["w1 w2", "w1 w2"], 3, **options) == [text, text]
    for form in ([1, 2], torch.tensor([1, 2]), [[1, 2]], torch.tensor([[1, 2]])):
        got = model.generate(form, 3, **options)
        assert isinstance(got, Tensor) and got.tolist() == [ids]
        assert model.generate(form, 3, return_type="str", **options) == text
    assert new_ids(model, "w1 w2", 3, do_sample=False).tolist() == [ids]


def test_ids_need_no_tokenizer_but_their_text_does() -> None:
    model = random_model(attention="causal")
    assert new_ids(model, [1, 2], 3).shape == (1, 5)
    with refused(
        "return_type: 'str' needs a tokenizer, and this model has none; give token ids, or call set_tokenizer first"
    ):
        model.generate([1, 2], 3, return_type="str", verbose=False)


def test_texts_are_without_special_tokens() -> None:
    model = forcing(*SPECIAL)
    model.add_hook("ln_final.hook_normalized", always(MASK))
    assert model.generate("<s> w1", 3, do_sample=False, verbose=False) == "w1"


def test_a_progress_bar_is_shown_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(
        "mdm_interp.models.generation.track", lambda steps, *_, disable, **__: shown.append(not disable) or steps
    )
    model = writing()
    model.generate([1], 2)
    model.generate([1], 2, verbose=False)
    assert shown == [True, False]


def test_generation_leaves_no_gradients_and_no_hooks() -> None:
    model = writing()
    got = new_ids(model, [1, 2], 3)
    assert not got.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(point.has_hooks() for point in model.hook_dict.values())


# ---- generate: sampling


def test_sampling_follows_the_seed() -> None:
    model = writing()

    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return new_ids(model, [[1, 2]] * 4, 12).tolist()

    assert draw(0) == draw(0) != draw(1)


def test_tokens_are_drawn_from_the_softmax_at_the_temperature() -> None:
    model, count = writing(initializer_range=0.25), 4000
    for temperature in (0.5, 1.0, 2.0):
        torch.manual_seed(0)
        drawn = new_ids(model, [[1, 2]] * count, 1, temperature=temperature)[:, -1]
        shares = torch.bincount(drawn, minlength=13) / count
        expected = (model([[1, 2]])[0, -1] / temperature).softmax(-1)
        assert (shares - expected).abs().max() < 4 * 0.5 / count**0.5


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_the_likeliest_token_is_what_narrow_sampling_draws(options: dict[str, Any]) -> None:
    model = writing()
    assert new_ids(model, [1, 2], 8, **options).tolist() == [greedy(model, [1, 2], 8)]


@pytest.mark.parametrize(("options", "allowed"), [({"top_k": 3}, 3), ({"top_k": 50}, 13), ({"top_p": 1.0}, 13)])
def test_only_the_likeliest_tokens_are_drawn(options: dict[str, Any], allowed: int) -> None:
    model = writing(initializer_range=0.1)
    torch.manual_seed(0)
    drawn = new_ids(model, [[1, 2]] * 1000, 1, **options)[:, -1]
    likeliest = model([[1, 2]])[0, -1].topk(allowed).indices
    assert set(drawn.tolist()) == set(likeliest.tolist())


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.9])
def test_the_fewest_tokens_of_a_probability_are_drawn(top_p: float) -> None:
    model = writing(initializer_range=0.2)
    torch.manual_seed(0)
    drawn = new_ids(model, [[1, 2]] * 2000, 1, top_p=top_p)[:, -1]
    probs, order = model([[1, 2]])[0, -1].softmax(-1).sort(descending=True)
    fewest = int((probs.cumsum(0) < top_p).sum()) + 1
    assert set(drawn.tolist()) == set(order[:fewest].tolist())


def test_a_penalty_on_frequency_keeps_tokens_from_coming_again() -> None:
    model = writing()
    torch.manual_seed(0)
    got = new_ids(model, [[1]] * 4, 12, freq_penalty=1e4)
    assert all(sorted(row) == list(range(13)) for row in got.tolist())


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_penalty_is_taken_from_what_is_drawn_from_padding_not_counted(temperature: float) -> None:
    """`[2, 2, 1]` has 2 twice; the shorter one is padded with PAD, which is not there."""
    model, count = writing("pad", initializer_range=0.2), 3000
    torch.manual_seed(0)
    drawn = new_ids(
        model, [[2, 2, 1], *[[1]] * count], 1, temperature=temperature, freq_penalty=2.0, stop_at_eos=False
    )[1:, -1]
    shares = torch.bincount(drawn, minlength=13) / count
    penalised = model([[1]])[0, -1] / temperature
    penalised[1] -= 2.0
    assert (shares - penalised.softmax(-1)).abs().max() < 4 * 0.5 / count**0.5


# ---- generate: hooks


def test_hooks_are_active_in_every_step_and_see_whole_sequences() -> None:
    model, seen = writing(), []
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: seen.append(x.shape[1]))]):
        model.generate([1, 2, 3], 4, verbose=False)
    assert seen == [3, 4, 5, 6]


def test_a_hook_that_forces_a_token_is_all_that_is_written() -> None:
    model = forcing()
    with model.hooks(fwd_hooks=[("ln_final.hook_normalized", always(5))]):
        assert model.generate("w1 w2", 4, verbose=False) == "w1 w2 w5 w5 w5 w5"
    assert model.generate("w1 w2", 4, do_sample=False, verbose=False) != "w1 w2 w5 w5 w5 w5"


def test_an_edited_model_writes_what_the_loop_with_the_edit_writes() -> None:
    model = writing()

    def silence(tensor: Tensor, hook: Any) -> Tensor:
        tensor[:, :, 0] = 0.0
        return tensor

    plain = greedy(model, [1, 2], 8)
    model.add_hook("blocks.0.attn.hook_z", silence)
    edited = new_ids(model, [1, 2], 8, do_sample=False)
    assert edited.tolist() == [greedy(model, [1, 2], 8)] != [plain]


# ---- generate: mistakes


def test_what_cannot_be_continued_is_refused(unchecked: None) -> None:
    model = writing("bos")
    with refused("generate: this model's attention is bidirectional; call denoise, which fills in mask tokens"):
        filling().generate("w1")
    with refused("input: there is no token to continue; give one, or prepend_bos=True"):
        model.generate("")
    with refused("max_new_tokens: 30 after 3 tokens exceed n_ctx 32; ask for fewer"):
        model.generate([1, 2, 3], 30)
    assert new_ids(model, [1, 2, 3], 29).shape == (1, 32)
    with refused("return_type: 'tensor' is none of input, str, tokens; choose one"):
        model.generate("w1", return_type="tensor")  # type: ignore[arg-type]
    with refused("prepend_bos: this model's tokenizer has no BOS token; leave prepend_bos out, or give False"):
        writing().generate("w1", prepend_bos=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k: 0 leaves no token to draw; use at least 1"),
        ({"top_p": 0.0}, "top_p: 0.0 is no probability; use one above 0, at most 1"),
        ({"top_p": 1.5}, "top_p: 1.5 is no probability; use one above 0, at most 1"),
        ({"temperature": -1.0}, "temperature: -1.0 is negative; use 0 or more"),
        ({"freq_penalty": -0.5}, "freq_penalty: -0.5 is negative; use 0 or more"),
    ],
)
def test_drawing_that_is_not_possible_is_refused(options: dict[str, Any], message: str) -> None:
    with refused(message):
        writing().generate([1], **options)


# ---- denoise

MASKED = ["w1 <mask> w3 <mask> w5", "<mask> w8"]


def test_a_text_is_filled_in_as_denoise_fills_in_its_ids() -> None:
    model = filling()
    tokens = torch.tensor([[1, MASK, 3, MASK, 5]])
    expected = mdm_interp.denoise(model, tokens, steps=2)
    assert model.denoise(MASKED[0], return_type="tokens").tolist() == expected.tokens[-1].tolist()
    assert model.denoise(MASKED[0]) == model.tokenizer.decode(expected.tokens[-1, 0], skip_special_tokens=True)
    assert torch.equal(model.denoise(tokens), expected.tokens[-1])
    trajectory = model.denoise(tokens, return_type="trajectory")
    assert isinstance(trajectory, Trajectory)
    for name in ("tokens", "filled_at", "probability"):
        assert torch.equal(getattr(trajectory, name), getattr(expected, name)), name


@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("new_tokens", [0, 3])
def test_texts_of_unequal_length_are_filled_in_as_each_alone(position: str, side: Any, new_tokens: int) -> None:
    """In one step: several are shared out over the sequence that has the most masks."""
    model = filling(position=position)
    padding_side = None if new_tokens else side
    together = model.denoise(MASKED, steps=1, new_tokens=new_tokens, padding_side=padding_side)
    assert together == [model.denoise(text, steps=1, new_tokens=new_tokens) for text in MASKED]


def test_padding_is_left_alone_and_in_no_text() -> None:
    model = filling()
    for pad, special in ((PAD, ("mask", "pad")), (0, ("mask",))):
        model.set_tokenizer(word_tokenizer(*special))
        tokens = model.denoise(MASKED, return_type="tokens")
        assert tokens[1, 2:].tolist() == [pad] * 3 and MASK not in tokens[:, :2]
        texts = model.denoise(MASKED)
        assert [len(text.split()) for text in texts] == [5, 2]


def test_padding_that_is_the_mask_token_is_not_counted() -> None:
    model = filling(mask_token_id=PAD)
    trajectory = model.denoise([[1, 2, 3, 4, 5], [1, PAD]], return_type="trajectory")
    assert trajectory.tokens.shape[0] == 2  # before and after the one step that one mask takes
    assert trajectory.tokens[-1, 1, 2:].tolist() == [PAD] * 3


@pytest.mark.parametrize("steps", [None, 1, 2, 4])
def test_there_are_as_many_steps_as_masks_unless_told(steps: int | None) -> None:
    trajectory = filling().denoise([[1, MASK, MASK, MASK, 5, MASK]], steps=steps, return_type="trajectory")
    assert len(trajectory.tokens) - 1 == (4 if steps is None else steps)


def test_new_tokens_are_masks_after_the_text() -> None:
    model = filling()
    got = model.denoise("w1 w2", new_tokens=3, return_type="tokens")
    expected = mdm_interp.denoise(model, torch.tensor([[1, 2, MASK, MASK, MASK]]), steps=3).tokens[-1]
    assert torch.equal(got, expected)
    assert torch.equal(model.denoise([1, 2], new_tokens=3), expected)


def test_new_tokens_follow_the_shorter_text_at_once() -> None:
    got = filling().denoise([[1, 2, 3], [4]], new_tokens=2, return_type="tokens")
    assert got.shape == (2, 5) and got[1, :3].tolist() == [PAD, PAD, 4] and got[0, :3].tolist() == [1, 2, 3]
    aside = filling().denoise([[1, 2, 3], [4]], new_tokens=2, padding_side="right", return_type="tokens")
    assert aside[1, :3].tolist() == [4, PAD, PAD]


def test_options_are_those_of_denoise() -> None:
    model, tokens = filling(), torch.tensor([[1, MASK, MASK, MASK, 5]])
    each: list[dict[str, Any]] = [{"order": "random"}, {"order": "left_to_right"}, {"temperature": 1.0}]
    for options in each:
        ours = model.denoise(tokens, generator=seeded(3), return_type="trajectory", **options)
        theirs = mdm_interp.denoise(model, tokens, steps=3, generator=seeded(3), **options)
        assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.filled_at, theirs.filled_at)
    with pytest.raises(TypeError, match="warmth"):
        model.denoise(tokens, warmth=1.0)


def test_hooks_are_active_in_every_step_of_denoising() -> None:
    model, seen = filling(), []
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: seen.append(x.shape[1]))]):
        model.denoise("w1 <mask> <mask> <mask>")
    assert seen == [4, 4, 4]


def test_a_hook_that_forces_a_token_fills_it_in() -> None:
    model = forcing(*SPECIAL, attention="bidirectional", mask_token_id=MASK)

    def force(normalized: Tensor, hook: Any) -> Tensor:
        normalized[:] = 100.0 * torch.nn.functional.one_hot(torch.tensor(5), normalized.shape[-1])
        return normalized

    with model.hooks(fwd_hooks=[("ln_final.hook_normalized", force)]):
        assert model.denoise(MASKED) == ["w1 w5 w3 w5 w5", "w5 w8"]


def test_a_shifted_model_reads_one_position_before() -> None:
    model = forcing(*SPECIAL, attention="bidirectional", mask_token_id=MASK, readout_shift=-1)

    def count(normalized: Tensor, hook: Any) -> Tensor:
        places = torch.arange(normalized.shape[1])
        normalized[:] = 100.0 * torch.nn.functional.one_hot(places, normalized.shape[-1]).to(normalized)
        return normalized

    with model.hooks(fwd_hooks=[("ln_final.hook_normalized", count)]):
        assert model.denoise("w8 <mask> w8 <mask>") == "w8 w0 w8 w2"
    with refused("tokens: position 0 is masked, but has no prediction in a shifted model; give its token"):
        model.denoise("<mask> w1")


@pytest.mark.parametrize("return_type", ["input", "str", "tokens"])
def test_filled_in_is_as_given_or_as_asked(return_type: Any) -> None:
    model = filling()
    ids = model.denoise([[1, MASK, 3]])
    text = model.tokenizer.decode(ids[0], skip_special_tokens=True)
    for form, own in (("w1 <mask> w3", text), (["w1 <mask> w3"], [text]), (torch.tensor([1, MASK, 3]), ids)):
        got = model.denoise(form, return_type=return_type)
        expected = {"input": own, "str": text, "tokens": ids}[return_type]
        assert torch.equal(got, expected) if isinstance(expected, Tensor) else got == expected


def test_bos_is_prepended_before_filling_in() -> None:
    model = filling()
    got = model.denoise("w1 <mask>", prepend_bos=True, return_type="tokens")
    assert torch.equal(got, mdm_interp.denoise(model, torch.tensor([[BOS, 1, MASK]]), steps=1).tokens[-1])


def test_what_cannot_be_filled_in_is_refused(unchecked: None) -> None:
    message = "denoise: needs bidirectional attention and a mask_token_id; call generate of a causal model"
    for model in (writing(), writing(mask_token_id=MASK), filling(mask_token_id=None)):
        with refused(message):
            model.denoise("w1 <mask>")
    with refused("input: there is no mask token (12) to fill in; put one in, or give new_tokens"):
        filling().denoise("w1 w2")
    with refused("return_type: 'loss' is none of input, str, tokens; choose one"):
        filling().denoise("w1 <mask>", return_type="loss")  # type: ignore[arg-type]
    with refused("steps: 0 is too few; use at least 1"):
        filling().denoise("w1 <mask>", steps=0)


@settings(deadline=None, max_examples=25)
@given(
    ids=st.lists(st.integers(0, MASK), min_size=1, max_size=10),
    new=st.integers(0, 3),
    steps=st.none() | st.integers(1, 12),
)
def test_filling_in_changes_masks_and_nothing_else(ids: list[int], new: int, steps: int | None) -> None:
    model, whole = filling(), [*ids, *[MASK] * new]
    if MASK not in whole:
        with refused("input: there is no mask token (12) to fill in; put one in, or give new_tokens"):
            model.denoise(ids, new_tokens=new)
        return
    (filled,) = model.denoise(ids, new_tokens=new, steps=steps).tolist()
    assert len(filled) == len(whole) and MASK not in filled
    assert [got for got, old in zip(filled, whole, strict=True) if old != MASK] == [old for old in whole if old != MASK]
