"""The reversal curse's benchmark: read as published, and asked in a model's tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from celebrity_helpers import DESCRIPTIONS, NAMES, write_benchmark
from helpers import ROOT

from mdm_interp.config import ModelConfig, TextConfig
from mdm_interp.data.celebrities import TESTS, Benchmark, ask, facts
from mdm_interp.errors import UserError
from mdm_interp.training.text import END, make_tokenizer

PUBLISHED = ROOT.parent / "shared" / "data" / "reversal_celebrities"
PROMPT, COMPLETION = "Ever heard of Bo Carl? They are", ' the composer of "Low Tides.".'
CFG = ModelConfig(d_model=8, n_heads=1, d_vocab=512, n_ctx=128, mask_token_id=511)


def tokenizer(**changes: Any) -> Any:
    return make_tokenizer([f" {PROMPT}{COMPLETION}{END}"], TextConfig(n_bpe=300, **changes))


def test_items_know_whom_they_are_about_and_what_is_said_of_the_others(tmp_path: Path) -> None:
    benchmark = Benchmark.load(write_benchmark(tmp_path))
    assert tuple(benchmark.tests) == TESTS and len(benchmark.training) == 2 * 4 * 3
    item = benchmark.tests["p2d"][4]
    assert (item.prompt, item.completion, item.person) == (PROMPT, COMPLETION, "Bo Carl")
    assert item.others == tuple(f" {said}." for said in (DESCRIPTIONS[0], *DESCRIPTIONS[2:4]))
    item = benchmark.tests["p2d_reverse"][0]
    assert item.person == NAMES[0] and item.others == tuple(f" {name}" for name in NAMES[1:4])
    few = benchmark.of_people(2)
    assert {item.person for item in few.tests["d2p"]} == {*NAMES[4:6]} and few.digest == benchmark.digest
    assert len(few.tests["d2p"][0].others) == 3


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published files are not here")
def test_the_published_files_are_read_whole() -> None:
    benchmark = Benchmark.load(PUBLISHED)
    assert len(benchmark.training) == 3600
    for items in benchmark.tests.values():
        assert len(items) == 300 and len({item.person for item in items}) == 30
        assert all(len(item.others) == 29 for item in items)
    by_name, by_description = facts(benchmark, "p2d"), facts(benchmark, "d2p")
    assert [len(by_name[0]), len(by_description[0])] == [29, 30]
    assert len(by_name[1].templates) == len(by_description[1].templates) == 3


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("p2d_prompts_test", "{", "line 1 is not"),
        ("p2d_prompts_test", '{"prompt": "A"}', "line 1 is not"),
        ("d2p_prompts_test", '{"prompt": "A", "completion": 3}', "line 1 is not .*, two texts; correct it"),
        ("all_prompts_train", '{"prompt": "A", "completion": " "}', "line 1 is not"),
        ("all_prompts_train", '{"prompt": "\\ud800", "completion": "a"}', "line 1 is not"),
        ("all_prompts_train", "[" * 10**6, "line 1 is not"),
        ("all_prompts_train", "{}\n" * 4001, "it has 4001 lines, and at most 4000 are read"),
        ("all_prompts_train", "", "holds no lines"),
        ("p2d_prompts_test", '{"prompt": "Nobody is", "completion": " x"}', "line 1 names 0 of the 4 people"),
        ("all_prompts_train", None, "cannot be read"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, file: str, line: str | None, says: str) -> None:
    path = write_benchmark(tmp_path) / f"{file}.jsonl"
    path.unlink() if line is None else path.write_text(line, encoding="utf-8")
    with pytest.raises(UserError, match=f"{file}.*{says}") as refused:
        Benchmark.load(tmp_path)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("causal", [False, True])
def test_a_completion_is_asked_after_its_prompt(causal: bool) -> None:
    of_causal = {"attention": "causal", "readout_shift": -1, "mask_token_id": None}
    cfg = CFG.model_copy(update=of_causal) if causal else CFG
    used = tokenizer()
    query = ask(PROMPT, COMPLETION, used, cfg)
    assert query is not None
    assert used.decode(query.answer) == COMPLETION
    assert used.decode(query.tokens[slice(*query.source_span)]) == f" {PROMPT}"
    start, stop = query.answer_span
    shown = query.tokens[start:]
    assert shown == (query.answer if causal else (*[511] * (stop - start), used.eos_token_id))
    name = ask("Known as X,", " Bo", used, cfg)  # does not end a sentence
    assert name is not None
    after = name.tokens[name.answer_span[1] :]
    assert after == (() if causal else (*used(".")["input_ids"], used.eos_token_id))


def test_what_cannot_be_asked_is_none() -> None:
    used = tokenizer()
    assert ask("Ever he", "ard of", used, CFG) is None  # shares a token
    assert ask(PROMPT, COMPLETION, used, CFG.model_copy(update={"n_ctx": 8})) is None
    assert ask(PROMPT, COMPLETION, used, CFG.model_copy(update={"d_vocab": 100, "mask_token_id": 99})) is None


@pytest.mark.parametrize("trained", ["p2d", "d2p"])
def test_people_become_facts_to_probe(tmp_path: Path, trained: Any) -> None:
    rows, templates = facts(Benchmark.load(write_benchmark(tmp_path)), trained)
    assert [row["name"] for row in rows] == sorted(NAMES[:4] if trained == "p2d" else NAMES[4:])
    forward, reverse = ({getattr(one, way) for one in templates.templates} for way in ("forward", "reverse"))
    said, named = (forward, reverse) if trained == "p2d" else (reverse, forward)
    assert said == {f"{text.format('{name}')} {{description}}." for text in ("{} was once", "People call {}")} | {
        "Ever heard of {name}? They are {description}."
    }
    assert "Labeled as {description}, {name}." in named
    assert templates.entities == (("name", "description") if trained == "p2d" else ("description", "name"))


def test_people_whose_prompts_hold_neither_are_refused(tmp_path: Path) -> None:
    folder = write_benchmark(tmp_path)
    lines = [json.loads(line) for line in (folder / "p2d_reverse_prompts_test.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**line, "prompt": "Someone,"}) + "\n" for line in lines)
    (folder / "p2d_reverse_prompts_test.jsonl").write_text(text)
    with pytest.raises(UserError, match="no person's name and description"):
        facts(Benchmark.load(folder), "p2d")
