"""The masked diffusion process: masking, training losses and the denoising loop.

The loss follows LLaDA (arXiv 2502.09992, eq. 3): draw t ~ U(0, 1], mask every token with probability t, and weight the
cross-entropy of the masked tokens by 1/t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mdm_interp.config import Objective
from mdm_interp.facts import FactBatch
from mdm_interp.files import UserError


def mask_tokens(
    tokens: Int[Tensor, "batch pos"],
    mask_token_id: int,
    generator: torch.Generator,
    maskable: Bool[Tensor, "batch pos"] | None = None,
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"], Float[Tensor, "batch 1"]]:
    """Mask each (maskable) token with probability t ~ U(0, 1], one t per sequence.

    Returns:
        The masked tokens, which ones were masked, and t.
    """
    t = 1 - torch.rand(len(tokens), 1, generator=generator)
    masked = torch.rand(tokens.shape, generator=generator) < t
    masked = masked if maskable is None else masked & maskable
    return torch.where(masked, mask_token_id, tokens), masked, t


def mdm_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    masked: Bool[Tensor, "batch pos"],
    t: Float[Tensor, "batch 1"],
) -> Float[Tensor, ""]:
    """Cross-entropy of the masked tokens in nats, weighted 1/t, divided by batch * length."""
    losses = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    return (losses * masked / t).mean()


def arm_loss(logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Next-token cross-entropy in nats, averaged over batch and positions."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def training_loss(model: Any, batch: FactBatch, objective: Objective, generator: torch.Generator) -> Float[Tensor, ""]:
    """The loss of one batch under `objective`; `generator` (on the CPU) draws the masks."""
    device = model.cfg.device
    if objective == "causal":
        tokens = batch.tokens.to(device)
        return arm_loss(model(tokens), tokens)
    maskable = None
    if objective != "any_order":
        only = batch.left if objective == "source_only" else batch.right
        maskable = torch.arange(batch.tokens.shape[1]) == only[:, None]
    drawn = mask_tokens(batch.tokens, model.cfg.mask_token_id, generator, maskable)
    noisy, masked, t = (tensor.to(device) for tensor in drawn)
    return mdm_loss(model(noisy), batch.tokens.to(device), masked, t)


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
    order: Literal["confidence", "random", "left_to_right"] = "confidence",
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Trajectory:
    """Fill the mask tokens in `steps` steps, each filling an equal share of what is left.

    Args:
        tokens: Any pattern of masks; tokens that are not the mask are kept.
        order: Which positions come first: where the model is most certain, any, or from the left.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature).
        generator: On the model's device; draws the random order and the tokens.

    Raises:
        UserError: the model is causal or has no mask token, `steps` is below 1, or a shifted model's position 0 is
            masked.
    """
    cfg = model.cfg
    if cfg.is_causal or cfg.mask_token_id is None:
        raise UserError("model: denoising needs bidirectional attention and a mask_token_id; use an MDM")
    if steps < 1:
        raise UserError(f"steps: {steps} is too few; use at least 1")
    current = tokens.clone()
    if cfg.readout_shift and bool((current[:, 0] == cfg.mask_token_id).any()):
        raise UserError("tokens: position 0 is masked, but has no prediction in a shifted model; give its token")
    history, filled_at = [current.clone()], torch.zeros_like(current)
    certainty = torch.ones(current.shape, device=current.device)
    for step in range(1, steps + 1):
        masked = current == cfg.mask_token_id
        if not bool(masked.any()):
            break
        logits = model(current).float()
        if cfg.readout_shift:
            logits = logits.roll(-cfg.readout_shift, dims=1)
        is_mask = torch.arange(logits.shape[-1], device=logits.device) == cfg.mask_token_id
        logits = logits.masked_fill(is_mask, float("-inf"))
        probs = logits.softmax(-1)
        if temperature > 0:
            drawn = (logits / temperature).softmax(-1).flatten(0, 1)
            choice = torch.multinomial(drawn, 1, generator=generator).view(current.shape)
        else:
            choice = probs.argmax(-1)
        chosen = probs.gather(-1, choice[..., None]).squeeze(-1)
        if order == "confidence":
            priority = chosen
        elif order == "random":
            priority = torch.rand(chosen.shape, generator=generator, device=chosen.device)
        else:
            priority = -torch.arange(current.shape[1], device=chosen.device).expand_as(current).float()
        place = priority.masked_fill(~masked, float("-inf")).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        quota = torch.ceil(masked.sum(1, keepdim=True) / (steps - step + 1))
        fill = masked & (place < quota)
        current = torch.where(fill, choice, current)
        filled_at[fill], certainty[fill] = step, chosen[fill]
        history.append(current.clone())
    return Trajectory(torch.stack(history), filled_at, certainty)
