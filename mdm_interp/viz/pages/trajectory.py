"""Denoising: its loop step by step, and where the readout of each filled position looked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mdm_interp.config import ModelConfig
from mdm_interp.data.queries import Query
from mdm_interp.errors import UserError
from mdm_interp.inference.denoising import FillOrder, Trajectory, denoise
from mdm_interp.measures.capture import LayerView, capture
from mdm_interp.viz.pages.attention import MAX_ENTRIES, predictions, shortened
from mdm_interp.viz.pages.code import prompt_code
from mdm_interp.viz.pages.page import Page, packed, places
from mdm_interp.viz.pages.subject import Prompt, Subject
from mdm_interp.viz.words import counted


@torch.no_grad()
def trajectory(
    model: Any,
    prompt: str | Sequence[int] | Tensor | Query,
    *,
    order: FillOrder = "confidence",
    steps: int | None = None,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    source: str | None = None,
) -> Page:
    """Return which mask was filled when, with what, how certainly, and what its prediction was read from.

    Args:
        model: A HookedTransformer or TransformerBridge, or a Run, of which the last checkpoint is taken.
        prompt: Text with `[M]` for each mask token, token ids, or a Query, whose source and answer are marked.
        order: Which masks come first; `random` draws the same order every time.
        steps: In how many to fill the masks, an equal share in each; default: one mask in each.
        layers, heads: Which to show; default: all.
        source: Words of the text to mark as the source.

    Raises:
        UserError: the model is causal or has no mask token, the prompt cannot be read or has no masks, `steps` is below
            1, a layer or head is not there, or the choice has more than
            :data:`~mdm_interp.viz.pages.attention.MAX_ENTRIES` entries.
    """
    subject = Subject.of(model)
    cfg, given = subject.model.cfg, subject.prompt(prompt, source)
    of_layers, of_heads = places(cfg.n_layers, layers, "layers"), places(cfg.n_heads, heads, "heads")
    n_masks, n = len(given.masks), len(given.tokens)
    if len(of_layers) * len(of_heads) * n_masks * n > MAX_ENTRIES:
        raise UserError(
            f"prompt: {len(of_layers)} layers x {len(of_heads)} heads x {n_masks} masks x {n} tokens are more than the "
            f"{MAX_ENTRIES:,} entries a page holds; choose some by layers or heads"
        )
    watched = _WatchedBlanks(subject, of_layers, of_heads)
    done = denoise(
        watched,
        torch.tensor([given.tokens], device=cfg.device),
        steps=(n_masks or 1) if steps is None else steps,
        order=order,
        generator=torch.Generator(cfg.device).manual_seed(0) if order == "random" else None,
    )
    if not given.masks:
        raise UserError("prompt: has no mask to fill; write [M] where one is, or give the mask's token id")
    data = given.marks() | {
        "layers": of_layers,
        "heads": of_heads,
        "filled": watched.filled(given, done),
        "favourites": watched.favourites,
    }
    title = subject.heading(f"Denoising: {shortened(given)}")
    about = f"{_told(subject, done, data['filled'], order)} {watched.looked(given)}"
    return Page(
        "trajectory",
        title,
        about,
        ("plotly",),
        data,
        subject.saving(
            "viz.trajectory",
            prompt_code(prompt, given.tokens),
            order=order,
            steps=steps,
            layers=None if layers is None else of_layers,
            heads=None if heads is None else of_heads,
            source=source,
        ),
    )


@dataclass
class _WatchedBlanks:
    """A model that keeps what it predicts at the blanks, and what it reads there.

    A position is blank for the last time in the pass that fills it, so later passes overwrite what earlier ones kept.
    """

    subject: Subject
    layers: Sequence[int]
    heads: Sequence[int]
    favourites: list[dict[str, Any]] = field(default_factory=list)
    """Of each pass, every blank's likeliest token and its probability."""
    top: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By position, the likeliest tokens."""
    read: dict[int, Float[Tensor, "layer head token"]] = field(default_factory=dict)
    """By position, the readout's attention."""

    @property
    def cfg(self) -> ModelConfig:
        return self.subject.model.cfg

    def __call__(self, tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "1 pos d_vocab"]:
        state = self.subject.prompt(tokens)

        def reduce(view: LayerView) -> Tensor | None:
            return view.pattern[0][:, self.heads].cpu() if view.layer in self.layers else None

        batch = state.batch(state.readout, self.cfg.device)
        logits, patterns = capture(self.subject.model, batch, reduce, all_logits=True)
        read = torch.stack([pattern for pattern in patterns if pattern is not None], dim=1)
        predicted = predictions(self.subject, state, logits[0][list(state.readout)])
        self.top |= dict(zip(state.masks, predicted, strict=True))
        self.read |= {position: rows.clone() for position, rows in zip(state.masks, read, strict=True)}
        self.favourites.append(
            {
                "positions": list(state.masks),
                "tokens": [at["tokens"][0] for at in predicted],
                "probabilities": [rounded(at["probabilities"][0]) for at in predicted],
            }
        )
        return logits

    def filled(self, given: Prompt, done: Trajectory) -> list[dict[str, Any]]:
        """Return what was filled, in order."""
        tokens, steps, certain = done.tokens[-1, 0].tolist(), done.filled_at[0].tolist(), done.probability[0].tolist()
        return [
            {
                "position": position,
                "readout": self.top[position]["readout"],
                "step": steps[position],
                "token": self.subject.names([tokens[position]])[0],
                "probability": rounded(certain[position]),
                "top": self.top[position]["tokens"],
                "probabilities": list(map(rounded, self.top[position]["probabilities"])),
                "read": packed(self.read[position]),
            }
            for position in sorted(given.masks, key=lambda position: (steps[position], position))
        ]

    def looked(self, given: Prompt) -> str:
        """Return where the readouts looked, in words."""
        known = range(*given.source) if given.source else set(range(len(given.tokens))) - set(given.masks)
        share = torch.stack([read[..., list(known)].sum(-1).mean() for read in self.read.values()]).mean()
        what = "source" if given.source else "tokens given from the start"
        return f"On average over steps and heads, {100 * float(share):.3g}% of attention went to the {what}."


def rounded(value: float) -> float:
    """Round to 6 significant digits."""
    return float(f"{value:.6g}")


def _told(subject: Subject, done: Trajectory, filled: Sequence[dict[str, Any]], order: FillOrder) -> str:
    """Return what happened, in words."""
    how = {"confidence": "the most certain first", "left_to_right": "from the left", "random": "in random order"}[order]
    least = min(filled, key=lambda one: one["probability"])
    final = shortened(subject.prompt(done.tokens[-1]), 400)

    def named(one: dict[str, Any]) -> str:
        return f"“{one['token'].strip()}” at position {one['position']} (probability {one['probability']:.3g})"

    if len(filled) == 1:
        return f"The mask was filled with {named(filled[0])}: “{final}”."
    return (
        f"{len(filled)} masks were filled in {counted(filled[-1]['step'], 'step')}, {how}. The first to be filled was "
        f"{named(filled[0])}, the last {named(filled[-1])}; the least certain was {named(least)}. The "
        f"result: “{final}”."
    )
