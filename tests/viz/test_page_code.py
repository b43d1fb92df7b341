"""The code that a page shows makes the same page, for whoever runs it."""

from __future__ import annotations

import html as entities
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_run
from model_helpers import mirrored_pairs
from probe_helpers import tiny_probe

from mdm_interp import viz
from mdm_interp.checkpoints import load_checkpoint, save_checkpoint
from mdm_interp.config import FactConfig
from mdm_interp.measures.gradients import influence
from mdm_interp.training.loop import train
from mdm_interp.training.runs import Run
from mdm_interp.viz.pages.page import Page
from mdm_interp.viz.pages.subject import Subject

WORLD = FactConfig(n_entities=9, n_filler=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs in `runs`, a checkpoint, and one that says less than the loader wants to know."""
    folder = tmp_path_factory.mktemp("here")
    for seed in (0, 1):
        run = train(tiny_run(WORLD, "rope", "any_order", seed), root=folder / "runs", progress=False)
    save_checkpoint(run.model(), folder / "native", format="mdm_interp")
    return folder


@pytest.fixture
def runs(store: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    monkeypatch.chdir(store)
    return [Run.at(folder.parent) for folder in sorted(Path("runs").glob("*/config.yaml"))]


def what(html: str) -> tuple[Any, ...]:
    """What a page shows: its words, and all its numbers."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    about = re.search(r"</h1>\s*<p>(.*?)</p>", html, re.DOTALL)
    assert data is not None and about is not None
    return about[1], json.loads(data[1])


def assert_made_by_its_code(page: Page, **defined: Any) -> None:
    exec(page.code, dict(defined))
    assert what(Path("page.html").read_text(encoding="utf-8")) == what(page.html())


def silence(z: torch.Tensor, hook: object) -> torch.Tensor:
    return torch.zeros_like(z)


EDITS = {"layer 0 off": [("blocks.0.attn.hook_z", silence)]}
OF_RUNS: dict[str, Callable[[Run, Run], Page]] = {
    "attention of a text": lambda run, _: viz.attention(run, "A2 r0 [M]", source="A2"),
    "attention of tokens": lambda run, _: viz.attention(run, torch.tensor([3, 5, 7]), rows=iter([2]), heads=iter([1])),
    "attention of a query": lambda run, _: viz.attention(run, run.query_pairs()[0].forward, layers=[0]),
    "denoising": lambda run, _: viz.trajectory(run, "A2 [M] [M]", order="random", steps=1, heads=[0], source="A2"),
    "routes": lambda run, _: viz.routes(run, run.query_pairs(n_contexts=1)[5], heads=[1], layers=[0]),
    "routes of another pair": lambda run, _: viz.routes(run, mirrored_pairs(causal=False)[0]),
    "explorer": lambda run, _: viz.explore(run),
    "explorer of some": lambda run, _: viz.explore(run, run.query_pairs(n_contexts=1)[:3], steps=run.steps[::2]),
    "explorer of other pairs": lambda run, _: viz.explore(run, mirrored_pairs(causal=False)),
    "explorer of two": lambda run, other: viz.explore({"one": run, "other": other}, run.query_pairs(n_contexts=1)[:2]),
}


@pytest.mark.parametrize("kind", OF_RUNS)
def test_a_page_of_a_run_is_made_by_its_code(kind: str, runs: list[Run]) -> None:
    page = OF_RUNS[kind](runs[0], runs[1])
    assert f'Run.open("{runs[0].folder.name}", root="runs")'.replace('"', "'") in page.code
    assert_made_by_its_code(page)


def test_a_runs_own_pairs_are_named_and_others_written_out(runs: list[Run]) -> None:
    assert "model.query_pairs(n_contexts=1)[:3]" in OF_RUNS["explorer of some"](*runs).code
    assert "model.query_pairs(n_contexts=1)[5]" in OF_RUNS["routes"](*runs).code
    assert OF_RUNS["explorer of other pairs"](*runs).code.count("QueryPair(forward=Query(") == 4


def test_a_page_of_a_checkpoint_is_made_by_its_code(runs: list[Run]) -> None:
    subject = Subject.of_checkpoint(load_checkpoint("native", dtype="float64"), "native", dtype="float64")
    pairs = runs[0].query_pairs(n_contexts=1)[:2]
    pages = [
        viz.attention(subject, "A2 r0 [M]"),
        viz.trajectory(subject, "A2 r0 [M]"),
        viz.routes(subject, pairs[0]),
        viz.explore(subject, pairs),
        viz.explore({"run": runs[0], "checkpoint": subject}, pairs),
    ]
    for page in pages:
        assert "load_checkpoint('native', dtype='float64')" in page.code
        assert_made_by_its_code(page)


def test_what_cannot_be_written_down_is_left_to_the_reader_by_name(runs: list[Run]) -> None:
    page = viz.explore(runs[0], runs[0].query_pairs(n_contexts=1)[:2], edits=EDITS)
    (comment,) = [line for line in page.code.splitlines() if line.startswith("#")]
    assert comment.startswith("# edits, {'layer 0 off': …}, holds functions, which cannot be written here")
    with pytest.raises(NameError, match="'edits'"):
        exec(page.code, {})
    assert_made_by_its_code(page, edits=EDITS)
    model = runs[0].model()
    assert_made_by_its_code(viz.attention(model, "A2 r0 [M]"), model=model)
    array = torch.full((2, 3, 3), 1 / 3)
    assert_made_by_its_code(viz.patterns(array, ["a", '"b"', "c"]), array=array)
    training, query_pairs = [(1, 2, 3), (3, 2, 1)], mirrored_pairs(causal=False)[:1]
    found = influence(model, training, [query_pairs[0].forward, query_pairs[0].reverse])
    page = viz.influence(runs[0], training, query_pairs, found, top=1)
    assert_made_by_its_code(page, training=training, query_pairs=query_pairs, found=found)
    places, quantities = [viz.Place("", "base", 1, {"p": 0.5}, ["run"])], {"p": "probability"}
    page = viz.settings_map(places, quantities, about="Answers.")
    assert_made_by_its_code(page, places=places, quantities=quantities)


@pytest.mark.parametrize(
    "arguments",
    [
        ("attention", "RUN", "A2 r0 [M]", "--rows", "2", "--layers", "0"),
        ("denoise", "RUN", "A2 r0 [M]"),
        ("routes", "RUN", "--pair", "4"),
        ("explore", "RUN", "--with", "OTHER", "--limit", "2"),
        ("attention", "native", "A2 r0 [M]", "--dtype", "float64"),
        ("explore", "tiny-llada", "--facts", "facts.csv", "--limit", "2"),
        ("explore", "tiny-llada", "--with", "again/tiny-llada", "--facts", "facts.csv", "--limit", "2"),
    ],
    ids=" ".join,
)
def test_a_page_of_the_command_line_is_made_by_its_code(
    arguments: tuple[str, ...],
    store: Path,
    runs: list[Run],
    mdm_interp: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(store)
    if "tiny-llada" in arguments and not Path("again").exists():
        for folder in (Path(), Path("again")):
            folder.mkdir(exist_ok=True)
            tiny_probe(folder, "llada")
    named = {"RUN": runs[0].folder.name[:8], "OTHER": str(runs[1].folder)}
    ended = mdm_interp(
        *[named.get(argument, argument) for argument in arguments], "--device", "cpu", "--out", "made.html"
    )
    assert ended.code == 0, ended.err
    html = Path("made.html").read_text(encoding="utf-8")
    shown = re.search(r'<pre id="code">(.*?)</pre>', html, re.DOTALL)
    assert shown is not None
    exec(entities.unescape(shown[1]), {})
    assert what(Path("page.html").read_text(encoding="utf-8")) == what(html)
