"""Interactive pages: one HTML file each that works offline, in a notebook, or beside others that share its scripts.

A page is data and the script that draws it. `assets/` holds the frame and the style of all pages (`page.html`,
`page.css`, `page.js`) and, for each kind, its controls (`KIND.html`) and its script (`KIND.js`). Text reaches a page as
JSON or through Jinja's escaping and is put into it as text, never as HTML.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

import circuitsvis
from jaxtyping import Float
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from torch import Tensor

from mdm_interp.errors import UserError
from mdm_interp.files import write_text
from mdm_interp.viz.theme import DARK_PAGE_COLORS, PAGE_COLORS
from mdm_interp.viz.words import counted


def _circuitsvis() -> str:
    return (resources.files(circuitsvis) / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")


def asset(name: str) -> Markup:
    """Return a style or script of `assets/`, to be put into a page as it is."""
    return Markup((resources.files("mdm_interp.viz") / "assets" / name).read_text(encoding="utf-8"))


SMALL_PLOTLY = "plotly-cartesian.min.js"
"""The part of Plotly's library for plots with two axes, from the npm package plotly.js-cartesian-dist-min: a third of
the whole."""
SMALL_TRACES = frozenset(
    {"bar", "box", "contour", "heatmap", "histogram", "histogram2d", "histogram2dcontour", "image", "pie", "scatter"}
    | {"scatterternary", "violin"}
)
"""What it draws."""
LIBRARIES: Mapping[str, tuple[str, Callable[[], str]]] = {
    "circuitsvis": ("circuitsvis.js", _circuitsvis),
    "plotly": (SMALL_PLOTLY, partial(asset, SMALL_PLOTLY)),
    "whole plotly": ("plotly.min.js", get_plotlyjs),
}
"""What pages draw with: the file that pages of one folder share, and its content."""


def plotly_of(traces: Iterable[str]) -> str:
    """Return which of :data:`LIBRARIES` draws all these kinds of traces."""
    return "plotly" if SMALL_TRACES.issuperset(traces) else "whole plotly"


TEMPLATES = Environment(
    loader=PackageLoader("mdm_interp.viz", "assets"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def browser_json(value: Any, **options: Any) -> str:
    """Write JSON, in which a number that is not finite is null: browsers read no NaN."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_without_nan(value), **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


TEMPLATES.policies["json.dumps_function"] = browser_json
TEMPLATES.globals["counted"] = counted


def write_libraries(folder: Path, *names: str) -> None:
    """Write the scripts that the pages of a folder share; one that is there as it should be is not written again."""
    for name in names:
        file, content = LIBRARIES[name]
        path, text = folder / file, content()
        if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
            write_text(path, text)


@dataclass(frozen=True)
class Page:
    """An interactive page."""

    kind: str
    """Which controls and which script of `assets/` it has."""
    title: str
    about: str
    """What it shows, in words: its text alternative."""
    libraries: tuple[str, ...]
    """What it draws with, of :data:`LIBRARIES`."""
    data: Mapping[str, Any] = field(repr=False)
    """What its script reads."""
    code: str = ""
    """Python that makes it, for a reader to copy."""
    home: str = ""
    """Address of the report that it belongs to."""

    @property
    def shared(self) -> list[str]:
        """The files that pages of one folder share, of its libraries."""
        return [LIBRARIES[name][0] for name in self.libraries]

    def html(self, *, shared: bool = False) -> str:
        """Return the page as one HTML document; with `shared`, its libraries are files beside it."""
        return TEMPLATES.get_template("page.html").render(
            page=self,
            files=self.shared if shared else [],
            inlined=[] if shared else [_zipped(name) for name in self.libraries],
            asset=asset,
            colors=PAGE_COLORS,
            dark_colors=DARK_PAGE_COLORS,
        )

    def save(self, path: str | Path, *, shared: bool = False) -> Path:
        """Write the page.

        Args:
            shared: Put its libraries beside it, once for all pages of the folder, instead of into it.

        Raises:
            OSError: the file cannot be written; one that was there stays as it was.
        """
        path = Path(path)
        if shared:
            write_libraries(path.parent, *self.libraries)
        write_text(path, self.html(shared=shared))
        return path

    def _repr_html_(self) -> str:
        """Show the page in a notebook, in a frame of its own, so that neither changes the other's style. It takes its
        page's height."""
        attributes = 'style="width: 100%; height: 40rem; border: 0"'
        return f'<iframe title="{html.escape(self.title)}" srcdoc="{html.escape(self.html())}" {attributes}></iframe>'


def zipped(text: str) -> str:
    """Return a text in gzip in base64: of JSON a tenth, of a library less than half. `unzip.js` unpacks it."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")


@cache
def _zipped(library: str) -> str:
    """Return one of :data:`LIBRARIES` as a page carries it."""
    return zipped(LIBRARIES[library][1]())


def packed(shares: Float[Tensor, "*shape"]) -> str:
    """Pack numbers from 0 to 1 into 16 bits each, in base64; exact to 8e-6. `page.js` unpacks them.

    Raises:
        UserError: they are none, as those of a model whose weights are not.
    """
    if not shares.isfinite().all():
        raise UserError("model: its attention holds NaN or infinity, of which there is no page; check its weights")
    rounded = (shares.double() * 0xFFFF).round().cpu().numpy().astype("<u2")
    return base64.b64encode(rounded.tobytes()).decode("ascii")


def packed_signed(values: Float[Tensor, "*shape"]) -> dict[str, Any]:
    """Pack any numbers into 16 bits each, evenly from minus to plus the largest. What is not finite becomes 0."""
    values = values.double().nan_to_num(0, 0, 0)
    most = float(values.abs().max()) if values.numel() else 0.0
    return {"most": float(f"{most:.6g}"), "values": packed((values / (most or 1) + 1) / 2)}


def as_lists(values: Tensor) -> Any:
    """Return numbers as nested lists, to 6 significant digits; None where one is not finite, which JSON cannot say."""
    if values.ndim:
        return [as_lists(of_first) for of_first in values]
    value = float(values)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def places(count: int, chosen: Iterable[int] | None, name: str) -> list[int]:
    """Return which of `count` layers, heads or rows are `chosen`, in order; None: all.

    Raises:
        UserError: one is not there, or none is chosen.
    """
    if chosen is None:
        return list(range(count))
    wanted = sorted(set(chosen))
    if not wanted or wanted[0] < 0 or wanted[-1] >= count:
        raise UserError(f"{name}: {wanted} is no choice from 0 to {count - 1}; correct it")
    return wanted
