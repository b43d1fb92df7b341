"""Filling in mask tokens step by step: the denoising loop of a masked diffusion model, and its trajectory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mdm_interp.errors import UserError, require_one_of
from mdm_interp.models.inputs import forbid_mask, require_numbers, require_predictions

FillOrder = Literal["confidence", "random", "left_to_right"]
"""Which blanks come first: where the model is most certain of its choice, any, or from the left."""


@dataclass(frozen=True)
class FillStep:
    """One step of filling blanks."""

    filled: Bool[Tensor, "batch pos"]
    """What this step filled."""
    probability: Float[Tensor, "batch pos"]
    """The model's probability of the token it would fill in; 0 where there is no blank."""
    tokens: Int[Tensor, "batch pos"]
    """The sequences after this step."""


@torch.no_grad()
def fill_blanks(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    blank: Bool[Tensor, "batch pos"],
    *,
    steps: int,
    order: FillOrder,
    attention_mask: Bool[Tensor, "batch pos"] | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[FillStep]:
    """Fill the blanks in up to `steps` steps, each filling an equal share of what is left. The mask token is never
    filled in.

    Args:
        blank: Not position 0 of a shifted model, which has no prediction.
        attention_mask: False at padding.
        temperature, generator: As for :func:`denoise`.
    """
    cfg, shift = model.cfg, model.cfg.readout_shift or 0
    padding = {} if attention_mask is None else {"attention_mask": attention_mask}
    steps = min(steps, tokens.shape[1])  # more of them would find nothing to fill
    for step in range(1, steps + 1):
        rows, at = blank.nonzero(as_tuple=True)
        if not len(rows):
            return
        seen = forbid_mask(model(tokens, **padding)[rows, at + shift].float(), cfg.mask_token_id)
        probs = seen.softmax(-1)
        require_numbers(probs.sum(), cfg.dtype)
        if temperature > 0:
            choice = torch.multinomial((seen / temperature).softmax(-1), 1, generator=generator).squeeze(-1)
        else:
            choice = probs.argmax(-1)
        probability = probs.new_zeros(tokens.shape)
        probability[rows, at] = probs.gather(-1, choice[:, None]).squeeze(-1)
        if order == "confidence":
            priority = probability
        elif order == "random":
            priority = torch.rand(tokens.shape, generator=generator, device=tokens.device)
        else:
            priority = -torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).float()
        place = priority.masked_fill(~blank, float("-inf")).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        quota = torch.ceil(blank.sum(1, keepdim=True) / (steps - step + 1))
        filled = blank & (place < quota)
        proposed = tokens.clone()
        proposed[rows, at] = choice
        tokens, blank = torch.where(filled, proposed, tokens), blank & ~filled
        yield FillStep(filled, probability, tokens)


@dataclass(frozen=True)
class Trajectory:
    """What a denoising loop did."""

    tokens: Int[Tensor, "step batch pos"]
    """The sequences before the first step and after each."""
    filled_at: Int[Tensor, "batch pos"]
    """The step (from 1) that filled a position; 0 where it was given."""
    probability: Float[Tensor, "batch pos"]
    """The model's probability of a filled token when it was filled; 1 where it was given."""


@torch.no_grad()
def denoise(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    *,
    steps: int,
    order: FillOrder = "confidence",
    attention_mask: Bool[Tensor, "batch pos"] | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Trajectory:
    """Fill the mask tokens in `steps` steps, each filling an equal share of what is left.

    Args:
        tokens: Any pattern of masks; tokens that are not the mask are kept.
        attention_mask: False at padding, which is left alone.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature).
        generator: On the model's device; draws the random order and the tokens.

    Raises:
        UserError: the model is causal or has no mask token, `steps` is below 1, the temperature is negative, the order
            is unknown, or a shifted model's first token is masked.
    """
    cfg = model.cfg
    if cfg.is_causal or cfg.mask_token_id is None:
        raise UserError("model: denoising needs bidirectional attention and a mask_token_id; use an MDM")
    if steps < 1:
        raise UserError(f"steps: {steps} is too few; use at least 1")
    if not temperature >= 0:
        raise UserError(f"temperature: {temperature} is negative; use 0 or more")
    require_one_of("order", order, get_args(FillOrder))
    blank = tokens == cfg.mask_token_id
    if attention_mask is not None:
        blank = blank & attention_mask
    if cfg.readout_shift:
        require_predictions(blank, attention_mask)
    history, filled_at = [tokens.clone()], torch.zeros_like(tokens)
    certainty = torch.ones(tokens.shape, device=tokens.device)
    filling = fill_blanks(
        model,
        tokens,
        blank,
        steps=steps,
        order=order,
        attention_mask=attention_mask,
        temperature=temperature,
        generator=generator,
    )
    for number, step in enumerate(filling, 1):
        filled_at[step.filled], certainty[step.filled] = number, step.probability[step.filled]
        history.append(step.tokens)
    return Trajectory(torch.stack(history), filled_at, certainty)
