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
import torch.nn.functional as F
from einops import einsum, repeat
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookFunction, HookPoint, LensHandle
from transformer_lens.utilities import Slice, TypedModuleList

from mdm_interp.config import ModelConfig
from mdm_interp.files import UserError
from mdm_interp.positions import SCHEMES, PositionScheme

# Below about this many positions explicit attention is the faster of the two on a CPU (benchmarks/attention.py).
FUSED_FROM = 64

PER_HEAD = {"q", "k", "v", "rot_q", "rot_k", "z", "result", "q_input", "k_input", "v_input"}
"""Hooks on activations of shape [batch pos head …]."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def precise(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In float32 at least: half precision may carry activations, but sums of them are wrong in it by their rounding."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
    """True where a token is real, from a mask of booleans, zeros or ones.

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
    """Positions counted from each sequence's first real token; 0 before it."""
    n_pos = real.shape[1]
    before = (real.cumsum(1) == 0).sum(1, keepdim=True)
    return (torch.arange(n_pos, device=real.device) - before).clamp(min=0)


class CheckedHookPoint(HookPoint):
    """A hook point that refuses a hook's result unless it is a tensor of the shape that went in."""

    def add_hook(self, hook: HookFunction, *args: Any, **kwargs: Any) -> LensHandle:
        def checked(tensor: Tensor, *, hook: HookPoint) -> Any:
            result = user_hook(tensor, hook=hook)
            if result is not None and getattr(result, "shape", None) != tensor.shape:
                got = f"shape {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
                raise UserError(
                    f"hook on {hook.name!r} returned {got}, expected a tensor of shape {list(tensor.shape)}; "
                    "return the edited activation, or None to leave it"
                )
            return result

        user_hook = hook
        handle = super().add_hook(checked, *args, **kwargs)
        handle.user_hook = user_hook
        return handle


