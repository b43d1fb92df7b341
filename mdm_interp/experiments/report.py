"""Figures as files: HTML that works offline with one shared plotly.js, PNG where a browser is there, and the report.

A figure's page and the report are filled from `assets/report*.html`; `assets/report.js` draws and filters in the
reader's browser, in light or dark, on whatever width and on paper.
"""

from __future__ import annotations

import concurrent.futures
import html
import json
import math
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from mdm_interp.config import DemoConfig
from mdm_interp.experiments.claims import OUTCOMES, Verdict, counts
from mdm_interp.experiments.exhibits import SCORE_OF_CLAIM, explored
from mdm_interp.experiments.findings import NAMED_SETTINGS, by_setting, sentences, settings_of
from mdm_interp.experiments.results import CheckpointOrigin, Result, TrainedOrigin
from mdm_interp.experiments.scope import SCOPE, STAGES, scope_key, scope_label, setting_labels, shown_label
from mdm_interp.experiments.subjects import demo_name
from mdm_interp.files import replacing, write_text
from mdm_interp.provenance import difference
from mdm_interp.viz.pages.page import LIBRARIES, TEMPLATES, asset, browser_json, plotly_of, write_libraries, zipped
from mdm_interp.viz.panels import TRAINING_STEPS
from mdm_interp.viz.theme import DARK, HEIGHT, NAME, WIDTH, shown
from mdm_interp.viz.words import counted, heads_in_layers

BENCHMARK = "reversal_benchmark"
"""The result of the command of that name."""
FILTERS = ("claim", "world", "scheme", "objective", "layers", "heads", "stage", "role", "verdict")
"""What the ledger is filtered by: its first columns."""


def write_report(
    drawn: Sequence[tuple[Result, go.Figure]],
    out: Path,
    verdicts: Sequence[Verdict] = (),
    *,
    changed: Collection[str] | None = None,
    pages: Mapping[str, str] | None = None,
    details: Mapping[str, str] | None = None,
) -> str | None:
    """Write each figure as NAME.html and NAME.png, the part of Plotly that they share, and index.html, the
    report: the claims ledger, and every figure with its numbers and where they come from.

    Args:
        changed: Names of the figures to write; those of the others are in `out` already. Default: all.
        pages: Interactive pages to link to: file name in `out` to what it shows. Those that are not there are left out.
        details: Name of a figure to that of the figure below which it is folded, if that is there.

    Returns:
        Why there are no PNGs, on one line; None when there are.

    Raises:
        OSError: a file cannot be written.
    """
    inside = _explorers([result for result, _ in drawn], explored(out))
    entries = {result.name: _entry(result, figure, inside) for result, figure in drawn}
    write_libraries(out, *{_library([entry]) for entry in entries.values()})
    new = {result.name: figure for result, figure in drawn if changed is None or result.name in changed}
    problem = _write_images(new, out)
    for name, entry in entries.items():
        still = f"{name}.png"
        entry["still"] = still if (out / still).exists() else None
    for name in new:
        write_text(out / f"{name}.html", _render("report_figure.html", [entries[name]], entry=entries[name]))
    _write_index(entries, verdicts, out, pages or {}, details or {}, inside)
    return problem


@dataclass(frozen=True)
class _Explorer:
    """A page that looks inside one run of a setting."""

    page: str
    run: str
    scope: Mapping[str, Any]
    steps: dict[str, int]
    """Where the run is at the stages of its training."""

    def at(self, verdict: Verdict) -> str:
        """Return the address of what a verdict is about: a score of the heads, at a stage."""
        step = self.steps.get(verdict.scope["stage"])
        named = {"score": SCORE_OF_CLAIM[verdict.claim["id"]]} | ({} if step is None else {"step": step})
        return f"{self.page}#{urlencode(named)}"


def _explorers(results: Sequence[Result], pages: Mapping[str, str]) -> dict[tuple[Any, ...], _Explorer]:
    """Return the explorers by setting.

    Args:
        pages: Files by the runs that they show.
    """
    found: dict[tuple[Any, ...], _Explorer] = {}
    for row in (row for result in results for row in result.rows):
        if row.get("run") in pages and _has_setting(row):
            one = found.setdefault(scope_key(row), _Explorer(pages[row["run"]], row["run"], row, {STAGES[0]: 0}))
            if row["run"] == one.run and row.get("stage") in STAGES and "step" in row:
                one.steps[row["stage"]] = row["step"]
    return found


