"""Shapes in signatures are checked in every test: jaxtyping and beartype look at each call into the package."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook
from playwright.sync_api import Browser, sync_playwright

install_import_hook("mdm_interp", "beartype.beartype")
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture(scope="session")
def tiny_result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """A function from an analysis' name to its result on the tiny grid, with 2 seeds; measured when first asked for."""
    import helpers

    folder = tmp_path_factory.getbasetemp()
    with helpers.tiny_grid():
        yield helpers.TinyResults((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "tiny")


@pytest.fixture
def real_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grids as they are, whatever `tiny_result` has made of them for the session."""
    import helpers

    for name, value in helpers.REAL.items():
        monkeypatch.setattr(helpers.grids, name, value)


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
    arguments = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield started
        started.close()
