"""Coupling of checkpoints: rows are means over clusters of facts, and a layer counts only among all looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_helpers import result_of, tiny_probe, traces
from scipy.stats import ttest_1samp

from analyses import large_model_coupling as analysis
from mdm_interp.data.prompts import load_facts
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe
from mdm_interp.measures.gradients.alignment import gradient_alignment
from mdm_interp.stats.estimates import mean_estimate

STORAGE = "storage (V, O)"


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return tiny_probe(tmp_path_factory.mktemp("coupling"), "llada", facts=4)


@pytest.fixture(scope="module")
def result(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return result_of(analysis.ANALYSIS, [probe], tmp_path_factory.mktemp("result"))


def test_rows_are_means_over_facts_and_a_t_test_of_their_excess(probe: Probe, result: Result) -> None:
    assert len({tuple(row) for row in result.rows}) == 1
    for kind in KINDS:
        pairs = probe.pairs(kind)
        facts = np.array([pair.fact for pair in pairs])
        cosine = gradient_alignment(probe.model, pairs).fact_cosine(("V", "O"), [1])
        of_facts, others = (
            np.array([side.double().numpy()[facts == fact].mean() for fact in range(4)])
            for side in (cosine.effect, cosine.null)
        )
        (row,) = (r for r in result.rows if (r["kind"], r["layer"], r["group"]) == (kind, 1, STORAGE))
        for name, values in (("cosine", of_facts), ("cosine_null", others)):
            expected = mean_estimate(values)
            assert row[name] == pytest.approx(expected.value, rel=1e-4)
            assert [row[f"{name}_{end}"] for end in ("low", "high")] == pytest.approx(
                [expected.low, expected.high], rel=1e-3, abs=1e-5
            )
        tested: Any = ttest_1samp(of_facts - others, 0.0, alternative="greater")
        assert row["p"] == pytest.approx(tested.pvalue, rel=1e-3)
        assert (row["facts"], row["clusters"], row["cosine_n"], row["cosine_null_n"]) == (4, 4, 4, 4)


def test_clusters_compare_the_halves_and_the_layer_of_least_alignment(probe: Probe, result: Result) -> None:
    """The layer that a cluster is read in is the one where the clusters of other parity have the least."""
    rows = analysis.clusters(result)
    assert len(rows) == 2 * 4 and set(rows["seed"]) == {0, 1, 2, 3}
    assert set(rows["scheme"]) == {"rope"} and set(rows["world"]) == {f"tiny-llada, {kind}" for kind in KINDS}
    for kind in KINDS:
        pairs = probe.pairs(kind)
        facts, alignment = np.array([pair.fact for pair in pairs]), gradient_alignment(probe.model, pairs)
        own, null = (
            np.array([[side[facts == fact].mean() for side in of_layers] for fact in range(4)])
            for of_layers in zip(
                *(
                    (cosine.effect.double().numpy(), cosine.null.double().numpy())
                    for cosine in (alignment.fact_cosine(("V", "O"), [layer]) for layer in range(2))
                ),
                strict=True,
            )
        )
        of_kind = rows[rows["kind"] == kind].sort_values("seed")
        for name, values in (("", own), ("_null", null)):
            assert of_kind[f"halves{name}"].tolist() == pytest.approx((values[:, 0] - values[:, 1]).tolist(), rel=1e-4)
            least = [values[at, own[1 - at % 2 :: 2].mean(0).argmin()] for at in range(4)]
            assert of_kind[f"least{name}"].tolist() == pytest.approx(least, rel=1e-4)
    assert not any(np.isnan(entry.effect.value) for entry in result.summary)


def test_a_kind_may_lack_a_side(probe: Probe, result: Result) -> None:
    """The other kind's rows are the same."""
    prompts = {
        kind: of if kind == "positional" else replace(of, pairs=[pair for pair in of.pairs if pair.side == "right"])
        for kind, of in probe.prompts.items()
    }
    rows = analysis.measure(replace(probe, prompts=prompts))
    positional, expected = ([row for row in of if row["kind"] == "positional"] for of in (rows, result.rows))
    assert len(positional) == len(expected) and {row["kind"] for row in rows} == set(KINDS)
    for row, other in zip(positional, expected, strict=True):
        assert (row.get("cosine") or 0.0) == pytest.approx(other.get("cosine") or 0.0, rel=1e-5)