def _has_setting(row: Mapping[str, Any]) -> bool:
    """Tell whether a row is of a run in a setting."""
    return "run" in row and row.get("world") is not None and set(SCOPE) <= row.keys()


def _label(scope: Mapping[str, Any]) -> str:
    """Name a setting as figures do, without a stage."""
    return shown_label({column: scope[column] for column in SCOPE})


def _write_images(figures: Mapping[str, go.Figure], out: Path) -> str | None:
    """Write each figure as NAME.png, or return why there are none."""
    layouts: list[Any] = [figure.layout for figure in figures.values()]
    sizes = {"width": [layout.width for layout in layouts], "height": [layout.height for layout in layouts]}
    with tempfile.TemporaryDirectory() as folder:  # not in `out`, where it would stay if this process is killed
        images: list[str | Path] = [Path(folder) / f"{name}.png" for name in figures]
        try:
            _draw_images(list(figures.values()), images, **sizes)
        except (TimeoutError, concurrent.futures.TimeoutError):  # one and the same from Python 3.11 on
            return "no PNGs: the browser does not answer"
        except Exception as error:  # Kaleido's own are many, and none should cost the user the rest
            reason = str(error).strip().splitlines()
            return f"no PNGs: {reason[0] if reason else type(error).__name__}"
        for image in images:
            with replacing(out / Path(image).name) as temporary:
                shutil.copyfile(image, temporary)
    return None


ESTIMATE = ("quantity", "value", "low", "high", "n")
"""The last columns of a table of summaries, before those of the null."""


def write_summaries(results: Sequence[Result], path: Path) -> None:
    """Write the summaries of results as one table (CSV): `analysis`, what each estimate is of, `quantity`, `value`,
    `low`, `high` and `n`, and the same of the null."""
    frames = [result.summary.frame.assign(analysis=result.name) for result in results]
    table = pd.concat(frames, ignore_index=True)
    last = [name for name in table if str(name) in ESTIMATE or str(name).startswith("null_")]
    table = table[["analysis", *(name for name in table if name != "analysis" and name not in last), *last]]
    write_text(path, table.to_csv(index=False, lineterminator="\n"))


FIRST, EACH = 60.0, 20.0
"""How long the browser may take to start, and for an image: many times what it needs, in seconds."""


def _draw_images(figures: Sequence[go.Figure], images: Sequence[str | Path], **sizes: Any) -> None:
    """Write images, by a browser that may stop answering.

    Raises:
        TimeoutError: it did. The thread that waits for it, and those that it started, end with this process.
        Exception: Kaleido's.
    """
    drawn: concurrent.futures.Future[None] = concurrent.futures.Future()

    def draw() -> None:
        try:
            drawn.set_result(pio.write_images(list(figures), list(images), **sizes))
        except Exception as error:
            drawn.set_exception(error)

    threading.Thread(target=draw, daemon=True).start()
    drawn.result(FIRST + EACH * len(images))


