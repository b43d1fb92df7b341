"""Capture: what each layer's attention reads, from the readout positions only, reduced while the forward pass runs.

Nothing of a layer outlives its reduction, and no more of its attention is computed than the rows that predictions are
read from: memory grows with batch x heads x length, not with the square of the length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mdm_interp.data.queries import QueryBatch
from mdm_interp.errors import UserError
from mdm_interp.models.bridge import BridgedTransformer
from mdm_interp.models.inputs import within_reach
from mdm_interp.models.layers import attention_scores, content_hooks, per_query_head, precise
from mdm_interp.models.positions import rotates
from mdm_interp.models.protocol import HookedModel

T = TypeVar("T")


@dataclass(frozen=True)
class LayerView:
    """One layer's attention, as the readout positions of a batch of queries see it."""

    layer: int
    model: HookedModel
    batch: QueryBatch
    seen: dict[str, Tensor]
    """Activations by the end of their hook's name, whole for keys and values, else readout rows; float32 at least."""

    def __getitem__(self, kind: str) -> Tensor:
        try:
            return self.seen[kind]
        except KeyError:
            name = f"blocks.{self.layer}.attn.hook_{kind}"
            raise UserError(
                f"model: it has no hook {name!r}, which this measure reads; use a model that has it"
            ) from None

    @property
    def v(self) -> Float[Tensor, "query key_pos kv_head d_head"]:
        """Values."""
        return self["v"]

    @cached_property
    def scores(self) -> Float[Tensor, "query span head key_pos"]:
        """Scores before the softmax, position bias included; the most negative number there is where a key must not
        be read."""
        q_name, k_name = _rotated(self.model)
        if q_name not in self.seen:
            return self["attn_scores"]
        cfg, q = self.model.cfg, self.seen[q_name].transpose(1, 2)
        k = per_query_head(self.seen[k_name], cfg.n_heads, dim=2).transpose(1, 2)
        key_pos = torch.arange(k.shape[2], device=k.device)
        bias = self.model.pos_embed.bias(self.batch.readout.flatten(), key_pos)
        bias = None if bias is None else rearrange(bias, "head (q s) key_pos -> q head s key_pos", q=len(q))
        scores = attention_scores(q, k, bias, cfg.score_scale).transpose(1, 2)
        forbidden = torch.finfo(scores.dtype).min
        reached = within_reach(cfg.reach, self.batch.readout[:, :, None, None], key_pos)
        if reached is not None:
            scores = scores.masked_fill(~reached, forbidden)
        padding = self.batch.attention_mask
        return scores if padding is None else scores.masked_fill(~padding[:, None, None], forbidden)

    @cached_property
    def pattern(self) -> Float[Tensor, "query span head key_pos"]:
        """Shares of attention; each row adds up to 1."""
        return self["pattern"] if _rotated(self.model)[0] not in self.seen else self.scores.softmax(-1)


def capture(
    model: HookedModel, batch: QueryBatch, reduce: Callable[[LayerView], T], *, all_logits: bool = False
) -> tuple[Float[Tensor, "query row d_vocab"], list[T]]:
    """Run the model on a batch of queries, calling `reduce` on every layer as soon as its attention has run.

    Attention that a hook on scores or pattern edits, and all attention of a bridge, is read from those hooks.

    Args:
        model: As :func:`mdm_interp.models.bridge.hooked` returns it.
        reduce: What to keep of a layer; never the view itself.
        all_logits: Whether logits are those of all positions.

    Returns:
        Logits at the readout positions, and what was kept of each layer.

    Raises:
        UserError: the model lacks a hook that `reduce` needs.
    """
    kept: list[T] = []
    hooks = [hook for layer in range(model.cfg.n_layers) for hook in _hooks(model, layer, batch, reduce, kept)]
    read = {} if all_logits else {"readout": batch.readout}
    logits = model.run_with_hooks(batch.tokens, attention_mask=batch.attention_mask, fwd_hooks=hooks, **read)
    return logits, kept


def on_cpu(kept: Sequence[Shaped[Tensor, "..."]], dim: int) -> Shaped[Tensor, "..."]:
    """Stack what was kept of each layer, on the CPU: in one copy, as each makes the CPU wait for a GPU."""
    there = kept[0].device  # of a model spread over devices, the first layer's
    return torch.stack([layer.to(there) for layer in kept], dim).cpu()


KEYS = ("k", "k_normalized", "rot_k")
"""Hooks of keys, of which all positions are read."""


def _rotated(model: HookedModel) -> tuple[str, str]:
    return ("rot_q", "rot_k") if rotates(model.cfg) else content_hooks(model.cfg)


def _hooks(
    model: HookedModel, layer: int, batch: QueryBatch, reduce: Callable[[LayerView], T], kept: list[T]
) -> list[tuple[str, Callable]]:
    """Return the hooks that see one layer, reduce it and let it go."""
    prefix, seen = f"blocks.{layer}.attn.hook_", {}

    def see(kind: str) -> tuple[str, Callable]:
        def hook(x: Tensor, hook: HookPoint) -> None:
            if kind in ("attn_scores", "pattern"):
                x = x.transpose(1, 2)
            x = x if kind in ("v", *KEYS) else batch.at_readout(x)
            seen[kind] = precise(x)

        return prefix + kind, hook

    def finish(z: Tensor, hook: HookPoint) -> None:
        here = batch.to(z.device)  # of a model spread over devices, this layer's
        kept.append(reduce(LayerView(layer, model, here, seen)))
        seen.clear()

    edited = isinstance(model, BridgedTransformer) or any(
        model.hook_dict[prefix + kind].has_hooks() for kind in ("attn_scores", "pattern")
    )
    kinds = ("v", "attn_scores", "pattern") if edited else ("v", *_rotated(model))
    return [*(see(kind) for kind in kinds if prefix + kind in model.hook_dict), (prefix + "z", finish)]
