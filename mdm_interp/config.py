"""Configurations: everything a model, a world of facts and a training run are made from.

Every config is frozen, refuses fields it does not know, is checked when it is built, and reads and
writes YAML. Two equal configs have the same :meth:`Config.digest`; that digest names the folder
of a run. Field names follow TransformerLens wherever it has the same thing.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StrictBool,
    ValidationError,
    model_validator,
)

from mdm_interp.errors import UserError, shorten
from mdm_interp.files import json_digest, read_text, write_text

Scheme = Literal["rope", "alibi", "t5_bias", "none", "learned", "sinusoidal"]
"""The package's own position schemes."""
SCHEMES: dict[str, bool] = {name: name == "rope" for name in get_args(Scheme)}
"""All position schemes by name, and whether they turn planes by RoPE's settings (`rotary_*`);
:func:`~mdm_interp.models.positions.register_scheme` adds others."""
Attention = Literal["bidirectional", "causal", "block_causal"]
Objective = Literal["any_order", "source_only", "target_only", "left_to_right", "causal"]
World = Literal["two_role", "relation_cycle", "symmetric_pool"]
Filler = Literal["none", "constant", "random"]
DemoWorld = Literal["memorised", "varied"]
TextFormat = Literal["llada", "dream", "qwen2"]

# Numbers are numbers, not texts or true and false, and small enough to be meant. 4.0 is a whole number, too.
Whole = Annotated[
    int,
    Field(strict=True),
    BeforeValidator(lambda given: int(given) if isinstance(given, float) and given.is_integer() else given),
]
Count = Annotated[Whole, Field(gt=0, le=10**9)]
Natural = Annotated[Whole, Field(ge=0, le=10**9)]
Size = Annotated[Whole, Field(gt=0, le=2**20)]
"""Of a dimension, or of a part of a world."""
Length = Annotated[Whole, Field(gt=0, le=2**24)]
"""Of a vocabulary or a sequence."""
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(strict=True, ge=-1e30, le=1e30)]
# Of floats a field adds no bound of a kind that its type has (pydantic keeps the type's), so each type has its own.
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
PositiveShare = Annotated[float, Field(strict=True, gt=0, le=1)]
Below1 = Annotated[float, Field(strict=True, ge=0, lt=1)]
NonNegative = Annotated[float, Field(strict=True, ge=0, le=1e30)]
MOST_TRAINED, MOST_AT_ONCE = 2**32, 2**27
"""Weights of a model that is trained here, and numbers that a layer of a step holds, half a GB in float32: each size
may be small enough, and their product fill any memory."""
Positive = Annotated[float, Field(strict=True, gt=0, le=1e30)]

DTYPES = ("float64", "float32", "bfloat16", "float16")
"""What weights can be in."""


def _read_dtype(dtype: Any) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"{name!r} is not one of {', '.join(DTYPES)}; choose one of them")
    return getattr(torch, name)


Dtype = Annotated[
    torch.dtype,
    BeforeValidator(_read_dtype),
    PlainSerializer(lambda dtype: str(dtype).removeprefix("torch."), return_type=str),
]
"""A torch.dtype, also given and always written as its name."""


def _read_scheme(name: Any) -> str:
    if not isinstance(name, str) or name not in SCHEMES:
        raise ValueError(
            f"{shorten(repr(name), 60)} is not one of {shorten(', '.join(map(repr, SCHEMES)), 250)}; correct it, or "
            "register it (register_scheme) in a module that this process imports"
        )
    return name


AnyScheme = Annotated[str, BeforeValidator(_read_scheme)]
"""The name of a position scheme of the package, or of one that is registered."""

ConfigT = TypeVar("ConfigT", bound="Config")


