"""Writes the tables of `benchmarks.md` from what `make bench` measured.

    python -m docs.benchmark_tables

A row whose target is missed on a CPU has a reason here, which is shown as long as it is missed. A row that was measured
with other code than there is now is marked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("benchmarks.md")
RESULTS = [ROOT / "benchmarks" / name for name in ("results.json", "results-gpu.json")]
BEGIN, END = "<!-- tables: written by docs/benchmark_tables.py -->", "<!-- end of the tables -->"
OURS = "mdm_interp"
OLDER, NOTE = " †", "† Measured with older code."

_TRIED = (
    "Tried, with plain PyTorch's time on one thread as 1: AdamW by `foreach` or parameter by parameter {adam}, "
    "`torch.nn.functional.rms_norm` {norm}, fused attention {fused}, `torch.compile` {compiled}; as it was, before "
    "`F.embedding`, {now}. All but the optimiser's round differently, and stored runs must train bit for bit as they "
    "did."
)
_TRAINING = {
    "training-12": "a step's time on one thread is in matrix products (31 %), elementwise multiplications (21 %), the "
    "softmax and its backward pass (10 %), the norm's division (9 %) and copies (6 %). "
    + _TRIED.format(
        adam="1.10", norm="1.08", fused="1.01", compiled="0.66, after minutes of compiling", now="1.08 to 1.12"
    ),
    "training-3": "a step's time on one thread is in matrix products (41 %), elementwise multiplications (10 %), AdamW "
    "(6 %), copies (5 %) and the norm's division (4 %); the rest is shared out over some 600 small operations. "
    + _TRIED.format(adam="1.25", norm="1.18", fused="1.04", compiled="1.04", now="1.19 to 1.21"),
}
_GRADIENTS = (
    "forward and backward down to the activations alone take 0.84 of the bare pass. The rest is dot products of 512 "
    "tokens with 512 for each weight, which take about as long as the weights' gradients in the bare pass: matrix "
    "products take 205 ms here, 199 ms there. Those of inputs that several weights share are computed once, and terms "
    "that no loss sees are left out. Tried: forward and reverse queries in batches of their own (1.36), smaller "
    "batches (1.29 to 1.53), huge pages (1.18, with twice the scatter). Not tried: the last layer's queries, outputs "
    "and MLP at the readout's rows alone, which would save a tenth."
)
REASONS = {**_TRAINING, "gradients": _GRADIENTS}
REASONS |= dict.fromkeys(
    ("forward-64", "forward-1024", "causal-1024"),
    "the same products run in the same kernels as in transformers.",
)
REASONS["coupling"] = (
    "inner products take every token of a pair with every token of all others that are asked for the same side, so "
    "five times the facts are 25 times the products. Tried: smaller batches with less padding (no faster)."
)
REASONS["cache"] = (
    "besides the forward pass, patterns are computed, where the bare pass has fused attention, and entries are stored. "
    "They are not copied unless a hook could edit them, but they are 1 GB of memory that the system gives, and clears, "
    "page by page: the same matrix products take 12 % longer where they write into it, multiplications twice as long. "
    "Tried: scores scaled in place (no change), huge pages (slower)."
)
"""Why a row misses its target, on a CPU."""
UNKNOWN = "not yet profiled on a GPU."


def missed(row: dict[str, Any]) -> bool:
    return row["target"] is not None and round(row["variants"][OURS]["ratio"], 2) > row["target"]


def unmarked(page: str) -> str:
    """Return the page as if all of it were measured with today's code."""
    return page.replace(OLDER, "").replace(f"{NOTE}\n\n", "")


def table(results: dict[str, Any], code: Mapping[str, str]) -> list[str]:
    """Return one machine's table, and the reasons for what it misses.

    Args:
        code: Of each row, the digest of the code that is measured today.
    """
    made, rows = results["made_with"], results["rows"]
    on = made["gpu"] if "gpu" in made else f"{made['cpu']}, {made['threads']} threads"
    versions = ", ".join(f"{name} {made[name]}" for name in ("python", "torch", "transformers", "transformer-lens"))
    lines = [f"## {on}", "", f"With {versions}. Times are medians.", ""]
    lines += ["| work | what counts as 1 | target | mdm_interp | others |", "|---|---|---|---|---|"]
    older = {name for name, row in rows.items() if row.get("code") != code.get(name)}
    for name, row in rows.items():
        others = [
            f"{peer} {cost['ratio']:.2f}" for peer, cost in row["variants"].items() if peer not in (OURS, row["one"])
        ]
        ours, one = row["variants"][OURS], row["variants"][row["one"]]
        low, high = ours["quartiles"]
        target = "" if row["target"] is None else f"≤ {row['target']:.2f}"
        ratio = f"{ours['ratio']:.2f} ({low:.2f} to {high:.2f}){', missed' if missed(row) else ''}"
        work = f"{row['work']}{OLDER if name in older else ''}"
        lines.append(f"| {work} | {row['one']}, {_amount(one)} | {target} | {ratio} | {'; '.join(others)} |")
    lines += ["", *([NOTE, ""] if older else [])]
    reasons = [f"- *{row['work']}*: {reason(name, row, made)}" for name, row in rows.items() if missed(row)]
    return [*lines, *(["Where a target is missed:", "", *reasons, ""] if reasons else [])]


def reason(name: str, row: dict[str, Any], made_with: dict[str, Any]) -> str:
    """Say why a row misses its target, and whether a quarter of its repeats reach it."""
    why = UNKNOWN if "gpu" in made_with else REASONS[name]
    within = row["variants"][OURS]["quartiles"][0] <= row["target"]
    return f"{why} A quarter of the repeats or more reach the target." if within else why


def _amount(cost: dict[str, Any]) -> str:
    return f"{cost['GB']:.2f} GB" if "GB" in cost else _time(cost["seconds"])


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def rewritten(page: str, code: Mapping[str, str]) -> str:
    """Return the page with the tables of today between its markers; `code` as for :func:`table`."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    measured = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS if path.exists()]
    tables = "\n".join(line for results in measured for line in table(results, code))
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


if __name__ == "__main__":
    from benchmarks.rows import ROWS

    digests = {name: row.digest() for name, row in ROWS.items()}
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), digests), encoding="utf-8")
