"""The command line, `mdm-interp`. A user's mistake ends in one line on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from filelock import FileLock, Timeout
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from mdm_interp.config import TrainConfig, one_line
from mdm_interp.files import UserError
from mdm_interp.runs import DEFAULT_ROOT

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
runs_app = typer.Typer(help="Look into the run store, or clear it.")
app.add_typer(runs_app, name="runs")

Root = Annotated[Path, typer.Option("--runs", help="Folder of the run store.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Quick = Annotated[bool, typer.Option("--quick", help="3 seeds (the default).")]
Full = Annotated[bool, typer.Option("--full", help="10 seeds.")]
Seeds = Annotated[int | None, typer.Option(min=1, help="How many seeds, instead of --quick's or --full's.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Runs trained side by side. Default: one per CPU core.")]
Out = Annotated[Path, typer.Option(help="Where figures go.")]


@app.command()
def reproduce(
    quick: Quick = False,
    full: Full = False,
    only: Annotated[list[str] | None, typer.Option(help="Only this analysis; may be given again.")] = None,
    seeds: Seeds = None,
    device: Device = "auto",
    workers: Workers = None,
    runs: Root = DEFAULT_ROOT,
    out: Out = Path("figures"),
) -> None:
    """Train what is missing, measure, and draw every figure and the index page."""
    from mdm_interp.analysis import discover

    analyses = discover()
    if only:
        names = {analysis.name for analysis in analyses}
        if unknown := sorted(set(only) - names):
            raise UserError(f"--only: no analysis {unknown[0]!r}; there are {', '.join(sorted(names))}")
        analyses = [analysis for analysis in analyses if analysis.name in only]
    _reproduce(analyses, quick, full, seeds, device, workers, runs, out)


def _reproduce(
    analyses: list[Any],
    quick: bool,
    full: bool,
    seeds: int | None,
    device: str,
    workers: int | None,
    runs: Path,
    out: Path,
) -> None:
    import torch

    from mdm_interp.analysis import FULL_SEEDS, QUICK_SEEDS, Lab, discover, ledger
    from mdm_interp.claims import save_ledger
    from mdm_interp.results import Result
    from mdm_interp.training import check_device
    from mdm_interp.viz.report import write_figures, write_index

    if quick and full:
        raise UserError("--quick --full: these exclude each other; give one")
    console = Console(stderr=True)
    lab = Lab(seeds or (FULL_SEEDS if full else QUICK_SEEDS), runs, check_device(device), workers)
    lab.runs([config for analysis in analyses for config in analysis.configs(lab.seeds)])
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
    drawn = []
    for analysis in analyses:
        with console.status(f"measuring {analysis.name}"):
            result = analysis.result(lab, out)
        drawn.append((result, analysis.draw(result)))
    with console.status("writing figures"):
        if problem := write_figures(drawn, out):
            console.print(problem, markup=False, soft_wrap=True)
        installed = {analysis.name: analysis for analysis in discover()}
        shown = {result.name: (result, figure) for result, figure in drawn}
        for name, analysis in installed.items():
            if name not in shown and (out / f"{name}.json").exists():
                result = Result.load(out / f"{name}.json")
                shown[name] = (result, analysis.draw(result))
        order = [*installed, *(name for name in shown if name not in installed)]
        results = {name: result for name, (result, _) in shown.items()}
        if verdicts := ledger(installed.values(), results):
            save_ledger(verdicts, out / "claims.json")
        write_index([shown[name] for name in order if name in shown], verdicts, out)
    console.print(f"{len(drawn)} figures in {out}; open {out / 'index.html'}", markup=False, soft_wrap=True)


def run_one(analysis: Any) -> None:
    """The command line of one analysis: `python -m analyses.NAME`."""

    def command(
        quick: Quick = False,
        full: Full = False,
        seeds: Seeds = None,
        device: Device = "auto",
        workers: Workers = None,
        runs: Root = DEFAULT_ROOT,
        out: Out = Path("figures"),
    ) -> None:
        _reproduce([analysis], quick, full, seeds, device, workers, runs, out)

    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=analysis.question)
    single.command(help=analysis.question)(command)
    _run(single)


@app.command()
def verify(
    out: Out = Path("figures"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
    readme: Annotated[Path | None, typer.Option(help="Also write the table of findings into this file.")] = None,
) -> None:
    """The claims ledger: each claim of the paper, in every setting and at every stage that was measured, with its
    effect, null, interval and computed verdict. Reads what `reproduce` measured."""
    from mdm_interp.analysis import discover, ledger
    from mdm_interp.claims import counts, save_ledger, write_findings
    from mdm_interp.presets import scope_label
    from mdm_interp.results import Result

    judged = [analysis for analysis in discover() if analysis.claims]
    for analysis in judged:
        if not (out / f"{analysis.name}.json").exists():
            raise UserError(
                f"--out: {out} holds no {analysis.name}.json, from which claims are judged; run `mdm-interp reproduce "
                f"--only {analysis.name} --out {out}` first"
            )
    verdicts = ledger(judged, {analysis.name: Result.load(out / f"{analysis.name}.json") for analysis in judged})
    save_ledger(verdicts, out / "claims.json")
    if readme:
        write_findings(verdicts, readme)
    if as_json:
        print((out / "claims.json").read_text(encoding="utf-8"), end="")
        return
    console, table = Console(), Table("claim", "scope", "effect", "null", "p", "verdict", "figure")
    for claim, group in itertools.groupby(verdicts, key=lambda verdict: verdict.claim["id"]):
        lines = list(group)
        for measure, of_measure in itertools.groupby(lines, key=lambda verdict: verdict.measure):
            rows = list(of_measure)
            table.add_section()
            table.add_row(claim, f"{rows[0].claim['sentence']}\n{measure}; {rows[0].rule}", "", rows[0].null_is)
            for row in rows:
                scope, effect, null = scope_label(row.scope), str(row.effect), str(row.null)
                table.add_row("", scope, effect, null, f"{row.p:.2g}", row.verdict, row.figure)
    console.print(table)
    console.print(counts(verdicts).to_string())


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of a training config.")],
    device: Device = "auto",
    runs: Root = DEFAULT_ROOT,
) -> None:
    """Train the run that CONFIG describes, resume it, or find it finished. Prints its folder."""
    from mdm_interp.training import train as train_run

    print(train_run(TrainConfig.from_yaml(config), root=runs, device=device).folder)


@runs_app.command("list")
def list_runs(
    runs: Root = DEFAULT_ROOT, as_json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False
) -> None:
    """Every stored run: world, position scheme, objective, seed, steps done."""
    from mdm_interp.runs import stored_runs

    rows = [
        {
            "run": run.folder.name,
            "world": run.config.facts.world,
            "position": run.config.model.position,
            "objective": run.config.objective,
            "seed": run.config.seed,
            "step": run.step,
            "steps": run.config.steps,
        }
        for run in stored_runs(runs)
    ]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table()
    for name in rows[0] if rows else ("run",):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


@runs_app.command("show")
def show_run(
    run: Annotated[str, typer.Argument(help="A run's name, or its beginning.")], runs: Root = DEFAULT_ROOT
) -> None:
    """One run's config and metrics."""
    import pandas as pd

    from mdm_interp.runs import stored_runs

    matching = [stored for stored in stored_runs(runs) if stored.folder.name.startswith(run)]
    if len(matching) != 1:
        raise UserError(f"run: {run!r} names {len(matching)} runs of {runs}; `mdm-interp runs list` shows their names")
    print((matching[0].folder / "config.yaml").read_text())
    print(pd.DataFrame(matching[0].metrics()).to_string(index=False))


@runs_app.command("prune")
def prune_runs(runs: Root = DEFAULT_ROOT) -> None:
    """Delete the runs that were not finished, unless they are being trained."""
    from mdm_interp.runs import stored_runs

    deleted = 0
    for run in stored_runs(runs):
        if not run.finished:
            with contextlib.suppress(Timeout), FileLock(run.folder / ".lock", timeout=0):  # one in training is kept
                run.delete()
                deleted += 1
    print(f"deleted {deleted} unfinished runs")


def _run(command: typer.Typer) -> None:
    """Run a command line, and end it on a mistake as this module promises."""
    try:
        code = command(standalone_mode=False)
    except (UserError, ValidationError) as error:
        _fail(one_line(error) if isinstance(error, ValidationError) else str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        # Typer's own complaints about the command line; their class has moved between its versions.
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{error.format_message().rstrip('.')}; try --help", 2)  # pyright: ignore[reportAttributeAccessIssue]
    if code == 130:  # Typer's own answer to Ctrl-C
        _fail("interrupted; the same command goes on from here", 130)
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    print(f"mdm-interp: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """The console script."""
    _run(app)
