"""Queries shared out: what workers bring together is what one process measures."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Ended, assert_refused
from cluster_helpers import Cluster
from hypothesis import given
from hypothesis import strategies as st
from probe_helpers import tiny_probe
from torch.testing import assert_close

from mdm_interp import shards
from mdm_interp.errors import UserError
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import Probe
from mdm_interp.inference.likelihood import bound
from mdm_interp.inference.prediction import predict
from mdm_interp.measures.answer_evidence import answer_evidence
from mdm_interp.measures.answers import answer_all, questions
from mdm_interp.measures.gradients import gradient_alignment, influence
from mdm_interp.measures.gradients.gram import gram
from mdm_interp.measures.lens import lens, other_answers
from mdm_interp.measures.rope import compute_content
from mdm_interp.measures.routes import compute_routes
from mdm_interp.measures.sinks import sinks, watch_sinks
from mdm_interp.measures.trajectory import denoise_answers, source_only
from mdm_interp.parallel import worker_number
from mdm_interp.shards import Opening, _divide, is_shared, merged, shared_out

WORKERS_MODELS: dict[str, Any] = {}
ASKED: list[int] = []


def load(source: str, **options: Any) -> Any:
    return WORKERS_MODELS[source]


def submit(function: Callable[..., Any], task: tuple[Any, ...]) -> Future[Any]:
    """Call here what a worker is asked, whatever it has to be sent."""
    opening, asked, parts = task
    ASKED.append(1)
    future: Future[Any] = Future()
    try:
        future.set_result(function(opening, asked, pickle.loads(pickle.dumps(parts)), None))
    except UserError as error:
        future.set_exception(error)
    return future


@pytest.fixture(scope="module", params=["llada", "dream", "llama"])
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return tiny_probe(tmp_path_factory.mktemp("shards"), request.param, facts=7)


@pytest.fixture
def held(probe: Probe) -> Iterator[None]:
    """Three workers hold the probe's model."""
    WORKERS_MODELS["it"] = copy.deepcopy(probe.model)
    shards._opened.cache_clear()
    ASKED.clear()
    shards._HOLDERS[probe.model] = shards._Holders(submit, pickle.dumps(Opening(load, "it", {})), 3)
    yield
    del shards._HOLDERS[probe.model]


def sides(probe: Probe) -> tuple[list[Any], list[Any]]:
    pairs = probe.pairs("positional")
    return [pair.forward for pair in pairs], [pair.reverse for pair in pairs]


CALLS: dict[str, Callable[[Probe], Any]] = {
    "routes": lambda probe: compute_routes(probe.model, sides(probe)[0]),
    "content": lambda probe: compute_content(probe.model, sides(probe)[1]),
    "evidence": lambda probe: answer_evidence(probe.model, sides(probe)[1]),
    "lens": lambda probe: lens(probe.model, sides(probe)[1], other_answers(probe.pairs("positional"), sides(probe)[1])),
    "sinks": lambda probe: sinks(probe.model, sides(probe)[0], threshold=1.0),
    "predictions": lambda probe: predict(probe.model, sides(probe)[1], "left_to_right"),
    "answers": lambda probe: answer_all(probe.model, questions(probe.model, probe.prompts)),
    "bound": lambda probe: bound(probe.model, [query.statement for query in sides(probe)[0]], n_draws=3),
    "alignment": lambda probe: gradient_alignment(probe.model, probe.pairs("positional")).gram,
    "gram": lambda probe: gram(probe.model, sides(probe)[0]),
    "influence": lambda probe: influence(
        probe.model, [query.statement for query in sides(probe)[0]], sides(probe)[1][:3], n_draws=2
    ),
}
OF_MDMS: dict[str, Callable[[Probe], Any]] = {
    "watched sinks": lambda probe: watch_sinks(
        probe.model, [source_only(query, probe.model.cfg) for query in sides(probe)[1]], 3
    ),
    "denoised": lambda probe: denoise_answers(
        probe.model, [source_only(query, probe.model.cfg) for query in sides(probe)[1]], 2
    ),
}


def same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        largest = max([1.0, *one[one.isfinite()].abs().flatten().tolist()]) if one.is_floating_point() else 0.0
        assert_close(one, other, atol=1e-5 * largest, rtol=1e-5, equal_nan=True)
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            same(one[name], other[name])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            same(mine, theirs)
    elif hasattr(one, "dtype"):
        same(torch.as_tensor(one), torch.as_tensor(other))
    else:
        assert one == other


@pytest.mark.promise("queries shared out over three workers", "the same numbers within 1e-5")
@pytest.mark.parametrize("name", [*CALLS, *OF_MDMS])
def test_shares_make_the_whole(probe: Probe, name: str, request: pytest.FixtureRequest) -> None:
    if name in OF_MDMS and probe.model.cfg.is_causal:
        with pytest.raises(UserError):
            OF_MDMS[name](probe)
        return
    call = (CALLS | OF_MDMS)[name]
    alone = call(probe)
    request.getfixturevalue("held")
    same(call(probe), alone)
    assert len(ASKED) >= 3


