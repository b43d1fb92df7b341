"""What this package's work costs, next to plain PyTorch, Hugging Face and TransformerLens.

    python -m benchmarks [--device cpu] [--only NAME …] [--threads N] [--quick]

The variants of a row run in one process, in turn, so that whatever else the machine does falls on all alike. Each
repeat gives the ratio of a variant's time to that of the one that counts as 1; shown are the median and the quartiles
of these. `code` is the digest of what was measured, by which the tables say what is older than the code. Results are
written to `results.json`, or `results-gpu.json`, beside this file; rows that did not run are kept
if they are of the same machine and versions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rows import ROWS, Row, Setting
from benchmarks.timing import measure
from mdm_interp.provenance import machine

PACKAGES = ("torch", "transformers", "transformer-lens")


def results_path(device: str) -> Path:
    return Path(__file__).with_name("results.json" if device == "cpu" else "results-gpu.json")


def made_with(device: str) -> dict[str, Any]:
    """Return machine and versions."""
    gpu = {} if device == "cpu" else {"gpu": torch.cuda.get_device_name(device)}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {**machine(), **gpu, "python": platform.python_version(), **versions}


def run(row: Row, setting: Setting) -> dict[str, Any]:
    """Measure one row."""
    repeats = 2 if setting.quick else row.repeats if setting.device == "cpu" else min(row.repeats, 10)
    with row.calls(setting) as calls:
        found = measure(calls, repeats) if row.unit == "seconds" else measure(calls, repeats, 0, of=lambda call: call())
    return {
        "work": row.work,
        "one": row.one,
        "target": row.target,
        "repeats": repeats,
        "code": row.digest(),
        "variants": {name: compared(amounts, found[row.one], row.unit) for name, amounts in found.items()},
    }


def compared(amounts: np.ndarray, one: np.ndarray, unit: str) -> dict[str, Any]:
    """Compare what each repeat took with what the variant that counts as 1 took beside it."""
    ratios = amounts / one
    quartiles = np.percentile(ratios, [25, 75]).tolist()
    return {unit: float(np.median(amounts)), "ratio": float(np.median(ratios)), "quartiles": quartiles}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What this package's work costs.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all runs; nothing is written")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    path, results = results_path(given.device), {"made_with": made_with(given.device), "rows": {}}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        results = before if before["made_with"] == results["made_with"] else results
    failed = []
    for name, row in ROWS.items():
        if name not in given.only:
            continue
        try:
            found = run(row, Setting(given.device, given.quick))
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        print(f"{name}: {row.work}; {row.one} is 1" + (f", target {row.target}" if row.target else ""))
        for variant, cost in found["variants"].items():
            low, high = cost["quartiles"]
            amount = f"{cost['GB']:10.2f} GB" if row.unit == "GB" else f"{1e3 * cost['seconds']:10.2f} ms"
            print(f"    {variant:<44} {amount} {cost['ratio']:6.2f}  [{low:.2f}, {high:.2f}]", flush=True)
        results["rows"][name] = found
        if not given.quick:
            results["rows"] = {name: results["rows"][name] for name in ROWS if name in results["rows"]}
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
