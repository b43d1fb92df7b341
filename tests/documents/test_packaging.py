"""The wheel: what is in it, and that it works where the repository is not."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SOURCES = ["mdm_interp", "analyses", "pyproject.toml", "README.md", "LICENSE"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def backend_is_here() -> bool:
    """Whether this environment holds the setuptools that pyproject.toml asks for."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    isolation = ["--no-isolation"] if backend_is_here() else []
    built = run(sys.executable, "-m", "build", "--wheel", *isolation, cwd=copy)
    if built.returncode and not isolation and not os.environ.get("CI") and "No matching distribution" in built.stdout:
        pytest.skip("setuptools >= 77 is neither installed nor to be had from an index")
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, which also finds this one's packages."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    assert run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent).returncode == 0
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    installed = run(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder.parent)
    assert installed.returncode == 0, installed.stderr
    # As plain folders: their own .pth files, which lead to the repository, are not read.
    theirs = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "theirs.pth").write_text("".join(f"{path}\n" for path in sorted(theirs)))
    return folder


@cache
def brought() -> set[str]:
    """All that the package and its extras install here, by their names."""
    seen, todo = dict[str, set[str]](), [("mdm-interp", {"dev", "cluster", "nnsight"})]
    while todo:
        name, extras = todo.pop()
        if name in seen and extras <= seen[name]:
            continue
        seen[name] = seen.get(name, set()) | extras
        for needed in map(Requirement, importlib.metadata.requires(name) or ()):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in {"", *seen[name]}):
                todo.append((canonicalize_name(needed.name), needed.extras))
    return seen.keys() - {"mdm-interp"}


def test_every_package_that_is_installed_is_pinned_and_no_other() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    names = [canonicalize_name(pin.name) for pin in here]
    assert len(names) == len(set(names)), "two pins of one package"
    assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin in here)
    assert set(names) == brought()
    assert len(names) > 100


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    packaged = [ROOT / "mdm_interp" / "py.typed", *(ROOT / "mdm_interp" / "viz" / "assets").iterdir()]
    packaged += [path for package in ("mdm_interp", "analyses") for path in (ROOT / package).rglob("*.py")]
    packaged += [*(ROOT / "mdm_interp").rglob("*.pyi"), *(ROOT / "analyses").glob("*.yaml")]
    assert {name for name in names if not name.startswith(info)} == {str(path.relative_to(ROOT)) for path in packaged}
    assert f"{info}/licenses/LICENSE" in names
    assert "[console_scripts]\nmdm-interp = mdm_interp.__main__:main" in entry_points
    assert "[mdm_interp.analyses]\nbuiltin = analyses" in entry_points


def test_the_wheel_works_where_the_repository_is_not(environment: Path, tmp_path: Path) -> None:
    helped = run(environment / "bin" / "mdm-interp", "reproduce", "--help", cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    assert "--only" in helped.stdout
    report = (
        "import analyses, mdm_interp; from mdm_interp.experiments.analysis import discover;"
        "print(mdm_interp.__file__, analyses.__file__, *(analysis.name for analysis in discover()))"
    )
    reported = run(environment / "bin" / "python", "-c", report, cwd=tmp_path)
    assert reported.returncode == 0, reported.stderr
    package, builtin, *names = reported.stdout.split()
    assert Path(package).is_relative_to(environment)
    assert Path(builtin).is_relative_to(environment)
    assert set(names) == {path.stem for path in (ROOT / "analyses").glob("[a-z]*.py")}
    assert list(tmp_path.iterdir()) == []
