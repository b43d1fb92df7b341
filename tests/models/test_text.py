"""Texts into token ids and back, and what a model computes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY_DEMO, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from text_helpers import BOS, EOS, MASK, PAD, SPECIAL, byte_tokenizer, refused, word_tokenizer
from torch.testing import assert_close

from mdm_interp.models.positions import POSITION_SCHEMES
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.training.text import make_tokenizer

close = partial(assert_close, atol=1e-5, rtol=1e-5)
TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w3 w8", "w5 w1 w1 w2"]
IDS = [[1, 2, 3, 4, 5, 6, 7], [3, 8], [5, 1, 1, 2]]
WORD_IDS = st.lists(st.integers(0, 12), min_size=1, max_size=12)


def reading(tokenizer: Any = None, **changes: Any) -> HookedTransformer:
    """A random model with a tokenizer; by default one of words, with a padding token."""
    model = random_model(**changes)
    model.set_tokenizer(word_tokenizer("eos", "pad") if tokenizer is None else tokenizer)
    return model


@cache
def model_of_words() -> HookedTransformer:
    return reading(word_tokenizer(*SPECIAL))


@cache
def model_of_bytes() -> HookedTransformer:
    return reading(byte_tokenizer(), d_vocab=301, n_ctx=64)


# ---- texts and ids into tokens


def test_one_text_is_a_batch_of_one() -> None:
    tokens = model_of_words().to_tokens("w1 w2 w3")
    assert tokens.dtype == torch.int64 and tokens.tolist() == [[1, 2, 3]]


def test_texts_of_one_length_are_a_batch_without_a_mask() -> None:
    tokens, mask = model_of_words().to_tokens_and_mask(["w1 w2", "w3 w4"])
    assert tokens.tolist() == [[1, 2], [3, 4]] and mask is None


@pytest.mark.parametrize(
    "ids",
    [
        [4, 0, 2],
        (4, 0, 2),
        [np.int64(4), np.int64(0), np.int64(2)],
        list(torch.tensor([4, 0, 2])),
        torch.tensor([4, 0, 2]),
        torch.tensor([[4, 0, 2]]),
        np.array([4, 0, 2]),
        np.array([[4, 0, 2]]),
        [[4, 0, 2]],
        ((4, 0, 2),),
        [torch.tensor([4, 0, 2])],
        [np.array([4, 0, 2])],
        ["w4 w0 w2"],
        np.array(["w4 w0 w2"]),
        np.array(["w4 w0 w2"], dtype=object),
        "w4 w0 w2",
    ],
    ids=repr,
)
def test_ids_and_texts_are_read_in_every_form(unchecked: None, ids: Any) -> None:
    model = model_of_words()
    tokens, mask = model.to_tokens_and_mask(ids)
    assert tokens.dtype == torch.int64 and tokens.tolist() == [[4, 0, 2]] and mask is None
    assert torch.equal(model(ids), model(torch.tensor([[4, 0, 2]])))


def test_a_single_id_is_a_sequence_of_one() -> None:
    assert model_of_words().to_tokens(torch.tensor(7)).tolist() == [[7]]


def test_a_batch_of_tensors_passes_through_as_it_is() -> None:
    tokens = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    assert model_of_words().to_tokens(tokens) is tokens


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "input: an empty list; give at least one text or sequence of token ids"),
        ((), "input: an empty list; give at least one text or sequence of token ids"),
        *(
            (
                given,
                f"input: {shown} is neither texts nor sequences of token ids; give several of one kind, ids as whole "
                "numbers",
            )
            for given, shown in (
                ([[0.5, 2.0]], "[[0.5, 2.0]]"),
                ([0.5, 2.0], "[0.5, 2.0]"),
                ([torch.tensor([0.5])], "[tensor([0.5000])]"),
                ([[1, 2], "w1"], "[[1, 2], 'w1']"),
                (["w1", [1, 2]], "['w1', [1, 2]]"),
                ([[[1, 2]]], "[[[1, 2]]]"),
                ([None], "[None]"),
            )
        ),
    ],
)
def test_what_is_neither_text_nor_ids_is_refused(unchecked: None, given: Any, message: str) -> None:
    with refused(message):
        model_of_words().to_tokens(given)


@pytest.mark.parametrize("ids", [[1, 13], [1, -1], [[1, 13]], torch.tensor([1, 13])])
def test_an_id_outside_the_vocabulary_is_refused_when_the_model_runs(ids: Any) -> None:
    wrong = 13 if 13 in np.ravel(ids) else -1
    with refused(
        f"tokens: id {wrong} at [0, 1] is outside the vocabulary of 13 (d_vocab); correct it, or use the model's own "
        "tokenizer"
    ):
        model_of_words()(ids)


def test_ids_go_where_the_model_is_unless_they_should_not() -> None:
    model = reading().to("meta")
    for form in ("w1 w2", [1, 2], torch.tensor([1, 2])):
        assert model.to_tokens(form).is_meta
        assert model.to_tokens(form, move_to_device=False).tolist() == [[1, 2]]
    tokens, mask = model.to_tokens_and_mask(["w1", "w1 w2"])
    assert tokens.is_meta and mask is not None and mask.is_meta


@pytest.mark.parametrize(
    "given", ["w1 w2 w3 w4 w5", [1, 2, 3, 4, 5], torch.tensor([1, 2, 3, 4, 5]), ["w1 w2 w3 w4 w5", "w1 w2 w3"]]
)
def test_what_is_too_long_is_cut_if_asked_and_refused_by_the_model_otherwise(given: Any) -> None:
    model = reading(n_ctx=3)
    assert model.to_tokens(given, truncate=True).tolist()[0] == [1, 2, 3]
    assert model.to_tokens_and_mask(given)[0].shape[1] == 5
    with refused("tokens: 5 positions exceed n_ctx 3; shorten them or raise n_ctx"):
        model(given)


def test_bos_counts_toward_the_length_that_is_cut() -> None:
    model = reading(word_tokenizer("bos"), n_ctx=3)
    assert model.to_tokens("w1 w2 w3", prepend_bos=True, truncate=True).tolist() == [[BOS, 1, 2]]


def test_texts_cut_to_one_length_need_no_mask() -> None:
    tokens, mask = reading(n_ctx=2).to_tokens_and_mask(TEXTS, truncate=True)
    assert tokens.tolist() == [[1, 2], [3, 8], [5, 1]] and mask is None


# ---- BOS


@pytest.mark.parametrize("prepend_bos", [True, False, None])
@pytest.mark.parametrize("default", [True, False, None])
@pytest.mark.parametrize("prepends", [True, False])
@pytest.mark.parametrize("written", ["", "<s> ", "<s> <s> "])
def test_bos_is_as_asked_and_never_doubled(
    prepend_bos: bool | None, default: bool | None, prepends: bool, written: str
) -> None:
    model = reading(word_tokenizer("bos", prepends=prepends), default_prepend_bos=default)
    asked, own = default if prepend_bos is None else prepend_bos, written.count("<s>")
    if asked is None:  # what the tokenizer does
        expected = own + prepends
    elif asked:
        expected = own + prepends if prepends else max(own, 1)
    else:  # what is written, and no other
        expected = own
    assert model.to_tokens(f"{written}w1 w2", prepend_bos).tolist() == [[BOS] * expected + [1, 2]]


@pytest.mark.parametrize("default", [True, False, None])
def test_without_a_bos_token_the_default_changes_nothing_and_asking_for_one_is_refused(default: bool | None) -> None:
    model = reading(word_tokenizer("pad"), default_prepend_bos=default)
    assert model.to_tokens("w1 w2").tolist() == model.to_tokens("w1 w2", False).tolist() == [[1, 2]]
    with refused("prepend_bos: this model's tokenizer has no BOS token; leave prepend_bos out, or give False"):
        model.to_tokens("w1 w2", True)


def test_ids_never_get_a_bos() -> None:
    model = reading(word_tokenizer("bos"), default_prepend_bos=True)
    assert model.to_tokens([1, 2]).tolist() == model.to_tokens(torch.tensor([1, 2]), True).tolist() == [[1, 2]]


def test_every_method_that_takes_texts_takes_prepend_bos() -> None:
    model, ids = reading(word_tokenizer("bos")), [BOS, 1, 2]
    assert torch.equal(model("w1 w2", prepend_bos=True), model(ids))
    assert model.to_str_tokens("w1 w2", prepend_bos=True) == ["<s>", "w1", "w2"]
    assert model.to_str_tokens(["w1 w2", "w3"], prepend_bos=True) == [["<s>", "w1", "w2"], ["<s>", "w3"]]
    assert model.get_token_position("w2", "w1 w2", prepend_bos=True) == 2
    assert model.input_to_embed("w1 w2", prepend_bos=True).tokens.tolist() == [ids]


# ---- padding


@pytest.mark.parametrize("asked", ["left", "right", None])
@pytest.mark.parametrize("default", ["left", "right", None])
@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_padded_where_asked_else_where_the_tokenizer_does(asked: Any, default: Any, side: str) -> None:
    model = random_model()
    model.set_tokenizer(word_tokenizer("pad", side=side), default)
    tokens, mask = model.to_tokens_and_mask(["w1 w2 w3", "w4"], padding_side=asked)
    assert mask is not None
    if (asked or default or side) == "left":
        assert tokens.tolist() == [[1, 2, 3], [PAD, PAD, 4]] and mask.tolist() == [[True] * 3, [False, False, True]]
    else:
        assert tokens.tolist() == [[1, 2, 3], [4, PAD, PAD]] and mask.tolist() == [[True] * 3, [True, False, False]]


def test_the_default_padding_side_is_given_to_the_constructor_too() -> None:
    model = HookedTransformer(random_model().cfg, word_tokenizer("pad"), default_padding_side="left")
    assert model.to_tokens_and_mask(["w1", "w1 w2"])[0].tolist() == [[PAD, 1], [1, 2]]


def test_ids_of_unequal_length_are_padded_on_the_right_unless_asked() -> None:
    model = reading(word_tokenizer("pad", side="left"))
    tokens, mask = model.to_tokens_and_mask([[1, 2], [3]])
    assert tokens.tolist() == [[1, 2], [3, PAD]] and mask is not None and mask.tolist() == [[True, True], [True, False]]
    assert model.to_tokens_and_mask([[1, 2], [3]], padding_side="left")[0].tolist() == [[1, 2], [PAD, 3]]


@pytest.mark.parametrize(("special", "pad"), [(("eos", "pad"), PAD), (("eos",), EOS), ((), 0)])
def test_padding_is_the_pad_token_else_the_end_token_else_whatever(special: tuple[str, ...], pad: int) -> None:
    tokens, mask = reading(word_tokenizer(*special)).to_tokens_and_mask(["w1 w2", "w3"])
    assert tokens.tolist() == [[1, 2], [3, pad]] and mask is not None


def test_ids_need_no_tokenizer_to_be_padded() -> None:
    tokens, mask = random_model().to_tokens_and_mask([[1, 2], [3]])
    assert tokens.tolist() == [[1, 2], [3, 0]] and mask is not None


def test_another_side_is_refused(unchecked: None) -> None:
    with refused("padding_side: 'both' is none of left, right; choose one"):
        model_of_words().to_tokens(TEXTS, padding_side="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("texts", [TEXTS, IDS, [torch.tensor(row) for row in IDS]], ids=["texts", "lists", "tensors"])
@pytest.mark.parametrize("position", list(POSITION_SCHEMES))
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_each_text_alone(position: str, attention: str, side: Any, texts: list[Any]) -> None:
    model = reading(position=position, attention=attention, n_key_value_heads=2, d_mlp=24)
    with torch.no_grad():
        logits = model(texts, padding_side=side)
        resid = model(texts, padding_side=side, stop_at_layer=1)
        _, mask = model.to_tokens_and_mask(texts, padding_side=side)
        assert mask is not None
        for row, ids in enumerate(IDS):
            close(logits[row, mask[row]], model([ids])[0])
            close(resid[row, mask[row]], model([ids], stop_at_layer=1)[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_padded_texts_is_that_of_their_tokens(side: Any) -> None:
    model = reading(attention="causal")
    with torch.no_grad():
        alone = [model(text, return_type="loss", loss_per_token=True)[0] for text in TEXTS]
        close(model(TEXTS, return_type="loss", padding_side=side), torch.cat(alone).mean())
        each = model(TEXTS, return_type="loss", padding_side=side, loss_per_token=True)
        close(each[each != 0].sort().values, torch.cat(alone).sort().values)


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(WORD_IDS, min_size=1, max_size=4), side=st.sampled_from(["left", "right"]))
def test_a_batch_holds_every_sequence_once_and_padding_elsewhere(rows: list[list[int]], side: Any) -> None:
    model = model_of_words()
    texts = [" ".join(f"w{id % 9}" for id in row) for row in rows]
    for form in (texts, [[id % 9 for id in row] for row in rows]):
        tokens, mask = model.to_tokens_and_mask(form, padding_side=side)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        assert tokens.shape == mask.shape == (len(rows), max(map(len, rows)))
        assert [tokens[i, mask[i]].tolist() for i in range(len(rows))] == [[id % 9 for id in row] for row in rows]
        assert (tokens[~mask] == PAD).all()
        changes = (mask[:, 1:] != mask[:, :-1]).sum(1)
        assert (changes <= 1).all() and mask[:, -1 if side == "left" else 0].all()


@pytest.mark.parametrize(
    ("attention", "side", "warned"),
    [
        ("bidirectional", "left", True),
        ("bidirectional", "right", True),
        ("causal", "left", True),
        ("causal", "right", False),
    ],
)
def test_to_tokens_warns_of_padding_that_the_model_would_read(attention: str, side: Any, warned: bool) -> None:
    model = reading(attention=attention)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = model.to_tokens(TEXTS, padding_side=side)
    assert [(one.category, str(one.message)) for one in caught] == [
        (
            UserWarning,
            "texts of unequal length were padded, and their padding is read like other tokens unless the model is "
            "given attention_mask (to_tokens_and_mask returns it) or the texts themselves",
        )
    ] * warned
    with torch.no_grad():
        given_ids, given_texts = model(tokens), model(TEXTS, padding_side=side)
    _, mask = model.to_tokens_and_mask(TEXTS, padding_side=side)
    assert mask is not None
    assert warned == bool((given_ids - given_texts)[mask].abs().max() > 1e-3)  # it tells the truth


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_to_tokens_does_not_warn_where_nothing_was_padded(attention: str) -> None:
    model = reading(attention=attention)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in ("w1 w2", ["w1 w2", "w3 w4"], [[1, 2], [3, 4]]):
            model.to_tokens(given)
        model.to_tokens_and_mask(TEXTS)
        model(TEXTS)


def test_a_mask_that_is_given_counts_in_place_of_what_was_found() -> None:
    model, mask = reading(), torch.ones(3, 7, dtype=torch.bool)
    tokens, _ = model.to_tokens_and_mask(TEXTS)
    assert torch.equal(model(TEXTS, attention_mask=mask), model(tokens))


def test_a_cache_of_texts_is_that_of_their_ids() -> None:
    model = model_of_words()
    tokens, mask = model.to_tokens_and_mask(TEXTS)
    (logits, cache), (expected, other) = model.run_with_cache(TEXTS), model.run_with_cache(tokens, attention_mask=mask)
    assert torch.equal(logits, expected) and cache.keys() == other.keys()
    assert all(torch.equal(cache[name], other[name]) for name in other)


# ---- tokens into texts


def test_ids_into_texts_in_every_form() -> None:
    model = model_of_words()
    for one in (4, torch.tensor(4), torch.tensor([4]), [4], np.array([4])):
        assert model.to_string(one) == "w4"
    for sequence in ([1, 2], (1, 2), torch.tensor([1, 2]), np.array([1, 2]), list(torch.tensor([1, 2]))):
        assert model.to_string(sequence) == "w1 w2"
    for several in ([[1, 2], [3]], [torch.tensor([1, 2]), torch.tensor([3])], [np.array([1, 2]), np.array([3])]):
        assert model.to_string(several) == ["w1 w2", "w3"]
    for batch in (torch.tensor([[1, 2]]), np.array([[1, 2]]), [[1, 2]]):
        assert model.to_string(batch) == ["w1 w2"]
    assert model.to_string([]) == ""


def test_special_tokens_are_written() -> None:
    assert model_of_words().to_string([BOS, 1, MASK, PAD]) == "<s> w1 <mask> <pad>"


def test_every_token_of_a_sequence_into_text() -> None:
    model = model_of_words()
    for one in ("w1 w2", [1, 2], torch.tensor([1, 2]), torch.tensor([[1, 2]]), np.array([1, 2])):
        assert model.to_str_tokens(one) == ["w1", "w2"]
    for several in (["w1 w2", "w3"], [[1, 2], [3]], [torch.tensor([1, 2]), torch.tensor([3])]):
        assert model.to_str_tokens(several) == [["w1", "w2"], ["w3"]]  # without padding
    assert model.to_str_tokens(["w1 w2"]) == [["w1", "w2"]]
    with refused("input: 2 sequences, expected one; call to_str_tokens for each of them"):
        model.to_str_tokens(torch.tensor([[1, 2], [3, 4]]))
    assert model.to_single_str_token(7) == "w7"


@settings(deadline=None, max_examples=50)
@given(ids=WORD_IDS)
def test_ids_come_back_from_their_text(ids: list[int]) -> None:
    model = model_of_words()
    pieces = model.to_str_tokens(ids)
    assert all(isinstance(piece, str) for piece in pieces)
    assert model.to_string(ids) == " ".join(map(str, pieces))
    assert model.to_tokens(str(model.to_string(ids))).tolist() == [ids]
    assert [model.to_single_token(str(piece)) for piece in pieces] == ids
    assert [model.to_single_str_token(id) for id in ids] == pieces


@settings(deadline=None, max_examples=100)
@given(text=st.text(min_size=1, max_size=20))
def test_a_text_comes_back_from_its_bytes(text: str) -> None:
    model = model_of_bytes()
    tokens = model.to_tokens(text)
    assert model.to_string(tokens[0]) == text and model.to_string(tokens) == [text]


@settings(deadline=None, max_examples=100)
@given(text=st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=40))
def test_the_tokens_of_an_ascii_text_join_to_it(text: str) -> None:
    model = model_of_bytes()
    pieces = model.to_str_tokens(text)
    assert "".join(map(str, pieces)) == text and len(pieces) == model.to_tokens(text).shape[1]


def test_spaces_before_punctuation_are_kept() -> None:
    """Which transformers' decoding cleans up for some tokenizers unless told not to."""
    tokenizer = word_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.add_tokens(["."])
    model = reading(tokenizer, d_vocab=14)
    assert model.to_string([1, 13]) == "w1 ."
    assert model.to_string([[1, 13]]) == ["w1 ."]


