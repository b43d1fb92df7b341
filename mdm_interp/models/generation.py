"""Texts continued by causal models, and filled in by masked diffusion models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from rich.progress import track
from torch import Tensor
from transformer_lens.utilities import sample_logits

import mdm_interp
from mdm_interp.errors import UserError, require_one_of
from mdm_interp.models.processing import ProcessedWeights
from mdm_interp.models.text import Input, PaddingSide

ReturnType = Literal["input", "str", "tokens"]
"""As the input was given, as text, or as token ids."""


class Generation(ProcessedWeights):
    """What a model writes. Hooks on the model are active in every forward pass."""

    @torch.no_grad()
    def generate(
        self,
        input: Input,
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        *,
        use_past_kv_cache: bool = False,
        prepend_bos: bool | None = None,
        return_type: ReturnType = "input",
        verbose: bool = True,
    ) -> str | list[str] | Int[Tensor, "batch pos"]:
        """Continue texts or token ids with a causal model, token by token. Each token is one forward pass over all of
        them: hooks see whole sequences, and no keys and values are kept.

        Args:
            input: Texts of unequal length are padded on the left.
            stop_at_eos: Whether a sequence that has got an `eos_token_id` is only padded with it from then on.
            eos_token_id: One or several; default: the tokenizer's; without either, nothing stops a sequence.
            do_sample: False takes the likeliest token.
            top_k: Draw from the `top_k` likeliest tokens only.
            top_p: Draw from the fewest tokens that have at least this probability; not read if there is a `top_k`.
            temperature: Draw from softmax(logits / temperature); 0 takes the likeliest token.
            freq_penalty: In drawing, take this from a token's logit / temperature for each time it is there already.
            use_past_kv_cache: Makes no difference; the classic model keeps keys and values if it is set.
            return_type: Texts are without special tokens.
            verbose: Whether a terminal shows how far it is.

        Raises:
            UserError: the model is not causal, there is nothing to continue, the model has fewer positions than that
                takes, or nothing can be drawn like that.
        """
        if not self.cfg.is_causal:
            raise UserError(
                "generate: this model's attention is bidirectional; call denoise, which fills in mask tokens"
            )
        _check_return_type(return_type)
        _check_drawing(top_k, top_p, temperature, freq_penalty)
        tokens, mask = self.to_tokens_and_mask(input, prepend_bos, "left")
        if not tokens.shape[1]:
            raise UserError("input: there is no token to continue; give one, or prepend_bos=True")
        if tokens.shape[1] + max_new_tokens > self.cfg.n_ctx:
            raise UserError(
                f"max_new_tokens: {max_new_tokens} after {tokens.shape[1]} tokens exceed n_ctx {self.cfg.n_ctx}; ask "
                "for fewer"
            )
        eos = getattr(self.tokenizer, "eos_token_id", None) if eos_token_id is None else eos_token_id
        ends = torch.tensor(
            [] if eos is None or not stop_at_eos else eos, dtype=torch.long, device=tokens.device
        ).flatten()
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        for _ in track(range(max_new_tokens), "Generating", transient=True, disable=not verbose):
            logits = self(tokens, attention_mask=None if mask is None else real)[:, -1].float()
            if do_sample and temperature > 0:
                counts = torch.zeros_like(logits).scatter_add_(1, tokens.long(), real.to(logits))
                new = sample_logits(logits - temperature * freq_penalty * counts, top_k, top_p, temperature)
            else:
                new = logits.argmax(-1)
            real = torch.cat([real, ~done[:, None]], dim=1)
            if len(ends):
                new = torch.where(done, ends[0], new)
                done = done | torch.isin(new, ends)
            tokens = torch.cat([tokens, new.to(tokens)[:, None]], dim=1)
            if bool(done.all()):
                break
        return self._as_given(input, tokens, real, return_type)

    def denoise(
        self,
        input: Input,
        *,
        steps: int | None = None,
        new_tokens: int = 0,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        return_type: ReturnType | Literal["trajectory"] = "input",
        **options: Any,
    ) -> Any:
        """Fill in the mask tokens of texts or token ids with a masked diffusion model.

        Args:
            input: A text has the tokenizer's mask token where something is to be filled in.
            steps: In how many steps; default: one for each mask token of the sequence that has the most.
            new_tokens: How many mask tokens are added at the end first.
            return_type: `trajectory` gives the :class:`~mdm_interp.inference.denoising.Trajectory`.
            options: As of :func:`mdm_interp.denoise`: the order, the temperature, …

        Raises:
            UserError: as :func:`mdm_interp.denoise` does, or there is no mask token.
        """
        if return_type != "trajectory":
            _check_return_type(return_type)
        mask_id = self.cfg.mask_token_id
        if self.cfg.is_causal or mask_id is None:
            raise UserError(
                "denoise: needs bidirectional attention and a mask_token_id; call generate of a causal model"
            )
        side = "left" if new_tokens and padding_side is None else padding_side  # what is added follows the text
        tokens, mask = self.to_tokens_and_mask(input, prepend_bos, side)
        if new_tokens:
            tokens = torch.cat([tokens, tokens.new_full((len(tokens), new_tokens), mask_id)], dim=1)
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), new_tokens)], dim=1)
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        most = int(((tokens == mask_id) & real).sum(1).max())
        if not most:
            raise UserError(f"input: there is no mask token ({mask_id}) to fill in; put one in, or give new_tokens")
        trajectory = mdm_interp.denoise(
            self, tokens, steps=most if steps is None else steps, attention_mask=mask, **options
        )
        if return_type == "trajectory":
            return trajectory
        return self._as_given(input, trajectory.tokens[-1], real, return_type)

    def _as_given(self, input: Any, tokens: Tensor, real: Tensor, return_type: str) -> Any:
        """Return token ids as `return_type` says; texts are of real tokens alone."""
        texts = isinstance(input, str) or (not isinstance(input, Tensor) and isinstance(input[0], str))
        if return_type == "tokens" or (return_type == "input" and not texts):
            return tokens
        tokenizer = self._require_tokenizer("return_type", return_type)
        written = [
            tokenizer.decode(row[kept].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row, kept in zip(tokens, real, strict=True)
        ]
        return written[0] if isinstance(input, str) or (len(written) == 1 and return_type == "str") else written


def _check_return_type(return_type: str) -> None:
    require_one_of("return_type", return_type, get_args(ReturnType))


def _check_drawing(top_k: int | None, top_p: float | None, temperature: float, freq_penalty: float) -> None:
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k: {top_k} leaves no token to draw; use at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p: {top_p} is no probability; use one above 0, at most 1")
    if temperature < 0 or freq_penalty < 0:
        name, value = ("temperature", temperature) if temperature < 0 else ("freq_penalty", freq_penalty)
        raise UserError(f"{name}: {value} is negative; use 0 or more")
