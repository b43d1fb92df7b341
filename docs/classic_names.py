"""Writes the tables of `coming_from_transformerlens.md`: what became of each name of the classic `HookedTransformer`.

    python docs/classic_names.py

The classic class is that of TransformerLens 3.9, its last release. Its names and signatures are data, below; what this
package does with them is looked up in the package. A name that is there and takes what it took is "same". Whatever
else is true of a name has a reason here, and :func:`problems` lists reasons that are missing and reasons that are not
needed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from mdm_interp.config import ModelConfig
from mdm_interp.models.transformer import HookedTransformer

PAGE = Path(__file__).with_name("coming_from_transformerlens.md")
BEGIN, END = "<!-- tables: written by docs/classic_names.py -->", "<!-- end of the tables -->"

# ---- the classic names


def _words(text: str) -> list[str]:
    return text.split()


PROPERTY = ""
"""Stands where a signature would."""

MEMBERS: dict[str, dict[str, str]] = {
    "Build and load": {
        "__init__": "cfg, tokenizer=None, move_to_device=True, default_padding_side=None",
        "from_pretrained": (
            "model_name, fold_ln=True, center_writing_weights=True, center_unembed=True, "
            "refactor_factored_attn_matrices=False, checkpoint_index=None, checkpoint_value=None, "
            "checkpoint_label=None, hf_model=None, device=None, n_devices=1, tokenizer=None, move_to_device=True, "
            "fold_value_biases=True, default_prepend_bos=None, default_padding_side=None, dtype='float32', "
            "first_n_layers=None, n_ctx=None, **from_pretrained_kwargs"
        ),
        "from_pretrained_no_processing": (
            "model_name, fold_ln=False, center_writing_weights=False, center_unembed=False, "
            "refactor_factored_attn_matrices=False, fold_value_biases=False, dtype=None, default_prepend_bos=None, "
            "default_padding_side=None, **from_pretrained_kwargs"
        ),
        "init_weights": "",
        "load_and_process_state_dict": (
            "state_dict, fold_ln=True, center_writing_weights=True, center_unembed=True, fold_value_biases=True, "
            "refactor_factored_attn_matrices=False"
        ),
        "fill_missing_keys": "state_dict",
        "setup": "",
        "load_sample_training_dataset": "**kwargs",
        "sample_datapoint": "tokenize=False, prepend_bos=None, padding_side=None",
    },
    "Run": {
        "forward": (
            "input, return_type='logits', loss_per_token=False, prepend_bos=None, padding_side=None, "
            "start_at_layer=None, tokens=None, shortformer_pos_embed=None, attention_mask=None, stop_at_layer=None, "
            "past_kv_cache=None"
        ),
        "loss_fn": "logits, tokens, attention_mask=None, per_token=False",
        "input_to_embed": "input, prepend_bos=None, padding_side=None, attention_mask=None, past_kv_cache=None",
        "get_pos_offset": "past_kv_cache, batch_size",
        "get_residual": (
            "embed, pos_offset, prepend_bos=None, attention_mask=None, tokens=None, return_shortformer_pos_embed=True, "
            "device=None"
        ),
        "run_with_hooks": (
            "*model_args, fwd_hooks=[], bwd_hooks=[], reset_hooks_end=True, clear_contexts=False, **model_kwargs"
        ),
        "run_with_cache": (
            "*model_args, return_cache_object=True, remove_batch_dim=False, names_filter=None, device=None, "
            "incl_bwd=False, reset_hooks_end=True, clear_contexts=False, pos_slice=None, **model_kwargs"
        ),
        "generate": (
            "input='', max_new_tokens=10, stop_at_eos=True, eos_token_id=None, do_sample=True, top_k=None, top_p=None, "
            "temperature=1.0, freq_penalty=0.0, use_past_kv_cache=True, prepend_bos=None, padding_side=None, "
            "return_type='input', verbose=True, **generation_kwargs"
        ),
        "generate_stream": (
            "input='', max_new_tokens=10, max_tokens_per_yield=25, stop_at_eos=True, eos_token_id=None, "
            "do_sample=True, top_k=None, top_p=None, temperature=1.0, freq_penalty=0.0, use_past_kv_cache=True, "
            "prepend_bos=None, padding_side=None, return_type='input', verbose=True"
        ),
    },
    "Hook and cache": {
        "hooks": "fwd_hooks=[], bwd_hooks=[], reset_hooks_end=True, clear_contexts=False",
        "add_hook": "name, hook, dir='fwd', is_permanent=False, level=None, prepend=False",
        "add_perma_hook": "name, hook, dir='fwd'",
        "check_and_add_hook": (
            "hook_point, hook_point_name, hook, dir='fwd', is_permanent=False, level=None, prepend=False"
        ),
        "check_hooks_to_add": "hook_point, hook_point_name, hook, dir='fwd', is_permanent=False, prepend=False",
        "reset_hooks": "clear_contexts=True, direction='both', including_permanent=False, level=None",
        "remove_all_hook_fns": "direction='both', including_permanent=False, level=None",
        "clear_contexts": "",
        "hook_points": "",
        "list_hooks": "name_filter=None, dir='both', including_permanent=True",
        "get_caching_hooks": (
            "names_filter=None, incl_bwd=False, device=None, remove_batch_dim=False, cache=None, pos_slice=None"
        ),
        "add_caching_hooks": "names_filter=None, incl_bwd=False, device=None, remove_batch_dim=False, cache=None",
        "cache_all": "cache, incl_bwd=False, device=None, remove_batch_dim=False",
        "cache_some": "cache, names, incl_bwd=False, device=None, remove_batch_dim=False",
        "set_use_attn_result": "use_attn_result",
        "set_use_split_qkv_input": "use_split_qkv_input",
        "set_use_attn_in": "use_attn_in",
        "set_use_hook_mlp_in": "use_hook_mlp_in",
        "set_ungroup_grouped_query_attention": "ungroup_grouped_query_attention",
    },
    "Texts and tokens": {
        "set_tokenizer": "tokenizer, default_padding_side=None",
        "to_tokens": "input, prepend_bos=None, padding_side=None, move_to_device=True, truncate=True",
        "to_string": "tokens",
        "to_str_tokens": "input, prepend_bos=None, padding_side=None",
        "to_single_token": "string",
        "to_single_str_token": "int_token",
        "get_token_position": "single_token, input, mode='first', prepend_bos=None, padding_side=None",
        "tokens_to_residual_directions": "tokens",
    },
    "Weights": {
        **dict.fromkeys(_words("W_E W_pos W_E_pos W_U b_U W_Q W_K W_V W_O b_Q b_K b_V b_O"), PROPERTY),
        **dict.fromkeys(_words("W_in W_gate W_out b_in b_out QK OV n_params_total"), PROPERTY),
        "accumulated_bias": "layer, mlp_input=False, include_mlp_biases=True",
        "all_composition_scores": "mode",
        "all_head_labels": "",
        "fold_layer_norm": "state_dict, fold_biases=True, center_weights=True",
        "center_writing_weights": "state_dict",
        "center_unembed": "state_dict",
        "fold_value_biases": "state_dict",
        "refactor_factored_attn_matrices": "state_dict",
        "process_weights_": (
            "fold_ln=True, center_writing_weights=True, center_unembed=True, refactor_factored_attn_matrices=False"
        ),
    },
    "Devices": {
        "to": "device_or_dtype, print_details=True",
        "cuda": "device=None",
        "cpu": "",
        "mps": "",
        "move_model_modules_to_device": "",
    },
}
"""Methods with their signatures, and properties, of the classic class and the classes it builds on, by what they are
for."""

ATTRIBUTES = _words(
    "cfg tokenizer embed pos_embed blocks ln_final unembed hook_dict mod_dict is_caching context_level dataset"
)
"""Attributes that a classic model sets on itself."""

RESID, PER_HEAD, PER_KV_HEAD = "batch pos d_model", "batch pos head d_head", "batch pos kv_head d_head"
SCORES, NEURONS, SCALE = "batch head query_pos key_pos", "batch pos d_mlp", "batch pos 1"

HOOKS: dict[str, dict[str, str]] = {
    "Outside the blocks": {
        "hook_tokens": "batch pos",
        "hook_embed": RESID,
        "hook_pos_embed": RESID,
        "embed.ln.hook_scale": SCALE,
        "embed.ln.hook_normalized": RESID,
        "ln_final.hook_scale": SCALE,
        "ln_final.hook_normalized": RESID,
        "unembed.hook_in": RESID,
        "unembed.hook_out": "batch pos d_vocab",
    },
    "In a block": {
        "blocks.{l}.hook_resid_pre": RESID,
        "blocks.{l}.hook_resid_mid": RESID,
        "blocks.{l}.hook_resid_post": RESID,
        "blocks.{l}.hook_attn_out": RESID,
        "blocks.{l}.hook_mlp_out": RESID,
        "blocks.{l}.hook_attn_in": "batch pos head d_model",
        "blocks.{l}.hook_q_input": "batch pos head d_model",
        "blocks.{l}.hook_k_input": "batch pos kv_head d_model",
        "blocks.{l}.hook_v_input": "batch pos kv_head d_model",
        "blocks.{l}.hook_mlp_in": RESID,
        **{
            f"blocks.{{l}}.{norm}.hook_{kind}": shape
            for norm in ("ln1", "ln2", "ln1_post", "ln2_post")
            for kind, shape in (("scale", SCALE), ("normalized", RESID))
        },
    },
    "In attention": {
        "blocks.{l}.attn.hook_q": PER_HEAD,
        "blocks.{l}.attn.hook_k": PER_KV_HEAD,
        "blocks.{l}.attn.hook_v": PER_KV_HEAD,
        "blocks.{l}.attn.hook_rot_q": PER_HEAD,
        "blocks.{l}.attn.hook_rot_k": PER_KV_HEAD,
        "blocks.{l}.attn.hook_attn_scores": SCORES,
        "blocks.{l}.attn.hook_pattern": SCORES,
        "blocks.{l}.attn.hook_z": PER_HEAD,
        "blocks.{l}.attn.hook_result": "batch pos head d_model",
        "blocks.{l}.attn.hook_attn_input": RESID,
        **{f"blocks.{{l}}.attn.{norm}.hook_scale": "… 1" for norm in ("q_norm", "k_norm")},
        **{f"blocks.{{l}}.attn.{norm}.hook_normalized": "… d_head" for norm in ("q_norm", "k_norm")},
    },
    "In the MLP": {
        "blocks.{l}.mlp.hook_pre": NEURONS,
        "blocks.{l}.mlp.hook_pre_linear": NEURONS,
        "blocks.{l}.mlp.hook_post": NEURONS,
        "blocks.{l}.mlp.hook_mid": NEURONS,
        "blocks.{l}.mlp.ln.hook_scale": SCALE,
        "blocks.{l}.mlp.ln.hook_normalized": NEURONS,
        "blocks.{l}.mlp.hook_expert_weights": "…",
        "blocks.{l}.mlp.hook_expert_indices": "…",
        "blocks.{l}.mlp.experts.{e}.hook_gate": "…",
        "blocks.{l}.mlp.experts.{e}.hook_pre": "…",
        "blocks.{l}.mlp.experts.{e}.hook_post": "…",
    },
}
"""Hooks and the shapes of what they see, by where they are; `{l}` is a layer, `{e}` an expert."""

FIELDS: dict[str, list[str]] = {
    "Sizes": _words("n_layers d_model n_ctx d_head n_heads n_key_value_heads d_mlp d_vocab d_vocab_out n_params"),
    "Attention": _words(
        "attention_dir attn_only use_attn_scale attn_scale scale_attn_by_inverse_layer_idx attn_scores_soft_cap "
        "use_local_attn window_size attn_types use_qk_norm clip_qkv use_logn_attn use_attention_sinks "
        "ungroup_grouped_query_attention"
    ),
    "Positions": _words(
        "positional_embedding_type rotary_base rotary_dim rotary_adjacent_pairs relative_attention_num_buckets "
        "relative_attention_max_distance rotary_base_local rotary_scaling_factor train_seq_length use_dynamic_ntk_rope "
        "use_NTK_by_parts_rope NTK_by_parts_low_freq_factor NTK_by_parts_high_freq_factor NTK_by_parts_factor "
        "NTK_original_ctx_len use_yarn_rope yarn_factor yarn_attention_factor yarn_beta_fast yarn_beta_slow "
        "yarn_original_max_position_embeddings yarn_truncate yarn_global_attn_only"
    ),
    "MLP, norms and unembedding": _words(
        "act_fn gated_mlp num_experts experts_per_token norm_topk_prob parallel_attn_mlp normalization_type eps "
        "final_rms uses_rms_norm layer_norm_folding post_embedding_ln use_normalization_before_and_after "
        "tie_word_embeddings output_logits_soft_cap"
    ),
    "Hooks": _words("use_attn_result use_split_qkv_input use_attn_in use_hook_mlp_in use_hook_tokens"),
    "Texts": _words(
        "tokenizer_name default_prepend_bos tokenizer_prepends_bos trust_remote_code decoder_start_token_id"
    ),
    "Weights and devices": _words(
        "init_weights init_mode initializer_range seed dtype device n_devices load_in_4bit quantization_method "
        "model_name original_architecture from_checkpoint checkpoint_index checkpoint_label_type checkpoint_value"
    ),
}
"""Fields of `HookedTransformerConfig`."""

# ---- what is said of them

_ROWS = "in a layer of experts it has a row for each token of each expert, expert by expert"
DIFFERENT: dict[str, dict[str, str]] = {
    "members": {
        "__init__": (
            "takes a `ModelConfig`, a classic config or a dict of its fields; no `move_to_device`: the model is built "
            "where the config says. `generator` and `init_weights` are new"
        ),
        "from_pretrained": (
            "is `load_checkpoint`: [checkpoints](formats.md) of masked diffusion models, Llama and Qwen, from a folder "
            "or the hub, and its arguments. Weights come as they were trained: `fold_ln`, `center_writing_weights`, "
            "`center_unembed` and `fold_value_biases` are False"
        ),
        "forward": "see the arguments below",
        "loss_fn": (
            "a causal model's is the same. A masked diffusion model's is at its mask tokens and needs the true tokens "
            "as `targets`"
        ),
        "input_to_embed": "takes no `past_kv_cache`; of what it returns, the `shortformer_pos_embed` is always None",
        "run_with_hooks hooks": "a name that no hook has, or a filter that selects none, is an error",
        "add_hook add_perma_hook": (
            "a name that no hook has, or a filter that selects none, is an error; so is a hook that returns another "
            "shape"
        ),
        "run_with_cache get_caching_hooks add_caching_hooks": (
            "entries own their memory, unknown names and empty filters are errors, and without a filter the optional "
            "hooks are left out unless switched on"
        ),
        "cache_all cache_some": "deprecated by TransformerLens; entries own their memory",
        "check_hooks_to_add": "checks nothing: optional hooks need no switch",
        "set_use_attn_result set_use_split_qkv_input set_use_attn_in set_use_hook_mlp_in": (
            "says whether a cache of *all* hooks includes these; hooking one by name works without"
        ),
        "generate": (
            "causal models only, see `denoise` for the others. Needs an `input`, takes no `padding_side` (texts are "
            "padded on the left), and `use_past_kv_cache` changes nothing: it is False, and every pass is over whole "
            "sequences"
        ),
        "set_tokenizer": (
            "leaves the tokenizer as it is: special tokens that it lacks are not made up from others. More tokens than "
            "the embedding has rows are an error"
        ),
        "to_tokens": (
            "`truncate` is False: what is too long for the model is an error there, not cut in silence. BOS is "
            "prepended where the tokenizer does so, or `cfg.default_prepend_bos` says so, as in a classic config"
        ),
        "tokens_to_residual_directions": (
            "the final norm's gain is included, so that contributions add up to the logit without folding"
        ),
        "b_in": (
            "in a gated MLP it is added before the gate multiplies, the classic one after; `load_state_dict` moves a "
            "classic one into `b_out`"
        ),
        "fold_layer_norm": (
            "works on the model, in place, and takes no `state_dict`. Weights that read a norm are not centred (no "
            "`center_weights`), and norms keep a gain of 1 and a bias of 0"
        ),
        "center_writing_weights center_unembed fold_value_biases": (
            "works on the model, in place, and takes no `state_dict`; what would change the outputs is refused"
        ),
        "process_weights_": (
            "`center_writing_weights` is None: where it changes nothing, that is with LayerNorm. `fold_value_biases` "
            "is new, `refactor_factored_attn_matrices` gone. Norms keep a gain of 1 and a bias of 0"
        ),
        "to": "as torch's, a device and a dtype in one call included; `print_details` prints nothing",
        "cfg": "a frozen `ModelConfig`: build a new model for another one, and use `set_use_…` for the switches",
    },
    "arguments": {
        "prepend_bos": (
            "None is `cfg.default_prepend_bos`, which does what the tokenizer does by itself, but for a classic config"
        ),
        "attention_mask": (
            "in bidirectional attention, too, nothing reads what it marks as padding, where the classic model ignores "
            "it; padding of texts is found without"
        ),
        "return_type": "anything but these four is an error; `loss` of a masked diffusion model needs `targets`",
    },
    "hooks": {
        (
            "blocks.{l}.attn.q_norm.hook_scale blocks.{l}.attn.q_norm.hook_normalized "
            "blocks.{l}.attn.k_norm.hook_scale blocks.{l}.attn.k_norm.hook_normalized"
        ): (
            "has a row for each head of each position, `[batch pos head …]`; `hook_q_normalized` and "
            "`hook_k_normalized` are new: what rotates, gain included"
        ),
        "hook_pos_embed": "there under learned and sinusoidal positions only; under ALiBi the classic one never fires",
        "blocks.{l}.hook_attn_in": (
            "not there with grouped keys. Edits of it reach `hook_q_input` and its kin, which in the classic model "
            "replace it"
        ),
        "blocks.{l}.hook_mlp_out": "there with an MLP only; in the classic model it never fires without",
        "blocks.{l}.ln1.hook_scale blocks.{l}.ln1.hook_normalized": (
            "see the shared residual stream, also while `hook_attn_in`, `hook_q_input` or its kin make copies of it"
        ),
        "blocks.{l}.mlp.hook_pre blocks.{l}.mlp.hook_post": _ROWS,
        "blocks.{l}.mlp.hook_pre_linear": f"`b_in` included, if there is one; {_ROWS}",
        "blocks.{l}.mlp.hook_expert_weights": (
            "what each expert's output is multiplied by, `[batch pos expert]`, 0 for those not chosen; scores are "
            "sigmoids. `hook_router`, before them, and `hook_expert_out` are new"
        ),
        "blocks.{l}.attn.hook_attn_scores": "the lowest finite number where attention is not allowed, not −∞",
    },
    "fields": {
        "attn_only": "follows from `d_mlp`, which is None without an MLP; read from a classic config",
        "d_mlp": "None is no MLP; in a classic config it is 4 `d_model`",
        "n_key_value_heads": "`n_heads` where the classic one is None",
        "normalization_type": (
            "RMS by default, `LN` in a classic config; `LNPre` and `RMSPre` are read as `LN` and `RMS` with a gain of 1"
        ),
        "act_fn": "`relu`, `gelu`, `gelu_new` and `silu`",
        "dtype": "also by its name",
        "device": "the CPU by default",
        "default_prepend_bos": (
            "None by default: what the tokenizer does by itself; in a classic config True, if the tokenizer has a BOS "
            "token"
        ),
        "use_attn_result use_split_qkv_input use_attn_in use_hook_mlp_in": (
            "whether a cache of *all* hooks includes these"
        ),
    },
}
"""What is other than it was, of names that are there; a key holds one name or several."""

_SOURCE = "says where weights come from; not kept"
_SCALING = "is in `rotary_scaling`, for `linear`, `llama3` (by parts) and `yarn`; not read from a classic config"

ABSENT: dict[str, dict[str, str]] = {
    "members": {
        "from_pretrained_no_processing": "`from_pretrained` leaves weights as they were trained",
        "init_weights": "weights are drawn when a model is built; build another one, with a `generator` of its own",
        "load_and_process_state_dict": "`load_state_dict`, then `process_weights_`",
        "fill_missing_keys": "`load_state_dict(…, strict=False)` says what is missing",
        "load_sample_training_dataset sample_datapoint dataset": "no data sets are fetched; use `datasets`",
        "get_pos_offset": "there is no key/value cache to be offset from",
        "get_residual": "`input_to_embed`",
        "generate_stream": "`generate` a few tokens at a time",
        "set_ungroup_grouped_query_attention": (
            "`hook_k` and `hook_v` have one slice per key/value head, always; `W_K`, `W_V` and their biases have one "
            "per query head"
        ),
        "refactor_factored_attn_matrices": "`QK` and `OV` are `FactoredMatrix`, whose `svd` has no choice of factors",
        "move_model_modules_to_device": "`to`, or `load_checkpoint(…, device_map=…)` for several GPUs",
    },
    "arguments": {
        "shortformer_pos_embed": "no shortformer positions; `position` has the schemes that are there",
        "past_kv_cache": "every pass is over whole sequences, so that all hooks see all positions",
    },
    "hooks": {
        "hook_tokens": "edit the token ids before the call",
        "unembed.hook_in": "`ln_final.hook_normalized`, times the gain `ln_final.w`, plus the bias `ln_final.b`",
        "unembed.hook_out": "the logits are what the model returns",
        "embed.ln.hook_scale embed.ln.hook_normalized": "no norm after the embedding",
        (
            "blocks.{l}.ln1_post.hook_scale blocks.{l}.ln1_post.hook_normalized blocks.{l}.ln2_post.hook_scale "
            "blocks.{l}.ln2_post.hook_normalized"
        ): "norms are before attention and MLP only",
        "blocks.{l}.attn.hook_attn_input": "no shortformer positions",
        "blocks.{l}.mlp.hook_mid blocks.{l}.mlp.ln.hook_scale blocks.{l}.mlp.ln.hook_normalized": (
            "no activation functions with a norm (`solu_ln`)"
        ),
        "blocks.{l}.mlp.hook_expert_indices": "where `hook_expert_weights` is not 0",
        (
            "blocks.{l}.mlp.experts.{e}.hook_gate blocks.{l}.mlp.experts.{e}.hook_pre "
            "blocks.{l}.mlp.experts.{e}.hook_post"
        ): "`blocks.{l}.mlp.hook_pre` and its kin have the rows of all experts (`MoE.rows` says whose)",
    },
    "fields": {
        "attention_dir": "is `attention`; read from a classic config",
        "positional_embedding_type": (
            "is `position`, where `standard` is `learned`, `rotary` is `rope` and `relative_positional_bias` is "
            "`t5_bias`; read from a classic config"
        ),
        "n_params": "`model.n_params_total` counts all parameters",
        "use_attn_scale attn_scale": "scores are divided by √`d_head`",
        "scale_attn_by_inverse_layer_idx attn_scores_soft_cap clip_qkv use_logn_attn train_seq_length": (
            "no other scaling of scores"
        ),
        "use_local_attn window_size attn_types": "no local attention",
        "use_attention_sinks": "no attention sinks",
        "ungroup_grouped_query_attention": "keys and values are grouped in hooks, and ungrouped in stacked weights",
        (
            "rotary_scaling_factor use_NTK_by_parts_rope NTK_by_parts_low_freq_factor NTK_by_parts_high_freq_factor "
            "NTK_by_parts_factor NTK_original_ctx_len use_yarn_rope yarn_factor yarn_attention_factor yarn_beta_fast "
            "yarn_beta_slow yarn_original_max_position_embeddings yarn_truncate"
        ): _SCALING,
        "rotary_base_local yarn_global_attn_only": "no local attention",
        "use_dynamic_ntk_rope": "angles do not depend on the length of a text",
        "num_experts experts_per_token": "is in `experts`; not read from a classic config",
        "norm_topk_prob": "the weights of a token's experts add up to `experts.routed_scale`, unless there is but one",
        "parallel_attn_mlp": "the MLP reads what attention wrote",
        "final_rms uses_rms_norm": "`normalization_type` is that of all norms",
        "layer_norm_folding": "a folded norm has a gain of 1 and a bias of 0",
        "post_embedding_ln use_normalization_before_and_after": "norms are before attention, MLP and unembedding only",
        "output_logits_soft_cap": "logits are not capped",
        "use_hook_tokens": "edit the token ids before the call",
        "tokenizer_name": "give the tokenizer to the model; checkpoints bring theirs",
        "tokenizer_prepends_bos": "is seen from what the tokenizer returns",
        "trust_remote_code": "no code of a checkpoint is run",
        "decoder_start_token_id": "no encoder-decoder models",
        "init_weights": "is an argument of the model",
        "init_mode": "weights are drawn from a normal distribution of `initializer_range`",
        "seed": "read from a classic config, and draws the weights alone; else give a `generator`",
        "n_devices": "`load_checkpoint(…, device_map=…)`",
        "load_in_4bit quantization_method": "no quantised weights",
        (
            "model_name original_architecture from_checkpoint checkpoint_index checkpoint_label_type checkpoint_value"
        ): _SOURCE,
    },
}
"""Why names are not there, and what to use instead; a key holds one name or several."""

# ---- what is there


def example_models() -> list[HookedTransformer]:
    """Return small models that together have every hook: causal with learned positions, LayerNorm and an MLP;
    bidirectional with RoPE, a gated MLP and grouped keys; and the same with experts in its last layer."""
    sizes: dict[str, Any] = {
        "d_model": 12,
        "n_heads": 4,
        "n_layers": 2,
        "d_head": 6,
        "d_mlp": 10,
        "d_vocab": 13,
        "n_ctx": 7,
    }
    causal = ModelConfig(**sizes, attention="causal", position="learned", normalization_type="LN")
    gated = ModelConfig(**sizes, n_key_value_heads=2, gated_mlp=True, act_fn="silu", mask_token_id=12, use_qk_norm=True)
    experts = {"num_experts": 3, "experts_per_token": 2, "d_expert": 5, "n_shared": 1, "n_dense_layers": 1}
    mixed = ModelConfig.model_validate(gated.model_dump() | {"experts": experts})
    return [HookedTransformer(cfg) for cfg in (causal, gated, mixed)]


models = cache(example_models)


def pattern_of(hook: str) -> str:
    """Return a hook's name with `{l}` for its layer."""
    return re.sub(r"^blocks\.\d+\.", "blocks.{l}.", hook)


