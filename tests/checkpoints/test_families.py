"""What sets families apart beyond Llama's shape: normalised heads, blocks, scaled rotary embedding, fused tensors."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoint_helpers import (
    LLADA2_CONFIG,
    N_BPE,
    RELEASED,
    VOCAB,
    assert_holds_weights_and_one_shard,
    llada2_tensors,
    reference_logits,
    write_checkpoint,
    write_json,
    write_llada2,
    write_tensors,
    write_tokenizer,
)
from cli_helpers import Ended
from helpers import EXPERTS, random_model, random_tokens, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_helpers import FACTS, tiny_probe
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mdm_interp import viz
from mdm_interp.checkpoints import FORMATS, load_checkpoint, save_checkpoint
from mdm_interp.config import ModelConfig
from mdm_interp.data.prompts import load_facts, make_prompts
from mdm_interp.errors import UserError
from mdm_interp.experiments.analysis import CheckpointAnalysis, discover
from mdm_interp.experiments.results import CheckpointOrigin, Result
from mdm_interp.experiments.subjects import Probe, open_probe
from mdm_interp.interventions import ablate_routes, ablate_storage, project_even_routes, transplant_routes
from mdm_interp.models.positions import Rope
from mdm_interp.models.transformer import HookedTransformer

TOLERANCE = 1e-4


def logits_of(model: HookedTransformer, tokens: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **more)


# ---- scaled rotary embedding

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "Llama 3.1": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, all said": {
        **{"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16, "beta_fast": 8.0},
        **{"beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
    },
    "yarn, its factor said": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.3}
    },
}


@pytest.mark.parametrize("format", ["llama", "qwen3", "a2d-qwen2", "dream"])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_scaled_rope_equals_transformers(format: str, rope: dict[str, Any], spelling: str, tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", format, max_position_embeddings=128, head_dim=8)
    theta = {"rope_theta": plain.config["rope_theta"]} if spelling == "rope_parameters" else {}
    said: dict[str, Any] = {spelling: {**rope, **theta}}
    made = write_checkpoint(tmp_path / "scaled", format, max_position_embeddings=128, head_dim=8, **said)
    tokens = random_tokens(pos=90, d_vocab=VOCAB)
    model = load_checkpoint(tmp_path / "scaled")
    expected = reference_logits(made, tokens)
    assert_close(logits_of(model, tokens), expected, atol=TOLERANCE, rtol=0)
    assert_close(logits_of(model, tokens[:, :40]), reference_logits(made, tokens[:, :40]), atol=TOLERANCE, rtol=0)
    assert (expected - reference_logits(plain, tokens)).abs().max() > 100 * TOLERANCE
    save_checkpoint(model, tmp_path / "saved", format)
    again = load_checkpoint(tmp_path / "saved")
    assert again.cfg == model.cfg and torch.equal(logits_of(again, tokens), logits_of(model, tokens))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["linear", "llama3", "yarn"]),
    factor=st.floats(1.0, 40.0),
    original=st.integers(8, 8192),
    base=st.sampled_from([1e4, 5e5, 1e6, 1e9]),
    d_head=st.sampled_from([8, 64, 128]),
    bounds=st.tuples(st.floats(0.25, 4.0), st.floats(1.1, 16.0)),
    truncate=st.booleans(),
)
def test_angles_are_those_of_transformers(
    kind: str, factor: float, original: int, base: float, d_head: int, bounds: tuple[float, float], truncate: bool
) -> None:
    low, high = bounds[0], bounds[0] * bounds[1]
    said: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind != "linear":
        said["original_max_position_embeddings"] = original
    if kind == "llama3":
        said |= {"low_freq_factor": low, "high_freq_factor": high}
    elif kind == "yarn":
        said |= {"beta_fast": high, "beta_slow": low, "truncate": truncate}
    config = {**RELEASED["qwen3"], "head_dim": d_head, "rope_theta": base, "max_position_embeddings": 2**15}
    cfg = FORMATS["qwen3"].read_config({**config, "rope_scaling": said})
    peer = Qwen3Config(head_dim=d_head, max_position_embeddings=2**15, rope_parameters={**said, "rope_theta": base})
    theta, attention_factor = ROPE_INIT_FUNCTIONS[kind](peer, torch.device("cpu"))
    assert_close(Rope(cfg).theta.float(), theta, rtol=2e-5, atol=1e-12)
    assert cfg.rotary_scaling is not None
    assert cfg.rotary_scaling.attention_factor == pytest.approx(attention_factor)
    assert cfg.score_scale == pytest.approx(attention_factor**2 / math.sqrt(d_head))


def test_a_length_at_top_level_comes_first(tmp_path: Path) -> None:
    said = {"original_max_position_embeddings": 16, "rope_scaling": ROPES["yarn"], "max_position_embeddings": 128}
    write_checkpoint(tmp_path, "qwen3", head_dim=8, **said)
    config = {name: value for name, value in RELEASED["qwen3"].items() if name not in ("rope_theta", "rope_scaling")}
    rope = {**ROPES["yarn"], "rope_theta": 1e6}
    peer = Qwen3Config(**{**config, **said, "head_dim": 8, "rope_scaling": None, "rope_parameters": rope})
    theta, _ = ROPE_INIT_FUNCTIONS["yarn"](peer, torch.device("cpu"))
    model = load_checkpoint(tmp_path)
    assert isinstance(model.pos_embed, Rope)
    assert_close(model.pos_embed.theta.float(), theta, rtol=1e-5, atol=0)


def test_two_spellings_that_differ_are_refused(tmp_path: Path) -> None:
    ropes = {"rope_scaling": ROPES["yarn"], "rope_parameters": {**ROPES["yarn"], "rope_theta": 1e6}}
    write_checkpoint(tmp_path, "qwen3", **ropes)
    load_checkpoint(tmp_path)
    ropes["rope_parameters"] = {**ropes["rope_parameters"], "factor": 5.0}
    write_checkpoint(tmp_path, "qwen3", **ropes)
    with pytest.raises(UserError, match="rope_parameters and rope_scaling differ"):
        load_checkpoint(tmp_path)


def test_llama_3_1_loads_beside_llada_as_its_twin(tmp_path: Path) -> None:
    """The config.json of Llama-3.1-8B, made small."""
    rope = {**ROPES["Llama 3.1"], "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=131072, rope_parameters={**rope, "rope_theta": 5e5},
    )  # fmt: skip
    peer = LlamaForCausalLM(config).eval()
    peer.save_pretrained(tmp_path)
    tokens = random_tokens(d_vocab=60)
    with torch.no_grad():
        assert_close(logits_of(load_checkpoint(tmp_path), tokens), peer(tokens).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"position": "alibi", "rotary_scaling": ROPES["linear"]},
            "rotary_scaling: position 'alibi' has no angles of RoPE",
        ),
        ({"rotary_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rotary_scaling.rope_type"),
        ({"rotary_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}}, "beta_fast: 3.0 is not of rope"),
        ({"rotary_scaling": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position_embeddings: missing"),
        (
            {"rotary_scaling": {**ROPES["Llama 3.1"], "low_freq_factor": 4.0}},
            "low_freq_factor: 4.0 is not below high_freq_factor 4.0",
        ),
        (
            {
                "rotary_dim": 2,
                "rotary_scaling": {**ROPES["yarn"], "beta_fast": 2.0, "beta_slow": 1.0, "attention_factor": 1.1},
            },
            "rotary_scaling.attention_factor: 1.1 is for all of a head",
        ),
        ({"attention": "block_causal"}, "block_size: None does not go with block_causal attention"),
        ({"block_size": 4}, "block_size: 4 does not go with bidirectional attention"),
        ({"d_vocab_out": 14}, "d_vocab_out: 14 must be below d_vocab 13"),
        ({"d_vocab_out": 12, "tie_word_embeddings": True}, "d_vocab_out: 12 must be below .*not tied"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"d_model": 16, "n_heads": 4, "d_vocab": 13, "n_ctx": 12, **changes})


def test_fields_that_are_not_set_leave_digests_alone() -> None:
    """Runs and checkpoints from before these fields came keep their names and load."""
    cfg = ModelConfig(d_model=16, n_heads=4, d_vocab=13, n_ctx=12)
    new = {"use_qk_norm", "block_size", "rotary_scaling", "d_vocab_out"}
    assert not new & cfg.model_dump().keys()
    assert cfg.model_copy(update={"use_qk_norm": True}).digest() != cfg.digest()


# ---- normalised heads


@pytest.mark.parametrize("pos", [9, 80])
def test_hooks_of_normalised_heads_hold_what_positions_act_on(pos: int) -> None:
    model = random_model(use_qk_norm=True, n_key_value_heads=2, n_ctx=100)
    attn = model.blocks[1].attn
    assert not torch.equal(attn.q_norm.w, torch.ones(4)) and attn.q_norm.w.shape == attn.k_norm.w.shape == (4,)
    _, cache = model.run_with_cache(random_tokens(pos=pos))
    for kind, norm in (("q", attn.q_norm), ("k", attn.k_norm)):
        raw, out = (cache[f"blocks.1.attn.hook_{kind}{end}"] for end in ("", "_normalized"))
        expected = F.rms_norm(raw, (4,), norm.w, eps=model.cfg.eps)
        assert_close(out, expected)
        prefix = f"blocks.1.attn.{kind}_norm.hook_"
        assert_close(cache[f"{prefix}normalized"] * norm.w, out)
        assert_close(cache[f"{prefix}scale"] * cache[f"{prefix}normalized"], raw)
        turned = model.pos_embed.rotate(out, torch.arange(pos), "q" if kind == "q" else "k")
        assert torch.equal(turned, cache[f"blocks.1.attn.hook_rot_{kind}"])
        lengths = (out / norm.w).norm(dim=-1)
        assert_close(lengths, torch.full_like(lengths, 2.0), atol=1e-2, rtol=0)  # sqrt(d_head), whatever the token


def test_a_model_without_normalised_heads_lacks_their_hooks() -> None:
    assert not any("normalized" in name for name in random_model().hook_dict if ".attn." in name)


# ---- blocks


def test_blocks_read_themselves_and_what_is_before(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "sdar", block_size=3)
    model = load_checkpoint(tmp_path)
    _, cache = model.run_with_cache(random_tokens(pos=8, d_vocab=VOCAB))
    block = torch.arange(8) // 3
    allowed = block <= block[:, None]
    assert ((cache["pattern", 0] > 0) == allowed).all()
    assert [model.cfg.n_readable(at, 8) for at in (0, 2, 3, 7)] == [3, 3, 6, 8]


@pytest.mark.parametrize("pos", [10, 70])
def test_blocks_are_counted_from_the_first_real_token(pos: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "sdar", max_position_embeddings=128)
    model, tokens = load_checkpoint(tmp_path), random_tokens(pos=pos, d_vocab=VOCAB)
    expected = logits_of(model, tokens)
    for left, right in ((3, 0), (0, 2), (5, 1)):
        padded, real = F.pad(tokens, (left, right), value=7), F.pad(torch.ones_like(tokens), (left, right))
        kept = logits_of(model, padded, attention_mask=real)[:, left : left + pos]
        assert_close(kept, expected, atol=1e-5, rtol=0)


def test_options_say_otherwise_than_the_files(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, "sdar")
    tokens = random_tokens(d_vocab=VOCAB, pos=9)
    whole = load_checkpoint(tmp_path, attention="bidirectional")
    assert_close(logits_of(whole, tokens), reference_logits_of(made, tokens, block=9), atol=TOLERANCE, rtol=0)
    larger = load_checkpoint(tmp_path, block_size=2)
    assert_close(logits_of(larger, tokens), reference_logits_of(made, tokens, block=2), atol=TOLERANCE, rtol=0)
    assert load_checkpoint(tmp_path, mask_token_id=5).cfg.mask_token_id == 5


def reference_logits_of(made: Any, tokens: Tensor, block: int) -> Tensor:
    made.config["block_size"] = block
    return reference_logits(made, tokens)


@pytest.mark.parametrize("format", ["a2d-qwen3", "qwen3"])
def test_a_model_that_is_sampled_in_blocks_may_be_read_so(format: str, tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, format)
    options: dict[str, Any] = {} if format == "a2d-qwen3" else {"readout_shift": 0, "mask_token_id": 9}
    model = load_checkpoint(tmp_path, attention="block_causal", block_size=3, **options)
    tokens = random_tokens(d_vocab=VOCAB, pos=8)
    made = type(made)(made.folder, "sdar", {**made.config, "block_size": 3}, made.tensors)
    assert_close(logits_of(model, tokens), reference_logits(made, tokens), atol=TOLERANCE, rtol=0)


def test_queries_whose_source_is_in_a_later_block_are_skipped_with_a_reason(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "sdar", tokenizer=True)
    (tmp_path / "facts.csv").write_text("child,parent,parent_type\nTom Cruise,Mary Lee Pfeiffer,mother\n")
    table = load_facts(tmp_path / "facts.csv")
    model = load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="later block"):
        make_prompts(table, model.tokenizer, model.cfg.model_copy(update={"block_size": 1}))
    prompts = make_prompts(table, model.tokenizer, model.cfg.model_copy(update={"block_size": 64}))
    assert prompts.pairs and not any("later block" in str(reason) for reason in prompts.skipped)


# ---- the mask


@pytest.mark.parametrize("where", ["config.json", "added_tokens.json", "tokenizer", "nowhere"])
def test_the_mask_is_looked_for_where_it_may_be(where: str, tmp_path: Path) -> None:
    config = {name: value for name, value in RELEASED["a2d-qwen3"].items() if name != "mask_token_id"}
    write_checkpoint(tmp_path, "a2d-qwen3")
    write_json(tmp_path / "config.json", config if where != "config.json" else RELEASED["a2d-qwen3"])
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    write_tokenizer(tmp_path, "a2d-qwen3", special=special if where in ("added_tokens.json", "nowhere") else None)
    if where == "added_tokens.json":
        write_json(tmp_path / "added_tokens.json", {"<|im_end|>": N_BPE + 2, "<|mask|>": N_BPE + 3})
    if where == "nowhere":
        with pytest.raises(UserError, match=r"mask_token_id: neither config.json nor the tokenizer .*--mask-token-id"):
            load_checkpoint(tmp_path)
        assert load_checkpoint(tmp_path, mask_token_id=N_BPE + 3).cfg.mask_token_id == N_BPE + 3
        return
    model = load_checkpoint(tmp_path)
    assert model.cfg.mask_token_id == model.tokenizer.mask_token_id == N_BPE + 3
    assert model.tokenizer.mask_token == "<|mask|>"


def test_opdlms_class_is_a2ds(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a2d", "a2d-qwen3")
    write_checkpoint(tmp_path / "opdlm", "a2d-qwen3", architectures=["_A2DQwen3LMHeadModel"])
    first, second = (load_checkpoint(tmp_path / name) for name in ("a2d", "opdlm"))
    assert first.cfg == second.cfg and torch.equal(first.W_E, second.W_E)


# ---- Nemotron-Labs-Diffusion


def test_nemotron_attends_as_its_paradigm_says(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, "nemotron_labs_diffusion", dlm_paradigm="block_diff", block_size=4)
    model = load_checkpoint(tmp_path)
    assert (model.cfg.attention, model.cfg.block_size) == ("block_causal", 4)
    tokens = random_tokens(d_vocab=VOCAB, pos=10)
    blocks = type(made)(made.folder, "sdar", made.config, {})
    save_checkpoint(model, tmp_path / "saved", "nemotron_labs_diffusion")
    assert load_checkpoint(tmp_path / "saved").cfg == model.cfg
    whole = load_checkpoint(tmp_path, attention="bidirectional")
    assert whole.cfg.block_size is None and blocks.config["block_size"] == 4
    assert_close(logits_of(whole, tokens), reference_logits(made, tokens), atol=TOLERANCE, rtol=0)
    assert (logits_of(model, tokens) - logits_of(whole, tokens)).abs().max() > 100 * TOLERANCE


def test_nemotrons_growing_queries_bound_the_context(tmp_path: Path) -> None:
    rope = {**RELEASED["nemotron_labs_diffusion"]["rope_scaling"], "llama_4_scaling_beta": 0.1}
    rope["original_max_position_embeddings"] = 20
    made = write_checkpoint(tmp_path, "nemotron_labs_diffusion", rope_scaling=rope)
    with pytest.warns(UserWarning, match=r"queries grow from position 20 on \(llama_4_scaling_beta\)"):
        model = load_checkpoint(tmp_path)
    assert model.cfg.n_ctx == 20
    tokens = random_tokens(d_vocab=VOCAB, pos=20)
    assert_close(logits_of(model, tokens), reference_logits(made, tokens), atol=TOLERANCE, rtol=0)
    with pytest.raises(UserError, match="exceed n_ctx 20"):
        model(random_tokens(d_vocab=VOCAB, pos=21))


# ---- SMDM


def smdm_tensors(n_head: int = 4, groups: int = 2, d_model: int = 16, d_mlp: int = 24, layers: int = 2) -> dict:
    """As SMDM has them: queries, key and value of one group after the other, and a mask that is never predicted."""
    d_head, generator = d_model // n_head, seeded(0)
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (41, d_model), "lm_head.weight": (40, d_model)}
    shapes["transformer.ln_f.weight"] = (d_model,)
    for layer in range(layers):
        block = f"transformer.h.{layer}"
        shapes |= {
            f"{block}.norm_1.weight": (d_model,),
            f"{block}.attn.attn.weight": ((n_head + 2 * groups) * d_head, d_model),
            f"{block}.attn.proj.weight": (d_model, d_model),
            f"{block}.norm_2.weight": (d_model,),
            f"{block}.mlp.swiglu.w1.weight": (d_mlp, d_model),
            f"{block}.mlp.swiglu.w2.weight": (d_mlp, d_model),
            f"{block}.mlp.swiglu.w3.weight": (d_model, d_mlp),
        }
    drawn = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + x if x.ndim == 1 else x for name, x in drawn.items()}


def smdm_logits(tensors: dict[str, Tensor], tokens: Tensor, n_head: int, groups: int) -> Tensor:
    """The architecture written out from its description."""
    x = tensors["transformer.wte.weight"][tokens]
    n_pos, d_model = x.shape[1:]
    d_head, shared = d_model // n_head, n_head // groups
    angle = torch.arange(n_pos)[:, None] * 10_000 ** -(torch.arange(0, d_head, 2) / d_head)
    cos, sin = (torch.cat([f(angle), f(angle)], dim=1) for f in (torch.cos, torch.sin))

    def rotated(q: Tensor) -> Tensor:
        half = d_head // 2
        return q * cos + torch.cat([-q[..., half:], q[..., :half]], dim=-1) * sin

    for layer in range(2):
        weight = {name.split(".", 3)[3]: x for name, x in tensors.items() if name.startswith(f"transformer.h.{layer}.")}
        normed = F.rms_norm(x, (d_model,), weight["norm_1.weight"], 1e-5)
        qkv = F.linear(normed, weight["attn.attn.weight"]).view(*x.shape[:2], groups, shared + 2, d_head)
        heads = []
        for group in range(groups):
            key, value = rotated(qkv[:, :, group, shared]), qkv[:, :, group, shared + 1]
            for of in range(shared):
                scores = rotated(qkv[:, :, group, of]) @ key.transpose(1, 2) / math.sqrt(d_head)
                heads.append(scores.softmax(-1) @ value)
        x = x + F.linear(torch.cat(heads, dim=-1), weight["attn.proj.weight"])
        normed = F.rms_norm(x, (d_model,), weight["norm_2.weight"], 1e-5)
        gate = F.silu(F.linear(normed, weight["mlp.swiglu.w1.weight"]))
        up = F.linear(normed, weight["mlp.swiglu.w2.weight"])
        x = x + F.linear(gate * up, weight["mlp.swiglu.w3.weight"])
    return F.linear(F.rms_norm(x, (d_model,), tensors["transformer.ln_f.weight"], 1e-5), tensors["lm_head.weight"])


SMDM_CONFIG = {"model_type": "smdm", "n_head": 4}


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_smdm_is_one_file_and_a_number_of_heads(groups: int, tmp_path: Path) -> None:
    tensors = smdm_tensors(groups=groups)
    save_file(tensors, tmp_path / "mdm-1028M-1600e18.safetensors")
    model = load_checkpoint(tmp_path / "mdm-1028M-1600e18.safetensors", config=SMDM_CONFIG)
    cfg = model.cfg
    assert (cfg.n_layers, cfg.kv_heads, cfg.n_ctx, cfg.mask_token_id) == (2, groups, 2048, 40)
    assert (cfg.d_vocab, cfg.d_vocab_out, cfg.attention, cfg.readout_shift) == (41, 40, "bidirectional", 0)
    tokens = random_tokens(d_vocab=41, pos=9)
    expected = smdm_logits(tensors, tokens, 4, groups)
    assert_close(logits_of(model, tokens), expected, atol=TOLERANCE, rtol=0)
    assert logits_of(model, tokens).shape[-1] == 40
    save_checkpoint(model, tmp_path / "own", "mdm_interp")
    own = load_checkpoint(tmp_path / "own")
    assert own.cfg == cfg and torch.equal(own.W_Q, model.W_Q)
    assert_close(logits_of(own, tokens), expected, atol=TOLERANCE, rtol=0)
    with pytest.raises(UserError, match=r"format: 'smdm' has no config\.json and is only read; use 'mdm_interp'"):
        save_checkpoint(model, tmp_path / "refused", "smdm")
    assert not (tmp_path / "refused").exists()


def test_smdm_in_a_folder_with_a_config_file_and_a_tokenizer(tmp_path: Path) -> None:
    save_file(smdm_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "smdm.json").write_text(json.dumps({**SMDM_CONFIG, "context_length": 33, "norm_eps": 1e-6}))
    model = load_checkpoint(tmp_path, config=tmp_path / "smdm.json")
    assert (model.cfg.n_ctx, model.cfg.eps) == (33, 1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "smdm"}, "config: n_head: None, and no file of SMDM says how many heads there are"),
        ({"model_type": "smdm", "n_head": 3}, "n_head: 3 heads of 5.33333 dimensions do not make the 32 rows"),
        ({"model_type": "smdm", "n_head": "4"}, "n_head: '4', and no file"),
        ({"model_type": "gpt"}, "model_type 'gpt' is not supported"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:config.json lacks")
def test_what_smdm_cannot_be_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file(smdm_tensors(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message) as raised:
        load_checkpoint(tmp_path, config=config)
    assert len(str(raised.value)) < 500


def test_a_config_beside_config_json_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada")
    with pytest.raises(UserError, match=r"config: .* has a config\.json of its own; leave config out"):
        load_checkpoint(tmp_path, config={"model_type": "smdm"})


# ---- LLaDA2


def llada2_logits(tensors: dict[str, Tensor], tokens: Tensor, block: int) -> Tensor:
    """The architecture written out from its description, token by token where experts are chosen."""
    config = LLADA2_CONFIG
    n_pos, d_head, rotating = tokens.shape[1], config["head_dim"], config["head_dim"] // 2
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    angle = torch.arange(n_pos)[:, None] * config["rope_theta"] ** -(torch.arange(0, rotating, 2) / rotating)
    cos, sin = (torch.cat([f(angle), f(angle)], dim=1) for f in (torch.cos, torch.sin))
    block_of = torch.arange(n_pos) // block
    hidden = block_of > block_of[:, None]

    def rotated(x: Tensor) -> Tensor:
        turning, passed = x[..., :rotating], x[..., rotating:]
        half = torch.cat([-turning[..., rotating // 2 :], turning[..., : rotating // 2]], dim=-1)
        return torch.cat([turning * cos + half * sin, passed], dim=-1)

    def mlp(x: Tensor, name: str) -> Tensor:
        gate, up, down = (tensors[f"{name}{way}_proj.weight"] for way in ("gate", "up", "down"))
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def routed(x: Tensor, name: str) -> Tensor:
        scores = torch.sigmoid(tensors[f"{name}gate.weight"] @ x)
        chosen_by = scores + tensors[f"{name}gate.expert_bias"]
        groups = chosen_by.view(config["n_group"], -1)
        best = groups.topk(2, dim=1).values.sum(1).topk(config["topk_group"]).indices.tolist()
        size = groups.shape[1]
        candidates = sorted((expert for group in best for expert in range(group * size, (group + 1) * size)),
                            key=lambda expert: -chosen_by[expert].item())[: config["num_experts_per_tok"]]  # fmt: skip
        total = sum(scores[expert] for expert in candidates)
        parts = [scores[expert] / total * mlp(x, f"{name}experts.{expert}.") for expert in candidates]
        return config["routed_scaling_factor"] * sum(parts)

    x = tensors["model.word_embeddings.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        normed = F.rms_norm(x, (16,), tensors[f"{at}input_layernorm.weight"], 1e-6)
        qkv = F.linear(normed, tensors[f"{at}attention.query_key_value.weight"]).unflatten(-1, (heads + 2 * kv, d_head))
        q, k, v = (part.transpose(1, 2) for part in qkv.split([heads, kv, kv], dim=2))
        q = rotated(F.rms_norm(q, (d_head,), tensors[f"{at}attention.query_layernorm.weight"], 1e-6))
        k = rotated(F.rms_norm(k, (d_head,), tensors[f"{at}attention.key_layernorm.weight"], 1e-6))
        k, v = (part.repeat_interleave(heads // kv, dim=1) for part in (k, v))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(d_head)).masked_fill(hidden, -torch.inf)
        z = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(z, tensors[f"{at}attention.dense.weight"])
        normed = F.rms_norm(x, (16,), tensors[f"{at}post_attention_layernorm.weight"], 1e-6)
        if layer < config["first_k_dense_replace"]:
            x = x + mlp(normed, f"{at}mlp.")
        else:
            each = torch.stack([routed(token, f"{at}mlp.") for token in normed.flatten(0, 1)]).view_as(normed)
            x = x + each + mlp(normed, f"{at}mlp.shared_experts.")
    return F.linear(F.rms_norm(x, (16,), tensors["model.norm.weight"], 1e-6), tensors["lm_head.weight"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_experts_holds_the_weights_and_one_shard(dtype: str, tmp_path: Path) -> None:
    """The tensors of a layer's experts are spread over all shards, and are one parameter."""
    big: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 4, "vocab_size": 4000, "num_experts": 32}
    big |= {"moe_intermediate_size": 512, "intermediate_size": 2048, "num_attention_heads": 16, "head_dim": 64}
    write_llada2(tmp_path / "small")
    write_llada2(tmp_path / "big", **big, rotary_dim=32)
    (tmp_path / "big" / "model.safetensors").unlink()
    write_tensors(tmp_path / "big", llada2_tensors(**big), shards=10)
    assert_holds_weights_and_one_shard(tmp_path / "small", tmp_path / "big", dtype=dtype, mask_token_id=1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_fused_tensors_holds_the_weights_and_the_file(tmp_path: Path) -> None:
    save_file(smdm_tensors(n_head=16, groups=4, d_model=1024, d_mlp=3072, layers=8), tmp_path / "big.safetensors")
    config = {"model_type": "smdm", "n_head": 16}
    small = tmp_path / "small16.safetensors"
    save_file(smdm_tensors(n_head=16, groups=4, d_model=64), small)
    assert_holds_weights_and_one_shard(small, tmp_path / "big.safetensors", config=config)


@pytest.mark.parametrize(("block", "pos"), [(4, 11), (32, 40)])
@pytest.mark.parametrize("shards", [1, 5])
def test_llada2_is_what_is_described(block: int, pos: int, shards: int, tmp_path: Path) -> None:
    tensors = write_llada2(tmp_path, shards, **({} if block == 32 else {"block_size": block}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"config.json lacks what LLaDA2MoeModelLM documents as block_size 32")
        model: Any = load_checkpoint(tmp_path, mask_token_id=7)
    cfg = model.cfg
    assert (cfg.attention, cfg.block_size, cfg.rotary_dim, cfg.mask_token_id) == ("block_causal", block, 4, 7)
    tokens = random_tokens(d_vocab=VOCAB, pos=pos)
    expected = llada2_logits(tensors, tokens, block)
    assert expected.std() > 0.5
    assert_close(logits_of(model, tokens), expected, atol=TOLERANCE, rtol=0)
    assert not model.blocks[1].mlp.expert_bias.requires_grad
    save_checkpoint(model, tmp_path / "own", "mdm_interp")
    own: Any = load_checkpoint(tmp_path / "own")
    assert own.cfg == cfg and not own.blocks[1].mlp.expert_bias.requires_grad
    assert_close(logits_of(own, tokens), expected, atol=TOLERANCE, rtol=0)
    with pytest.raises(UserError, match="format: 'llada2_moe' is only read"):
        save_checkpoint(model, tmp_path / "refused", "llada2_moe")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "num_experts is missing"),
        ({"n_group": 3}, "n_groups: 3 groups do not divide num_experts 16"),
        ({"num_experts_per_tok": 9}, "experts_per_token: 9 is more than the 8 experts"),
        ({"score_function": "softmax"}, "score_function is 'softmax'"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor is 'half', not a number"),
        ({"rotary_dim": 6}, "rotary_dim is 6, not head_dim times 0.5"),
        ({"use_qkv_bias": True}, "use_qkv_bias is True"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:config.json lacks")
def test_an_llada2_that_is_not_computed_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_llada2(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path, mask_token_id=7)


@pytest.mark.filterwarnings("ignore:config.json lacks")
def test_tensors_of_experts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tensors = write_llada2(tmp_path)
    lost, odd = "model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.experts.4.down_proj.weight"
    write_tensors(tmp_path, {name: x for name, x in tensors.items() if name != lost} | {odd: torch.zeros(3, 3)})
    with pytest.raises(UserError) as raised:
        load_checkpoint(tmp_path, mask_token_id=7)
    assert f"{lost} is missing" in str(raised.value) and f"{odd} is [3, 3], not [16, 6]" in str(raised.value)
    fused = "model.layers.0.attention.query_key_value.weight"
    write_tensors(tmp_path, tensors | {fused: torch.zeros(50, 16)})
    with pytest.raises(UserError, match=r"query_key_value.weight is \[50, 16\].*, not"):
        load_checkpoint(tmp_path, mask_token_id=7)


def test_hooks_of_experts_edit_which_are_asked() -> None:
    model: Any = random_model(experts=EXPERTS, d_mlp=24, gated_mlp=True, act_fn="silu", dtype="float64")
    tokens, name = random_tokens(), "blocks.1.mlp.hook_expert_weights"
    logits, cache = model.run_with_cache(tokens)
    weights = cache[name]
    assert ((weights > 0).sum(-1) == 2).all()
    assert_close(weights.sum(-1), torch.full((2, 7), 2.5, dtype=torch.float64))
    expert, token = model.blocks[1].mlp.rows(weights)
    assert cache["blocks.1.mlp.hook_post"].shape == (len(expert), 10) == (2 * 14, 10)
    x = cache["blocks.1.ln2.hook_normalized"] * model.blocks[1].ln2.w
    mlp = model.blocks[1].mlp
    row = 5
    assert_close(cache["blocks.1.mlp.hook_pre"][row], x.flatten(0, 1)[token[row]] @ mlp.W_gate[expert[row]])
    edited = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: torch.zeros_like(x))])
    shared_only = cache["blocks.1.hook_resid_mid"] + mlp.shared(x)
    assert_close(edited, model.unembed(model.ln_final(shared_only)))
    assert not torch.allclose(edited, logits)
    with pytest.raises(UserError, match=r"W_in: layers of experts have no MLP to be stacked"):
        _ = model.W_in
    before = logits.detach().clone()
    model.process_weights_()
    assert_close(model(tokens).log_softmax(-1), before.log_softmax(-1), atol=1e-9, rtol=0)