# ---- single tokens and where they are


def test_a_word_of_several_tokens_or_none_is_no_single_token() -> None:
    model = model_of_words()
    assert model.to_single_token("w4") == 4
    for text, count in (("w4 w5", 2), ("", 0)):
        with refused(f"text: {text!r} is {count} tokens, expected one; choose another word"):
            model.to_single_token(text)


def test_a_single_token_is_without_the_bos_that_the_tokenizer_prepends() -> None:
    model = reading(word_tokenizer("bos", prepends=True), default_prepend_bos=True)
    assert model.to_single_token("w4") == 4
    assert model.get_token_position("w4", "w1 w4") == 2


@pytest.mark.parametrize(
    "given",
    ["w3 w1 w3 w2", [3, 1, 3, 2], torch.tensor([3, 1, 3, 2]), torch.tensor([[3, 1, 3, 2]]), np.array([3, 1, 3, 2])],
)
@pytest.mark.parametrize("token", ["w3", 3])
def test_a_token_is_found_first_or_last(given: Any, token: str | int) -> None:
    model = model_of_words()
    assert model.get_token_position(token, given) == 0
    assert model.get_token_position(token, given, "last") == model.get_token_position(token, given, mode="last") == 2


@settings(deadline=None, max_examples=50)
@given(ids=WORD_IDS, data=st.data())
def test_a_found_token_is_there_and_nowhere_before_or_after(ids: list[int], data: st.DataObject) -> None:
    token = data.draw(st.sampled_from(ids))
    assert model_of_words().get_token_position(token, ids) == ids.index(token)
    assert model_of_words().get_token_position(token, ids, "last") == len(ids) - 1 - ids[::-1].index(token)


