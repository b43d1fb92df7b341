"""Natural-language facts: what is asked, where the spans are, and what is refused or skipped."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from stranger_helpers import outcome_of
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mdm_interp.config import ModelConfig
from mdm_interp.data.prompts import (
    PARENT_CHILD,
    FactTemplates,
    Prompts,
    Template,
    load_facts,
    make_prompts,
    render,
    right_answers,
)
from mdm_interp.data.queries import Query, batches, require_shared
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import predict

RELEASED = Path(__file__).parents[2].parent / "shared" / "data" / "parent_child_pairs.csv"
MASK = "<|mask|>"
NAMES = ["Anna Berg", "Bea Clark-Jones", "Carl O'Neill", "José Muñoz", "Dora", "Emil Anna", "Fay de la Cruz", "Gus"]
KINDS = ("positional", "relational")
SIMPLE = FactTemplates(entities=("child", "parent"), templates=PARENT_CHILD.templates[:1])


def corpus() -> list[str]:
    sentences = [s for template in PARENT_CHILD.templates for s in (template.forward, template.reverse)]
    return [
        render(sentence, {"child": child, "parent": parent, "parent_type": "mother"})[0]
        for sentence in sentences
        for child, parent in itertools.pairwise(NAMES)
    ]


def wrapped(tokenizer: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    fast.add_special_tokens({"mask_token": MASK})
    return fast


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return wrapped(tokenizer)


@functools.cache
def metaspace() -> PreTrainedTokenizerFast:
    """As SentencePiece models have it: an underscore for a space, one added in front, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return wrapped(tokenizer, unk_token="<unk>")