# ---- all that is asked of a checkpoint


def smdm_probe(folder: Path) -> Probe:
    tensors = smdm_tensors()
    mask = N_BPE + 3
    generator = seeded(1)
    tensors["transformer.wte.weight"] = 0.3 * torch.randn(mask + 1, 16, generator=generator)
    tensors["lm_head.weight"] = 0.3 * torch.randn(mask, 16, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "smdm.safetensors")
    write_tokenizer(folder, "a2d-qwen3")
    (folder / "facts.csv").write_text("".join(FACTS.splitlines(keepends=True)[: FEW + 1]), encoding="utf-8")
    return open_probe(folder / "smdm.safetensors", folder / "facts.csv", config=SMDM_CONFIG)


def llada2_probe(folder: Path) -> Probe:
    write_llada2(folder, block_size=64)
    write_tokenizer(folder, "a2d-qwen3")
    (folder / "facts.csv").write_text("".join(FACTS.splitlines(keepends=True)[: FEW + 1]), encoding="utf-8")
    return open_probe(folder, folder / "facts.csv")


def family_probe(name: str, folder: Path) -> Probe:
    if name in ("smdm", "llada2_moe"):
        return {"smdm": smdm_probe, "llada2_moe": llada2_probe}[name](folder / "checkpoint")
    format, twin = name.split(" / ") if "/" in name else (name, None)
    changes: dict[str, Any] = {"max_position_embeddings": 128} if format != "llada" else {"max_sequence_length": 128}
    changes |= {"block_size": 64} if format == "sdar" else {}
    return tiny_probe(folder, format, twin=twin, facts=FEW, **changes)