def one_line(error: ValidationError) -> str:
    """Return the first problem of a validation error as `field: what is wrong (got value)`, plus how many more."""
    first, *others = error.errors()
    # The rest of a location are pydantic's names for the members of a union.
    field = ".".join(str(part) for part in first["loc"] if str(part).isidentifier() or isinstance(part, int))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = "missing; add it"
    elif first["type"] == "extra_forbidden":
        message = "no such field; remove it or correct its spelling"
    elif field and not first["type"].startswith("value_error"):
        message = f"{message} (got {shorten(repr(first['input']), 100)})"
    more = f" (and {len(others)} more)" if others else ""
    return shorten((f"{shorten(field, 100)}: " if field else "") + message + more)


class _Loader(yaml.SafeLoader):
    """Reads YAML, and refuses fields that are given twice and files that hold too much. An alias counts as all that it
    stands for: a few lines of them can stand for billions of values. A number may be written 1e-3."""

    MOST = 100_000

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.n_values = 0
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        before, is_alias = self.n_values, self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        # An alias within what it stands for has no size yet.
        self.n_values += self.sizes.get(id(node), self.MOST) if is_alias else 1
        self.sizes.setdefault(id(node), self.n_values - before)
        if self.n_values > self.MOST:
            raise yaml.MarkedYAMLError(problem=f"it holds more than {self.MOST} values")
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if repeated := [key for key, n in keys.items() if n > 1]:
            raise yaml.MarkedYAMLError(problem=f"{repeated[0]!r} is there twice", problem_mark=node.start_mark)
        return node


# So short that no digest is taken for a number.
SCIENTIFIC = re.compile(r"[-+]?([0-9]{1,4}\.?|[0-9]{0,4}\.[0-9]{1,6})[eE][-+]?[0-9]{1,3}$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", SCIENTIFIC, list("-+.0123456789"))


class Config(BaseModel):
    """Base of all configs: frozen, strict about field names, hashable, YAML in and out."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse: configs are frozen.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{name}: a {type(self).__name__} is frozen; make another with model_copy (a model's switches are set by "
            "its methods, such as set_use_attn_result)"
        )

    def model_copy(self: ConfigT, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> ConfigT:
        """Return another with some fields changed, checked as a new one is. A field that has the default that follows
        from others follows them again: a model's copy with more heads has smaller ones.

        Raises:
            ValidationError: they do not fit the others.
        """
        usual = self._derived()
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        kept = {name: value for name, value in fields.items() if name not in usual or value != usual[name]}
        copied = type(self).model_validate(kept | dict(update or {}))
        return copy.deepcopy(copied) if deep else copied

    def _derived(self) -> dict[str, Any]:
        """Return the defaults that follow from other fields."""
        return {}

    def digest(self) -> str:
        """Return 16 hexadecimal digits that depend on every field that is written to files."""
        return json_digest(self.model_dump(mode="json"))

    def to_yaml(self, path: str | Path) -> None:
        """Write the config to `path`, atomically."""
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))

    @classmethod
    def from_yaml(cls: type[ConfigT], path: str | Path) -> ConfigT:
        """Read a config.

        Raises:
            UserError: the file is missing, is not YAML, or does not describe a valid config.
        """
        try:
            text = read_text(path, most=2**20)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); give the path of a YAML file") from error
        try:
            content = yaml.load(text, _Loader)
        except Exception as error:  # a value that is not of its tag fails with whatever it meets: `!!bool maybe`
            raise UserError(f"{path}: not YAML ({' '.join(str(error).split())}); correct its syntax") from error
        if not isinstance(content, dict):
            raise UserError(
                f"{path}: expected fields and values, got {shorten(repr(content), 100)}; see README for an example"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{path}: {one_line(error)}") from error


class RotaryScaling(Config):
    """How RoPE's angles are stretched for sequences longer than those first trained on.

    Source: arXiv 2309.00071 for `yarn`; transformers, `modeling_rope_utils`, for all; formulas at
    :class:`~mdm_interp.models.positions.Rope`.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: Positive
    """By what slow planes are slowed down."""
    original_max_position_embeddings: Count | None = None
    """The longest sequence first trained on; of llama3 and yarn."""
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    """llama3 only: planes that turn fewer times than the one over the original length are slowed down, those that turn
    more often than the other are not."""
    beta_fast: Positive | None = Field(default=None, ge=1e-6)
    beta_slow: Positive | None = Field(default=None, ge=1e-6)
    """yarn only: the same, from the slow end."""
    attention_factor: Positive = 1.0
    """yarn only: what queries and keys are multiplied by each."""
    truncate: StrictBool = True
    """yarn only: whether the first and the last plane that is slowed down in part are rounded outwards."""

    @model_validator(mode="after")
    def _check(self) -> RotaryScaling:
        needed = {
            "linear": (),
            "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
            "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow"),
        }[self.rope_type]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"{name}: missing, and rope_type {self.rope_type!r} needs it; add it")
        own = {"rope_type", "factor", *needed, *(("attention_factor", "truncate") if self.rope_type == "yarn" else ())}
        for name, field in type(self).model_fields.items():
            if name not in own and getattr(self, name) != field.default:
                raise ValueError(f"{name}: {getattr(self, name)} is not of rope_type {self.rope_type!r}; leave it out")
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor: {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}; swap "
                "them"
            )
        return self