def _write_index(
    entries: Mapping[str, dict[str, Any]],
    verdicts: Sequence[Verdict],
    out: Path,
    pages: Mapping[str, str],
    details: Mapping[str, str],
    inside: Mapping[tuple[Any, ...], _Explorer],
) -> None:
    """Write the report on figures, by name, that are written."""
    results = {name: entry["result"] for name, entry in entries.items()}
    of_runs, of_checkpoints = list[dict[str, Any]](), list[dict[str, Any]]()
    for name, entry in entries.items():
        if main := entries.get(details.get(name, "")):
            main["details"].append(entry)
        else:
            (of_checkpoints if entry["is_of_checkpoints"] else of_runs).append(entry)
    groups = {"Of small models, trained on facts": of_runs, "Of checkpoints": of_checkpoints}
    ledger = [(verdict, _cells(verdict)) for verdict in verdicts]
    claims = {verdict.claim["id"]: verdict.claim["sentence"] for verdict in verdicts}
    page = _render(
        "report_index.html",
        list(entries.values()),
        [_line(verdict, cells, inside) for verdict, cells in ledger],
        measured=_measured(list(results.values())),
        pages={file: title for file, title in pages.items() if (out / file).exists()},
        of_settings=_of_settings(inside.values()),
        filters={name: {_called(name, cells[i]): cells[i] for _, cells in ledger} for i, name in enumerate(FILTERS)},
        columns=list(counts(verdicts)),
        found=sentences(results),
        matrix=by_setting(verdicts) if verdicts else None,
        overview=[(claim, claims[str(claim)], row) for claim, row in counts(verdicts).to_dict("index").items()],
        rules=dict.fromkeys(
            f"Claim {verdict.claim['id']}: {verdict.measure}. Null: {verdict.null_is}. Rule: {verdict.rule}."
            for verdict in verdicts
        ),
        groups={name: of_group for name, of_group in groups.items() if of_group},
    )
    write_text(out / "index.html", page)


def _render(
    template: str, entries: Sequence[Mapping[str, Any]], ledger: Sequence[Mapping[str, Any]] = (), **values: Any
) -> str:
    """Fill a template of a page that shows these figures, and the lines of the ledger."""
    themes = {scheme: pio.templates[name].to_plotly_json() for scheme, name in (("light", NAME), ("dark", DARK))}
    by_name = {entry["result"].name: entry for entry in entries}
    drawn = {
        "figures": {name: entry["drawing"] for name, entry in by_name.items()},
        "numbers": {name: _numbers(entry["result"]) for name, entry in by_name.items()},
        "ledger": ledger,
    }
    return TEMPLATES.get_template(template).render(
        asset=asset,
        themes=themes,
        packed=zipped(browser_json(drawn)),
        library=LIBRARIES[_library(entries)][0],
        outcomes=OUTCOMES,
        **values,
    )


def library_of(figure: go.Figure) -> str:
    """Return the file, beside a figure's page, of what draws it."""
    return LIBRARIES[plotly_of(trace["type"] for trace in figure.to_plotly_json()["data"])][0]