FEW = 4
"""How many facts are asked."""
ALIKE = "child,parent,parent_type\nUwe,Ivo,father\nAda,Eva,mother\nKarl,Hugo,father\n"
"""Facts whose names have as many tokens: queries that are mirror images."""
PAIRS = ("a2d-qwen3 / qwen3", "dream / qwen2", "llada / llama", "sdar", "nemotron_labs_diffusion", "smdm")
PAIRS += ("llada2_moe",)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_every_analysis_and_page_works_on_it(name: str, tmp_path: Path) -> None:
    probe = family_probe(name, tmp_path)
    asked = [a for a in discover() if isinstance(a, CheckpointAnalysis) and (probe.twin or not a.needs_twin)]
    assert len(asked) == (9 if probe.twin else 8)
    for analysis in asked:
        result = analysis.probe(probe, tmp_path / "out")
        numbers = result.frame.select_dtypes("number")
        assert len(result.frame) and numbers.notna().any(axis=None)
        assert analysis.figure(result).data
    pair = probe.pairs("relational")[0]
    pages = viz.attention(probe.model, pair.forward), viz.routes(probe.model, pair)
    for page in (*pages, viz.trajectory(probe.model, pair.forward)):
        assert page.save(tmp_path / "page.html").stat().st_size > 10_000
    (tmp_path / "alike.csv").write_text(ALIKE, encoding="utf-8")
    pairs = make_prompts(load_facts(tmp_path / "alike.csv"), probe.model.tokenizer, probe.model.cfg).pairs
    pairs = [pair for pair in pairs if len(pair.forward.answer) == len(pair.forward.source)]
    for edit in (transplant_routes, ablate_storage, ablate_routes, project_even_routes):
        assert edit(probe.model, pairs[:2]).after.effect.isfinite().all()


def test_a_probe_reads_a_file_that_has_no_config(tmp_path: Path, mdm_interp: Callable[..., Ended]) -> None:
    smdm_probe(tmp_path / "made")
    write_json(tmp_path / "smdm.json", SMDM_CONFIG)
    options = ("--config", "smdm.json", "--only", "large_model_sinks", "--limit", 2, "--out", "out")
    ended = mdm_interp("probe", "made/smdm.safetensors", "--facts", "made/facts.csv", *options)
    assert ended.code == 0, ended.err
    origin = Result.load(tmp_path / "out" / "large_model_sinks.json").origin
    assert isinstance(origin, CheckpointOrigin) and origin.model["n_heads"] == 4
