"""Sinks of checkpoints: rows agree with the library, and figures hold any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from probe_helpers import at, result_of, tiny_probe, traces

from analyses import large_model_sinks
from analyses.large_model_sinks import OF_LAYERS, SIDES, STATES, STEPS
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe
from mdm_interp.measures.sinks import sinks, watch_sinks
from mdm_interp.measures.trajectory import source_only
from mdm_interp.stats.resampling import FactSample


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return tiny_probe(tmp_path_factory.mktemp("sinks"), "dream")


@pytest.fixture(scope="module")
def result(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return result_of(large_model_sinks.ANALYSIS, [probe], tmp_path_factory.mktemp("result"))


def test_rows_are_those_of_the_library(probe: Probe, result: Result) -> None:
    assert len(result.rows) == 2 * (2 * 4 + 2 + 1)
    for kind in KINDS:
        pairs = probe.pairs(kind)
        sample = FactSample.of(pairs, probe.prompts[kind].templates)
        for side in SIDES:
            found = sinks(probe.model, [getattr(pair, side) for pair in pairs])
            for name, values in (("readout", found.readout), ("route", found.source), ("aside", found.routes)):
                mean = sample.mean(values).value
                row = at(result, kind, 1, 3)
                assert row[f"{side}_{name}"] == pytest.approx(mean[1, 3].item(), rel=1e-4, abs=1e-9)
                row = at(result, kind, None, None)
                assert row[f"{side}_{name}"] == pytest.approx(mean.nanmean().item(), rel=1e-4, abs=1e-9)
        special = probe.model.tokenizer.all_special_ids
        asked = [source_only(pair.reverse, probe.model.cfg, special) for pair in pairs]
        watched = watch_sinks(probe.model, asked, STEPS)
        for name, state in STATES.items():
            mean = sample.mean(watched.share.effect[:, state]).value
            assert at(result, kind, 0, None)[name] == pytest.approx(mean[0].item(), rel=1e-4, abs=1e-9)
        moved = sample.mean((watched.where[:, 1:] != watched.where[:, :-1]).double().mean(1)).value
        assert at(result, kind, 0, None)["moved"] == pytest.approx(moved[0].item(), rel=1e-4, abs=1e-9)
        assert at(result, kind, 0, 0)["moved"] is None


def test_an_arm_denoises_nothing(tmp_path: Path) -> None:
    result = result_of(large_model_sinks.ANALYSIS, [tiny_probe(tmp_path, "llama")], tmp_path)
    assert all(row["share"] is not None and row["forward_route"] is not None for row in result.rows)
    assert all(row[name] is None for row in result.rows for name in OF_LAYERS)
    said = large_model_sinks.takeaway(result)
    assert "Sinks take" in said
    figure = large_model_sinks.draw(result).figure()
    texts = [trace.text for trace in traces(figure, mode="text")]
    assert texts == [("a causal model<br>denoises nothing",)] * 2


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_the_figure_shows_every_checkpoint_and_kind(result: Result, checkpoints: int) -> None:
    rows = [{**row, "checkpoint": f"model {copy}"} for copy in range(checkpoints) for row in result.rows]
    figure = large_model_sinks.draw(replace(result, rows=rows)).figure()
    maps = traces(figure, type="heatmap")
    assert len(maps) == 2 * checkpoints
    assert maps[0].z[1][3] == at(result, "positional", 1, 3)["share"]


@pytest.mark.parametrize(
    ("null", "said"), [(0.1, "Sinks take 0.40 of all attention (null 0.10)."), (0.4, "Sinks take no sure share")]
)
def test_the_takeaway_says_what_sinks_take_beyond_their_null(result: Result, null: float, said: str) -> None:
    told = {"share": 0.4, "share_low": 0.35, "share_high": 0.45, "share_null": null}
    told |= {"share_null_low": null - 0.05, "share_null_high": null + 0.05}
    rows = [{**row, **told, "forward_aside": 0.5, "forward_route": 0.2} for row in result.rows]
    rows = [{**row, "reverse_aside": row["reverse_route"]} for row in rows]
    found = large_model_sinks.takeaway(replace(result, rows=rows))
    assert found.startswith(said) and "changes the source's share by at most 0.30" in found


def test_a_checkpoint_without_sinks_is_named(result: Result) -> None:
    told = {"share": 0.4, "share_low": 0.35, "share_high": 0.45, "share_null_low": 0.0}
    rows = [
        {**row, **told, "checkpoint": name, "share_null": null, "share_null_high": null}
        for name, null in (("one", 0.1), ("two", 0.4))
        for row in result.rows
    ]
    assert "not surely more than that in two. " in large_model_sinks.takeaway(replace(result, rows=rows))


def test_one_fact_has_no_other(tmp_path: Path) -> None:
    result = result_of(large_model_sinks.ANALYSIS, [tiny_probe(tmp_path, "llada", facts=1)], tmp_path)
    assert all(row["moved_null"] is None for row in result.rows)
    large_model_sinks.draw(result).figure()