@functools.cache
def word_level() -> PreTrainedTokenizerFast:
    """Whole words in lower case, a beginning and an end of the sequence, and one token for all unknown words."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(corpus(), trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"]))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return wrapped(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"byte_level": byte_level, "metaspace": metaspace, "word_level": word_level}


def model_config(tokenizer: Any, **changes: Any) -> ModelConfig:
    fields = {"d_model": 16, "n_heads": 2, "n_layers": 2, "n_ctx": 160, "d_vocab": len(tokenizer)}
    return ModelConfig(**{**fields, "mask_token_id": tokenizer.mask_token_id, **changes})


def arm_config(tokenizer: Any) -> ModelConfig:
    return model_config(tokenizer, attention="causal", mask_token_id=None)


def write(folder: Path, *rows: str, header: str = "child,parent,parent_type", name: str = "facts.csv") -> Path:
    path = folder / name
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def prompts_of(path: Path, tokenizer: Any, kind: Any = "positional", **changes: Any) -> Prompts:
    return make_prompts(load_facts(path, SIMPLE), tokenizer, model_config(tokenizer, **changes), kind)


def shown(tokenizer: Any, query: Query) -> str:
    """The query as text, each mask as `_`."""
    return tokenizer.decode(query.tokens).replace(MASK, "_").strip()


def text_of(tokenizer: Any, tokens: tuple[int, ...]) -> str:
    return tokenizer.decode(tokens).strip()


# ---- what is asked


@pytest.fixture
def one_fact(tmp_path: Path) -> Path:
    return write(tmp_path, "Dora,Gus,father")


def test_positional_pairs_swap_the_sides_in_the_same_words(one_fact: Path) -> None:
    tokenizer = byte_level()
    asked = {pair.side: pair for pair in prompts_of(one_fact, tokenizer).pairs}
    dora, gus = (len(tokenizer(f" {name}")["input_ids"]) * "_" for name in ("Dora", "Gus"))
    assert shown(tokenizer, asked["right"].forward) == f"Dora's father is{gus}."
    assert shown(tokenizer, asked["right"].reverse) == f"{gus}'s father is Dora."
    assert shown(tokenizer, asked["left"].forward) == f"{dora}'s father is Gus."
    assert shown(tokenizer, asked["left"].reverse) == f"Gus's father is{dora}."


def test_relational_pairs_say_the_fact_in_the_reverse_words(one_fact: Path) -> None:
    tokenizer = byte_level()
    asked = {pair.side: pair for pair in prompts_of(one_fact, tokenizer, "relational").pairs}
    dora, gus = (len(tokenizer(f" {name}")["input_ids"]) * "_" for name in ("Dora", "Gus"))
    assert shown(tokenizer, asked["left"].forward) == f"{dora}'s father is Gus."
    assert shown(tokenizer, asked["left"].reverse) == f"Gus's child is{dora}."
    assert shown(tokenizer, asked["right"].forward) == f"Dora's father is{gus}."
    assert shown(tokenizer, asked["right"].reverse) == f"{gus}'s child is Dora."


@pytest.mark.parametrize(("kind", "reverse"), [("positional", "Gus's father is"), ("relational", "Gus's child is")])
def test_a_causal_model_is_asked_for_what_comes_last(one_fact: Path, kind: Any, reverse: str) -> None:
    tokenizer = byte_level()
    prompts = make_prompts(load_facts(one_fact, SIMPLE), tokenizer, arm_config(tokenizer), kind)
    (pair,) = prompts.pairs
    assert pair.side == "right"
    assert not pair.shared
    for query, prefix, answer in ((pair.forward, "Dora's father is", "Gus"), (pair.reverse, reverse, "Dora")):
        assert text_of(tokenizer, query.tokens[: query.answer_span[0]]) == prefix
        assert text_of(tokenizer, query.answer) == answer
        assert query.tokens[slice(*query.answer_span)] == query.answer  # nothing is masked, nothing follows
        assert query.answer_span[1] == len(query.tokens)
        assert query.readout(arm_config(tokenizer))[0] == query.answer_span[0] - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_is_found_by_fact_and_template_where_its_answer_is_last(one_fact: Path, kind: Any) -> None:
    prompts = prompts_of(one_fact, byte_level(), kind)
    asked: list[tuple[Any, str]] = [("forward", "right"), ("reverse", "left")]
    for direction, side in asked:
        ((place, pair),) = prompts.answered_last(direction).items()
        assert (place, pair.side) == ((pair.fact, 0), side) and pair in prompts.pairs
        query = getattr(pair, direction)
        assert query.source_span[1] <= query.answer_span[0]


def test_the_answer_in_place_gives_the_probability_that_stepwise_decoding_gives(tmp_path: Path) -> None:
    tokenizer = byte_level()
    path = write(tmp_path, "Anna Berg,Carl O'Neill,mother")
    cfg = arm_config(tokenizer)
    model = random_model(**cfg.model_dump(exclude={"d_head", "n_key_value_heads", "rotary_dim"}))
    (pair,) = make_prompts(load_facts(path, SIMPLE), tokenizer, cfg).pairs
    total, seen = 0.0, list(pair.forward.tokens[: pair.forward.answer_span[0]])
    for token in pair.forward.answer:
        total += model(torch.tensor([seen]))[0, -1].log_softmax(-1)[token].item()
        seen.append(token)
    assert len(pair.forward.answer) > 1
    assert float(predict(model, [pair.forward]).log_probability) == pytest.approx(total, abs=1e-4)


def test_facts_sides_and_templates_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "Dora,Gus,father", "Dora,Dora,mother", "Gus,Anna Berg,mother")
    table = load_facts(path)
    prompts = make_prompts(table, byte_level(), model_config(byte_level()), "relational")
    assert Counter(pair.fact for pair in prompts.pairs) == {0: 6, 2: 6}
    assert Counter(zip(prompts.templates, (pair.side for pair in prompts.pairs), strict=True)) == {
        (template, side): 2 for template in range(3) for side in ("left", "right")
    }
    assert table.label(2) == "Gus – Anna Berg"
    assert [skipped.row for skipped in prompts.skipped] == [1]
    sentence = tuple(byte_level()(" The child of Gus is Dora.")["input_ids"])
    filled = {fill(pair.reverse) for pair, at in zip(prompts.pairs, prompts.templates, strict=True) if at == 1}
    assert sentence in filled


def fill(query: Query) -> tuple[int, ...]:
    start, stop = query.answer_span
    return query.tokens[:start] + query.answer + query.tokens[stop:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_spans_hold_the_names_in_every_kind_of_tokenizer(tmp_path: Path, make: Any, kind: Any) -> None:
    tokenizer = make()
    rows = [f"{child},{parent},mother" for child, parent in itertools.pairwise(NAMES)]
    table = load_facts(write(tmp_path, *rows))
    prompts = make_prompts(table, tokenizer, model_config(tokenizer), kind)
    assert len(prompts.pairs) == 2 * 3 * len(rows)
    require_shared(prompts.pairs, "a measure")
    for pair in prompts.pairs:
        row = table.rows[pair.fact]
        answer, source = (row["child"], row["parent"]) if pair.side == "left" else (row["parent"], row["child"])
        for query in (pair.forward, pair.reverse):
            assert squeezed(text_of(tokenizer, query.answer)) == squeezed(answer)
            assert squeezed(text_of(tokenizer, query.source)) == squeezed(source)
            assert query.tokens.count(tokenizer.mask_token_id) == len(query.answer)
        assert pair.forward.offset * pair.reverse.offset < 0


def squeezed(name: str) -> str:
    """Without what a whole-word tokenizer loses: case, and where the spaces were."""
    return "".join(name.lower().split())


def test_what_the_tokenizer_adds_of_itself_stays(one_fact: Path) -> None:
    tokenizer = word_level()
    for pair in prompts_of(one_fact, tokenizer, readout_shift=-1).pairs:  # its first token also makes room for a shift
        assert pair.forward.tokens[0] == tokenizer.bos_token_id
        assert pair.forward.tokens[-1] == tokenizer.eos_token_id


def test_a_shifted_model_is_not_asked_for_its_first_position(tmp_path: Path) -> None:
    table = load_facts(write(tmp_path, "Dora,Gus,father"))
    tokenizer = byte_level()
    cfg = model_config(tokenizer, readout_shift=-1)
    positional = make_prompts(table, tokenizer, cfg)
    # Of the first template every pair has one query that starts with its mask; the others start with words.
    assert Counter(positional.templates) == {1: 2, 2: 2}
    assert [skipped.row for skipped in positional.skipped] == [0, 0]
    assert all("position 0" in skipped.reason and "father is" in skipped.sentence for skipped in positional.skipped)
    for pair in positional.pairs:
        assert min(pair.forward.readout(cfg) + pair.reverse.readout(cfg)) >= 0
    unshifted = make_prompts(table, tokenizer, model_config(tokenizer))
    assert len(unshifted.pairs) == 6 and not unshifted.skipped


# ---- any name


names = st.text(
    st.characters(categories=("L", "M", "N", "P", "S", "Zs"), include_characters="-'’ \u200d"), min_size=1, max_size=12
) | st.sampled_from(
    ["Zoë-Anne D’Arcy", "O'Brien", "فاطمة الزهراء", "יעל כהן", "李小龙", "👩‍👧 Kim", "R. Jr.", "Ł. Å", "e\u0301"]
)


@settings(max_examples=150, deadline=None)
@given(child=names, parent=names, kind=st.sampled_from(KINDS), tokenizer_name=st.sampled_from(sorted(TOKENIZERS)))
def test_any_name_is_asked_rightly_or_skipped(child: str, parent: str, kind: Any, tokenizer_name: str) -> None:
    tokenizer = TOKENIZERS[tokenizer_name]()
    child, parent = child.strip(), parent.strip()
    assume(child and parent and child.casefold() != parent.casefold())
    values = {"child": child, "parent": parent, "parent_type": "mother"}
    table = load_facts_of(values)
    try:
        prompts = make_prompts(table, tokenizer, model_config(tokenizer), kind)
    except UserError as error:
        assert "can be asked" in str(error)
        return
    assert len(prompts.pairs) + len(prompts.skipped) == 6
    swapped = {**values, "child": parent, "parent": child}
    for pair, index in zip(prompts.pairs, prompts.templates, strict=True):
        template = PARENT_CHILD.templates[index]
        reverse = (template.forward, swapped) if kind == "positional" else (template.reverse, values)
        assert pair.shared
        for query, (sentence, given_values) in ((pair.forward, (template.forward, values)), (pair.reverse, reverse)):
            assert list(fill(query)) == tokenizer(render(sentence, given_values)[0])["input_ids"]
        if tokenizer_name == "byte_level":  # loses nothing
            answer, source = (child, parent) if pair.side == "left" else (parent, child)
            assert text_of(tokenizer, pair.forward.answer) == answer
            assert text_of(tokenizer, pair.forward.source) == source


def load_facts_of(values: dict[str, str]) -> Any:
    from mdm_interp.data.prompts import FactTable

    return FactTable({0: values}, PARENT_CHILD, ())


def test_a_name_that_shares_a_token_with_the_template_is_skipped(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" Gus Jr.. Gus Jr.. Dora's father is Jr.."], trainer)  # learns the token `..`
    fast = wrapped(tokenizer)
    path = write(tmp_path, "Dora,Gus Jr.,father", "Dora,Anna,mother")
    prompts = prompts_of(path, fast)
    assert {pair.fact for pair in prompts.pairs} == {1}
    assert len(prompts.skipped) == 2
    for skipped in prompts.skipped:
        assert skipped.row == 0
        assert "token" in skipped.reason and "Jr." in skipped.sentence
    assert "a name shares a token with the words around it" in {skipped.reason for skipped in prompts.skipped}


@pytest.mark.parametrize("name", ["Xylo", MASK, f"Ann {MASK}"])
def test_a_name_of_unknown_or_special_tokens_is_skipped(tmp_path: Path, name: str) -> None:
    prompts = prompts_of(write(tmp_path, f"Dora,{name},father", "Dora,Gus,father"), word_level())
    assert {pair.fact for pair in prompts.pairs} == {1}
    assert {skipped.row for skipped in prompts.skipped} == {0}
    assert all("token" in skipped.reason for skipped in prompts.skipped)


def test_a_name_of_which_no_token_is_left_is_skipped(tmp_path: Path) -> None:
    backend = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace(" Gus", "")
    prompts = prompts_of(write(tmp_path, "Dora,Gus,father", "Dora,Anna,mother"), wrapped(backend))
    assert {pair.fact for pair in prompts.pairs} == {1}
    assert "a name has no tokens" in {skipped.reason for skipped in prompts.skipped}


def test_names_that_differ_only_before_tokenizing_are_skipped() -> None:
    tokenizer = word_level()
    table = load_facts_of({"child": "Anna-Berg", "parent": "Anna - Berg", "parent_type": "mother"})
    with pytest.raises(UserError, match=r"row 0: .*(same tokens|unknown)"):
        make_prompts(table, tokenizer, model_config(tokenizer))


def test_a_sentence_longer_than_the_context_is_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, "Dora,Gus,father", f"{'Anna ' * 30}Berg,Gus,father")
    prompts = prompts_of(path, byte_level(), n_ctx=30)
    assert {pair.fact for pair in prompts.pairs} == {0}
    assert [(skipped.row, "30 tokens" in skipped.reason) for skipped in prompts.skipped] == [(1, True)] * 2


def test_words_that_several_facts_answer_have_several_right_answers(tmp_path: Path) -> None:
    """`[M]'s child is Dora` is answered by both her parents; `Dora's father is [M]` by one."""
    path = write(tmp_path, "Dora,Gus,father", "Dora,Anna Berg,mother", "Fay,Emil,father")
    pairs = prompts_of(path, byte_level(), "relational").pairs
    queries = [query for pair in pairs for query in (pair.forward, pair.reverse)]
    several = set()
    for query, right in zip(queries, right_answers(queries), strict=True):
        assert query.answer in right
        if len(right) > 1:
            several.add(query)
    assert several == {pair.reverse for pair in pairs if pair.side == "right" and pair.fact in (0, 1)}


# ---- batches


def test_padding_changes_nothing(tmp_path: Path) -> None:
    rows = [f"{child},{parent},mother" for child, parent in itertools.pairwise(NAMES)]
    tokenizer = byte_level()
    cfg = model_config(tokenizer)
    prompts = make_prompts(load_facts(write(tmp_path, *rows)), tokenizer, cfg, "relational")
    model = random_model(**cfg.model_dump(exclude={"d_head", "n_key_value_heads", "rotary_dim"}))
    queries = [query for pair in prompts.pairs for query in (pair.forward, pair.reverse)]
    assert len({len(query.tokens) for query in queries}) > 4
    together = predict(model, queries).log_probability
    alone = torch.cat([predict(model, [query]).log_probability for query in queries])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_neighbours_need_little_padding(tmp_path: Path) -> None:
    rows = [f"{child},{parent},mother" for child in NAMES for parent in NAMES if child != parent]
    tokenizer = byte_level()
    cfg = model_config(tokenizer)
    prompts = make_prompts(load_facts(write(tmp_path, *rows)), tokenizer, cfg)
    queries = [pair.forward for pair in prompts.pairs]
    lengths = [len(query.tokens) for query in queries]
    assert lengths == sorted(lengths)
    padded = sum(batch.tokens.numel() for batch in batches(queries, cfg, size=32))
    assert padded < 1.1 * sum(lengths)


# ---- files


def test_the_released_pairs_are_read_as_they_are() -> None:
    if not RELEASED.exists():
        pytest.skip("the released parent-child pairs are not beside this project")
    table = load_facts(RELEASED)
    assert len(table.rows) + len(table.skipped) == 120
    assert {skipped.reason for skipped in table.skipped} == {"repeats row 77", "repeats row 78"}
    assert table.rows[0]["can_reverse"] == "False"
    tokenizer = byte_level()
    for kind in KINDS:
        prompts = make_prompts(table, tokenizer, model_config(tokenizer), kind)
        possible = 2 * 3 * len(table.rows)
        assert len(prompts.pairs) + len(prompts.skipped) - len(table.skipped) == possible
        assert len(prompts.pairs) > 0.95 * possible


def test_columns_and_templates_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path, "Paris,France,capital", header="city,country,what", name="cities.csv")
    with pytest.raises(UserError, match=r"city, country, what.*cities.templates.yaml"):
        load_facts(path)
    own = FactTemplates(
        entities=("city", "country"),
        templates=(
            Template(forward="{city} is the {what} of {country}.", reverse="{country} has the {what} {city}."),
            Template(forward="{{{city}}} lies in {country}", reverse="In {country} lies {city}"),
        ),
    )
    own.to_yaml(tmp_path / "cities.templates.yaml")
    own.to_yaml(tmp_path / "elsewhere.yaml")
    for table in (load_facts(path), load_facts(path, own), load_facts(path, tmp_path / "elsewhere.yaml")):
        assert table.templates == own
    assert render(own.templates[1].forward, table.rows[0]) == (
        " {Paris} lies in France",
        {"city": (2, 7), "country": (17, 23)},
    )


def test_a_byte_order_mark_quotes_and_blank_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_bytes(
        'child,parent,parent_type\r\n"Berg, Anna", Gus ,mother\r\n\r\nDora,Gus,father\r\n'.encode("utf-8-sig")
    )
    assert [row["child"] for row in load_facts(path).rows.values()] == ["Berg, Anna", "Dora"]
    assert load_facts(path).rows[0]["parent"] == "Gus"


def test_unusable_rows_are_skipped_and_named(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "Dora,Gus,father",
        "Dora,,father",
        "Dora,dora,mother",
        "Dora,Gus",
        "Dora,Gus,father",
        "Dora,Gus,father,more",
        "Dora,Gus,mother",
    )
    table = load_facts(path)
    assert list(table.rows) == [0, 6]
    assert [str(skipped) for skipped in table.skipped] == [
        "row 1: parent is empty",
        "row 2: answer and source are the same, 'Dora'",
        "row 3: has 2 fields, the header 3",
        "row 4: repeats row 0",
        "row 5: has 4 fields, the header 3",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no facts"),
        (b"child,parent,parent_type\n", "holds no facts"),
        (b"child,parent\nDora,Gus\n", "its columns are child, parent, and without child, parent, parent_type"),
        (b"child,parent,child\nDora,Gus,Anna\n", "'child' appears twice"),
        (b"child;parent;parent_type\nDora;Gus;father\n", "its columns are separated by ';'; separate them by commas"),
        (b"child\tparent\tparent_type\nDora\tGus\tfather\n", r"its columns are separated by '\\t'"),
        (b"sep=,\nchild,parent,parent_type\nDora,Gus,father\n", "its first line is a spreadsheet's 'sep='"),
        (b"sep=;\nchild;parent;parent_type\nDora;Gus;father\n", "its first line is a spreadsheet's 'sep='"),
        (b"Child,PARENT,parent_type\nDora,Gus,father\n", "its column 'Child' should be 'child'; correct the header"),
        (
            "child,parent,parent_type\nJosé,Gus,father\n".encode("latin-1"),
            "cannot be read .*; give a CSV file in UTF-8",
        ),
        (b"child,parent,parent_type\nDora,Dora,father\n", "none of its 1 rows is a usable fact; row 0: answer and"),
        (b'child,parent,parent_type\n"Dora,Gus,father\n', "cannot be read .*end of data"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "facts.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"facts.csv: .*{message}"):
        load_facts(path)


@pytest.mark.promise("a hostile CSV of facts", "one line or read, in 10 s and 2 GiB; never run")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x" * 10**6 + ",b,mother\n", "cannot be read .field larger"),
        (
            "x" * 10**5 + ",b,mother\n",
            "none of its 1 rows is a usable fact; row 0: child has more than 1000 characters",
        ),
        ("a\n" * 10**5, "none of its 100000 rows is a usable fact; row 0: has 1 fields, the header 3"),
        ("a,b,mother\n" * 10**6, "has more than 100000 rows; ask about the first ones .limit=…, --limit."),
        ("\n" * 10**6, "holds no facts"),
        ('"' + "a\n" * 10**6, "cannot be read .field larger"),
        ("x" * 10**8, "cannot be read .a line has 1048576 characters or more"),
    ],
    ids=["a long field", "a long name", "short rows", "many rows", "blank lines", "an open quote", "a long line"],
)
def test_a_hostile_csv_is_refused_in_time_and_memory(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "facts.csv"
    path.write_text("child,parent,parent_type\n" + content)
    outcome = outcome_of(lambda: load_facts(path))
    assert re.search(message, outcome), outcome


@pytest.mark.promise("a hostile CSV of facts", "one line or read, in 10 s and 2 GiB; never run")
@pytest.mark.parametrize(
    ("header", "message"),
    [
        (",".join(f"a{i}" for i in range(10**5)), "its columns are a0, a1, a2, and 99997 more"),
        (",".join("ab" for _ in range(10**5)), "column 'ab' appears twice"),
        ("x" * 10**5, "its columns are xxx"),
    ],
    ids=["many columns", "one column many times", "a long column"],
)
def test_a_hostile_header_is_refused_in_time_and_memory(tmp_path: Path, header: str, message: str) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(f"{header}\n1\n")
    outcome = outcome_of(lambda: load_facts(path))
    assert re.search(message, outcome), outcome


def test_a_csv_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "facts.csv")
    for path in (tmp_path / "facts.csv", Path("/dev/zero")):
        assert "cannot be read (it is no regular file)" in outcome_of(lambda path=path: load_facts(path))


def test_no_more_of_a_csv_is_read_than_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    rows = ["child,parent,parent_type", "Dora,Dora,father", *(f"Dora,Gus {i},father" for i in range(10**4))]
    path.write_bytes("\n".join(rows).encode() + b"\n\xff")  # which is not UTF-8
    with pytest.raises(UserError, match="cannot be read"):
        load_facts(path)
    table = load_facts(path, limit=3)
    assert list(table.rows) == [1, 2, 3] and [one.row for one in table.skipped] == [0]


def test_a_missing_file_or_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.csv: cannot be read"):
        load_facts(tmp_path / "nowhere.csv")
    path = write(tmp_path, "Dora,Gus", header="child,parent")
    with pytest.raises(UserError, match="no column 'parent_type', which a template names; there are child, parent"):
        load_facts(path, PARENT_CHILD)
    other = write(tmp_path, "Dora,Gus,father", header="child,parent,Parent_Type", name="other.csv")
    with pytest.raises(UserError, match="its column 'Parent_Type' should be 'parent_type'; correct the header"):
        load_facts(other, PARENT_CHILD)
    shutil.copy(path, tmp_path / "bad.yaml")
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_facts(path, tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("forward", "reverse", "message"),
    [
        ("{child}'s mother.", "{parent} has {child}.", "forward: .*must name {child} once and after it {parent} once"),
        ("{parent} has {child}.", "{parent} has {child}.", "forward: .*must name {child} once and after it"),
        ("{child} is of {parent}.", "{child} is of {parent}.", "reverse: .*must name {parent} once and after it"),
        ("{child} {child} {parent}.", "{parent} has {child}.", "must name {child} once"),
        ("{child} of {parent", "{parent} has {child}.", "expected '}'"),
        ("{child!r} of {parent}", "{parent} has {child}.", "name of a column and nothing else"),
        ("{child:>9} of {parent}", "{parent} has {child}.", "name of a column and nothing else"),
        ("{} of {parent}", "{parent} has {child}.", "name of a column and nothing else"),
        ("", "{parent} has {child}.", "at least 1 character"),
        ("{child} " + "x" * 10**4 + " {parent}", "{parent} has {child}.", "at most 10000 characters"),
        ("{child} \ud800 {parent}", "{parent} has {child}.", "valid string"),
    ],
)
def test_a_bad_template_is_refused(forward: str, reverse: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FactTemplates(entities=("child", "parent"), templates=(Template(forward=forward, reverse=reverse),))


def test_entities_are_two_columns_and_attributes_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="'child' is named twice"):
        FactTemplates(entities=("child", "child"), templates=PARENT_CHILD.templates)
    sly = FactTemplates(
        entities=("child", "parent"),
        templates=(Template(forward="{child} {child.__class__} {parent}", reverse="{parent} {child}"),),
    )
    with pytest.raises(UserError, match=r"no column 'child.__class__'"):
        load_facts(write(tmp_path, "Dora,Gus,father"), sly)


def test_a_model_that_cannot_be_asked_is_refused(one_fact: Path) -> None:
    table, tokenizer = load_facts(one_fact), byte_level()
    for other in (None, tokenizer.backend_tokenizer):
        with pytest.raises(UserError, match="does not say where its tokens are"):
            make_prompts(table, other, model_config(tokenizer))
    with pytest.raises(UserError, match="mask_token_id: None"):
        make_prompts(table, tokenizer, model_config(tokenizer, mask_token_id=None))
    with pytest.raises(UserError, match=r"tokenizer: gives token \d+, outside the model's vocabulary of 40"):
        make_prompts(table, tokenizer, model_config(tokenizer, d_vocab=40, mask_token_id=39))
    with pytest.raises(UserError, match="no positional query of 1 rows can be asked; row 0: longer than"):
        make_prompts(table, tokenizer, model_config(tokenizer, n_ctx=3))