def test_a_token_that_is_not_there_is_refused(unchecked: None) -> None:
    model = model_of_words()
    with refused("input: 'w5' is not in it; look for a token that the sequence has"):
        model.get_token_position("w5", "w1 w2")
    with refused("input: 5 is not in it; look for a token that the sequence has"):
        model.get_token_position(5, [1, 2])
    with refused("input: 2 sequences, expected one; look for a token that the sequence has"):
        model.get_token_position("w1", torch.tensor([[1, 2], [1, 2]]))
    with refused("mode: 'second' is none of first, last; choose one"):
        model.get_token_position("w1", "w1", mode="second")  # type: ignore[arg-type]


# ---- directions of tokens


@pytest.mark.parametrize("norm", ["RMS", "LN", None])
@pytest.mark.parametrize("tied", [True, False])
def test_a_tokens_direction_gives_its_logit(norm: str | None, tied: bool) -> None:
    model = reading(normalization_type=norm, tie_word_embeddings=tied)
    hook = "blocks.1.hook_resid_post" if norm is None else "ln_final.hook_normalized"
    logits, cache = model.run_with_cache([1, 2, 3], names_filter=hook)
    bias = model.get_parameter("ln_final.b") @ model.W_U if norm == "LN" else torch.zeros(13)
    close(cache[hook][0] @ model.tokens_to_residual_directions("w7") + bias[7], logits[0, :, 7])
    close(cache[hook][0] @ model.tokens_to_residual_directions(torch.arange(13)).T + bias, logits[0])


