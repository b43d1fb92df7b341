"""What a checkpoint format is: how its config.json and its tensors map to a `ModelConfig` and the model's parameters.

A format is mostly data. `fixed` says what all its models are, `fields` and `optional` what config.json calls the rest,
`supported` which values of other fields this package computes, and `tensors` what the parameters are called. Nothing is
filled in from a class' defaults: what config.json does not say is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from einops import rearrange
from pydantic import ValidationError
from torch import Tensor

from mdm_interp.config import ModelConfig, one_line
from mdm_interp.errors import UserError

LINEAR_LAYOUT = {
    "W_Q": ("(head d_head) d_model", "head d_model d_head"),
    "W_K": ("(head d_head) d_model", "head d_model d_head"),
    "W_V": ("(head d_head) d_model", "head d_model d_head"),
    "W_O": ("d_model (head d_head)", "head d_head d_model"),
    "b_Q": ("(head d_head)", "head d_head"),
    "b_K": ("(head d_head)", "head d_head"),
    "b_V": ("(head d_head)", "head d_head"),
    "W_in": ("d_mlp d_model", "d_model d_mlp"),
    "W_gate": ("d_mlp d_model", "d_model d_mlp"),
    "W_out": ("d_model d_mlp", "d_mlp d_model"),
    "W_U": ("d_vocab d_model", "d_model d_vocab"),
}
"""How `torch.nn.Linear` keeps a parameter, `[output input]`, and how `HookedTransformer` has it. Both keep
the parameters that are not named here alike."""

MISSING = object()


class Format:
    """Base of the formats: one instance per format, in `mdm_interp.checkpoints.FORMATS`."""

    name: ClassVar[str]
    architecture: ClassVar[str]
    """The class that config.json's `architectures` names."""
    model_type: ClassVar[str]
    fixed: ClassVar[dict[str, Any]] = {}
    """ModelConfig fields that all models of the format share."""
    fields: ClassVar[dict[str, str]] = {}
    """ModelConfig field -> config.json field."""
    optional: ClassVar[dict[str, str]] = {}
    """The same, for fields that may be absent or null."""
    supported: ClassVar[dict[str, Any]] = {}
    """config.json field -> the value this package computes. May be absent: then the tensors must fit it."""
    required: ClassVar[dict[str, Any]] = {}
    """The same, for fields that must be there, as no tensor tells."""
    tensors: ClassVar[dict[str, str]]
    """Parameter -> tensor, `*` for the layer."""
    mask_token: ClassVar[str | None] = None
    """The mask's string, if the format's tokenizers may not hold it yet."""
    tokenizer_class: ClassVar[str] = "PreTrainedTokenizerFast"
    """What tokenizer_config.json names."""
    split_tokenizer: ClassVar[bool] = False
    """Whether the tokenizer comes as `vocab.json` and `merges.txt` rather than `tokenizer.json`."""
    ignored: ClassVar[str] = r"(^|\.)rotary_emb\.inv_freq$"
    """Tensors passed over: frequencies that old files store, and that follow from `rope_theta`."""

    # ---- config.json

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """Return the model that config.json describes.

        Raises:
            UserError: fields are missing, or say what this package does not compute; all are listed.
        """
        problems: list[str] = []
        for field, value in {**self.supported, **self.required, "quantization_config": None}.items():
            got = config.get(field, MISSING)
            if got is MISSING and field in self.required:
                problems.append(f"{field} is missing")
            elif got is not MISSING and not _is(got, value):
                problems.append(f"{field} is {got!r}, and only {value!r} is supported")
        for field in ("rope_scaling", "rope_parameters"):
            if not _is_plain(config.get(field)):
                problems.append(f"{field} is {config[field]!r}, and only rope_type 'default' is supported")
        values = dict(self.fixed)
        for ours, theirs in self.fields.items():
            if config.get(theirs) is None:
                problems.append(f"{theirs} is {'missing' if theirs not in config else 'null'}")
            else:
                values[ours] = config[theirs]
        values |= {ours: config[theirs] for ours, theirs in self.optional.items() if config.get(theirs) is not None}
        self.read_rest(config, values, problems)
        if problems:
            raise UserError(
                "; ".join(problems) + f" (format {self.name}); give the config.json that was released with the weights"
            )
        return self.make_config(values)

    def make_config(self, values: Mapping[str, Any]) -> ModelConfig:
        """Return a ModelConfig, with errors in config.json's words."""
        try:
            return ModelConfig(**values)
        except ValidationError as error:
            message = one_line(error)
            for ours, theirs in (self.fields | self.optional).items():
                message = re.sub(rf"\b{ours}\b", theirs, message)
            raise UserError(message) from error

    def read_rest(self, config: Mapping[str, Any], values: dict[str, Any], problems: list[str]) -> None:
        """Put what takes more than a name into `values`, and what is wrong into `problems`."""

    def write_config(self, cfg: ModelConfig) -> dict[str, Any]:
        """Write config.json of a model, without what belongs to its tokenizer.

        Raises:
            UserError: the format has no such models; all reasons are listed.
        """
        problems = [
            f"{field} is {getattr(cfg, field)!r}, not {value!r}"
            for field, value in self.fixed.items()
            if getattr(cfg, field) != value
        ]
        problems += [f"{ours} is not set" for ours in self.fields if getattr(cfg, ours) is None]
        if cfg.rotary_dim != cfg.head_dim:
            problems.append(f"rotary_dim is {cfg.rotary_dim}, not d_head {cfg.head_dim}")
        config = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "torch_dtype": cfg.model_dump()["dtype"],
        }
        config |= self.supported | self.required
        config |= {theirs: getattr(cfg, ours) for ours, theirs in (self.fields | self.optional).items()}
        self.write_rest(cfg, config, problems)
        if problems:
            raise UserError(f"format: {self.name!r} cannot hold this model ({'; '.join(problems)}); use 'mdm_interp'")
        return config

    def write_rest(self, cfg: ModelConfig, config: dict[str, Any], problems: list[str]) -> None:
        """Put what takes more than a name into `config`, and what the format cannot say into `problems`."""

    # ---- tensors

    def tensor_name(self, parameter: str) -> str:
        """Return what the format calls a parameter."""
        layer = re.search(r"(?<=blocks\.)\d+", parameter)
        if layer is None:
            return self.tensors[parameter]
        return self.tensors[re.sub(r"(?<=blocks\.)\d+", "*", parameter)].replace("*", layer[0])

    def to_stored(self, parameter: str, tensor: Tensor, cfg: ModelConfig) -> Tensor:
        """Return a parameter in the layout of the file."""
        return _rearranged(parameter, tensor, cfg, inverse=True)

    def from_stored(self, parameter: str, tensor: Tensor, cfg: ModelConfig) -> Tensor:
        """Return a tensor of the file in the layout of the parameter, as a view: products with it then copy nothing."""
        return _rearranged(parameter, tensor, cfg, inverse=False)


