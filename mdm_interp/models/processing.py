"""Changes of weights that leave what a model computes as it is: TransformerLens' weight processing.

A linear map that reads a norm can take over the norm's gain and bias, since `(n * w + b) W = n (w * W) + b W`; what all
directions of the residual stream have in common is invisible to LayerNorm; and a pattern's rows sum to 1, so that a
value's bias reaches the residual stream whole. Activations between the weights do change, and so do gradients.

Source: TransformerLens, further comments on weight processing; docs/theory.md, section 1.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mdm_interp.errors import UserError
from mdm_interp.models.layers import MLP, MoE, Norm, TiedUnembed, Unembed, per_query_head
from mdm_interp.models.text import Texts

ModelT = TypeVar("ModelT", bound="ProcessedWeights")


class ProcessedWeights(Texts):
    """Weight processing, in place. Every method returns the model.

    Source: :mod:`mdm_interp.models.processing`.
    """

    @torch.no_grad()
    def fold_layer_norm(self: ModelT, *, fold_biases: bool = True) -> ModelT:
        """Fold gains and biases of all norms into the weights that read them; the norms keep gain 1 and bias 0.

        A tied embedding is untied first. Outputs stay as they are, up to rounding.

        Args:
            fold_biases: Whether LayerNorm's biases are folded, too. Those that stay are divided by the gain, which the
                weights multiply them by from then on.

        Raises:
            UserError: the model has no norms, or biases are to stay where the gain is 0.
        """
        if self.cfg.normalization_type is None:
            raise UserError(
                "fold_layer_norm: the model has no norms (normalization_type None), so nothing can be folded"
            )
        if not fold_biases:
            for norm in self.modules():
                if isinstance(norm, Norm) and norm.b is not None and bool(norm.b[norm.w == 0].any()):
                    raise UserError(
                        "fold_biases: a norm has a bias where its gain is 0, and keeps it only along with that gain; "
                        "fold both, with True"
                    )
        unembed = self._own_unembed()
        for block in self.blocks:
            attention: list[tuple[nn.Module, str, str]] = [
                (block.attn, "W_Q", "b_Q"),
                (block.attn, "W_K", "b_K"),
                (block.attn, "W_V", "b_V"),
            ]
            _fold(block.ln1, attention, fold_biases)
            if block.mlp is not None:
                _fold(block.ln2, _readers(block.mlp), fold_biases)
        _fold(self.ln_final, [(unembed, "W_U", "b_U")], fold_biases)
        return self

    @torch.no_grad()
    def center_writing_weights(self: ModelT) -> ModelT:
        """Subtract from whatever writes to the residual stream its mean over `d_model`. A tied embedding is untied
        first. Outputs stay as they are, up to rounding.

        Raises:
            UserError: the model's norms are not LayerNorm, which alone subtracts that mean itself.
        """
        if self.cfg.normalization_type != "LN":
            raise UserError(
                f"center_writing_weights: with normalization_type {self.cfg.normalization_type!r} the mean of the "
                "residual stream reaches the outputs; only models with LayerNorm ('LN') can be centred"
            )
        self._own_unembed()
        written = [self.embed.W_E]
        written += [self.pos_embed.W_pos] if isinstance(getattr(self.pos_embed, "W_pos", None), nn.Parameter) else []
        for block in self.blocks:
            written += [block.attn.W_O, block.attn.b_O]
            written += [] if block.mlp is None else [block.mlp.W_out, block.mlp.b_out]
        for weight in written:
            if weight is not None:
                weight -= weight.mean(-1, keepdim=True)
        return self

    @torch.no_grad()
    def center_unembed(self: ModelT) -> ModelT:
        """Subtract from the unembedding its mean over tokens. A tied embedding is untied first. Logits lose their mean
        at every position, log probabilities stay as they are, up to rounding."""
        unembed = self._own_unembed()
        unembed.W_U.sub_(unembed.W_U.mean(-1, keepdim=True))
        if unembed.b_U is not None:
            unembed.b_U.sub_(unembed.b_U.mean())
        return self

    @torch.no_grad()
    def fold_value_biases(self: ModelT) -> ModelT:
        """Move the values' biases into the biases of attention's output, which every pattern whose rows sum to 1 gives
        them anyway. Outputs stay as they are, up to rounding."""
        for block in self.blocks:
            attn = block.attn
            if attn.b_V is not None:
                biases = per_query_head(attn.b_V, self.cfg.n_heads, dim=0)
                _add_bias(attn, "b_O", torch.einsum("hd,hdm->m", biases, attn.W_O))
                attn.b_V.zero_()
        return self

    def process_weights_(
        self: ModelT,
        *,
        fold_ln: bool = True,
        center_writing_weights: bool | None = None,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
    ) -> ModelT:
        """Do all of these, in place.

        Args:
            fold_ln: Whether to :meth:`fold_layer_norm`.
            center_writing_weights: Whether to :meth:`center_writing_weights`; default: where that is exact.

        Raises:
            UserError: one of them was asked for and is not exact in this model.
        """
        # what may be refused comes first: centring changes what is written, folding what reads
        if self.cfg.normalization_type == "LN" if center_writing_weights is None else center_writing_weights:
            self.center_writing_weights()
        if fold_ln and self.cfg.normalization_type is not None:
            self.fold_layer_norm()
        if center_unembed:
            self.center_unembed()
        if fold_value_biases:
            self.fold_value_biases()
        return self

    @torch.no_grad()
    def add_biases(self: ModelT) -> ModelT:
        """Give the model every bias that the classic model has, as a parameter that is 0."""
        for block in self.blocks:
            attn = block.attn
            for name, weight in (("b_Q", attn.W_Q), ("b_K", attn.W_K), ("b_V", attn.W_V)):
                _add_bias(attn, name, weight.new_zeros(weight.shape[0], weight.shape[2]))
            _add_bias(attn, "b_O", attn.W_O.new_zeros(attn.W_O.shape[-1]))
            if isinstance(block.mlp, MLP):
                _add_bias(block.mlp, "b_in", block.mlp.W_in.new_zeros(block.mlp.W_in.shape[1]))
                _add_bias(block.mlp, "b_out", block.mlp.W_out.new_zeros(block.mlp.W_out.shape[1]))
        if isinstance(self.unembed, Unembed):
            _add_bias(self.unembed, "b_U", self.W_U.new_zeros(self.W_U.shape[1]))
        return self

    def _own_unembed(self) -> Unembed:
        """Return the unembedding, with weights of its own from now on."""
        if isinstance(self.unembed, TiedUnembed):
            weights = self.W_U.detach().clone().contiguous()
            self.unembed = Unembed(self.cfg).to(weights).train(self.training)
            self.unembed.W_U = nn.Parameter(weights, requires_grad=self.embed.W_E.requires_grad)
            self._configure(tie_word_embeddings=False)
            self.setup()
        return self.unembed


def _readers(mlp: MLP | MoE) -> list[tuple[nn.Module, str, str]]:
    """List the weights of an MLP, or of experts, that read the residual stream, and what their biases are called."""
    readers: list[tuple[nn.Module, str, str]] = [(mlp, "W_in", "b_in")]
    readers += [] if mlp.W_gate is None else [(mlp, "W_gate", "b_gate")]
    if isinstance(mlp, MoE):
        readers.append((mlp, "W_router", "b_router"))
        readers += [] if mlp.shared is None else _readers(mlp.shared)
    return readers


def _fold(norm: nn.Module, readers: list[tuple[nn.Module, str, str]], fold_biases: bool) -> None:
    """Move a norm's gain, and its bias if asked, into the weights and biases that read it."""
    assert isinstance(norm, Norm)
    for module, weight_name, bias_name in readers:
        weight = getattr(module, weight_name)
        if fold_biases and norm.b is not None and bool(norm.b.any()):
            _add_bias(module, bias_name, torch.einsum("...ij,i->...j", weight, norm.b.to(weight)))
        weight *= norm.w.to(weight)[:, None]
    if norm.b is not None:
        norm.b.copy_(torch.zeros_like(norm.b) if fold_biases else torch.where(norm.w == 0, 0, norm.b / norm.w))
    norm.w.fill_(1)


def _add_bias(module: nn.Module, name: str, value: Float[Tensor, "*shape"]) -> None:
    """Add to a bias, which becomes a parameter if it was none."""
    bias = getattr(module, name)
    if bias is None:
        module.register_parameter(
            name, nn.Parameter(value.clone(), requires_grad=next(module.parameters()).requires_grad)
        )
    else:
        bias += value
