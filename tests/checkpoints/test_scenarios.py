"""What is public loads: one row for each kind of released checkpoint, made small, with transformers' logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import (
    N_BPE,
    RELEASED,
    SPECIAL_TOKENS,
    VOCAB,
    Checkpoint,
    reference_logits,
    write_checkpoint,
    write_json,
    write_tensors,
    write_tokenizer,
)
from helpers import random_tokens
from torch.testing import assert_close

from mdm_interp.checkpoints import load_checkpoint
from mdm_interp.errors import UserError


@dataclass(frozen=True)
class Scenario:
    format: str
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of config.json that differ from the format's other tests."""
    shards: int = 1
    dtype: torch.dtype = torch.float32
    edit: Callable[[dict[str, Any]], None] | None = None
    after: Callable[[Checkpoint], Path | None] = lambda made: None
    """What is done to the folder; returns where it then is, if elsewhere."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of load_checkpoint."""


def without(*names: str) -> Callable[[dict[str, Any]], None]:
    def leave_out(config: dict[str, Any]) -> None:
        for name in names:
            config.pop(name)

    return leave_out


def version_5(config: dict[str, Any]) -> None:
    rope = {**(config.pop("rope_scaling", None) or {"rope_type": "default"}), "rope_theta": config.pop("rope_theta")}
    config |= {"rope_parameters": rope, "dtype": config.pop("torch_dtype")}


def linked(made: Checkpoint) -> Path:
    """As the hub's cache has it: names that link to blobs."""
    blobs, snapshot = made.folder / "blobs", made.folder / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in [path for path in made.folder.iterdir() if path.is_file()]:
        path.rename(blobs / f"{path.stem}-blob")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{path.stem}-blob")
    return snapshot


def with_norms_in_float32(made: Checkpoint) -> None:
    mixed = {name: x.float() if "norm" in name or "ln_f" in name else x for name, x in made.tensors.items()}
    write_tensors(made.folder, mixed)


def with_stored_copy(made: Checkpoint) -> None:
    write_tensors(made.folder, {**made.tensors, "lm_head.weight": made.tensors["model.embed_tokens.weight"].clone()})


def with_a_mask_token(made: Checkpoint) -> None:
    write_tokenizer(made.folder, made.format, special=[*SPECIAL_TOKENS[made.format], "<|MASK|>"])


def with_old_buffers(made: Checkpoint) -> None:
    of_layers = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    write_tensors(made.folder, {**made.tensors, **{name: torch.ones(2) for name in of_layers}})


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"max_position_embeddings": 128}
CONVERTED = {"attention": "bidirectional", "readout_shift": -1, "mask_token_id": N_BPE + 3}
BF16 = torch.bfloat16

