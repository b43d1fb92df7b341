"""Every benchmark runs, compares like with like, and is read off into the documentation."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from document_helpers import ROOT, load
from helpers import planted_result, with_summary
from hypothesis import given
from hypothesis import strategies as st
from ledger_helpers import ABOVE, PLACE, rows_of

from benchmarks import probe, retest
from benchmarks.__main__ import compared
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
from mdm_interp.experiments.analysis import CheckpointAnalysis, discover
from mdm_interp.experiments.claims import judge
from mdm_interp.meaning import meaning
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.estimates import mean_estimate
from mdm_interp.stats.summary import Entry


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
    """But for the marks of what is older than the code, which would differ with every change."""
    page = tables.PAGE.read_text(encoding="utf-8")
    assert page.count(tables.BEGIN) == page.count(tables.END) == 1
    told = "run python -m docs.benchmark_tables"
    assert tables.unmarked(tables.rewritten(page, {})) == tables.unmarked(page), told


def measured(tables: Any) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in tables.RESULTS if path.exists()]


def test_results_are_of_the_rows_there_are(tables: Any) -> None:
    assert tables.OURS == OURS and set(tables.REASONS) <= set(ROWS)
    for results in measured(tables):
        rows = results["rows"]
        assert list(rows) == [name for name in ROWS if name in rows]
        for name in (name for name, row in rows.items() if row.get("code") == ROWS[name].digest()):
            row, now = rows[name], ROWS[name]
            assert (row["work"], row["one"], row["target"]) == (now.work, now.one, now.target)
            for cost in row["variants"].values():
                low, high = cost["quartiles"]
                assert low <= cost["ratio"] <= high


def test_what_misses_its_target_has_a_reason(tables: Any) -> None:
    for results in measured(tables):
        lines = tables.table(results, {})
        for row in filter(tables.missed, results["rows"].values()):
            (line,) = [line for line in lines if line.startswith(f"- *{row['work']}*: ")]
            assert ("not yet profiled" in line) == ("gpu" in results["made_with"])


def planted_row(low: float, code: str) -> dict[str, Any]:
    variants = {
        OURS: {"seconds": 1.2, "ratio": 1.2, "quartiles": [low, 1.3]},
        "peer": {"seconds": 1.0, "ratio": 1.0, "quartiles": [1.0, 1.0]},
    }
    return {"work": "some work", "one": "peer", "target": 1.0, "repeats": 3, "code": code, "variants": variants}


def test_what_is_older_than_the_code_is_marked(tables: Any) -> None:
    made_with = {"cpu": "a processor", "threads": 2, "python": "3", "torch": "2", "transformers": "5"}
    results = {"made_with": {**made_with, "transformer-lens": "4"}, "rows": {"gradients": planted_row(1.1, "a")}}
    today, older = (tables.table(results, {"gradients": code}) for code in ("a", "b"))
    assert "| some work | peer, 1 s | ≤ 1.00 | 1.20 (1.10 to 1.30), missed |  |" in today
    assert "| some work † | peer, 1 s | ≤ 1.00 | 1.20 (1.10 to 1.30), missed |  |" in older
    assert tables.NOTE in older and tables.unmarked("\n".join(older)) == "\n".join(today)
    del results["rows"]["gradients"]["code"]  # as older files have none
    assert tables.table(results, {"gradients": "a"}) == older


def test_whether_repeats_reach_a_target_is_computed(tables: Any) -> None:
    near, far = (tables.reason("forward-64", planted_row(low, ""), {}) for low in (0.98, 1.1))
    assert near == f"{far} A quarter of the repeats or more reach the target."
    assert tables.reason("forward-64", planted_row(1.1, ""), {"gpu": "one"}) == tables.UNKNOWN


def test_a_ratio_is_that_of_paired_repeats() -> None:
    found = compared(np.array([1.0, 8.0, 3.0]), np.array([1.0, 4.0, 6.0]), "seconds")
    assert found == {"seconds": 3.0, "ratio": 1.0, "quartiles": [0.75, 1.5]}


def test_a_row_is_known_by_what_it_measures() -> None:
    assert ROWS["forward-64"].digest() != ROWS["forward-1024"].digest()
    reached = meaning(ROWS["coupling"].variants, ROWS["coupling"].given["analysis"]).reached
    assert {"analyses.large_model_coupling.measure", "benchmarks.probe.run_bare"} <= set(reached)


def test_a_probe_is_asked_every_analysis_of_one_checkpoint() -> None:
    probing = [one for one in discover() if isinstance(one, CheckpointAnalysis) and not one.needs_twin]
    assert {module.ANALYSIS.name for module in probe.ANALYSES} == {one.name for one in probing}


# ---- the retest


def side(**effects: Sequence[float]) -> retest.Side:
    """A planted result: the effects over seeds of each scheme, judged, and their means as its summary."""
    rows = [row for scheme, values in effects.items() for row in rows_of(values, scheme=scheme)]
    result = planted_result("planted", [{**PLACE, **row} for row in rows])
    entries = [Entry("effect", {"scheme": scheme}, mean_estimate(values)) for scheme, values in effects.items()]
    return retest.Side({"planted": with_summary(result, *entries)}, judge([(result, [ABOVE])]))


def test_a_planted_verdict_that_moves_is_found() -> None:
    sure, unsure = [0.5, 0.51, 0.52, 0.5, 0.51], [0.5, 0.9, 0.1, 0.6, 0.4]
    compared = retest.compare(side(rope=sure, alibi=sure), side(rope=unsure, alibi=sure))
    (moved,) = compared.moved
    assert [(one.scope["scheme"], one.verdict) for one in moved] == [("rope", "holds"), ("rope", "inconclusive")]
    assert compared.alone == []
    told = retest.page(
        compared, {"native": TOLD, "plain": {**TOLD, "digests": {**TOLD["digests"], "sums": "c"}}}, [0, 1]
    )
    assert "**1 of 2 lines of the ledger have another verdict.**" in told
    assert "- **5**, m: planted, any_order rope, 1 layer, 2 heads of 16, end: holds (0.508 [" in told
    assert "compute other bits in sums, and the same in products." in told


TOLD: dict[str, Any] = {"instructions": "AVX9", "cpu": "a processor", "torch": "2.0", "blas": "MKL"}
TOLD["digests"] = {"products": "a", "sums": "b"}


def test_the_largest_change_is_named_with_its_place() -> None:
    native, plain = side(rope=[0.5, 0.6], alibi=[0.1, 0.3]), side(rope=[0.5, 0.6], alibi=[0.1, 0.26])
    compared = retest.compare(native, plain)
    for changes in (compared.effects["5", "m"], compared.values["planted", "effect"]):
        same, changed = sorted(changes, key=lambda change: change.size)
        assert same.size == same.share == 0 and "rope" in same.where
        assert changed.size == pytest.approx(0.02) and "alibi" in changed.where
        assert changed.share == pytest.approx(0.02 / (12.706 * 0.1), rel=1e-4)  # t of one degree of freedom
    (row,) = [
        line for line in retest.page(compared, {"native": TOLD, "plain": TOLD}, [0]).splitlines() if "| m |" in line
    ]
    assert row == "| 5 | m | 2 | 0.02 | planted, any_order alibi, 1 layer, 2 heads of 16, end | 0.2 | 0.18 | 0.016 |"


def test_what_one_side_lacks_is_listed() -> None:
    compared = retest.compare(side(rope=[0.5, 0.6]), side(rope=[0.5, 0.6], alibi=[0.1, 0.3]))
    assert [what.partition(":")[0] for what in compared.alone] == ["claim 5, m", "planted, effect"]
    assert all("alibi" in what for what in compared.alone) and compared.moved == []


def test_a_single_seed_has_no_half_width() -> None:
    compared = retest.compare(side(rope=[0.5]), side(rope=[0.6]))
    (change,) = compared.effects["5", "m"]
    assert change.size == pytest.approx(0.1) and math.isnan(change.share)
    assert "– half-widths" in retest.page(compared, {"native": TOLD, "plain": TOLD}, [0])


EFFECTS = st.dictionaries(
    st.sampled_from(["rope", "alibi", "none"]),
    st.lists(st.floats(-1, 1, width=16), min_size=2, max_size=4),
    min_size=1,
)


@given(one=EFFECTS, other=EFFECTS)
def test_a_comparison_is_the_same_from_either_side(one: Any, other: Any) -> None:
    there, back = retest.compare(side(**one), side(**other)), retest.compare(side(**other), side(**one))
    assert there.alone == back.alone
    assert {(a.scope["scheme"], a.verdict, b.verdict) for a, b in there.moved} == {
        (a.scope["scheme"], b.verdict, a.verdict) for a, b in back.moved
    }
    itself = retest.compare(side(**one), side(**one))
    assert not itself.moved and not itself.alone
    assert {change.size for changes in (*itself.effects.values(), *itself.values.values()) for change in changes} == {0}


@pytest.mark.slow
def test_no_two_lines_of_the_ledger_have_one_name() -> None:
    committed = retest.read(ROOT)
    compared = retest.compare(committed, replace(committed, verdicts=committed.verdicts[1:]))
    assert len(committed.verdicts) > 100 and sum(map(len, compared.effects.values())) == len(committed.verdicts) - 1
    assert len(compared.alone) == 1 and sum(map(len, compared.values.values())) > 100


@pytest.mark.slow
def test_workers_compute_with_the_instructions_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")  # of the user's, which does not count
    plain, native = retest.look("plain"), retest.look("native")
    assert plain["instructions"] == "DEFAULT" and plain["cpu"] == native["cpu"]
    if native["instructions"] != "DEFAULT":
        assert plain["digests"] != native["digests"]
