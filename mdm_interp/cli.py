"""The command line, `mdm-interp`. A user's mistake ends in one line on stderr and exit code 2; training that diverges,
a store of which something cannot be read and a full disk in 1; Ctrl-C in 130; a closed pipe without a word.

A command imports what it needs when it runs: `--help` waits for nothing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import inspect
import io
import itertools
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_type_hints

import typer

from mdm_interp.errors import INTERRUPTED, UserError, nearest, require_one_of, shorten
from mdm_interp.files import DEFAULT_ROOT, check_file, check_folder

T = TypeVar("T")
PLAIN: Any = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}
"""Options of a command line whose help is there at once."""
app = typer.Typer(**PLAIN, help="Train, measure and look into masked diffusion language models.")
runs_app = typer.Typer(rich_markup_mode=None, help="Look into the run store, or clear it.")
app.add_typer(runs_app, name="runs")


def _show_version(asked: bool) -> bool:
    if asked:
        from mdm_interp.version import __version__

        print(f"mdm-interp {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


Root = Annotated[Path, typer.Option("--runs", help="Folder of the run store.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Quick = Annotated[bool, typer.Option("--quick", help="3 seeds (the default).")]
Full = Annotated[bool, typer.Option("--full", help="10 seeds.")]
Seeds = Annotated[int | None, typer.Option(min=1, max=1000, help="How many seeds, instead of --quick's or --full's.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that train and measure side by side. Default: one per CPU core, few on a GPU."),
]
Executor = Annotated[str, typer.Option(help="local: processes on this machine; dask: the workers of a Dask scheduler.")]
Address = Annotated[str | None, typer.Option(help="The Dask scheduler's, as in tcp://host:8786.")]
Only = Annotated[list[str] | None, typer.Option(help="Only this analysis; may be given again.")]
FIGURES = Path("figures")
Out = Annotated[Path, typer.Option(help="Where results and figures are.")]
OutOfReproduce = Annotated[
    Path | None, typer.Option("--out", help="Where figures go. Default: figures with --full, otherwise figures/quick.")
]


def _loading(
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, … Default: as stored.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    attention: Annotated[
        str | None,
        typer.Option(help="bidirectional, block_causal or causal, where the files do not say it."),
    ] = None,
    readout_shift: Annotated[
        int | None,
        typer.Option(help="Of a converted model: 0 if a mask's token is predicted there, -1 if before."),
    ] = None,
    mask_token_id: Annotated[
        int | None, typer.Option(min=0, help="Of a converted model. Default: as its files say.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Of block-causal attention. Default: as its files say.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file, for a checkpoint without a config.json: what that would say.")
    ] = None,
) -> None:
    """What `load_checkpoint` is told that no file says."""


def with_loading(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :func:`_loading`, which it takes as one dict, `loading`."""
    options = inspect.signature(_loading).parameters

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        command(loading={name: given.pop(name) for name in options}, **given)

    del with_options.__wrapped__  # whoever asks for a signature is to see this one's
    hints = get_type_hints(_loading, include_extras=True) | get_type_hints(command, include_extras=True)
    taken = {**inspect.signature(command).parameters, **options}
    del taken["loading"]
    parameters = [parameter.replace(annotation=hints[name]) for name, parameter in taken.items()]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


@app.command()
def reproduce(
    quick: Quick = False,
    full: Full = False,
    only: Only = None,
    seeds: Seeds = None,
    device: Device = "auto",
    workers: Workers = None,
    executor: Executor = "local",
    address: Address = None,
    runs: Root = DEFAULT_ROOT,
    out: OutOfReproduce = None,
) -> None:
    """Train what is missing, measure, and draw every figure and the index page."""
    with _sign_of_life():
        from mdm_interp.experiments.analysis import discover

    place = _place(executor, address, workers)
    _reproduce(_chosen(discover(), only), quick, full, seeds, device, place, runs, out)


@contextlib.contextmanager
def _sign_of_life() -> Iterator[None]:
    """Say on stderr, while a long command imports what it needs, that it has begun."""
    if "torch" in sys.modules:
        yield
        return
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_interactive:
        with console.status("loading"):
            yield
    else:
        console.print("loading", highlight=False)
        yield


def _place(executor: str, address: str | None, workers: int | None) -> int | str | None:
    """Return where tasks run, as `mdm_interp.parallel.Workers`."""
    require_one_of("--executor", executor, ("local", "dask"))
    if executor == "local":
        if address is not None:
            raise UserError(f"--address: {address!r} is a Dask scheduler's; add --executor dask, or leave it out")
        return workers
    if address is None:
        raise UserError("--executor: dask needs a scheduler; give its --address, as in tcp://host:8786")
    if workers is not None:
        raise UserError(f"--workers: {workers} is for --executor local; leave it out, and start so many Dask workers")
    return address


