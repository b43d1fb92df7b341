"""Bridges: TransformerLens' `TransformerBridge`, seen as the measures see a model.

A bridge wraps somebody else's implementation, so a hook may be listed and never fire, or fire when it is too late to
edit anything, or on something else than its name says. Each hook is tested on the model at hand before it is
offered.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from mdm_interp.config import ModelConfig
from mdm_interp.errors import UserError
from mdm_interp.models.classic import POSITIONS
from mdm_interp.models.inputs import check_token_ids, read_mask, rows_at
from mdm_interp.models.layers import attention_scores, per_query_head, precise
from mdm_interp.models.positions import POSITION_SCHEMES, PositionScheme, Which

_WEIGHTS = {
    "embed": {"weight": "W_E"},
    "pos_embed": {"weight": "W_pos"},
    "ln1": {"weight": "w", "bias": "b"},
    "ln2": {"weight": "w", "bias": "b"},
    "ln_final": {"weight": "w", "bias": "b"},
    "attn.q": {"weight": "W_Q", "bias": "b_Q"},
    "attn.k": {"weight": "W_K", "bias": "b_K"},
    "attn.v": {"weight": "W_V", "bias": "b_V"},
    "attn.o": {"weight": "W_O", "bias": "b_O"},
    "mlp.in": {"weight": "W_in", "bias": "b_in"},
    "mlp.gate": {"weight": "W_gate", "bias": "b_gate"},
    "mlp.out": {"weight": "W_out", "bias": "b_out"},
    "unembed": {"weight": "W_U", "bias": "b_U"},
}
"""What TransformerLens calls the parameters of a bridge's components."""


def hooked(model: Any) -> Any:
    """Return the model itself if its config is ours, or a bridge as :class:`BridgedTransformer`.

    Raises:
        UserError: it is neither.
    """
    if isinstance(getattr(model, "cfg", None), ModelConfig):
        return model
    from transformer_lens.model_bridge import TransformerBridge  # loads Hugging Face's models: only where one is in use

    if isinstance(model, TransformerBridge):
        return BridgedTransformer(model)
    raise UserError(
        f"model: {type(model).__name__} has no hooks; load it with load_checkpoint, or boot a TransformerBridge from it"
    )


