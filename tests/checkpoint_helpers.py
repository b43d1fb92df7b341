"""Tiny checkpoints that look like the released ones, written without the package, and what transformers makes of them.

made = write_checkpoint(folder, "dream", num_key_value_heads=1)
made.config, made.tensors                          # what config.json and the safetensors hold
reference_logits(made, tokens)                     # Llama's or Qwen2's, with a full mask where attention is full
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import seeded
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

FORMATS = ("llada", "dream", "llama", "qwen2", "qwen3", "a2d-qwen3", "a2d-qwen2", "a2d-llama", "sdar")
FORMATS += ("nemotron_labs_diffusion",)
FULL = ("llada", "dream", "a2d-qwen3", "a2d-qwen2", "a2d-llama", "nemotron_labs_diffusion")
"""Those whose attention is bidirectional."""
MDMS = (*FULL, "sdar")
SHIFTED = ("dream", "llama", "qwen2", "qwen3")
BIASED = ("dream", "qwen2", "a2d-qwen2")
QK_NORMS = ("qwen3", "a2d-qwen3", "sdar")
SENTENCES = [
    "Mary Lee Pfeiffer is the mother of Tom Cruise.",
    "Tom Cruise's mother is Mary Lee Pfeiffer, and his father is Thomas Cruise Mapother III.",
    "Zoë Müller's father is José Álvarez-O'Brien.",
    "The parents of every child are named here: mother, father, daughter, son.",
]
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_BPE = 300
"""Size of the byte-level BPE vocabulary, before special tokens."""
SPECIAL_TOKENS = {
    "llada": ["<|startoftext|>", "<|endoftext|>", "[gMASK]", "<|mdm_mask|>"],
    "dream": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"],
    "llama": ["<|begin_of_text|>", "<|end_of_text|>"],
    **{format: ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] for format in ("qwen2", "qwen3")},
    **{
        format: ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
        for format in ("a2d-qwen3", "a2d-qwen2", "a2d-llama")
    },
    "sdar": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"],
    "nemotron_labs_diffusion": ["<s>", "</s>", "<SPECIAL_9>", "<SPECIAL_10>"],
}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
VOCAB = 320
"""Rows of the embedding: more than there are tokens, as released."""

LLADA_CONFIG: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 16,
    "embedding_dropout": 0.0,
    "embedding_size": VOCAB,
    "eos_token_id": N_BPE + 1,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": N_BPE + 3,
    "max_sequence_length": 64,
    "mlp_hidden_size": 24,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "pad_token_id": N_BPE + 1,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "torch_dtype": "float32",
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": VOCAB,
    "weight_tying": False,
}
HUGGING_FACE_CONFIG: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": VOCAB,
}
QWEN2_CONFIG: dict[str, Any] = {
    **HUGGING_FACE_CONFIG,
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": N_BPE,
    "eos_token_id": N_BPE,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "sliding_window": 131072,
    "transformers_version": "4.40.1",
    "use_mrope": False,
    "use_sliding_window": False,
}
RELEASED: dict[str, dict[str, Any]] = {
    "llada": LLADA_CONFIG,
    "qwen2": QWEN2_CONFIG,
    "dream": {
        **QWEN2_CONFIG,
        "architectures": ["DreamModel"],
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "mask_token_id": N_BPE + 4,
        "model_type": "Dream",
        "pad_token_id": N_BPE,
        "rope_scaling": None,
        "sliding_window": None,
    },
    "llama": {
        **HUGGING_FACE_CONFIG,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": N_BPE,
        "eos_token_id": N_BPE + 1,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
    },
}
QWEN3_CONFIG: dict[str, Any] = {
    **{name: value for name, value in QWEN2_CONFIG.items() if name != "use_mrope"},
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 6,
    "model_type": "qwen3",
    "rope_scaling": None,
    "sliding_window": None,
}
A2D: dict[str, Any] = {"mask_token_id": N_BPE + 3, "pad_token_id": N_BPE, "sliding_window": None}
RELEASED |= {
    "qwen3": QWEN3_CONFIG,
    "a2d-qwen3": {**QWEN3_CONFIG, **A2D, "architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3"},
    "a2d-qwen2": {**QWEN2_CONFIG, **A2D, "architectures": ["A2DQwen2LMHeadModel"], "model_type": "a2d-qwen2"},
    "a2d-llama": {
        **RELEASED["llama"],
        **A2D,
        "eos_token_id": N_BPE,
        "architectures": ["A2DLlamaLMHeadModel"],
        "model_type": "a2d-llama",
    },
    "sdar": {
        **QWEN3_CONFIG,
        "architectures": ["SDARForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
        "block_size": 4,
        "debug": False,
        "ep_size": 1,
        "fuse_cross_entropy": True,
        "mask_token_id": N_BPE + 3,
        "micro_forward": False,
        "model_type": "sdar",
        "skip_checkpoint": False,
        "use_deepep": False,
    },
    "nemotron_labs_diffusion": {
        **RELEASED["llama"],
        "architectures": ["NemotronLabsDiffusionModel"],
        "block_size": 32,
        "dlm_paradigm": "bidirectional",
        "head_dim": 6,
        "mask_token_id": N_BPE + 2,
        "mlp_bias": False,
        "model_type": "nemotron_labs_diffusion",
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "rope_theta": 1000000.0,
    },
}
"""config.json as released, with every size made small."""


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    format: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def hugging_face_shapes(config: dict[str, Any], *, bias: bool, qk_norm: bool) -> dict[str, tuple[int, ...]]:
    d_model, d_mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    d_head = config.get("head_dim") or d_model // heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, d_model),
        "model.norm.weight": (d_model,),
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for name, width in (("q", heads * d_head), ("k", kv_heads * d_head), ("v", kv_heads * d_head)):
            shapes[f"{block}.self_attn.{name}_proj.weight"] = (width, d_model)
            if bias:
                shapes[f"{block}.self_attn.{name}_proj.bias"] = (width,)
        if qk_norm:
            shapes |= {f"{block}.self_attn.{name}_norm.weight": (d_head,) for name in ("q", "k")}
        shapes |= {
            f"{block}.self_attn.o_proj.weight": (d_model, heads * d_head),
            f"{block}.mlp.gate_proj.weight": (d_mlp, d_model),
            f"{block}.mlp.up_proj.weight": (d_mlp, d_model),
            f"{block}.mlp.down_proj.weight": (d_model, d_mlp),
            f"{block}.input_layernorm.weight": (d_model,),
            f"{block}.post_attention_layernorm.weight": (d_model,),
        }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, d_model)
    return shapes


def as_hugging_face(config: dict[str, Any]) -> dict[str, Any]:
    """A LLaDA config under Llama's names; others as they are."""
    if config["model_type"] != "llada":
        return config
    d_mlp, kv_heads = config["mlp_hidden_size"], config["n_kv_heads"]
    return {
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config["n_heads"] if kv_heads is None else kv_heads,
        "intermediate_size": config["mlp_ratio"] * config["d_model"] if d_mlp is None else d_mlp,
        "vocab_size": config["embedding_size"] or config["vocab_size"],
        "max_position_embeddings": config["max_sequence_length"],
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "tie_word_embeddings": config["weight_tying"],
    }


