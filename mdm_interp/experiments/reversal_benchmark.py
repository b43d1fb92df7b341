"""The reversal curse's published benchmark: checkpoints scored on it, and a small pair trained on its sentences.

model = load_checkpoint("GSAI-ML/LLaDA-8B-Base", dtype="bfloat16")
result = score({"LLaDA-8B-Base": model}, Benchmark.load("reversal_celebrities"), Path("scores"))
result.summary.at("contains", checkpoint="LLaDA-8B-Base", test="p2d_reverse", length="known")
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

from mdm_interp.config import BenchmarkConfig, TextConfig
from mdm_interp.data.celebrities import Benchmark, Item, Test, ask, facts
from mdm_interp.data.queries import Query
from mdm_interp.errors import UserError
from mdm_interp.experiments.report import BENCHMARK
from mdm_interp.experiments.results import CheckpointOrigin, Parts, Result, tidy
from mdm_interp.experiments.subjects import fingerprint
from mdm_interp.files import write_text
from mdm_interp.inference.prediction import infill, infill_any_length, predict
from mdm_interp.models.bridge import hooked
from mdm_interp.parallel import progress_bars, side_by_side
from mdm_interp.provenance import environment, versions
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.summary import Summary
from mdm_interp.training.text import END, TextBars, TextStep, train_text
from mdm_interp.viz.panels import PROBABILITY, Panels
from mdm_interp.viz.theme import CHANCE, GOLD, INDIGO, MAGENTA, OLIVE, title_height, titled

QUESTION = "Who answers in reverse what was stated one way only?"
LABELS: dict[Test, str] = {
    "p2d": "name → description<br>as trained",
    "d2p": "description → name<br>as trained",
    "p2d_reverse": "description → name<br>reversed",
    "d2p_reverse": "name → description<br>reversed",
}
PUBLISHED: dict[str, dict[Test, float]] = {
    "GPT-3 175B, fine-tuned": {"p2d": 0.50, "d2p": 0.97, "p2d_reverse": 0.0, "d2p_reverse": 0.0}
}
"""Exact matches that others report: arXiv 2309.12288, table 1."""
N_OTHERS, SEED = 9, 0
"""With how many other people's completions a completion is compared, and what draws them."""
PEOPLE = 5
"""How many people are asked about at a time."""
BY = ("checkpoint", "model", "test", "length")
QUANTITIES = ("contains", "exact", "log_likelihood", "preferred")


# ---- scoring


def score(models: Mapping[str, Any], benchmark: Benchmark, out: Path, *, n_others: int = N_OTHERS) -> Result:
    """Ask models for every completion of the four tests, and save the result, `OUT/reversal_benchmark.json`. What is
    there of a scoring that was interrupted is not asked again.

    A row is one prompt, asked with the completion's number of tokens known, or not. `contains` says whether the
    completion is a substring of what the model writes, both in lower case, as published; `exact` whether it is all of
    it; null: the share of other people's completions of the same words that are. `log_likelihood` (nats) is the
    completion's, token by token from the left; null: the mean of some other people's; `preferred` is the share of these
    that are less likely, one half by chance. A masked diffusion model fills in one token after the other, the one it
    is most certain of first; a causal one writes from the left until the text ends.

    Args:
        models: The checkpoint, and what is put beside it, by name; with their tokenizers.
        n_others: How many other people's completions are compared.

    Raises:
        UserError: a model has no tokenizer, or no prompt can be asked.
    """
    contenders = [_Contender.of(name, model, benchmark) for name, model in models.items()]
    planned = Result(
        name=BENCHMARK,
        question=QUESTION,
        origin=_origin(contenders),
        settings={"n_others": n_others, "seed": SEED, "data": benchmark.digest},
        seeds=[],
        versions=versions(_Contender.rows, ask, infill, infill_any_length, predict),
        rows=[],
        summarize=summarize,
    )
    path = out / f"{BENCHMARK}.json"
    if path.exists() and (stored := Result.load(path, summarize)).same_measurement(planned):
        return stored
    parts, rows = Parts(out, planned), list[dict[str, Any]]()
    with progress_bars() as bars:
        tasks = [(of, *share) for of in contenders for share in of.shares()]
        bar = bars.add_task("asking", total=len(tasks), values="")
        for contender, test, first, asked in tasks:
            bars.update(bar, values=f"{contender.name}, {test}")
            subject = f"{contender.digest}-{test}-{first}"
            if (found := parts.load(subject)) is None:
                parts.save(subject, found := tidy(contender.rows(test, asked, n_others)))
            rows += [{"checkpoint": contender.name, **row} for row in found]
            bars.advance(bar)
    replace(planned, rows=tidy(rows), measured_with=environment(train_text)).save(path)
    parts.delete()
    return Result.load(path, summarize)


