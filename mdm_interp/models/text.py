"""Texts into token ids and back, with TransformerLens' names."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import index
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mdm_interp.errors import UserError, require_one_of
from mdm_interp.models.weights import Weights

PaddingSide = Literal["left", "right"]
Ids = (
    Shaped[Tensor, "*batch"]
    | np.ndarray
    | Sequence[int]
    | Sequence[np.integer]
    | Sequence[Sequence[int]]
    | Sequence[Tensor]
    | Sequence[np.ndarray]
)
Input = str | Sequence[str] | Ids
"""A text, several, or token ids of one sequence or of several."""


def read_text(tokenizer: Any, text: str, **options: Any) -> Any:
    """Return what a Hugging Face tokenizer makes of a text.

    Raises:
        UserError: it has no token for a part of the text.
    """
    try:
        return tokenizer(text, **options)
    except Exception as error:  # the tokenizers library raises nothing narrower
        known = sorted(tokenizer.get_vocab().items(), key=lambda token: token[1])
        raise UserError(
            f"text: {text!r:.80} holds what this model's tokenizer has no token for ({error!s:.80}); use its tokens: "
            f"{', '.join(name for name, _ in known)!s:.120}"
        ) from error


class Texts(Weights):
    """What a model does with its tokenizer."""

    tokenizer: Any

    def set_tokenizer(self, tokenizer: Any, default_padding_side: PaddingSide | None = None) -> None:
        """Give the model a Hugging Face tokenizer, or none.

        Args:
            default_padding_side: Where shorter texts are padded; default: where the tokenizer does.

        Raises:
            UserError: it has more tokens than the embedding has rows.
        """
        if tokenizer is not None:
            if len(tokenizer) > self.cfg.d_vocab:
                raise UserError(
                    f"tokenizer: it has {len(tokenizer)} tokens, and the model's vocabulary {self.cfg.d_vocab} "
                    "(d_vocab); give the tokenizer of these weights"
                )
            if default_padding_side is not None:
                tokenizer.padding_side = default_padding_side
        self.tokenizer = tokenizer

    def _require_tokenizer(self, what: str, value: object) -> Any:
        if self.tokenizer is None:
            raise UserError(
                f"{what}: {value!r:.80} needs a tokenizer, and this model has none; give token ids, or call "
                "set_tokenizer first"
            )
        return self.tokenizer

    def to_tokens(
        self,
        input: Input,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> Int[Tensor, "batch pos"]:
        """Return the token ids of one text or several; token ids pass through, as a batch.

        Give several texts of unequal length to the model itself, which then leaves padding out of its attention.

        Args:
            prepend_bos: Whether each text begins with the BOS token; default: `cfg.default_prepend_bos`.
            padding_side: Where shorter texts are padded; default: the tokenizer's side.
            move_to_device: Whether the ids are put where the model is.
            truncate: Whether what is longer than `cfg.n_ctx` is cut.

        Raises:
            UserError: the model has no tokenizer, or it has no BOS token that could be prepended.

        Warns:
            UserWarning: texts were padded, and the model would read their padding.
        """
        tokens, mask = self.to_tokens_and_mask(input, prepend_bos, padding_side, move_to_device, truncate)
        # Causal models never look to the right.
        unread = self.cfg.is_causal and (mask is None or bool(mask[:, 0].all()))
        if mask is not None and not unread:
            warnings.warn(
                "texts of unequal length were padded, and their padding is read like other tokens unless the model is "
                "given attention_mask (to_tokens_and_mask returns it) or the texts themselves",
                stacklevel=2,
            )
        return tokens

    def to_tokens_and_mask(
        self,
        input: Input,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None]:
        """Do as :meth:`to_tokens`, and return where tokens are real; None where all are."""
        if isinstance(input, np.ndarray) and input.dtype.kind in "OU":  # of texts
            input = input.tolist()
        if isinstance(input, (Tensor, np.ndarray)):
            tokens = torch.as_tensor(input)
            tokens = tokens.reshape(1, -1) if tokens.ndim < 2 else tokens
            tokens = tokens[:, : self.cfg.n_ctx] if truncate else tokens
            return tokens.to(self.cfg.device) if move_to_device else tokens, None
        rows: list[Any] = [input] if isinstance(input, str) or (len(input) and _is_id(input[0])) else list(input)
        if not rows:
            raise UserError("input: an empty list; give at least one text or sequence of token ids")
        texts = all(isinstance(row, str) for row in rows)
        side = padding_side or (getattr(self.tokenizer, "padding_side", None) if texts else None) or "right"
        require_one_of("padding_side", side, ("left", "right"))
        ids = self._encode(rows, prepend_bos) if texts else _whole_numbers(rows)
        if truncate:
            ids = [row[: self.cfg.n_ctx] for row in ids]
        longest = max(map(len, ids))
        pad = self._pad_id() if any(len(row) < longest for row in ids) else 0
        tokens = torch.full((len(ids), longest), pad, dtype=torch.long)
        real = torch.zeros_like(tokens, dtype=torch.bool)
        for i, row in enumerate(ids):
            at = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
            tokens[i, at], real[i, at] = torch.tensor(row, dtype=torch.long), True
        mask = None if bool(real.all()) else real
        if move_to_device:
            tokens, mask = tokens.to(self.cfg.device), mask if mask is None else mask.to(self.cfg.device)
        return tokens, mask

    def _encode(self, texts: Sequence[str], prepend_bos: bool | None) -> list[list[int]]:
        """Return the token ids of every text, with or without BOS."""
        tokenizer = self._require_tokenizer("input", texts[0] if len(texts) == 1 else list(texts))
        ids = [list(read_text(tokenizer, text)["input_ids"]) for text in texts]
        wanted = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        bos = getattr(tokenizer, "bos_token_id", None)
        if prepend_bos and bos is None:
            raise UserError(
                "prepend_bos: this model's tokenizer has no BOS token; leave prepend_bos out, or give False"
            )
        if wanted is None or bos is None:
            return ids  # as the tokenizer has them
        if wanted:
            return [row if row[:1] == [bos] else [bos, *row] for row in ids]
        prepended = list(tokenizer("")["input_ids"])[:1] == [bos]  # by the tokenizer itself
        return [row[1:] if prepended else row for row in ids]

    def _pad_id(self) -> int:
        for name in ("pad_token_id", "eos_token_id"):
            pad = getattr(self.tokenizer, name, None)
            if pad is not None:
                return pad
        return 0  # never read

    def to_string(self, tokens: int | Ids) -> str | list[str]:
        """Return the text of token ids; of several sequences, a list of texts.

        Raises:
            UserError: the model has no tokenizer.
        """
        tokenizer = self._require_tokenizer("tokens", tokens)
        given: Any = tokens
        if isinstance(given, (list, tuple)) and given and not _is_id(given[0]):
            return [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in _whole_numbers(given)]
        ids = torch.as_tensor(given)
        if ids.ndim < 2:
            return tokenizer.decode(ids.flatten().tolist(), clean_up_tokenization_spaces=False)
        return [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids.tolist()]

    def to_str_tokens(
        self, input: Input, prepend_bos: bool | None = None, padding_side: PaddingSide | None = None
    ) -> list[str] | list[list[str]]:
        """Return the text of every token of one sequence; of several texts, a list of such lists.

        Args:
            input: As of :meth:`to_tokens`; of a tensor one sequence.

        Raises:
            UserError: the model has no tokenizer, or a tensor holds several sequences.
        """
        tokenizer = self._require_tokenizer("input", input)
        if isinstance(input, (list, tuple)) and input and not _is_id(input[0]):
            each: list[Any] = list(input)
            return [self._str_tokens(tokenizer, self.to_tokens(row, prepend_bos)[0].tolist()) for row in each]
        tokens, _ = self.to_tokens_and_mask(input, prepend_bos, padding_side)
        if len(tokens) != 1:
            raise UserError(f"input: {len(tokens)} sequences, expected one; call to_str_tokens for each of them")
        return self._str_tokens(tokenizer, tokens[0].tolist())

    @staticmethod
    def _str_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
        return [tokenizer.decode([index], clean_up_tokenization_spaces=False) for index in ids]

    def to_single_token(self, string: str) -> int:
        """Return the id of a text that is one token.

        Raises:
            UserError: the model has no tokenizer, or the text is not one token.
        """
        tokenizer = self._require_tokenizer("text", string)
        ids = read_text(tokenizer, string, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UserError(f"text: {string!r} is {len(ids)} tokens, expected one; choose another word")
        return int(ids[0])

    def to_single_str_token(self, int_token: int) -> str:
        """Return the text of one token id."""
        return self._str_tokens(self._require_tokenizer("int_token", int_token), [int(int_token)])[0]

    def get_token_position(
        self,
        single_token: str | int,
        input: str | Sequence[int] | Int[Tensor, "*batch pos"] | np.ndarray,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> int:
        """Return where a token first (or last) is in a sequence.

        Raises:
            UserError: it is not there, or `mode` is neither.
        """
        require_one_of("mode", mode, ("first", "last"))
        token = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        tokens, _ = self.to_tokens_and_mask(input, prepend_bos, padding_side)
        found = (tokens[0] == token).nonzero().flatten().tolist()
        if len(tokens) != 1 or not found:
            why = f"{len(tokens)} sequences, expected one" if len(tokens) != 1 else f"{single_token!r} is not in it"
            raise UserError(f"input: {why}; look for a token that the sequence has")
        return found[0 if mode == "first" else -1]

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*tokens"]
    ) -> Float[Tensor, "*directions d_model"]:
        """Do as :meth:`residual_directions`, in the model's dtype: so `ActivationCache.logit_attrs` of a complete stack
        adds up to the logit. Of a single token, the direction alone `[d_model]`.

        Raises:
            UserError: a token is outside the vocabulary, or a text is not one token.
        """
        ids = torch.as_tensor(self.to_single_token(tokens) if isinstance(tokens, str) else tokens)
        ids = ids.reshape(()) if ids.numel() == 1 else ids
        return self.residual_directions(ids).to(self.W_U.dtype)


def _is_id(value: Any) -> bool:
    """Tell whether a value is one token id, if need be NumPy's or torch's."""
    return isinstance(value, (int, np.integer)) or (isinstance(value, Tensor) and value.ndim == 0)


def _whole_numbers(rows: Sequence[Any]) -> list[list[int]]:
    """Return sequences of token ids as lists."""
    try:
        return [
            [index(one) for one in (row.tolist() if isinstance(row, (Tensor, np.ndarray)) else row)] for row in rows
        ]
    except TypeError:
        raise UserError(
            f"input: {rows!r:.80} is neither texts nor sequences of token ids; give several of one kind, ids as whole "
            "numbers"
        ) from None
