"""The rooms of the package: each uses only those above it, and costs nothing until it is used."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import mdm_interp

PACKAGE = ROOT / "mdm_interp"
LISTED = re.findall(r"^    ([a-z_, ]+?)  +\S", str(mdm_interp.__doc__), re.MULTILINE)
ORDER = [name for line in LISTED for name in line.split(", ")]
HEAVY = ("torch", "plotly", "pandas", "transformers", "transformer_lens", "circuitsvis", "pydantic")


def room(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> list[str]:
    """The modules of the package that a module imports, wherever it does."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "mdm_interp":
            found += [f"mdm_interp.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("mdm_interp."):
            found.append(str(node.module))
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("mdm_interp.")]
    return found


def test_every_room_is_listed() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert len(ORDER) == len(set(ORDER)) and set(ORDER) == there - {"__init__"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_room_uses_one_below_it(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        return
    back = [module for module in imports(path) if ORDER.index(room(module)) > ORDER.index(parts[0])]
    assert not back, f"{'.'.join(parts)} uses {back}"


def test_within_a_room_no_two_modules_need_each_other() -> None:
    uses = {
        ".".join(("mdm_interp", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): imports(
            path
        )
        for path in PACKAGE.rglob("*.py")
    }

    def reached(module: str, seen: set[str]) -> set[str]:
        for used in uses.get(module, ()):
            if used not in seen:
                seen.add(used)
                reached(used, seen)
        return seen

    assert not [module for module in uses if module in reached(module, set())]


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    return done.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = f"import sys, mdm_interp; dir(mdm_interp); print([name for name in {HEAVY} if name in sys.modules])"
    assert run(program).strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in dir(mdm_interp):
        assert getattr(mdm_interp, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        mdm_interp.nothing_of_that_name  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_help_waits_for_typer_alone() -> None:
    """Medians of the processor's time, taken in turn: a busy machine makes both wait alike."""
    program = "import sys; sys.argv = ['mdm-interp', '--help']; from mdm_interp.cli import main; main()"
    loaded = run(f"import sys; from mdm_interp import cli; print([name for name in {HEAVY} if name in sys.modules])")
    assert loaded.strip() == "[]"
    taken: dict[str, list[float]] = {"import typer": [], program: []}
    for _ in range(5):
        for code, seconds in taken.items():
            before = children_seconds()
            run(code)
            seconds.append(children_seconds() - before)
    alone, helped = (sorted(seconds)[2] for seconds in taken.values())
    assert helped < 3 * alone


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