def name_in(format: str, name: str) -> str:
    """A Llama tensor's name in a format."""
    if format == "nemotron_labs_diffusion":
        return name.replace("model.", "encoder.").replace("lm_head.", "diffusion_head.")
    if format != "llada":
        return name
    for theirs, ours in (
        ("model.embed_tokens", "model.transformer.wte"),
        ("model.norm", "model.transformer.ln_f"),
        ("lm_head", "model.transformer.ff_out"),
        ("model.layers.", "model.transformer.blocks."),
        ("self_attn.o_proj", "attn_out"),
        ("self_attn.", ""),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ff_norm"),
        ("mlp.gate_proj", "ff_proj"),
        ("mlp.up_proj", "up_proj"),
        ("mlp.down_proj", "ff_out"),
    ):
        name = name.replace(theirs, ours)
    return name


def random_tensors(format: str, config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Weights large enough that every one of them shows in the logits; no gain is 1 and no bias 0."""
    generator = seeded(seed)
    shapes = hugging_face_shapes(as_hugging_face(config), bias=format in BIASED, qk_norm=format in QK_NORMS)
    tensors = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        drawn = 1 + 0.3 * drawn if "norm" in name else 0.3 * drawn
        tensors[name_in(format, name)] = drawn
    return tensors


def write_tensors(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """`model.safetensors`, or so many shards and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    placed = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[shard::shards]
        save_file({name: tensors[name] for name in chosen}, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(chosen, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": placed})


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of the config.json of a checkpoint on purpose."""
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | changes)
    (folder / "digests.json").unlink(missing_ok=True)


def write_checkpoint(
    folder: Path,
    format: str,
    *,
    shards: int = 1,
    tokenizer: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    edit: Callable[[dict[str, Any]], None] | None = None,
    **changes: Any,
) -> Checkpoint:
    """A folder as released, with random weights.

    Args:
        edit: Changes config.json after the weights are drawn, so that the two may disagree.
        changes: Fields of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**RELEASED[format], **changes}
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(format, config, seed).items()}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if edit is not None:
        edit(config)
    write_json(folder / "config.json", config)
    write_tensors(folder, tensors, shards)
    if tokenizer:
        write_tokenizer(folder, format)
    return Checkpoint(folder, format, config, tensors)


def reference_logits(made: Checkpoint, tokens: Tensor, *, converted: bool = False) -> Tensor:
    """transformers' logits for the same weights. LLaDA's and Nemotron's are Llama's, Dream's Qwen2's and SDAR's
    Qwen3's, with a mask that hides nothing or, of SDAR, later blocks; as are those of a causal model that was
    `converted` to be bidirectional."""
    config = as_hugging_face(made.config)
    peer_classes: tuple[Any, Any] = (LlamaConfig, LlamaForCausalLM)
    if made.format in QK_NORMS:
        peer_classes = (Qwen3Config, Qwen3ForCausalLM)
    elif made.format in BIASED:
        peer_classes = (Qwen2Config, Qwen2ForCausalLM)
    config_class, model_class = peer_classes
    sizes = {
        name: config[name]
        for name in HUGGING_FACE_CONFIG
        if name in config and name not in ("rope_theta", "torch_dtype")
    }
    sizes |= {"head_dim": config["head_dim"]} if "head_dim" in config else {}
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta")}
    rope |= {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope.pop("llama_4_scaling_beta", None)
    peer = model_class(config_class(**sizes, rope_parameters=rope)).eval()
    held = {name: tensor.float() for name, tensor in made.tensors.items()}
    named = {name: held[name_in(made.format, name)] for name in peer.state_dict() if name_in(made.format, name) in held}
    assert len(named) == len(held)
    missing, unexpected = peer.load_state_dict(named, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"} and bool(missing) == config["tie_word_embeddings"]
    peer.tie_weights()
    mask = None
    if converted or made.format in MDMS:
        block = torch.arange(tokens.shape[1]) // (
            made.config["block_size"] if made.format == "sdar" else len(tokens[0])
        )
        hidden = block[:, None] < block
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        mask = mask.expand(len(tokens), 1, -1, -1)
    with torch.no_grad():
        return peer(input_ids=tokens, attention_mask=mask).logits


# ---- tokenizers


def train_bpe(sentences: Sequence[str] = SENTENCES, *, qwen2: bool = True, size: int = N_BPE) -> Tokenizer:
    """A byte-level BPE of at most `size` tokens; `qwen2` normalises and splits as Qwen2 does."""
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not qwen2)
    tokenizer.pre_tokenizer = by_bytes
    if qwen2:
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer


def write_tokenizer(folder: Path, format: str, *, special: Sequence[str] | None = None) -> Tokenizer:
    """A tokenizer's files as released: `tokenizer.json`, but Dream's as vocab.json, merges.txt and a class of its own.

    Args:
        special: Special tokens, from id `N_BPE` on; default: the format's.
    """
    special = SPECIAL_TOKENS[format] if special is None else special
    tokenizer = train_bpe(qwen2=format in ("dream", "qwen2"))
    assert tokenizer.get_vocab_size() == N_BPE
    bare = json.loads(tokenizer.to_str())["model"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if format == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", pair=f"{special[0]} $A $B", special_tokens=[(special[0], N_BPE)]
        )
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False, "model_max_length": 64}
    settings |= {
        "llada": {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "dream": {"bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        "nemotron_labs_diffusion": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
    }.get(format, {"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    if format != "dream":
        settings["tokenizer_class"] = "Qwen2Tokenizer" if format == "qwen2" else "PreTrainedTokenizerFast"
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        added = {token: N_BPE + index for index, token in enumerate(special)}
        settings |= {
            "mask_token": "<|mask|>",
            "tokenizer_class": "DreamTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
            "additional_special_tokens": list(special[1:]),
            "added_tokens_decoder": {
                str(index): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token, index in added.items()
            },
        }
        write_json(folder / "vocab.json", bare["vocab"])
        merges = "".join(f"{' '.join(pair)}\n" for pair in bare["merges"])
        (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
        write_json(folder / "added_tokens.json", added)
    write_json(folder / "tokenizer_config.json", settings)
    return tokenizer


MEASURE = """
import json, sys
from mdm_interp.checkpoints import load_checkpoint

def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

options = json.loads(sys.argv[3])
load_checkpoint(sys.argv[1], **options)
before = kib("VmRSS:")
model = load_checkpoint(sys.argv[2], **options)
weights = sum(parameter.nbytes for parameter in model.parameters())
print((kib("VmHWM:") - before) * 1024, weights, kib("VmHWM:") > before + weights / 2048)
"""


def assert_holds_weights_and_one_shard(small: Path, big: Path, **options: Any) -> None:
    """Loading `big`, in a process that has loaded `small`, takes at most 1.1 times the weights and the largest file."""
    files = [big] if big.is_file() else list(big.glob("*.safetensors"))
    largest = max(path.stat().st_size for path in files)
    command = [sys.executable, "-c", MEASURE, str(small), str(big), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peak, weights, above = done.stdout.split()
    assert above == "True"  # the peak is of this load, not of what the process did before
    assert int(peak) < 1.1 * int(weights) + largest


# ---- LLaDA2, whose experts are a tensor each

LLADA2_CONFIG: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM"},
    "attention_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "max_window_layers": 20,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 6,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_shared_experts": 1,
    "pad_token_id": N_BPE,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 600000,
    "rotary_dim": 4,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "float32",
    "use_bias": False,
    "use_cache": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}
"""config.json of LLaDA2.0-mini, made small."""


def llada2_tensors(seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    config = LLADA2_CONFIG | changes
    d_model, d_head, kv = config["hidden_size"], config["head_dim"], config["num_key_value_heads"]
    q_rows = config["num_attention_heads"] * d_head
    shapes: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (config["vocab_size"], d_model),
        "lm_head.weight": (config["vocab_size"], d_model),
        "model.norm.weight": (d_model,),
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.input_layernorm.weight": (d_model,),
            f"{block}.attention.query_key_value.weight": (q_rows + 2 * kv * d_head, d_model),
            f"{block}.attention.query_layernorm.weight": (d_head,),
            f"{block}.attention.key_layernorm.weight": (d_head,),
            f"{block}.attention.dense.weight": (d_model, q_rows),
            f"{block}.post_attention_layernorm.weight": (d_model,),
        }
        mlps = {"": config["intermediate_size"]}
        if layer >= config["first_k_dense_replace"]:
            mlps = {f"experts.{expert}.": config["moe_intermediate_size"] for expert in range(config["num_experts"])}
            mlps["shared_experts."] = config["moe_intermediate_size"] * config["num_shared_experts"]
            shapes[f"{block}.mlp.gate.weight"] = (config["num_experts"], d_model)
            shapes[f"{block}.mlp.gate.expert_bias"] = (config["num_experts"],)
        for name, width in mlps.items():
            shapes |= {f"{block}.mlp.{name}{way}_proj.weight": (width, d_model) for way in ("gate", "up")}
            shapes[f"{block}.mlp.{name}down_proj.weight"] = (d_model, width)
    generator = seeded(seed)
    drawn = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + x if name.endswith("norm.weight") else x for name, x in drawn.items()}


def write_llada2(folder: Path, shards: int = 1, **changes: Any) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    tensors = llada2_tensors()
    write_tensors(folder, tensors, shards)
    write_json(folder / "config.json", {**LLADA2_CONFIG, **changes})
    return tensors
