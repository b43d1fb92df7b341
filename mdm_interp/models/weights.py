"""Weights of a model: stacked over layers with one slice per query head, and products of them, as TransformerLens has
them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformer_lens.utilities import TypedModuleList, composition_scores

from mdm_interp.errors import UserError, require_one_of
from mdm_interp.models.hooks import CheckedHooks
from mdm_interp.models.inputs import check_layer, check_token_ids
from mdm_interp.models.layers import Attention, Block, Embed, MoE, Norm, TiedUnembed, Unembed, per_query_head, precise
from mdm_interp.models.positions import PositionScheme


class Weights(CheckedHooks):
    """What can be asked of a model's weights. Biases that it lacks are zeros."""

    embed: Embed
    pos_embed: PositionScheme
    blocks: TypedModuleList[Block]
    ln_final: nn.Module
    unembed: Unembed | TiedUnembed

    def _configure(self, **update: Any) -> None:
        """Change fields of the config, which the model's parts share."""
        self.cfg = self.cfg.model_copy(update=update)
        for module in self.modules():
            if isinstance(module, (Attention, PositionScheme)):
                module.cfg = self.cfg

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembed.W_U

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """Raises AttributeError under a relative scheme, which has none."""
        return self.pos_embed.W_pos

    @property
    def W_E_pos(self) -> Float[Tensor, "d_vocab_and_n_ctx d_model"]:
        """`W_E` above `W_pos`. Raises AttributeError under a relative scheme."""
        return torch.cat([self.W_E, self.W_pos.to(self.W_E)])

    def _stacked(self, part: str, name: str, *zeros: int) -> Tensor:
        """Stack a parameter over layers; `zeros` is its shape in a layer, for a bias that may not be there."""
        layers = []
        if part == "mlp" and self.cfg.experts is not None:
            raise UserError(f"{name}: layers of experts have no MLP to be stacked; read it as blocks[layer].mlp.{name}")
        for block in self.blocks:
            weight = getattr(getattr(block, part), name)
            layers.append((block.attn.W_Q.new_zeros(zeros) if weight is None else weight).to(self.W_E.device))
        stacked = torch.stack(layers)
        return per_query_head(stacked, self.cfg.n_heads, dim=1) if name in ("W_K", "W_V", "b_K", "b_V") else stacked

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
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"] | None:
        """None if the MLP has no gate."""
        return self._stacked("mlp", "W_gate") if self.cfg.gated_mlp else None

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        return self._stacked("mlp", "W_out")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        return self._stacked("attn", "b_Q", self.cfg.n_heads, self.cfg.head_dim)

    @property
    def b_K(self) -> Float[Tensor, "layer head d_head"]:
        return self._stacked("attn", "b_K", self.cfg.kv_heads, self.cfg.head_dim)

    @property
    def b_V(self) -> Float[Tensor, "layer head d_head"]:
        return self._stacked("attn", "b_V", self.cfg.kv_heads, self.cfg.head_dim)

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        return self._stacked("attn", "b_O", self.cfg.d_model)

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        return self._stacked("mlp", "b_in", self.cfg.d_mlp or 0)

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        return self._stacked("mlp", "b_out", self.cfg.d_model)

    @property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        return self.W_U.new_zeros(self.W_U.shape[1]) if self.unembed.b_U is None else self.unembed.b_U

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_K^T of every head, `[layer head d_model d_model]`: where it attends, positions apart."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of every head, `[layer head d_model d_model]`: what it writes about what it attends to."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def n_params_total(self) -> int:
        """How many parameters there are, biases and norms included; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def tl_parameters(self) -> dict[str, Tensor]:
        """Return every weight by its name, with one slice per query head and a tied unembedding, too: what
        TransformerLens' `SVDInterpreter` picks heads from."""
        weights: dict[str, Tensor] = dict(self.named_parameters())
        for layer in range(self.cfg.n_layers):
            for name in ("W_K", "W_V", "b_K", "b_V"):
                if (key := f"blocks.{layer}.attn.{name}") in weights:
                    weights[key] = per_query_head(weights[key], self.cfg.n_heads, dim=0)
        return weights | {"unembed.W_U": self.W_U}

    def blocks_with(self, submodule: str) -> list[tuple[int, Block]]:
        """Return layer and block of every block that has a part of this name, such as `attn` or `mlp`."""
        return [(layer, block) for layer, block in enumerate(self.blocks) if submodule in dict(block.named_children())]

    def all_head_labels(self) -> list[str]:
        """Return `L0H0`, `L0H1`, … of every head."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    @torch.no_grad()
    def all_composition_scores(
        self, mode: Literal["Q", "K", "V"]
    ) -> Float[Tensor, "layer head later_layer later_head"]:
        """Compute how much of each head's output the Q, K or V of heads in later layers reads: the norm of the product
        of the two circuits over the product of their norms; 0 where the second is not later.

        Raises:
            UserError: `mode` is none of Q, K and V.

        Source: Elhage et al., A mathematical framework for transformer circuits, 2021.
        """
        require_one_of("mode", mode, ("Q", "K", "V"))
        reads = {"Q": self.QK, "K": self.QK.T, "V": self.OV}[mode]
        scores = composition_scores(self.OV, reads, broadcast_dims=True)
        layers = torch.arange(self.cfg.n_layers, device=scores.device)
        later = layers[:, None, None, None] < layers[None, None, :, None]
        return torch.where(later, scores, torch.zeros_like(scores))

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Add up what output biases have added to the residual stream before `layer`.

        Args:
            mlp_input: Whether the attention of `layer` itself counts.
            include_mlp_biases: Whether MLPs count.

        Raises:
            UserError: there is no such layer.
        """
        check_layer("layer", layer, 0, self.cfg.n_layers)
        total = torch.zeros(self.cfg.d_model, device=self.W_E.device, dtype=self.W_E.dtype)
        for block in self.blocks[: layer + int(mlp_input)]:
            total = total if block.attn.b_O is None else total + block.attn.b_O.to(total)
        for block in self.blocks[:layer] if include_mlp_biases else ():
            bias = None if block.mlp is None or isinstance(block.mlp, MoE) else block.mlp.b_out
            total = total if bias is None else total + bias.to(total)
        return total

    def residual_directions(self, tokens: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens d_model"]:
        """Return the direction whose dot product with the *normalised* residual is a token's logit, up to the norm's
        bias: the final norm's gain is included. In float32 at least.

        Raises:
            UserError: a token is outside the vocabulary.
        """
        check_token_ids("tokens", tokens, self.W_U.shape[1])
        directions = precise(self.W_U.T[tokens])
        return directions * self.ln_final.w if isinstance(self.ln_final, Norm) else directions
