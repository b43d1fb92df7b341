"""Natural-language facts: a CSV and sentence templates become query pairs in a tokenizer's own tokens.

A template states a fact twice: *forward*, left entity first, and *reverse*, in other words, right entity first. From it
come two kinds of reverse query, which are never mixed:

    positional   the words of the forward sentence with the sides swapped: `[M]'s mother is Anna`
    relational   the reverse sentence: `Bea's child is [M]`

Every sentence comes after a space, as inside a paragraph, so that a name has the same tokens at the sentence's start
as within it. What cannot be asked is skipped, with its row and the reason.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import re
import string
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, get_args

from pydantic import Field, StringConstraints, model_validator

from mdm_interp.config import Config, ModelConfig
from mdm_interp.data.chat import LEAD, in_chat
from mdm_interp.data.queries import Direction, Query, QueryPair, Span, require_mask
from mdm_interp.errors import UserError, few, require_one_of
from mdm_interp.files import require_file

Kind = Literal["positional", "relational"]
Sentence = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=10_000)]
MOST_FACTS, MOST_CHARACTERS, LONGEST_LINE = 100_000, 1000, 2**20
"""How many rows of a CSV are read, how long what a sentence holds of it may be, and how long a line."""


def _parts(sentence: str) -> list[tuple[str, str | None]]:
    """Split into literal text and the column after it, in turn."""
    try:
        parsed = list(string.Formatter().parse(sentence))
    except ValueError as error:
        raise ValueError(f"{sentence!r}: {error}; write a brace that is text twice") from error
    for _, column, form, conversion in parsed:
        if column is not None and (not column or form or conversion):
            raise ValueError(f"{sentence!r}: braces hold the name of a column and nothing else; correct it")
    return [(literal, column) for literal, column, *_ in parsed]


def _columns(sentence: str) -> list[str]:
    return [column for _, column in _parts(sentence) if column is not None]


class Template(Config):
    """Two statements of one fact, with columns of the CSV in braces."""

    forward: Sentence
    """The left entity comes before the right one."""
    reverse: Sentence
    """The right entity comes before the left one."""


class FactTemplates(Config):
    """How the facts of a CSV are stated."""

    entities: tuple[str, str]
    """The columns of the left and of the right entity."""
    templates: tuple[Template, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> FactTemplates:
        left, right = self.entities
        if left == right:
            raise ValueError(f"entities: {left!r} is named twice; name two columns")
        for index, template in enumerate(self.templates):
            for name, order in (("forward", [left, right]), ("reverse", [right, left])):
                sentence = getattr(template, name)
                found = [column for column in _columns(sentence) if column in order]
                if found != order:
                    first, second = order
                    raise ValueError(
                        f"templates.{index}.{name}: {sentence!r} must name {{{first}}} once and after it {{{second}}} "
                        "once"
                    )
        return self

    @property
    def columns(self) -> set[str]:
        """Every column that a sentence names."""
        return {
            column
            for template in self.templates
            for sentence in (template.forward, template.reverse)
            for column in _columns(sentence)
        }


PARENT_CHILD = FactTemplates(
    entities=("child", "parent"),
    templates=(
        Template(forward="{child}'s {parent_type} is {parent}.", reverse="{parent}'s child is {child}."),
        Template(forward="The {parent_type} of {child} is {parent}.", reverse="The child of {parent} is {child}."),
        Template(
            forward="We know that {child} has a {parent_type}, {parent}.",
            reverse="We know that {parent} has a child, {child}.",
        ),
    ),
)
"""For the parent-child pairs of "The Reversal Curse" (arXiv 2309.12288). The kind of parent comes before the parent,
so that a causal model reads it in time."""


@dataclass(frozen=True)
class Skipped:
    """Something that could not be asked."""

    row: int
    """Row of the CSV below its header, from 0."""
    reason: str
    sentence: str = ""
    """The sentence it happened in; empty when the whole row is of no use."""

    def __str__(self) -> str:
        where = f" in {self.sentence!r}" if self.sentence else ""
        return f"row {self.row}: {self.reason}{where}"


@dataclass(frozen=True)
class FactTable:
    """The facts of a CSV."""

    rows: dict[int, dict[str, str]]
    """The usable rows, all their columns, by their number below the header, from 0."""
    templates: FactTemplates
    skipped: tuple[Skipped, ...]
    """The other rows."""

    def label(self, row: int) -> str:
        """Return both entities of a fact, for people to read."""
        return " – ".join(self.rows[row][column] for column in self.templates.entities)


@dataclass(frozen=True)
class Prompts:
    """The query pairs of one kind, shortest first: neighbours need little padding."""

    kind: Kind
    table: FactTable
    pairs: list[QueryPair]
    """`fact` is the row of the CSV; `side` is `left` where the forward query asks for the table's first entity."""
    templates: list[int]
    """Which template each pair is from."""
    skipped: tuple[Skipped, ...]
    """The table's skipped rows, then what could not be asked of the others, once per template and answer."""
    chat: bool = False
    """Whether each sentence is what an assistant says in a chat."""

    def answered_last(self, direction: Direction) -> dict[tuple[int, int], QueryPair]:
        """Return by fact and template the pair whose query in this direction has its answer after its source."""
        asked = zip(self.pairs, self.templates, strict=True)
        return {(pair.fact, template): pair for pair, template in asked if getattr(pair, direction).offset < 0}


