"""Sentences as training reads them: masked copies whose weighted losses add up to each sentence's own loss."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mdm_interp.config import ModelConfig
from mdm_interp.data.queries import QueryBatch, Span, require_mask
from mdm_interp.errors import UserError, require_some
from mdm_interp.files import read_text
from mdm_interp.models.inputs import check_token_ids


@dataclass(frozen=True)
class MaskedCopies:
    """Copies of sentences. Each copy's answer is what is masked in it, and its loss that of the answer.

    A sentence's loss is the sum over its copies of weight times loss, in nats: an unbiased estimate of a masked
    diffusion model's bound on its negative log-probability, and exactly that of a causal model but for the first token.
    """

    batches: tuple[QueryBatch, ...]
    sentence: Int[Tensor, "copy"]
    """Which sentence each is of, in the batches' order."""
    weight: Float[Tensor, "copy"]


def read_sentences(path: str | Path, tokenizer: Any, cfg: ModelConfig) -> list[tuple[int, ...]]:
    """Read a text file (UTF-8) with a sentence on each line, in a tokenizer's tokens, each after a space as in
    :mod:`mdm_interp.data.prompts`.

    Raises:
        UserError: the file cannot be read, or holds no sentences, or one that the model of `cfg` cannot be asked.
    """
    path = Path(path)
    try:
        lines = [line.strip() for line in read_text(path, most=2**23).removeprefix("\ufeff").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a text file in UTF-8") from error
    if long := next((number for number, line in enumerate(lines, 1) if len(line) > LONGEST), None):
        raise UserError(f"{path}: line {long} has more than {LONGEST} characters, too many for a sentence; divide it")
    sentences = {number: tuple(tokenizer(f" {line}")["input_ids"]) for number, line in enumerate(lines, 1) if line}
    if not sentences:
        raise UserError(f"{path}: holds no sentences; write one on each line")
    for number, tokens in sentences.items():
        asked = _predictable(tokens, cfg, tokenizer.all_special_ids)
        if not asked or len(tokens) > cfg.n_ctx:
            raise UserError(
                f"{path}: line {number} has {len(tokens)} tokens, {len(asked)} to predict, and the model takes 1 to "
                f"{cfg.n_ctx}; leave it out, or divide it"
            )
    return list(sentences.values())


def _predictable(tokens: Sequence[int], cfg: ModelConfig, kept: Collection[int], span: Span | None = None) -> list[int]:
    """Return the positions of a sentence, or of a span of it, that a model can predict."""
    within = range(len(tokens)) if span is None else range(*span)
    return [at for at in within if at + (cfg.readout_shift or 0) >= 0 and tokens[at] not in kept]


LONGEST = 2**16
"""Characters of a line: a model's context is shorter, and a tokenizer takes its time."""


def mask_copies(
    sentences: Sequence[Sequence[int]],
    cfg: ModelConfig,
    *,
    n_draws: int,
    seed: int,
    kept: Collection[int] = (),
    spans: Sequence[Span] | None = None,
    max_tokens: int = 2048,
) -> MaskedCopies:
    """Draw masked copies of sentences. A causal model gets each sentence once, as it is.

    Copy m of n_draws masks l of a sentence's L tokens, chosen at random, and weighs L / l. Its l is drawn from the
    m-th of n_draws equal parts of 1 to L, so that few copies see few and many masks.

    Args:
        seed: Draws the masks. A sentence is drawn alike whatever others there are.
        kept: Tokens that are never masked, such as special ones.
        spans: What of each sentence is predicted, given the rest; default: all of it.
        max_tokens: How many tokens a batch has at most.

    Raises:
        UserError: there are no sentences, no draws or no mask token, or a sentence has too many tokens, has none to
            predict, or has one outside of the vocabulary.

    Source: arXiv 2502.09992, eq. 6.
    """
    require_some("sentences", sentences)
    require_mask(cfg)
    if n_draws < 1:
        raise UserError(f"n_draws: {n_draws} draws say nothing; use at least 1")
    generator = torch.Generator()
    copies: list[tuple[list[int], list[int], float]] = []  # tokens, positions to predict, weight
    sentence: list[int] = []
    for index, tokens in enumerate(map(list, sentences)):
        check_token_ids("sentences", torch.tensor(tokens, dtype=torch.long), cfg.d_vocab)
        asked = _predictable(tokens, cfg, kept, None if spans is None else spans[index])
        if not asked or len(tokens) > cfg.n_ctx:
            raise UserError(
                f"sentences: number {index} has {len(tokens)} tokens, {len(asked)} to predict, and the model takes 1 "
                f"to {cfg.n_ctx}; leave it out"
            )
        generator.manual_seed(random.Random(f"{seed} {tokens} {asked}").getrandbits(63))
        for draw in range(1 if cfg.is_causal else n_draws):
            sentence.append(index)
            if cfg.is_causal:
                copies.append((tokens, asked, 1.0))
                continue
            assert cfg.mask_token_id is not None
            place = (draw + torch.rand((), generator=generator).item()) / n_draws
            count = 1 + min(int(place * len(asked)), len(asked) - 1)
            masked = sorted(asked[i] for i in torch.randperm(len(asked), generator=generator)[:count].tolist())
            noisy = [cfg.mask_token_id if at in masked else token for at, token in enumerate(tokens)]
            copies.append((noisy, masked, len(asked) / count / n_draws))
    size = max(1, max_tokens // max(len(tokens) for tokens, *_ in copies))
    batches = [
        _collate(copies[first : first + size], [sentences[i] for i in sentence[first : first + size]], cfg)
        for first in range(0, len(copies), size)
    ]
    return MaskedCopies(
        tuple(batches), torch.tensor(sentence), torch.tensor([w for *_, w in copies], dtype=torch.float64)
    )


def _collate(
    copies: Sequence[tuple[list[int], list[int], float]], truth: Sequence[Sequence[int]], cfg: ModelConfig
) -> QueryBatch:
    n_pos, span = max(len(tokens) for tokens, *_ in copies), max(len(masked) for _, masked, _ in copies)
    tokens, real = torch.zeros(2, len(copies), n_pos, dtype=torch.long)
    readout, answer, answered = torch.zeros(3, len(copies), span, dtype=torch.long)
    for row, ((given, masked, _), said) in enumerate(zip(copies, truth, strict=True)):
        tokens[row, : len(given)], real[row, : len(given)] = torch.tensor(given), 1
        readout[row, : len(masked)] = torch.tensor(masked) + (cfg.readout_shift or 0)
        answer[row, : len(masked)] = torch.tensor([said[at] for at in masked])
        answered[row, : len(masked)] = 1
    mask = None if bool(real.all()) else real.bool()
    source = torch.zeros_like(tokens, dtype=torch.bool)
    return QueryBatch(tokens, mask, readout, answer, answered.bool(), source).to(torch.device(cfg.device))
