"""Position schemes: how a model knows where a token is.

Every scheme answers the same three questions, and most answer only one of them:

    embed   what position adds to the residual stream (learned, sinusoidal)
    rotate  what position does to queries and to keys (rope)
    bias    what position adds to attention scores (alibi, t5_bias)

A scheme is *relative* when a score depends on positions through `key_pos - query_pos` only and nothing of
position reaches the values; what a head writes about a token is then the same wherever the token is.

:func:`register_scheme` gives a class of one's own a name, by which configs, runs and checkpoints know it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mdm_interp.config import SCHEMES, ModelConfig, Scheme
from mdm_interp.errors import UserError, shorten
from mdm_interp.parallel import import_in_workers

Which = Literal["q", "k"]
"""Queries or keys."""


class PositionScheme(nn.Module):
    """No position at all (`none`), and the base of the others."""

    relative: ClassVar[bool] = True
    W_pos: Tensor
    """Absolute schemes only."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._copies: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}
        """Of constants, by name and device: as they were when they were copied, and there."""

    def _constant(self, name: str, device: torch.device) -> Tensor:
        """Return one of the scheme's constants on a device. It is copied there once, not for every layer of every pass,
        as each copy makes the CPU wait for a GPU."""
        constant = getattr(self, name)
        if constant.device == device:
            return constant
        copied, copy = self._copies.get((name, device), (constant, None))
        if copy is None or copied.dtype != constant.dtype or not torch.equal(copied, constant):
            copied, copy = constant.clone(), constant.to(device)
            self._copies[name, device] = copied, copy
        return copy

    def answers(self, question: Literal["embed", "rotate", "bias"]) -> bool:
        """Tell whether this scheme has an answer of its own, other than that position changes nothing."""
        return getattr(getattr(self, question), "__func__", None) is not getattr(PositionScheme, question)

    def embed(self, positions: Int[Tensor, "pos"]) -> Float[Tensor, "pos d_model"] | None:
        """Return what is added to the token embedding at each position; None adds nothing."""
        return None

    def rotate(
        self, x: Float[Tensor, "*batch pos head d_head"], positions: Int[Tensor, "pos"], which: Which
    ) -> Float[Tensor, "*batch pos head d_head"]:
        """Return queries (`which` is "q") or keys ("k") as they enter the dot product.

        There are `cfg.n_heads` heads of queries and `cfg.kv_heads` of keys: query head h reads key head
        `h // (n_heads / kv_heads)`.
        """
        return x

    def bias(
        self, query_pos: Int[Tensor, "query_pos"], key_pos: Int[Tensor, "key_pos"]
    ) -> Float[Tensor, "head query_pos key_pos"] | None:
        """Return what is added to the scaled scores; None adds nothing."""
        return None