def load_facts(
    path: str | Path, templates: FactTemplates | str | Path | None = None, *, limit: int | None = None
) -> FactTable:
    """Read a CSV (UTF-8, with a header) whose rows are facts.

    Rows without a value that the sentences need, or with a very long one, whose entities are the same, or that repeat
    an earlier row's sentences are skipped.

    Args:
        templates: How to state the facts, or a YAML file that says so. Default: the file `NAME.templates.yaml` beside
            `NAME.csv`, or else the built-in templates where the columns are `child`, `parent` and `parent_type`.
        limit: Read no further than the first so many usable rows.

    Raises:
        UserError: a file cannot be read, columns are missing or repeated, no row is usable, or there are very many.
    """
    path = Path(path)
    with _open_csv(path) as (header, lines):
        if not isinstance(templates, FactTemplates):
            templates = _find_templates(path, header, templates)
        if missing := sorted(templates.columns - set(header)):
            _check_spelling(path, templates.columns, header)
            raise UserError(
                f"{path}: no column {missing[0]!r}, which a template names; there are {few(header)}: correct the "
                "header or the template"
            )
        rows: dict[int, dict[str, str]] = {}
        skipped, seen, columns, n_lines = [], {}, sorted(templates.columns), 0
        for index, line in enumerate(lines):
            if index == MOST_FACTS:
                raise UserError(f"{path}: has more than {MOST_FACTS} rows; ask about the first ones (limit=…, --limit)")
            row, n_lines = dict(zip(header, (field.strip() for field in line), strict=False)), index + 1
            used = tuple(row.get(column, "") for column in columns)
            left, right = (row.get(column, "") for column in templates.entities)
            if len(line) != len(header):
                skipped.append(Skipped(index, f"has {len(line)} fields, the header {len(header)}"))
            elif empty := [column for column in columns if not row[column]]:
                skipped.append(Skipped(index, f"{empty[0]} is empty"))
            elif long := [column for column in columns if len(row[column]) > MOST_CHARACTERS]:
                skipped.append(Skipped(index, f"{long[0]} has more than {MOST_CHARACTERS} characters"))
            elif left.casefold() == right.casefold():
                skipped.append(Skipped(index, f"answer and source are the same, {left!r}"))
            elif used in seen:
                skipped.append(Skipped(index, f"repeats row {seen[used]}"))
            else:
                rows[index], seen[used] = row, index
                if len(rows) == limit:
                    break
    if not rows:
        raise UserError(f"{path}: none of its {n_lines} rows is a usable fact; {skipped[0]}")
    return FactTable(rows, templates, tuple(skipped))


