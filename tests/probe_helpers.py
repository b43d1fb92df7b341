"""Probes of checkpoints with random weights, and what is read off their results and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from checkpoint_helpers import write_checkpoint
from helpers import planted_result

from mdm_interp.experiments.results import Result
from mdm_interp.experiments.subjects import Probe, each_checkpoint, open_probe

FACTS = """child,parent,parent_type
Tom Cruise,Mary Lee Pfeiffer,mother
Zoë Müller,José Álvarez,father
Anna,Bea Lind,mother
Carl Olsen,Dora,mother
Emil,Finn Berg,father
Greta Holm,Hans,father
Ida,Jon Dahl,father
Kari Moe,Lise Vik,mother
"""


def tiny_probe(folder: Path, format: str, *, twin: str | None = None, facts: int = 8, **changes: Any) -> Probe:
    """A checkpoint with random weights, asked about invented facts."""
    csv = folder / "facts.csv"
    csv.write_text("".join(FACTS.splitlines(keepends=True)[: facts + 1]), encoding="utf-8")
    for name in filter(None, (format, twin)):
        of_format = changes if name == format else {}
        write_checkpoint(folder / f"tiny-{name}", name, tokenizer=True, seed=len(name), **of_format)
    return open_probe(folder / f"tiny-{format}", csv, twin=folder / f"tiny-{twin}" if twin else None)


def result_of(analysis: Any, probes: list[Probe], folder: Path) -> Result:
    """Measured, saved and loaded as a probe's result is."""
    measured = planted_result(analysis.name, rows_of(analysis, probes), question=analysis.question)
    measured.save(folder / "result.json")
    return Result.load(folder / "result.json", analysis.summarize)


def rows_of(analysis: Any, probes: list[Probe]) -> list[dict[str, Any]]:
    """What an analysis measures of probes, one after the other."""
    members = probes if analysis.needs_twin else each_checkpoint(probes)
    return [row for probe in members for row in analysis.rows(probe)]


def traces(figure: go.Figure, **properties: Any) -> list[Any]:
    return list(figure.select_traces(properties))


def at(result: Result, kind: str, layer: int | None, head: int | None) -> dict[str, Any]:
    (row,) = (row for row in result.rows if (row["kind"], row["layer"], row["head"]) == (kind, layer, head))
    return row