Asked = list[tuple[Item, Query]]


@dataclass(frozen=True)
class _Contender:
    """A model, and what it can be asked."""

    name: str
    model: Any
    asked: dict[Test, Asked]
    skipped: dict[str, int]
    longest: int
    """Of all completions."""

    @classmethod
    def of(cls, name: str, model: Any, benchmark: Benchmark) -> _Contender:
        model = hooked(model)
        if model.tokenizer is None:
            raise UserError(f"{name}: has no tokenizer, which the prompts are put in; add its tokenizer.json")
        if not model.cfg.is_causal and model.cfg.mask_token_id is None:
            raise UserError(f"{name}: is bidirectional without a mask token; give its mask_token_id")
        asked: dict[Test, Asked] = {
            test: [
                (item, query)
                for item in items
                if (query := ask(item.prompt, item.completion, model.tokenizer, model.cfg))
            ]
            for test, items in benchmark.tests.items()
        }
        if not any(asked.values()):
            raise UserError(f"{name}: none of the prompts can be asked in its tokens; check its tokenizer and n_ctx")
        skipped = {test: len(items) - len(asked[test]) for test, items in benchmark.tests.items()}
        longest = max(len(query.answer) for of_test in asked.values() for _, query in of_test)
        return cls(name, model, asked, skipped, longest)

    @cached_property
    def digest(self) -> str:
        return fingerprint(self.model, repr(self.asked))

    def shares(self) -> Iterator[tuple[Test, str, Asked]]:
        """Give for some people at a time the test, the first one's name and what is asked about them."""
        for test, asked in self.asked.items():
            people = list(dict.fromkeys(item.person for item, _ in asked))
            for start in range(0, len(people), PEOPLE):
                some = people[start : start + PEOPLE]
                yield test, some[0], [(item, query) for item, query in asked if item.person in some]

    def rows(self, test: Test, asked: Asked, n_others: int) -> list[dict[str, Any]]:
        """Ask some prompts."""
        model, tokenizer, cfg = self.model, self.model.tokenizer, self.model.cfg
        queries, order = [query for _, query in asked], "left_to_right" if cfg.is_causal else "confidence"
        ends = [[] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]] * len(queries) * cfg.is_causal
        compared: list[list[Query]] = []
        for item, _ in asked:
            drawn = random.Random(f"{SEED} {test} {item.prompt}").sample(item.others, min(n_others, len(item.others)))
            found = (ask(item.prompt, other, tokenizer, cfg) for other in drawn)
            compared.append([query for query in found if query])
        told = predict(model, [*queries, *(query for those in compared for query in those)], "left_to_right")
        own, others = told.log_probability.split([len(queries), len(told.log_probability) - len(queries)])
        others = others.split([len(those) for those in compared])
        written = {
            "known": infill(model, queries, order),
            "unknown": infill_any_length(model, queries, order, longest=self.longest, ends=ends),
        }
        rows = []
        for length, answers in written.items():
            for (item, _), answer, mine, theirs in zip(asked, answers, own, others, strict=True):
                text = tokenizer.decode(answer.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                row = {"model": "ARM" if cfg.is_causal else "MDM", "test": test, "person": item.person}
                row |= {"prompt": item.prompt, "length": length, "written": text}
                for name, is_it in {"contains": _contains, "exact": _is}.items():
                    hits = [is_it(text, other) for other in item.others]
                    row |= {name: float(is_it(text, item.completion))}
                    row |= {f"{name}_null": sum(hits) / len(hits) if hits else None}
                if length == "known" and len(theirs):
                    less = (theirs < mine).double() + 0.5 * (theirs == mine).double()
                    row |= {"log_likelihood": mine.item(), "log_likelihood_null": theirs.mean().item()}
                    row |= {"preferred": less.mean().item()}
                rows.append(row)
        return rows


def _contains(text: str, completion: str) -> bool:
    return completion.strip().lower() in text.lower()


def _is(text: str, completion: str) -> bool:
    return completion.strip() == text.strip()


def _origin(contenders: Sequence[_Contender]) -> CheckpointOrigin:
    """Return where the result comes from: the first contender, each further one as the twin of the one before."""
    first, *others = contenders
    return CheckpointOrigin(
        checkpoint=first.name,
        model=first.model.cfg.model_dump(mode="json"),
        digest=first.digest,
        facts=len({item.person for asked in first.asked.values() for item, _ in asked}),
        pairs={test: len(asked) for test, asked in first.asked.items()},
        skipped=first.skipped,
        reasons={},
        twin=_origin(others) if others else None,
    )


# ---- what it says


def summarize(result: Result) -> Summary:
    """Give the means over people of each one's prompts, with intervals over people."""
    frame = result.frame.astype({name: float for name in result.frame if str(name).startswith(QUANTITIES)})
    columns = [name for name in frame if str(name).startswith(QUANTITIES)]
    people = frame.groupby([*BY, "person"], sort=False)[columns].mean().reset_index()
    summary = Summary.of(people, BY, QUANTITIES)
    return Summary([entry for entry in summary if entry.effect.n])


def takeaway(result: Result) -> str:
    """Say what every checkpoint writes, and what it finds likelier in reverse than other people's completions."""
    said = []
    for checkpoint, frame in result.frame.groupby("checkpoint", sort=False):
        of = {"checkpoint": checkpoint, "model": frame["model"].iloc[0], "length": "known"}
        found = [_said(result.summary.at("contains", test=test, **of)) for test in LABELS]
        likelier = [_said(result.summary.at("preferred", test=test, **of)) for test in list(LABELS)[2:]]
        said.append(
            f"{_label(str(of['checkpoint']), of['model'])} writes {' and '.join(found[:2])} of completions as trained, "
            f"{' and '.join(found[2:])} reversed, where they are likelier than another person's in "
            f"{' and '.join(likelier)} of comparisons"
        )
    people = result.frame["person"].nunique()
    return (
        f"{'. '.join(said)}. The number of tokens is known. Of two numbers the first is about people introduced by "
        f"their name, the second by a description; [95 % over {people} people]."
    )


def _label(checkpoint: str, model: str) -> str:
    return checkpoint if checkpoint == model else f"{checkpoint} ({model})"


def _said(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{max(estimate.low, 0):.2f}, {min(estimate.high, 1):.2f}]" if estimate.n else "–"


def draw_figure(result: Result) -> go.Figure:
    """Draw a result: titled with the question, and what to take away below it."""
    said = takeaway(result)
    return titled(draw(result).figure(title_height(said)), result.question, said)


SHOWN = {
    ("contains", "known"): ("completion written,<br>length known", PROBABILITY),
    ("contains", "unknown"): ("completion written,<br>length unknown", PROBABILITY),
    ("preferred", "known"): ("likelier than another<br>person's (chance: 0.5)", PROBABILITY),
}
COLORS = (MAGENTA, INDIGO, OLIVE)
"""Of the checkpoint and those beside it."""


def draw(result: Result) -> Panels:
    """Draw each test's scores, one model below the other."""
    panels, summary = Panels(), result.summary
    titles = [title for title, _ in SHOWN.values()]
    row = panels.row(titles, x={"range": [-0.03, 1.03], "title": "share"}, y={"autorange": "reversed"}, height=260)
    models = list(dict.fromkeys(zip(result.frame["checkpoint"], result.frame["model"], strict=True)))
    for panel, (quantity, length) in zip(row, SHOWN, strict=True):
        for i, (checkpoint, model) in enumerate(models):
            shift, of = 0.24 * (i - (len(models) - 1) / 2), {"checkpoint": checkpoint, "model": model, "length": length}
            found = {label: summary.at(quantity, test=test, **of) for test, label in LABELS.items()}
            null = {label: summary.null(quantity, test=test, **of) for test, label in LABELS.items()}
            panel.estimates(found, name=_label(checkpoint, model), color=COLORS[i % len(COLORS)], shift=shift)
            if quantity == "contains":
                panel.estimates(null, name="another person's", color=CHANCE, symbol="line-ns", shift=shift)
        if (quantity, length) == ("contains", "known"):
            for name, published in PUBLISHED.items():
                known = {LABELS[test]: Estimate(value, math.nan, math.nan, 1) for test, value in published.items()}
                panel.estimates(known, name=f"{name} (published)", color=GOLD, symbol="diamond-open", shift=0.36)
    return panels


# ---- training


def train_pair(
    benchmark: Benchmark, out: Path, *, config: Mapping[str, Any] | None = None, device: str = "cpu", workers: int = 2
) -> dict[str, Path]:
    """Train a masked diffusion model and its causal twin on the benchmark's sentences, side by side: the same tokens,
    sizes, seed and number of steps. Goes on where it was interrupted.

    Args:
        config: Fields of a :class:`~mdm_interp.config.BenchmarkConfig` that differ from their defaults.

    Returns:
        The folders, by name.

    Raises:
        UserError: as :func:`~mdm_interp.training.text.train_text`.
    """
    sentences = [f" {sentence}{END}" for sentence in benchmark.training]
    configs = {
        name: BenchmarkConfig.model_validate({**(config or {}), "format": format, "data": benchmark.digest})
        for name, format in PAIR.items()
    }
    folders = {name: out / name for name in PAIR}
    tasks = [(folders[name].absolute(), sentences, configs[name], device) for name in PAIR]
    names = {format: f"training {name}" for name, format in PAIR.items()}
    with progress_bars() as progress:
        bars = TextBars(progress, lambda made: names[made.format])
        for made in configs.values():
            bars.add(made)
        side_by_side(_train_one, tasks, workers=workers, show=bars.show)
    return folders


PAIR = {"MDM": "llada", "ARM": "qwen2"}
"""What is trained, and in which format."""


def _train_one(
    folder: Path, sentences: Sequence[str], config: TextConfig, device: str, report: Callable[[TextStep], Any]
) -> None:
    def told(step: int, loss: float) -> None:
        report(TextStep(config, step, loss))

    train_text(folder, sentences, config, record="benchmark.yaml", device=device, report=told)


def write_facts(benchmark: Benchmark, out: Path) -> list[Path]:
    """Write both halves of the people as facts for `mdm-interp probe`, `p2d.csv` and `d2p.csv` with their templates;
    the forward sentences have the direction that training has.

    Raises:
        UserError: as :func:`~mdm_interp.data.celebrities.facts`.
    """
    written = []
    halves: tuple[Literal["p2d", "d2p"], ...] = ("p2d", "d2p")
    for trained in halves:
        rows, templates = facts(benchmark, trained)
        write_text(out / f"{trained}.csv", pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))
        templates.to_yaml(out / f"{trained}.templates.yaml")
        written.append(out / f"{trained}.csv")
    return written