def make_prompts(
    table: FactTable, tokenizer: Any, cfg: ModelConfig, kind: Kind = "positional", *, chat: bool = False
) -> Prompts:
    """Return the query pairs of every fact in every template.

    An MDM is asked for either entity, with as many masks as the name has tokens, and both queries of a pair have the
    same answer and source. A causal model is asked for the entity that comes last: forward for the right one, in
    reverse for the left one. Its answer is unmasked, since each token is read before it is seen.

    Special tokens that the tokenizer adds of itself stay. A pair is skipped when a name shares a token with the words
    around it, or has other tokens in the reverse sentence, when a shifted model would have to predict position 0, or
    when block-causal attention does not reach from the answer to the source.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        cfg: The model that will be asked.
        chat: Whether each sentence is what an assistant says in the tokenizer's chat template
            (:func:`~mdm_interp.data.chat.in_chat`).

    Raises:
        UserError: the kind is unknown, the tokenizer gives no offsets or is of another model, the model has no mask
            token, no pair can be asked, or a chat is asked for without a template that can be used.
    """
    require_one_of("kind", kind, get_args(Kind))
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"tokenizer: {type(tokenizer).__name__} does not say where its tokens are in the text; give a fast one"
        )
    require_mask(cfg)
    asker = _Asker(tokenizer, cfg, chat)
    found: list[tuple[QueryPair, int]] = []
    skipped = list(table.skipped)
    for row, values in table.rows.items():
        for index, template in enumerate(table.templates.templates):
            for side in ("right",) if cfg.is_causal else ("left", "right"):
                try:
                    queries = asker.pair(template, table.templates.entities, values, kind, side)
                except _Unaskable as problem:
                    skipped.append(Skipped(row, problem.reason, problem.sentence))
                else:
                    found.append((QueryPair(*queries, row, side), index))
    if not found:
        raise UserError(f"facts: no {kind} query of {len(table.rows)} rows can be asked; {skipped[len(table.skipped)]}")
    found.sort(key=lambda entry: max(len(entry[0].forward.tokens), len(entry[0].reverse.tokens)))
    return Prompts(kind, table, [pair for pair, _ in found], [index for _, index in found], tuple(skipped), chat)


def right_answers(queries: Sequence[Query]) -> list[frozenset[tuple[int, ...]]]:
    """Return each query's own answer, and those that others of them have in the same words: two children answer
    `[M]'s mother is Anna`."""
    around = [(query.tokens[: query.answer_span[0]], query.tokens[query.answer_span[1] :]) for query in queries]
    answers: dict[Any, set[tuple[int, ...]]] = {}
    for words, query in zip(around, queries, strict=True):
        answers.setdefault(words, set()).add(query.answer)
    return [frozenset(answers[words]) for words in around]


def encode(tokenizer: Any, text: str, spans: dict[str, Span], chat: bool) -> tuple[Any, str, dict[str, Span]]:
    """Encode a rendered sentence, in a chat if asked; return the whole text, too, and where the columns' values are in
    it."""
    if not chat:
        return tokenizer(text, return_offsets_mapping=True), text, spans
    whole = in_chat(tokenizer, text)
    start = whole.index(f"{LEAD}{text}") + len(LEAD)
    moved = {column: (first + start, stop + start) for column, (first, stop) in spans.items()}
    return tokenizer(whole, return_offsets_mapping=True, add_special_tokens=False), whole, moved


def render(sentence: str, values: Mapping[str, str]) -> tuple[str, dict[str, Span]]:
    """Return `sentence` after a space, its columns filled in, and the characters that each column's value takes."""
    text, spans = " ", {}
    for literal, column in _parts(sentence):
        text += literal
        if column is not None:
            spans[column] = (len(text), len(text) + len(values[column]))
            text += values[column]
    return text, spans


class _Unaskable(Exception):
    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(reason)
        self.reason, self.sentence = reason, sentence


@dataclass(frozen=True)
class _Asker:
    """Makes the queries of one model."""

    tokenizer: Any
    cfg: ModelConfig
    chat: bool

    @cached_property
    def special(self) -> set[int]:
        return set(self.tokenizer.all_special_ids)

    def pair(
        self, template: Template, entities: tuple[str, str], values: Mapping[str, str], kind: Kind, side: str
    ) -> tuple[Query, Query]:
        """Return the forward query for the entity on `side`, and the reverse query."""
        answer, source = entities if side == "left" else entities[::-1]
        forward = self.query(template.forward, values, answer, source)
        swapped = {**values, answer: values[source], source: values[answer]}
        sentence, given = (template.forward, swapped) if kind == "positional" else (template.reverse, values)
        # Swapped sides write the answer in the other column; a causal model's answer is the other entity.
        if (kind == "positional") != self.cfg.is_causal:
            answer, source = source, answer
        reverse = self.query(sentence, given, answer, source)
        same = forward.answer == reverse.answer and forward.source == reverse.source
        if not self.cfg.is_causal and not same:
            raise _Unaskable("a name has other tokens than in the forward sentence", render(sentence, given)[0].strip())
        return forward, reverse

    def query(self, sentence: str, values: Mapping[str, str], answer: str, source: str) -> Query:
        """Ask for the column `answer` of one sentence, given the column `source`."""
        cfg, (text, characters) = self.cfg, render(sentence, values)
        encoded, text, characters = encode(self.tokenizer, text, characters, self.chat)
        tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if max(tokens, default=0) >= cfg.d_vocab:
            raise UserError(
                f"tokenizer: gives token {max(tokens)}, outside the model's vocabulary of {cfg.d_vocab}; use the "
                "model's own"
            )
        answered, given = (_token_span(text, offsets, characters[column]) for column in (answer, source))
        names = [tuple(tokens[slice(*span)]) for span in (answered, given)]
        if cfg.mask_token_id in tokens:
            raise _Unaskable("the sentence holds the mask token", text.strip())
        if self.special & {*names[0], *names[1]}:
            raise _Unaskable("a name holds a token that is special or stands for the unknown", text.strip())
        if names[0] == names[1]:
            raise _Unaskable("answer and source have the same tokens", text.strip())
        if answered[0] + (cfg.readout_shift or 0) < 0:
            raise _Unaskable("the answer is at position 0, where a shifted model has no prediction", text.strip())
        if not cfg.is_causal and given[1] > cfg.n_readable(answered[0] + (cfg.readout_shift or 0), len(tokens)):
            raise _Unaskable("the source is in a later block than the answer, which cannot read it", text.strip())
        if cfg.is_causal:
            tokens = tokens[: answered[1]]
        else:
            tokens = [*tokens[: answered[0]], *[cfg.mask_token_id] * len(names[0]), *tokens[answered[1] :]]
        if len(tokens) > cfg.n_ctx:
            raise _Unaskable(f"longer than the model's context of {cfg.n_ctx} tokens", text.strip())
        return Query(tuple(tokens), names[0], answered, given)


