"""Loading and saving checkpoints in the released formats, against transformers' Llama and Qwen2."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import (
    BIASED,
    FORMATS,
    FULL,
    MDMS,
    QK_NORMS,
    RELEASED,
    SHIFTED,
    VOCAB,
    Checkpoint,
    assert_holds_weights_and_one_shard,
    edit_config,
    name_in,
    reference_logits,
    write_checkpoint,
    write_json,
    write_tensors,
)
from damage_helpers import damaged, full_at, killed_at_touch
from helpers import random_model, random_tokens, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformer_lens.hook_points import HookPoint
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mdm_interp import files
from mdm_interp.checkpoints import FORMATS as FORMATS_OF
from mdm_interp.checkpoints import load_checkpoint, save_checkpoint
from mdm_interp.checkpoints.format import HARMLESS
from mdm_interp.config import ModelConfig
from mdm_interp.errors import UserError
from mdm_interp.models.positions import PositionScheme, Rope
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.tensors import weights_digest
from mdm_interp.training.losses import mask_tokens, mdm_loss

TOLERANCE = 1e-4  # fp32, as large as any logit's rounding here several times over

# What each format calls what all of them have.
NAMES: dict[str, dict[str, str]] = {
    "hugging_face": {
        "kv_heads": "num_key_value_heads",
        "theta": "rope_theta",
        "eps": "rms_norm_eps",
        "tied": "tie_word_embeddings",
        "n_layers": "num_hidden_layers",
        "n_ctx": "max_position_embeddings",
        "d_model": "hidden_size",
    },
    "llada": {
        "kv_heads": "n_kv_heads",
        "theta": "rope_theta",
        "eps": "rms_norm_eps",
        "tied": "weight_tying",
        "n_layers": "n_layers",
        "n_ctx": "max_sequence_length",
        "d_model": "d_model",
    },
}


def in_format(format: str, **changes: Any) -> dict[str, Any]:
    """Fields of config.json by the names of `NAMES`."""
    names = NAMES["llada" if format == "llada" else "hugging_face"]
    return {names[name]: value for name, value in changes.items()}


def vocab_tokens(batch: int = 2, pos: int = 11, seed: int = 1) -> Tensor:
    return random_tokens(batch=batch, pos=pos, d_vocab=VOCAB, seed=seed)


def logits_of(model: HookedTransformer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens)


def assert_same_models(first: HookedTransformer, second: HookedTransformer) -> None:
    assert first.cfg == second.cfg
    theirs = dict(second.named_parameters())
    assert theirs.keys() == dict(first.named_parameters()).keys()
    for name, parameter in first.named_parameters():
        assert parameter.dtype == theirs[name].dtype
        assert torch.equal(parameter, theirs[name]), name


# ---- logits


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("theta", "eps"), [(1e4, 1e-5), (5e5, 1e-5), (1e6, 1e-6)])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers(
    format: str, kv_heads: int, theta: float, eps: float, tied: bool, tmp_path: Path
) -> None:
    made = write_checkpoint(tmp_path, format, **in_format(format, kv_heads=kv_heads, theta=theta, eps=eps, tied=tied))
    tokens = vocab_tokens()
    expected = reference_logits(made, tokens)
    assert expected.std() > 0.5
    assert_close(logits_of(load_checkpoint(tmp_path), tokens), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_logits_equal_transformers_where_attention_is_fused(format: str, tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, format, **in_format(format, n_ctx=128))
    tokens = vocab_tokens(pos=100)
    model = load_checkpoint(tmp_path)
    assert_close(logits_of(model, tokens), reference_logits(made, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("changed", "value"), [("theta", 1e4), ("eps", 0.1)])
@pytest.mark.parametrize("format", FORMATS)
def test_parity_notices_a_wrong_field(format: str, changed: str, value: float, tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, format)
    write_json(tmp_path / "config.json", made.config | in_format(format, **{changed: value}))
    tokens = vocab_tokens()
    difference = logits_of(load_checkpoint(tmp_path), tokens) - reference_logits(made, tokens)
    assert difference.abs().max() > 10 * TOLERANCE


def test_parity_notices_swapped_gate_and_input(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, "llada")
    swapped = {
        name.replace("ff_proj", "?").replace("up_proj", "ff_proj").replace("?", "up_proj"): tensor
        for name, tensor in made.tensors.items()
    }
    write_tensors(tmp_path, swapped)
    tokens = vocab_tokens()
    difference = logits_of(load_checkpoint(tmp_path), tokens) - reference_logits(made, tokens)
    assert difference.abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("format", ["llama", "qwen2"])
def test_an_explicit_head_dim_equals_transformers(format: str, tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, format, head_dim=6)
    config_class, model_class = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[
        format
    ]
    peer = model_class(
        config_class(**made.config, rope_parameters={"rope_type": "default", "rope_theta": made.config["rope_theta"]})
    )
    peer.load_state_dict(made.tensors)
    tokens = vocab_tokens()
    with torch.no_grad():
        assert_close(logits_of(load_checkpoint(tmp_path), tokens), peer.eval()(tokens).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_hidden_size": None, "mlp_ratio": 3},
        {"n_kv_heads": None},
        {"vocab_size": VOCAB - 7},
        {"embedding_size": None},
        {"n_kv_heads": 1, "multi_query_attention": True},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_llada_fields_that_follow_from_others(changes: dict[str, Any], tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, "llada", **changes)
    tokens = vocab_tokens()
    model = load_checkpoint(tmp_path)
    assert model.cfg.d_vocab == VOCAB
    assert_close(logits_of(model, tokens), reference_logits(made, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("format", ["llada", "dream"])
def test_padding_changes_nothing(format: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, format)
    model = load_checkpoint(tmp_path)
    tokens, real = vocab_tokens(batch=1), torch.ones(1, 11, dtype=torch.bool)
    padded = torch.nn.functional.pad(tokens, (0, 5), value=7)
    with torch.no_grad():
        kept = model(padded, attention_mask=torch.nn.functional.pad(real, (0, 5), value=False))[:, :11]
    assert_close(kept, logits_of(model, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("format", "attention", "shift", "mask"),
    [
        ("llada", "bidirectional", 0, 303),
        ("dream", "bidirectional", -1, 304),
        ("llama", "causal", -1, None),
        ("qwen2", "causal", -1, None),
        ("qwen3", "causal", -1, None),
        *((format, "bidirectional", 0, 303) for format in ("a2d-qwen3", "a2d-qwen2", "a2d-llama")),
        ("sdar", "block_causal", 0, 303),
        ("nemotron_labs_diffusion", "bidirectional", 0, 302),
    ],
)
def test_attention_shift_mask_and_context_come_from_the_format_and_config(
    format: str, attention: str, shift: int, mask: int | None, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, format)
    model = load_checkpoint(tmp_path)
    assert (model.cfg.attention, model.cfg.readout_shift, model.cfg.mask_token_id) == (attention, shift, mask)
    assert model.cfg.n_ctx == 64
    assert model.tokenizer is None
    tokens = vocab_tokens()
    later = tokens.clone()
    later[:, -1] = (later[:, -1] + 1) % VOCAB
    unmoved = torch.allclose(logits_of(model, tokens)[:, 0], logits_of(model, later)[:, 0], atol=1e-6)
    assert unmoved == (attention != "bidirectional")


# ---- files that transformers writes, and files that it reads


@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)],
)
@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_loads(
    config_class: Any, model_class: Any, max_shard_size: str, tied: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = config_class(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, initializer_range=0.4,
    )  # fmt: skip
    peer = model_class(config).eval()
    peer.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "10KB")
    tokens = random_tokens(d_vocab=60)
    with torch.no_grad():
        assert_close(logits_of(load_checkpoint(tmp_path), tokens), peer(tokens).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("format", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_loads_in_transformers(format: str, tied: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "first", format, **in_format(format, tied=tied))
    model = load_checkpoint(tmp_path / "first")
    save_checkpoint(model, tmp_path / "second", format, max_shard_size="10KB")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "second", local_files_only=True).eval()
    tokens = vocab_tokens()
    with torch.no_grad():
        assert_close(peer(tokens).logits, logits_of(model, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_both_spellings_of_config_json_give_one_model(format: str, tmp_path: Path) -> None:
    def to_v5(config: dict[str, Any]) -> None:
        theta = config.pop("rope_theta")
        scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
        config["rope_parameters"] = {**scaling, "rope_theta": theta}
        config["dtype"] = config.pop("torch_dtype")

    write_checkpoint(tmp_path / "v4", format)
    if format == "llada":  # has no version 5 of its own, only one of the dtype
        write_checkpoint(tmp_path / "v5", format, edit=lambda config: config.update(dtype=config.pop("torch_dtype")))
    else:
        write_checkpoint(tmp_path / "v5", format, edit=to_v5)
    assert_same_models(load_checkpoint(tmp_path / "v4"), load_checkpoint(tmp_path / "v5"))


@pytest.mark.parametrize("scaling", [None, {"type": "default"}, {"rope_type": "default"}])
def test_rope_scaling_that_scales_nothing_is_taken(scaling: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "dream", rope_scaling=scaling)
    load_checkpoint(tmp_path)


# ---- round trips


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_formats_round_trip_exactly(
    format: str, shards: int, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    changes = in_format(format, tied=tied)
    made = write_checkpoint(tmp_path / "first", format, shards=shards, tokenizer=True, dtype=dtype, **changes)
    model = load_checkpoint(tmp_path / "first")
    assert model.W_E.dtype == dtype
    save_checkpoint(model, tmp_path / "second", format, max_shard_size="5GB" if shards == 1 else 20_000)
    saved = {
        name: tensor for path in (tmp_path / "second").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert len(list((tmp_path / "second").glob("*.safetensors"))) == 1 or shards > 1
    assert saved.keys() == made.tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in made.tensors.items())
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    told = {name: made.config[name] for name in config if name in made.config and name != "rope_scaling"}
    assert {name: config[name] for name in told} == told
    assert_same_models(load_checkpoint(tmp_path / "second"), model)


OWN: list[dict[str, Any]] = [
    {},
    {"position": "t5_bias"},
    {"position": "learned", "normalization_type": "LN", "d_mlp": 24},
    {"position": "sinusoidal", "normalization_type": None},
    {"position": "alibi", "n_key_value_heads": 2, "tie_word_embeddings": True},
    {"position": "none", "attention": "causal", "dtype": "float64"},
    {
        "qkv_bias": True,
        "d_mlp": 24,
        "gated_mlp": True,
        "act_fn": "silu",
        "rotary_dim": 2,
        "mask_token_id": 12,
        "readout_shift": -1,
    },
]


@pytest.mark.parametrize("changes", OWN, ids=lambda changes: "+".join(changes) or "plain")
def test_every_model_of_the_package_round_trips_in_its_own_format(changes: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(**changes)
    save_checkpoint(model, tmp_path, "mdm_interp", max_shard_size=3000)
    again = load_checkpoint(tmp_path)
    assert_same_models(again, model)
    tokens = random_tokens()
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))
    assert all(parameter.requires_grad for parameter in again.parameters())


class Window(PositionScheme):
    """A bias of one's own."""

    def bias(self, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        far = (key_pos[None, :] - query_pos[:, None]).abs() > 2
        return far.float().mul(-1e4).expand(self.cfg.n_heads, -1, -1)


def slower(model: HookedTransformer) -> None:
    scheme = model.pos_embed
    assert isinstance(scheme, Rope)
    scheme.theta = scheme.theta / 4


def other_table(model: HookedTransformer) -> None:
    model.pos_embed.W_pos *= 2


@pytest.mark.parametrize(
    ("position", "change", "named"),
    [
        ("none", lambda model: setattr(model, "pos_embed", Window(model.cfg)), "Window .* 'none'"),
        ("rope", slower, "Rope .* 'rope'"),
        ("sinusoidal", other_table, "Sinusoidal .* 'sinusoidal'"),
    ],
    ids=["another class", "other angles", "another table"],
)
def test_a_position_scheme_that_a_file_would_not_bring_back_is_refused(
    position: str, change: Callable[[HookedTransformer], None], named: str, tmp_path: Path
) -> None:
    model = random_model(position=position)
    change(model)
    with pytest.raises(UserError, match=rf"model.pos_embed: this {named} that config.json names"):
        save_checkpoint(model, tmp_path, "mdm_interp")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_sinusoidal_model_that_was_converted_is_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(position="sinusoidal", d_model=64).to(dtype)
    save_checkpoint(model, tmp_path, "mdm_interp")
    assert_same_models(load_checkpoint(tmp_path), model)
    save_checkpoint(model.to(torch.float32), tmp_path, "mdm_interp")


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    format=st.sampled_from(FORMATS),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (6, 2)]),
    half=st.integers(1, 4),
    layers=st.integers(1, 3),
    d_mlp=st.integers(1, 9),
    tied=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_goes_out_and_comes_back(
    format: str, heads: tuple[int, int], half: int, layers: int, d_mlp: int, tied: bool, seed: int, tmp_path: Path
) -> None:
    blocks = {"attention": "block_causal", "block_size": 3} if format == "sdar" else {}
    model = random_model(
        seed=seed, d_model=2 * half * heads[0], n_heads=heads[0], n_key_value_heads=heads[1], n_layers=layers,
        d_mlp=d_mlp, gated_mlp=True, act_fn="silu", qkv_bias=format in BIASED, use_qk_norm=format in QK_NORMS,
        readout_shift=-1 if format in SHIFTED else 0, mask_token_id=12 if format in MDMS else None,
        tie_word_embeddings=tied, **{"attention": "bidirectional" if format in FULL else "causal", **blocks},
    )  # fmt: skip
    save_checkpoint(model, tmp_path, format, max_shard_size=2000)
    assert_same_models(load_checkpoint(tmp_path), model)


