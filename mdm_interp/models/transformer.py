"""The hooked transformer: bidirectional or causal attention under any position scheme, every activation hookable.

Built on TransformerLens' `HookedRootModule`, with the hook and weight names of its classic `HookedTransformer`, so
`ActivationCache`, `FactoredMatrix` and `transformer_lens.patching` work on it. Axis names, here and everywhere:

    batch      independent sequences              head     attention head (`kv_head`: key/value head)
    query_pos  position that reads                d_head   dimensions of a head
    key_pos    position that is read              d_model  residual stream
    pos        a position, when sides don't matter  d_vocab  tokens, mask included
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookFunction
from transformer_lens.utilities import Slice, TypedModuleList

from mdm_interp.config import ModelConfig
from mdm_interp.errors import UserError
from mdm_interp.models.hooks import CheckedHookPoint
from mdm_interp.models.layers import Attention, Block, Embed, Norm, Unembed, make_norm, per_query_head, precise
from mdm_interp.models.positions import POSITION_SCHEMES, PositionScheme

PER_HEAD = {"q", "k", "v", "rot_q", "rot_k", "z", "result", "q_input", "k_input", "v_input"}
"""Hooks on activations of shape [batch pos head …]."""


def check_token_ids(name: str, tokens: Shaped[Tensor, "*ids"], d_vocab: int) -> None:
    """Refuse what are no token ids; a negative one would count from the end, and on a GPU any other ends the process.

    Within `torch.func.vmap` values cannot be looked at and pass: queries are checked where they are collated.

    Raises:
        UserError: the dtype is none of ids, or an id is outside the vocabulary.
    """
    if tokens.dtype not in (torch.int64, torch.int32):
        dtype = str(tokens.dtype).removeprefix("torch.")
        raise UserError(f"{name}: expected token ids as int64, got {dtype}; convert them with .long() if they are ids")
    if is_functorch_wrapped_tensor(tokens) or not tokens.numel():
        return
    lowest, highest = torch.stack(tokens.aminmax()).tolist()  # one look at the device
    if lowest < 0 or highest >= d_vocab:
        place = ((tokens < 0) | (tokens >= d_vocab)).nonzero()[0].tolist()
        raise UserError(
            f"{name}: id {int(tokens[tuple(place)])} at {place} is outside the vocabulary of {d_vocab} (d_vocab); "
            "correct it, or use the model's own tokenizer"
        )


def read_mask(attention_mask: Shaped[Tensor, "*mask"], tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
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


def _places(real: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Count positions from each sequence's first real token; 0 before it."""
    n_pos = real.shape[1]
    before = (real.cumsum(1) == 0).sum(1, keepdim=True)
    return (torch.arange(n_pos, device=real.device) - before).clamp(min=0)