class Norm(nn.Module):
    """RMSNorm or LayerNorm. `hook_scale` [batch pos 1] is what the residual is divided by, `hook_normalized`
    [batch pos d_model] the quotient, before gain and bias. Computed in float32 at least."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.centered = cfg.normalization_type == "LN"
        self.eps = cfg.eps
        self.w = nn.Parameter(torch.ones(cfg.d_model))
        self.b = nn.Parameter(torch.zeros(cfg.d_model)) if self.centered else None
        self.hook_scale = CheckedHookPoint()
        self.hook_normalized = CheckedHookPoint()

    def forward(self, x: Float[Tensor, "*batch d_model"], *, hooked: bool = True) -> Float[Tensor, "*batch d_model"]:
        centered = precise(x)
        if self.centered:
            centered = centered - centered.mean(-1, keepdim=True)
        scale = (centered.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        scale = self.hook_scale(scale) if hooked else scale
        normalized = (centered / scale).to(x.dtype)
        normalized = (self.hook_normalized(normalized) if hooked else normalized) * self.w
        return normalized if self.b is None else normalized + self.b


class NoNorm(nn.Module):
    """Leaves the residual stream as it is."""

    def forward(self, x: Float[Tensor, "*batch d_model"], *, hooked: bool = True) -> Float[Tensor, "*batch d_model"]:
        return x


def make_norm(cfg: ModelConfig) -> nn.Module:
    return NoNorm() if cfg.normalization_type is None else Norm(cfg)


class Attention(nn.Module):
    """Multi-head attention with TransformerLens' hooks. Query head h reads key/value head `h // (n_heads / kv_heads)`.

    Scores, pattern, per-head results and split inputs are computed only while something is hooked on them;
    otherwise attention runs fused where that is faster.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        n_heads, n_kv_heads, d_head, d_model = cfg.n_heads, cfg.kv_heads, cfg.head_dim, cfg.d_model
        self.W_Q = nn.Parameter(torch.empty(n_heads, d_model, d_head))
        self.W_K = nn.Parameter(torch.empty(n_kv_heads, d_model, d_head))
        self.W_V = nn.Parameter(torch.empty(n_kv_heads, d_model, d_head))
        self.W_O = nn.Parameter(torch.empty(n_heads, d_head, d_model))
        for name, heads in (("b_Q", n_heads), ("b_K", n_kv_heads), ("b_V", n_kv_heads)):
            self.register_parameter(name, nn.Parameter(torch.zeros(heads, d_head)) if cfg.qkv_bias else None)

        self.hook_q_input, self.hook_k_input, self.hook_v_input = (CheckedHookPoint() for _ in range(3))
        self.hook_q, self.hook_k, self.hook_v = (CheckedHookPoint() for _ in range(3))
        if cfg.position == "rope":
            self.hook_rot_q, self.hook_rot_k = CheckedHookPoint(), CheckedHookPoint()
        self.hook_attn_scores, self.hook_pattern = CheckedHookPoint(), CheckedHookPoint()
        self.hook_z, self.hook_result = CheckedHookPoint(), CheckedHookPoint()

    def forward(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        norm: nn.Module,
        position: PositionScheme,
        allowed: Bool[Tensor, "#batch 1 query_pos key_pos"] | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        q, k, v = self._project(resid, norm)
        positions = torch.arange(resid.shape[1], device=resid.device)
        if self.cfg.position == "rope":
            q, k = self.hook_rot_q(position.rotate(q, positions)), self.hook_rot_k(position.rotate(k, positions))
        z = self.hook_z(self._attend(q, k, v, position.bias(positions, positions), allowed))
        if self.hook_result.has_hooks():
            result = einsum(z, self.W_O, "batch pos head d_head, head d_head d_model -> batch pos head d_model")
            return self.hook_result(result).sum(2)
        return z.flatten(-2) @ self.W_O.flatten(0, 1)

    def _project(self, resid: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [batch pos head d_head], keys and values [batch pos kv_head d_head]."""
        shared = norm(resid)
        projected = []
        for name, split in (("q", self.hook_q_input), ("k", self.hook_k_input), ("v", self.hook_v_input)):
            weight, bias = getattr(self, f"W_{name.upper()}"), getattr(self, f"b_{name.upper()}")
            if split.has_hooks():
                copies = repeat(resid, "batch pos d_model -> batch pos head d_model", head=weight.shape[0])
                # The norm's own hooks see the shared residual; a head reads that, plus what its copy's edit changes.
                edit = norm(split(copies.clone()), hooked=False) - norm(copies, hooked=False)
                per_head = shared.unsqueeze(2) + edit
                x = einsum(per_head, weight, "batch pos head d_model, head d_model d_head -> batch pos head d_head")
            else:
                x = (shared @ weight.transpose(0, 1).flatten(1)).unflatten(-1, (weight.shape[0], weight.shape[2]))
            projected.append(getattr(self, f"hook_{name}")(x if bias is None else x + bias))
        return projected[0], projected[1], projected[2]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, allowed: Tensor | None
    ) -> Float[Tensor, "batch pos head d_head"]:
        groups = self.cfg.n_heads // self.cfg.kv_heads
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [batch head pos d_head]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        bias = None if bias is None else bias.to(q.dtype)
        hooked = self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks()
        if not hooked and (q.is_cuda or q.shape[2] >= FUSED_FROM):
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=_additive(bias, allowed, q.dtype))
            return z.transpose(1, 2)

        scores = q @ k.transpose(-1, -2) * self.cfg.head_dim**-0.5
        if bias is not None:
            scores = scores + bias
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        pattern = self.hook_attn_scores(scores).softmax(-1)
        if allowed is not None:  # a query that may read nothing reads nothing, rather than everything alike
            pattern = pattern.masked_fill(~allowed, 0.0)
        return (self.hook_pattern(pattern) @ v).transpose(1, 2)


def _additive(bias: Tensor | None, allowed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Bias and mask in the one form the fused kernel takes."""
    if allowed is None or bias is None:
        return allowed if bias is None else bias
    return torch.where(allowed, bias, torch.tensor(float("-inf"), dtype=dtype, device=bias.device))


class MLP(nn.Module):
    """Plain `act(x W_in) W_out`, or gated `(act(x W_gate) * x W_in) W_out`."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        assert cfg.d_mlp is not None
        self.activation = ACTIVATIONS[cfg.act_fn]
        self.W_in = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        self.W_out = nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model))
        self.W_gate = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp)) if cfg.gated_mlp else None
        self.hook_pre, self.hook_post = CheckedHookPoint(), CheckedHookPoint()
        if cfg.gated_mlp:
            self.hook_pre_linear = CheckedHookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.W_gate is None:
            post = self.activation(self.hook_pre(x @ self.W_in))
        else:
            post = self.activation(self.hook_pre(x @ self.W_gate)) * self.hook_pre_linear(x @ self.W_in)
        return self.hook_post(post) @ self.W_out


class Block(nn.Module):
    """Pre-norm block: attention, then an MLP if there is one."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.ln1, self.attn = make_norm(cfg), Attention(cfg)
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_post = (CheckedHookPoint() for _ in range(3))
        self.mlp = None if cfg.attn_only else MLP(cfg)
        if not cfg.attn_only:
            self.ln2 = make_norm(cfg)
            self.hook_resid_mid, self.hook_mlp_out = CheckedHookPoint(), CheckedHookPoint()

    def forward(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        position: PositionScheme,
        allowed: Bool[Tensor, "#batch 1 query_pos key_pos"] | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        device = self.attn.W_Q.device  # a large model's blocks may lie on several (checkpoints.load_checkpoint)
        resid, allowed = resid.to(device), allowed if allowed is None else allowed.to(device)
        resid = self.hook_resid_pre(resid)
        resid = resid + self.hook_attn_out(self.attn(resid, self.ln1, position, allowed))
        if self.mlp is not None:
            resid = self.hook_resid_mid(resid)
            resid = resid + self.hook_mlp_out(self.mlp(self.ln2(resid)))
        return self.hook_resid_post(resid)


class Embed(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))


class Unembed(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.W_U = nn.Parameter(torch.empty(cfg.d_model, cfg.d_vocab))


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
        self.pos_embed = SCHEMES[cfg.position](cfg)  # its constants are computed, so never on `meta`
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
        """Logits, position for position as the network computes them: no shift is applied (see `cfg.readout_shift`).
        They come on `cfg.device`, which is the embedding's.

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
        if scheme.answers("embed") and (scheme.relative or SCHEMES[built_as].relative):
            raise UserError(
                f"pos_embed: {type(scheme).__name__} adds to the residual stream; set its relative to False, and "
                "build the model with position 'learned'"
            )

    def _allowed(
        self, tokens: Tensor, real: Bool[Tensor, "batch pos"] | None
    ) -> Bool[Tensor, "#batch 1 query_pos key_pos"] | None:
        """Which key positions each query may read; None allows all."""
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
        grouped = part == "attn" and weights.shape[1] < self.cfg.n_heads
        return weights.repeat_interleave(self.cfg.n_heads // self.cfg.kv_heads, dim=1) if grouped else weights

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
        """The direction whose dot product with the *normalised* residual is a token's logit, up to the norm's bias: the
        final norm's gain is included. In float32 at least.

        Raises:
            UserError: a token is outside the vocabulary.
        """
        check_token_ids("tokens", tokens, self.cfg.d_vocab)
        directions = precise(self.W_U.T[tokens])
        return directions * self.ln_final.w if isinstance(self.ln_final, Norm) else directions

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*tokens"]
    ) -> Float[Tensor, "*tokens d_model"]:
        """As :meth:`residual_directions`, in the model's dtype: so `ActivationCache.logit_attrs` of a complete stack
        adds up to the logit.

        Raises:
            UserError: a token is outside the vocabulary, or a text is not one token.
        """
        ids = torch.as_tensor(self.to_single_token(tokens) if isinstance(tokens, str) else tokens)
        return self.residual_directions(ids).to(self.W_U.dtype)

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """What output biases add to the residual stream before `layer`: nothing, as there are none."""
        return torch.zeros(self.cfg.d_model, device=self.W_E.device, dtype=self.W_E.dtype)

    def to_tokens(self, text: str | Sequence[str] | Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        """Token ids of `text`; token ids pass through.

        Raises:
            UserError: the model has no tokenizer.
        """
        if isinstance(text, Tensor):
            return text
        if self.tokenizer is None:
            raise UserError(f"text: {text!r} needs a tokenizer, and this model has none; give token ids")
        return self.tokenizer(text, return_tensors="pt")["input_ids"].to(self.cfg.device)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token.

        Raises:
            UserError: the model has no tokenizer, or the text is not one token.
        """
        tokens = self.to_tokens(text).flatten()
        if len(tokens) != 1:
            raise UserError(f"text: {text!r} is {len(tokens)} tokens, expected one; choose another word")
        return int(tokens)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """TransformerLens' switch for `hook_q_input` and its kin; here hooking them is the switch."""

    def to(self, *args: Any, **kwargs: Any) -> HookedTransformer:
        """As `torch.nn.Module.to`; `cfg.device` and `cfg.dtype` follow."""
        super().to(*args, **kwargs)
        where = {"device": str(self.W_E.device), "dtype": str(self.W_E.dtype).removeprefix("torch.")}
        self.cfg = self.cfg.model_copy(update=where)
        for module in self.modules():
            if isinstance(module, (Attention, PositionScheme)):
                module.cfg = self.cfg
        return self

    # ---- hooks that fail loudly

    def _match(self, names: str | Callable[[str], bool] | Iterable[str] | None) -> list[str]:
        """The hook points that a name, a list of names or a predicate selects, in the model's order.

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
        """As TransformerLens; raises UserError for an unknown name or a predicate that selects nothing."""
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
        """As TransformerLens, but every entry owns its memory, so no later edit can change it, and `pos_slice` takes
        the position axis of every activation that has one per head, of rotated queries and keys too."""
        chosen = Slice.unwrap(pos_slice)

        def owned(name: str, save: Callable) -> tuple[str, Callable]:
            axis = -3 if name.rsplit("hook_", 1)[-1] in PER_HEAD else -2
            return name, lambda tensor, hook: save(chosen.apply(tensor, dim=axis).clone(), hook=hook)

        matched = set(self._match(names_filter))
        cache, fwd, bwd = super().get_caching_hooks(matched.__contains__, incl_bwd, device, remove_batch_dim, cache)
        return cache, [owned(*hook) for hook in fwd], [owned(*hook) for hook in bwd]

    def add_caching_hooks(self, *args: Any, **kwargs: Any) -> dict:
        """As TransformerLens, with entries that own their memory."""
        cache, fwd, bwd = self.get_caching_hooks(*args, **kwargs)
        for name, save in fwd:
            self.add_hook(name, save, "fwd")
        for name, save in bwd:
            self.add_hook(name, save, "bwd")
        return cache

    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *model_args: Any, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Tensor, ActivationCache]:
        """Logits and an `ActivationCache` of the activations `names_filter` selects (default: all).

        Arguments are those of `HookedRootModule.run_with_cache`.
        """
        logits, cache = super().run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        return logits, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)