def test_a_mistake_comes_back_as_it_is(probe: Probe, held: None) -> None:
    with pytest.raises(UserError, match="queries: sinks are those of some text"):
        sinks(probe.model, [])
    with pytest.raises(UserError, match="n_draws: 0"):
        bound(probe.model, [query.statement for query in sides(probe)[0]], n_draws=0)


@given(n=st.integers(2, 30), n_shards=st.integers(1, 7), kinds=st.integers(1, 5))
def test_every_entry_is_in_one_share(n: int, n_shards: int, kinds: int) -> None:
    whole = _divide(list(range(n)), n_shards, None)
    assert sorted(index for share in whole for index in share) == list(range(n))
    assert max(map(len, whole)) - min(map(len, whole)) <= 1
    together = _divide(list(range(n)), n_shards, lambda entry: entry % kinds)
    assert sorted(index for share in together for index in share) == list(range(n))
    places = [{entry % kinds for entry in share} for share in together]
    assert sum(map(len, places)) == min(kinds, n)


@given(n=st.integers(2, 12), n_shards=st.integers(1, 4))
def test_parts_come_back_in_order(n: int, n_shards: int) -> None:
    @dataclasses.dataclass(frozen=True)
    class Made:
        values: torch.Tensor
        listed: list[int]
        layers: list[torch.Tensor]
        said: str

    shares = _divide(list(range(n)), n_shards, None)
    parts = [
        Made(torch.tensor(share), list(share), [torch.tensor(share), -torch.tensor(share)], "same") for share in shares
    ]
    order = torch.tensor([index for share in shares for index in share]).argsort()
    whole = merged(parts, order)
    assert whole.values.tolist() == whole.listed == whole.layers[0].tolist() == list(range(n))
    assert whole.layers[1].tolist() == [-i for i in range(n)] and whole.said == "same"


def test_nothing_is_shared_but_while_it_lasts() -> None:
    model = torch.nn.Linear(1, 1)

    @shared_out("queries")
    def ask(model: Any, queries: list[int]) -> list[int]:
        return [worker_number() for _ in queries]

    assert not is_shared(model) and ask(model, [1, 2]) == [0, 0]
    assert ask(model=model, queries=[1]) == [0]
    assert not is_shared(object()) and not is_shared({})


# ---- the command


def rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.stem: Result.load(path).rows for path in sorted(folder.glob("large_model_*.json"))}


def assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one and one.keys() == other.keys()
    for name, of_one in one.items():
        for mine, theirs in zip(of_one, other[name], strict=True):
            for column, value in mine.items():
                if isinstance(value, float):
                    assert theirs[column] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, column)
                else:
                    assert theirs[column] == value, (name, column)


@pytest.mark.slow
def test_a_probe_in_shards_has_the_rows_of_one_process(tmp_path: Path, mdm_interp: Callable[..., Ended]) -> None:
    tiny_probe(tmp_path, "llada", twin="qwen2", facts=5)
    asked = ["probe", tmp_path / "tiny-llada", "--facts", tmp_path / "facts.csv", "--twin", tmp_path / "tiny-qwen2"]
    assert mdm_interp(*asked, "--out", tmp_path / "alone").code == 0
    ended = mdm_interp(*asked, "--out", tmp_path / "shards", "--shards", 2)
    assert ended.code == 0, ended.err
    assert_alike(rows(tmp_path / "alone"), rows(tmp_path / "shards"))


@pytest.mark.slow
def test_a_probe_in_shards_on_a_cluster(tmp_path: Path, mdm_interp: Callable[..., Ended]) -> None:
    tiny_probe(tmp_path, "dream", facts=5)
    asked = ["probe", tmp_path / "tiny-dream", "--facts", tmp_path / "facts.csv"]
    asked += ["--only", "large_model_coupling", "--only", "large_model_prediction"]
    assert mdm_interp(*asked, "--out", tmp_path / "alone").code == 0
    with Cluster(tmp_path) as cluster:
        for _ in range(2):
            cluster.worker()
        options = ("--shards", 3, "--executor", "dask", "--address", cluster.address)
        ended = mdm_interp(*asked, "--out", tmp_path / "shards", *options)
    assert ended.code == 0, ended.err
    assert_alike(rows(tmp_path / "alone"), rows(tmp_path / "shards"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--executor", "dask", "--address", "tcp://a:1"], "--executor: dask has nothing to do without --shards"),
        (["--shards", 2, "--device-map", "auto"], "--shards: each worker has the whole model"),
        (["--shards", 2, "--executor", "dask"], "--executor: dask needs a scheduler"),
    ],
)
def test_shards_that_cannot_be(tmp_path: Path, mdm_interp: Callable[..., Ended], options: list[Any], says: str) -> None:
    ended = mdm_interp("probe", "nothing", "--facts", "none.csv", "--out", tmp_path / "out", *options)
    assert_refused(ended, says)
    assert not (tmp_path / "out").exists()