def signature_of(parameters: str) -> inspect.Signature:
    """Return a signature from its source."""
    return inspect.signature(eval(f"lambda {parameters}: None"))


def own_signature(name: str) -> inspect.Signature | None:
    """Return the signature of a method of ours, without `self`; None for what is no method."""
    method = getattr(HookedTransformer, name)
    if not callable(method):
        return None
    found = inspect.signature(method)
    bound = inspect.ismethod(method)
    return found if bound else found.replace(parameters=list(found.parameters.values())[1:])


def not_taken(classic: str, name: str) -> list[str]:
    """Return what a classic signature takes and our method of that name does not, or not by that default; nothing of
    what may hide behind `**kwargs`."""
    ours = own_signature(name)
    theirs = signature_of(classic).parameters.values()
    if ours is None:
        return []
    named = [one for one in theirs if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    anything = any(one.kind is one.VAR_KEYWORD for one in ours.parameters.values())
    missing = [one.name for one in named if one.name not in ours.parameters and not anything]
    changed = [
        f"{one.name}={_shown(ours.parameters[one.name].default)}"
        for one in named
        if one.name in ours.parameters and not _same_default(one.default, ours.parameters[one.name].default)
    ]
    return missing + changed


def _shown(default: Any) -> str:
    return "…" if default is inspect.Parameter.empty else repr(default)


def _same_default(classic: Any, ours: Any) -> bool:
    return classic == ours or (classic == [] and ours in ((), None))


def is_ours(name: str) -> bool:
    """Tell whether our class, or a model of it, has a name that a bare torch module has not, or not like that."""
    kept = object()
    found = inspect.getattr_static(HookedTransformer, name, kept)
    if found is kept:
        return any(hasattr(model, name) for model in models())
    return found is not inspect.getattr_static(nn.Module, name, kept)


def present() -> dict[str, set[str]]:
    """Return the classic names of every kind that are there."""
    known = names()
    arguments = inspect.signature(HookedTransformer.forward).parameters
    return {
        "members": {name for name in known["members"] if is_ours(name)},
        "arguments": {name for name in known["arguments"] if name in arguments},
        "hooks": {pattern_of(hook) for model in models() for hook in model.hook_dict} & set(known["hooks"]),
        "fields": {name for name in known["fields"] if hasattr(models()[0].cfg, name)},
    }


# ---- the tables


def names() -> dict[str, list[str]]:
    """Return all classic names of every kind."""
    return {
        "members": [name for group in MEMBERS.values() for name in group] + ATTRIBUTES,
        "arguments": [name for name in signature_of(MEMBERS["Run"]["forward"]).parameters],
        "hooks": [name for group in HOOKS.values() for name in group],
        "fields": [name for group in FIELDS.values() for name in group],
    }


def expanded(reasons: Mapping[str, str]) -> dict[str, str]:
    """Return a reason for each name of keys that hold several."""
    return {name: reason for several, reason in reasons.items() for name in several.split()}


@dataclass(frozen=True)
class Fate:
    """What became of a classic name."""

    status: str
    """`same`, `different` or `not there`."""
    reason: str = ""


def fates(kind: str) -> dict[str, Fate]:
    """Return what became of every classic name of a kind; see :func:`problems` for what is wrong with it."""
    there, different, absent = present()[kind], expanded(DIFFERENT[kind]), expanded(ABSENT[kind])
    found = {}
    for name in names()[kind]:
        if name not in there:
            found[name] = Fate("not there", absent.get(name, ""))
        else:
            found[name] = Fate("different", different[name]) if name in different else Fate("same")
    return found


def problems() -> list[str]:
    """Return what the data above lacks or has too much: names without a reason, and reasons without need."""
    signatures = {name: signature for group in MEMBERS.values() for name, signature in group.items()}
    found = []
    for kind, known in names().items():
        there, different, absent = present()[kind], expanded(DIFFERENT[kind]), expanded(ABSENT[kind])
        found += [f"{kind}: {name} is no classic name" for name in [*different, *absent] if name not in known]
        found += [f"{kind}: {name} is twice" for name in known if known.count(name) > 1]
        found += [
            f"{kind}: {name} is not there, and no reason is given"
            for name in known
            if name not in there | absent.keys()
        ]
        found += [f"{kind}: {name} is there, and a reason why not is given" for name in absent if name in there]
        found += [
            f"{kind}: {name} is called different, and is not there"
            for name in different
            if name in known and name not in there
        ]
        if kind == "members":
            for name in sorted(there & signatures.keys() - {"forward"}):  # whose arguments have a table of their own
                found += [f"{kind}: {name} {wrong}" for wrong in _misdescribed(name, signatures[name], different)]
    return found


def _misdescribed(name: str, signature: str, different: Mapping[str, str]) -> list[str]:
    """Say which arguments a method does not take as the classic one did, and no reason names; or a reason names, and it
    does."""
    other = {one.partition("=")[0]: one for one in not_taken(signature, name)}
    named = set(re.findall(r"`(\w+)`", different.get(name, ""))) & signature_of(signature).parameters.keys()
    wrong = [f"is other in {other[argument]}, and no reason names it" for argument in other if argument not in named]
    return wrong + [f"takes {argument} as it did, and a reason names it" for argument in sorted(named - other.keys())]


def rows(fate_of: Mapping[str, Fate], chosen: Iterable[str]) -> list[str]:
    """Return the rows of a table: names of one fate share a row, in the order of the first."""
    together: dict[Fate, list[str]] = {}
    for name in chosen:
        together.setdefault(fate_of[name], []).append(name)
    return [
        f"| {', '.join(f'`{name}`' for name in same)} | {fate.status} | {fate.reason} |"
        for fate, same in together.items()
    ]


HEADINGS = {
    "members": ("Methods and properties", {**MEMBERS, "Attributes": ATTRIBUTES}),
    "arguments": ("Arguments of the forward pass", {"": names()["arguments"]}),
    "hooks": ("Hooks", HOOKS),
    "fields": ("Config", FIELDS),
}


def tables() -> str:
    """Return the tables, as Markdown.

    Raises:
        ValueError: a reason is missing, or one is not needed.
    """
    if wrong := problems():
        raise ValueError("\n".join(wrong))
    lines = []
    for kind, (heading, groups) in HEADINGS.items():
        fate_of = fates(kind)
        lines += [f"### {heading}", ""]
        for group, chosen in groups.items():
            lines += [f"**{group}**", ""] if group else []
            lines += ["| classic name | here | |", "|---|---|---|", *rows(fate_of, chosen), ""]
    return "\n".join(lines)


def rewritten(page: str) -> str:
    """Return the page with the tables of today between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
