"""The backward pass of a `HookedTransformer` for many queries at once, layer by layer, without weight gradients.

The forward pass keeps the residual stream that enters each layer. From the last layer down, each is run again, and
autograd gives the loss's gradients at the outputs of its linear maps. Together with what the maps read, these are every
query's own gradient (:class:`~mdm_interp.measures.gradients.terms.Terms`). Weights are read in float32 at least, one
layer's at a time, so a model of half precision is measured as its weights are, and never copied as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from mdm_interp.config import ModelConfig
from mdm_interp.data.queries import MAX_LOGITS, QueryBatch
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import answer_loss
from mdm_interp.measures.gradients.asked import Asked
from mdm_interp.measures.gradients.terms import Found, Real, Terms, Weight, without_zeros
from mdm_interp.models.hooks import in_use, is_watched
from mdm_interp.models.inputs import places
from mdm_interp.models.layers import MLP, MoE, Norm, precise
from mdm_interp.models.positions import PositionScheme, Which
from mdm_interp.models.transformer import HookedTransformer

RowLoss = Callable[[Float[Tensor, "query span d_vocab"], QueryBatch], Float[Tensor, "query"]]
"""Each query's loss, from the logits at its readout positions (`QueryBatch.readout`)."""


@dataclass(frozen=True)
class SourceAttention:
    """Attention as what gradients are of, in place of a loss: the share of its attention that a query's readout
    positions give to the source, in the mean over them."""

    layer: int
    head: int | None = None
    """None: the mean over all heads."""

    def __call__(
        self, pattern: Float[Tensor, "query head query_pos key_pos"], batch: QueryBatch
    ) -> Float[Tensor, "query"]:
        rows = batch.at_readout(pattern.transpose(1, 2))
        shares = (rows * batch.source.to(rows.device)[:, None, None]).sum(-1)
        share = shares.mean(2) if self.head is None else shares[:, :, self.head]
        answered = batch.answered.to(share.device)
        return (share * answered).sum(1) / answered.sum(1)

    def check(self, n_layers: int, n_heads: int) -> None:
        """Refuse what a model does not have.

        Raises:
            UserError: it has no such layer or head.
        """
        for name, value, count in (("layer", self.layer, n_layers), ("head", self.head or 0, n_heads)):
            if not 0 <= value < count:
                raise UserError(
                    f"loss: the model has no {name} {value} (SourceAttention.{name}); give 0 to {count - 1}"
                )


LOGITS = MAX_LOGITS // 16
"""How many logits are computed at a time, or one sequence's: 32 MB in float32, and as much again for each step from
them to their gradients. glibc maps what is larger anew each time, which takes longer than to compute it."""
ERRORS = MAX_LOGITS
"""How many gradients at logits are held: half a GB in float32."""
KEPT = 3 * 2**25
"""Entries of activations that are kept of the forward pass rather than computed again: 0.4 GB in float32."""


def activations(cfg: ModelConfig, n_query: int, n_pos: int) -> int:
    """Tell about how many entries one layer's activations of a batch have, and their gradients."""
    width = 10 * cfg.d_model + 6 * cfg.n_heads * cfg.head_dim + 5 * (cfg.d_mlp or 0)
    return n_query * n_pos * (width + 4 * cfg.n_heads * n_pos)


def at_logits(
    loss: RowLoss,
    logits: Float[Tensor, "query span d_vocab"],
    batch: QueryBatch,
    weight: Float[Tensor, "query"] | None,
) -> Float[Tensor, "query span d_vocab"]:
    """Return the gradients of each query's weighted loss at its logits.

    Raises:
        UserError: the loss is not one of each query, or does not hang on the logits.
    """
    losses = loss(logits, batch)
    if losses.shape != (len(logits),):
        raise UserError(f"loss: gave shape {list(losses.shape)} for {len(logits)} queries; return a number for each")
    weighted = losses if weight is None else losses * weight.to(losses)
    found = torch.autograd.grad(weighted.sum(), logits, allow_unused=True)[0] if losses.requires_grad else None
    if found is None:
        raise UserError("loss: does not depend on the logits, so it has no gradients; compute it from them, undetached")
    return found