def _token_span(text: str, offsets: Sequence[tuple[int, int]], characters: Span) -> Span:
    """Return the tokens that hold these characters. They may hold the spaces around them too, and nothing else."""
    start, stop = characters
    inside = [index for index, (first, last) in enumerate(offsets) if first < last and first < stop and last > start]
    if not inside:
        raise _Unaskable("a name has no tokens", text.strip())
    first, last = min(offsets[index][0] for index in inside), max(offsets[index][1] for index in inside)
    if (text[first:start] + text[stop:last]).strip():
        raise _Unaskable("a name shares a token with the words around it", text.strip())
    return inside[0], inside[-1] + 1


def _find_templates(path: Path, header: Sequence[str], templates: str | Path | None) -> FactTemplates:
    beside = path.with_name(f"{path.stem}.templates.yaml")
    if templates is not None or beside.exists():
        return FactTemplates.from_yaml(beside if templates is None else templates)
    if PARENT_CHILD.columns <= set(header):
        return PARENT_CHILD
    _check_spelling(path, PARENT_CHILD.columns, header)
    raise UserError(
        f"{path}: its columns are {few(header)}, and without {', '.join(sorted(PARENT_CHILD.columns))} the facts "
        f"need templates of their own; put them into {beside.name} beside it"
    )


def _check_spelling(path: Path, columns: Collection[str], header: Sequence[str]) -> None:
    """Refuse a header in which columns are there with other capitals."""
    spelled = {name.casefold(): name for name in header}
    others = {column: spelled.get(column.casefold()) for column in columns if column not in header}
    if others and all(others.values()):
        column, there = next(iter(sorted(others.items())))
        raise UserError(f"{path}: its column {there!r} should be {column!r}; correct the header")


@contextlib.contextmanager
def _open_csv(path: Path) -> Iterator[tuple[list[str], Iterator[list[str]]]]:
    """Give the header and, as they are read, the rows that are not blank."""
    try:
        require_file(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = (line for line in csv.reader(_lines(file), strict=True) if line)
            header = [column.strip() for column in next(lines, [])]
            _check_header(path, header)
            if (first := next(lines, None)) is None:
                raise UserError(f"{path}: holds no facts; give a header and at least one row")
            yield header, itertools.chain([first], lines)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a CSV file in UTF-8") from error


def _lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE:
            raise csv.Error(f"a line has {LONGEST_LINE} characters or more")
        yield line


def _check_header(path: Path, header: Sequence[str]) -> None:
    if header and re.fullmatch(r"sep=.?", header[0]):
        raise UserError(f"{path}: its first line is a spreadsheet's 'sep='; delete it, and separate columns by commas")
    if len(header) == 1 and (between := [mark for mark in ";\t|" if mark in header[0]]):
        raise UserError(f"{path}: its columns are separated by {between[0]!r}; separate them by commas")
    if repeated := sorted(column for column, n in Counter(header).items() if n > 1):
        raise UserError(f"{path}: column {repeated[0]!r} appears twice in the header; rename one")