def _chosen(analyses: list[Any], only: list[str] | None) -> list[Any]:
    """Return those named by `--only`."""
    names = {analysis.name for analysis in analyses}
    if unknown := sorted(set(only or ()) - names):
        raise UserError(f"--only: no analysis {unknown[0]!r}; there are {nearest(unknown[0], names)}")
    return [analysis for analysis in analyses if not only or analysis.name in only]


def _reproduce(
    analyses: list[Any],
    quick: bool,
    full: bool,
    seeds: int | None,
    device: str,
    workers: int | str | None,
    runs: Path,
    out: Path | None,
) -> None:
    from mdm_interp.experiments import runner
    from mdm_interp.experiments.grids import FULL_SEEDS, QUICK_SEEDS
    from mdm_interp.experiments.subjects import Lab
    from mdm_interp.parallel import find_place

    if quick and full:
        raise UserError("--quick --full: these exclude each other; give one")
    lab = Lab(seeds or (FULL_SEEDS if full else QUICK_SEEDS), runs, find_place(workers, device)[1], workers)
    out = out or (FIGURES if full else FIGURES / "quick")
    _say(runner.reproduce(analyses, lab, out), out)


def _say(reported: Any, out: Path) -> None:
    _tell(reported.problem, _drawn(len(reported.figures), out))


def _drawn(n: int, out: Path) -> str:
    from mdm_interp.viz.words import counted

    return f"{counted(n, 'figure')} in {out}; open {out / 'index.html'}"


def _tell(*lines: str | None) -> None:
    """Write lines to stderr, those that there are."""
    from rich.console import Console

    console = Console(stderr=True)
    for line in filter(None, lines):
        console.print(line, markup=False, soft_wrap=True)