@dataclass
class Taps:
    """Tensors of one run of a part of the model, kept by torch's own hooks: inputs of maps as they are after every edit
    of the user's, outputs as they are before any."""

    read: dict[str, Tensor] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)
    """What gradients are asked at."""
    _handles: list[RemovableHandle] = field(default_factory=list)

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def leaf(self, name: str, x: Tensor) -> Tensor:
        """Keep an output. What hangs on no gradient (a user's hook put it there) becomes the start of one."""
        self.made[name] = x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_()
        return self.made[name]

    def before(self, name: str, point: nn.Module) -> None:
        """Keep what enters a hook point."""
        edited = in_use(point)

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = self.leaf(name, args[0])
            return (x.clone() if edited else x, *args[1:])  # a hook may edit in place

        self._handles.append(point.register_forward_pre_hook(keep))

    def after(self, name: str, point: nn.Module) -> None:
        """Keep what leaves a hook point."""

        def keep(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self.read[name] = out

        self._handles.append(point.register_forward_hook(keep))

    def inputs(self, names: Sequence[str], module: nn.Module) -> None:
        """Keep what a module is given."""

        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.read.update(zip(names, args[: len(names)], strict=True))

        self._handles.append(module.register_forward_pre_hook(keep))

    def replace(self, module: nn.Module, change: Callable[..., tuple]) -> None:
        """Give a module other arguments than it is given."""
        self._handles.append(module.register_forward_pre_hook(lambda _, args: change(*args)))

    def start(self, name: str, point: nn.Module) -> None:
        """Start gradients at what enters a hook point, in float32 at least."""
        self.replace(point, lambda x: (self.leaf(name, precise(x.detach())).clone(),))

    def mlp(self, path: str, mlp: MLP | MoE) -> None:
        """Keep what an MLP's maps make, and what the last of them reads."""
        self.before(f"{path}pre", mlp.hook_pre)
        if mlp.W_gate is not None:
            self.before(f"{path}pre_linear", mlp.hook_pre_linear)
        self.after(f"{path}post", mlp.hook_post)

    def experts(self, moe: MoE) -> None:
        """Keep the same of all experts, row by row, of the shared ones, and of the router."""
        self.mlp("experts.", moe)
        self.before("experts.router", moe.hook_router)
        self.after("experts.weights", moe.hook_expert_weights)
        self.before("experts.out", moe.hook_expert_out)
        if moe.shared is not None:
            self.mlp("shared.", moe.shared)

    def norm(self, name: str, norm: nn.Module) -> None:
        """Keep the quotient and the output of a norm, each time that it is called."""
        if not isinstance(norm, Norm):
            return
        self.after(f"{name}.hooked", norm.hook_normalized)

        def keep(_: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any], out: Tensor) -> Tensor:
            call = f"{name} {sum(made.startswith(f'{name} ') for made in self.made)}"
            hooked = kwargs.get("hooked", True)
            self.read[call] = self.read[f"{name}.hooked"] if hooked else norm.normalize(args[0], hooked=False)
            return self.leaf(call, out)

        self._handles.append(norm.register_forward_hook(keep, with_kwargs=True))

    def backward(self, out: Tensor, d: Tensor) -> dict[str, Tensor]:
        """Return the gradients at all that was made, from those at what came out."""
        if not out.requires_grad:  # a user's hook put it there
            return {name: torch.zeros_like(x) for name, x in self.made.items()}
        grads = torch.autograd.grad(out, list(self.made.values()), d, allow_unused=True, materialize_grads=True)
        return dict(zip(self.made, grads, strict=True))


Run = tuple[Tensor, Taps]
"""What came out of a part of the model, and what was kept on the way."""


def layer_by_layer(
    model: HookedTransformer, asked: Sequence[Asked], loss: RowLoss | SourceAttention, n_held: int
) -> Iterator[tuple[int, Found]]:
    """Give every query's gradients, batch by batch: of the readout, of each layer from the last on, and of what comes
    before the first. A tied embedding's are all in the last, and those of a large unembedding come part by part.

    Args:
        n_held: Of how many batches, from the first on, the caller holds what is found in a part of the model until the
            part's end.
    """
    return _Backward(model, asked, loss, n_held)()


