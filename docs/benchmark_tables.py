"""Writes the tables of `benchmarks.md` from what `make bench` measured.

    python docs/benchmark_tables.py

A row whose target is missed has a reason here, which is shown as long as it is missed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("benchmarks.md")
RESULTS = [ROOT / "benchmarks" / name for name in ("results.json", "results-gpu.json")]
BEGIN, END = "<!-- tables: written by docs/benchmark_tables.py -->", "<!-- end of the tables -->"
OURS = "mdm_interp"

_TRAINING = (
    "a step's time is in matrix products (29 %), elementwise multiplications (19 %), attention (15 %) and the backward "
    "pass of the norm's division (9 %), most of which plain PyTorch runs as well. Fewer and larger operations would "
    "round differently, and stored runs must train bit for bit as they did."
)
_SPREAD = "the same products run in the same kernels as in transformers; what is missing is within the spread."
_GRADIENTS = (
    "forward and backward down to the activations alone take 0.84 of the bare pass. The rest is dot products of 512 "
    "tokens with 512 for each weight, which take about as long as the weights' gradients in the bare pass. Those of "
    "inputs that several weights share are computed once, and terms that no loss sees are left out. Not tried: the "
    "last layer's queries, outputs and MLP at the readout's rows alone."
)
REASONS = {"training-3": _TRAINING, "training-12": _TRAINING, "gradients": _GRADIENTS}
REASONS |= dict.fromkeys(("forward-64", "forward-1024", "causal-1024"), _SPREAD)
"""Why a row misses its target, on a CPU."""


def missed(row: dict[str, Any]) -> bool:
    return row["target"] is not None and round(row["variants"][OURS]["ratio"], 2) > row["target"]


def table(results: dict[str, Any]) -> list[str]:
    """Return one machine's table, and the reasons for what it misses."""
    made = results["made_with"]
    on = made["gpu"] if "gpu" in made else f"{made['cpu']}, {made['threads']} threads"
    versions = ", ".join(f"{name} {made[name]}" for name in ("python", "torch", "transformers", "transformer-lens"))
    lines = [f"## {on}", "", f"With {versions}. Times are medians.", ""]
    lines += ["| work | what counts as 1 | target | mdm_interp | others |", "|---|---|---|---|---|"]
    for row in results["rows"].values():
        others = [
            f"{name} {cost['ratio']:.2f}" for name, cost in row["variants"].items() if name not in (OURS, row["one"])
        ]
        ours, one = row["variants"][OURS], row["variants"][row["one"]]
        low, high = ours["quartiles"]
        target = "" if row["target"] is None else f"≤ {row['target']:.2f}"
        ratio = f"{ours['ratio']:.2f} ({low:.2f} to {high:.2f}){', missed' if missed(row) else ''}"
        lines.append(
            f"| {row['work']} | {row['one']}, {_time(one['seconds'])} | {target} | {ratio} | {'; '.join(others)} |"
        )
    reasons = [
        f"- *{row['work']}*: {REASONS[name]}"
        for name, row in results["rows"].items()
        if missed(row) and name in REASONS and "gpu" not in made
    ]
    return [*lines, "", *(["Where a target is missed:", "", *reasons, ""] if reasons else [])]


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def rewritten(page: str) -> str:
    """Return the page with the tables of today between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    measured = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS if path.exists()]
    tables = "\n".join(line for results in measured for line in table(results))
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