def run_one(analysis: Any) -> None:
    """Run the command line of one analysis: `python -m analyses.NAME`."""

    def command(
        quick: Quick = False,
        full: Full = False,
        seeds: Seeds = None,
        device: Device = "auto",
        workers: Workers = None,
        runs: Root = DEFAULT_ROOT,
        out: OutOfReproduce = None,
    ) -> None:
        _reproduce([analysis], quick, full, seeds, device, workers, runs, out)

    single = typer.Typer(**PLAIN, help=analysis.question)
    single.command(help=analysis.question)(command)
    _run(single)


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(metavar="SWEEP", help="YAML file of a sweep.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the table goes. Default: sweeps/ and the file's name.")
    ] = None,
    device: Device = "auto",
    workers: Workers = None,
    executor: Executor = "local",
    address: Address = None,
    runs: Root = DEFAULT_ROOT,
) -> None:
    """Train and measure the runs of SWEEP, or what is missing of them. Prints the file of the table, which can be read
    meanwhile. Exit code 1 says that runs failed, each with its reason on stderr."""
    with _sign_of_life():
        from mdm_interp.experiments.sweep import Sweep, run_sweep

    place, out = _place(executor, address, workers), out or Path("sweeps") / config.stem
    outcomes = run_sweep(Sweep.from_yaml(config), out, root=runs, device=device, workers=place)
    print(out / "sweep.parquet")
    if failed := sum(bool(outcome.reason) for outcome in outcomes):
        print(f"{failed} of {len(outcomes)} runs failed; the same command tries them again", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def report(out: Out = FIGURES) -> None:
    """Draw every figure and the index page again, from the results that `reproduce` measured."""
    from rich.console import Console

    from mdm_interp.experiments import runner

    with Console(stderr=True).status("drawing"):
        reported = runner.report(out)
    _say(reported, out)


@app.command()
def verify(
    out: Out = FIGURES,
    claim: Annotated[list[str] | None, typer.Option(help="Lines of this claim, as in 6; may be given again.")] = None,
    scheme: Annotated[list[str] | None, typer.Option(help="Lines of this position scheme; may be given again.")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Lines of this stage of training, such as end.")] = None,
    verdict: Annotated[list[str] | None, typer.Option(help="Lines with this verdict, such as fails.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One table.")] = False,
    readme: Annotated[
        Path | None, typer.Option(help="Also write what was found between the marks of this file.")
    ] = None,
) -> None:
    """Show on one screen what becomes of the paper's claims, or those lines of the claims ledger that are asked for:
    each claim, in every setting and at every stage that was measured, with its effect, null, interval and computed
    verdict. Reads what `reproduce` measured."""
    from mdm_interp.experiments import findings
    from mdm_interp.experiments.analysis import discover, ledger
    from mdm_interp.experiments.claims import as_json as written
    from mdm_interp.experiments.claims import save_ledger
    from mdm_interp.experiments.verify import listing, select, summary, table

    if as_json and as_csv:
        raise UserError("--json --csv: these exclude each other; give one")
    judged = [analysis for analysis in discover() if analysis.claims]
    for analysis in judged:
        if not (out / f"{analysis.name}.json").exists():
            raise UserError(
                f"--out: {out} holds no {analysis.name}.json, from which claims are judged; run `mdm-interp reproduce "
                f"--only {analysis.name} --out {out}` first"
            )
    told = {name for name, _ in findings.SENTENCES}
    needed = {a.name: (a, out / f"{a.name}.json") for a in discover() if a.claims or a.name in told}
    results = {name: a.load(path) for name, (a, path) in needed.items() if path.exists()}
    verdicts = ledger(judged, results)
    asked = {"claim": claim, "scheme": scheme, "stage": stage, "verdict": verdict}
    chosen = select(verdicts, **asked)
    if readme:
        findings.write(verdicts, results, readme)
    unwritten = None
    try:
        save_ledger(verdicts, out / "claims.json")
    except OSError as error:  # who may only read gets the answer, and then this
        unwritten = error
    if as_json:
        print(written(chosen), end="")
    elif as_csv:
        print(table(chosen).to_csv(index=False, lineterminator="\n"), end="")
    elif any(asked.values()):
        print(listing(chosen))
    else:
        print(summary(verdicts, findings.sentences(results)))
    if unwritten is not None:
        raise unwritten


@app.command()
@with_loading
def probe(
    loading: dict[str, Any],
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hugging Face hub id.")],
    facts: Annotated[Path, typer.Option(help="CSV of facts; its templates may lie beside it as NAME.templates.yaml.")],
    out: Annotated[Path, typer.Option(help="Where results and figures go.", callback=check_folder)],
    twin: Annotated[str | None, typer.Option(help="A second checkpoint to put beside it, for instance an ARM.")] = None,
    templates: Annotated[Path | None, typer.Option(help="YAML file of the sentences that state the facts.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="State facts in the checkpoint's chat template.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many facts.")] = None,
    only: Only = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="Divide the facts among so many workers, each with the model.")
    ] = None,
    executor: Executor = "local",
    address: Address = None,
    device: Device = "auto",
    device_map: Annotated[str | None, typer.Option(help="`auto` spreads a model over several GPUs.")] = None,
) -> None:
    """Ask a checkpoint facts, forward and in reverse: routes, evidence, gradients and predictions, layer by layer.
    Unless --only is given, also write a page on which to look at every head."""
    with _sign_of_life():
        from mdm_interp.experiments.analysis import CheckpointAnalysis, discover
        from mdm_interp.experiments.exhibits import write_probed
        from mdm_interp.experiments.report import write_report, write_summaries
        from mdm_interp.experiments.subjects import open_probe, shared_probe
        from mdm_interp.parallel import progress_bars
        from mdm_interp.viz.words import counted

    place = _place(executor, address, None)
    if shards is None and place is not None:
        raise UserError(f"--executor: {executor} has nothing to do without --shards; say among how many workers")
    if shards is not None and device_map:
        raise UserError("--shards: each worker has the whole model on a device of its own; leave --device-map out")
    analyses = _chosen([a for a in discover() if isinstance(a, CheckpointAnalysis)], only)
    if not twin and (of_two := [analysis.name for analysis in analyses if analysis.needs_twin]):
        if only:
            raise UserError(f"--only: {of_two[0]!r} compares two checkpoints; give the second with --twin")
        analyses = [analysis for analysis in analyses if not analysis.needs_twin]
    here = "cpu" if shards else device  # with shards, models that are asked are the workers'
    where = _where(here, device_map)
    opened = open_probe(checkpoint, facts, templates=templates, limit=limit, twin=twin, chat=chat, **where, **loading)
    drawn, sharing, pages, refused = [], contextlib.nullcontext(), dict[str, str](), None
    if shards:
        sharing = shared_probe(opened, checkpoint, twin, shards, place, device=device, **loading)
    with sharing, progress_bars() as bars:
        bar = bars.add_task("probing", total=len(analyses) + (not only), values="")
        for analysis in analyses:
            bars.update(bar, values=analysis.name)
            result = analysis.probe(opened, out)
            drawn.append((result, analysis.figure(result)))
            bars.advance(bar)
        if not only:
            bars.update(bar, values="explorer")
            try:
                pages = write_probed(opened, out, LookedAt, checkpoint, twin, **loading)
            except UserError as error:
                refused = f"no explorer: {error}"
            bars.advance(bar)
    write_summaries([result for result, _ in drawn], out / "summary.csv")
    problem = write_report(drawn, out, pages=pages)
    asked = opened.origin()
    counts = [f"{kind}: {counted(n, 'pair')} asked, {asked.skipped[kind]} skipped" for kind, n in asked.pairs.items()]
    _tell(problem, refused, *counts, _drawn(len(drawn), out))


def _where(device: str, device_map: str | None) -> dict[str, Any]:
    """Return where `load_checkpoint` puts a model."""
    from mdm_interp.devices import check_device

    if device_map is None:
        return {"device": check_device(device)}
    if device != "auto":
        raise UserError("--device --device-map: these exclude each other; give one")
    return {"device_map": device_map}


@app.command()
@with_loading
def influence(
    loading: dict[str, Any],
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="CHECKPOINT…", help="Folder or Hugging Face hub id; of a training several, in order."),
    ],
    train: Annotated[Path, typer.Option(help="Text file of training sentences, one on each line.")],
    facts: Annotated[Path, typer.Option(help="CSV of facts; its templates may lie beside it as NAME.templates.yaml.")],
    out: Annotated[
        Path, typer.Option(help="Where influence.json, influence.csv and influence.html go.", callback=check_folder)
    ],
    rates: Annotated[
        str | None, typer.Option(help="The learning rate at each checkpoint, as in 0.01,0.003; with several, needed.")
    ] = None,
    kind: Annotated[str, typer.Option(help="Of reverse queries: positional or relational.")] = "positional",
    top: Annotated[int, typer.Option(min=1, help="How many sentences of either sign to report of a query.")] = 5,
    draws: Annotated[
        int, typer.Option(min=1, max=10_000, help="How many masked copies of each sentence to take.")
    ] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Draws the masks.")] = 0,
    templates: Annotated[Path | None, typer.Option(help="YAML file of the sentences that state the facts.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many facts.")] = None,
    device: Device = "auto",
) -> None:
    """Find the training sentences that help or hurt a checkpoint's answers most, forward and in reverse; of several
    checkpoints of a training, summed over them, each times its learning rate (TracIn)."""
    with _sign_of_life():
        from mdm_interp.checkpoints import load_checkpoint
        from mdm_interp.devices import check_device
        from mdm_interp.experiments.influence import write_influence
        from mdm_interp.experiments.subjects import open_probe

    asked, where = _kind(kind), {"device": check_device(device)}
    *others, last = zip(checkpoints, _rates(rates, checkpoints), strict=True)
    opened = open_probe(last[0], facts, templates=templates, limit=limit, **where, **loading)
    earlier = [(name, rate, functools.partial(load_checkpoint, name, **where, **loading)) for name, rate in others]
    given = {"kind": asked, "top": top, "n_draws": draws, "seed": seed, "rate": last[1], "earlier": earlier}
    print(write_influence(opened, train, out, **given))


