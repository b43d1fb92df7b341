"""The layers of the transformer: norms, attention, MLP, embedding and unembedding, each with its hooks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import einsum, repeat
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from mdm_interp.config import ModelConfig
from mdm_interp.models.hooks import CheckedHookPoint
from mdm_interp.models.positions import PositionScheme

# Below about this many positions explicit attention is the faster of the two on a CPU (benchmarks/attention.py).
FUSED_FROM = 64

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def precise(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return a tensor in float32 at least: half precision may carry activations, but sums of them are wrong in it by
    their rounding."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
        """Compute queries [batch pos head d_head], keys and values [batch pos kv_head d_head]."""
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
        k, v = (per_query_head(x.transpose(1, 2), self.cfg.n_heads, dim=1) for x in (k, v))  # [batch head pos d_head]
        q, bias = q.transpose(1, 2), None if bias is None else bias.to(q.dtype)
        hooked = self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks()
        if not hooked and (q.is_cuda or q.shape[2] >= FUSED_FROM):
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=_additive(bias, allowed, q.dtype))
            return z.transpose(1, 2)

        scores = attention_scores(q, k, bias)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        pattern = self.hook_attn_scores(scores).softmax(-1)
        if allowed is not None:  # a query that may read nothing reads nothing, rather than everything alike
            pattern = pattern.masked_fill(~allowed, 0.0)
        return (self.hook_pattern(pattern) @ v).transpose(1, 2)


def per_query_head(x: Shaped[Tensor, "*kv_heads"], n_heads: int, dim: int) -> Shaped[Tensor, "*heads"]:
    """Repeat keys, values or weights of grouped heads, along dimension `dim`, for every query head that reads them."""
    return x if x.shape[dim] == n_heads else x.repeat_interleave(n_heads // x.shape[dim], dim=dim)


def attention_scores(
    q: Float[Tensor, "batch head query_pos d_head"],
    k: Float[Tensor, "batch head key_pos d_head"],
    bias: Float[Tensor, "*batch head query_pos key_pos"] | None,
) -> Float[Tensor, "batch head query_pos key_pos"]:
    """Compute q k / sqrt(d_head), and add the bias of the position scheme; nothing is masked yet."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores if bias is None else scores + bias.to(scores.dtype)


def _additive(bias: Tensor | None, allowed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return bias and mask in the one form the fused kernel takes."""
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
