"""Shapes in signatures are checked in every test: jaxtyping and beartype look at each call into the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("mdm_interp", "beartype.beartype")
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture(scope="session")
def tiny_result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """A function from an analysis' name to its result on the tiny grid, with 2 seeds; measured when first asked for."""
    import helpers

    with helpers.tiny_grid():
        yield helpers.TinyResults(tmp_path_factory.mktemp("tiny"))