def _rates(text: str | None, checkpoints: list[str]) -> list[float]:
    """Read a learning rate for each checkpoint; 1 for a single one without."""
    if text is None and len(checkpoints) == 1:
        return [1.0]
    try:
        rates = [float(rate) for rate in (text or "").split(",")]
    except ValueError:
        rates = []
    if len(rates) != len(checkpoints) or not all(0 < rate < math.inf for rate in rates):
        raise UserError(
            f"--rates: {text} is not a positive number for each of the {len(checkpoints)} checkpoints; write them as "
            "0.01,0.003"
        )
    return rates


@app.command("reversal-benchmark")
@with_loading
def reversal_benchmark(
    loading: dict[str, Any],
    data: Annotated[Path, typer.Option(help="Folder of the published files, all_prompts_train.jsonl and four tests.")],
    out: Annotated[
        Path, typer.Option(help="Where results, the figure and trained checkpoints go.", callback=check_folder)
    ],
    checkpoint: Annotated[str | None, typer.Argument(help="Folder or hub id; none with --train.")] = None,
    twin: Annotated[str | None, typer.Option(help="A second checkpoint to put beside it, for instance an ARM.")] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Train a small MDM and its causal twin on the sentences, and score both.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Of training. Default: 20000.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of training. Default: 0.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many people of each test.")] = None,
    others: Annotated[
        int, typer.Option(min=1, help="With how many other people's completions each likelihood is compared.")
    ] = 9,
    device: Device = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="How many train side by side. Default: 2.")] = None,
    device_map: Annotated[str | None, typer.Option(help="`auto` spreads a model over several GPUs.")] = None,
) -> None:
    """Score a checkpoint on the reversal curse's benchmark of fictitious celebrities, in both directions, by what it
    writes and by likelihood. With --train, train a pair from scratch first, or go on with it."""
    with _sign_of_life():
        from mdm_interp.checkpoints import load_checkpoint
        from mdm_interp.data.celebrities import Benchmark
        from mdm_interp.devices import check_device
        from mdm_interp.experiments.report import write_report, write_summaries
        from mdm_interp.experiments.reversal_benchmark import draw_figure, score, train_pair, write_facts

    if (checkpoint is None) != train or (train and twin):
        raise UserError("CHECKPOINT: give a checkpoint to score, or --train for a pair that is trained here, not both")
    dtype = loading.pop("dtype")
    if train:
        _only_for_checkpoints(loading, "with --train the pair is made here")
    for option, value in {"steps": steps, "seed": seed, "workers": workers}.items():
        if value is not None and not train:
            raise UserError(f"--{option}: {value} is for --train; add it, or leave this out")
    where = _where(device, device_map) | {"dtype": dtype}
    benchmark = Benchmark.load(data)
    if checkpoint is None:
        changed = {"seed": seed or 0} | ({"steps": steps} if steps else {})
        pair = train_pair(benchmark, out, config=changed, device=check_device(device), workers=workers or 2)
        models = {name: load_checkpoint(folder, **where) for name, folder in pair.items()}
    else:
        models = {Path(checkpoint).absolute().name: load_checkpoint(checkpoint, **where, **loading)}
        if twin:
            models[f"{Path(twin).absolute().name} (twin)"] = load_checkpoint(twin, **where)
    result = score(models, benchmark if limit is None else benchmark.of_people(limit), out, n_others=others)
    write_summaries([result], out / f"{result.name}.csv")
    problem = write_report([(result, draw_figure(result))], out)
    for path in write_facts(benchmark, out):
        print(path)
    _tell(problem, f"{result.name}.json and its figure in {out}; open {out / 'index.html'}")