def _rearranged(parameter: str, tensor: Tensor, cfg: ModelConfig, *, inverse: bool) -> Tensor:
    layouts = LINEAR_LAYOUT.get(parameter.rsplit(".", 1)[-1])
    if layouts is None:
        return tensor
    stored, ours = layouts
    pattern = f"{ours} -> {stored}" if inverse else f"{stored} -> {ours}"
    return rearrange(tensor, pattern, **({"d_head": cfg.head_dim} if "d_head" in pattern else {}))


def _is(got: Any, value: Any) -> bool:
    """Tell whether both are equal and of one kind: 1 is not True, and 0 is neither False nor null."""
    return got == value and isinstance(got, bool) == isinstance(value, bool)


def _is_plain(rope: Any) -> bool:
    """Tell whether a rope_scaling or rope_parameters field leaves rotary embedding as it is."""
    if rope is None:
        return True
    if not isinstance(rope, Mapping):
        return False
    kinds = {rope.get(name, "default") for name in ("type", "rope_type")}
    return kinds <= {"default", "none", None} and set(rope) <= {"type", "rope_type", "rope_theta"}


def find_format(config: Mapping[str, Any], formats: Iterable[Format]) -> Format:
    """Return the format whose class and model type config.json names.

    Raises:
        UserError: it names none of `formats`, or two different ones.
    """
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    formats = list(formats)
    by_class = [format for format in formats if format.architecture in architectures]
    by_type = [format for format in formats if format.model_type == model_type]
    named = by_class if architectures else by_type
    if len(named) != 1 or (model_type is not None and named != by_type):
        known = ", ".join(f"{format.architecture} ({format.model_type})" for format in formats)
        raise UserError(f"architectures {architectures!r} with model_type {model_type!r} is not supported; {known} are")
    return named[0]