@pytest.mark.parametrize(
    ("tokens", "shape"),
    [
        *((single, ()) for single in ("w3", 3, torch.tensor(3), torch.tensor([3]), torch.tensor([[3]]))),
        (torch.tensor([3, 4]), (2,)),
        (torch.zeros(2, 3, dtype=torch.long), (2, 3)),
        (torch.zeros(0, dtype=torch.long), (0,)),
    ],
)
def test_directions_have_the_shape_of_their_tokens_and_a_single_one_is_alone(
    tokens: Any, shape: tuple[int, ...]
) -> None:
    model = reading(dtype="bfloat16")
    directions = model.tokens_to_residual_directions(tokens)
    assert directions.shape == (*shape, 16) and directions.dtype == torch.bfloat16
    if isinstance(tokens, (str, int)):
        assert torch.equal(directions, model.tokens_to_residual_directions(torch.tensor(3)))


def test_directions_of_no_token_are_refused() -> None:
    with refused("text: 'w1 w2' is 2 tokens, expected one; choose another word"):
        model_of_words().tokens_to_residual_directions("w1 w2")
    with refused(
        "tokens: id 13 at [] is outside the vocabulary of 13 (d_vocab); correct it, or use the model's own tokenizer"
    ):
        model_of_words().tokens_to_residual_directions(13)