Looked = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_CHECKPOINT",
        help="A run's name or folder, the YAML file of one to train first, or a checkpoint's folder or hub id.",
    ),
]
Prompt = Annotated[str, typer.Argument(help="[M] is a mask token; a run's tokens have spaces between: 'A3 r0 [M]'.")]
PageFile = Annotated[Path, typer.Option("--out", help="The page, one HTML file.", callback=check_file)]
SourceWords = Annotated[str | None, typer.Option("--source", help="Words of the text to mark as the source.")]
Layers = Annotated[str | None, typer.Option("--layers", help="Which layers, as in 0,1,5. Default: all.")]
Heads = Annotated[str | None, typer.Option("--heads", help="Which heads. Default: all.")]
FactsFile = Annotated[
    Path | None,
    typer.Option(
        "--facts", help="CSV of facts to ask a checkpoint; its templates may lie beside it as NAME.templates.yaml."
    ),
]
KindOfReverse = Annotated[
    str | None,
    typer.Option("--kind", help="Of a checkpoint's reverse queries: positional (the default) or relational."),
]
LookedAt = 8
"""How many pairs of a checkpoint's facts a page shows unless told otherwise."""


@app.command()
@with_loading
def attention(
    loading: dict[str, Any],
    subject: Looked,
    text: Prompt,
    out: PageFile,
    source: SourceWords = None,
    layers: Layers = None,
    heads: Heads = None,
    rows: Annotated[str | None, typer.Option(help="From which positions. Default: all that fit.")] = None,
    device: Device = "auto",
    runs: Root = DEFAULT_ROOT,
) -> None:
    """Write a page that shows the attention patterns of every layer and head over TEXT."""
    from mdm_interp import viz

    chosen: dict[str, Any] = {"layers": _numbers("--layers", layers), "heads": _numbers("--heads", heads)}
    (opened,) = _opened([subject], runs, device, loading)
    print(viz.attention(opened, text, **chosen, rows=_numbers("--rows", rows), source=source).save(out))


@app.command()
@with_loading
def denoise(
    loading: dict[str, Any],
    subject: Looked,
    text: Prompt,
    out: PageFile,
    order: Annotated[
        Literal["confidence", "left_to_right", "random"], typer.Option(help="Which masks come first.")
    ] = "confidence",
    steps: Annotated[int | None, typer.Option(min=1, help="Default: one for each mask.")] = None,
    source: SourceWords = None,
    layers: Layers = None,
    heads: Heads = None,
    device: Device = "auto",
    runs: Root = DEFAULT_ROOT,
) -> None:
    """Write a page that shows how the masks of TEXT are filled, step by step, and what each was read from."""
    from mdm_interp import viz

    chosen: dict[str, Any] = {"layers": _numbers("--layers", layers), "heads": _numbers("--heads", heads)}
    (opened,) = _opened([subject], runs, device, loading)
    print(viz.trajectory(opened, text, order=order, steps=steps, **chosen, source=source).save(out))


@app.command()
@with_loading
def routes(
    loading: dict[str, Any],
    subject: Looked,
    out: PageFile,
    pair: Annotated[int, typer.Option(min=0, help="Which of the run's or the facts' query pairs, from 0.")] = 0,
    facts: FactsFile = None,
    kind: KindOfReverse = None,
    layers: Layers = None,
    heads: Heads = None,
    device: Device = "auto",
    runs: Root = DEFAULT_ROOT,
) -> None:
    """Write a page that shows a forward and its reverse query side by side: routes, evidence and parity of every head,
    and of a run all along its training."""
    from mdm_interp import viz

    (opened,) = _opened([subject], runs, device, loading)
    pairs = _pairs(opened, facts, kind)
    if pair >= len(pairs):
        raise UserError(f"--pair: {pair} is not there; give 0 to {len(pairs) - 1}")
    chosen: dict[str, Any] = {"layers": _numbers("--layers", layers), "heads": _numbers("--heads", heads)}
    print(viz.routes(opened, pairs[pair], **chosen).save(out))