def _library(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return what draws these figures."""
    return plotly_of(trace["type"] for entry in entries for trace in entry["drawing"]["data"])


def _numbers(result: Result) -> list[list[str]]:
    """Return the rows of the table of a result's summary, as texts."""
    rows = []
    for entry in result.summary:
        found, null = entry.effect, entry.null
        value = f"{found.value:.3g}" if found.n else "not defined"
        interval = f"{found.low:.3g} to {found.high:.3g}" if found.n > 1 else ""
        of = [str(entry.of.get(column, "")) for column in result.summary.columns]
        rows.append(
            [entry.quantity, *of, value, interval, f"{null.value:.3g}" if null and null.n else "", str(found.n)]
        )
    return rows


def _of_settings(explorers: Collection[_Explorer]) -> dict[str, dict[str, str]]:
    """Return the titles of explorers by file: of named settings, in their order, and of the others."""
    named = {one.page: name for name in NAMED_SETTINGS for one in explorers if name in settings_of(one.scope)}
    others = {one.page: _label(one.scope) for one in explorers if one.page not in named}
    return {"named": named, "others": others}


def _line(verdict: Verdict, cells: Sequence[str], inside: Mapping[tuple[Any, ...], _Explorer]) -> dict[str, Any]:
    """Return a line of the ledger: its cells, the numbers that some of them are sorted by, and where it leads."""
    p = verdict.p if verdict.p == verdict.p else None
    told = [verdict.measure, f"{verdict.effect}, n = {verdict.effect.n}", str(verdict.null)]
    every = [*map(_called, FILTERS, cells), *told, "-" if p is None else f"{p:.2g}"]
    sorted_by = dict(zip(range(len(cells) + 1, len(every)), (verdict.effect.value, verdict.null.value, p), strict=True))
    scope = verdict.scope
    explorer = inside.get(scope_key(scope))
    return {
        "cells": every,
        "keys": {column: key for column, key in sorted_by.items() if key is not None and math.isfinite(key)},
        "text": " ".join([*every, *cells, verdict.reading]).lower(),
        "reading": verdict.reading,
        "figure": verdict.figure,
        "setting": None if scope["world"] is None else _label(scope),
        "inside": explorer.at(verdict) if explorer else None,
    }


def _measured(results: Sequence[Result]) -> str:
    """Return what the figures were made of, in one sentence."""
    origins = [result.origin for result in results]
    runs = {run for origin in origins if isinstance(origin, TrainedOrigin) for run in origin.runs}
    checkpoints = dict.fromkeys(origin.checkpoint for origin in origins if isinstance(origin, CheckpointOrigin))
    seeds = {seed for result in results for seed in result.seeds}
    of = [
        *([f"{counted(len(runs), 'trained model')} with {counted(len(seeds), 'seed')}"] if runs else []),
        *([f"the checkpoint {' and '.join(checkpoints)}"] if checkpoints else []),
    ]
    rows = counted(sum(len(result.rows) for result in results), "row")
    analyses = f"{len(results)} {'analysis' if len(results) == 1 else 'analyses'}"
    return f"{analyses}{' of ' if of else ''}{' and of '.join(of)}, {rows} of measurements."


def _cells(verdict: Verdict) -> list[str]:
    """Return what a verdict is filtered by, as results call it."""
    scope, every = verdict.scope, ["all", verdict.scope["scheme"], "all", "all", "all"]
    setting = every if scope["world"] is None else setting_labels(scope)
    return [verdict.claim["id"], *setting, str(scope["stage"]), verdict.role, verdict.verdict]


def _called(name: str, cell: str) -> str:
    """Return what a reader sees of a cell of the ledger."""
    return shown(cell) if name == "scheme" else cell


# ---- one figure


def _entry(result: Result, figure: go.Figure, inside: Mapping[tuple[Any, ...], _Explorer]) -> dict[str, Any]:
    """Return what the templates show of a figure: the drawing, its text alternative, and where it comes from.

    Args:
        inside: Explorers by setting.
    """
    layout: Any = figure.layout
    width, height = layout.width or WIDTH, layout.height or HEIGHT
    drawn = json.loads(figure.to_json() or "")
    drawn["layout"].pop("template", None)  # the page has the theme, in the reader's colours
    drawn["layout"] |= {"width": width, "height": height}
    runs, settings = _runs(result), _settings(result, inside)
    over_training = [
        name
        for name, axis in drawn["layout"].items()
        if name.startswith("xaxis") and axis.get("tickvals") == TRAINING_STEPS["tickvals"]
    ]
    return {
        "result": result,
        "drawing": {
            "data": drawn["data"],
            "layout": drawn["layout"],
            "settings": settings,
            "over_training": over_training,
        },
        "inside": {one.run: one.page for one in inside.values()},
        "leads": any(one["page"] for one in settings),
        "width": width,
        "height": height,
        "title": _plain(layout.title.text) or result.question,
        "takeaway": _plain(layout.title.subtitle.text),
        "command": _command(result),
        "runs": runs,
        "n_runs": sum(map(len, runs.values())),
        "checkpoints": [*_checkpoints(result), *_trained_otherwise(result)],
        "is_of_checkpoints": result.origin.kind != "runs",
        "details": [],
    }


def _settings(result: Result, inside: Mapping[tuple[Any, ...], _Explorer]) -> list[dict[str, Any]]:
    """Return the settings of a result: their full names, as figures and as results have them, all that figures may call
    them, and the explorer of one run with its steps at stages of training."""
    labels: dict[tuple[Any, ...], dict[str, None]] = {}
    scopes: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in filter(_has_setting, result.rows):
        setting = scope_key(row)
        scopes[setting] = row
        labels.setdefault(setting, {}).update(dict.fromkeys(_names(row)))
    settings = []
    for setting, scope in scopes.items():
        explorer = inside.get(setting)
        settings.append(
            {
                "names": [_label(scope), scope_label({column: scope[column] for column in SCOPE})],
                "labels": list(labels[setting]),
                "page": explorer.page if explorer else None,
                "steps": explorer.steps if explorer else {},
            }
        )
    return settings


def _names(row: Mapping[str, Any]) -> Iterator[str]:
    """Give the names that figures have for a row's setting: the whole one, and those of its parts."""
    scope = {column: row[column] for column in SCOPE}
    for scheme in dict.fromkeys((row["scheme"], shown(row["scheme"]))):
        yield scope_label({**scope, "scheme": scheme})
        yield from (scheme, f"{scheme}, {row['world']}", f"{scheme}, {counted(row['n_heads'], 'head')}")
    yield from setting_labels(scope)
    yield f"{row['world']}, {counted(row['n_heads'], 'head')}"
    texts = [value for column, value in row.items() if isinstance(value, str) and column not in (*SCOPE, "run")]
    yield from (name for text in texts for name in (text, shown(text)))


def _plain(text: str | None) -> str:
    """Return a text of Plotly's without its markup."""
    text = re.sub(r"<br\s*/?>", " ", text or "")
    return html.unescape(re.sub(r"</?(?:b|i|em|s|u|a|sub|sup|span)\b[^>]*>", "", text))


def _command(result: Result) -> str:
    """Return what measures it again."""
    if isinstance(result.origin, CheckpointOrigin):
        twin = " --twin TWIN" if result.origin.twin else ""
        if result.name == BENCHMARK:
            return f"mdm-interp {BENCHMARK.replace('_', '-')} CHECKPOINT --data FOLDER{twin} --out DIR"
        return f"mdm-interp probe CHECKPOINT --facts FACTS.csv{twin} --only {result.name} --out DIR"
    return f"mdm-interp reproduce --only {result.name} --seeds {len(result.seeds)}"


def _checkpoints(result: Result) -> list[str]:
    """Return the checkpoint that `mdm-interp probe` was given, and its twin, in a line each."""
    lines = []
    origin = result.origin if isinstance(result.origin, CheckpointOrigin) else None
    while origin:
        model = origin.model
        pairs = "; ".join(
            f"{kind}: {counted(n, 'pair')}, {origin.skipped[kind]} skipped" for kind, n in origin.pairs.items()
        )
        lines.append(
            f"{'Its twin' if lines else 'Checkpoint'} {origin.checkpoint}: "
            f"{heads_in_layers(model['n_layers'], model['n_heads'])}, width {model['d_model']}, digest "
            f"{origin.digest}; asked about {counted(origin.facts, 'fact')} ({pairs})."
        )
        origin = origin.twin
    return lines


def _trained_otherwise(result: Result) -> list[str]:
    """Name the runs that other code or versions trained than those that measured them, in one line if there are any."""
    if not isinstance(result.origin, TrainedOrigin):
        return []
    n_runs = len(result.origin.runs)
    unrecorded = [{"runs": n_runs, "by": [{}]}]
    others: Counter[str] = Counter()
    for alike in result.made_with or unrecorded:
        others[difference(alike["by"], {**result.measured_with, **result.versions})] += alike["runs"]
    del others[""]
    n = others.total()
    named = "; ".join(f"{count} with {said}" for said, count in others.most_common())
    line = f"{n} of {n_runs} runs {'was' if n == 1 else 'were'} trained by other code or versions: {named}."
    return [line] if n else []


def _runs(result: Result) -> dict[str, list[str]]:
    """Return the digests of the runs it was measured in, by setting as far as its rows tell them apart."""
    if not isinstance(result.origin, TrainedOrigin):
        return {}
    names, other = dict[str, str](), ""
    if result.origin.kind == "demos":
        demos = [DemoConfig.model_validate(config) for config in result.origin.first_seed]
        names, other = {demo.digest(): demo_name(demo) for demo in demos}, "demo checkpoints of other seeds"
    for row in result.rows:
        if _has_setting(row):
            names[row["run"]] = _label(row)
        elif "run" in row:
            names[row["run"]] = ", ".join(str(row[column]) for column in ("world", "variant") if column in row)
    groups: dict[str, list[str]] = {}
    for digest in result.origin.runs:
        groups.setdefault(names.get(digest, other), []).append(digest)
    return groups
