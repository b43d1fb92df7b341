"""The hooked transformer: bidirectional or causal attention under any position scheme, every activation hookable.

Built on TransformerLens' `HookedRootModule`, with the hook and weight names of its classic `HookedTransformer`, so
`ActivationCache`, `FactoredMatrix` and `transformer_lens.patching` work on it. This module computes; what a user may
ask besides is in the base classes: hooks and caches (`hooks`), weights (`weights`), texts (`text`), weight processing
(`processing`), generation (`generation`). Axis names, here and everywhere:

    batch      independent sequences              head     attention head (`kv_head`: key/value head)
    query_pos  position that reads                d_head   dimensions of a head
    key_pos    position that is read              d_model  residual stream
    pos        a position, when sides don't matter  d_vocab  tokens, mask included
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformer_lens.utilities import TypedModuleList, lm_cross_entropy_loss

import mdm_interp
from mdm_interp.config import ModelConfig
from mdm_interp.errors import UserError
from mdm_interp.models.classic import ClassicConfig, read_classic_config, read_classic_weights
from mdm_interp.models.generation import Generation
from mdm_interp.models.hooks import CheckedHookPoint
from mdm_interp.models.inputs import (
    check_layer,
    check_token_ids,
    places,
    read_mask,
    require_predictions,
    rows_at,
    within_reach,
)
from mdm_interp.models.layers import Block, Embed, TiedUnembed, Unembed, make_norm, precise
from mdm_interp.models.positions import POSITION_SCHEMES, rotates
from mdm_interp.models.text import Input, PaddingSide

ReturnType = Literal["logits", "loss", "both"]


class Embedded(NamedTuple):
    """What enters the first layer, in the classic model's order."""

    residual: Float[Tensor, "batch pos d_model"]
    tokens: Int[Tensor, "batch pos"]
    shortformer_pos_embed: None
    """Always None: no scheme here adds positions to queries and keys alone."""
    attention_mask: Bool[Tensor, "batch pos"] | None


class Output(NamedTuple):
    """Logits and loss together."""

    logits: Float[Tensor, "batch pos d_vocab"]
    loss: Float[Tensor, "*batch"]


