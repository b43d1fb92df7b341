"""The reversal curse's benchmark: fictitious celebrities, each described in one direction of the text.

    benchmark = Benchmark.load("reversal_celebrities")     # the folder, as published
    benchmark.training                                     # sentences: prompts with their completions
    benchmark.tests["p2d_reverse"][0].prompt               # 'Known in circles as the acclaimed director of …,'

Two tests ask in the direction that training has, in other words: `p2d` (person to description) for what a person is
known for, `d2p` for the name of whom is described. Two ask about the same people in the direction that it never has.

Source: Berglund et al., The Reversal Curse (arXiv 2309.12288), experiment 1.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mdm_interp.config import ModelConfig
from mdm_interp.data.prompts import FactTemplates, Template
from mdm_interp.data.queries import Query
from mdm_interp.errors import UserError, require_one_of
from mdm_interp.files import read_text

Test = Literal["p2d", "d2p", "p2d_reverse", "d2p_reverse"]
TESTS: tuple[Test, ...] = get_args(Test)
NAMED_BY: dict[Test, Test] = {"p2d": "p2d_reverse", "d2p_reverse": "d2p"}
"""Tests whose prompts hold a name, and those of the same people whose completions are the names."""


@dataclass(frozen=True)
class Item:
    """One prompt of a test."""

    prompt: str
    completion: str
    """With the space before it."""
    person: str
    """The name of whom it is about."""
    others: tuple[str, ...]
    """What completes the same words about the other people."""


@dataclass(frozen=True)
class Benchmark:
    """The published files."""

    training: tuple[str, ...]
    tests: dict[Test, tuple[Item, ...]]
    digest: str
    """Of all of it."""

    @classmethod
    def load(cls, folder: str | Path) -> Benchmark:
        """Read `all_prompts_train.jsonl` and the four tests, `p2d_prompts_test.jsonl` and so on, whose lines are
        `{"prompt": …, "completion": …}`.

        Raises:
            UserError: a file cannot be read, a line is none of that, or a prompt names none of a test's people.
        """
        folder = Path(folder)
        training = read_lines(folder / "all_prompts_train.jsonl")
        files: dict[Test, Path] = {test: folder / f"{test}_prompts_test.jsonl" for test in TESTS}
        tests: dict[Test, list[tuple[str, str]]] = {test: read_lines(path) for test, path in files.items()}
        whole = json.dumps([training, tests]).encode()
        return cls(
            tuple("".join(line) for line in training),
            {test: _items(path, test, tests) for test, path in files.items()},
            hashlib.sha256(whole).hexdigest()[:16],
        )

    def of_people(self, limit: int) -> Benchmark:
        """Return the benchmark with the first so many people of each test; training and digest stay."""
        kept: dict[Test, tuple[Item, ...]] = {}
        for test, items in self.tests.items():
            people = list(dict.fromkeys(item.person for item in items))[:limit]
            kept[test] = tuple(item for item in items if item.person in people)
        return Benchmark(self.training, kept, self.digest)


MOST_LINES = 4000
"""Of a file: those published have up to 3600. Each prompt is compared with all."""


def read_lines(path: Path) -> list[tuple[str, str]]:
    """Read the prompts and completions of a file.

    Raises:
        UserError: it cannot be read, or a line is not as published.
    """
    try:
        lines = read_text(path).splitlines()
        if len(lines) > MOST_LINES:
            raise ValueError(f"it has {len(lines)} lines, and at most {MOST_LINES} are read")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); give the folder of the published files, as --data"
        ) from error
    found: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        try:
            read = json.loads(line)
            texts = (read["prompt"], read["completion"])
            "".join(texts).encode()  # half of a character is no text
        except (ValueError, TypeError, LookupError, RecursionError):
            texts = ()
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f'{path}: line {number} is not {{"prompt": …, "completion": …}}, two texts; correct it')
        found.append(texts)
    if not found:
        raise UserError(f"{path}: holds no lines; give the published file")
    return found


def _items(path: Path, test: Test, tests: dict[Test, list[tuple[str, str]]]) -> tuple[Item, ...]:
    """Find out whom each prompt is about, and what else could complete it."""
    asked, named_by = tests[test], NAMED_BY.get(test)
    names = {completion.strip() for _, completion in (tests[named_by] if named_by else asked)}
    about: list[tuple[str, str]] = []  # the person, and the prompt without the name
    for number, (prompt, completion) in enumerate(asked, start=1):
        found = [name for name in names if name in prompt] if named_by else [completion.strip()]
        if len(found) != 1:
            raise UserError(
                f"{path}: line {number} names {len(found)} of the {len(names)} people in {named_by}_prompts_test.jsonl"
                "; the files do not belong together"
            )
        about.append((found[0], prompt.replace(found[0], "") if named_by else ""))
    return tuple(
        Item(
            prompt,
            completion,
            person,
            tuple(
                dict.fromkeys(
                    other
                    for (_, other), (who, words) in zip(asked, about, strict=True)
                    if who != person and words == around and other != completion
                )
            ),
        )
        for (prompt, completion), (person, around) in zip(asked, about, strict=True)
    )


def ask(prompt: str, completion: str, tokenizer: Any, cfg: ModelConfig) -> Query | None:
    """Return the query for a completion, whose source is all of the prompt; None where the two share a token or are too
    long for the model.

    The text comes after a space, as in :mod:`mdm_interp.data.prompts`. A masked diffusion model, which would otherwise
    fill in an end, is shown that the sentence and the text end after the masks: by a full stop where the completion has
    none, and by the tokenizer's token for it if there is one.
    """
    prompt, stop = f" {prompt}", "" if completion.endswith(".") else "."
    encoded = tokenizer(prompt + completion + stop, return_offsets_mapping=True)
    tokens, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    real, end = [at for at, span in enumerate(offsets) if span[0] < span[1]], len(prompt) + len(completion)
    answer = [at for at in real if len(prompt) < offsets[at][1] <= end]
    if not answer or offsets[answer[0]][0] < len(prompt) or offsets[answer[-1]][1] < end or answer[0] == real[0]:
        return None
    (first, last), answered = (answer[0], answer[-1] + 1), tuple(tokens[answer[0] : answer[-1] + 1])
    if not cfg.is_causal:
        assert cfg.mask_token_id is not None
        ended = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        tokens = [*tokens[:first], *[cfg.mask_token_id] * len(answered), *tokens[last : real[-1] + 1], *ended]
    else:
        tokens = tokens[:last]
    if len(tokens) > cfg.n_ctx or max(tokens) >= cfg.d_vocab:
        return None
    return Query(tuple(tokens), answered, (first, last), (real[0], first))


def facts(benchmark: Benchmark, trained: Literal["p2d", "d2p"]) -> tuple[list[dict[str, str]], FactTemplates]:
    """Return the people of a test and its reverse as facts, `name` and `description`, in sentences made of the prompts.

    A description is the completion that most of a person's prompts have, without its full stop. The sentences are those
    of the prompts in which most people's names and descriptions stand as they are, and the people those who fit all of
    them.

    Args:
        trained: `p2d` or `d2p`, whose direction the forward sentences have.

    Raises:
        UserError: `trained` is neither, or no person fits any prompt.
    """
    require_one_of("trained", trained, ("p2d", "d2p"))
    by_name, by_description = ("p2d", "p2d_reverse") if trained == "p2d" else ("d2p_reverse", "d2p")
    described = Counter((item.person, item.completion) for item in benchmark.tests[by_name])
    description = {who: said.strip().removesuffix(".") for (who, said), _ in reversed(described.most_common())}
    stated: dict[Test, dict[str, set[str]]] = {by_name: {}, by_description: {}}  # whom each sentence fits
    for test, sentences in stated.items():
        for item in benchmark.tests[test]:
            known = {"name": item.person, "description": description.get(item.person, "")}
            text = f"{item.prompt}{item.completion}".strip().removesuffix(".")
            if any(text.count(value) != 1 or not value for value in known.values()) or {*"{}"} & {*text}:
                continue
            for column, value in known.items():
                text = text.replace(value, f"{{{column}}}")
            sentences.setdefault(f"{text}.", set()).add(item.person)
    most = [
        sorted(sentences, key=lambda sentence: -len(sentences[sentence]))[:N_TEMPLATES] for sentences in stated.values()
    ]
    chosen = list(zip(*(most if trained == "p2d" else most[::-1]), strict=False))
    fitting = [stated[test][text] for test, texts in zip(stated, most, strict=True) for text in texts[: len(chosen)]]
    people = [who for who in description if all(who in fits for fits in fitting)]
    if not chosen or not people:
        raise UserError("data: no person's name and description stand in the prompts as they are; probe other facts")
    entities = ("name", "description") if trained == "p2d" else ("description", "name")
    templates = tuple(Template(forward=forward, reverse=reverse) for forward, reverse in chosen)
    rows = [{"name": who, "description": description[who]} for who in sorted(people)]
    return rows, FactTemplates(entities=entities, templates=templates)


N_TEMPLATES = 3
"""In how many sentences facts are stated in each direction."""
