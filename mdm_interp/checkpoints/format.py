"""What a checkpoint format is: how its config.json and its tensors map to a `ModelConfig` and the model's parameters.

A format is mostly data. `fixed` says what all its models are, `fields` and `optional` what config.json calls the rest,
`supported` which values of other fields this package computes, and `tensors` what the parameters are called. What
config.json does not say is an error, unless `documented` has what the format's documentation says of it. Every field
that is there is read, or is known to leave the computation alone where it has this value, or is named in a warning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from einops import rearrange
from pydantic import ValidationError
from torch import Tensor

from mdm_interp.config import ModelConfig, one_line
from mdm_interp.errors import UserError, few, shorten

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

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # rotary embedding
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rotary_percent"), (1.0, None)),
    **dict.fromkeys(("rope_interleaved", "rope_interleave", "use_mrope"), (False, None)),
    **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval", "rope_local_base_freq", "mrope_section"), (None,)),
    # which keys are read
    **dict.fromkeys(("attention_chunk_size", "block_size", "bd_size", "window_size", "sliding_window"), (None,)),
    **dict.fromkeys(("alibi", "use_alibi", "use_sliding_window", "prefix_lm"), (False, None)),
    # what becomes of scores and logits
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping", "clip_qkv"), (None,)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "softmax_scale", "attn_scale"), (None,)),
    **dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm", "attention_layer_norm"), (False, None)),
    **dict.fromkeys(("logit_scale", "logits_scaling", "output_multiplier_scale"), (1.0, None)),
    # the residual stream
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "scale_emb", "scale_depth"), (1.0, None)),
    **dict.fromkeys(("parallel_residual", "use_parallel_residual", "parallel_attn", "scale_embedding"), (False, None)),
    **dict.fromkeys(("use_post_norm", "sandwich_norm", "use_bias", "mlp_bias", "add_cross_attention"), (False, None)),
    # experts, adapters, other modalities, other precision
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), (0, None)),
    **dict.fromkeys(("pruned_heads",), ({}, None)),
    **dict.fromkeys(("vision_config", "audio_config", "text_config", "quantization_config"), (None,)),
}
"""Fields with which some families change what is computed, and the values with which they do not."""

HARMLESS = re.compile(
    r"_?name_or_path|architectures|model_type|auto_map|transformers_version|torch_dtype|dtype|precision|torchscript"
    r"|.*_token_id|.*_token_ids|.*dropout.*|.*_pdrop|.*_drop|init_.*|initializer_.*|use_cache|return_dict.*|output_.*"
    r"|use_return_dict|pretraining_tp|gradient_checkpointing|_?attn_implementation.*|flash_attention|use_flash.*"
    r"|is_decoder|is_encoder_decoder|cross_attention_hidden_size|tie_encoder_decoder|chunk_size_feed_forward"
    r"|id2label|label2id|num_labels|problem_type|classifier_.*|task_specific_params|finetuning_task|prefix"
    r"|tokenizer_class|tf_legacy_loss|use_bfloat16|tp_plan|base_model_tp_plan|base_model_pp_plan"
    r"|max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_k"
    r"|top_p|typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size"
    r"|bad_words_ids|num_return_sequences|remove_invalid_values|exponential_decay_length_penalty|suppress_tokens"
    r"|begin_suppress_tokens|max_window_layers|rope_full_precision|alibi_bias_max"
    r"|attention_layer_norm_with_affine|weight_decay|unsloth_.*|ignore_keys.*|attn_implementation"
    r"|debug|ep_size|micro_forward|skip_checkpoint|use_deepep|fuse_cross_entropy|\w+_loss_weight|dp_varying_mask_ratio"
)
"""Fields that say nothing of what a model computes when it is asked: names, ids, training, generation."""


class Format:
    """Base of the formats: one instance per format, in `mdm_interp.checkpoints.FORMATS`."""

    name: ClassVar[str]
    architecture: ClassVar[str]
    """The class that config.json's `architectures` names."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other classes that compute the same."""
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
    documented: ClassVar[dict[str, Any]] = {}
    """config.json field -> what the format's documentation says that it is where old files lack it; a text names
    another field, whose value it has."""
    settable: ClassVar[tuple[str, ...]] = ()
    """ModelConfig fields of which the format's files may say nothing, or something else than what a model is used as;
    `load_checkpoint` has options for them."""
    derived: ClassVar[dict[str, str]] = {}
    """ModelConfig field -> config.json field, for what `read_rest` reads."""
    read: ClassVar[tuple[str, ...]] = ()
    """Other config.json fields that `read_rest` reads."""
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

    @property
    def convertible(self) -> bool:
        """Whether the format's class is causal, and models of it may be used otherwise."""
        return "attention" in self.settable and self.fixed.get("attention") == "causal"

    # ---- config.json

    def complete(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Return config.json with what the shapes of the tensors say."""
        return dict(config)

    def read_config(self, config: Mapping[str, Any], asked: Mapping[str, Any] | None = None) -> ModelConfig:
        """Return the model that config.json describes.

        Args:
            asked: ModelConfig fields that the user sets, of those that are `settable`.

        Raises:
            UserError: fields are missing, or say what this package does not compute; or what is asked for is not
                settable.
        """
        asked, filled = dict(asked or {}), self._documented_of(config)
        self.check_settable(asked)
        problems, config = list[str](), {**config, **filled}
        read = {*self.read, *self.fields.values(), *self.optional.values()}
        own = {field: (value,) for field, value in (self.supported | self.required).items()}
        for field, values in {**NEUTRAL, **own}.items():
            if field in read:
                continue
            got = config.get(field, MISSING)
            if got is MISSING and field in self.required:
                problems.append(f"{field} is missing")
            elif got is not MISSING and not any(_is(got, value) for value in values):
                problems.append(f"{field} is {got!r:.80}, and only {values[0]!r} is supported")
        values = dict(self.fixed)
        for ours, theirs in self.fields.items():
            if config.get(theirs) is not None:
                values[ours] = config[theirs]
            elif ours not in asked:
                problems.append(f"{theirs} is {'missing' if theirs not in config else 'null'}")
        values |= {ours: config[theirs] for ours, theirs in self.optional.items() if config.get(theirs) is not None}
        values |= asked
        self.read_rest(config, values, asked, problems)
        self.read_rope(config, values, problems)
        if problems:
            raise UserError(
                f"{few(problems, '; ')} (format {self.name}); give the config.json that was released with the weights"
            )
        cfg = self.make_config(values)
        self._warn(config, filled)
        return cfg

    def check_settable(self, asked: Mapping[str, Any]) -> None:
        """Refuse what the format's files say themselves.

        Raises:
            UserError: something asked for is not `settable`.
        """
        if fixed := [name for name in asked if name not in self.settable]:
            raise UserError(
                f"{fixed[0]}: {asked[fixed[0]]!r} cannot be set, as format {self.name} says it; leave it out"
            )

    def _documented_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what config.json lacks and the format's documentation says."""
        found = {
            field: config.get(value) if isinstance(value, str) else value
            for field, value in self.documented.items()
            if field not in config and not self.says(config, field)
        }
        return {field: value for field, value in found.items() if value is not None}

    def says(self, config: Mapping[str, Any], field: str) -> bool:
        """Tell whether config.json has a field in another place."""
        return False

    def _warn(self, config: Mapping[str, Any], filled: Mapping[str, Any]) -> None:
        """Say what was filled in, and what was passed over."""
        if filled:
            said = few([f"{field} {value!r}" for field, value in filled.items()])
            warnings.warn(f"config.json lacks what {self.architecture} documents as {said}; that is used", stacklevel=4)
        known = {*NEUTRAL, *self.supported, *self.required, *self.fields.values(), *self.optional.values()}
        known.add("original_max_position_embeddings")
        known |= {*self.derived.values(), *self.read, "rope_scaling", "rope_parameters"}
        if unknown := [field for field in config if field not in known and not HARMLESS.fullmatch(field)]:
            warnings.warn(
                f"config.json has fields that are not known here and were passed over: "
                f"{shorten(few(unknown), 300)}; if one changes what the model computes, its numbers here are wrong",
                stacklevel=4,
            )

    def make_config(self, values: Mapping[str, Any]) -> ModelConfig:
        """Return a ModelConfig, with errors in config.json's words."""
        try:
            return ModelConfig(**values)
        except ValidationError as error:
            message = one_line(error)
            for ours, theirs in (self.fields | self.optional | self.derived).items():
                message = re.sub(rf"\b{ours}\b", theirs, message)
            raise UserError(message) from error

    def read_rest(
        self, config: Mapping[str, Any], values: dict[str, Any], asked: Mapping[str, Any], problems: list[str]
    ) -> None:
        """Put what takes more than a name into `values`, which has what was asked for, and what is wrong into
        `problems`."""

    def read_rope(self, config: Mapping[str, Any], values: dict[str, Any], problems: list[str]) -> None:
        """Do so with what is said of rotary embedding beside its base: here, refuse to scale it."""
        for field in ("rope_scaling", "rope_parameters"):
            if not is_plain(config.get(field)):
                problems.append(f"{field} is {config[field]!r:.120}, and only rope_type 'default' is supported")

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
            raise UserError(f"format: {self.name!r} cannot hold this model ({few(problems, '; ')}); use 'mdm_interp'")
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

    def tensor_names(self, parameter: str, cfg: ModelConfig) -> list[str]:
        """Return the tensors that a parameter is stacked from: of most parameters one, which it is, not stacked."""
        return [self.tensor_name(parameter)]

    def part(self, parameter: str, tensor: Tensor, cfg: ModelConfig) -> Tensor:
        """Return what of a tensor of the file is a parameter's: all of it, unless tensors hold several."""
        return tensor

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


def is_plain(rope: Any) -> bool:
    """Tell whether a rope_scaling or rope_parameters field leaves rotary embedding as it is."""
    if rope is None:
        return True
    if not isinstance(rope, Mapping):
        return False
    kinds = [rope.get(name, "default") for name in ("type", "rope_type")]
    return all(kind in ("default", "none", None) for kind in kinds) and set(rope) <= {"type", "rope_type", "rope_theta"}


def find_format(config: Mapping[str, Any], formats: Iterable[Format]) -> Format:
    """Return the format whose class and model type config.json names.

    Raises:
        UserError: it names none of `formats`, or two different ones.
    """
    architectures, model_type = config.get("architectures"), config.get("model_type")
    architectures = [] if architectures is None else architectures
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UserError(
            f"architectures: {architectures!r:.80} is no list of class names; give the config.json released"
        )
    formats = list(formats)
    by_class = [format for format in formats if {format.architecture, *format.aliases} >= {*architectures}]
    by_type = [format for format in formats if format.model_type == model_type]
    named = by_class if architectures else by_type
    if len(named) != 1 or (model_type is not None and named != by_type):
        known = ", ".join(format.architecture for format in formats)
        raise UserError(
            f"architectures {architectures!r:.60} with model_type {model_type!r:.40} is not supported; {known} are"
        )
    return named[0]
