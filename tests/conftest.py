"""Shapes in signatures are checked in every test: jaxtyping and beartype look at each call into the package."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import check_helpers
import jaxtyping
import pytest
import reliability_helpers
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from cli_helpers import Ended
    from playwright.sync_api import Browser

check_helpers.install()
os.fsync = lambda _: None  # no test outlives a power failure, and each waits for the disk a thousand times
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

# A busy machine takes its time.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


SLOW = {f"test_{name}" for name in ("repeatability", "runner", "subjects", "exhibits", "parallel", "provenance")}
SLOW |= {f"test_figure_{name}" for name in ("trajectory", "twin")}
SLOW |= {f"test_{name}" for name in ("precision", "parity", "routes_page", "trajectory_page", "attention_page")}
SLOW |= {"test_influence", "test_influence_page"}
SLOW |= {f"test_{name}" for name in ("meaning", "gram", "gradients", "estimates", "generation", "optional_hooks")}
SLOW |= {f"test_{name}" for name in ("invariance", "forward", "processing", "transformer_lens_tools", "devices")}
SLOW |= {f"test_figure_large_model_{name}" for name in ("coupling", "prediction", "routes", "storage")}
"""Modules whose tests are slow."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-reliability", action="store_true", help="write docs/reliability.md from what passes")
    parser.addoption("--torture", action="store_true", help="disturb a hundred times, and at every write, not a few")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-reliability") and not hasattr(config, "workerinput"):  # one process writes
        config.pluginmanager.register(reliability_helpers.Writer())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what opens a browser, and as slow what trains models, measures analyses or starts processes: `make
    test-fast` leaves both out."""
    marks = {"chromium": pytest.mark.browser, "tiny_result": pytest.mark.slow, "figures": pytest.mark.slow}
    for item in items:
        reliability_helpers.mark(item)
        for fixture in marks.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(marks[fixture])
        if item.path.parent.name == "training" or item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As users have it: no shape annotation is enforced, and the package's own messages are reached."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session, the same one in all its processes."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def tiny_result(shared_folder: Path) -> Iterator[Callable[[str], Any]]:
    """A function from an analysis' name to its result on the tiny grid, with 2 seeds; measured when first asked for."""
    import helpers

    with helpers.tiny_grid():
        yield helpers.TinyResults(shared_folder / "tiny")


@pytest.fixture
def real_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grids as they are, whatever `tiny_result` has made of them for the session."""
    import helpers

    for name, value in helpers.REAL.items():
        monkeypatch.setattr(helpers.grids, name, value)
    monkeypatch.setattr(helpers.subjects, "DEMOS", helpers.REAL_DEMOS)
    monkeypatch.setattr(helpers.scope, "LEARNT", helpers.REAL_LEARNT)
    monkeypatch.setattr(helpers.phase_diagram, "SWEEP", helpers.REAL_MAP)
    monkeypatch.setattr(helpers.phase_diagram, "LEARNT", helpers.REAL_MAP_LEARNT)


@pytest.fixture
def own_schemes() -> Iterator[None]:
    """Position schemes that a test registers are forgotten after it."""
    import scheme_helpers

    with scheme_helpers.forgotten():
        yield


@pytest.fixture
def mdm_interp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Runs the console script, or another `entry`, in an empty folder."""
    from cli_helpers import Ended

    from mdm_interp import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, entry: Callable[[], None] = cli.main) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mdm-interp", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            entry()
        code = ended.value.code or 0
        assert isinstance(code, int)
        printed = capsys.readouterr()
        return Ended(code, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path. CI has one; elsewhere its absence skips."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        assert not os.environ.get("CI"), "CI must have a chromium: the pages are tested in it"
        pytest.skip("there is no chromium here to open the pages in")
    return path


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield started
        started.close()
