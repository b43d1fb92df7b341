"""The layers of the transformer: norms, attention, MLP, embedding and unembedding, each with its hooks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import einsum, repeat
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mdm_interp.config import ModelConfig
from mdm_interp.models.hooks import CheckedHookPoint, in_use
from mdm_interp.models.positions import PositionScheme, rotates

# Below about this many positions explicit attention is the faster of the two on a CPU (benchmarks: attention-*).
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
    """RMSNorm, or if `centered` LayerNorm, of the residual stream or, with one gain for all heads, of their queries or
    keys. `hook_scale` `[batch pos *head 1]` is what they are divided by, `hook_normalized` `[batch pos *head width]`
    the quotient, before gain and bias. Computed in float32 at least."""

    def __init__(self, width: int, eps: float, *, centered: bool = False) -> None:
        super().__init__()
        self.centered, self.eps = centered, eps
        self.w = nn.Parameter(torch.ones(width))
        self.b = nn.Parameter(torch.zeros(width)) if centered else None
        self.hook_scale = CheckedHookPoint()
        self.hook_normalized = CheckedHookPoint()

    def forward(self, x: Float[Tensor, "*batch d_model"], *, hooked: bool = True) -> Float[Tensor, "*batch d_model"]:
        normalized = self.normalize(x, hooked=hooked) * self.w
        return normalized if self.b is None else normalized + self.b

    def normalize(self, x: Float[Tensor, "*batch d_model"], *, hooked: bool = True) -> Float[Tensor, "*batch d_model"]:
        """Compute the quotient, before gain and bias."""
        centered = precise(x)
        if self.centered:
            centered = centered - centered.mean(-1, keepdim=True)
        scale = (centered.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        scale = self.hook_scale(scale) if hooked else scale
        normalized = (centered / scale).to(x.dtype)
        return self.hook_normalized(normalized) if hooked else normalized


class NoNorm(nn.Module):
    """Leaves the residual stream as it is."""

    def forward(self, x: Float[Tensor, "*batch d_model"], *, hooked: bool = True) -> Float[Tensor, "*batch d_model"]:
        return x


def make_norm(cfg: ModelConfig) -> nn.Module:
    if cfg.normalization_type is None:
        return NoNorm()
    return Norm(cfg.d_model, cfg.eps, centered=cfg.normalization_type == "LN")


class Attention(nn.Module):
    """Multi-head attention with TransformerLens' hooks. Query head h reads key/value head `h // (n_heads / kv_heads)`.

    Scores, pattern and per-head results are computed only while something is hooked on them; otherwise attention runs
    fused where that is faster.
    """

    b_Q: nn.Parameter | None
    b_K: nn.Parameter | None
    b_V: nn.Parameter | None
    b_O: nn.Parameter | None

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
        self.register_parameter("b_O", None)

        self.hook_q, self.hook_k, self.hook_v = (CheckedHookPoint() for _ in range(3))
        if cfg.use_qk_norm:
            self.q_norm, self.k_norm = Norm(d_head, cfg.eps), Norm(d_head, cfg.eps)
            self.hook_q_normalized, self.hook_k_normalized = CheckedHookPoint(), CheckedHookPoint()
        if rotates(cfg):
            self.hook_rot_q, self.hook_rot_k = CheckedHookPoint(), CheckedHookPoint()
        self.hook_attn_scores, self.hook_pattern = CheckedHookPoint(), CheckedHookPoint()
        self.hook_z, self.hook_result = CheckedHookPoint(), CheckedHookPoint()

    def forward(
        self,
        query_input: Float[Tensor, "batch pos *q_head d_model"],
        key_input: Float[Tensor, "batch pos *k_head d_model"],
        value_input: Float[Tensor, "batch pos *v_head d_model"],
        position: PositionScheme,
        allowed: Bool[Tensor, "#batch 1 query_pos key_pos"] | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Attend; inputs are the normalised residual, shared by all heads or with one of its own for each."""
        q = self.hook_q(_project(query_input, self.W_Q, self.b_Q))
        k = self.hook_k(_project(key_input, self.W_K, self.b_K))
        v = self.hook_v(_project(value_input, self.W_V, self.b_V))
        if self.cfg.use_qk_norm:
            q, k = self.hook_q_normalized(self.q_norm(q)), self.hook_k_normalized(self.k_norm(k))
        positions = torch.arange(q.shape[1], device=q.device)
        if rotates(self.cfg):
            q = self.hook_rot_q(position.rotate(q, positions, "q"))
            k = self.hook_rot_k(position.rotate(k, positions, "k"))
        z = self.hook_z(self._attend(q, k, v, position.bias(positions, positions), allowed))
        if in_use(self.hook_result):
            result = einsum(z, self.W_O, "batch pos head d_head, head d_head d_model -> batch pos head d_model")
            written = self.hook_result(result).sum(2)
        else:
            written = z.flatten(-2) @ self.W_O.flatten(0, 1)
        return written if self.b_O is None else written + self.b_O

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, allowed: Tensor | None
    ) -> Float[Tensor, "batch pos head d_head"]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [batch head pos d_head]
        bias = None if bias is None else bias.to(q.dtype)
        hooked = in_use(self.hook_attn_scores) or in_use(self.hook_pattern)
        fused = not hooked and (q.is_cuda or q.shape[2] >= FUSED_FROM)
        only_causal = self.cfg.is_causal and allowed is None
        if only_causal and not (fused and bias is None):
            allowed = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        if not (fused and q.is_cpu):  # elsewhere not every kernel reads grouped keys
            k, v = (per_query_head(x, self.cfg.n_heads, dim=1) for x in (k, v))
        if fused:
            z = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=_additive(bias, allowed),
                is_causal=only_causal and bias is None,
                scale=self.cfg.score_scale,
                enable_gqa=k.shape[1] != q.shape[1],
            )
            return z.transpose(1, 2)

        scores = attention_scores(q, k, bias, self.cfg.score_scale)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        pattern = self.hook_attn_scores(scores).softmax(-1)
        if allowed is not None:  # a query that may read nothing reads nothing, rather than everything alike
            pattern = pattern.masked_fill(~allowed, 0.0)
        return (self.hook_pattern(pattern) @ v).transpose(1, 2)


