"""What a model is given, token ids and masks, checked before anything is computed; and where its outputs are read."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from mdm_interp.errors import Overflow, UserError


def check_token_ids(name: str, tokens: Shaped[Tensor, "*ids"], d_vocab: int) -> None:
    """Refuse what are no token ids; a negative one would count from the end, and on a GPU any other ends the process.

    Within `torch.func.vmap` values cannot be looked at and pass: queries are checked where they are collated.

    Raises:
        UserError: the dtype is none of ids, or an id is outside the vocabulary.
    """
    if tokens.dtype not in (torch.int64, torch.int32):
        dtype = str(tokens.dtype).removeprefix("torch.")
        raise UserError(f"{name}: expected token ids as int64, got {dtype}; convert them with .long() if they are ids")
    batched = not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(tokens)  # Dynamo cannot trace that
    if batched or not tokens.numel():
        return
    lowest, highest = torch.stack(tokens.aminmax()).tolist()  # one look at the device
    if lowest < 0 or highest >= d_vocab:
        place = ((tokens < 0) | (tokens >= d_vocab)).nonzero()[0].tolist()
        raise UserError(
            f"{name}: id {int(tokens[tuple(place)])} at {place} is outside the vocabulary of {d_vocab} (d_vocab); "
            "correct it, or use the model's own tokenizer"
        )


def read_mask(
    attention_mask: Shaped[Tensor, "*mask"], tokens: Shaped[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    """Return True where a token is real, from a mask of booleans, zeros or ones.

    Raises:
        UserError: it has another shape than the tokens, or other values.
    """
    if attention_mask.shape != tokens.shape:
        raise UserError(
            f"attention_mask: expected the shape of tokens {list(tokens.shape)}, got {list(attention_mask.shape)}"
        )
    if attention_mask.dtype == torch.bool:
        return attention_mask
    if attention_mask.is_floating_point() or bool(((attention_mask != 0) & (attention_mask != 1)).any()):
        dtype = str(attention_mask.dtype).removeprefix("torch.")
        raise UserError(
            f"attention_mask: got {dtype}, and only booleans or integers 0 and 1 are read; give True where a token is "
            "real, False at padding (of an additive mask: mask == 0)"
        )
    return attention_mask.bool()


def check_layer(name: str, layer: int, first: int, last: int) -> None:
    """Refuse a layer that is not there.

    Raises:
        UserError: it is not one from `first` to `last`.
    """
    if not first <= layer <= last:
        raise UserError(f"{name}: the model has no layer {layer}; give {first} to {last}")


def places(real: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Count positions from each sequence's first real token; 0 before it."""
    n_pos = real.shape[1]
    before = (real.cumsum(1) == 0).sum(1, keepdim=True)
    return (torch.arange(n_pos, device=real.device) - before).clamp(min=0)


def within_reach(
    reach: int | None, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]
) -> Bool[Tensor, "..."] | None:
    """Tell which keys queries may read, by their places alone, which broadcast; None: all.

    Args:
        reach: `ModelConfig.reach`.
    """
    return None if reach is None else key_pos // reach <= query_pos // reach


def rows_at(
    x: Shaped[Tensor, "batch pos *rest"], positions: Int[Tensor, "batch row"]
) -> Shaped[Tensor, "batch row *rest"]:
    """Return the rows of `x` at some positions of each sequence."""
    return x[torch.arange(len(x), device=x.device)[:, None], positions.to(x.device)]


def forbid_mask(logits: Float[Tensor, "*rows d_vocab"], mask_token_id: int | None) -> Float[Tensor, "*rows d_vocab"]:
    """Set the mask's logits to -inf, in place: what is filled in is never a mask. Some models cannot predict one."""
    if mask_token_id is not None and mask_token_id < logits.shape[-1]:
        logits[..., mask_token_id] = -torch.inf
    return logits


def require_numbers(read: Float[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """Return what was read of logits, on the CPU, where this look at it costs a GPU no time.

    Raises:
        Overflow: some of it is NaN, since logits are NaN or infinite.
    """
    read = read.cpu()
    if bool(read.isnan().any()):
        name = str(dtype).removeprefix("torch.")
        other = "float32 or bfloat16" if dtype == torch.float16 else "float64"
        raise Overflow(
            f"model: its logits are NaN or infinite in {name}; load it in {other} (dtype=…, --dtype), or check its "
            "weights"
        )
    return read


def require_predictions(masked: Bool[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"] | None) -> None:
    """Refuse mask tokens that no token comes before, whose predictions a shifted model reads there.

    Raises:
        UserError: there is such a mask token: at position 0, or next to padding.
    """
    before = torch.ones_like(masked) if real is None else real.roll(1, dims=1)
    alone = masked & ~before
    alone[:, 0] = masked[:, 0]
    if bool(alone.any()):
        position = int(alone.nonzero()[0, 1])
        raise UserError(
            f"tokens: position {position} is masked, but has no prediction in a shifted model; give its token"
        )
