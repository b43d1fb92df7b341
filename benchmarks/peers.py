"""What this package is compared with: a plain PyTorch transformer, Hugging Face's Llama, a `TransformerBridge`, and
gradients of single examples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import boot
from transformers import LlamaConfig, LlamaForCausalLM

from mdm_interp.checkpoints.llama import Llama
from mdm_interp.config import ModelConfig
from mdm_interp.data.queries import QueryBatch
from mdm_interp.inference.prediction import query_loss
from mdm_interp.models.transformer import HookedTransformer


class PlainTransformer(nn.Module):
    """RMSNorm, rotary attention and a gated MLP if the config has one, as one would write them in plain PyTorch."""

    def __init__(self, cfg: ModelConfig, *, fused: bool = True) -> None:
        super().__init__()
        self.cfg, self.fused = cfg, fused
        kv_width = cfg.kv_heads * cfg.head_dim
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.layers = nn.ModuleList()
        for _ in range(cfg.n_layers):
            layer = {
                "norm": nn.RMSNorm(cfg.d_model, eps=cfg.eps),
                "q": nn.Linear(cfg.d_model, cfg.d_model, bias=False),
                "k": nn.Linear(cfg.d_model, kv_width, bias=False),
                "v": nn.Linear(cfg.d_model, kv_width, bias=False),
                "o": nn.Linear(cfg.d_model, cfg.d_model, bias=False),
            }
            if cfg.d_mlp is not None:
                layer |= {
                    "mlp_norm": nn.RMSNorm(cfg.d_model, eps=cfg.eps),
                    "gate": nn.Linear(cfg.d_model, cfg.d_mlp, bias=False),
                    "up": nn.Linear(cfg.d_model, cfg.d_mlp, bias=False),
                    "down": nn.Linear(cfg.d_mlp, cfg.d_model, bias=False),
                }
            self.layers.append(nn.ModuleDict(layer))
        self.norm = nn.RMSNorm(cfg.d_model, eps=cfg.eps)
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)
        self.to(cfg.device, cfg.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        cfg, n_pos = self.cfg, tokens.shape[1]
        exponent = torch.arange(0, cfg.head_dim, 2, device=tokens.device) / cfg.head_dim
        angle = torch.arange(n_pos, device=tokens.device)[:, None] * cfg.rotary_base**-exponent
        cos, sin = angle.cos().to(cfg.dtype), angle.sin().to(cfg.dtype)
        x = self.embed(tokens)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            normed = layer["norm"](x)
            q, k, v = (layer[name](normed).unflatten(-1, (-1, cfg.head_dim)).transpose(1, 2) for name in "qkv")
            z = self._attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
            x = x + layer["o"](z.transpose(1, 2).flatten(2))
            if cfg.d_mlp is not None:
                normed = layer["mlp_norm"](x)
                x = x + layer["down"](F.silu(layer["gate"](normed)) * layer["up"](normed))
        return self.unembed(self.norm(x))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.cfg.is_causal)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if self.cfg.is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        return scores.softmax(-1) @ v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def llama(cfg: ModelConfig, **settings: Any) -> LlamaForCausalLM:
    """Return Hugging Face's Llama of a shape, with random weights.

    Args:
        settings: More fields of its config.
    """
    config = LlamaConfig(
        vocab_size=cfg.d_vocab,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_mlp or 0,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.kv_heads,
        max_position_embeddings=cfg.n_ctx,
        rms_norm_eps=cfg.eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rotary_base},
        use_cache=False,
        **settings,
    )
    with torch.device(cfg.device):
        return LlamaForCausalLM(config).to(cfg.dtype).eval()  # pyright: ignore[reportArgumentType]


def llama_mask(cfg: ModelConfig, tokens: Tensor) -> Tensor | None:
    """Return the mask with which Hugging Face's Llama attends as the config says: all zeros to see both sides."""
    n_pos = tokens.shape[1]
    return None if cfg.is_causal else torch.zeros(len(tokens), 1, n_pos, n_pos, device=cfg.device, dtype=cfg.dtype)


def with_weights_of(peer: LlamaForCausalLM, cfg: ModelConfig) -> HookedTransformer:
    """Return our model with the weights of Hugging Face's in memory, in the layout a loaded checkpoint has."""
    model, format, weights = HookedTransformer(cfg, init_weights=False), Llama(), peer.state_dict()
    for name, _ in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        weight = format.from_stored(name, weights[format.tensor_name(name)], cfg)
        setattr(model.get_submodule(module), leaf, nn.Parameter(weight))
    return model.to(cfg.device)


def bridge(cfg: ModelConfig) -> Any:
    """Return a native `TransformerBridge` of a shape, with random weights."""
    config = TransformerBridgeConfig(
        d_model=cfg.d_model,
        d_head=cfg.head_dim,
        n_heads=cfg.n_heads,
        n_key_value_heads=cfg.kv_heads,
        n_layers=cfg.n_layers,
        n_ctx=cfg.n_ctx,
        d_vocab=cfg.d_vocab,
        d_mlp=cfg.d_mlp,
        act_fn=cfg.act_fn,
        gated_mlp=cfg.gated_mlp,
        normalization_type=cfg.normalization_type,
        positional_embedding_type="rotary",
        rotary_dim=cfg.rotary_dim,
        attention_dir=cfg.attention,
        device=cfg.device,
    )
    return boot(config).to(cfg.device, print_details=False)


# ---- gradients of single examples


def products_by_backward(model: HookedTransformer, batch: QueryBatch) -> Tensor:
    """Compute the inner products of all queries' gradients from one backward pass each."""
    losses, parameters = query_loss(model(batch.tokens), batch), list(model.parameters())
    flat = [
        torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters, retain_graph=True)])
        for loss in losses
    ]
    stacked = torch.stack(flat)
    return stacked @ stacked.T


def products_by_func(model: HookedTransformer, batch: QueryBatch) -> Tensor:
    """Compute the same from `torch.func`'s gradients of single examples."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], tokens: Tensor, readout: Tensor, answer: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (tokens[None],))[0]
        return -logits[readout].log_softmax(-1).gather(-1, answer[:, None]).sum()

    single = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, batch.tokens, batch.readout, batch.answer)
    stacked = torch.cat([part.flatten(1) for part in single.values()], dim=1)
    return stacked @ stacked.T
