"""Every benchmark runs, compares like with like, and is read off into the documentation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from document_helpers import ROOT, load

from benchmarks.peers import (
    PlainTransformer,
    llama,
    llama_mask,
    products_by_backward,
    products_by_func,
    with_weights_of,
)
from benchmarks.rows import OURS, ROWS, Setting, random_pairs
from mdm_interp.config import Attention
from mdm_interp.data.queries import collate
from mdm_interp.models.transformer import HookedTransformer


@pytest.fixture(scope="module")
def tables() -> Any:
    return load(ROOT / "docs" / "benchmark_tables.py")


@pytest.mark.slow
def test_every_row_runs() -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    printed = ran.stdout.splitlines()
    assert [name for name in ROWS if not any(line.startswith(f"{name}: ") for line in printed)] == []


@pytest.mark.slow
def test_a_probe_is_timed_by_its_own_command() -> None:
    options = ["--width", "32", "--layers", "1", "--facts", "4", "--repeats", "1"]
    command = [sys.executable, "-m", "benchmarks.probe", *options]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1].startswith("all analyses")


def copy_weights(peer: Any, plain: PlainTransformer) -> None:
    """Give Hugging Face's weights to the plain transformer."""
    theirs = dict(peer.named_parameters())
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
    names |= {"norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    top = {"embed": "model.embed_tokens", "norm": "model.norm", "unembed": "lm_head"}
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            *place, part, leaf = name.split(".")
            full = f"model.{'.'.join(place)}.{names[part]}" if place else top[part]
            weight.copy_(theirs[f"{full}.{leaf}"])


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_peers_compute_what_we_do(attention: Attention) -> None:
    cfg = Setting(quick=True).model(attention=attention)
    peer, tokens = llama(cfg), Setting(quick=True).tokens(cfg, 2, 9)
    with torch.no_grad():
        expected = peer(tokens, attention_mask=llama_mask(cfg, tokens)).logits
        torch.testing.assert_close(with_weights_of(peer, cfg)(tokens), expected, atol=1e-5, rtol=1e-5)
        for fused in (True, False):
            plain = PlainTransformer(cfg, fused=fused)
            copy_weights(peer, plain)
            torch.testing.assert_close(plain(tokens), expected, atol=1e-5, rtol=1e-5)


def test_single_gradients_agree() -> None:
    cfg = Setting(quick=True).model(dtype="float64")
    model = HookedTransformer(cfg, generator=torch.Generator().manual_seed(0))
    pairs = random_pairs(3, 8, cfg)
    batch = collate([pair.reverse for pair in pairs], cfg)
    one, other = products_by_backward(model, batch), products_by_func(model, batch)
    torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


# ---- the page


def test_the_page_has_the_tables_of_today(tables: Any) -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    assert page.count(tables.BEGIN) == page.count(tables.END) == 1
    assert tables.rewritten(page) == page, "run python docs/benchmark_tables.py"


def test_results_are_of_the_rows_there_are(tables: Any) -> None:
    assert tables.OURS == OURS and set(tables.REASONS) <= set(ROWS)
    for path in filter(Path.exists, tables.RESULTS):
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        assert list(rows) == [name for name in ROWS if name in rows]
        for name, row in rows.items():
            assert (row["work"], row["one"], row["target"]) == (ROWS[name].work, ROWS[name].one, ROWS[name].target)


def test_what_misses_its_target_has_a_reason(tables: Any) -> None:
    for path in filter(Path.exists, tables.RESULTS[:1]):
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        assert [name for name, row in rows.items() if tables.missed(row) and name not in tables.REASONS] == []