@app.command()
@with_loading
def explore(
    loading: dict[str, Any],
    subject: Looked,
    out: PageFile,
    compare: Annotated[
        str | None, typer.Option("--with", help="A second run or checkpoint, asked the same, to lay beside the first.")
    ] = None,
    facts: FactsFile = None,
    kind: KindOfReverse = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many query pairs. Default: 24 of a run, 8 of facts.")
    ] = None,
    device: Device = "auto",
    runs: Root = DEFAULT_ROOT,
) -> None:
    """Write a page with a map of all layers and heads by route, odd share, evidence, attribution, sinks or alignment,
    and of the head chosen there all that there is to see; of a run all along its training."""
    from mdm_interp import viz
    from mdm_interp.parallel import progress_bars
    from mdm_interp.viz.pages.explorer import MAX_PAIRS
    from mdm_interp.viz.pages.subject import Subject

    names = [subject] if compare is None else list(dict.fromkeys((subject, compare)))
    opened = dict(zip(names, _opened(names, runs, device, loading), strict=True))
    pairs = _pairs(opened[subject], facts, kind)[: limit or (MAX_PAIRS if facts is None else LookedAt)]
    called = [Subject.of(one).name for one in opened.values()]
    named = dict(zip(called if len({*called}) == len(called) else names, opened.values(), strict=True))
    with progress_bars() as bars:
        bar = bars.add_task("measuring", total=None, values="")
        page = viz.explore(named, pairs, report=lambda done, total: bars.update(bar, completed=done, total=total))
    print(page.save(out))


def _pairs(opened: Any, facts: Path | None, kind: str | None) -> list[Any]:
    """Return the query pairs of a run, each in one context, or of facts that a checkpoint is asked."""
    from mdm_interp.data.prompts import load_facts
    from mdm_interp.experiments.subjects import Probe
    from mdm_interp.training.runs import Run

    if isinstance(opened, Run):
        _only_for_checkpoints({"facts": facts, "kind": kind}, "a run is asked about its own world")
        return opened.query_pairs(n_contexts=1)
    if facts is None:
        raise UserError("--facts: a checkpoint does not say what to ask it; give a CSV of facts")
    return Probe.of("checkpoint", opened.model, load_facts(facts)).pairs(_kind(kind or "positional"))


def _kind(kind: str) -> Any:
    """Return which kind of reverse query is asked for."""
    from mdm_interp.experiments.subjects import KINDS

    require_one_of("--kind", kind, KINDS)
    return kind


def _numbers(option: str, text: str | None) -> list[int] | None:
    """Read numbers with commas between them."""
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"{option}: {text!r} is no list of numbers; write it as 0,1,5") from None


def _opened(subjects: list[str], runs: Path, device: str, loading: dict[str, Any]) -> list[Any]:
    """Open runs, train what a file describes, or load checkpoints as `load_checkpoint` does.

    Raises:
        UserError: one cannot be opened, or an option is given that none of them has a use for.
    """
    import torch

    from mdm_interp.checkpoints import load_checkpoint
    from mdm_interp.config import TrainConfig
    from mdm_interp.devices import check_device
    from mdm_interp.training.loop import train
    from mdm_interp.training.runs import Run
    from mdm_interp.viz.pages.subject import Subject

    def described(subject: str) -> Run:
        return train(TrainConfig.from_yaml(subject), root=runs, device=check_device(device))

    def stored(subject: str) -> Run:
        return Run.open(subject, runs)

    def checkpoint(subject: str) -> Any:
        model = load_checkpoint(subject, device=device, **loading)
        return Subject.of_checkpoint(model, subject, **loading)

    def way(subject: str) -> Callable[[str], Any]:
        if Path(subject).suffix in (".yaml", ".yml"):
            return described
        if (Path(subject) / "checkpoints").is_dir():
            return Run.at
        is_stored = not Path(subject).exists() and any(runs.glob(f"{glob.escape(subject)}*/config.yaml"))
        return stored if is_stored else checkpoint

    ways = [way(subject) for subject in subjects]
    if checkpoint not in ways:
        torch.set_num_threads(1)  # runs' models are tiny: more threads only wait for each other
        _only_for_checkpoints(loading, "a run's model is as its config says")
        if described not in ways and device not in ("auto", "cpu"):
            _only_for_checkpoints({"device": device}, "pages of a run are made on the CPU")
    return [open_it(subject) for open_it, subject in zip(ways, subjects, strict=True)]


