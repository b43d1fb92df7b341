"""Subjects: what a page looks at. A model with names for its tokens, and a prompt with its masks, source and answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdm_interp.data.queries import Query, QueryBatch, Span
from mdm_interp.errors import UserError
from mdm_interp.models.bridge import hooked
from mdm_interp.models.text import read_text
from mdm_interp.training.runs import Run
from mdm_interp.viz.pages.code import call, left_open, saving
from mdm_interp.viz.theme import shown
from mdm_interp.viz.words import heads_in_layers

MASK = "[M]"
"""How a mask token is written in a text, and shown."""


@dataclass(frozen=True)
class Prompt:
    """Tokens, and what is marked among them."""

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    """How each token reads."""
    masks: tuple[int, ...]
    """Positions that hold the mask token."""
    readout: tuple[int, ...]
    """Positions whose logits predict the masked tokens."""
    source: Span | None
    answer: Span | None

    def batch(self, rows: Sequence[int], device: Any) -> QueryBatch:
        """Return the prompt as a batch of one, read at `rows`."""
        at, nothing = torch.tensor([list(rows)], dtype=torch.long), torch.zeros(1, len(rows), dtype=torch.long)
        tokens, all_of_them = torch.tensor([self.tokens]), torch.ones(1, len(rows), dtype=torch.bool)
        batch = QueryBatch(tokens, None, at, nothing, all_of_them, torch.zeros_like(tokens, dtype=torch.bool))
        return batch.to(torch.device(device))

    def marks(self) -> dict[str, Any]:
        """Return what a page's script needs to know of it."""
        return {
            "tokens": list(self.texts),
            "masks": list(self.masks),
            "readout": list(self.readout),
            "source": self.source,
            "answer": self.answer,
        }