class _Backward:
    def __init__(
        self, model: HookedTransformer, asked: Sequence[Asked], loss: RowLoss | SourceAttention, n_held: int
    ) -> None:
        if isinstance(loss, SourceAttention):
            loss.check(model.cfg.n_layers, model.cfg.n_heads)
        self.model, self.asked, self.loss, self.n_held = model, asked, loss, n_held
        self.queries = [one.batch for one in asked]
        self.parameters = dict(model.named_parameters())
        self.content_norms = ("q_norm", "k_norm") if model.cfg.use_qk_norm else ()
        self.position = PositionGradients(model.pos_embed, self.queries)
        edited = is_watched(model)  # a hook may carry something from one token to another
        masks = [None if edited else batch.attention_mask for batch in self.queries]
        self.tokens = [None if mask is None else Real.where(mask) for mask in masks]
        """Of each batch, the tokens that are not padding; None where padding may have gradients, or there is none."""
        self.answered = [Real.where(batch.answered) if loss is answer_loss else None for batch in self.queries]
        """Of each batch, the readout positions that are answered; None where others may have gradients."""

    def __call__(self) -> Iterator[tuple[int, Found]]:
        n_layers = len(self.model.blocks)
        attended = self.loss if isinstance(self.loss, SourceAttention) else None
        above = n_layers if attended is None else attended.layer
        streams, kept = self._forward(above)
        last, d = streams.pop(), list[Tensor]()
        tied: list[Sequence[Terms]] = [()] * len(last)
        if isinstance(self.loss, SourceAttention):
            for _ in range(above, n_layers):  # the readout, and the layers that come after the attention
                yield from self._each(lambda i: {})
            weights = self._weights(f"blocks.{above}.")
            yield from self._each(partial(self._attention, self.loss, weights, last, d))
        else:
            yield from self._readout(self.loss, last, d, tied)
        for layer in reversed(range(above)):
            weights = self._weights(f"blocks.{layer}.")
            yield from self._each(partial(self._through, layer, weights, streams.pop(), kept, d))
        yield from self._each(lambda i: self._of_embedding(i, d[i], tied.pop(0)))

    def _each(self, find: Callable[[int], Found]) -> Iterator[tuple[int, Found]]:
        return ((i, find(i)) for i in range(len(self.queries)))

    def _readout(
        self, loss: RowLoss, last: Sequence[Tensor], d: list[Tensor], tied: list[Sequence[Terms]]
    ) -> Iterator[tuple[int, Found]]:
        """Go through the readout, and fill in the gradients at what enters it."""
        weights = self._weights("ln_final.", "embed." if self.model.cfg.tie_word_embeddings else "unembed.")
        first, *others = self._parts_of_vocabulary()

        def whole(i: int) -> Found:
            taps, at = self._through_readout(loss, weights, i, last[i], first, deeper=True)
            d.append(at["resid"])
            found = self._of_unembedding(i, taps, at) | self._of_norm("ln_final", taps, at)
            tied[i] = found.pop(("embed.W_E", 0), ())
            return found

        def again(part: slice, i: int) -> Found:
            taps, at = self._through_readout(loss, weights, i, last[i], part, deeper=False)
            return self._of_unembedding(i, taps, at)

        yield from self._each(whole)
        for part in others:
            yield from self._each(partial(again, part))

    def _through_readout(
        self, loss: RowLoss, weights: Mapping[str, Tensor], i: int, resid: Tensor, part: slice, *, deeper: bool
    ) -> tuple[Taps, dict[str, Tensor]]:
        """Go through the readout and back with one batch, :data:`LOGITS` at a time; of the gradients at logits, return
        a part of the vocabulary.

        Args:
            deeper: Whether gradients go on from the logits.
        """
        asked, pieces = self.asked[i], list[tuple[dict[str, Tensor], dict[str, Tensor]]]()
        size = max(1, LOGITS // (self.model.cfg.d_vocab * asked.batch.readout.shape[1]))
        for rows, batch, weight in asked.pieces(size):
            with torch.set_grad_enabled(deeper):
                logits, taps = self._read(weights, batch, resid[rows])
            error = at_logits(loss, logits if deeper else logits.requires_grad_(), batch, weight)
            at = taps.backward(logits, error) if deeper else {"logits": error}
            if at["logits"][..., part].shape != logits.shape:
                at["logits"] = at["logits"][..., part].clone()  # the rest is let go
            pieces.append((taps.read, at))
        read, at = (
            pieces[0]
            if len(pieces) == 1
            else ({name: torch.cat([each[name] for each in of]) for name in of[0]} for of in zip(*pieces, strict=True))
        )
        return Taps(read), at

    def _attention(
        self,
        attended: SourceAttention,
        weights: Mapping[str, Tensor],
        last: Sequence[Tensor],
        d: list[Tensor],
        i: int,
    ) -> Found:
        """Go with one batch through the layer whose attention is asked for, and add the gradient at what enters it."""
        _, taps = self._layer(attended.layer, weights, i, last[i])
        share = attended(taps.made["pattern"], self.queries[i]).sum()
        found, at_resid = self._back(attended.layer, i, share, taps, torch.ones_like(share))
        d.append(at_resid)
        return without_zeros(found)

    def _through(
        self,
        layer: int,
        weights: Mapping[str, Tensor],
        entering: Sequence[Tensor],
        kept: dict[tuple[int, int], Run],
        d: list[Tensor],
        i: int,
    ) -> Found:
        """Go back through a layer with one batch."""
        out, taps = kept.pop((layer, i), None) or self._layer(layer, weights, i, entering[i])
        found, d[i] = self._back(layer, i, out, taps, d[i])
        return without_zeros(found) if layer == len(self.model.blocks) - 1 else found

    def _of_embedding(self, i: int, d: Tensor, readout: Sequence[Terms]) -> Found:
        """Return what one batch adds to the gradients of what comes before the layers; of a tied embedding, with what
        the readout adds."""
        out, taps = self._embed(i)
        at = taps.backward(out, d)
        embed = Terms.of_tokens(self.queries[i].tokens.to(out.device), at["embed"], real=self.tokens[i])
        found: dict[Weight, list[Terms]] = {("embed.W_E", 0): [*readout, embed]}
        if self.position.learns:
            found["pos_embed.", 0] = [Terms.of_vectors(self.position.vectors(i, at.get("pos_embed")))]
        return found

    def _back(
        self, layer: int, i: int, out: Tensor, taps: Taps, d: Tensor
    ) -> tuple[dict[Weight, list[Terms]], Float[Tensor, "query pos d_model"]]:
        """Return what one batch adds to the gradients of a layer, and the gradient at what enters it; what the position
        scheme learns is kept for the end."""
        at = taps.backward(out, d)
        self.position.add(i, taps, at)
        return self._of_layer(layer, i, taps, at), at["resid"]

    def _forward(self, n_layers: int) -> tuple[list[list[Tensor]], dict[tuple[int, int], Run]]:
        """Return the residual streams that enter each of the first layers and what comes after them, and as many whole
        runs of layers as :data:`KEPT` allows."""
        kept: dict[tuple[int, int], Run] = {}
        with torch.no_grad():
            streams, room = [[self._embed(i)[0] for i in range(len(self.queries))]], KEPT
        for layer in range(n_layers):
            weights = self._weights(f"blocks.{layer}.")
            streams.append([])
            for i, resid in enumerate(streams[layer]):
                room -= activations(self.model.cfg, *resid.shape[:2])
                with torch.set_grad_enabled(room >= 0):
                    run = self._layer(layer, weights, i, resid)
                streams[-1].append(run[0].detach())
                if room >= 0:
                    kept[layer, i] = run
        return streams, kept

    def _weights(self, *prefixes: str) -> dict[str, Tensor]:
        """Return the parameters of a part of the model, in float32 at least and outside of every graph."""
        chosen = {name: parameter for name, parameter in self.parameters.items() if name.startswith(prefixes)}
        return {name: precise(parameter.detach()) for name, parameter in chosen.items()}

    def _run(self, weights: Mapping[str, Tensor], resid: Tensor, **asked: Any) -> Tensor:
        """Run a part of the model on a residual stream, which hooks may edit in place."""
        return functional_call(self.model, dict(weights), (resid.clone(),), asked, tie_weights=False)

    # ---- one batch's run through a part of the model

    def _embed(self, i: int) -> Run:
        batch = self.queries[i]
        with Taps() as taps:
            taps.start("embed", self.model.hook_embed)
            if hasattr(self.model, "hook_pos_embed"):
                taps.start("pos_embed", self.model.hook_pos_embed)
            return self.model(batch.tokens, attention_mask=batch.attention_mask, stop_at_layer=0), taps

    def _layer(self, layer: int, weights: Mapping[str, Tensor], i: int, resid: Tensor) -> Run:
        block = self.model.blocks[layer]
        attn, mlp = block.attn, block.mlp
        with Taps() as taps:
            given = taps.leaf("resid", resid.detach())
            taps.replace(block, lambda x, _, allowed: (x, self.position.asked(taps), allowed))
            taps.norm("ln1", block.ln1)
            taps.inputs(("q_in", "k_in", "v_in"), attn)
            for name, point in (("q", attn.hook_q), ("k", attn.hook_k), ("v", attn.hook_v)):
                taps.before(name, point)
            for name in self.content_norms:
                taps.norm(name, getattr(attn, name))
            if isinstance(self.loss, SourceAttention) and layer == self.loss.layer:
                taps.before("pattern", attn.hook_pattern)
            taps.after("z", attn.hook_z)
            if in_use(attn.hook_result):
                taps.before("result", attn.hook_result)
            taps.before("attn_out", block.hook_attn_out)
            if mlp is not None:
                taps.norm("ln2", block.ln2)
                taps.inputs(("mlp_in",), mlp)
                taps.before("mlp_out", block.hook_mlp_out)
            if isinstance(mlp, MLP):
                taps.mlp("", mlp)
            elif mlp is not None:
                taps.experts(mlp)
            mask = self.queries[i].attention_mask
            return self._run(weights, given, attention_mask=mask, start_at_layer=layer, stop_at_layer=layer + 1), taps

    def _read(self, weights: Mapping[str, Tensor], batch: QueryBatch, resid: Tensor) -> Run:
        """Compute the logits at readout positions."""

        def rows(x: Tensor) -> tuple[Tensor]:
            taps.read["rows"] = batch.at_readout(x)
            return (taps.read["rows"],)

        with Taps() as taps:
            given = taps.leaf("resid", resid.detach())
            taps.norm("ln_final", self.model.ln_final)
            taps.replace(self.model.unembed, rows)
            logits = self._run(weights, given, start_at_layer=len(self.model.blocks))
            return taps.leaf("logits", logits), taps

    # ---- what gradients are made of

    def _of_map(
        self, weight: str, bias: str, x: Tensor, d: Tensor, real: Real | None = None
    ) -> dict[Weight, list[Terms]]:
        found = {(weight, head): [terms] for head, terms in enumerate(Terms.of_map(x, d, real))}
        if bias in self.parameters:
            found[bias, 0] = [Terms.of_vectors(d.sum(1))]
        return found

    def _of_norm(self, path: str, taps: Taps, at: Mapping[str, Tensor]) -> dict[Weight, list[Terms]]:
        name = path.rsplit(".", 1)[-1]
        calls = [call for call in at if call.startswith(f"{name} ")]
        found = {}
        for leaf, factors in (("w", taps.read), ("b", dict.fromkeys(calls, 1.0))):
            if f"{path}.{leaf}" in self.parameters and calls:
                by_call = [(factors[call] * at[call]).flatten(1, -2).sum(1) for call in calls]
                found[f"{path}.{leaf}", 0] = [Terms.of_vectors(torch.stack(by_call).sum(0))]
        return found

    @torch.no_grad()
    def _of_layer(self, layer: int, i: int, taps: Taps, at: Mapping[str, Tensor]) -> dict[Weight, list[Terms]]:
        path = f"blocks.{layer}"
        maps = [("attn", "Q", "q_in", "q"), ("attn", "K", "k_in", "k"), ("attn", "V", "v_in", "v")]
        maps += [("attn", "O", "z", "attn_out")] if "result" not in at else []
        for module, prefix in (("mlp", ""), ("mlp.shared", "shared.")):
            pre, linear = f"{prefix}pre", f"{prefix}pre_linear"
            maps += [(module, "gate", "mlp_in", pre), (module, "in", "mlp_in", linear)] if linear in at else []
            maps += [(module, "in", "mlp_in", pre)] if pre in at and linear not in at else []
            maps += [(module, "out", f"{prefix}post", "mlp_out")] if pre in at else []
        maps += [("mlp", "router", "mlp_in", "experts.router")] if "experts.router" in at else []
        found, real = dict[Weight, list[Terms]](), self.tokens[i]
        for module, leaf, x, d in maps:
            found |= self._of_map(f"{path}.{module}.W_{leaf}", f"{path}.{module}.b_{leaf}", taps.read[x], at[d], real)
        if "result" in at:  # heads by themselves, each with what a hook makes of it, and one bias after all
            found |= self._of_map(f"{path}.attn.W_O", "", taps.read["z"], at["result"], real)
            if f"{path}.attn.b_O" in self.parameters:
                found[f"{path}.attn.b_O", 0] = [Terms.of_vectors(at["attn_out"].sum(1))]
        if "experts.router" in at:
            found |= self._of_experts(f"{path}.mlp", taps, at)
        for norm in ("ln1", "ln2", *(f"attn.{name}" for name in self.content_norms)):
            found |= self._of_norm(f"{path}.{norm}", taps, at)
        return found

    def _of_experts(self, path: str, taps: Taps, at: Mapping[str, Tensor]) -> dict[Weight, list[Terms]]:
        """Return what each expert's tokens add to its gradients; the others add 0."""
        x = taps.read["mlp_in"]
        expert, token = MoE.rows(taps.read["experts.weights"])
        (n_query, n_pos, _), n_experts = x.shape, taps.read["experts.weights"].shape[-1]
        rows = torch.bincount(expert * n_query + token // n_pos, minlength=n_experts * n_query)
        by_query = rows.view(n_experts, n_query).tolist()
        counts, found = [sum(of_expert) for of_expert in by_query], dict[Weight, list[Terms]]()

        def of_tokens(rows: Tensor, tokens: Tensor) -> Tensor:
            return x.new_zeros(n_query * n_pos, rows.shape[1]).index_copy(0, tokens, rows).view(n_query, n_pos, -1)

        parts = [at[f"experts.{name}"].split(counts) for name in ("pre", "pre_linear", "out")]
        for index, (tokens, post, pre, linear, out) in enumerate(
            zip(token.split(counts), taps.read["experts.post"].split(counts), *parts, strict=True)
        ):
            if len(tokens):
                real = Real(tokens, by_query[index])
                maps = (("gate", x, pre), ("in", x, linear), ("out", of_tokens(post, tokens), out))
                for leaf, read, d in maps:
                    found[f"{path}.W_{leaf}", index] = Terms.of_map(read, of_tokens(d, tokens), real)
        return found

    def _parts_of_vocabulary(self) -> list[slice]:
        """Divide the vocabulary so that the gradients that are held at logits in a part are :data:`ERRORS` at most.
        A tied unembedding stays whole: its gradients wait for the embedding's."""
        vocabulary = self.model.W_U.shape[1]
        if self.model.cfg.tie_word_embeddings:
            return [slice(vocabulary)]
        of_each = [batch.readout.numel() for batch in self.queries]
        rows = sum(of_each[: self.n_held]) + max(of_each[self.n_held :], default=0)
        width = max(1, ERRORS // rows)
        return [slice(start, start + width) for start in range(0, vocabulary, width)]

    @torch.no_grad()
    def _of_unembedding(self, i: int, taps: Taps, at: Mapping[str, Tensor]) -> dict[Weight, list[Terms]]:
        """Return what one batch adds to the gradients of the unembedding, in a part of the vocabulary."""
        rows, error, batch = taps.read["rows"], at["logits"].to(taps.read["rows"].device), self.queries[i]
        real = self.answered[i]
        if self.model.cfg.tie_word_embeddings:  # W_E has tokens first
            found = {("embed.W_E", 0): [Terms((error, rows), batch.readout, real)]}
        else:
            found = self._of_map("unembed.W_U", "unembed.b_U", rows, error, real)
            found["unembed.W_U", 0] = [replace(terms, at=batch.readout) for terms in found["unembed.W_U", 0]]
        return found


class _Question(nn.Module):
    """What a position scheme is asked, under other parameters."""

    def __init__(self, scheme: PositionScheme) -> None:
        super().__init__()
        self.scheme = scheme

    def forward(self, question: str, *args: Tensor | str) -> Tensor | None:
        return getattr(self.scheme, question)(*args)


class PositionGradients:
    """Every query's gradient of what a position scheme learns, itself: it is small."""

    def __init__(self, scheme: PositionScheme, queries: Sequence[QueryBatch]) -> None:
        self.scheme, self.queries = scheme, queries
        self.parameters = {
            f"scheme.{name}": precise(parameter.detach()).requires_grad_()
            for name, parameter in scheme.named_parameters()
        }
        self._bias: dict[int, Tensor] = {}
        self._rotated: dict[int, Tensor] = {}

    @property
    def learns(self) -> bool:
        return bool(self.parameters)

    def asked(self, taps: Taps) -> Any:
        """Return the scheme as one run of a layer asks it: each query of the batch gets a bias of its own, and what is
        rotated is kept."""
        return _Asked(self.scheme, taps) if self.learns else self.scheme

    def add(self, i: int, taps: Taps, at: Mapping[str, Tensor]) -> None:
        """Take the gradients from one layer."""
        if "bias" in at:
            self._bias[i] = at["bias"] + self._bias.get(i, torch.zeros_like(at["bias"])).to(at["bias"].device)
        for name in (name for name in at if name.startswith("rotated ")):
            x, d = taps.read[name].detach(), at[name]
            positions, which = torch.arange(x.shape[1], device=x.device), name.removeprefix("rotated ")
            vectors = torch.stack([self._vjp("rotate", (x[a], positions, which), d[a]) for a in range(len(x))])
            self._rotated[i] = vectors + self._rotated.get(i, 0)

    def vectors(self, i: int, at_embedding: Float[Tensor, "query pos d_model"] | None) -> Float[Tensor, "query size"]:
        """Return the gradients of a batch's queries."""
        batch = self.queries[i]
        n_query, n_pos = batch.tokens.shape
        vectors = torch.stack([self._vjp("none", (), None)] * n_query) + self._rotated.pop(i, 0)
        positions = torch.arange(n_pos, device=vectors.device)
        if i in self._bias:
            d = self._bias.pop(i)
            vectors = vectors + torch.stack([self._vjp("bias", (positions, positions), of_query) for of_query in d])
        if at_embedding is not None:
            d = at_embedding
            if batch.attention_mask is not None:
                at = places(batch.attention_mask).to(d.device)
                d = torch.zeros_like(d).scatter_add_(1, at[..., None].expand_as(d), d)
            vectors = vectors + torch.stack([self._vjp("embed", (positions,), of_query) for of_query in d])
        return vectors

    def _vjp(self, question: str, args: tuple[Tensor | str, ...], d: Tensor | None) -> Float[Tensor, "size"]:
        """Return the gradient of one query through one answer; zeros where it asks no parameter."""
        parameters = list(self.parameters.values())
        with torch.enable_grad():
            y = None if d is None else functional_call(_Question(self.scheme), self.parameters, (question, *args))
        if y is None or d is None or not y.requires_grad:
            return torch.zeros_like(torch.cat([parameter.flatten() for parameter in parameters])).detach()
        grads = torch.autograd.grad(y, parameters, d.to(y), allow_unused=True, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in grads])


class _Asked(PositionScheme):
    """A position scheme in one run of a layer."""

    def __init__(self, scheme: PositionScheme, taps: Taps) -> None:
        super().__init__(scheme.cfg)
        self.scheme, self.taps = scheme, taps

    def rotate(
        self, x: Float[Tensor, "*batch pos head d_head"], positions: Int[Tensor, "pos"], which: Which
    ) -> Float[Tensor, "*batch pos head d_head"]:
        name = f"rotated {which}"
        self.taps.read[name] = x
        return self.taps.leaf(name, self.scheme.rotate(x, positions, which))

    def bias(
        self, query_pos: Int[Tensor, "query_pos"], key_pos: Int[Tensor, "key_pos"]
    ) -> Float[Tensor, "query head query_pos key_pos"] | None:
        bias = self.scheme.bias(query_pos, key_pos)
        if bias is None:
            return None
        n_query = len(self.taps.made["resid"])
        return self.taps.leaf("bias", precise(bias.detach()).expand(n_query, *bias.shape).clone())
