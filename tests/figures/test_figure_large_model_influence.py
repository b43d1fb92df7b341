"""Statements of facts and queries: what is compared with what, and one observation per cluster of facts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from probe_helpers import result_of, tiny_probe, traces
from torch.testing import assert_close

from analyses import large_model_influence as analysis
from mdm_interp.data.prompts import load_facts
from mdm_interp.data.queries import QueryPair
from mdm_interp.experiments.claims import judge
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import KINDS, Probe
from mdm_interp.measures.gradients import influence
from mdm_interp.stats.resampling import FactSample

FAMILIES = "child,parent,parent_type\nTom,Mary,mother\nTom,Finn,father\nAnna,Ida,mother\nEmil,Lena,mother\n"


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """Of four facts; the first two are of one child."""
    folder = tmp_path_factory.mktemp("influence")
    tiny = tiny_probe(folder, "llada", facts=4)
    (folder / "facts.csv").write_text(FAMILIES, encoding="utf-8")
    return Probe.of("families", tiny.model, load_facts(folder / "facts.csv"))


@pytest.fixture(scope="module")
def result(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return result_of(analysis.ANALYSIS, [probe], tmp_path_factory.mktemp("result"))


def asked(probe: Probe) -> tuple[list[QueryPair], list[int], FactSample]:
    pairs, templates = probe.pairs("relational"), probe.prompts["relational"].templates
    return pairs, templates, FactSample.of(pairs, templates)


def test_one_row_per_cluster_of_facts(result: Result) -> None:
    frame = result.frame
    for (_, _, group), rows in frame.groupby(["kind", "direction", "group"]):
        assert sorted(rows["seed"]) == [0, 1, 2], group
    assert set(frame["kind"]) == set(KINDS) and set(frame["group"]) >= {"storage", "routing", "all"}


def test_sentences_of_the_query_s_own_template_are_left_out(probe: Probe) -> None:
    pairs, templates, sample = asked(probe)
    stated = [(fact, template) for fact in range(sample.n_facts) for template in sorted(set(templates))]
    lowered = torch.tensor([[100.0 * fact + template for _ in pairs] for fact, template in stated]).double()
    found = analysis.by_fact(lowered, stated, sample, templates)
    for column, template in zip(found.T, templates, strict=True):
        rest = [other for other in set(templates) if other != template]
        assert_close(column, torch.tensor([100.0 * fact + sum(rest) / len(rest) for fact in range(4)]).double())
    only = [(fact, 0) for fact in range(4)]
    alone = analysis.by_fact(lowered[:4], only, sample, [0] * len(pairs))
    assert_close(alone, lowered[:4])


@pytest.mark.parametrize(("own", "other_parent", "ahead", "null"), [(9.0, 0.0, 0.5, -0.25), (0.5, 9.0, 0.0, 0.5)])
def test_the_own_fact_is_compared_with_unrelated_ones(
    probe: Probe, own: float, other_parent: float, ahead: float, null: float
) -> None:
    """Two unrelated facts, at 0 and at 1; a tie counts as half."""
    pairs, _, sample = asked(probe)
    first, second = (int(sample.facts[[pair.fact for pair in pairs].index(fact)]) for fact in (0, 1))
    unrelated = [fact for fact in range(4) if fact not in (first, second)]
    lowered = torch.zeros(4, len(pairs), dtype=torch.float64)
    lowered[unrelated[1]] = 1.0
    for column, fact in enumerate(sample.facts.tolist()):
        if fact in (first, second):
            lowered[fact, column] = own
            lowered[second if fact == first else first, column] = other_parent
    found = analysis.compare(lowered, pairs, "reverse", sample)
    cluster = sample.of_facts[first]
    assert found["ahead"][cluster].item() == pytest.approx(ahead)
    assert found["ahead_null"][cluster].item() == pytest.approx(null)
    assert found["influence"][cluster].item() == pytest.approx(own)
    assert found["influence_null"][cluster].item() == pytest.approx(0.5)


def test_numbers_are_those_of_influence(probe: Probe, result: Result) -> None:
    pairs, templates, sample = asked(probe)
    of_pairs = zip(sample.facts.tolist(), templates, pairs, strict=True)
    stated = {(fact, template): pair.forward.statement for fact, template, pair in of_pairs}
    asked_of, draws = [pair.reverse for pair in pairs], analysis.N_DRAWS
    found = influence(probe.model, list(stated.values()), asked_of, n_draws=draws).group("storage")
    cluster = int(sample.of_facts[-1])
    members = [query for query, fact in enumerate(sample.facts.tolist()) if sample.of_facts[fact] == cluster]
    own = []
    for query in members:
        of_query = sample.facts[query], templates[query]
        mine = [at for at, (fact, template) in enumerate(stated) if fact == of_query[0] and template != of_query[1]]
        own.append(found[mine, query].mean())
    of = {"kind": "relational", "direction": "reverse", "group": "storage", "seed": cluster}
    (row,) = (row for row in result.rows if of.items() <= row.items())
    assert row["influence"] == pytest.approx(torch.stack(own).mean().item(), rel=1e-5)


def test_the_ledger_judges_each_checkpoint_and_kind(result: Result) -> None:
    lines = judge([(result, analysis.ANALYSIS.claims)])
    assert [line.scope["world"] for line in lines] == [f"families, {kind}" for kind in KINDS]
    assert all("over clusters of facts" in line.rule for line in lines)
    assert {line.effect.n for line in lines} == {1}, (
        "two facts that share a name are one cluster, and the others have no null"
    )


def test_one_cluster_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    alone = result_of(analysis.ANALYSIS, [tiny_probe(tmp_path, "llada", facts=1)], tmp_path)
    assert all(row["ahead"] is None and row["influence_null"] is None for row in alone.rows)
    assert "nan" not in analysis.takeaway(alone)
    analysis.draw(alone).figure()


def test_the_figure_shows_both_kinds(result: Result) -> None:
    figure = analysis.draw(result).figure()
    drawn = traces(figure, name="reverse query, its own fact's sentences")
    assert len(drawn) == 2 * len(KINDS), "ahead of all checkpoints, and of each by kind of sentence"
    assert "n = 3 clusters of facts" in analysis.takeaway(result)


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        (0.4, 0.1, "and are surely ahead of another fact's with the answer's name in all 2"),
        (0.4, 0.4, "but are surely ahead of another fact's with the answer's name in none of 2"),
    ],
)
def test_the_takeaway_counts_what_is_ahead_of_the_name(result: Result, own: float, other: float, said: str) -> None:
    noise = [-0.01, 0.0, 0.01]
    rows = [{**row, "ahead": own + noise[row["seed"]], "ahead_null": other - noise[row["seed"]]} for row in result.rows]
    told = analysis.takeaway(replace(result, rows=rows))
    assert told.startswith(f"Yes: they beat {own + 0.5:.0%} or more of unrelated facts' sentences")
    assert said in told


def test_the_takeaway_does_not_say_yes_of_what_may_be_chance(result: Result) -> None:
    rows = [{**row, "ahead": [-0.3, 0.1, 0.4][row["seed"]], "ahead_null": None} for row in result.rows]
    assert analysis.takeaway(replace(result, rows=rows)).startswith("Not for sure: they beat")