@dataclass(frozen=True)
class Subject:
    """A model, and how text becomes tokens for it and tokens text."""

    model: Any
    """As :func:`mdm_interp.models.bridge.hooked` returns it."""
    names: Callable[[Sequence[int]], Sequence[str]]
    """Token ids to texts, one each."""
    encode: Callable[[str], tuple[list[int], list[Span]]]
    """A text without masks to token ids and the characters that each stands for."""
    name: str
    """What pages call it."""
    steps: tuple[int, ...] = ()
    """After how much training it is, where it is known."""
    opened: str = ""
    """Python that opens it, where it is known."""

    @classmethod
    def of(cls, model: Any) -> Subject:
        """Return a model with its tokenizer; of a `Run`, the last checkpoint with its world's names. A subject stays.

        Without a tokenizer, tokens are named by their ids.
        """
        if isinstance(model, Subject):
            return model
        if isinstance(model, Run):
            return cls.of_run(model)
        model = hooked(model)
        cfg = model.cfg
        name = f"{shown(cfg.position)} model, {heads_in_layers(cfg.n_layers, cfg.n_heads)}"
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            return cls(model, lambda tokens: [str(token) for token in tokens], _no_text, name)

        def encode(text: str) -> tuple[list[int], list[Span]]:
            encoded = read_text(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
            return encoded["input_ids"], [tuple(span) for span in encoded["offset_mapping"]]

        return cls(model, lambda tokens: [_name(tokenizer, token) for token in tokens], encode, name)

    @classmethod
    def of_run(cls, run: Run) -> Subject:
        """Return a run's last checkpoint."""
        config = run.config
        shape = heads_in_layers(config.model.n_layers, config.model.n_heads)
        name = shown(f"{config.model.position} {config.objective}, {shape}, {config.facts.world}, seed {config.seed}")
        name += f" ({run.folder.name[:6]})"  # other settings may differ, too
        opened = call("Run.open", repr(run.folder.resolve().name), root=run.folder.parent)
        return replace(cls.of(run.model()), name=name, steps=tuple(run.steps[-1:]), opened=opened)

    @classmethod
    def of_checkpoint(cls, model: Any, source: str | Path, **options: Any) -> Subject:
        """Return a model that was loaded from `source` with these options of
        :func:`~mdm_interp.checkpoints.load_checkpoint`."""
        opened = call("load_checkpoint", repr(str(source)), **options)
        subject = cls.of(model)
        return replace(subject, name=f"{Path(source).absolute().name}, {subject.name}", opened=opened)

    def heading(self, page: str, steps: Sequence[int] | None = None) -> str:
        """Return a page's heading: what it shows, and of which model after which steps, by default its own."""
        return f"{page} · {after(self.name, self.steps if steps is None else steps)}"

    def saving(self, function: str, *given: str, **options: Any) -> str:
        """Return Python that opens the model and saves the page that `function` makes of it."""
        return saving(call(function, "model", *given, **options), self.opening())

    def opening(self, variable: str = "model") -> str:
        """Return Python that opens the model, or says that the reader has to."""
        if self.opened:
            return f"{variable} = {self.opened}"
        return left_open(f"{variable}, here {self.name},")

    def prompt(self, prompt: str | Sequence[int] | Tensor | Query, source: str | None = None) -> Prompt:
        """Return the tokens to look at.

        Args:
            prompt: A text, in which each `[M]`, with a space before it, is one mask token; token ids; or a query, whose
                source and answer are then marked.
            source: Words of the text to mark as the source.

        Raises:
            UserError: the text cannot be read, there are no tokens or too many, one is outside the vocabulary, or
                `source` is not in the text.
        """
        cfg = self.model.cfg
        source_span = answer_span = None
        if isinstance(prompt, str):
            tokens, source_span = self._read(prompt, source)
        elif source is not None:
            raise UserError(f"source: {source!r} names words of a text, and the prompt is none; give a text or a Query")
        elif isinstance(prompt, Query):
            tokens, source_span, answer_span = prompt.tokens, prompt.source_span, prompt.answer_span
        else:
            tokens = torch.as_tensor(prompt).flatten().tolist()
        if not 0 < len(tokens) <= cfg.n_ctx:
            raise UserError(f"prompt: {len(tokens)} tokens, and the model reads 1 to {cfg.n_ctx}; change its length")
        if wrong := [token for token in tokens if not 0 <= token < cfg.d_vocab]:
            raise UserError(f"prompt: token {wrong[0]} is outside the model's vocabulary of {cfg.d_vocab}; correct it")
        masks = [position for position, token in enumerate(tokens) if token == cfg.mask_token_id]
        texts = [MASK if position in masks else text for position, text in enumerate(self.names(tokens))]
        asked = range(*answer_span) if answer_span else masks
        readout = [position + (cfg.readout_shift or 0) for position in asked]
        if cfg.is_causal and not asked:
            readout = [len(tokens) - 1]  # what comes next
        if readout and readout[0] < 0:
            raise UserError("prompt: position 0 is masked, but has no prediction in a shifted model; give its token")
        return Prompt(tuple(tokens), tuple(texts), tuple(masks), tuple(readout), source_span, answer_span)

    def _read(self, text: str, source: str | None) -> tuple[list[int], Span | None]:
        """Return a text's tokens, and those of the words `source`."""
        tokens: list[int] = []
        characters: list[Span] = []
        start = 0
        for mask in [*re.finditer(rf" ?{re.escape(MASK)}", text), None]:
            between = text[start : mask.start() if mask else len(text)]
            found, spans = self.encode(between) if between else ([], [])
            tokens += found
            characters += [(start + first, start + last) for first, last in spans]
            if mask:
                if self.model.cfg.mask_token_id is None:
                    raise UserError(f"text: holds {MASK}, and the model has no mask token; leave it out")
                tokens.append(self.model.cfg.mask_token_id)
                characters.append(mask.span())
                start = mask.end()
        if source is None:
            return tokens, None
        at = text.find(source)
        inside = [i for i, (first, last) in enumerate(characters) if first < at + len(source) and last > at]
        if at < 0 or not inside:
            raise UserError(f"source: {source!r} is not in the text {text!r}; name words of it")
        return tokens, (inside[0], inside[-1] + 1)


NO_TEXT = "\ufffd"
"""What a tokenizer decodes bytes to that are no character."""
_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(0x100) if byte not in _PRINTED)
BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(0x100 + at): byte for at, byte in enumerate(_OTHERS)}
"""The character by which a byte-level vocabulary writes each byte (GPT-2's)."""


def _name(tokenizer: Any, token: int) -> str:
    """Return a token's text. Bytes of a character that others complete are named as in `<0xC3>`, by which vocabularies
    of characters call them."""
    text = tokenizer.decode([token])
    if NO_TEXT not in text:
        return text or str(token)
    written = tokenizer.convert_ids_to_tokens(token)
    if not BYTES.keys() >= set(written):
        return written
    read = bytes(BYTES[mark] for mark in written).decode("utf-8", errors="backslashreplace")
    return re.sub(r"\\x(..)", lambda byte: f"<0x{byte[1].upper()}>", read)


def joined(texts: Sequence[str], between: str = "") -> str:
    """Return the text of tokens, with characters in place of the bytes that make them."""

    def character(found: re.Match[str]) -> str:
        try:
            return bytes.fromhex(re.sub("<0x|>", "", found[0])).decode("utf-8")
        except UnicodeDecodeError:  # not all of it
            return found[0]

    return re.sub(r"(?:<0x[0-9A-F]{2}>)+", character, between.join(texts))


def after(name: str, steps: Sequence[int]) -> str:
    """Return a model's name with the training steps after which it is seen."""
    if not steps:
        return name
    return f"{name}, step {steps[0]}" if len(steps) == 1 else f"{name}, steps {steps[0]} to {steps[-1]}"


def _no_text(text: str) -> tuple[list[int], list[Span]]:
    raise UserError(f"text: {text!r} cannot be read, since the model has no tokenizer; give token ids")