class Rope(PositionScheme):
    """Rotary embedding (Su et al., arXiv 2104.09864): plane p of queries and keys turns by `position * theta_p`,
    theta_p = base^(-2p / rotary_dim), or as `cfg.rotary_scaling` stretches that.

    Sign: at offset `delta = key_pos - query_pos` the score is
    `Re sum_p conj(q_p) k_p exp(i delta theta_p) score_scale`, with the planes as complex numbers (:meth:`planes`).
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        assert cfg.rotary_dim is not None
        exponent = torch.arange(0, cfg.rotary_dim, 2, dtype=torch.float64) / cfg.rotary_dim
        self.theta: Float[Tensor, "plane"] = _stretched(cfg.rotary_base**-exponent, cfg)
        """Radians per position, in float64. Not a buffer: `model.to(dtype)` would round it."""

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rotary_dim = self.cfg.rotary_dim
        rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
        if self.cfg.rotary_adjacent_pairs:
            return rotated[..., 0::2], rotated[..., 1::2], passed
        first, second = rotated.chunk(2, dim=-1)
        return first, second, passed

    def planes(self, x: Float[Tensor, "*batch d_head"]) -> Tensor:
        """Return the rotating planes of `x` as complex numbers, `[*batch rotary_dim/2]`."""
        first, second, _ = self._split(x)
        return torch.complex(first, second)

    def rotate(
        self, x: Float[Tensor, "*batch pos head d_head"], positions: Int[Tensor, "pos"], which: Which
    ) -> Float[Tensor, "*batch pos head d_head"]:
        # Angles in float64, then at least float32: at half precision far positions would share an angle.
        angle = positions[:, None, None] * self._constant("theta", positions.device)
        precision = torch.promote_types(x.dtype, torch.float32)
        cos, sin = angle.cos().to(precision), angle.sin().to(precision)
        first, second, passed = self._split(x)
        turned = (first * cos - second * sin, first * sin + second * cos)
        if self.cfg.rotary_adjacent_pairs:
            rotated = torch.stack(turned, dim=-1).flatten(-2)
        else:
            rotated = torch.cat(turned, dim=-1)
        return torch.cat([rotated.to(x.dtype), passed], dim=-1) if passed.shape[-1] else rotated.to(x.dtype)


def _stretched(theta: Float[Tensor, "plane"], cfg: ModelConfig) -> Float[Tensor, "plane"]:
    """Stretch RoPE's angles: each becomes `theta ((1 - kept) / factor + kept)`.

    Under linear scaling nothing is kept. Under llama3, with `n_p = original length * theta_p / (2 pi)` turns over the
    original length, `kept` rises from 0 at `low_freq_factor` turns to 1 at `high_freq_factor`, linearly in `n_p`. Under
    yarn it falls from 1 to 0 linearly in p, between the planes that turn `beta_fast` and `beta_slow` times.

    Source: transformers, `modeling_rope_utils`; arXiv 2309.00071, section 3.
    """
    scaling = cfg.rotary_scaling
    if scaling is None:
        return theta
    kept = torch.zeros_like(theta)
    if scaling.rope_type != "linear":
        assert scaling.original_max_position_embeddings is not None and cfg.rotary_dim is not None
        length = scaling.original_max_position_embeddings
        if scaling.rope_type == "llama3":
            assert scaling.low_freq_factor is not None and scaling.high_freq_factor is not None
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = ((length * theta / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        else:
            assert scaling.beta_fast is not None and scaling.beta_slow is not None
            first, last = (
                cfg.rotary_dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(cfg.rotary_base))
                for turns in (scaling.beta_fast, scaling.beta_slow)
            )
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, cfg.rotary_dim - 1)
            plane = torch.arange(len(theta), dtype=theta.dtype)
            kept = 1 - ((plane - first) / (last - first or 1e-3)).clamp(0, 1)
    return theta * ((1 - kept) / scaling.factor + kept)


class Alibi(PositionScheme):
    """Linear bias (Press et al., arXiv 2108.12409): `-slope_h |key_pos - query_pos|`, the same to both sides."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.slopes: Float[Tensor, "head"] = 2 ** (-8 * torch.arange(1, cfg.n_heads + 1) / cfg.n_heads)

    def bias(
        self, query_pos: Int[Tensor, "query_pos"], key_pos: Int[Tensor, "key_pos"]
    ) -> Float[Tensor, "head query_pos key_pos"]:
        distance = (key_pos[None, :] - query_pos[:, None]).abs()
        return -self._constant("slopes", distance.device)[:, None, None] * distance


