"""Execute the notebooks, and keep them with what they print and a picture of every page and figure that they show.

    make notebooks

A page or a figure to click on takes megabytes; in the stored notebook, a picture stands in for it.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import plotly.io as pio
from nbclient import NotebookClient
from playwright.sync_api import Browser, sync_playwright

NOTEBOOKS = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FIGURE = "application/vnd.plotly.v1+json"
WIDTH, HEIGHT = 1000, 900
"""Pixels of a page's picture."""
FIGURE_WIDTH = 1400
"""That figures are made for."""
QUIET = {"PYTHONWARNINGS": "ignore:IProgress not found"}
"""tqdm misses ipywidgets, which nothing here needs."""


def execute(path: Path, browser: Browser) -> None:
    """Execute a notebook in a folder of its own, and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, kernel_name="python3", timeout=600, record_timing=False, resources=resources)
        client.execute(env=os.environ | QUIET)
        for cell in notebook.cells:
            for output in cell.get("outputs", ()):
                if "data" in output:
                    output.data = pictured(output.data, browser, Path(folder))
    notebook.metadata = nbformat.from_dict(metadata)  # without the version of this Python
    nbformat.write(notebook, path)


def pictured(data: dict[str, Any], browser: Browser, folder: Path) -> dict[str, Any]:
    """Return what a cell displays, a page (its own or a file) or figure as a picture."""
    if FIGURE in data:
        figure: Any = pio.from_json(json.dumps(data[FIGURE]), skip_invalid=True)
        return as_png(figure.to_image("png", width=figure.layout.width or FIGURE_WIDTH, scale=WIDTH / FIGURE_WIDTH))
    frame = re.search(r'<iframe\s[^>]*?\b(srcdoc|src)="([^"]*)"', data.get("text/html", ""))
    if frame is None:
        return data
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    shown = html.unescape(frame[2])
    page.set_content(shown if frame[1] == "srcdoc" else (folder / shown).read_text(encoding="utf-8"), wait_until="load")
    page.wait_for_timeout(2000)  # until it is drawn
    picture = page.screenshot()
    page.close()
    return as_png(picture)


def as_png(picture: bytes) -> dict[str, str]:
    return {"image/png": base64.b64encode(picture).decode("ascii"), "text/plain": "run the cell to use it"}


def main(names: list[str]) -> None:
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        sys.exit("chromium: not found; install it, as the pictures are taken in it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for path in [NOTEBOOKS / name for name in names] or sorted(NOTEBOOKS.glob("*.ipynb")):
            print(path.name, flush=True)
            execute(path, browser)


if __name__ == "__main__":
    main(sys.argv[1:])