def _project(
    x: Float[Tensor, "batch pos *own d_model"],
    weight: Float[Tensor, "head d_model d_head"],
    bias: Float[Tensor, "head d_head"] | None,
) -> Float[Tensor, "batch pos head d_head"]:
    """Compute queries, keys or values of an input that heads share, or of each head's own."""
    if x.ndim == 3:
        projected = (x @ weight.transpose(0, 1).flatten(1)).unflatten(-1, (weight.shape[0], weight.shape[2]))
    else:
        projected = einsum(x, weight, "batch pos head d_model, head d_model d_head -> batch pos head d_head")
    return projected if bias is None else projected + bias


def content_hooks(cfg: ModelConfig) -> tuple[str, str]:
    """Return what the hooks of queries and keys are called that positions act on, after `hook_`."""
    return ("q_normalized", "k_normalized") if cfg.use_qk_norm else ("q", "k")


def per_query_head(x: Shaped[Tensor, "*kv_heads"], n_heads: int, dim: int) -> Shaped[Tensor, "*heads"]:
    """Repeat keys, values or weights of grouped heads, along dimension `dim`, for every query head that reads them."""
    return x if x.shape[dim] == n_heads else x.repeat_interleave(n_heads // x.shape[dim], dim=dim)


def attention_scores(
    q: Float[Tensor, "batch head query_pos d_head"],
    k: Float[Tensor, "batch head key_pos d_head"],
    bias: Float[Tensor, "*batch head query_pos key_pos"] | None,
    scale: float,
) -> Float[Tensor, "batch head query_pos key_pos"]:
    """Compute q k times `scale` (`ModelConfig.score_scale`), and add the bias of the position scheme; nothing is masked
    yet."""
    scores = q @ k.transpose(-1, -2) * scale
    return scores if bias is None else scores + bias.to(scores.dtype)


def _additive(bias: Tensor | None, allowed: Tensor | None) -> Tensor | None:
    """Return bias and mask in the one form the fused kernel takes."""
    if allowed is None or bias is None:
        return allowed if bias is None else bias
    return bias.masked_fill(~allowed, float("-inf"))


class MLP(nn.Module):
    """Plain `act(x W_in) W_out`, or gated `(act(x W_gate) * x W_in) W_out`. Biases come from weight processing only."""

    b_in: nn.Parameter | None
    b_gate: nn.Parameter | None
    b_out: nn.Parameter | None

    def __init__(self, cfg: ModelConfig, width: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[cfg.act_fn]
        self.W_in = nn.Parameter(torch.empty(cfg.d_model, width))
        self.W_out = nn.Parameter(torch.empty(width, cfg.d_model))
        self.W_gate = nn.Parameter(torch.empty(cfg.d_model, width)) if cfg.gated_mlp else None
        for name in ("b_in", "b_gate", "b_out"):
            self.register_parameter(name, None)
        self.hook_pre, self.hook_post = CheckedHookPoint(), CheckedHookPoint()
        if cfg.gated_mlp:
            self.hook_pre_linear = CheckedHookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.W_gate is None:
            post = self.activation(self.hook_pre(_affine(x, self.W_in, self.b_in)))
        else:
            gate = self.activation(self.hook_pre(_affine(x, self.W_gate, self.b_gate)))
            post = gate * self.hook_pre_linear(_affine(x, self.W_in, self.b_in))
        return _affine(self.hook_post(post), self.W_out, self.b_out)


class MoE(nn.Module):
    """Experts, each a gated MLP, of which every token goes through those that its router scores highest.

        s = sigmoid(x W_router),
        chosen: the highest of s + expert_bias, among the groups whose two highest of these sum up to most,
        out = routed_scale * sum over chosen e of (s_e / sum of chosen s) MLP_e(x), plus the shared MLP of x.

    Hooks: `hook_router` [batch pos expert] is `x W_router`, `hook_expert_weights` [batch pos expert] what each expert's
    output is multiplied by, 0 where it is not chosen: an edit chooses others. `hook_pre`, `hook_pre_linear`,
    `hook_post` [row d_expert] and `hook_expert_out` [row d_model] have a row for each expert and token that goes
    through it, expert by expert (:meth:`rows`). `shared` has an MLP's hooks.

    Source: arXiv 2412.19437, section 2.1.2; transformers, `models/deepseek_v3`, whose routing LLaDA2 shares.
    """

    expert_bias: Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        assert cfg.experts is not None
        self.cfg, self.activation = cfg.experts, ACTIVATIONS[cfg.act_fn]
        n_experts, width = self.cfg.num_experts, self.cfg.d_expert
        self.W_router = nn.Parameter(torch.empty(cfg.d_model, n_experts))
        self.register_buffer("expert_bias", torch.zeros(n_experts))  # chooses, and is in no product
        self.W_gate = nn.Parameter(torch.empty(n_experts, cfg.d_model, width))
        self.W_in = nn.Parameter(torch.empty(n_experts, cfg.d_model, width))
        self.W_out = nn.Parameter(torch.empty(n_experts, width, cfg.d_model))
        self.shared = MLP(cfg, self.cfg.n_shared * width) if self.cfg.n_shared else None
        self.hook_router, self.hook_expert_weights = CheckedHookPoint(), CheckedHookPoint()
        self.hook_pre, self.hook_pre_linear, self.hook_post = (CheckedHookPoint() for _ in range(3))
        self.hook_expert_out = CheckedHookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        weights = self.hook_expert_weights(self._weights(self.hook_router(precise(x) @ precise(self.W_router))))
        expert, token = self.rows(weights)
        counts = torch.bincount(expert, minlength=self.cfg.num_experts).tolist()
        read = x.flatten(0, 1)[token]

        def each(rows: Tensor, weight: Tensor) -> Tensor:
            return torch.cat([part @ weight[index] for index, part in enumerate(rows.split(counts))])

        gate = self.activation(self.hook_pre(each(read, self.W_gate)))
        post = self.hook_post(gate * self.hook_pre_linear(each(read, self.W_in)))
        written = self.hook_expert_out(each(post, self.W_out)) * weights.flatten(0, 1)[token, expert, None].to(x.dtype)
        out = torch.zeros_like(x).flatten(0, 1).index_add(0, token, written).view_as(x)
        return out if self.shared is None else out + self.shared(x)

    def _weights(self, router: Float[Tensor, "batch pos expert"]) -> Float[Tensor, "batch pos expert"]:
        cfg, scores = self.cfg, router.sigmoid()
        biased = scores + precise(self.expert_bias)
        if cfg.n_groups > 1:
            groups = biased.unflatten(-1, (cfg.n_groups, -1))
            pairs = groups.topk(min(2, groups.shape[-1])).values.sum(-1)
            best = torch.zeros_like(pairs, dtype=torch.bool).scatter(-1, pairs.topk(cfg.topk_groups).indices, True)
            biased = groups.masked_fill(~best[..., None], -torch.inf).flatten(-2)
        chosen = biased.topk(cfg.experts_per_token).indices
        kept = scores.gather(-1, chosen)
        kept = kept / (kept.sum(-1, keepdim=True) + 1e-20) if cfg.experts_per_token > 1 else kept
        return torch.zeros_like(scores).scatter(-1, chosen, cfg.routed_scale * kept)

    @staticmethod
    def rows(weights: Float[Tensor, "batch pos expert"]) -> tuple[Int[Tensor, "row"], Int[Tensor, "row"]]:
        """Return the expert of each row, and its token among those of all sequences one after the other."""
        expert, token = (weights.detach().flatten(0, 1).T != 0).nonzero(as_tuple=True)
        return expert, token


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else x @ weight + bias


class Block(nn.Module):
    """Pre-norm block: attention, then an MLP if there is one.

    Split inputs (`hook_attn_in`, `hook_q_input` and its kin, `hook_mlp_in`) are copies of the residual stream made for
    editing, and only while something is hooked on them. `hook_attn_in` comes before the others, and is not there in
    grouped-query attention, whose queries outnumber its keys.
    """

    hook_out_is_single_residual_stream = True
    """Read by TransformerLens' logit lens, which else takes the residual stream for one of several."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln1, self.attn = make_norm(cfg), Attention(cfg)
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_post = (CheckedHookPoint() for _ in range(3))
        self.hook_q_input, self.hook_k_input, self.hook_v_input = (CheckedHookPoint() for _ in range(3))
        self.hook_attn_in = CheckedHookPoint() if cfg.kv_heads == cfg.n_heads else None
        dense = cfg.experts is None or layer < cfg.experts.n_dense_layers
        self.mlp = None if cfg.d_mlp is None else MLP(cfg, cfg.d_mlp) if dense else MoE(cfg)
        if not cfg.attn_only:
            self.ln2 = make_norm(cfg)
            self.hook_resid_mid, self.hook_mlp_in, self.hook_mlp_out = (CheckedHookPoint() for _ in range(3))

    def forward(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        position: PositionScheme,
        allowed: Bool[Tensor, "#batch 1 query_pos key_pos"] | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        device = self.attn.W_Q.device  # a large model's blocks may lie on several (checkpoints.load_checkpoint)
        resid, allowed = resid.to(device), allowed if allowed is None else allowed.to(device)
        resid = self.hook_resid_pre(resid)
        resid = resid + self.hook_attn_out(self.attn(*self._attention_inputs(resid), position, allowed))
        if self.mlp is not None:
            resid = self.hook_resid_mid(resid)
            mlp_in = self.hook_mlp_in(resid.clone()) if in_use(self.hook_mlp_in) else resid
            resid = resid + self.hook_mlp_out(self.mlp(self.ln2(mlp_in)))
        return self.hook_resid_post(resid)

    def _attention_inputs(
        self, resid: Float[Tensor, "batch pos d_model"]
    ) -> list[Float[Tensor, "batch pos *head d_model"]]:
        """Return the normalised residual that queries, keys and values are made of: one that heads share, or one per
        head where its copies are hooked."""
        shared = self.ln1(resid)
        together = self.hook_attn_in if self.hook_attn_in is not None and in_use(self.hook_attn_in) else None
        edited = None if together is None else together(_per_head(resid, self.attn.W_Q.shape[0]))
        inputs = []
        for split, weight in (
            (self.hook_q_input, self.attn.W_Q),
            (self.hook_k_input, self.attn.W_K),
            (self.hook_v_input, self.attn.W_V),
        ):
            if edited is None and not in_use(split):
                inputs.append(shared)
                continue
            copies = _per_head(resid, weight.shape[0])
            given = copies if edited is None else edited
            given = split(given.clone()) if in_use(split) else given
            # The norm's own hooks see the shared residual; a head reads that, plus what its copy's edit changes.
            edit = self.ln1(given, hooked=False) - self.ln1(copies, hooked=False)
            inputs.append(shared.unsqueeze(2) + edit)
        return inputs


def _per_head(resid: Float[Tensor, "batch pos d_model"], n_heads: int) -> Float[Tensor, "batch pos head d_model"]:
    return repeat(resid, "batch pos d_model -> batch pos head d_model", head=n_heads).clone()


class Embed(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return F.embedding(tokens, self.W_E)  # whose backward pass takes a tenth of that of W_E[tokens]


class Unembed(nn.Module):
    b_U: nn.Parameter | None

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.W_U = nn.Parameter(torch.empty(cfg.d_model, cfg.d_vocab_out or cfg.d_vocab))
        self.register_parameter("b_U", None)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        return _affine(x, self.W_U, self.b_U)


class TiedUnembed(nn.Module):
    """Reads logits with the embedding's own weights."""

    b_U = None

    def __init__(self, embed: Embed) -> None:
        super().__init__()
        self._embed = (embed,)  # in a tuple, so as not to be a module of this one, too

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self._embed[0].W_E.T

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        return x @ self.W_U