class HookedTransformer(HookedRootModule):
    """A transformer whose activations can all be read and edited by name.

        model = HookedTransformer(ModelConfig(d_model=64, n_heads=4, d_vocab=101, n_ctx=8))
        logits, cache = model.run_with_cache(tokens)
        cache["pattern", 0]                                # [batch head query_pos key_pos]

    Hooks: `hook_embed`, `hook_pos_embed` (absolute schemes), `blocks.{l}.hook_resid_pre|mid|post`,
    `blocks.{l}.hook_attn_out|mlp_out`, `blocks.{l}.attn.hook_q|k|v|rot_q|rot_k|attn_scores|pattern|z|result`,
    `blocks.{l}.attn.hook_q_input|k_input|v_input`, `blocks.{l}.mlp.hook_pre|pre_linear|post`,
    `blocks.{l}.ln1|ln2.hook_scale|hook_normalized` and the same of `ln_final`. `rot_*` exist under rope, `mid`,
    `mlp` and `ln2` with an MLP.

    Initial weights are drawn from a normal distribution of `cfg.initializer_range`, from `generator` if given. With
    `init_weights=False` they are on the `meta` device, where they take neither time nor memory, until a checkpoint's
    take their place.
    """

    cfg: ModelConfig

    def __init__(
        self, cfg: ModelConfig, *, generator: torch.Generator | None = None, init_weights: bool = True
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokenizer: Any = None
        weights_on = torch.device("cpu" if init_weights else "meta")
        with weights_on:
            self.embed = Embed(cfg)
        self.pos_embed = POSITION_SCHEMES[cfg.position](cfg)  # its constants are computed, so never on `meta`
        with weights_on:
            self.blocks = TypedModuleList([Block(cfg) for _ in range(cfg.n_layers)])
            self.ln_final = make_norm(cfg)
            self.unembed = None if cfg.tie_word_embeddings else Unembed(cfg)
        self.hook_embed = CheckedHookPoint()
        if not self.pos_embed.relative:
            self.hook_pos_embed = CheckedHookPoint()
        self.setup()
        if init_weights:
            assert cfg.initializer_range is not None
            for name, parameter in self.named_parameters():
                if name.rsplit(".", 1)[-1].startswith(("W_", "table")):
                    nn.init.normal_(parameter, std=cfg.initializer_range, generator=generator)
            self.to(device=cfg.device)
        self.to(dtype=getattr(torch, cfg.dtype))
        self.eval()  # nothing differs in training mode, and TransformerLens' tools insist on this one

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Compute the logits, position for position as the network does: no shift is applied (see `cfg.readout_shift`).

        Args:
            tokens: Token ids.
            attention_mask: False or 0 marks padding, which no query reads. Positions are counted from the first token
                that is none.

        Raises:
            UserError: there are no such tokens or no such mask, a sequence is longer than `cfg.n_ctx` (absolute schemes
                have no embedding beyond it), or `pos_embed` answers what this model does not ask.
        """
        if tokens.ndim != 2:
            raise UserError(f"tokens: expected shape [batch pos], got {list(tokens.shape)}; add the missing dimension")
        if tokens.shape[1] > self.cfg.n_ctx:
            raise UserError(
                f"tokens: {tokens.shape[1]} positions exceed n_ctx {self.cfg.n_ctx}; shorten them or raise n_ctx"
            )
        check_token_ids("tokens", tokens, self.cfg.d_vocab)
        self._check_scheme()
        real = None if attention_mask is None else read_mask(attention_mask, tokens)
        resid = self.hook_embed(self.W_E[tokens])
        pos_embed = self.pos_embed.embed(torch.arange(tokens.shape[1], device=tokens.device))
        if pos_embed is not None:
            if real is not None:
                pos_embed = pos_embed[_places(real)]
            resid = resid + self.hook_pos_embed(pos_embed.expand_as(resid).clone())  # may be edited in place
        allowed = self._allowed(tokens, real)
        for block in self.blocks:
            resid = block(resid, self.pos_embed, allowed)
        return (self.ln_final(resid.to(self.W_U.device)) @ self.W_U).to(self.W_E.device)

    def _check_scheme(self) -> None:
        """Refuse a position scheme that would be asked only part of what it answers."""
        scheme, built_as = self.pos_embed, self.cfg.position
        if scheme.answers("rotate") and built_as != "rope":
            raise UserError(
                f"pos_embed: {type(scheme).__name__} rotates, and a model built with position {built_as!r} does not; "
                "build it with 'rope'"
            )
        if scheme.answers("embed") and (scheme.relative or POSITION_SCHEMES[built_as].relative):
            raise UserError(
                f"pos_embed: {type(scheme).__name__} adds to the residual stream; set its relative to False, and "
                "build the model with position 'learned'"
            )

    def _allowed(
        self, tokens: Tensor, real: Bool[Tensor, "batch pos"] | None
    ) -> Bool[Tensor, "#batch 1 query_pos key_pos"] | None:
        """Return which key positions each query may read; None allows all."""
        allowed = None
        if self.cfg.is_causal:
            n_pos = tokens.shape[1]
            allowed = torch.ones(1, 1, n_pos, n_pos, dtype=torch.bool, device=tokens.device).tril()
        if real is not None:
            unpadded = real[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
            allowed = unpadded if allowed is None else allowed & unpadded
        return allowed

    # ---- weights, stacked over layers and with one slice per query head, as TransformerLens has them

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.embed.W_E.T if self.unembed is None else self.unembed.W_U

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """Raises AttributeError under a relative scheme, which has none."""
        return self.pos_embed.W_pos

    def _stacked(self, part: str, name: str) -> Tensor:
        weights = torch.stack([getattr(getattr(block, part), name) for block in self.blocks])
        return per_query_head(weights, self.cfg.n_heads, dim=1) if part == "attn" else weights

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        return self._stacked("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer head d_model d_head"]:
        return self._stacked("attn", "W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer head d_model d_head"]:
        return self._stacked("attn", "W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        return self._stacked("attn", "W_O")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        return self._stacked("mlp", "W_in")

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        return self._stacked("mlp", "W_out")

    # ---- what TransformerLens' ActivationCache and patching ask of a model

    def residual_directions(self, tokens: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens d_model"]:
        """Return the direction whose dot product with the *normalised* residual is a token's logit, up to the norm's
        bias: the final norm's gain is included. In float32 at least.

        Raises:
            UserError: a token is outside the vocabulary.
        """
        check_token_ids("tokens", tokens, self.cfg.d_vocab)
        directions = precise(self.W_U.T[tokens])
        return directions * self.ln_final.w if isinstance(self.ln_final, Norm) else directions

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*tokens"]
    ) -> Float[Tensor, "*tokens d_model"]:
        """Do as :meth:`residual_directions`, in the model's dtype: so `ActivationCache.logit_attrs` of a complete stack
        adds up to the logit.

        Raises:
            UserError: a token is outside the vocabulary, or a text is not one token.
        """
        ids = torch.as_tensor(self.to_single_token(tokens) if isinstance(tokens, str) else tokens)
        return self.residual_directions(ids).to(self.W_U.dtype)

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Return what output biases add to the residual stream before `layer`: nothing, as there are none."""
        return torch.zeros(self.cfg.d_model, device=self.W_E.device, dtype=self.W_E.dtype)

    def to_tokens(self, text: str | Sequence[str] | Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        """Return the token ids of `text`; token ids pass through.

        Raises:
            UserError: the model has no tokenizer.
        """
        if isinstance(text, Tensor):
            return text
        if self.tokenizer is None:
            raise UserError(f"text: {text!r} needs a tokenizer, and this model has none; give token ids")
        return self.tokenizer(text, return_tensors="pt")["input_ids"].to(self.cfg.device)

    def to_single_token(self, text: str) -> int:
        """Return the id of a text that is one token.

        Raises:
            UserError: the model has no tokenizer, or the text is not one token.
        """
        tokens = self.to_tokens(text).flatten()
        if len(tokens) != 1:
            raise UserError(f"text: {text!r} is {len(tokens)} tokens, expected one; choose another word")
        return int(tokens)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Do nothing: this is TransformerLens' switch for `hook_q_input` and its kin; here hooking them is the
        switch."""

    def to(self, *args: Any, **kwargs: Any) -> HookedTransformer:
        """Do as `torch.nn.Module.to`; `cfg.device` and `cfg.dtype` follow."""
        super().to(*args, **kwargs)
        where = {"device": str(self.W_E.device), "dtype": str(self.W_E.dtype).removeprefix("torch.")}
        self.cfg = self.cfg.model_copy(update=where)
        for module in self.modules():
            if isinstance(module, (Attention, PositionScheme)):
                module.cfg = self.cfg
        return self

    # ---- hooks that fail loudly

    def _match(self, names: str | Callable[[str], bool] | Iterable[str] | None) -> list[str]:
        """Return the hook points that a name, a list of names or a predicate selects, in the model's order.

        None selects all but the split inputs `hook_q|k|v_input`, which are copies of `hook_resid_pre` made for editing.

        Raises:
            UserError: a name does not exist, or nothing is selected.
        """
        if names is None:
            return [name for name in self.hook_dict if not name.endswith("_input")]
        if callable(names):
            matched = [name for name in self.hook_dict if names(name)]
            if not matched:
                raise UserError(
                    f"hook filter {getattr(names, '__name__', names)!r} selects none of the {len(self.hook_dict)} "
                    "hooks, "
                    f"which are named like {', '.join(list(self.hook_dict)[:4])}; correct the filter"
                )
            return matched
        wanted = [names] if isinstance(names, str) else list(names)
        if not wanted:
            raise UserError("hook filter is an empty list; name at least one hook, or give None for all")
        for name in wanted:
            if name not in self.hook_dict:
                near = difflib.get_close_matches(name, self.hook_dict, n=4, cutoff=0.3)
                raise UserError(f"unknown hook {name!r}; did you mean {', '.join(near) or 'one of model.hook_dict'}?")
        return [name for name in self.hook_dict if name in set(wanted)]

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: HookFunction,
        dir: Literal["fwd", "bwd"] = "fwd",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Add a hook as TransformerLens does; raises UserError for an unknown name or a predicate that selects
        nothing."""
        for matched in self._match(name):
            super().add_hook(matched, hook, dir, *args, **kwargs)

    def _enable_hook(self, name: str | Callable[[str], bool], hook: Callable, dir: Literal["fwd", "bwd"]) -> None:
        for matched in self._match(name):
            super()._enable_hook(matched, hook, dir)

    def get_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict, list, list]:
        """Do as TransformerLens, but every entry owns its memory, so no later edit can change it, and `pos_slice` takes
        the position axis of every activation that has one per head, of rotated queries and keys too."""
        chosen = Slice.unwrap(pos_slice)

        def owned(name: str, save: Callable) -> tuple[str, Callable]:
            axis = -3 if name.rsplit("hook_", 1)[-1] in PER_HEAD else -2
            return name, lambda tensor, hook: save(chosen.apply(tensor, dim=axis).clone(), hook=hook)

        matched = set(self._match(names_filter))
        cache, fwd, bwd = super().get_caching_hooks(matched.__contains__, incl_bwd, device, remove_batch_dim, cache)
        return cache, [owned(*hook) for hook in fwd], [owned(*hook) for hook in bwd]

    def add_caching_hooks(self, *args: Any, **kwargs: Any) -> dict:
        """Do as TransformerLens, with entries that own their memory."""
        cache, fwd, bwd = self.get_caching_hooks(*args, **kwargs)
        for name, save in fwd:
            self.add_hook(name, save, "fwd")
        for name, save in bwd:
            self.add_hook(name, save, "bwd")
        return cache

    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *model_args: Any, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Tensor, ActivationCache]:
        """Compute the logits and an `ActivationCache` of the activations `names_filter` selects (default: all).

        Arguments are those of `HookedRootModule.run_with_cache`.
        """
        logits, cache = super().run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        return logits, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)