SCENARIOS = {
    "LLaDA-8B, six shards": Scenario("llada", shards=6),
    "LLaDA-8B in bfloat16": Scenario("llada", shards=2, dtype=BF16),
    "LLaDA with grouped keys": Scenario("llada", {"n_kv_heads": 2}),
    "LLaDA, tied": Scenario("llada", {"weight_tying": True}),
    "LLaDA without an mlp_hidden_size": Scenario("llada", {"mlp_hidden_size": None}),
    "Dream-7B, four shards": Scenario("dream", shards=4),
    "Dream-7B in bfloat16, norms in float32": Scenario("dream", dtype=BF16, after=with_norms_in_float32),
    "DreamOn, DiffuCoder: Dream's class, tied": Scenario("dream", {"tie_word_embeddings": True}),
    "Dream, config of transformers 5": Scenario("dream", edit=version_5),
    "Open-dCoder: a converted Qwen2, tied": Scenario(
        "qwen2",
        {"tie_word_embeddings": True, "auto_map": {"AutoModel": "x.Y"}},
        after=with_a_mask_token,
        options=CONVERTED,
    ),
    "ReFusion: a converted Qwen3": Scenario(
        "qwen3", {"is_causal": False}, after=with_a_mask_token, options={**CONVERTED, "readout_shift": 0}
    ),
    "Llama-2-7B, from before some fields": Scenario(
        "llama",
        {"num_key_value_heads": 4, "rope_theta": 10000.0, "rms_norm_eps": 1e-5},
        edit=without("num_key_value_heads", "rope_theta", "tie_word_embeddings", "rope_scaling", "attention_bias"),
    ),
    "Llama-1, with buffers of RoPE": Scenario("llama", after=with_old_buffers),
    "Llama-3-8B, grouped keys, shards": Scenario("llama", {"num_key_value_heads": 1}, shards=4, dtype=BF16),
    "Llama-3.1-8B, scaled RoPE": Scenario("llama", {"rope_scaling": LLAMA3, **LONG}),
    "Llama-3.2-1B, tied, head_dim said": Scenario(
        "llama", {"rope_scaling": LLAMA3, "head_dim": 4, "tie_word_embeddings": True, **LONG}
    ),
    "Llama-3.1, config of transformers 5": Scenario("llama", {"rope_scaling": LLAMA3, **LONG}, edit=version_5),
    "TinyLlama, one key for all heads": Scenario("llama", {"num_key_value_heads": 1, "rope_theta": 10000.0}),
    "Qwen2.5-0.5B, tied": Scenario("qwen2", {"tie_word_embeddings": True}),
    "Qwen2.5-0.5B, tied, with the copy": Scenario("qwen2", {"tie_word_embeddings": True}, after=with_stored_copy),
    "Qwen2.5-7B, shards": Scenario("qwen2", shards=4, dtype=BF16),
    "Qwen3-0.6B, tied, wide heads": Scenario("qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
    "Qwen3-8B, shards": Scenario("qwen3", shards=5),
    "Qwen3 with yarn": Scenario("qwen3", {"rope_scaling": YARN, "head_dim": 8, **LONG}),
    "A2D-Qwen3-0.6B": Scenario("a2d-qwen3", {"tie_word_embeddings": True}),
    "OPDLM: A2D-Qwen3 by another class": Scenario("a2d-qwen3", {"architectures": ["_A2DQwen3LMHeadModel"]}),
    "A2D-Qwen2.5-0.5B": Scenario("a2d-qwen2", {"tie_word_embeddings": True}),
    "A2D-Llama-3.2": Scenario("a2d-llama", {"rope_scaling": LLAMA3, **LONG}),
    "SDAR-1.7B, blocks of 4": Scenario("sdar", shards=2),
    "SDAR-8B, blocks of 16": Scenario("sdar", {"block_size": 16}),
    "Nemotron-Labs-Diffusion, yarn": Scenario("nemotron_labs_diffusion", shards=2, dtype=BF16),
    "a snapshot of the hub's cache": Scenario("dream", shards=2, after=linked),
}


def test_there_are_thirty() -> None:
    assert len(SCENARIOS) >= 30


@pytest.mark.filterwarnings("ignore:config.json lacks what LlamaForCausalLM documents")
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS.keys())
def test_what_is_public_loads(scenario: Scenario, tmp_path: Path) -> None:
    of, folder = scenario, tmp_path / "made"
    made = write_checkpoint(
        folder, of.format, tokenizer=True, shards=of.shards, dtype=of.dtype, edit=of.edit, **of.changes
    )
    expected_config = {**made.config, **of.changes}  # what an edit leaves out is what it would say
    place = of.after(made) or folder
    options = {"dtype": "float32", **of.options}
    model = load_checkpoint(place, **options)
    tokens = random_tokens(batch=2, pos=24, d_vocab=VOCAB)
    whole = Checkpoint(folder, of.format, {**RELEASED[of.format], **expected_config}, made.tensors)
    expected = reference_logits(whole, tokens, converted="attention" in of.options)
    with torch.no_grad():
        assert_close(model(tokens), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.3
    assert model.tokenizer is not None
    assert (model.cfg.mask_token_id is None) == model.cfg.is_causal
    stored = load_checkpoint(place, **of.options).cfg.dtype
    assert stored == of.dtype


@pytest.mark.parametrize(
    ("quantised", "tensor", "says"),
    [
        ({}, torch.zeros(16, 16).to(torch.float8_e4m3fn), "F8_E4M3"),
        ({"quant_method": "gptq", "bits": 4}, torch.zeros(2, 16, dtype=torch.int32), "gptq"),
        ({"quant_method": "awq", "bits": 4}, torch.zeros(2, 16, dtype=torch.int32), "awq"),
    ],
    ids=["F8", "GPTQ", "AWQ"],
)
def test_what_is_quantised_is_refused_by_name(
    quantised: dict[str, Any], tensor: torch.Tensor, says: str, tmp_path: Path
) -> None:
    made = write_checkpoint(tmp_path, "qwen2")
    if quantised:
        config = json.loads((tmp_path / "config.json").read_text())
        write_json(tmp_path / "config.json", {**config, "quantization_config": quantised})
    write_tensors(tmp_path, {**made.tensors, "model.layers.0.self_attn.q_proj.weight": tensor})
    with pytest.raises(UserError, match=says) as refused:
        load_checkpoint(tmp_path)
    assert len(str(refused.value)) < 500