def _only_for_checkpoints(options: dict[str, Any], why: str) -> None:
    """Refuse options that were given: they would be passed over."""
    for name, value in options.items():
        if value is not None:
            raise UserError(f"--{name.replace('_', '-')}: {value} is for checkpoints; {why}, leave it out")


@app.command("demo-checkpoint")
def demo_checkpoint(
    out: Annotated[Path, typer.Option(help="The checkpoint's folder.", callback=check_folder)],
    format: Annotated[str, typer.Option(help="llada, dream, or qwen2 (their causal twin).")] = "llada",
    world: Annotated[
        str, typer.Option(help="memorised: few facts, often; varied: many, most of them stated both ways.")
    ] = "memorised",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = "auto",
) -> None:
    """Train a small checkpoint in a released format on sentences about invented people, with facts to probe it with."""
    with _sign_of_life():
        from mdm_interp.config import DemoConfig
        from mdm_interp.experiments.subjects import DEMOS
        from mdm_interp.training.demo import train_demo

    require_one_of("--world", world, DEMOS)
    made = next(made for name, made in DEMOS.items() if name == world)
    content = {**made.model_dump(), "format": format, "seed": seed}
    print(train_demo(out, DemoConfig.model_validate(content), device=device))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of a training config.")],
    device: Device = "auto",
    runs: Root = DEFAULT_ROOT,
) -> None:
    """Train the run that CONFIG describes, resume it, or find it finished. Prints its folder."""
    with _sign_of_life():
        from mdm_interp.config import TrainConfig
        from mdm_interp.devices import check_device
        from mdm_interp.training.loop import train as train_run

    print(train_run(TrainConfig.from_yaml(config), root=runs, device=check_device(device)).folder)