# ---- the tokenizer itself


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused() -> None:
    model = random_model()
    with refused(
        "tokenizer: it has 301 tokens, and the model's vocabulary 13 (d_vocab); give the tokenizer of these weights"
    ):
        model.set_tokenizer(byte_tokenizer())
    assert model.tokenizer is None
    model.set_tokenizer(word_tokenizer())
    model.set_tokenizer(None)
    assert model.tokenizer is None


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (lambda model: model("w1"), "input: 'w1'"),
        (lambda model: model.to_tokens(["w1", "w2"]), "input: ['w1', 'w2']"),
        (lambda model: model.to_tokens_and_mask("x" * 100), "input: '" + "x" * 79),
        (lambda model: model.to_string([1, 2]), "tokens: [1, 2]"),
        (lambda model: model.to_str_tokens([1, 2]), "input: [1, 2]"),
        (lambda model: model.to_single_token("w1"), "text: 'w1'"),
        (lambda model: model.to_single_str_token(1), "int_token: 1"),
        (lambda model: model.get_token_position("w1", [1]), "text: 'w1'"),
        (lambda model: model.tokens_to_residual_directions("w1"), "text: 'w1'"),
        (lambda model: model.run_with_cache("w1"), "input: 'w1'"),
    ],
)
def test_texts_need_a_tokenizer(ask: Callable[[HookedTransformer], Any], what: str) -> None:
    with refused(f"{what} needs a tokenizer, and this model has none; give token ids, or call set_tokenizer first"):
        ask(random_model())
    assert random_model().get_token_position(2, [1, 2]) == 1  # which needs none


def test_the_demos_tokenizer_is_taken_as_it_is() -> None:
    """Byte-level as Qwen2's, without a BOS, padded with its end token, and a mask."""
    sentence = "Anna's mother is Bea."
    tokenizer = make_tokenizer([sentence], TINY_DEMO)
    model = reading(tokenizer, d_vocab=320, n_ctx=32)
    assert "".join(map(str, model.to_str_tokens(sentence))) == model.to_string(model.to_tokens(sentence)[0]) == sentence
    masked = model.to_tokens(f"Anna's mother is{tokenizer.mask_token}.")
    assert masked.flatten().tolist().count(tokenizer.mask_token_id) == 1
    tokens, mask = model.to_tokens_and_mask([sentence, "Anna"])
    assert mask is not None and all(pad == tokenizer.eos_token_id for pad in tokens[~mask].tolist())
    with refused("prepend_bos: this model's tokenizer has no BOS token; leave prepend_bos out, or give False"):
        model.to_tokens(sentence, prepend_bos=True)