class T5Bias(PositionScheme):
    """Learned bias per head and bucket of `key_pos - query_pos` (Raffel et al., arXiv 1910.10683, section 2.1).

    A bidirectional model keeps half of the buckets for each side. One table serves all layers, as in T5.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.table = nn.Parameter(torch.empty(cfg.relative_attention_num_buckets, cfg.n_heads))
        # Computed here, for all devices: where two buckets meet, the rounding of their logarithms would decide.
        self.buckets: Int[Tensor, "distance"] = self._buckets(torch.arange(cfg.relative_attention_max_distance + 1))
        """Which of one side's rows each distance reads; those further away read what the last does."""

    def bucket(self, offset: Int[Tensor, "*offsets"]) -> Int[Tensor, "*offsets"]:
        """Return which row of the table an offset reads: exact while near, logarithmic further away, one row from
        `relative_attention_max_distance` on."""
        buckets = self._constant("buckets", offset.device)
        if self.cfg.is_causal:
            first, distance = torch.zeros_like(offset), (-offset).clamp(min=0)
        else:
            first, distance = (offset > 0).long() * (self.cfg.relative_attention_num_buckets // 2), offset.abs()
        return first + buckets[distance.clamp(max=len(buckets) - 1)]

    def _buckets(self, distance: Int[Tensor, "distance"]) -> Int[Tensor, "distance"]:
        buckets = self.cfg.relative_attention_num_buckets // (1 if self.cfg.is_causal else 2)
        exact = buckets // 2
        span = math.log(self.cfg.relative_attention_max_distance / exact)
        far = exact + (torch.log(distance.clamp(min=1) / exact) / span * (buckets - exact)).long()
        return torch.where(distance < exact, distance, far.clamp(max=buckets - 1))

    def bias(
        self, query_pos: Int[Tensor, "query_pos"], key_pos: Int[Tensor, "key_pos"]
    ) -> Float[Tensor, "head query_pos key_pos"]:
        # Many offsets read one row: at half precision its gradient would be their sum with every addition rounded.
        table = self.table.to(torch.promote_types(self.table.dtype, torch.float32))
        return table[self.bucket(key_pos[None, :] - query_pos[:, None])].permute(2, 0, 1)


class Learned(PositionScheme):
    """A trained vector per absolute position, added to the embedding; it reaches queries, keys and values alike."""

    relative = False

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.W_pos = nn.Parameter(torch.empty(cfg.n_ctx, cfg.d_model))

    def embed(self, positions: Int[Tensor, "pos"]) -> Float[Tensor, "pos d_model"]:
        return self.W_pos[positions]


class Sinusoidal(PositionScheme):
    """Fixed sines and cosines per absolute position over sqrt(d_model) (Vaswani et al., arXiv 1706.03762, section 3.5).

    The source multiplies the token embedding by sqrt(d_model) instead (section 3.4). The norm before each layer removes
    that common factor, and the token embedding is then as large here as under every other scheme.
    """

    relative = False

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        column = torch.arange(cfg.d_model, dtype=torch.float64)
        rate = 10_000 ** (-2 * (column // 2) / cfg.d_model)
        angle = torch.arange(cfg.n_ctx, dtype=torch.float64)[:, None] * rate
        table = torch.where(column % 2 == 0, angle.sin(), angle.cos())
        self.register_buffer("W_pos", (table * cfg.d_model**-0.5).float(), persistent=False)

    def embed(self, positions: Int[Tensor, "pos"]) -> Float[Tensor, "pos d_model"]:
        return self.W_pos[positions]


# ---- schemes by name


class _ByName(dict[str, type[PositionScheme]]):
    def __missing__(self, name: str) -> type[PositionScheme]:
        raise UserError(
            f"position: {shorten(repr(name), 60)} is registered by no module that this process imports; call "
            "register_scheme in a module (what a notebook defines, its worker processes do not know)"
        )


POSITION_SCHEMES: dict[str, type[PositionScheme]] = _ByName(
    {
        "none": PositionScheme,
        "rope": Rope,
        "alibi": Alibi,
        "t5_bias": T5Bias,
        "learned": Learned,
        "sinusoidal": Sinusoidal,
    }
)
"""The class of each position scheme. Of a name that is not here, no file brings the class: none holds code."""

OWN = get_args(Scheme)
"""Names of the package's own schemes."""

SchemeT = TypeVar("SchemeT", bound=type[PositionScheme])


def register_scheme(name: str) -> Callable[[SchemeT], SchemeT]:
    """Register a class as the position scheme of a name: a decorator.

        @register_scheme("xpos")
        class XPos(Rope): ...

        ModelConfig(position="xpos", ...)

    Models of this config ask the class, and train what it learns; runs and checkpoints keep the name, and whoever reads
    them registers the class first. Worker processes import the module that defines it. Defining the same class again,
    as a notebook does, replaces it. A class derived from :class:`Rope` has RoPE's settings (`rotary_*`).

    Raises:
        UserError: the name is none, or another class has it; or the class is no position scheme.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
        raise UserError(
            f"name: {shorten(repr(name), 60)} is no name of a position scheme; use up to 40 small letters, digits and "
            "underscores, as in @register_scheme('xpos')"
        )

    def register(scheme: SchemeT) -> SchemeT:
        if not (isinstance(scheme, type) and issubclass(scheme, PositionScheme)):
            raise UserError(
                f"scheme: {shorten(repr(scheme), 60)} is no class derived from PositionScheme; derive it from that, or "
                "from Rope"
            )
        known, full_name = POSITION_SCHEMES.get(name), f"{scheme.__module__}.{scheme.__qualname__}"
        holder = "" if known is None else f"{known.__module__}.{known.__qualname__}"
        if name in OWN or holder not in ("", full_name):
            raise UserError(f"name: {name!r} is {holder}'s already; give {full_name} another")
        POSITION_SCHEMES[name], SCHEMES[name] = scheme, issubclass(scheme, Rope)
        import_in_workers(scheme.__module__)
        return scheme

    return register


def rotates(cfg: ModelConfig) -> bool:
    """Tell whether models of a config have their scheme rotate queries and keys."""
    return POSITION_SCHEMES[cfg.position].rotate is not PositionScheme.rotate


# ---- one class told from another of its name

SAMPLE = "position_sample"
"""What files call :func:`sample_answers`."""


@torch.no_grad()
def sample_answers(cfg: ModelConfig) -> list[float]:
    """Compute four numbers from what a registered scheme answers at the first positions, whatever it has learned: of
    embeddings, queries, keys and bias. Of the package's own schemes there are none.

    Raises:
        UserError: no scheme of this name is registered.
    """
    if cfg.position in OWN:
        return []
    scheme = POSITION_SCHEMES[cfg.position](cfg).double()
    for stored in scheme.state_dict().values():  # what files bring back
        stored.copy_(1.5 + 0.5 * _waves(*stored.shape))
    positions = torch.arange(min(cfg.n_ctx, 16))
    q, k = (_waves(1, len(positions), n_heads, cfg.head_dim) for n_heads in (cfg.n_heads, cfg.kv_heads))
    answers = (
        scheme.embed(positions),
        scheme.rotate(q, positions, "q"),
        scheme.rotate(k, positions, "k"),
        scheme.bias(positions, positions),
    )
    finite = [None if answer is None else answer.double().nan_to_num(0.0, 1e3, -1e3) for answer in answers]
    return [0.0 if answer is None else float((answer * _waves(*answer.shape)).sum()) for answer in finite]


def _waves(*shape: int) -> Float[Tensor, "..."]:
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).sin().view(shape)


def check_answers(cfg: ModelConfig, sample: Any) -> None:
    """Check that a model of this config was made with the class that is registered now. No sample says nothing.

    Args:
        sample: What :func:`sample_answers` was then.

    Raises:
        UserError: the class registered under that name now answers otherwise.
    """
    here = sample_answers(cfg) if sample else []
    alike = isinstance(sample, list) and len(sample) == len(here) and all(map(_close, sample, here))
    if sample and not alike:
        raise UserError(
            f"position: the scheme that is registered as {cfg.position!r} is not the one that the model was made with; "
            "register that one, and a changed one under a name of its own"
        )


def _close(one: Any, other: float) -> bool:
    """Tell whether numbers are equal but for the rounding of a scheme that computes in float32."""
    return isinstance(one, float) and abs(one - other) <= 1e-4 + 1e-5 * abs(other)