class HookedTransformer(Generation):
    """A transformer whose activations can all be read and edited by name.

        model = HookedTransformer(ModelConfig(d_model=64, n_heads=4, d_vocab=101, n_ctx=8))
        logits, cache = model.run_with_cache(tokens)
        cache["pattern", 0]                                # [batch head query_pos key_pos]

    Hooks: `hook_embed`, `hook_pos_embed` (absolute schemes), `blocks.{l}.hook_resid_pre|mid|post`,
    `blocks.{l}.hook_attn_out|mlp_out`, `blocks.{l}.attn.hook_q|k|v|rot_q|rot_k|attn_scores|pattern|z|result`,
    `blocks.{l}.hook_attn_in|q_input|k_input|v_input|mlp_in`, `blocks.{l}.mlp.hook_pre|pre_linear|post`,
    `blocks.{l}.ln1|ln2.hook_scale|hook_normalized` and the same of `ln_final`. `rot_*` exist under schemes that rotate,
    `mid`, `mlp` and `ln2` with an MLP; with `cfg.use_qk_norm` also
    `blocks.{l}.attn.q_norm|k_norm.hook_scale|hook_normalized` and `blocks.{l}.attn.hook_q_normalized|k_normalized`,
    which is what positions act on: gain included. Layers of experts (`cfg.experts`) have the hooks of
    :class:`~mdm_interp.models.layers.MoE` in `mlp`.

    Initial weights are drawn from a normal distribution of `cfg.initializer_range`, from `generator` if given. With
    `init_weights=False` they are on the `meta` device, where they take neither time nor memory, until a checkpoint's
    take their place.

    Args:
        cfg: A ModelConfig, or the classic model's config or a dict of its fields
            (:func:`~mdm_interp.models.classic.read_classic_config`).
        tokenizer: As of :meth:`set_tokenizer`.

    Raises:
        UserError: a classic config asks for what is not implemented here.
    """

    cfg: ModelConfig

    def __init__(
        self,
        cfg: ModelConfig | Mapping[str, Any] | Any,
        tokenizer: Any = None,
        *,
        generator: torch.Generator | None = None,
        init_weights: bool = True,
        default_padding_side: PaddingSide | None = None,
    ) -> None:
        super().__init__()
        given = ClassicConfig(cfg) if isinstance(cfg, ModelConfig) else read_classic_config(cfg, tokenizer)
        if given.seed is not None and generator is None:
            generator = torch.Generator().manual_seed(given.seed)
        self.cfg = cfg = given.model
        weights_on = torch.device("cpu" if init_weights else "meta")
        with weights_on:
            self.embed = Embed(cfg)
        self.pos_embed = POSITION_SCHEMES[cfg.position](cfg)  # its constants are computed, so never on `meta`
        with weights_on:
            self.blocks = TypedModuleList([Block(cfg, layer) for layer in range(cfg.n_layers)])
            self.ln_final = make_norm(cfg)
            self.unembed = TiedUnembed(self.embed) if cfg.tie_word_embeddings else Unembed(cfg)
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
        self.to(dtype=cfg.dtype)
        if given.biases:
            self.add_biases()
        self.set_tokenizer(tokenizer, default_padding_side)
        self.eval()  # nothing differs in training mode, and TransformerLens' tools insist on this one

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        *,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        fold_value_biases: bool = False,
        **options: Any,
    ) -> HookedTransformer:
        """Load a checkpoint as :func:`mdm_interp.load_checkpoint` does.

        Args:
            fold_ln, center_writing_weights, center_unembed, fold_value_biases: As of :meth:`process_weights_`; without
                them the weights stay as they are stored.
            options: As of :func:`mdm_interp.load_checkpoint`: `device`, `dtype`, …
        """
        model = mdm_interp.load_checkpoint(model_name, **options)
        model.process_weights_(
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
        )
        return model

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Do as `torch.nn.Module.load_state_dict`; a classic model's names are understood, too, and `cfg.device` and
        `cfg.dtype` follow what is assigned."""
        ours = read_classic_weights(state_dict, relative=self.pos_embed.relative, gated=self.cfg.gated_mlp)
        found = super().load_state_dict(ours, strict=strict, assign=assign)
        self._configure(device=str(self.W_E.device), dtype=self.W_E.dtype)
        return found

    def forward(
        self,
        input: Input | Float[Tensor, "batch pos d_model"],
        return_type: ReturnType | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
        stop_at_layer: int | None = None,
        *,
        targets: Int[Tensor, "batch pos"] | None = None,
        readout: Int[Tensor, "batch row"] | None = None,
    ) -> Any:
        """Compute the logits `[batch pos d_vocab]`, position for position as the network does: no shift is applied (see
        `cfg.readout_shift`).

        Args:
            input: Token ids, a text or several (:meth:`to_tokens`), or with `start_at_layer` the residual stream.
            return_type: `logits`, `loss` (:meth:`loss_fn`), `both` as a pair, or None, which returns None.
            loss_per_token: Whether the loss is one for each token.
            prepend_bos: Whether texts begin with the BOS token; default: `cfg.default_prepend_bos`.
            padding_side: Where shorter texts are padded. Padding of texts is never read.
            start_at_layer: The layer that the residual stream enters; a negative one counts from the end.
            tokens: With `start_at_layer`, the tokens that the loss is of.
            attention_mask: False or 0 marks padding, which no query reads. Positions are counted from the first token
                that is none.
            stop_at_layer: Return the residual stream `[batch pos d_model]` that enters this layer; a negative one
                counts from the end.
            targets: With a masked diffusion model's loss, the true tokens.
            readout: The positions of each sequence whose logits are computed, as `[batch row d_vocab]`; default: all.
                Every hook still sees all positions.

        Raises:
            UserError: there are no such tokens, mask or layers, a sequence is longer than `cfg.n_ctx` (absolute schemes
                have no embedding beyond it), the loss cannot be computed, `readout` is given where no logits are
                returned, or `pos_embed` answers what this model does not ask.
        """
        if return_type is not None and (isinstance(return_type, Tensor) or return_type not in get_args(ReturnType)):
            got = "a tensor" if isinstance(return_type, Tensor) else repr(return_type)
            raise UserError(
                f"return_type: {got} is none of 'logits', 'loss', 'both' and None; choose one of them (a mask is given "
                "as attention_mask=)"
            )
        if readout is not None and (return_type != "logits" or stop_at_layer is not None):
            raise UserError("readout: only logits can be those of some positions; leave it out, or ask for the logits")
        layers = self._layers(start_at_layer, stop_at_layer)
        if start_at_layer is None:
            resid, entered, _, real = self.input_to_embed(input, prepend_bos, padding_side, attention_mask)
            if tokens is not None and not torch.equal(tokens.to(entered), entered):
                raise UserError("tokens: not what input has; leave them out, or give start_at_layer a residual stream")
            tokens = entered
        else:
            resid = self._enter(input, layers[0].attn.W_Q if layers else self.W_U)
            real = None if attention_mask is None else read_mask(attention_mask, resid[..., 0])
        allowed = self._allowed(resid, real)
        for block in layers:
            resid = block(resid, self.pos_embed, allowed)
        if stop_at_layer is not None:
            return resid
        if return_type is None:
            return None
        resid = self.ln_final(resid.to(self.W_U.device))
        logits = self.unembed(resid if readout is None else rows_at(resid, readout)).to(self.W_E.device)
        if return_type == "logits":
            return logits
        if tokens is None:
            raise UserError("tokens: the loss is of tokens, and only the residual stream is known; give tokens, too")
        loss = self.loss_fn(logits, tokens, real, loss_per_token, targets=targets)
        return loss if return_type == "loss" else Output(logits, loss)

    def input_to_embed(
        self,
        input: Input,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    ) -> Embedded:
        """Compute what enters the first layer: token embeddings, plus positions under an absolute scheme.

        Args and errors are those of :meth:`forward`.
        """
        tokens, real = self.to_tokens_and_mask(input, prepend_bos, padding_side)
        if tokens.ndim != 2:
            raise UserError(f"tokens: expected shape [batch pos], got {list(tokens.shape)}; drop or add a dimension")
        self._check_length("tokens", tokens.shape[1])
        check_token_ids("tokens", tokens, self.cfg.d_vocab)
        self._check_scheme()
        real = real if attention_mask is None else read_mask(attention_mask, tokens)
        resid = self.hook_embed(self.embed(tokens))
        pos_embed = self.pos_embed.embed(torch.arange(tokens.shape[1], device=tokens.device))
        if pos_embed is not None:
            if real is not None:
                pos_embed = pos_embed[places(real)]
            resid = resid + self.hook_pos_embed(pos_embed.expand_as(resid).clone())  # may be edited in place
        return Embedded(resid, tokens, None, real)

    def _enter(self, input: Any, weight: Tensor) -> Float[Tensor, "batch pos d_model"]:
        """Check a residual stream that a weight is about to read."""
        if not isinstance(input, Tensor) or input.ndim != 3 or input.shape[2] != self.cfg.d_model:
            got = f"shape {list(input.shape)}" if isinstance(input, Tensor) else type(input).__name__
            raise UserError(
                f"input: start_at_layer takes the residual stream [batch pos {self.cfg.d_model}], got {got}; compute "
                "it with input_to_embed or stop_at_layer"
            )
        if input.dtype != weight.dtype:
            raise UserError(f"input: got {input.dtype}, and the model is in {weight.dtype}; convert one of them")
        self._check_length("input", input.shape[1])
        self._check_scheme()
        return input

    def _check_length(self, name: str, n_pos: int) -> None:
        if n_pos > self.cfg.n_ctx:
            raise UserError(f"{name}: {n_pos} positions exceed n_ctx {self.cfg.n_ctx}; shorten them or raise n_ctx")

    def _layers(self, start: int | None, stop: int | None) -> list[Block]:
        """Return the layers from `start` to before `stop`."""
        n_layers, blocks = self.cfg.n_layers, list(self.blocks)
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None:
                check_layer(name, layer, -n_layers, n_layers)
        if start is not None and stop is not None:
            entered, left = (layer + n_layers if layer < 0 else layer for layer in (start, stop))
            if left < entered:
                raise UserError(f"stop_at_layer: {stop} comes before start_at_layer {start}; give a later layer")
        return blocks[start:stop]

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
        per_token: bool = False,
        *,
        targets: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Compute the loss in nats, in float32 at least.

        Of a causal model: the cross-entropy of each next token; per token `[batch pos-1]`.

        Of a masked diffusion model: the cross-entropy of the true tokens at the mask tokens of `tokens`, mean over each
        sequence's mask tokens and then over sequences that have any: one draw of the masked-diffusion loss, with its
        weight 1/t at t the share of masked tokens. Per token `[batch pos]`, 0 where there is no mask token.

        Args:
            tokens: What went in, mask tokens included.
            attention_mask: As of :meth:`forward`.
            targets: Of a masked diffusion model the true tokens; read at mask tokens only.

        Raises:
            UserError: targets are missing or not asked for, shapes differ, no token is masked, or a shifted model's
                first one is.

        Source: arXiv 2502.09992, eq. 3.
        """
        if logits.shape[:2] != tokens.shape:
            raise UserError(f"tokens: expected {list(logits.shape[:2])} as the logits, got {list(tokens.shape)}")
        check_token_ids("tokens", tokens, self.cfg.d_vocab)
        tokens = tokens.to(logits.device, torch.long)
        real = None if attention_mask is None else read_mask(attention_mask, tokens).to(logits.device)
        if self.cfg.is_causal:
            if targets is not None:
                raise UserError("targets: a causal model's loss is of the tokens themselves; leave targets out")
            return lm_cross_entropy_loss(precise(logits), tokens, real, per_token)
        mask_id, shift = self.cfg.mask_token_id, self.cfg.readout_shift or 0
        masked = torch.zeros_like(tokens, dtype=torch.bool) if mask_id is None else tokens == mask_id
        masked = masked if real is None else masked & real
        if targets is None or not bool(masked.any()):
            raise UserError(
                "loss: a masked diffusion model's is of the true tokens at mask tokens; put cfg.mask_token_id "
                f"({mask_id}) where they are to be predicted, and give the true tokens as targets"
            )
        if shift:
            require_predictions(masked, real)
        if targets.shape != tokens.shape:
            raise UserError(f"targets: expected the shape of tokens {list(tokens.shape)}, got {list(targets.shape)}")
        targets = targets.to(logits.device).masked_fill(~masked, 0)
        check_token_ids("targets", targets, self.cfg.d_vocab)
        predicted = precise(logits).roll(-shift, dims=1)
        losses = F.cross_entropy(predicted.transpose(1, 2), targets.long(), reduction="none").masked_fill(~masked, 0.0)
        if per_token:
            return losses
        count = masked.sum(1)
        return (losses.sum(1) / count.clamp(min=1))[count > 0].mean()

    def _check_scheme(self) -> None:
        """Refuse a position scheme that would be asked only part of what it answers."""
        scheme, built_as = self.pos_embed, self.cfg.position
        if scheme.answers("rotate") and not rotates(self.cfg):
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
        self, resid: Float[Tensor, "batch pos d_model"], real: Bool[Tensor, "batch pos"] | None
    ) -> Bool[Tensor, "#batch 1 query_pos key_pos"] | None:
        """Return which key positions each query may read; None where nothing is padded and attention has no blocks of
        several positions. Blocks are counted from the first token that is no padding."""
        if real is None and self.cfg.attention != "block_causal":
            return None
        at = torch.arange(resid.shape[1], device=resid.device)[None] if real is None else places(real.to(resid.device))
        reached = within_reach(self.cfg.reach, at[:, None, :, None], at[:, None, None, :])
        if real is None:
            return reached
        allowed = real.to(resid.device)[:, None, None, :].expand(-1, 1, resid.shape[1], -1)
        return allowed if reached is None else allowed & reached

    # ---- switches, and where the model is

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Say whether a cache of all hooks holds `hook_result`, too. Hooking it by name works without."""
        self._configure(use_attn_result=use_attn_result)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Say whether a cache of all hooks holds `hook_q_input` and its kin, too. Hooking one by name works without."""
        self._configure(use_split_qkv_input=use_split_qkv_input)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Say whether a cache of all hooks holds `hook_attn_in`, too. Hooking it by name works without.

        Raises:
            UserError: the model has grouped-query attention, where queries and keys differ in number.
        """
        if use_attn_in and self.cfg.kv_heads != self.cfg.n_heads:
            raise UserError(
                f"use_attn_in: {self.cfg.n_heads} query heads share {self.cfg.kv_heads} key/value heads, so no copy is "
                "one head's alone; hook hook_q_input, hook_k_input and hook_v_input"
            )
        self._configure(use_attn_in=use_attn_in)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Say whether a cache of all hooks holds `hook_mlp_in`, too. Hooking it by name works without."""
        self._configure(use_hook_mlp_in=use_hook_mlp_in)

    def to(self, *args: Any, print_details: bool = False, **kwargs: Any) -> HookedTransformer:
        """Do as `torch.nn.Module.to`.

        Args:
            print_details: Not used; the classic model prints where it goes.
        """
        super().to(*args, **kwargs)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HookedTransformer:
        """Do as `torch.nn.Module`, which `to`, `half`, `double` and their kin call; `cfg.device` and `cfg.dtype`
        follow."""
        super()._apply(fn, recurse)
        self._configure(device=str(self.W_E.device), dtype=self.W_E.dtype)
        return self

    def cuda(self, device: int | torch.device | None = None) -> HookedTransformer:
        """Move to a CUDA device; default: the current one."""
        return self.to(
            "cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device
        )

    def cpu(self) -> HookedTransformer:
        """Move to the CPU."""
        return self.to("cpu")

    def mps(self) -> HookedTransformer:
        """Move to Apple's GPU."""
        return self.to("mps")
