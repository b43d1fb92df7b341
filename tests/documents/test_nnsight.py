"""The how-to on nnsight: what it prints where nnsight is installed, which no other test asks for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from document_helpers import ROOT, blocks
from helpers import TINY_DEMO

from mdm_interp.training.demo import train_demo

PAGE = ROOT / "docs" / "howto" / "use_nnsight.md"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("nnsight") is None, reason="nnsight is not installed: make dev")
def test_nnsight_finds_the_routes_that_the_measure_finds(tmp_path: Path) -> None:
    """In a process of its own: nnsight reads the source of what it traces, and changes what every object has."""
    train_demo(tmp_path / "demo", TINY_DEMO, progress=False)
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(blocks(PAGE.read_text(encoding="utf-8"), "python")), encoding="utf-8")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    printed = re.findall(r"^(\w*) ?largest difference (\S+)(?: of (\S+))?$", ran.stdout, re.MULTILINE)
    assert [name for name, _, _ in printed] == ["", "", "llama", "qwen2"], ran.stdout
    assert all(float(difference) < 1e-5 for _, difference, _ in printed)
    assert all(float(largest) > 0.1 for name, _, largest in printed if name), "the routes compared are nothing"
