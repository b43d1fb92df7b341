"""Position schemes as users write them, and a registry that forgets them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm_interp import parallel
from mdm_interp.config import SCHEMES, ModelConfig
from mdm_interp.models.positions import POSITION_SCHEMES, PositionScheme, Rope, Which, register_scheme


class XPos(Rope):
    """Scales each plane of queries by zeta^(position / span) and of keys by zeta^(-position / span), with zeta =
    (2 plane / rotary_dim + gamma) / (1 + gamma), and learns gamma."""

    span = 8

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.gamma = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def zeta(self) -> Tensor:
        """`[plane]`"""
        share = torch.arange(len(self.theta), dtype=torch.float64, device=self.gamma.device) / len(self.theta)
        return (share + self.gamma) / (1 + self.gamma)

    def rotate(self, x: Tensor, positions: Tensor, which: Which) -> Tensor:
        scale = self.zeta() ** (positions[:, None, None] / (self.span if which == "q" else -self.span))
        scale = scale.repeat_interleave(2, -1) if self.cfg.rotary_adjacent_pairs else scale.repeat(1, 1, 2)
        scale = F.pad(scale, (0, x.shape[-1] - scale.shape[-1]), value=1.0)
        return super().rotate(x, positions, which) * scale.to(x)


class PerHead(Rope):
    """Turns each key head, and the queries that read it, at a speed of their own: once, twice, three times RoPE's."""

    def rotate(self, x: Tensor, positions: Tensor, which: Which) -> Tensor:
        heads = []
        for head, of_head in enumerate(x.split(1, dim=-2)):
            speed = 1 + head // (x.shape[-2] // self.cfg.kv_heads)
            heads.append(super().rotate(of_head, speed * positions, which))
        return torch.cat(heads, dim=-2)


class Window(PositionScheme):
    """A bias that forbids what is further away than `width`."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.width = 2

    def bias(self, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        far = (key_pos[None, :] - query_pos[:, None]).abs() > self.width
        return far.float().mul(-1e4).expand(self.cfg.n_heads, -1, -1)


def register_all() -> None:
    for name, scheme in (("xpos", XPos), ("per_head", PerHead), ("window", Window)):
        register_scheme(name)(scheme)


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """Forget what is registered while this lasts."""
    schemes, settings, modules = dict(POSITION_SCHEMES), dict(SCHEMES), set(parallel._needed)
    try:
        yield
    finally:
        for name in POSITION_SCHEMES.keys() - schemes.keys():
            del POSITION_SCHEMES[name], SCHEMES[name]
        POSITION_SCHEMES.update(schemes)
        SCHEMES.update(settings)
        parallel._needed.intersection_update(modules)
