"""Whether verdicts depend on the processor: the quick grid under two instruction sets, compared line by line.

    python -m benchmarks.retest [--folder retest] [--seeds N]

The grid is trained, measured and judged twice by `mdm-interp reproduce`: as this processor computes (`native`), and
with the instructions that every processor of its kind has (`plain`). Each side has its runs and figures in a folder of
its own, `FOLDER/native` and `FOLDER/plain`, and what is there already is neither trained nor measured again. Which
verdicts move, and how far effects and the values of summaries do, is written to `docs/retest.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mdm_interp.experiments.analysis import discover, ledger
from mdm_interp.experiments.claims import Verdict
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import scope_label
from mdm_interp.files import write_text
from mdm_interp.parallel import workers_of
from mdm_interp.provenance import machine
from mdm_interp.stats.estimates import Estimate

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "retest.md"

Name = Literal["native", "plain"]
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
"""What keeps torch, MKL and oneDNN from using more than every processor has."""


def environment(name: Name) -> dict[str, str]:
    """Return the environment of one side, whose worker processes inherit it."""
    rest = {variable: value for variable, value in os.environ.items() if variable not in PLAIN}
    return rest | PLAIN if name == "plain" else rest


# ---- what the two sides compute with


def tell() -> None:
    """Print as JSON what a worker process computes with, and digests of what it computes."""
    with workers_of(1) as (submit, _):
        print(json.dumps(submit(_look, ()).result()))


def _look(report: Any) -> dict[str, Any]:
    x = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    computed = {"random numbers": x, "products": x @ x, "exponentials": x.exp(), "sums": x.sum(0)}
    digests = {what: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for what, tensor in computed.items()}
    return {**machine(), "torch": torch.__version__, "digests": digests}


def look(name: Name) -> dict[str, Any]:
    """Return what :func:`tell` prints on one side."""
    command = [sys.executable, "-c", "from benchmarks import retest; retest.tell()"]
    told = subprocess.run(command, cwd=ROOT, env=environment(name), stdout=subprocess.PIPE, check=True).stdout
    return json.loads(told)


# ---- one side


@dataclass(frozen=True)
class Side:
    """What the grid came to on one side."""

    results: Mapping[str, Result]
    """By the name of the analysis."""
    verdicts: Sequence[Verdict]


def reproduce(name: Name, folder: Path, seeds: int | None) -> None:
    """Train, measure and judge the quick grid, or what `folder` lacks of it."""
    command = [sys.executable, "-c", "from mdm_interp.cli import main; main()", "reproduce", "--device", "cpu"]
    command += ["--runs", str(folder / "runs"), "--out", str(folder / "figures")]
    command += [] if seeds is None else ["--seeds", str(seeds)]
    subprocess.run(command, env=environment(name), check=True)


def read(folder: Path) -> Side:
    """Read the results of one side, and judge them."""
    known, out = discover(), folder / "figures"
    results = {one.name: one.load(out / f"{one.name}.json") for one in known if (out / f"{one.name}.json").exists()}
    return Side(results, ledger(known, results))


# ---- compared


@dataclass(frozen=True)
class Change:
    """One estimate on both sides."""

    where: str
    native: Estimate
    plain: Estimate

    @property
    def size(self) -> float:
        """How far the values are apart."""
        return abs(self.plain.value - self.native.value)

    @property
    def share(self) -> float:
        """The same as a share of the half-width of the wider interval; NaN where there is none."""
        half = max((one.high - one.low) / 2 for one in (self.native, self.plain))
        return self.size / half if half > 0 else math.nan


@dataclass(frozen=True)
class Comparison:
    """Two ledgers, line by line, and two sets of summaries."""

    moved: Sequence[tuple[Verdict, Verdict]]
    """Lines whose verdict is another one, native and plain."""
    alone: Sequence[str]
    """What only one side has."""
    effects: Mapping[tuple[str, str], Sequence[Change]]
    """Of all lines, by claim and measure."""
    values: Mapping[tuple[str, str], Sequence[Change]]
    """Of all summaries, by analysis and quantity."""


def compare(native: Side, plain: Side) -> Comparison:
    """Compare what both sides have."""
    ours, theirs = (_lines(side.verdicts) for side in (native, plain))
    both = [(ours[key], theirs[key]) for key in ours if key in theirs]
    effects: dict[tuple[str, str], list[Change]] = {}
    for one, other in both:
        change = Change(scope_label(one.scope), one.effect, other.effect)
        effects.setdefault((one.claim["id"], one.measure), []).append(change)
    entries, others = (_entries(side.results.values()) for side in (native, plain))
    values: dict[tuple[str, str], list[Change]] = {}
    for key in entries.keys() & others.keys():
        analysis, quantity, of = key
        where = ", ".join(f"{column} {value}" for column, value in of)
        values.setdefault((analysis, quantity), []).append(Change(where, entries[key], others[key]))
    alone = [f"claim {key[0]}, {key[1]}: {scope_label(dict(key[3]))}" for key in ours.keys() ^ theirs.keys()]
    alone += [f"{analysis}, {quantity}: {dict(of)}" for analysis, quantity, of in entries.keys() ^ others.keys()]
    return Comparison(
        moved=[(one, other) for one, other in both if one.verdict != other.verdict],
        alone=sorted(alone),
        effects=effects,
        values={key: values[key] for key in sorted(values)},
    )


def _lines(verdicts: Sequence[Verdict]) -> dict[tuple[str, str, str, tuple[tuple[str, Any], ...]], Verdict]:
    """Name the lines of a ledger by claim, measure, analysis and scope."""
    named = {(one.claim["id"], one.measure, one.figure, tuple(one.scope.items())): one for one in verdicts}
    assert len(named) == len(verdicts), "two lines have one name"
    return named


def _entries(results: Iterable[Result]) -> dict[tuple[str, str, tuple[tuple[str, Any], ...]], Estimate]:
    """Name the values of summaries by analysis, quantity and what they are of; those of nothing are left out."""
    return {
        (result.name, entry.quantity, tuple(entry.of.items())): entry.effect
        for result in results
        for entry in result.summary
        if entry.effect.n
    }


# ---- written


def page(compared: Comparison, told: Mapping[Name, Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """Write the comparison in Markdown."""
    native, plain = told["native"], told["plain"]
    same = [what for what, digest in native["digests"].items() if plain["digests"][what] == digest]
    differ = [what for what in native["digests"] if what not in same]
    n_lines = sum(map(len, compared.effects.values()))
    shares = sorted(
        change.share for changes in compared.effects.values() for change in changes if math.isfinite(change.share)
    )
    set_by = ", ".join(f"`{variable}={value}`" for variable, value in PLAIN.items())
    lines = [
        "# Retest",
        "",
        "Whether verdicts depend on the processor: the quick grid was trained, measured and judged twice, with two",
        "instruction sets. `make retest` does this and writes this page.",
        "",
        "| side | instruction set | set by |",
        "|---|---|---|",
        f"| native | {native['instructions']} | the processor: {native['cpu']} |",
        f"| plain | {plain['instructions']} | {set_by} |",
        "",
        f"Both with torch {native['torch']} and {native['blas']}, {len(seeds)} seeds. Given the same numbers, the two "
        f"compute other bits in {', '.join(differ)}{', and the same in ' if same else ''}{', '.join(same)}.",
        "",
        f"**{len(compared.moved)} of {n_lines} lines of the ledger have another verdict.** An effect changes by "
        f"{_number(_quantile(shares, 0.5))} half-widths of its 95 % interval in the median, by "
        f"{_number(_quantile(shares, 1.0))} at most.",
        "",
        "## Verdicts that move",
        "",
        *([_move(*pair) for pair in compared.moved] or ["None."]),
        "",
        "## What only one side has",
        "",
        *([f"- {what}" for what in compared.alone] or ["Nothing."]),
        "",
        "## Effects, by claim and measure",
        "",
        "The largest change, the line that it is of, and the effect there on either side. The last column is the",
        "largest change of any line as a share of the half-width of its 95 % interval.",
        "",
        *_table(("claim", "measure", "lines"), compared.effects),
        "",
        "## Values of summaries, by analysis and quantity",
        "",
        *_table(("analysis", "quantity", "values"), compared.values),
    ]
    return "\n".join(lines) + "\n"


def _move(native: Verdict, plain: Verdict) -> str:
    sides = [f"{one.verdict} ({one.effect}, null {one.null}, p {_number(one.p)})" for one in (native, plain)]
    named = f"**{native.claim['id']}**, {native.measure}: {scope_label(native.scope)}"
    return f"- {named}{'' if native.role == 'test' else f' ({native.role})'}: {' → '.join(sides)}"


def _table(columns: Sequence[str], changes: Mapping[tuple[str, str], Sequence[Change]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} | largest change | where | native | plain | half-widths |"]
    lines.append("|" + "---|" * (len(columns) + 5))
    for (one, other), of_one in changes.items():
        largest = max(of_one, key=lambda change: change.size)
        share = max((change.share for change in of_one if math.isfinite(change.share)), default=math.nan)
        cells = [one, other, len(of_one), _number(largest.size), largest.where]
        cells += [f"{largest.native.value:.3g}", f"{largest.plain.value:.3g}", _number(share)]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return lines


def _quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile of sorted values; NaN of none."""
    return values[round(share * (len(values) - 1))] if values else math.nan


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.retest", description="Whether verdicts depend on the processor."
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "retest", help="where both sides are kept")
    parser.add_argument("--seeds", type=int, help="default: those of the quick grid")
    given = parser.parse_args()
    told: dict[Name, dict[str, Any]] = {name: look(name) for name in ("plain", "native")}
    print({name: one["instructions"] for name, one in told.items()}, flush=True)
    if told["plain"]["digests"] == told["native"]["digests"]:
        sys.exit("both instruction sets compute the same bits here, so there is nothing to compare")
    for name in told:
        reproduce(name, given.folder / name, given.seeds)
    native, plain = (read(given.folder / name) for name in ("native", "plain"))
    seeds = sorted({seed for result in native.results.values() for seed in result.seeds})
    write_text(PAGE, page(compare(native, plain), told, seeds))


if __name__ == "__main__":
    main()