def test_saving_replaces_what_the_folder_held(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "dream", shards=4, tokenizer=True)
    (tmp_path / "model-notes.safetensors").write_text("not a checkpoint's")
    model = random_model()
    save_checkpoint(model, tmp_path, "mdm_interp")
    kept = {"config.json", "digests.json", "model.safetensors", "model-notes.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert_same_models(load_checkpoint(tmp_path), model)


def all_that_is_read(folder: Path) -> tuple[Any, ...]:
    model = load_checkpoint(folder)
    vocab = None if model.tokenizer is None else model.tokenizer.get_vocab()
    return model.cfg, weights_digest(model.state_dict()), vocab


@pytest.fixture(params=["alike", "of another format"])
def two(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, HookedTransformer, tuple[Any, ...]]:
    """A checkpoint in several files, a model to be saved over it, and what will be read of that."""
    write_checkpoint(tmp_path / "made", "dream", tokenizer=True)
    model = load_checkpoint(tmp_path / "made")
    save_checkpoint(model, tmp_path / "old", "dream", max_shard_size=20_000)
    (tmp_path / "old" / "notes.txt").write_text("of somebody")
    if request.param == "alike":  # so much that nobody would see if one had some of the other's files
        model.W_E.data *= 2
        model.cfg = model.cfg.model_copy(update={"eps": 1e-3})
    else:
        model = random_model()
    save(model, tmp_path / "new")
    return tmp_path / "old", model, all_that_is_read(tmp_path / "new")


def save(model: HookedTransformer, folder: Path) -> None:
    """In few files, or in many."""
    if model.tokenizer is None:
        save_checkpoint(model, folder, "mdm_interp")
    else:
        save_checkpoint(model, folder, "dream", max_shard_size=20_000)


def assert_saved(
    model: HookedTransformer, folder: Path, read: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving goes as if nothing had been there."""
    monkeypatch.setattr(files, "LEFT_SECONDS", -1.0)
    save(model, folder)
    assert all_that_is_read(folder) == read
    names = {path.name for path in (folder.parent / "new").iterdir()} | {"notes.txt"}
    assert {path.name for path in folder.iterdir()} == names


@pytest.mark.promise("a disk that is full when a checkpoint is saved over another", "the other, or the new one")
def test_a_full_disk_leaves_a_whole_checkpoint(
    two: tuple[Path, HookedTransformer, tuple[Any, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, Any], None],
) -> None:
    old, model, new = two
    before, number = all_that_is_read(old), 0
    for number in itertools.count(1):
        folder = Path(shutil.copytree(old, tmp_path / "full"))
        with full_at(number) as made:
            try:
                save(model, folder)
            except OSError as error:
                assert (error.errno, error.filename) == (errno.ENOSPC, str(folder))
        assert list(folder.glob("*.tmp")) == []
        assert all_that_is_read(folder) in (before, new), number
        assert_saved(model, folder, new, monkeypatch)
        shutil.rmtree(folder)
        if made[0] < number:
            break
    assert number > 15
    record_property("times", number - 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.promise("SIGKILL at each touch of the disk when a checkpoint is saved over another", "one of them, whole")
def test_a_kill_leaves_a_whole_checkpoint(
    two: tuple[Path, HookedTransformer, tuple[Any, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, Any], None],
) -> None:
    old, model, new = two
    before, seen, number = all_that_is_read(old), set[bool](), 0
    for number in itertools.count(1):
        folder = Path(shutil.copytree(old, tmp_path / "killed"))
        if not (process := os.fork()):
            killed_at_touch(number)
            save(model, folder)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        read = all_that_is_read(folder)
        assert read in (before, new), number
        seen.add(read == new)
        assert_saved(model, folder, new, monkeypatch)
        shutil.rmtree(folder)
        if not code:
            break
    assert number > 30 and seen == {False, True}
    record_property("times", number - 1)


@pytest.mark.promise("a flipped bit or a lost end, anywhere in a saved checkpoint", "noticed, or nothing is changed")
def test_damage_anywhere_in_a_saved_checkpoint_is_noticed_or_changes_nothing(
    tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    write_checkpoint(tmp_path / "made", "dream", tokenizer=True)
    save_checkpoint(load_checkpoint(tmp_path / "made"), folder := tmp_path / "saved", "dream", max_shard_size=20_000)
    whole, times, noticed = all_that_is_read(folder), 0, 0
    for path in sorted(folder.iterdir()):
        for how in damaged(path, 8):
            times += 1
            try:
                assert all_that_is_read(folder) == whole, how
            except UserError:
                noticed += 1
    assert noticed > 0.9 * times
    record_property("times", times)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_link_that_leads_nowhere_is_a_file_that_cannot_be_read(file: str, target: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada", tokenizer=True)
    (tmp_path / file).unlink()
    (tmp_path / file).symlink_to(file if target == "itself" else target)
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_a_header_that_has_a_name_twice_is_refused(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, "llada")
    path = tmp_path / "model.safetensors"
    content, name = path.read_bytes(), next(iter(made.tensors))
    size = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + size].decode(), content[8 + size :]
    (entry,) = re.findall(rf'"{re.escape(name)}":\{{.*?\}}', header)
    doubled = header.rstrip().removesuffix("}") + f",{entry}}}"
    path.write_bytes(len(doubled).to_bytes(8, "little") + doubled.encode() + body)
    with pytest.raises(UserError, match=rf"cannot be read as safetensors \(its header: '{name}' is there twice\)"):
        load_checkpoint(tmp_path)


def test_a_header_that_is_too_large_to_look_for_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, "llada")
    monkeypatch.setattr("mdm_interp.checkpoints.weights.MOST_HEADER", 100)
    with pytest.raises(UserError, match=r"\(its header has \d+ bytes, and at most 100 are read\)"):
        load_checkpoint(tmp_path)


def test_the_home_of_nobody_is_no_folder() -> None:
    with pytest.raises(UserError, match=r"^~nobody-has-this-name/x: not a folder, nor a Hugging Face hub id"):
        load_checkpoint("~nobody-has-this-name/x")


def test_digests_that_are_a_dangling_link_are_not_passed_over(tmp_path: Path) -> None:
    save_checkpoint(random_model(), tmp_path, "mdm_interp")
    (tmp_path / "digests.json").unlink()
    (tmp_path / "digests.json").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"digests\.json: cannot be read"):
        load_checkpoint(tmp_path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = random_model()
    save_checkpoint(model, tmp_path, "mdm_interp")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.W_U.data[0, 0] = float("nan")
    with pytest.raises(
        UserError, match=r"^model: unembed\.W_U has NaN or infinite numbers, which are not loaded again"
    ):
        save_checkpoint(model, tmp_path, "mdm_interp")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_loaded_model_no_longer_needs_its_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada")
    model = load_checkpoint(tmp_path)
    before = logits_of(model, vocab_tokens())
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(2000)
        file.write(b"\0" * 4000)
    assert torch.equal(logits_of(model, vocab_tokens()), before)


@pytest.mark.parametrize(
    ("format", "changes", "reason"),
    [
        ("llama", {"qkv_bias": True}, "qkv_bias is True, not False"),
        ("qwen2", {"qkv_bias": False}, "qkv_bias is False, not True"),
        ("llada", {"readout_shift": -1}, "readout_shift is -1, not 0"),
        ("dream", {"attention": "causal", "readout_shift": -1}, "attention is 'causal', not 'bidirectional'"),
        ("llada", {"mask_token_id": None}, "mask_token_id is not set"),
        ("llama", {"rotary_dim": 2}, "rotary_dim is 2, not d_head 4"),
        ("llada", {"d_head": 6}, "d_head is 6, not d_model / n_heads"),
        ("llada", {"rotary_scaling": {"rope_type": "linear", "factor": 2.0}}, "rotary_scaling is set"),
        ("llama", {"use_qk_norm": True}, "use_qk_norm is True, not False"),
        ("llama", {"d_vocab_out": 12}, "d_vocab_out is 12, not None"),
        ("a2d-qwen3", {"attention": "block_causal", "block_size": 4}, "attention is 'block_causal'"),
        ("qwen2", {"rotary_adjacent_pairs": True}, "rotary_adjacent_pairs is True, not False"),
        ("llama", {"d_mlp": None, "gated_mlp": False}, "d_mlp is not set"),
    ],
)
def test_a_format_that_cannot_hold_a_model_says_why(
    format: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    fits = {
        "d_mlp": 24, "gated_mlp": True, "act_fn": "silu", "qkv_bias": format in BIASED,
        "use_qk_norm": format in QK_NORMS, "attention": "bidirectional" if format in FULL else "causal",
        "readout_shift": -1 if format in SHIFTED else 0, "mask_token_id": 12 if format in MDMS else None,
    }  # fmt: skip
    save_checkpoint(random_model(**fits), tmp_path / "fits", format)
    with pytest.raises(UserError, match=f"format: '{format}' cannot hold this model .*{reason}.*use 'mdm_interp'"):
        save_checkpoint(random_model(**fits | changes), tmp_path / "refused", format)
    assert not (tmp_path / "refused").exists()


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"format: 'gguf' is unknown; choose among llada, dream, a2d-qwen3, .*, qwen3, mdm_interp"
    ):
        save_checkpoint(random_model(), tmp_path, "gguf")


# ---- dtype, device, memory


def test_dtype_is_what_is_asked_for_or_what_is_stored(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, "llada", dtype=torch.bfloat16)
    stored = load_checkpoint(tmp_path)
    assert stored.cfg.dtype == torch.bfloat16
    assert torch.equal(stored.W_E, made.tensors["model.transformer.wte.weight"])
    for dtype in ("float32", torch.float32):
        cast = load_checkpoint(tmp_path, dtype=dtype)
        assert cast.cfg.dtype == torch.float32
        assert {parameter.dtype for parameter in cast.parameters()} == {torch.float32}
        tokens = vocab_tokens()
        assert_close(logits_of(cast, tokens), reference_logits(made, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype: 'int8' is not one of float64, float32, bfloat16, float16"),
        ({"device": "nowhere"}, "device: 'nowhere' cannot be used here"),
        ({"device_map": "balanced"}, "device_map: 'balanced' is not known; give 'auto', or a device"),
        ({"device_map": {"blocks": "cpu"}}, "device_map: says nothing of embed.W_E"),
        ({"device_map": {"": "cpu", "lm_head": "cpu"}}, "device_map: the model has no module 'lm_head'"),
        ({"revision": "main"}, "revision: 'main' is for hub ids"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada")
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="'auto' is the GPU's where there is one")
@pytest.mark.parametrize("format", ["llada", "qwen2"])
@pytest.mark.parametrize(
    "device_map", ["auto", {"": "cpu"}, dict.fromkeys(("embed", "blocks", "blocks.1", "unembed", "ln_final"), "cpu")]
)
def test_a_device_map_changes_nothing_else(format: str, device_map: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, format)
    assert_same_models(load_checkpoint(tmp_path, device_map=device_map), load_checkpoint(tmp_path))


def test_every_block_computes_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `meta` device stands for a second one: it computes shapes, and refuses to mix with the CPU."""
    monkeypatch.setattr("mdm_interp.checkpoints.placement.check_device", lambda device: device)
    write_checkpoint(tmp_path, "qwen2", num_hidden_layers=3)
    model = load_checkpoint(tmp_path, device_map={"": "cpu", "blocks.2": "meta", "unembed": "meta"})
    assert model.ln_final.w.is_meta  # goes with the unembedding, whatever the map says
    assert model.cfg.device == "cpu"
    seen: dict[str | None, str] = {}

    def note(tensor: Tensor, *, hook: HookPoint) -> None:
        seen[hook.name] = tensor.device.type

    for layer in range(3):
        model.add_hook(f"blocks.{layer}.hook_resid_post", note)
    model.add_hook("ln_final.hook_normalized", note)
    with pytest.raises(NotImplementedError, match="meta"), torch.no_grad():
        model(vocab_tokens())  # only the way back to the embedding's device is not to be had
    assert list(seen.values()) == ["cpu", "cpu", "meta", "meta"]


def test_a_device_map_that_splits_a_block_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdm_interp.checkpoints.placement.check_device", lambda device: device)
    write_checkpoint(tmp_path, "llama")
    with pytest.raises(UserError, match=r"device_map: splits blocks\.1"):
        load_checkpoint(tmp_path, device_map={"": "cpu", "blocks.1.mlp": "meta"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_on_two_devices_computes_the_same(format: str, tied: bool, tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, format, **in_format(format, tied=tied))
    tokens = vocab_tokens()
    expected = reference_logits(made, tokens)
    for device_map in ({"": "cpu", "blocks.1": 0}, {"": 0, "blocks.0": "cpu"}, "auto", {"": "cuda"}):
        model = load_checkpoint(tmp_path, device_map=device_map)
        logits, cache = model.run_with_cache(tokens.to(model.cfg.device))
        assert logits.device == model.W_E.device
        assert_close(logits.cpu().detach(), expected, atol=TOLERANCE, rtol=0)
        assert cache["pattern", 1].device == model.blocks[1].attn.W_Q.device
        logits.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("position", ["rope", "alibi", "t5_bias", "sinusoidal"])
def test_construction_without_weights_takes_neither_memory_nor_random_numbers(position: Any) -> None:
    state = torch.get_rng_state()
    cfg = ModelConfig(d_model=10_000, n_heads=2, d_vocab=2**24, n_ctx=8, d_mlp=2**20, position=position)
    model = HookedTransformer(cfg, init_weights=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.W_E.is_meta and model.W_E.shape == (2**24, 10_000)
    constants = [value for value in vars(model.pos_embed).values() if isinstance(value, Tensor)]
    assert not any(tensor.is_meta for tensor in [*constants, *model.pos_embed.buffers()])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("stored", "dtype"), [(torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.float32, "bfloat16")]
)
def test_loading_holds_the_weights_and_one_shard(stored: torch.dtype, dtype: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "small", "llada")
    big: dict[str, Any] = {
        "d_model": 1024,
        "n_layers": 8,
        "mlp_hidden_size": 3072,
        "vocab_size": 4000,
        "embedding_size": 4000,
    }
    write_checkpoint(tmp_path / "big", "llada", shards=10, dtype=stored, **big)
    assert_holds_weights_and_one_shard(tmp_path / "small", tmp_path / "big", dtype=dtype)


# ---- what is wrong with a checkpoint

Damage = Callable[[Checkpoint], object]


def drop(*names: str) -> Damage:
    return lambda made: write_tensors(made.folder, {n: t for n, t in made.tensors.items() if n not in names})


def put(**tensors: Tensor) -> Damage:
    return lambda made: write_tensors(made.folder, made.tensors | {n.replace("__", "."): t for n, t in tensors.items()})


def test_all_tensors_that_do_not_fit_are_listed_at_once(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, "dream")
    tensors = dict(made.tensors)
    del tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(16)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(25, 16)
    write_tensors(tmp_path, tensors, shards=2)
    with pytest.raises(UserError) as raised:
        (tmp_path / "model.safetensors").unlink()
        load_checkpoint(tmp_path)
    message = str(raised.value)
    for part in (
        f"{tmp_path}: tensors do not fit config.json: ",
        "lm_head.weight is missing",
        "model.layers.0.self_attn.o_proj.bias is unknown",
        "model.layers.0.mlp.up_proj.weight is [25, 16], not [24, 16]",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("format", FORMATS)
def test_a_config_that_contradicts_the_tensors_is_refused(format: str, tmp_path: Path) -> None:
    for change, part in (
        ({"n_layers": 3}, "2.* is missing"),
        ({"n_layers": 1}, "1.* is unknown"),
        ({"kv_heads": 1}, "k_proj.weight is "),
    ):
        write_checkpoint(
            tmp_path, format, edit=lambda config, change=change: config.update(in_format(format, **change))
        )
        with pytest.raises(UserError, match=f"tensors do not fit config.json: .*{part}"):
            load_checkpoint(tmp_path)


def test_buffers_of_old_files_are_passed_over(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, "llama")
    put(**{"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(2)})(made)
    tokens = vocab_tokens()
    assert_close(logits_of(load_checkpoint(tmp_path), tokens), reference_logits(made, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_a_tied_unembedding_may_be_stored_if_it_is_the_embedding(format: str, tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, format, **in_format(format, tied=True))
    embedding, unembedding = (name_in(format, name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    write_tensors(tmp_path, made.tensors | {unembedding: made.tensors[embedding].clone()})
    assert load_checkpoint(tmp_path).cfg.tie_word_embeddings
    for other in (made.tensors[embedding] + 1, made.tensors[embedding].half()):
        write_tensors(tmp_path, made.tensors | {unembedding: other})
        with pytest.raises(UserError, match=f"ties {unembedding} to {embedding}, but the two differ"):
            load_checkpoint(tmp_path)


def truncate(file: str) -> Damage:
    def damage(made: Checkpoint) -> None:
        path = made.folder / file
        path.write_bytes(path.read_bytes()[:-100])

    return damage


def overwrite(file: str, content: bytes) -> Damage:
    return lambda made: (made.folder / file).write_bytes(content)


SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate(SHARD), rf"{SHARD}: cannot be read as safetensors"),
        (overwrite(SHARD, b""), rf"{SHARD}: cannot be read as safetensors"),
        (overwrite(SHARD, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), rf"{SHARD}: cannot be read"),
        (lambda made: (made.folder / SHARD).unlink(), rf"index.json: names files that are missing: {SHARD}"),
        (lambda made: shutil.copy(made.folder / "model-00001-of-00003.safetensors", made.folder / SHARD), "is both in"),
        (overwrite("model.safetensors.index.json", b"{}"), "index.json: 'weight_map' does not name a file"),
        (overwrite("model.safetensors.index.json", b"{"), "index.json: cannot be read as JSON"),
        (overwrite("model.safetensors.index.json", b'{"weight_map": {"a": "../a.safetensors"}}'), "which are not"),
        (lambda made: (made.folder / "model.safetensors.index.json").unlink(), "has safetensors, but neither"),
        (lambda made: (made.folder / "config.json").unlink(), "config.json: cannot be read as JSON"),
        (overwrite("config.json", b"[]"), "config.json: expected a JSON object"),
        (overwrite("config.json", b"\xff\xfe"), "config.json: cannot be read as JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_damaged_files_give_one_clear_error(damage: Damage, message: str, tmp_path: Path) -> None:
    damage(write_checkpoint(tmp_path, "llada", shards=3))
    with pytest.raises(UserError, match=message) as raised:
        load_checkpoint(tmp_path)
    assert "\n" not in str(raised.value)


def test_an_index_that_places_tensors_where_they_are_not_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", shards=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(UserError, match=r"does not fit the shards \(model.extra is not in model-00001"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    made = write_checkpoint(tmp_path, "dream")
    bad = made.tensors[name].clone()
    bad.view(-1)[3] = value
    write_tensors(tmp_path, made.tensors | {name: bad})
    with pytest.raises(UserError) as raised:
        load_checkpoint(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path / 'model.safetensors'}: tensor {name} has NaN or infinite numbers in float32; load it in "
        "another dtype, or download the file again"
    )


def test_weights_that_a_dtype_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, "dream")
    large = made.tensors["model.norm.weight"].clone()
    large[0] = 1e6
    write_tensors(tmp_path, made.tensors | {"model.norm.weight": large})
    assert load_checkpoint(tmp_path).cfg.n_layers == 2
    with pytest.raises(
        UserError, match=r"model\.norm\.weight has NaN or infinite numbers in float16; load it in another dtype"
    ):
        load_checkpoint(tmp_path, dtype="float16")


@pytest.mark.parametrize("format", ["llada", "mdm_interp"])
def test_a_flipped_bit_of_a_checkpoint_of_ours_is_noticed(tmp_path: Path, format: str) -> None:
    model = random_model(n_heads=2, d_mlp=24, mask_token_id=12)
    model = load_checkpoint(write_checkpoint(tmp_path / "theirs", "llada").folder) if format == "llada" else model
    save_checkpoint(model, tmp_path / "ours", format=format)
    path = tmp_path / "ours" / "model.safetensors"
    whole = path.read_bytes()
    for at in (len(whole) // 2, len(whole) - 1):
        content = bytearray(whole)
        content[at] ^= 1
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=rf"^{path}: \S+ is not as it was saved; train it again, or get another copy"
        ):
            load_checkpoint(tmp_path / "ours")
    path.write_bytes(whole)
    assert load_checkpoint(tmp_path / "ours").state_dict().keys() == model.state_dict().keys()


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, "llama")
    write_tensors(tmp_path, made.tensors | {"model.norm.weight": torch.ones(16, dtype=torch.int8)})
    with pytest.raises(UserError, match=r"model.norm.weight \(I8\)"):
        load_checkpoint(tmp_path)


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return (open, (str(self.path), "w"))


@pytest.mark.promise("a checkpoint that holds pickles alone", "refused by name, and never unpickled")
def test_a_checkpoint_with_only_pickles_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, "llama")
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "exploded"), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has only pickled weights \(pytorch_model.bin\).*safetensors"):
        load_checkpoint(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.promise("a checkpoint with code of its own", "never run")
def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    made = write_checkpoint(folder, "dream", tokenizer=True)
    assert "auto_map" in made.config
    for name in ("modeling_dream", "configuration_dream", "tokenization_dream"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\nclass DreamTokenizer: pass\n")
    torch.save(Bomb(tmp_path / "exploded"), folder / "pytorch_model.bin")
    assert load_checkpoint(folder).tokenizer is not None
    assert not (tmp_path / "exploded").exists()


# ---- config.json

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llada", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is "),
    *((format, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling is ") for format in FORMATS),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor: missing"),
    ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "wide": 1}}, "rope_scaling is .*wide in it is not"),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters.factor: missing"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    ("sdar", {"block_size": None}, "block_size is missing, so give it .*--block-size"),
    ("sdar", {"block_size": 0}, "block_size: .*got 0"),
    ("nemotron_labs_diffusion", {"dlm_paradigm": "autoregressive"}, "dlm_paradigm is 'autoregressive', and only bid"),
    ("qwen2", {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "rope_parameters is .*partial"),
    ("qwen2", {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 1000000.0 but rope_parameters"),
    *((format, {"quantization_config": {"bits": 4}}, "quantization_config is ") for format in FORMATS),
    *((format, {"use_sliding_window": True}, "use_sliding_window is True") for format in ("qwen2", "dream")),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is "),
    ("dream", {"use_mrope": True}, "use_mrope is True"),
    ("llama", {"attention_bias": True}, "attention_bias is True, and only False is supported"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    *((format, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and only 1.0") for format in FORMATS),
    *((format, {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0") for format in FORMATS),
    ("llada", {"block_size": 32}, "block_size is 32, and only None"),
    *((format, {"block_size": 32}, "block_size is 32, so say whether") for format in ("llama", "qwen3", "a2d-qwen3")),
    ("llama", {"sliding_window": 4096}, "sliding_window is 4096"),
    ("llama", {"layer_types": ["sliding_attention"]}, "layer_types is "),
    ("dream", {"is_causal": True}, "is_causal is True"),
    *((format, {"hidden_act": "gelu"}, "hidden_act is 'gelu'") for format in ("llama", "qwen2", "dream")),
    ("llada", {"activation_type": "swiglu"}, "activation_type is 'swiglu'"),
    ("llada", {"alibi": True}, "alibi is True"),
    ("llada", {"rope": False}, "rope is False"),
    ("llada", {"include_bias": True}, "include_bias is True"),
    ("llada", {"include_qkv_bias": True}, "include_qkv_bias is True"),
    ("llada", {"bias_for_layer_norm": True}, "bias_for_layer_norm is True"),
    ("llada", {"layer_norm_with_affine": False}, "layer_norm_with_affine is False"),
    ("llada", {"layer_norm_type": "default"}, "layer_norm_type is 'default'"),
    ("llada", {"block_type": "sequential"}, "block_type is 'sequential'"),
    ("llada", {"block_group_size": 2}, "block_group_size is 2"),
    ("llada", {"attention_layer_norm": True}, "attention_layer_norm is True"),
    ("llada", {"input_emb_norm": True}, "input_emb_norm is True"),
    ("llada", {"scale_logits": True}, "scale_logits is True"),
    ("llada", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("llada", {"embedding_size": 8}, "embedding_size 8 is below vocab_size 320"),
    ("llada", {"multi_query_attention": True}, "n_kv_heads 4 contradicts multi_query_attention True"),
    ("llada", {"mask_token_id": None}, "mask_token_id is null"),
    ("llada", {"mask_token_id": 400}, "mask_token_id: 400 is outside the vocabulary"),
    ("dream", {"mask_token_id": None}, "mask_token_id is null"),
    ("dream", {"num_attention_heads": 3}, "num_attention_heads: 3 does not divide hidden_size 16"),
    ("llama", {"hidden_size": "wide"}, "hidden_size: .*got 'wide'"),
    ("llada", {"rope_theta": -1.0}, "rope_theta: .*got -1.0"),
    ("llada", {"vocab_size": "many"}, "vocab_size"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "is not supported; LLaDAModelLM"),
    ("llama", {"model_type": "qwen2"}, r"\['LlamaForCausalLM'\] with model_type 'qwen2' is not supported"),
    ("llama", {"architectures": None, "model_type": "mistral"}, "model_type 'mistral' is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "changes", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_config_this_package_does_not_compute_is_refused_by_name(
    format: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, format, edit=lambda config: config.update(changes))
    with pytest.raises(UserError, match=rf"config\.json: .*{message}") as raised:
        load_checkpoint(tmp_path)
    assert "\n" not in str(raised.value)


NEEDED = {
    "llada": [
        "d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "vocab_size", "embedding_size", "rope",
        "rope_theta", "rms_norm_eps", "layer_norm_type", "block_type", "block_group_size", "activation_type",
        "weight_tying", "include_bias", "include_qkv_bias", "max_sequence_length", "mask_token_id",
    ],
    "llama": [
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "rope_theta",
    ],
}  # fmt: skip
NEEDED |= {format: NEEDED["llama"] for format in ("qwen3", "a2d-qwen3", "a2d-qwen2", "sdar")}
NEEDED["nemotron_labs_diffusion"] = [*NEEDED["llama"], "dlm_paradigm"]
NEEDED["qwen2"] = [*NEEDED["llama"], "use_sliding_window"]
NEEDED["dream"] = [*NEEDED["llama"], "mask_token_id"]
DOCUMENTED = ("num_key_value_heads", "tie_word_embeddings", "rope_theta")
NEEDED["llama"] = NEEDED["a2d-llama"] = [field for field in NEEDED["llama"] if field not in DOCUMENTED]


@pytest.mark.parametrize("format", FORMATS)
def test_every_field_of_the_families_is_computed_refused_or_known_to_change_nothing(format: str) -> None:
    """Fed with a value that no config has, each field of any family's config changes the model, is refused by name, or
    says nothing of what is computed; one that nobody knows is named in a warning."""
    families = [family().to_dict() for family in (LlamaConfig, Qwen2Config, Qwen3Config, MistralConfig, Gemma2Config)]
    fields = {field for config in [*families, *RELEASED.values()] for field in config} | {"partial_rotary_factor"}
    fields -= {"mlp_ratio"}  # counts only where mlp_hidden_size is null
    fields -= {"block_size" if format == "nemotron_labs_diffusion" else "dlm_paradigm"}  # the other paradigm's
    if "use_sliding_window" in RELEASED[format]:
        fields -= {"sliding_window"}  # and this where use_sliding_window is true
    described, plain = FORMATS_OF[format], RELEASED[format]
    before = described.read_config(plain)
    for field in sorted(field for field in fields if not HARMLESS.fullmatch(field)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                after = described.read_config({**plain, field: 0.375})
            except UserError as error:
                assert re.search(rf"\b{field}\b", str(error)), (field, str(error))
            else:
                assert after != before or any(field in str(one.message) for one in said), field


@pytest.mark.parametrize("format", FORMATS)
def test_released_configs_load_without_a_warning_and_unknown_fields_with_one(format: str) -> None:
    FORMATS_OF[format].read_config(RELEASED[format])
    strange = {f"strange_{i}": i for i in range(5)}
    with pytest.warns(UserWarning, match="not known here .*: strange_0, strange_1, strange_2, and 2 more; if one"):
        FORMATS_OF[format].read_config({**RELEASED[format], **strange})


def test_a_llama_from_before_some_fields_has_what_is_documented_of_them(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, "llama", num_key_value_heads=4, rope_theta=1e4)
    config = {
        name: value
        for name, value in made.config.items()
        if name not in ("rope_theta", "num_key_value_heads", "tie_word_embeddings", "rope_scaling")
    }
    write_json(tmp_path / "config.json", config)
    with pytest.warns(UserWarning, match="documents as rope_theta 10000.0, num_key_value_heads 4, .*False"):
        model = load_checkpoint(tmp_path)
    documented = LlamaConfig(num_attention_heads=4)
    assert documented.num_key_value_heads == 4 and documented.tie_word_embeddings is False
    tokens = vocab_tokens()
    assert_close(logits_of(model, tokens), reference_logits(made, tokens), atol=TOLERANCE, rtol=0)


# ---- models that were converted to masked diffusion and kept the class of a causal one


@pytest.mark.parametrize("format", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("shift", [0, -1])
def test_a_converted_model_is_read_as_the_options_say(format: str, shift: int, tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, format, auto_map={"AutoModel": "modeling.Model"})
    model = load_checkpoint(tmp_path, attention="bidirectional", readout_shift=shift, mask_token_id=7)
    cfg = model.cfg
    assert (cfg.attention, cfg.readout_shift, cfg.mask_token_id) == ("bidirectional", shift, 7)
    tokens = vocab_tokens()
    expected = reference_logits(made, tokens, converted=True)
    assert_close(logits_of(model, tokens), expected, atol=TOLERANCE, rtol=0)
    causal = load_checkpoint(tmp_path, attention="causal")
    assert causal.cfg.is_causal and causal.cfg.readout_shift == -1
    assert_close(logits_of(causal, tokens), reference_logits(made, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("format", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("changes", "sign"),
    [({"auto_map": {}}, "auto_map"), ({"mask_token_id": 5}, "mask_token_id"), ({"is_causal": False}, "is_causal")],
    ids=lambda value: str(value)[:20],
)
def test_what_may_have_been_converted_is_refused_with_the_options_named(
    format: str, changes: dict[str, Any], sign: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, format, **changes)
    with pytest.raises(UserError, match=rf"has {sign}, so it may .* attention='causal' .*--mask-token-id") as raised:
        load_checkpoint(tmp_path)
    assert len(str(raised.value)) < 500
    assert load_checkpoint(tmp_path, attention="causal").cfg.is_causal
    with pytest.raises(UserError, match="readout_shift: no file says where"):
        load_checkpoint(tmp_path, attention="bidirectional", mask_token_id=3)
    found = 5 if sign == "mask_token_id" else None
    if found is None:
        with pytest.raises(UserError, match=r"mask_token_id: neither config\.json nor the tokenizer"):
            load_checkpoint(tmp_path, attention="bidirectional", readout_shift=0)
    else:
        model = load_checkpoint(tmp_path, attention="bidirectional", readout_shift=0)
        assert model.cfg.mask_token_id == found


@pytest.mark.parametrize("named", [True, False])
def test_the_mask_of_a_converted_model_may_be_its_tokenizers(named: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen2", tokenizer=True)
    assert load_checkpoint(tmp_path).cfg.is_causal, "nothing says otherwise"
    tokenizer = load_checkpoint(tmp_path).tokenizer
    token = {"mask_token": "<|MASK|>"} if named else {"additional_special_tokens": ["<|MASK|>"]}
    tokenizer.add_special_tokens(token)
    tokenizer.save_pretrained(tmp_path)
    mask = tokenizer.convert_tokens_to_ids("<|MASK|>")
    with pytest.raises(UserError, match=r"has a tokenizer with '<\|MASK\|>', so it may be"):
        load_checkpoint(tmp_path)
    model = load_checkpoint(tmp_path, attention="bidirectional", readout_shift=0)
    assert (model.cfg.mask_token_id, model.tokenizer.mask_token_id) == (mask, mask)
    with pytest.raises(UserError, match=r"mask_token_id is 3, but the tokenizer has .*; give the tokenizer files"):
        load_checkpoint(tmp_path, attention="bidirectional", readout_shift=0, mask_token_id=3)


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("llada", {"attention": "causal"}, "attention: 'causal' cannot be set, as format llada says it"),
        ("dream", {"readout_shift": 0}, "readout_shift: 0 cannot be set, as format dream says it"),
        ("a2d-qwen3", {"readout_shift": -1}, "readout_shift: -1 cannot be set"),
        ("a2d-qwen3", {"attention": "causal"}, "attention is to be 'causal', and the format's models are bidirec"),
        ("a2d-qwen3", {"block_size": 4}, "block_size: 4 does not go with bidirectional attention"),
        ("a2d-qwen3", {"attention": "block_causal"}, "block_size is missing, so give it"),
        ("qwen2", {"mask_token_id": 3}, "mask_token_id: is of a bidirectional model; give attention='bidirectional'"),
        ("qwen2", {"attention": "bidirectional", "readout_shift": 2, "mask_token_id": 1}, "readout_shift: .*2"),
        ("qwen2", {"attention": "bidirectional", "readout_shift": 0, "mask_token_id": 999}, "mask_token_id: 999"),
    ],
)
def test_options_that_do_not_fit_a_format_are_refused(
    format: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, format)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path, **options)


# ---- what is no model, or a wrapped one


def test_an_adapter_is_called_one(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(UserError, match=r"holds a PEFT adapter .* merge it into its base model"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("prefix", "said"),
    [("_orig_mod.", "torch.compile"), ("base_model.model.", "merge_and_unload"), ("module.", "DataParallel")],
)
def test_names_of_a_wrapped_model_are_explained_in_a_short_line(prefix: str, said: str, tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, "llama")
    write_tensors(tmp_path, {f"{prefix}{name}": tensor for name, tensor in made.tensors.items()})
    with pytest.raises(
        UserError, match=rf"and \d+ more\. All names begin with '{re.escape(prefix)}', which .*{said}"
    ) as raised:
        load_checkpoint(tmp_path)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("format", FORMATS)
def test_every_missing_field_is_named_and_none_filled_in(format: str, tmp_path: Path) -> None:
    for field in NEEDED[format]:
        write_checkpoint(tmp_path, format, edit=lambda config, field=field: config.pop(field))
        with pytest.raises(UserError, match=rf"config\.json: .*\b{field} is missing"):
            load_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", {name: RELEASED[format][name] for name in ("architectures", "model_type")})
    with pytest.raises(UserError) as raised:
        load_checkpoint(tmp_path)
    named = re.findall(r"(\w+) is missing", str(raised.value))
    assert len(named) == 3 and set(named) <= set(NEEDED[format])
    assert re.search(r"and \d+ more", str(raised.value)) and len(str(raised.value)) < 500


@pytest.mark.parametrize("left_out", ["architectures", "model_type"])
@pytest.mark.parametrize("format", FORMATS)
def test_class_or_model_type_alone_names_the_format(format: str, left_out: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, format, edit=lambda config: config.pop(left_out))
    load_checkpoint(tmp_path)


def test_an_own_config_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    save_checkpoint(random_model(), tmp_path, "mdm_interp")
    edit_config(tmp_path, d_heads=3)
    with pytest.raises(UserError, match=r"config\.json: d_heads: no such field"):
        load_checkpoint(tmp_path)


# ---- hub ids


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline cache of huggingface_hub's layout."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cache(hub_cache: Path, name: str, commit: str, revision: str, format: str, **changes: Any) -> Checkpoint:
    repository = hub_cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    return write_checkpoint(repository / "snapshots" / commit, format, tokenizer=True, **changes)


def test_a_hub_id_loads_from_the_offline_cache(hub_cache: Path) -> None:
    made = cache(hub_cache, "GSAI-ML/LLaDA-8B-Base", "a" * 40, "main", "llada", shards=2)
    cache(hub_cache, "GSAI-ML/LLaDA-8B-Base", "b" * 40, "other", "llada", n_layers=1)
    model = load_checkpoint("GSAI-ML/LLaDA-8B-Base")
    tokens = vocab_tokens()
    assert_close(logits_of(model, tokens), reference_logits(made, tokens), atol=TOLERANCE, rtol=0)
    assert model.tokenizer.mask_token == "<|mdm_mask|>"
    assert load_checkpoint("GSAI-ML/LLaDA-8B-Base", revision="other").cfg.n_layers == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nobody/nothing", "nobody/nothing: not a folder, and not to be had from the Hugging Face hub"),
        ("./nothing", r"\./nothing: not a folder, nor a Hugging Face hub id"),
        ("a/b/c", "a/b/c: not a folder, nor a Hugging Face hub id"),
        (Path("nobody/nothing"), "nobody/nothing: not a folder, nor a Hugging Face hub id"),
        ("", ": has neither|not a folder|config.json"),
    ],
)
def test_what_is_neither_folder_nor_hub_id_is_refused(hub_cache: Path, source: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load_checkpoint(source)
    assert "\n" not in str(raised.value)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada")
    with pytest.raises(UserError, match=r"config\.json: not a folder"):
        load_checkpoint(str(tmp_path / "config.json"))


# ---- Dream's shift


def test_a_model_trained_with_the_shift_is_read_with_it_after_loading(tmp_path: Path) -> None:
    """Sequences of two halves alike: trained to predict position i at i - 1, the model does so from disk, and nowhere
    else."""
    torch.manual_seed(0)
    model = random_model(
        seed=3, d_model=32, d_mlp=64, gated_mlp=True, act_fn="silu", qkv_bias=True, mask_token_id=12, readout_shift=-1,
        initializer_range=0.1,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = seeded(0)
    for _ in range(300):
        half = torch.randint(12, (32, 4), generator=generator)
        tokens = torch.cat([half, half], dim=1)
        maskable = (torch.arange(8) > 3).expand_as(tokens)
        noisy, masked, t = mask_tokens(tokens, 12, generator, maskable)
        loss = mdm_loss(model(noisy)[:, :-1], tokens[:, 1:], masked[:, 1:], t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_checkpoint(model, tmp_path, "dream")
    loaded = load_checkpoint(tmp_path)
    half = torch.randint(12, (200, 4), generator=generator)
    tokens = torch.cat([half, torch.full_like(half, 12)], dim=1)
    predicted = logits_of(loaded, tokens).argmax(-1)
    assert loaded.cfg.readout_shift is not None
    rows = torch.arange(4, 8) + loaded.cfg.readout_shift
    assert (predicted[:, rows] == half).float().mean() > 0.95
    assert (predicted[:, 4:8] == half).float().mean() < 0.5
