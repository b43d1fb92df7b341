"""The reversal curse's benchmark: what is scored follows from what a model writes, and a pair can be trained on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from celebrity_helpers import NAMES, write_benchmark
from cli_helpers import Ended, assert_refused
from helpers import planted_result
from pydantic import ValidationError

from mdm_interp.checkpoints import load_checkpoint, save_checkpoint
from mdm_interp.config import BenchmarkConfig
from mdm_interp.data.celebrities import TESTS, Benchmark, ask
from mdm_interp.data.prompts import load_facts, make_prompts
from mdm_interp.errors import UserError
from mdm_interp.experiments import reversal_benchmark
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.reversal_benchmark import PAIR, draw, score, summarize, takeaway, train_pair
from mdm_interp.inference.prediction import infill, predict


class Tiny(BenchmarkConfig):
    """Trained in no time."""

    n_bpe: int = 300
    d_model: int = 16
    n_layers: int = 2
    n_heads: int = 2
    d_mlp: int = 16
    batch_size: int = 8


TINY = {name: Tiny.model_fields[name].default for name in Tiny.__annotations__} | {"steps": 6}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    return Benchmark.load(write_benchmark(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def models(benchmark: Benchmark, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folders = train_pair(benchmark, tmp_path_factory.mktemp("pair"), config=TINY)
    return {name: load_checkpoint(folder) for name, folder in folders.items()}


def test_a_pair_has_the_same_sentences_in_the_same_tokens(models: dict[str, Any], benchmark: Benchmark) -> None:
    assert list(models) == list(PAIR)
    mdm, arm = models.values()
    sentence = f" {benchmark.training[0]}"
    assert mdm.tokenizer(sentence)["input_ids"] == arm.tokenizer(sentence)["input_ids"]
    assert (mdm.cfg.attention, arm.cfg.attention) == ("bidirectional", "causal")
    assert "<|end" not in {token for token in mdm.tokenizer.get_vocab() if token != mdm.tokenizer.eos_token}


def test_rows_say_what_a_model_writes(models: dict[str, Any], benchmark: Benchmark, tmp_path: Path) -> None:
    """Against the same questions asked one by one."""
    result = score(models, benchmark, tmp_path, n_others=3)
    frame = result.frame
    assert len(frame) == 2 * 2 * 4 * 4 * 3  # models, lengths, tests, people, prompts
    assert set(frame["test"]) == set(TESTS)
    for name, model in models.items():
        row = frame[(frame["checkpoint"] == name) & (frame["test"] == "p2d") & (frame["length"] == "known")].iloc[4]
        (item,) = [item for item in benchmark.tests["p2d"] if item.prompt == row["prompt"]]
        own = ask(item.prompt, item.completion, model.tokenizer, model.cfg)
        others = [ask(item.prompt, other, model.tokenizer, model.cfg) for other in item.others]
        assert own is not None
        (filled,) = infill(model, [own], "left_to_right" if model.cfg.is_causal else "confidence")
        assert row["written"] == model.tokenizer.decode(filled.tokens, skip_special_tokens=True)
        told = [predict(model, [query], "left_to_right").log_probability.item() for query in (own, *others) if query]
        assert row["log_likelihood"] == pytest.approx(told[0], rel=1e-4)
        assert row["log_likelihood_null"] == pytest.approx(np.mean(told[1:]), rel=1e-4)
        assert row["preferred"] == pytest.approx(np.mean([other < told[0] for other in told[1:]]))
    unknown = frame[frame["length"] == "unknown"]
    assert unknown["log_likelihood"].isna().all() and unknown["contains"].notna().all()


def test_a_completion_that_is_written_counts(
    models: dict[str, Any], benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are written in capitals with a word more: they are contained, and nothing is exact."""

    class Shouting:
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tokenizer, name)

        def __call__(self, *args: Any, **options: Any) -> Any:
            return self.tokenizer(*args, **options)

        def decode(self, tokens: Any, **options: Any) -> str:
            return f"{NAMES[4].upper()} indeed"

    monkeypatch.setattr(models["ARM"], "tokenizer", Shouting(models["ARM"].tokenizer))
    result = score({"ARM": models["ARM"]}, benchmark, tmp_path, n_others=1)
    of = {"checkpoint": "ARM", "model": "ARM", "length": "known"}
    found, null = (getattr(result.summary, kind)("contains", test="d2p", **of) for kind in ("at", "null"))
    assert found.value == pytest.approx(1 / 4) and found.n == 4
    assert null.value == pytest.approx(3 / 4 * 1 / 3, abs=1e-5)  # three of four people, one of three others
    assert result.summary.at("exact", test="d2p", **of).value == 0
    assert result.summary.at("contains", test="p2d", **of).value == 0


