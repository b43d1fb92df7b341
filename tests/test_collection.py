"""Tests are collected where no browser's client is installed: on a machine with a GPU, `pytest -m gpu` needs none."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import ROOT

WITHOUT = """
import sys

sys.modules["playwright"] = None

import pytest

sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_tests_are_collected_without_playwright() -> None:
    """A module that imports it names it, or imports one that does."""
    tests = [path for path in sorted(ROOT.glob("tests/**/test_*.py")) if b"playwright" in path.read_bytes()]
    command = [sys.executable, "-c", WITHOUT, *map(str, tests)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert len(tests) > 5 and ran.returncode == 0, ran.stdout[-2000:]