@runs_app.command("list")
def list_runs(
    runs: Root = DEFAULT_ROOT, as_json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False
) -> None:
    """List every stored run: world, position scheme, objective, layers, heads, whether it has an MLP, seed, steps, and
    by which fields of its config it differs from runs that are alike in these. Exit code 1 says that some cannot be
    read, each named on stderr."""
    import pandas as pd

    from mdm_interp.training.runs import Run, holds_nothing, run_folders

    def described(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
        if holds_nothing(folder):
            return None
        run = Run.at(folder)
        run.check_state()
        row = {
            "run": run.folder.name,
            "world": run.config.facts.world,
            "position": run.config.model.position,
            "objective": run.config.objective,
            "layers": run.config.model.n_layers,
            "heads": run.config.model.n_heads,
            "mlp": not run.config.model.attn_only,
            "seed": run.config.seed,
            "step": run.step,
            "steps": run.config.steps,
        }
        return row, run.config.model_dump(mode="json")

    _require_store(runs)
    with _each() as look:
        found = look(described, run_folders(runs))
        rows, configs = [[one[part] for one in found if one] for part in (0, 1)]
        for row, differs in zip(rows, _differences(rows, configs), strict=True):
            row["differs"] = differs
        if as_json:
            print(json.dumps(rows))
            return
        table = pd.DataFrame(rows).convert_dtypes()  # steps stay whole where a run has none
        print(table.to_string(index=False, na_rep="none") if rows else f"no runs in {runs}")


def _differences(rows: list[dict[str, Any]], configs: list[dict[str, Any]]) -> list[str]:
    """Say of each run by which fields it differs from those that its row does not tell it from, if its values are not
    the usual ones. What follows from other fields, as a model's vocabulary from its world, is not said."""
    alike = [json.dumps({**row, "run": None, "step": None}) for row in rows]
    said: list[list[str]] = [[] for _ in rows]
    nested = ("facts", "model")
    top = [{name: value for name, value in config.items() if name not in nested} for config in configs]
    facts, model = ([config[section] for config in configs] for section in nested)
    for prefix, parts in (("facts.", facts), ("", top), ("model.", model)):
        for name in dict.fromkeys(itertools.chain(*parts)):
            values = [json.dumps(part.get(name)) for part in parts]  # some are left out where they do nothing
            apart = [f"{key} {value}" for key, value in zip(alike, values, strict=True)]
            if len(set(apart)) == len(set(alike)):
                continue
            usual = Counter(values).most_common(1)[0][0]
            split = {key for key, n in Counter(key for key, _ in set(zip(alike, values, strict=True))).items() if n > 1}
            for at, value in enumerate(values):
                if value != usual and alike[at] in split:
                    said[at].append(f"{prefix}{name}={value}")
            alike = apart
    return [", ".join(of_run) for of_run in said]


@contextlib.contextmanager
def _each() -> Iterator[Callable[[Callable[[Path], T], list[Path]], list[T]]]:
    """Give a function that looks into each of several folders. Those that cannot be read are named on stderr.

    Raises:
        Exit: when this ends, with 1, if there were such.
    """
    broken = False

    def look(at: Callable[[Path], T], folders: list[Path]) -> list[T]:
        nonlocal broken
        found = list[T]()
        for folder in folders:
            try:
                found.append(at(folder))
            except (UserError, OSError) as error:
                broken = True
                message = _fault(error)[0] if isinstance(error, OSError) and error.filename else str(error)
                print(_line(message), file=sys.stderr)
        return found

    yield look
    if broken:
        raise typer.Exit(1)


def _require_store(runs: Path) -> None:
    if not runs.is_dir():
        raise UserError(f"--runs: there is no folder {runs}; give the run store's, or train a run first")


@runs_app.command("show")
def show_run(
    run: Annotated[str, typer.Argument(help="A run's name, or its beginning.")], runs: Root = DEFAULT_ROOT
) -> None:
    """Show one run's config and metrics, and in what the code and versions that trained it differ from those here."""
    import pandas as pd

    from mdm_interp.provenance import difference, environment, made_with, versions
    from mdm_interp.training.loop import train
    from mdm_interp.training.runs import Run

    stored = Run.open(run, runs)
    print((stored.folder / "config.yaml").read_text())
    if others := difference(made_with(stored.folder), environment(train) | versions(train)):
        print(f"trained by other code or versions: {others}\n")
    print(pd.DataFrame(stored.metrics()).to_string(index=False))


@runs_app.command("prune")
def prune_runs(runs: Root = DEFAULT_ROOT) -> None:
    """Delete the runs and demo checkpoints that were not finished, unless they are being trained, and what killed
    commands left half written. Exit code 1 says that some folders were kept that cannot be read, or may hold what is
    worth keeping, each named on stderr."""
    from mdm_interp.training.prune import prune_demo, prune_run
    from mdm_interp.training.runs import folders, run_folders
    from mdm_interp.viz.words import counted

    _require_store(runs)
    with _each() as look:
        deleted = look(prune_run, run_folders(runs))
        for demos in look(folders, [runs / "demos"]):
            deleted += look(prune_demo, demos)
        print(f"deleted {counted(sum(deleted), 'unfinished run')}")


def _run(command: typer.Typer) -> None:
    """Run a command line, and end it as this module promises."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a locale lacks is no reason to fail
    format_before, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        _require_values(sys.argv[1:])
        code = command(standalone_mode=False)
        print(end="", flush=True)
    except UserError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except (BrokenPipeError, SystemExit):  # the latter is what Typer and rich make of it
        _drop_output()
        sys.exit(CLOSED_PIPE)
    except OSError as error:
        _fail(*_fault(error))
    except Exception as error:
        _fail(_mistake(error), 2)
    finally:
        warnings.formatwarning = format_before
    if code == 130:  # Typer's own answer to Ctrl-C
        _fail(INTERRUPTED, 130)
    sys.exit(code)


def _require_values(arguments: list[str]) -> None:
    """Refuse an option without a value, as a shell variable that is not set leaves one: as a path it would mean the
    current folder."""
    for name, value in itertools.pairwise([*arguments, "--"]):
        option, is_given, given = name.partition("=")
        if name.startswith("--") and (value == "" or (is_given and not given)):
            raise UserError(f"{option}: its value is empty; give one, or leave the option out")


CLOSED_PIPE = 141
"""The exit code of a tool that nobody reads any more, as a shell gives it: 128 and the number of SIGPIPE."""


def _drop_output() -> None:
    """Send what is left to be printed nowhere: Python would try again at its end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fault(error: OSError) -> tuple[str, int]:
    """Say on one line what a file system refused, and the exit code; raise any other error again."""
    full, name = error.errno in (errno.ENOSPC, errno.EDQUOT), error.filename
    if full and name is None:
        _drop_output()
        name = "output"
    if name is None:
        raise error
    if full:
        return f"{name}: {error.strerror}; make room, and repeat the command, which goes on from here", 1
    return f"{name}: {error.strerror}; give a path that can be read and written", 2


def _mistake(error: Exception) -> str:
    """Say on one line what a config's or the command line's error is; raise any other error again."""
    from pydantic import ValidationError

    from mdm_interp.config import one_line

    if isinstance(error, ValidationError):
        return one_line(error)
    # Typer's own complaints about the command line; their class has moved between its versions.
    if hasattr(error, "format_message"):
        return f"{error.format_message().rstrip('.')}; try --help"  # pyright: ignore[reportAttributeAccessIssue]
    raise error


def _fail(message: str, code: int) -> NoReturn:
    """Print a message on one line, and end."""
    print(_line(message), file=sys.stderr)
    sys.exit(code)


def _warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    """Put a warning on one line, as an error is: where in the code it comes from helps no user."""
    return f"warning: {shorten(' '.join(str(message).split()))}\n"


def _line(message: str) -> str:
    return f"mdm-interp: {shorten(' '.join(message.split()))}"


def main() -> None:
    """Run the console script."""
    _run(app)


if __name__ == "__main__":
    main()