def test_a_model_of_one_layer_has_no_halves(tmp_path: Path) -> None:
    probe = tiny_probe(tmp_path, "llada", facts=3, n_layers=1)
    result = result_of(analysis.ANALYSIS, [probe], tmp_path)
    assert analysis.clusters(result).empty


def test_facts_that_share_a_parent_count_once(tmp_path: Path) -> None:
    probe = tiny_probe(tmp_path, "llada", facts=3)
    shared = "child,parent,parent_type\nTom,Mary,mother\nAnna,Mary,mother\nEmil,Finn,father\n"
    (tmp_path / "facts.csv").write_text(shared, encoding="utf-8")
    table = load_facts(tmp_path / "facts.csv")
    rows = analysis.measure(Probe.of("shared", probe.model, table))
    counts = [(row["facts"], row["clusters"], row["cosine_n"]) for row in rows if "facts" in row]
    assert set(counts) == {(3, 2, 2)} and len({row["seed"] for row in rows if "seed" in row}) == 2


def of_32_layers(result: Result, p_values: dict[int, float]) -> Result:
    """One checkpoint and kind, with p-values of their own in some layers."""
    (whole,) = (r for r in result.rows if (r["kind"], r["layer"], r["group"]) == ("positional", None, STORAGE))
    (row,) = (r for r in result.rows if (r["kind"], r["layer"], r["group"]) == ("positional", 1, STORAGE))
    layers = [{**row, "layer": layer, "p": p_values.get(layer, 0.5)} for layer in range(32)]
    return replace(result, rows=[whole, *layers])


def test_a_layer_counts_only_among_all_that_are_looked_at(result: Result) -> None:
    def share(p_values: dict[int, float]) -> float:
        summary = analysis.summarize(of_32_layers(result, p_values))
        estimate = summary.at("share_above", checkpoint="tiny-llada", kind="positional", group=STORAGE)
        assert np.isnan([estimate.low, estimate.high]).all() and estimate.n == 4
        return estimate.value

    assert share({3: 0.04, 9: 0.03}) == 0  # among 32, two such are what chance gives
    assert share({3: 1e-4, 9: 0.03}) == 1 / 32
    assert share(dict.fromkeys(range(8), 1e-3)) == 8 / 32


def test_the_takeaway_and_the_figure_say_so(result: Result) -> None:
    many = of_32_layers(result, dict.fromkeys(range(8), 1e-3))
    assert analysis.takeaway(many).startswith("In 25% of its layers, through V and O:")
    all_of_them = of_32_layers(result, dict.fromkeys(range(32), 1e-3))
    assert analysis.takeaway(all_of_them).startswith("In every layer, through V and O:")
    assert analysis.takeaway(of_32_layers(result, {})).startswith("In no layer for sure,")
    figure = analysis.draw(many).figure()
    assert len(traces(figure, name=STORAGE, mode="lines")) > 0


def test_one_fact_has_no_null_and_no_layer_to_count(tmp_path: Path) -> None:
    alone = result_of(analysis.ANALYSIS, [tiny_probe(tmp_path, "llada", facts=1)], tmp_path)
    assert all(row["cosine_null"] is None and row["p"] is None and row["cosine_low"] is None for row in alone.rows)
    assert not alone.summary.where("share_above") and alone.summary.where("cosine")
    assert "Too few facts" in analysis.takeaway(alone)
    analysis.draw(alone).figure()