class BridgedTransformer:
    """A `TransformerBridge` with what the measures ask of a `HookedTransformer`; whatever is not named here is the
    bridge's own.

    Raises:
        UserError: the bridge has no residual stream of attention and MLP blocks, or positions are given to it in a way
            that is unknown here.
    """

    def __init__(self, bridge: Any) -> None:
        self.bridge = bridge
        self.cfg = _model_config(bridge)
        working = _working_hooks(bridge, self.cfg)
        self.hook_dict = {name: point for name, point in bridge.hook_dict.items() if name in working}

    def __getattr__(self, name: str) -> Any:
        if name == "bridge":  # a copy in the making
            raise AttributeError(name)
        return getattr(self.bridge, name)

    @cached_property
    def pos_embed(self) -> PositionScheme:
        """The bridge's position scheme: the one of its config, with rotary pairs as they are seen to turn.

        Raises:
            UserError: the first layer's attention is not what this scheme gives; its rotary embedding may be scaled.
        """
        for adjacent in (self.cfg.rotary_adjacent_pairs, not self.cfg.rotary_adjacent_pairs):
            scheme = POSITION_SCHEMES[self.cfg.position](
                self.cfg.model_copy(update={"rotary_adjacent_pairs": adjacent})
            )
            if not scheme.relative:
                scheme.W_pos = nn.Parameter(self.bridge.W_pos.detach())
            if self._attends_by(scheme):
                return scheme
        raise UserError(
            f"model: attention of this bridge is not that of position scheme {self.cfg.position!r} with base "
            f"{self.cfg.rotary_base:g}; scaled rotary embeddings and other variants are not implemented"
        )

    @torch.no_grad()
    def _attends_by(self, scheme: PositionScheme) -> bool:
        """Tell whether the first layer's pattern follows from its queries and keys under a scheme."""
        tokens = torch.arange(min(16, self.cfg.d_vocab, self.cfg.n_ctx), device=self.cfg.device)[None]
        _, cache = self.run_with_cache(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        kinds: tuple[Which, ...] = ("q", "k")
        read = (scheme.rotate(cache[f"blocks.0.attn.hook_{kind}"].float(), positions, kind) for kind in kinds)
        q, k = (per_query_head(x, self.cfg.n_heads, dim=2).transpose(1, 2) for x in read)
        scores = attention_scores(q, k, scheme.bias(positions, positions), self.cfg.score_scale)
        if self.cfg.is_causal:
            scores = scores.masked_fill(positions > positions[:, None], float("-inf"))
        return torch.allclose(scores.softmax(-1), cache["blocks.0.attn.hook_pattern"].float(), atol=1e-2)

    def residual_directions(self, tokens: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens d_model"]:
        """Do as a `HookedTransformer` does: the final norm's gain is included."""
        check_token_ids("tokens", tokens, self.cfg.d_vocab)
        directions = precise(self.bridge.W_U.T[tokens])
        gain = getattr(self.bridge.ln_final, "w", None)
        if gain is None:
            return directions
        return directions * (gain + 1 if getattr(self.bridge.cfg, "rmsnorm_uses_offset", False) else gain)

    def __call__(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
        readout: Int[Tensor, "batch row"] | None = None,
    ) -> Float[Tensor, "batch row d_vocab"]:
        """Compute the logits, position for position as the network does; `readout` selects positions from them."""
        return self.run_with_hooks(tokens, attention_mask, readout)

    def run_with_hooks(
        self, tokens: Tensor, attention_mask: Tensor | None = None, readout: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Run as `TransformerBridge.run_with_hooks` does; `readout` is that of a call."""
        logits = self.bridge.run_with_hooks(tokens, attention_mask=_explicit(tokens, attention_mask), **kwargs)
        return logits if readout is None else rows_at(logits, readout)

    def run_with_cache(self, tokens: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Any]:
        """Run as `TransformerBridge.run_with_cache` does."""
        return self.bridge.run_with_cache(tokens, attention_mask=_explicit(tokens, attention_mask), **kwargs)

    # ---- parameters, under a HookedTransformer's names and in their own shapes

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return every parameter, named as in a HookedTransformer.

        Raises:
            UserError: a parameter is of no component that TransformerLens names.
        """
        return iter(self._named)

    @cached_property
    def _named(self) -> list[tuple[str, nn.Parameter]]:
        ours: dict[int, str] = {}
        layers = [f"blocks.{layer}." for layer in range(self.cfg.n_layers)]
        for path, leaves in _WEIGHTS.items():
            per_layer = path.startswith(("ln1", "ln2", "attn", "mlp"))
            for prefix in layers if per_layer else [""]:
                component = _component(self.bridge, prefix + path)
                part = prefix + path.split(".")[0]
                for leaf, name in leaves.items():
                    parameter = getattr(getattr(component, "original_component", None), leaf, None)
                    if isinstance(parameter, nn.Parameter):
                        ours.setdefault(id(parameter), f"{part}.{name}")
        unnamed = [name for name, parameter in self.bridge.named_parameters() if id(parameter) not in ours]
        if unnamed:
            raise UserError(
                f"model: parameter {unnamed[0].replace('_original_component.', '')!r} of this bridge is no component's "
                "own, so its gradient cannot be told apart; use a model with separate Q, K, V and O"
            )
        return [(ours[id(parameter)], parameter) for _, parameter in self.bridge.named_parameters()]

    def functional(self, parameters: Mapping[str, Tensor], tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the logits under other parameters, given by the names of :meth:`named_parameters`."""
        theirs = {
            f"original_model.{name}": parameters[ours]
            for (name, _), (ours, _) in zip(self.bridge.named_parameters(), self._named, strict=True)
        }
        mask = {"attention_mask": _explicit(tokens, attention_mask)}
        return functional_call(self.bridge, theirs, (tokens,), mask)


def _component(bridge: Any, path: str) -> Any:
    """Return the bridge's component at a dotted path; None where it has none."""
    at: Any = bridge
    for part in path.split("."):
        at = at[int(part)] if part.isdigit() else getattr(at, part, None)
    return at


def _explicit(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the mask as bridges take it. Without one they would guess it, from where a pad token is."""
    return torch.ones_like(tokens) if attention_mask is None else read_mask(attention_mask, tokens).long()


def _model_config(bridge: Any) -> ModelConfig:
    """Return what the measures need to know of a bridge, as our config."""
    cfg = bridge.cfg
    position = POSITIONS.get(cfg.positional_embedding_type)
    if position is None:
        raise UserError(
            f"model: this bridge gives positions as {cfg.positional_embedding_type!r}, which is not known here; use "
            f"one of {', '.join(POSITIONS)}"
        )
    causal = getattr(cfg, "attention_dir", "causal") == "causal"
    shifted = causal or str(getattr(cfg, "architecture", "")).startswith("Dream")
    rope = {
        "rotary_base": float(cfg.rotary_base),
        "rotary_dim": cfg.rotary_dim or cfg.d_head,
        "rotary_adjacent_pairs": bool(cfg.rotary_adjacent_pairs),
    }
    fields = {
        "d_model": cfg.d_model,
        "n_heads": cfg.n_heads,
        "n_key_value_heads": cfg.n_key_value_heads or cfg.n_heads,
        "d_head": cfg.d_head,
        "n_layers": cfg.n_layers,
        "n_ctx": cfg.n_ctx,
        "d_vocab": bridge.W_E.shape[0],
        "d_mlp": None if cfg.attn_only else cfg.d_mlp,
        "attention": "causal" if causal else "bidirectional",
        "position": position,
        "eps": getattr(cfg, "eps", None) or 1e-5,
        "normalization_type": "RMS" if getattr(bridge.ln_final, "uses_rms_norm", False) else "LN",
        "readout_shift": -1 if shifted else 0,
        "device": str(bridge.W_E.device),
        "dtype": bridge.W_E.dtype,
    }
    return ModelConfig.model_validate(fields | (rope if position == "rope" else {}))


@torch.no_grad()
def _working_hooks(bridge: Any, cfg: ModelConfig) -> set[str]:
    """Return the hooks that fire in this bridge. Scores and patterns count only if the ones become the others by
    softmax, and if editing them changes the logits."""
    tokens = torch.arange(min(4, cfg.d_vocab), device=cfg.device)[None]
    given = {"attention_mask": torch.ones_like(tokens)}
    logits, cache = bridge.run_with_cache(tokens, **given)
    working = set(cache.keys())
    for layer in range(cfg.n_layers):
        scores, pattern = (f"blocks.{layer}.attn.hook_{kind}" for kind in ("attn_scores", "pattern"))
        if not {scores, pattern} <= working or not torch.allclose(
            cache[scores].float().softmax(-1), cache[pattern].float(), atol=1e-2
        ):
            working.discard(scores)
        for name in {scores, pattern} & working:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TransformerLens says itself that an edit comes too late
                edited = bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x.flip(-1))], **given)
            if torch.equal(edited, logits):
                working.discard(name)
    return working