class Experts(Config):
    """MLPs of which each token goes through a few (:class:`~mdm_interp.models.layers.MoE`)."""

    num_experts: Size = Field(le=1000)
    experts_per_token: Size
    d_expert: Size
    """Width of each."""
    n_shared: Natural = 0
    """How many more every token goes through."""
    n_groups: Size = 1
    """Into how many groups experts are divided."""
    topk_groups: Size = 1
    """From how many groups a token's experts are."""
    n_dense_layers: Natural = 0
    """How many of the first layers have an MLP of `d_mlp` instead."""
    routed_scale: Positive = 1.0
    """What the experts' outputs are multiplied by together."""

    @model_validator(mode="after")
    def _check(self) -> Experts:
        if self.num_experts % self.n_groups or self.topk_groups > self.n_groups:
            raise ValueError(
                f"n_groups: {self.n_groups} groups do not divide num_experts {self.num_experts}, or are fewer than "
                f"topk_groups {self.topk_groups}; correct them"
            )
        most = self.num_experts // self.n_groups * self.topk_groups
        if self.experts_per_token > most:
            raise ValueError(
                f"experts_per_token: {self.experts_per_token} is more than the {most} experts of topk_groups "
                f"{self.topk_groups}; lower it"
            )
        return self


class ModelConfig(Config):
    """Architecture of a :class:`~mdm_interp.models.transformer.HookedTransformer`.

    The default is the model that docs/theory.md treats: attention only, RMSNorm, RoPE, bidirectional.
    """

    d_model: Size
    n_heads: Size
    d_vocab: Length
    """Rows of the embedding, mask token included."""
    d_vocab_out: Length | None = Field(default=None, exclude_if=lambda columns: columns is None)
    """How many tokens can be predicted, the first ones, if not all. Written to files only where it is set."""
    n_ctx: Length
    """Longest sequence."""
    n_layers: Size = Field(default=1, le=1000)
    d_head: Size | None = None
    """Default: d_model / n_heads."""
    n_key_value_heads: Size | None = None
    """Fewer than n_heads means grouped-query attention. Default: n_heads."""
    qkv_bias: StrictBool = False
    use_qk_norm: StrictBool = Field(default=False, exclude_if=lambda used: not used)
    """Whether each head's queries and keys go through an RMSNorm before positions act on them. Written to files only
    where it is set, like the other fields that say so."""
    attention: Attention = "bidirectional"
    """block_causal: every token reads its own block of `block_size` positions and all blocks before it."""
    block_size: Size | None = Field(default=None, exclude_if=lambda size: size is None)
    """block_causal only; written to files only there."""

    position: AnyScheme = "rope"
    """A scheme of the package, or one that is registered (:func:`~mdm_interp.models.positions.register_scheme`)."""
    rotary_base: Positive = 10_000.0
    rotary_scaling: RotaryScaling | None = Field(default=None, exclude_if=lambda scaling: scaling is None)
    """Default: angles as `rotary_base` gives them. Written to files only where it is set."""
    rotary_dim: Size | None = None
    """How many of a head's dimensions rotate. Default: all of them."""
    rotary_adjacent_pairs: StrictBool = False
    """True pairs dimensions (0, 1), (2, 3), …; False pairs the two halves, as Llama and LLaDA do."""
    relative_attention_num_buckets: Size = 32
    relative_attention_max_distance: Size = 128

    d_mlp: Size | None = None
    """Width of the MLP. Default: no MLP (attention only)."""
    gated_mlp: StrictBool = False
    experts: Experts | None = Field(default=None, exclude_if=lambda experts: experts is None)
    """Default: one MLP in each layer. Written to files only where it is set."""
    act_fn: Literal["relu", "gelu", "gelu_new", "silu"] = "gelu"
    normalization_type: Literal["RMS", "LN"] | None = "RMS"
    eps: PositiveShare = 1e-5
    tie_word_embeddings: StrictBool = False

    initializer_range: Positive | None = None
    """Standard deviation of the initial weights. Default: 0.8 / sqrt(d_model)."""
    mask_token_id: Natural | None = None
    readout_shift: Annotated[Whole, Field(ge=-1, le=0)] | None = None
    """Where a position's prediction is: 0 at the position itself, -1 one before it.
    Default: 0 for bidirectional attention, -1 for causal. (Dream is bidirectional with -1.)"""
    dtype: Dtype = torch.float32

    # What follows is no part of a run's identity, nor written to files.
    device: str = Field(default="cpu", exclude=True)
    """Where the weights are; kept by the model."""
    default_prepend_bos: StrictBool | None = Field(default=None, exclude=True)
    """Whether texts begin with the tokenizer's BOS token, if it has one. Default: what the tokenizer does by itself."""
    use_attn_result: StrictBool = Field(default=False, exclude=True)
    """Whether a cache of all hooks holds `hook_result`, too."""
    use_split_qkv_input: StrictBool = Field(default=False, exclude=True)
    """Whether a cache of all hooks holds `hook_q_input`, `hook_k_input` and `hook_v_input`, too."""
    use_attn_in: StrictBool = Field(default=False, exclude=True)
    """Whether a cache of all hooks holds `hook_attn_in`, too."""
    use_hook_mlp_in: StrictBool = Field(default=False, exclude=True)
    """Whether a cache of all hooks holds `hook_mlp_in`, too."""

    @model_validator(mode="after")
    def _resolve(self) -> ModelConfig:
        """Write out the defaults that follow from other fields, so equal models have equal configs; then check."""
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads: {self.n_heads} does not divide d_model {self.d_model}; choose a divisor or set d_head"
            )
        for name, value in self._derived().items():
            if getattr(self, name) is None and (name != "rotary_dim" or self.turns_planes):
                object.__setattr__(self, name, value)
        if self.d_vocab_out == self.d_vocab:
            object.__setattr__(self, "d_vocab_out", None)
        if self.d_vocab_out is not None and (self.d_vocab_out > self.d_vocab or self.tie_word_embeddings):
            raise ValueError(
                f"d_vocab_out: {self.d_vocab_out} must be below d_vocab {self.d_vocab}, and embeddings not tied; leave "
                "it out"
            )
        if (self.block_size is None) is (self.attention == "block_causal"):
            raise ValueError(
                f"block_size: {self.block_size} does not go with {self.attention} attention; give block_causal "
                "attention its block_size, and no other attention one"
            )
        self._check_heads()
        if self.position == "t5_bias":
            self._check_buckets()
        if self.position == "sinusoidal" and self.n_ctx * self.d_model > 2**25:
            raise ValueError(
                f"n_ctx: {self.n_ctx} positions of d_model {self.d_model} make a table of sines too large to compute; "
                "lower it"
            )
        if self.gated_mlp and self.d_mlp is None:
            raise ValueError("gated_mlp: true needs an MLP; set d_mlp to its width")
        if self.experts is not None and not (self.gated_mlp and self.normalization_type == "RMS"):
            raise ValueError("experts: they are gated MLPs after RMSNorm; set gated_mlp, d_mlp and normalization_type")
        if self.mask_token_id is not None and self.mask_token_id >= self.d_vocab:
            raise ValueError(
                f"mask_token_id: {self.mask_token_id} is outside the vocabulary; d_vocab must be at least "
                f"{self.mask_token_id + 1}"
            )
        return self

    def _derived(self) -> dict[str, Any]:
        d_head = self.d_model // self.n_heads
        return {
            "d_head": d_head,
            "n_key_value_heads": self.n_heads,
            "initializer_range": 0.8 / self.d_model**0.5,
            "readout_shift": -1 if self.is_causal else 0,
            "rotary_dim": self.d_head or d_head,
        }

    def _check_heads(self) -> None:
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_key_value_heads: {self.kv_heads} does not divide n_heads {self.n_heads}; use a divisor"
            )
        if not self.turns_planes:
            if self.rotary_scaling is not None:
                raise ValueError(f"rotary_scaling: position {self.position!r} has no angles of RoPE; leave it out")
            return
        if self.head_dim % 2 and self.rotary_dim == self.head_dim:
            raise ValueError(
                f"d_head: {self.head_dim} is odd, and rope rotates pairs of dimensions; make it even "
                "(d_model / n_heads)"
            )
        if not self.rotary_dim or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim: {self.rotary_dim} must be even and at most d_head ({self.head_dim})")
        if self.rotary_base == 1 and self.rotary_scaling and self.rotary_scaling.rope_type == "yarn":
            raise ValueError("rotary_base: under a base of 1 all planes turn alike, which yarn tells apart; raise it")
        if self.rotary_dim != self.head_dim and self.rotary_scaling and self.rotary_scaling.attention_factor != 1:
            raise ValueError(
                f"rotary_scaling.attention_factor: {self.rotary_scaling.attention_factor} is for all of a head, and "
                f"only {self.rotary_dim} of its {self.head_dim} dimensions rotate (rotary_dim); set it to 1"
            )

    def _check_buckets(self) -> None:
        buckets, fewest = self.relative_attention_num_buckets, 2 if self.is_causal else 4
        if buckets < fewest:
            raise ValueError(
                f"relative_attention_num_buckets: {buckets} is too few for {self.attention} attention; use at least "
                f"{fewest}"
            )
        exact = buckets // fewest
        if self.relative_attention_max_distance <= exact:
            raise ValueError(
                f"relative_attention_max_distance: {self.relative_attention_max_distance} lies within the {exact} "
                f"distances that have a bucket each; raise it above {exact}"
            )

    @property
    def head_dim(self) -> int:
        """d_head, resolved."""
        assert self.d_head is not None
        return self.d_head

    @property
    def kv_heads(self) -> int:
        """n_key_value_heads, resolved."""
        assert self.n_key_value_heads is not None
        return self.n_key_value_heads

    @property
    def turns_planes(self) -> bool:
        """Whether positions turn planes by RoPE's settings."""
        return SCHEMES[self.position]

    @property
    def n_weights(self) -> int:
        """How many numbers the matrices hold, but for what chooses experts and those that all tokens share; biases and
        gains are few."""
        projections = 2 * self.d_model * self.head_dim * (self.n_heads + self.kv_heads)
        mlp = (3 if self.gated_mlp else 2) * self.d_model * (self.d_mlp or 0)
        routed = 0 if self.experts is None else max(0, self.n_layers - self.experts.n_dense_layers)
        experts = 0 if self.experts is None else 3 * self.d_model * self.experts.d_expert * self.experts.num_experts
        columns = 0 if self.tie_word_embeddings else self.d_vocab_out or self.d_vocab
        rows = self.d_vocab + columns + (self.n_ctx if self.position == "learned" else 0)
        return self.n_layers * projections + (self.n_layers - routed) * mlp + routed * experts + rows * self.d_model

    @property
    def attn_only(self) -> bool:
        """Whether there is no MLP (TransformerLens' name)."""
        return self.d_mlp is None

    @property
    def is_causal(self) -> bool:
        return self.attention == "causal"

    @property
    def score_scale(self) -> float:
        """What products of queries and keys are multiplied by: 1 / sqrt(d_head), and yarn's factor of both."""
        factor = 1.0 if self.rotary_scaling is None else self.rotary_scaling.attention_factor
        return self.head_dim**-0.5 * factor**2

    @property
    def reach(self) -> int | None:
        """Attention reads up to the end of a block of so many positions, its own: 1 where it is causal; None where it
        reads all."""
        return {"bidirectional": None, "causal": 1, "block_causal": self.block_size}[self.attention]

    def n_readable(self, position: int, n_pos: int) -> int:
        """Return how many of a sequence's first positions can be read from one of them."""
        return n_pos if self.reach is None else min(n_pos, (position // self.reach + 1) * self.reach)


class FactConfig(Config):
    """A synthetic world of facts `A r B`, each shown inside filler. See :mod:`mdm_interp.data.worlds`."""

    world: World = "relation_cycle"
    n_entities: Size = 60
    n_roles: Size = 3
    """relation_cycle only: how many roles are in the cycle, with one relation from each to the next."""
    filler: Filler = "random"
    n_filler: Size = 16
    """How many different filler tokens there are (random filler)."""
    seq_len: Size = 8
    gap: Size | tuple[Size, Size] = 2
    """Positions from the left entity to the right one, or the lowest and highest such distance.
    The relation comes right after the left entity; filler takes the rest."""
    reversed_share: Below1 = 0.0
    """Share of the facts that training also shows as `B r A`. These are never tested."""
    noise: Share = Field(default=0.0, exclude_if=lambda share: not share)
    """Share of training sequences whose right entity is drawn at random from its role. Written to files only where it
    is set."""

    @model_validator(mode="after")
    def _check(self) -> FactConfig:
        low, high = self.gaps
        if low < 2:
            raise ValueError(f"gap: {low} leaves no room for the relation between the entities; use at least 2")
        if low > high:
            raise ValueError(f"gap: the lowest distance {low} is above the highest {high}; swap them")
        if high + 1 > self.seq_len:
            raise ValueError(
                f"gap: {high} is longer than the sequence allows; use at most {self.seq_len - 1} or raise seq_len "
                f"to {high + 1}"
            )
        if self.filler == "none" and (high > 2 or self.seq_len != 3):
            raise ValueError(
                f"filler: 'none' leaves {self.seq_len - 3} of seq_len {self.seq_len} positions empty; use seq_len "
                "3 and gap 2, or another filler"
            )
        if self.world == "relation_cycle" and (self.n_roles < 2 or self.n_entities % self.n_roles):
            raise ValueError(
                f"n_entities: {self.n_entities} cannot be shared out among n_roles {self.n_roles}; use a multiple "
                "of at least 2 roles"
            )
        if self.world != "relation_cycle" and self.n_entities % 2:
            raise ValueError(
                f"n_entities: {self.n_entities} is odd, and every fact takes two entities; use an even number"
            )
        if self.n_reversed == self.n_facts:
            raise ValueError(
                f"reversed_share: {self.reversed_share} of {self.n_facts} facts rounds to all of them, which leaves "
                "none to test; lower it or raise n_entities"
            )
        return self

    @property
    def gaps(self) -> tuple[int, int]:
        """Lowest and highest distance between the entities of a fact."""
        return self.gap if isinstance(self.gap, tuple) else (self.gap, self.gap)

    @property
    def n_relations(self) -> int:
        return self.n_roles if self.world == "relation_cycle" else 1

    @property
    def n_facts(self) -> int:
        return self.n_entities if self.world == "relation_cycle" else self.n_entities // 2

    @property
    def n_reversed(self) -> int:
        """How many facts training also shows as `B r A`."""
        return round(self.reversed_share * self.n_facts)

    @property
    def filler_tokens(self) -> int:
        """How many filler tokens the vocabulary holds."""
        return {"none": 0, "constant": 1, "random": self.n_filler}[self.filler]

    @property
    def mask_token_id(self) -> int:
        """The last token of the world's vocabulary: entities, relations, filler, mask."""
        return self.n_entities + self.n_relations + self.filler_tokens

    @property
    def d_vocab(self) -> int:
        """The smallest vocabulary that holds the world, mask included."""
        return self.mask_token_id + 1


def _require_trainable(field: str, n_weights: int) -> None:
    if n_weights > MOST_TRAINED:
        raise ValueError(
            f"{field}: a model of {n_weights} weights is larger than the {MOST_TRAINED} that are trained here; lower it"
        )


def _require_held(batch_size: int, n_pos: int, of_each: int) -> None:
    """Refuse a batch that is too large, given how many numbers a layer holds of each position."""
    if (held := batch_size * n_pos * of_each) > MOST_AT_ONCE:
        raise ValueError(
            f"batch_size: {batch_size} sequences of {n_pos} positions would hold {held} numbers at once, and at most "
            f"{MOST_AT_ONCE} are tried; lower it"
        )


class TrainConfig(Config):
    """One training run: model, world, objective and optimisation. Its digest names the run's folder."""

    model: ModelConfig
    facts: FactConfig = FactConfig()
    objective: Objective = "any_order"
    """any_order masks any token (MDM); source_only and target_only mask only the left or only the right entity (the
    fact's source and target, not the source of a query); left_to_right masks a token and all after it, and predicts
    that one; causal predicts the next token (ARM). All but causal take either kind of attention."""
    mask_rate: PositiveShare | None = Field(default=None, exclude_if=lambda rate: rate is None)
    """With which probability any_order masks a token. Default: drawn anew for each sequence, between 0 and 1. Written
    to files only where it is set."""
    seed: Seed = 0
    """Drives the world, the initial weights and the order of the data."""
    steps: Count = 4000
    batch_size: Size = 64
    lr: Positive = 2e-3
    weight_decay: NonNegative = 0.01
    beta1: Below1 = 0.9
    beta2: Below1 = 0.98
    warmup: Natural = 100
    """Steps over which the learning rate rises linearly from 0."""
    grad_clip: Positive = 1.0
    """Largest norm of a step's gradient."""
    n_checkpoints: Count = Field(default=24, ge=2, le=10_000)
    """Log-spaced in steps, the first at 0 and the last at `steps`."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.model.d_vocab < self.facts.d_vocab:
            raise ValueError(
                f"model.d_vocab: {self.model.d_vocab} is too small for the world, which has {self.facts.d_vocab} "
                f"tokens; raise it to {self.facts.d_vocab}"
            )
        if self.model.n_ctx < self.facts.seq_len:
            raise ValueError(
                f"model.n_ctx: {self.model.n_ctx} is shorter than facts.seq_len {self.facts.seq_len}; raise it to "
                f"{self.facts.seq_len}"
            )
        if self.objective == "causal" and not self.model.is_causal:
            raise ValueError(
                f"objective: 'causal' does not go with {self.model.attention} attention, which sees the token to "
                "predict; set model.attention to 'causal', or objective to 'left_to_right'"
            )
        _require_trainable("model.d_model", self.model.n_weights)
        model, n_pos = self.model, self.facts.seq_len
        of_each = max(model.d_vocab, model.d_model, model.d_mlp or 0, model.n_heads * n_pos)
        _require_held(self.batch_size, n_pos, of_each)
        if self.model.experts is not None:
            raise ValueError("model.experts: experts are for checkpoints, and are not trained here; leave them out")
        if self.model.attention == "block_causal":
            raise ValueError(
                "model.attention: 'block_causal' is for checkpoints, as reverse queries ask about later blocks; train "
                "'bidirectional' or 'causal'"
            )
        if self.mask_rate is not None and self.objective != "any_order":
            raise ValueError(f"mask_rate: {self.objective!r} masks at no rate; leave it out, or use 'any_order'")
        trained_shift = -1 if self.objective == "causal" else 0
        if self.model.readout_shift != trained_shift:
            raise ValueError(
                f"model.readout_shift: {self.model.readout_shift} is not what objective {self.objective!r} trains; "
                f"set it to {trained_shift}"
            )
        if self.model.mask_token_id is None:
            masked = self.model.model_copy(update={"mask_token_id": self.facts.mask_token_id})
            object.__setattr__(self, "model", masked)
        elif self.model.mask_token_id != self.facts.mask_token_id:
            raise ValueError(
                f"model.mask_token_id: {self.model.mask_token_id} is not the world's mask "
                f"{self.facts.mask_token_id}; leave it out"
            )
        return self

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, the first of which is 1: it rises linearly over the warm-up, and stays.
        At the initial weights it is 0."""
        return self.lr * min(1.0, step / max(self.warmup, 1))


TEXT_CTX = 256
"""The longest sentence, in tokens, of a checkpoint that is trained on sentences."""


class TextConfig(Config):
    """What a small checkpoint that is trained on sentences is made from, besides the sentences."""

    format: TextFormat = "llada"
    seed: Seed = 0
    """Drives the initial weights and the order of the data."""
    n_bpe: Size = Field(default=600, ge=257)
    """Most tokens of the byte-level BPE."""
    d_model: Size = 96
    n_layers: Size = Field(default=4, le=1000)
    n_heads: Size = 4
    d_mlp: Size = 256
    steps: Count = 4000
    batch_size: Size = 64
    lr: Positive = 3e-3
    warmup: Count = 100

    @model_validator(mode="after")
    def _check_size(self) -> TextConfig:
        of_layer = self.d_model * (4 * self.d_model + 3 * self.d_mlp)
        _require_trainable("d_model", self.n_layers * of_layer + 2 * self.n_bpe * self.d_model)
        _require_held(self.batch_size, TEXT_CTX, max(self.n_bpe, self.d_model, self.d_mlp, self.n_heads * TEXT_CTX))
        return self


class BenchmarkConfig(TextConfig):
    """What a checkpoint is made from that is trained on the sentences of the reversal curse's benchmark."""

    data: str
    """The digest of the benchmark."""
    n_bpe: Size = Field(default=2500, ge=257)
    d_model: Size = 128
    d_mlp: Size = 512
    steps: Count = 20_000
    batch_size: Size = 32


class DemoConfig(TextConfig):
    """What a demo checkpoint is made from. Its fields fix the folder's content; `seed` drives the people, too."""

    world: DemoWorld = "memorised"
    """Whether every sentence states one fact, or (varied) every second family has sentences that name both parents."""
    n_families: Size = 16
    n_control: Size = 4
    """Families whose parents are also stated in the reverse direction. They are not among the tested facts."""

    @model_validator(mode="after")
    def _check(self) -> DemoConfig:
        if self.n_control >= self.n_families:
            raise ValueError(
                f"n_control: {self.n_control} of {self.n_families} families leave none to test; lower it or raise "
                "n_families"
            )
        return self
