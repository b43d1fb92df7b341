"""Tokenizers read from their files alone: against transformers' own classes, and what is wrong with the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_helpers import (
    FORMATS,
    N_BPE,
    SENTENCES,
    SPECIAL_TOKENS,
    VOCAB,
    train_bpe,
    write_checkpoint,
    write_json,
    write_tokenizer,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from mdm_interp.checkpoints import load_checkpoint, save_checkpoint
from mdm_interp.errors import UserError

TEXTS = [
    *SENTENCES,
    "",
    "  two  spaces\n\nand lines\t",
    "e\u0301 is normalised, ﬁ is not",
    "שלום 👩‍👩‍👧 12345 don't DON'T",
    "<|endoftext|>a<|mask|> b<|mdm_mask|>.<|im_start|>",
]


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))


def assert_same_tokenizers(first: PreTrainedTokenizerFast, second: PreTrainedTokenizerFast) -> None:
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert first.special_tokens_map == second.special_tokens_map
    assert first.all_special_ids == second.all_special_ids
    assert (first.chat_template, first.model_max_length) == (second.chat_template, second.model_max_length)


@pytest.fixture(scope="module")
def dream(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedTokenizerFast, Qwen2Tokenizer]:
    """Dream's tokenizer as loaded here, and transformers' Qwen2 tokenizer from the same files."""
    folder = tmp_path_factory.mktemp("dream")
    write_checkpoint(folder, "dream", tokenizer=True)
    loaded = load_checkpoint(folder).tokenizer
    return loaded, Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.sampled_from(TEXTS) | st.text() | st.text(alphabet="aeT mothercruise's.<|>\n1é"))
def test_dreams_is_transformers_qwen2(dream: tuple[PreTrainedTokenizerFast, Qwen2Tokenizer], text: str) -> None:
    ours, theirs = dream
    mine = ours(text, return_offsets_mapping=True)
    assert mine["input_ids"] == theirs(text)["input_ids"]
    assert mine["offset_mapping"] == theirs(text, return_offsets_mapping=True)["offset_mapping"]
    assert ours.decode(mine["input_ids"]) == theirs.decode(mine["input_ids"])


def test_dreams_special_tokens(dream: tuple[PreTrainedTokenizerFast, Qwen2Tokenizer]) -> None:
    ours, theirs = dream
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.mask_token, ours.mask_token_id) == ("<|mask|>", N_BPE + 4)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|beginoftext|>", "<|endoftext|>", "<|endoftext|>")
    assert set(ours.all_special_tokens) == set(SPECIAL_TOKENS["dream"])
    assert ours.decode(ours("a<|mask|>b")["input_ids"], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize("format", ["llada", "llama", "qwen2"])
def test_tokenizer_json_gives_the_ids_that_transformers_gives(format: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, format, tokenizer=True)
    ours, theirs = load_checkpoint(tmp_path).tokenizer, AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert (ours("Tom")["input_ids"][0] == N_BPE) == (format == "llama")  # Llama begins with its BOS


@pytest.mark.parametrize("format", FORMATS)
def test_tokenizers_round_trip(format: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "first", format, tokenizer=True)
    settings = settings_of(tmp_path / "first") | {"chat_template": "{{ messages }}"}
    write_json(tmp_path / "first" / "tokenizer_config.json", settings)
    model = load_checkpoint(tmp_path / "first")
    save_checkpoint(model, tmp_path / "second", format)
    assert (tmp_path / "second" / "vocab.json").exists() == (format == "dream")
    assert (tmp_path / "second" / "tokenizer.json").exists() == (format != "dream")
    assert_same_tokenizers(load_checkpoint(tmp_path / "second").tokenizer, model.tokenizer)


@pytest.mark.parametrize("to", ["llada", "mdm_interp"])
def test_a_tokenizer_goes_into_other_formats_too(to: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "first", "llada", tokenizer=True)
    model = load_checkpoint(tmp_path / "first")
    save_checkpoint(model, tmp_path / "second", to)
    assert_same_tokenizers(load_checkpoint(tmp_path / "second").tokenizer, model.tokenizer)


@pytest.mark.parametrize("kind", ["other regex", "word level", "post-processor"])
def test_a_tokenizer_that_is_not_qwen2s_stays_whole_in_dreams_format(kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "first", "dream")
    model = load_checkpoint(tmp_path / "first")
    if kind == "word level":
        backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(N_BPE)}, unk_token="w0"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        backend = train_bpe(qwen2=kind != "other regex")
    backend.add_special_tokens(SPECIAL_TOKENS["dream"])
    if kind == "post-processor":
        backend.post_processor = Tokenizer.from_file(str(_llama(tmp_path))).post_processor
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, mask_token="<|mask|>", eos_token="<|endoftext|>"
    )
    save_checkpoint(model, tmp_path / "second", "dream")
    assert (tmp_path / "second" / "tokenizer.json").exists()
    assert not (tmp_path / "second" / "vocab.json").exists()
    again = load_checkpoint(tmp_path / "second").tokenizer
    for text in (*TEXTS, "w1 w2 w7"):
        assert again(text)["input_ids"] == model.tokenizer(text)["input_ids"]


def _llama(folder: Path) -> Path:
    (folder / "llama").mkdir()
    write_tokenizer(folder / "llama", "llama")
    return folder / "llama" / "tokenizer.json"


# ---- the mask


def test_lladas_mask_is_registered_where_the_vocabulary_lacks_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada", mask_token_id=N_BPE + 2, pad_token_id=N_BPE + 1)
    write_tokenizer(tmp_path, "llada", special=SPECIAL_TOKENS["llada"][:2])
    tokenizer = load_checkpoint(tmp_path).tokenizer
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mdm_mask|>", N_BPE + 2)
    assert tokenizer("a<|mdm_mask|>")["input_ids"][-1] == N_BPE + 2


@pytest.mark.parametrize(
    ("mask_token_id", "special", "message"),
    [
        (N_BPE + 9, SPECIAL_TOKENS["llada"], f"mask_token_id is {N_BPE + 9}, but the tokenizer has no such id"),
        (N_BPE + 9, SPECIAL_TOKENS["llada"][:2], f"and its mask '<|mdm_mask|>' at {N_BPE + 2}"),
        (7, SPECIAL_TOKENS["llada"], "mask_token_id is 7, but the tokenizer has '.+' there and its mask None"),
    ],
)  # fmt: skip
def test_a_mask_that_is_not_where_config_json_has_it_is_refused(
    mask_token_id: int, special: list[str], message: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, "llada", mask_token_id=mask_token_id)
    write_tokenizer(tmp_path, "llada", special=special)
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        load_checkpoint(tmp_path)


def test_dreams_mask_at_another_id_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "dream", tokenizer=True, mask_token_id=N_BPE + 3)
    with pytest.raises(UserError, match=rf"mask_token_id is {N_BPE + 3}, .*'<\|mask\|>' at {N_BPE + 4}"):
        load_checkpoint(tmp_path)


def test_padding_comes_from_config_json_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada", tokenizer=True)
    kept = {name: value for name, value in settings_of(tmp_path).items() if name != "pad_token"}
    write_json(tmp_path / "tokenizer_config.json", kept)
    assert load_checkpoint(tmp_path).tokenizer.pad_token_id == N_BPE + 1


# ---- old and damaged files


def test_old_files_give_the_same_tokenizer(tmp_path: Path) -> None:
    """Added tokens used to be in added_tokens.json, special ones in special_tokens_map.json."""
    write_checkpoint(tmp_path, "dream", tokenizer=True)
    new = load_checkpoint(tmp_path).tokenizer
    settings = settings_of(tmp_path)
    del settings["added_tokens_decoder"]
    names = ("bos_token", "eos_token", "pad_token", "mask_token", "additional_special_tokens")
    special = {name: settings.pop(name) for name in names}
    special["mask_token"] = {"content": special["mask_token"], "lstrip": False, "normalized": False}
    write_json(tmp_path / "tokenizer_config.json", settings)
    write_json(tmp_path / "special_tokens_map.json", special)
    assert_same_tokenizers(load_checkpoint(tmp_path).tokenizer, new)


def test_a_folder_without_a_tokenizers_files_has_none(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen2")
    model = load_checkpoint(tmp_path)
    assert model.tokenizer is None
    with pytest.raises(UserError, match="needs a tokenizer"):
        model.to_tokens("Tom")


def test_only_merges_or_only_a_vocabulary_are_no_tokenizer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "dream", tokenizer=True)
    (tmp_path / "merges.txt").unlink()
    assert load_checkpoint(tmp_path).tokenizer is None


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", "{", "vocab.json: cannot be read as JSON"),
        ("vocab.json", '{"a": 0}', "the tokenizer cannot be read"),
        ("merges.txt", "a b c\n", "the tokenizer cannot be read"),
        ("tokenizer.json", "{}", "the tokenizer cannot be read"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json: expected a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"300": {"text": "x"}}}', "do not fit together"),
        ("tokenizer_config.json", '{"mask_token": {"text": "x"}}', "do not fit together"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"305": {"content": "<x>"}}}',
            "added token '<x>' has id 305 in its file, but 300 in the vocabulary",
        ),
    ],
)
def test_damaged_files_give_one_clear_error(file: str, content: str, message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "dream", tokenizer=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        load_checkpoint(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen2", vocab_size=N_BPE + 1)
    write_tokenizer(tmp_path, "qwen2")
    with pytest.raises(UserError, match=f"ids up to {N_BPE + 2}, but the embedding {N_BPE + 1} rows"):
        load_checkpoint(tmp_path)
    assert N_BPE + 2 < VOCAB


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "first", "qwen2")
    model = load_checkpoint(tmp_path / "first")
    model.tokenizer = str.split
    with pytest.raises(UserError, match=r"model\.tokenizer: method_descriptor is no PreTrainedTokenizerFast"):
        save_checkpoint(model, tmp_path / "second", "qwen2")
    assert not (tmp_path / "second").exists()


def test_a_tokenizer_of_another_transformers_class_is_saved(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "first", "qwen2")
    model = load_checkpoint(tmp_path / "first")
    model.tokenizer = BertTokenizer(vocab={"[UNK]": 0, "[SEP]": 1, "[PAD]": 2, "[CLS]": 3, "[MASK]": 4, "tom": 5})
    save_checkpoint(model, tmp_path / "second", "qwen2")
    again = load_checkpoint(tmp_path / "second", attention="causal")  # its [MASK] would be a sign of another use
    assert again.tokenizer("Tom")["input_ids"] == model.tokenizer("Tom")["input_ids"]
