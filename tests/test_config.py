"""Configs: what is refused and how it is said, YAML, digests; and files that are whole or absent."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import EXPERTS, TINY, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from stranger_helpers import outcome_of

from mdm_interp.config import (
    BenchmarkConfig,
    Config,
    Experts,
    FactConfig,
    ModelConfig,
    RotaryScaling,
    TrainConfig,
    one_line,
)
from mdm_interp.errors import UserError
from mdm_interp.files import replacing, write_text

# ---- mistakes: fields, and what the message must say about the field, its value and the fix

MODEL_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"d_model": 0}, r"d_model: .*greater than 0 \(got 0\)"),
    ({"d_model": "wide"}, r"d_model: .*integer.* \(got 'wide'\)"),
    ({"d_model": None}, r"d_model: .*integer.* \(got None\)"),
    ({"n_heads": 3}, r"n_heads: 3 does not divide d_model 16; choose a divisor or set d_head"),
    ({"n_heads": -1}, r"n_heads: .*greater than 0 \(got -1\)"),
    ({"n_ctx": 2.5}, r"n_ctx: .*integer.* \(got 2.5\)"),
    ({"n_key_value_heads": 3}, r"n_key_value_heads: 3 does not divide n_heads 4; use a divisor"),
    ({"d_model": 12}, r"d_head: 3 is odd.*make it even"),
    ({"d_head": 5}, r"d_head: 5 is odd.*make it even"),
    ({"rotary_dim": 3}, r"rotary_dim: 3 must be even and at most d_head \(4\)"),
    ({"rotary_dim": 6}, r"rotary_dim: 6 must be even and at most d_head \(4\)"),
    ({"rotary_base": 0}, r"rotary_base: .*greater than 0 \(got 0\)"),
    ({"position": "ropee"}, r"position: 'ropee' is not one of 'rope', 'alibi'.*; correct it, or register it"),
    ({"position": ["rope"]}, r"position: \['rope'\] is not one of 'rope', 'alibi'.*; correct it"),
    ({"attention": "left"}, r"attention: .*'bidirectional', 'causal' or 'block_causal' \(got 'left'\)"),
    ({"normalization_type": "LNPre"}, r"normalization_type: .*'RMS' or 'LN' \(got 'LNPre'\)"),
    ({"act_fn": "swish"}, r"act_fn: .*'silu' \(got 'swish'\)"),
    ({"dtype": "int8"}, "dtype: 'int8' is not one of float64, float32, bfloat16, float16; choose one of them"),
    ({"readout_shift": 1}, r"readout_shift: .*less than or equal to 0 \(got 1\)"),
    ({"readout_shift": False}, r"readout_shift: .*integer \(got False\)"),
    ({"readout_shift": -2}, r"readout_shift: .*greater than or equal to -1 \(got -2\)"),
    ({"gated_mlp": True}, r"gated_mlp: true needs an MLP; set d_mlp"),
    ({"experts": EXPERTS}, r"experts: they are gated MLPs after RMSNorm; set gated_mlp, d_mlp and normalization_type"),
    (
        {"rotary_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0}},
        r"rotary_scaling: original_max_position_embeddings: missing, and rope_type 'yarn' needs it; add it",
    ),
    (
        {"rotary_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32.0}},
        r"rotary_scaling: beta_fast: 32.0 is not of rope_type 'linear'; leave it out",
    ),
    ({"mask_token_id": 13}, r"mask_token_id: 13 is outside the vocabulary; d_vocab must be at least 14"),
    ({"mask_token_id": -1}, r"mask_token_id: .*greater than or equal to 0 \(got -1\)"),
    ({"d_model": "16"}, r"d_model: .*integer.* \(got '16'\)"),
    ({"d_model": True}, r"d_model: .*integer.* \(got True\)"),
    ({"d_model": 10**9}, r"d_model: .*less than or equal to 1048576 \(got 1000000000\)"),
    ({"n_layers": 10**4}, r"n_layers: .*less than or equal to 1000 \(got 10000\)"),
    ({"n_ctx": 10**12}, r"n_ctx: .*less than or equal to 16777216"),
    ({"n_ctx": 2**24, "position": "sinusoidal"}, r"n_ctx: 16777216 positions of d_model 16 make a table .*; lower it"),
    ({"eps": float("inf")}, r"eps: .*less than .* \(got inf\)"),
    ({"eps": float("nan")}, r"eps: .* \(got nan\)"),
    ({"eps": 1e29}, r"eps: .*less than or equal to 1 \(got 1e\+?29\)"),
    ({"eps": True}, r"eps: .*number \(got True\)"),
    ({"qkv_bias": 1}, r"qkv_bias: .*boolean \(got 1\)"),
    ({"qkv_bias": "on"}, r"qkv_bias: .*boolean \(got 'on'\)"),
    ({"d_modle": 16}, r"d_modle: no such field; remove it or correct its spelling"),
    (
        {"position": "t5_bias", "relative_attention_num_buckets": 3},
        r"relative_attention_num_buckets: 3 is too few for bidirectional attention; use at least 4",
    ),
    (
        {"position": "t5_bias", "attention": "causal", "relative_attention_num_buckets": 1},
        r"relative_attention_num_buckets: 1 is too few for causal attention; use at least 2",
    ),
    (
        {"position": "t5_bias", "relative_attention_max_distance": 8},
        r"relative_attention_max_distance: 8 lies within the 8 .*; raise it above 8",
    ),
]
FACT_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"world": "flat"}, r"world: .*'two_role'.* \(got 'flat'\)"),
    ({"gap": 1}, r"gap: 1 leaves no room for the relation.*use at least 2"),
    ({"gap": [4, 3]}, r"gap: the lowest distance 4 is above the highest 3; swap them"),
    ({"gap": 8}, r"gap: 8 is longer than the sequence allows; use at most 7 or raise seq_len to 9"),
    ({"gap": [2, 9], "seq_len": 9}, r"gap: 9 is longer than the sequence allows; use at most 8 or raise seq_len to 10"),
    ({"gap": "far"}, r"gap: .*integer.* \(got 'far'\)"),
    ({"filler": "none"}, r"filler: 'none' leaves 5 of seq_len 8 positions empty; use seq_len 3 and gap 2"),
    ({"n_entities": 61}, r"n_entities: 61 cannot be shared out among n_roles 3; use a multiple"),
    ({"n_roles": 1}, r"n_entities: 60 cannot be shared out among n_roles 1; use a multiple of at least 2 roles"),
    ({"world": "two_role", "n_entities": 61}, r"n_entities: 61 is odd.*use an even number"),
    ({"reversed_share": 1.0}, r"reversed_share: .*less than 1 \(got 1.0\)"),
    (
        {"world": "two_role", "n_entities": 4, "reversed_share": 0.8},
        r"reversed_share: 0.8 of 2 facts rounds to all of them.*; lower it or raise n_entities",
    ),
    ({"n_entities": 3 * 10**9}, r"n_entities: .*less than or equal to 1048576"),
    ({"gap": [2, 10**400]}, r"gap: .*\(got "),
    ({"n_fillers": 3}, r"n_fillers: no such field"),
]
TRAIN_MODEL: dict[str, Any] = {**TINY, "d_vocab": 80}
TRAIN_MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"model": {**TRAIN_MODEL, "d_vocab": 79}},
        r"model.d_vocab: 79 is too small for the world.*80 tokens; raise it to 80",
    ),
    ({"model": {**TRAIN_MODEL, "n_ctx": 7}}, r"model.n_ctx: 7 is shorter than facts.seq_len 8; raise it to 8"),
    (
        {"objective": "causal"},
        r"objective: 'causal' does not go with bidirectional attention, .*; set model.attention to 'causal', or "
        r"objective to 'left_to_right'",
    ),
    (
        {"model": {**TRAIN_MODEL, "attention": "causal"}},
        r"model.readout_shift: -1 is not what objective 'any_order' trains; set it to 0",
    ),
    ({"objective": "target_only", "mask_rate": 0.5}, r"mask_rate: 'target_only' masks at no rate; leave it out, or"),
    ({"mask_rate": 0}, r"mask_rate: .*greater than 0 \(got 0\)"),
    (
        {"model": {**TRAIN_MODEL, "mask_token_id": 3}},
        r"model.mask_token_id: 3 is not the world's mask 79; leave it out",
    ),
    ({"model": {**TRAIN_MODEL, "n_heads": 3}}, r"model: n_heads: 3 does not divide d_model 16; choose"),
    ({"model": {**TRAIN_MODEL, "position": "up"}}, r"model.position: 'up' is not one of 'rope', "),
    (
        {"model": {**TRAIN_MODEL, "readout_shift": -1}},
        r"model.readout_shift: -1 is not what objective 'any_order' trains; set it to 0",
    ),
    ({"model": None}, r"model: .* \(got None\)"),
    ({"facts": {"gap": 1}}, r"facts: gap: 1 leaves no room"),
    (
        {"model": {**TRAIN_MODEL, "experts": EXPERTS, "gated_mlp": True, "d_mlp": 16}},
        r"model.experts: experts are for checkpoints, and are not trained here; leave them out",
    ),
    (
        {"model": {**TRAIN_MODEL, "attention": "block_causal", "block_size": 2}},
        r"model.attention: 'block_causal' is for checkpoints, as reverse queries ask about later blocks; train 'bid",
    ),
    (
        {"model": {**TRAIN_MODEL, "d_model": 2**20, "n_layers": 1000}},
        r"model.d_model: a model of 4398\d+ weights is larger than the 4294967296 that are trained here; lower it",
    ),
    (
        {"model": {**TRAIN_MODEL, "d_vocab": 2**24}, "batch_size": 2**20},
        r"batch_size: 1048576 sequences of 8 positions would hold 140737488355328 numbers at once, and at most \d+ are",
    ),
    (
        {"batch_size": 10**6},
        r"batch_size: 1000000 sequences of 8 positions would hold \d+ numbers at once, and at most 134217728 are tried",
    ),
    ({"n_checkpoints": 1}, r"n_checkpoints: .*greater than or equal to 2 \(got 1\)"),
    ({"n_checkpoints": 10**8}, r"n_checkpoints: .*less than or equal to 10000 \(got 100000000\)"),
    ({"steps": 10**300}, r"steps: .*less than or equal to 1000000000 \(got 10{47} … 0{48}\)"),
    ({"seed": 2**63}, r"seed: .*less than .* \(got 9223372036854775808\)"),
    ({"seed": True}, r"seed: .*integer \(got True\)"),
    ({"lr": "0.1"}, r"lr: .*number \(got '0.1'\)"),
    ({"lr": float("nan")}, r"lr: .* \(got nan\)"),
    ({"lr": 0}, r"lr: .*greater than 0 \(got 0\)"),
    ({"facts": {"noise": 5.0}}, r"facts.noise: .*less than or equal to 1 \(got 5.0\)"),
    ({"facts": {"noise": -0.5}}, r"facts.noise: .*greater than or equal to 0 \(got -0.5\)"),
    ({"facts": {"reversed_share": -0.5}}, r"facts.reversed_share: .*greater than or equal to 0 \(got -0.5\)"),
    ({"mask_rate": 2.0}, r"mask_rate: .*less than or equal to 1 \(got 2.0\)"),
    ({"weight_decay": -1.0}, r"weight_decay: .*greater than or equal to 0 \(got -1.0\)"),
    ({"weight_decay": 1e31}, r"weight_decay: .*less than or equal to 1"),
    ({"beta1": -1.0}, r"beta1: .*greater than or equal to 0 \(got -1.0\)"),
    ({"beta1": 1}, r"beta1: .*less than 1 \(got 1\)"),
    ({"steps": 0, "warmup": -1}, r"steps: .*greater than 0 \(got 0\) \(and 1 more\)"),
]


def bomb(line: str) -> bytes:
    """YAML of a few lines that stand for 10^9 values."""
    lines = [f"{line.format(0)}&a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{line.format(i)}&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return "\n".join([*lines, ""]).encode()


MISTAKES = [
    *((ModelConfig, {**TINY, **changes}, message) for changes, message in MODEL_MISTAKES),
    *((FactConfig, changes, message) for changes, message in FACT_MISTAKES),
    *((TrainConfig, {"model": TRAIN_MODEL, **changes}, message) for changes, message in TRAIN_MISTAKES),
    (TrainConfig, {"seed": 3}, r"model: missing; add it"),
    (ModelConfig, {"n_ctx": 4, "d_vocab": 9}, r"d_model: missing; add it \(and 1 more\)"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), MISTAKES, ids=[message[:30] for _, _, message in MISTAKES])
def test_a_mistake_is_named_with_its_value_and_its_fix(
    kind: type[Config], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError) as built:
        kind(**fields)
    said = one_line(built.value)
    assert re.match(message, said), said
    assert "\n" not in said

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(UserError, match=rf"^{re.escape(f'{path}: {said}')}$"):
        kind.from_yaml(path)


@pytest.mark.promise("a hostile YAML file", "one line or read, in 10 s and 2 GiB; never run")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expected fields and values, got None"),
        (b"- 1\n- 2\n", r"expected fields and values, got \[1, 2\]"),
        (b"d_model: [", r"not YAML \(.*line 1, column 11.*\); correct its syntax"),
        (b"\xff\xfe\x00", r"cannot be read \(.*\); give the path of a YAML file"),
        (b"{d_model: 16, n_heads: 4, d_vocab: 9, n_ctx: 4, 1: 2}", r"1: "),
        (b"d_model: 16\nd_model: 32\n", r"not YAML \('d_model' is there twice.* line 1.*\)"),
        (bomb("- "), r"not YAML \(it holds more than 100000 values\)"),
        (bomb("a{}: ") + b"dtype: *a8\n", r"not YAML \(it holds more than 100000 values\)"),
        (b"&a [*a]", r"not YAML \(it holds more than 100000 values\)"),
        (b"[" * 10**5, r"not YAML \(.*recursion.*\)"),
        (b"[" * 400 + b"]" * 400, r"not YAML \(.*recursion.*\)"),
        (b"x: " + b"1" * 10**4, r"not YAML \(.*4300.*\)"),
        (b"x: 2001-99-99", r"not YAML \(month.*\)"),
        (b"x: !!int ''", r"not YAML \("),
        (b"x: !!bool maybe", r"not YAML \('maybe'\)"),
        (b"x: !!timestamp soon", r"not YAML \("),
        (b"!!python/object/apply:os.mkdir [ran]", r"not YAML \(could not determine a constructor"),
        (b"x" * 10**6, r"expected fields and values, got 'xxx.* … .*'; see README"),
        (b"x" * 2 * 10**6, r"cannot be read \(it has 2000000 bytes, and at most 1048576 are read\)"),
        (b"? " + b"x" * 10**6 + b"\n: 1\n", r"d_model: missing|xxx.* … .*: no such field"),
        (b"dtype: " + b"x" * 10**6, r"d_model: missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_config_is_refused_on_one_line(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    outcome = outcome_of(lambda: ModelConfig.from_yaml(path))
    assert re.match(rf"{re.escape(str(path))}: ({message})", outcome), outcome
    assert [*tmp_path.iterdir()] == [path]


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    for path in (tmp_path / "fifo.yaml", Path("/dev/zero")):
        outcome = outcome_of(lambda path=path: ModelConfig.from_yaml(path))
        assert outcome == f"{path}: cannot be read (it is no regular file); give the path of a YAML file"


def test_aliases_and_numbers_in_any_notation_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {d_model: &size 16, n_heads: 4, d_mlp: *size, d_vocab: 80, n_ctx: 8}\nlr: 1e-3\nsteps: 1e4\n"
    )
    read = TrainConfig.from_yaml(path)
    assert (read.model.d_mlp, read.lr, read.steps) == (16, 0.001, 10_000)
    path.write_text("data: 1234567e12345678\n")  # a digest
    assert BenchmarkConfig.from_yaml(path).data == "1234567e12345678"
    path.write_text("? [d_model]\n: 16\n")
    with pytest.raises(UserError, match="not YAML"):
        ModelConfig.from_yaml(path)


def test_a_message_is_one_line_that_keeps_beginning_and_end() -> None:
    said = str(UserError(f"field: {'x' * 10**6}\n is wrong; mend it"))
    assert len(said) < 500 and said.startswith("field: xxx") and said.endswith("xxx is wrong; mend it")
    assert str(UserError("short")) == "short"
    assert str(UserError("a\x1b[2J\x00b\ud800\u202ec:\n\td")) == r"a\x1b[2J\x00b\ud800\u202ec: d"
    with pytest.raises(ValidationError) as built:
        tiny_config(attention="x" * 10**6)
    assert len(one_line(built.value)) < 500 and one_line(built.value).endswith("xxx')")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: cannot be read .*give the path of a YAML file"):
            ModelConfig.from_yaml(path)


def test_the_edges_of_what_is_allowed_are_allowed() -> None:
    assert tiny_config(mask_token_id=12).mask_token_id == 12
    assert tiny_config(d_model=12, position="alibi").head_dim == 3  # only rope needs an even d_head
    assert tiny_config(d_head=5, rotary_dim=4).rotary_dim == 4
    assert tiny_config(position="t5_bias", relative_attention_num_buckets=4, relative_attention_max_distance=2)
    assert FactConfig(gap=7).gaps == (7, 7)
    assert FactConfig(filler="none", seq_len=3).filler_tokens == 0
    assert TrainConfig(model=ModelConfig(**{**TRAIN_MODEL, "n_ctx": 8})).model.mask_token_id == 79


# ---- equality, digests, YAML

# Another valid value for every field; the test below fails when a field is missing here.
OTHER_VALUES: dict[type[Config], tuple[dict[str, Any], dict[str, Any]]] = {
    ModelConfig: (
        {**TINY, "d_head": 4, "n_key_value_heads": 4, "rotary_dim": 4, "initializer_range": 0.2, "d_mlp": 24},
        {
            "d_model": 32,
            "n_heads": 8,
            "d_vocab": 14,
            "d_vocab_out": 12,
            "n_ctx": 13,
            "n_layers": 3,
            "d_head": 6,
            "n_key_value_heads": 2,
            "qkv_bias": True,
            "use_qk_norm": True,
            "attention": "causal",
            "position": "learned",
            "rotary_base": 5e5,
            "rotary_dim": 2,
            "rotary_adjacent_pairs": True,
            "rotary_scaling": {"rope_type": "linear", "factor": 2.0},
            "relative_attention_num_buckets": 16,
            "relative_attention_max_distance": 64,
            "d_mlp": 25,
            "gated_mlp": True,
            "act_fn": "relu",
            "normalization_type": None,
            "eps": 1e-6,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
            "mask_token_id": 12,
            "readout_shift": -1,
            "dtype": "float64",
        },
    ),
    FactConfig: (
        {},
        {
            "world": "symmetric_pool",
            "n_entities": 30,
            "n_roles": 2,
            "filler": "constant",
            "n_filler": 4,
            "seq_len": 9,
            "gap": (2, 3),
            "reversed_share": 0.5,
            "noise": 0.1,
        },
    ),
    TrainConfig: (
        {"model": TRAIN_MODEL},
        {
            "model": {**TRAIN_MODEL, "n_layers": 1},
            "facts": {"n_entities": 30},
            "objective": "source_only",
            "mask_rate": 0.5,
            "seed": 1,
            "steps": 4001,
            "batch_size": 65,
            "lr": 1e-3,
            "weight_decay": 0.0,
            "beta1": 0.8,
            "beta2": 0.9,
            "warmup": 0,
            "grad_clip": 2.0,
            "n_checkpoints": 2,
        },
    ),
}


def written(kind: type[Config]) -> set[str]:
    """The fields that belong to a config's identity: not where the weights are, nor what a model's methods do."""
    left_out = {"device", "default_prepend_bos"} | {f"use_{part}" for part in ("attn_result", "split_qkv_input")}
    return set(kind.model_fields) - left_out - {"use_attn_in", "use_hook_mlp_in"}


@pytest.mark.parametrize("kind", list(OTHER_VALUES), ids=lambda kind: kind.__name__)
def test_the_digest_depends_on_every_field_that_is_written(kind: type[Config]) -> None:
    base, others = OTHER_VALUES[kind]
    assert set(others) == written(kind) - {"block_size", "experts"}  # these need others beside them
    digests = [kind(**base).digest(), *(kind(**{**base, field: value}).digest() for field, value in others.items())]
    assert len(set(digests)) == len(digests)
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in digests)


def test_the_digest_depends_on_blocks_and_experts() -> None:
    experts = {"num_experts": 4, "experts_per_token": 2, "d_expert": 8}
    gated = {"attention": "block_causal", "block_size": 4, "d_mlp": 24, "gated_mlp": True}
    changes: list[dict[str, Any]] = [{}, {"block_size": 6}, {"experts": experts}]
    changes += [{"experts": {**experts, name: value}} for name, value in (("n_shared", 1), ("routed_scale", 2.0))]
    assert len({tiny_config(**{**gated, **change}).digest() for change in changes}) == len(changes)


def test_the_digest_does_not_depend_on_the_device_or_on_who_wrote_a_default_out() -> None:
    written_out = {"d_head": 4, "n_key_value_heads": 4, "rotary_dim": 4, "initializer_range": 0.2, "readout_shift": 0}
    assert tiny_config(**written_out) == tiny_config()
    assert tiny_config(**written_out).digest() == tiny_config().digest() == tiny_config(device="cuda").digest()
    assert hash(tiny_config(**written_out)) == hash(tiny_config())
    assert tiny_config(attention="causal").readout_shift == -1
    assert TrainConfig(model=ModelConfig(**TRAIN_MODEL, mask_token_id=79)) == TrainConfig(
        model=ModelConfig(**TRAIN_MODEL)
    )


def test_a_whole_number_may_be_written_otherwise() -> None:
    assert tiny_config(d_model=16.0) == tiny_config()


def test_a_copy_is_checked_as_a_new_config_is() -> None:
    without = tiny_config(position="none")
    assert without.model_copy(update={"position": "rope"}) == tiny_config(position="rope")
    assert without.model_copy() == without == without.model_copy(deep=True)
    for wrong in ({"d_model": -1}, {"positon": "rope"}, {"n_heads": 3}):
        with pytest.raises(ValidationError):
            without.model_copy(update=wrong)


def test_what_follows_from_a_field_follows_it_in_a_copy() -> None:
    for changes in ({"n_heads": 2}, {"d_model": 32}, {"position": "alibi"}, {"attention": "causal"}, {"d_head": 8}):
        copied = tiny_config().model_copy(update=changes)
        assert copied == tiny_config(**changes) and copied.digest() == tiny_config(**changes).digest()
    chosen = tiny_config(d_head=8, n_key_value_heads=2, rotary_dim=4, initializer_range=0.3, readout_shift=-1)
    copied = chosen.model_copy(update={"d_model": 32, "n_ctx": 20})
    assert copied.model_dump() == {**chosen.model_dump(), "d_model": 32, "n_ctx": 20}, "what was chosen stays"


def test_a_config_is_frozen() -> None:
    cfg = tiny_config()
    with pytest.raises(UserError, match="frozen"):
        cfg.d_model = 32
    assert cfg.d_model == 16


positive = st.floats(1e-12, 1e12)
counts = st.integers(1, 300)
lengths = {"original_max_position_embeddings": counts}
rotary_scalings = st.one_of(
    st.builds(RotaryScaling, rope_type=st.just("linear"), factor=positive),
    st.builds(
        RotaryScaling,
        rope_type=st.just("llama3"),
        factor=positive,
        low_freq_factor=st.floats(0.1, 1),
        high_freq_factor=st.floats(2, 9),
        **lengths,
    ),
    st.builds(
        RotaryScaling,
        rope_type=st.just("yarn"),
        factor=positive,
        beta_fast=positive,
        beta_slow=positive,
        truncate=st.booleans(),
        **lengths,
    ),
)
experts = st.builds(
    Experts, num_experts=st.just(8), experts_per_token=st.integers(1, 4), d_expert=counts, n_shared=st.integers(0, 2)
)


@st.composite
def model_configs(draw: st.DrawFn, **fixed: Any) -> ModelConfig:
    position = draw(st.sampled_from(["rope", "alibi", "t5_bias", "none", "learned", "sinusoidal"]))
    kv_heads, groups, half_head = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    d_mlp, tied, trained = draw(st.none() | counts), draw(st.booleans()), "attention" in fixed
    attention = fixed.get("attention") or draw(st.sampled_from(["bidirectional", "causal", "block_causal"]))
    normalization, gated = draw(st.sampled_from(["RMS", "LN", None])), d_mlp is not None and draw(st.booleans())
    may_have_experts = gated and normalization == "RMS" and not trained
    fields: dict[str, Any] = {
        "d_model": draw(counts),
        "n_heads": kv_heads * groups,
        "n_key_value_heads": kv_heads,
        "d_head": 2 * half_head,
        "d_vocab": draw(st.integers(100, 300)),
        "d_vocab_out": None if tied or trained else draw(st.none() | st.integers(1, 99)),
        "n_ctx": draw(st.integers(8, 300)),
        "n_layers": draw(counts),
        "qkv_bias": draw(st.booleans()),
        "use_qk_norm": draw(st.booleans()),
        "attention": attention,
        "block_size": draw(counts) if attention == "block_causal" else None,
        "position": position,
        "rotary_base": draw(positive),
        "rotary_dim": 2 * draw(st.integers(1, half_head)) if position == "rope" else None,
        "rotary_adjacent_pairs": draw(st.booleans()),
        "rotary_scaling": draw(st.none() | rotary_scalings) if position == "rope" else None,
        "relative_attention_num_buckets": draw(st.integers(4, 64)),
        "relative_attention_max_distance": draw(st.integers(64, 300)),
        "d_mlp": d_mlp,
        "gated_mlp": gated,
        "act_fn": draw(st.sampled_from(["relu", "gelu", "gelu_new", "silu"])),
        "experts": draw(st.none() | experts) if may_have_experts else None,
        "normalization_type": normalization,
        "eps": draw(st.floats(1e-12, 1)),
        "tie_word_embeddings": tied,
        "initializer_range": draw(st.none() | positive),
        "mask_token_id": draw(st.none() | st.integers(0, 99)),
        "readout_shift": draw(st.sampled_from([None, 0, -1])),
        "dtype": draw(st.sampled_from(["float64", "float32", "bfloat16", "float16"])),
    }
    assert set(fields) == written(ModelConfig)
    return ModelConfig(**{**fields, **fixed})


@st.composite
def train_configs(draw: st.DrawFn) -> TrainConfig:
    low, high = sorted(draw(st.tuples(st.integers(2, 7), st.integers(2, 7))))
    facts = FactConfig(
        world=draw(st.sampled_from(["two_role", "relation_cycle", "symmetric_pool"])),
        n_entities=6 * draw(st.integers(1, 10)),
        filler=draw(st.sampled_from(["constant", "random"])),
        gap=draw(st.sampled_from([low, (low, high)])),
        reversed_share=draw(st.floats(0, 0.8)),
    )
    objective: Any = draw(st.sampled_from(["any_order", "source_only", "target_only", "causal"]))
    attention = "causal" if objective == "causal" else "bidirectional"
    model = draw(
        model_configs(
            attention=attention, readout_shift=None, mask_token_id=draw(st.sampled_from([None, facts.mask_token_id]))
        )
    )
    return TrainConfig(
        model=model,
        facts=facts,
        objective=objective,
        seed=draw(st.integers(0, 2**31)),
        lr=draw(positive),
        weight_decay=draw(st.floats(0, 10)),
        beta1=draw(st.floats(0, 1, exclude_max=True)),
    )


@settings(derandomize=True, deadline=None, max_examples=60)
@given(cfg=model_configs() | train_configs())
def test_a_config_comes_back_from_yaml_as_it_was(tmp_path_factory: pytest.TempPathFactory, cfg: Config) -> None:
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    cfg.to_yaml(path)
    again = type(cfg).from_yaml(path)
    assert again == cfg
    assert again.digest() == cfg.digest()


# ---- files


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "numbers.txt"
    write_text(path, "old α")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text(encoding="utf-8") == "old α"
        assert temporary.parent == path.parent  # another file system could not take the name over in one step
    assert path.read_text() == "new"
    assert [file.name for file in path.parent.iterdir()] == ["numbers.txt"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(failure: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "numbers.txt"
    write_text(path, "old")
    with pytest.raises(failure), replacing(path) as temporary:
        temporary.write_text("half of the ne")
        raise failure
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["numbers.txt"]