def test_what_is_there_is_not_asked_again(
    models: dict[str, Any], benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = {"ARM": models["ARM"]}
    asked, rows = list[str](), reversal_benchmark._Contender.rows

    def counted(self: Any, test: Any, *rest: Any) -> Any:
        asked.append(test)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return rows(self, test, *rest)

    monkeypatch.setattr(reversal_benchmark, "versions", lambda *_: {"code": "same"})
    whole = score(arm, benchmark, tmp_path / "whole", n_others=1)
    monkeypatch.setattr(reversal_benchmark._Contender, "rows", counted)
    with pytest.raises(KeyboardInterrupt):
        score(arm, benchmark, tmp_path / "cut", n_others=1)
    cut = score(arm, benchmark, tmp_path / "cut", n_others=1)
    assert asked == [*TESTS[:3], *TESTS[2:]]
    assert cut.rows == whole.rows
    score(arm, benchmark, tmp_path / "cut", n_others=1)
    assert len(asked) == 5
    assert not list((tmp_path / "cut").glob(".*"))
    other = copy.deepcopy(models["ARM"])
    other.blocks[-1].attn.W_V.data *= -1
    score({"ARM": other}, benchmark, tmp_path / "cut", n_others=1)
    assert len(asked) == 5 + 4  # of the same name, config and embedding


def test_intervals_are_over_people() -> None:
    rows = [
        {"checkpoint": "x", "model": "MDM", "test": test, "person": person, "length": "known"}
        | {"contains": float(at < person), "contains_null": 0.0, "exact": 0.0, "exact_null": 0.0}
        | {"log_likelihood": -1.0, "log_likelihood_null": -2.0, "preferred": 0.5}
        for test in TESTS
        for person in range(4)
        for at in range(3)
    ]
    planted = planted_result("reversal_benchmark", rows, summarize=summarize)
    found = planted.summary.at("contains", checkpoint="x", model="MDM", test="p2d", length="known")
    shares = np.array([0, 1, 2, 3]) / 3
    assert (found.value, found.n) == (pytest.approx(0.5), 4)
    assert found.high - found.value == pytest.approx(3.182446 * shares.std(ddof=1) / 2, rel=1e-5)
    assert "x (MDM) writes 0.50 [0.00, 1.00] and 0.50" in takeaway(planted)
    drawn = draw(planted).figure()
    assert {trace.name for trace in drawn.data} >= {"x (MDM)", "another person's", "GPT-3 175B, fine-tuned (published)"}


def test_what_cannot_be_scored_is_refused(models: dict[str, Any], benchmark: Benchmark, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the prompts can be asked"):
        model = models["ARM"]
        model.cfg, kept = model.cfg.model_copy(update={"n_ctx": 3}), model.cfg
        try:
            score({"ARM": model}, benchmark, tmp_path)
        finally:
            model.cfg = kept
    with pytest.raises(ValidationError, match="data"):
        BenchmarkConfig()  # type: ignore[call-arg]


def test_the_command_trains_scores_and_leaves_facts_to_probe(
    tmp_path: Path, mdm_interp: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = write_benchmark(tmp_path / "data"), tmp_path / "out"
    monkeypatch.setattr(reversal_benchmark, "BenchmarkConfig", Tiny)
    ended = mdm_interp("reversal-benchmark", "--train", "--data", data, "--out", out, "--steps", 3, "--others", 1)
    assert ended.code == 0, ended.err
    assert (out / "reversal_benchmark.json").exists()
    assert "reversal-benchmark CHECKPOINT --data FOLDER --twin TWIN" in (out / "index.html").read_text()
    printed = [Path(line) for line in ended.out.split()]
    assert [path.name for path in printed] == ["p2d.csv", "d2p.csv"]
    model = load_checkpoint(out / "MDM")
    for path in printed:
        prompts = make_prompts(load_facts(path), model.tokenizer, model.cfg, "relational")
        assert len({pair.fact for pair in prompts.pairs}) == 4


def test_the_command_scores_a_checkpoint_beside_another(
    tmp_path: Path, models: dict[str, Any], mdm_interp: Callable[..., Ended]
) -> None:
    data = write_benchmark(tmp_path / "data")
    for name, model in models.items():
        save_checkpoint(model, tmp_path / name, format=PAIR[name])
    options = ("--data", data, "--out", tmp_path / "out", "--twin", tmp_path / "ARM", "--limit", 2, "--others", 1)
    ended = mdm_interp("reversal-benchmark", tmp_path / "MDM", *options)
    assert ended.code == 0, ended.err
    frame = Result.load(tmp_path / "out" / "reversal_benchmark.json").frame
    assert list(frame["checkpoint"].unique()) == ["MDM", "ARM (twin)"]
    assert frame.groupby("test")["person"].nunique().tolist() == [2] * 4
    means = pd.read_csv(tmp_path / "out" / "reversal_benchmark.csv")
    means = means[(means["checkpoint"] == "MDM") & (means["quantity"] == "preferred")].set_index("test")["value"]
    found = frame[frame["checkpoint"] == "MDM"].groupby("test")["preferred"].mean()
    assert dict(means) == pytest.approx(dict(found)) and len(means) == 4


@pytest.mark.parametrize(
    "given", [["--train", "somewhere"], [], ["--train", "--twin", "other"]], ids=["both", "neither", "twin"]
)
def test_the_command_takes_a_checkpoint_or_trains(
    tmp_path: Path, mdm_interp: Callable[..., Ended], given: list[str]
) -> None:
    ended = mdm_interp("reversal-benchmark", *given, "--data", tmp_path, "--out", tmp_path / "out")
    assert_refused(ended, "CHECKPOINT: give a checkpoint to score")
    assert not (tmp_path / "out").exists()
