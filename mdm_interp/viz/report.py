"""Figures as files: HTML that works offline with one shared plotly.js, PNG where a browser is there, an index page."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
import plotly.io as pio
from jinja2 import Environment
from plotly.offline import get_plotlyjs

from mdm_interp.files import write_text
from mdm_interp.results import Result

PLOTLY = "plotly.min.js"

_ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)

_FIGURE = _ENVIRONMENT.from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ result.question }}</title>
<script src="{{ plotly }}"></script>
</head>
<body>
{{ figure|safe }}
<p><a href="index.html">All figures</a> · <a href="{{ result.name }}.json">The numbers</a></p>
</body>
</html>
""")

_INDEX = _ENVIRONMENT.from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mdm_interp: figures</title>
<script src="{{ plotly }}"></script>
<style>
body { font: 17px/1.5 "DejaVu Sans", Verdana, sans-serif; color: #222; }
body { max-width: 1440px; margin: 2rem auto; padding: 0 1rem; }
section { margin: 3rem 0; border-top: 1px solid #ccc; }
.figure { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.9rem 0.15rem 0; text-align: left; border-bottom: 1px solid #eee; }
code { background: #f3f3f3; padding: 0 0.25rem; }
</style>
</head>
<body>
<h1>mdm_interp: figures</h1>
<p>Every number is a mean over seeds with its 95 % bootstrap interval, computed from the rows of its JSON file.</p>
<nav><ol>
{% for result, figure in entries %}
<li><a href="#{{ result.name }}">{{ result.question }}</a></li>
{% endfor %}
</ol></nav>
{% for result, figure in entries %}
<section id="{{ result.name }}">
<h2>{{ result.question }}</h2>
<div class="figure">{{ figure|safe }}</div>
<p><a href="{{ result.name }}.html">This figure alone</a> · <a href="{{ result.name }}.json">its rows</a> ·
{{ result.seeds|length }} seeds ·
<code>mdm-interp reproduce --only {{ result.name }} --seeds {{ result.seeds|length }}</code></p>
<details><summary>Its numbers</summary>
<table>
<tr><th>quantity</th><th>mean</th><th>95 % interval</th><th>n</th></tr>
{% for name, estimate in result.summary.items() %}
<tr><td>{{ name }}</td><td>{{ "%.3g"|format(estimate.value) }}</td>
<td>{{ "%.3g"|format(estimate.low) }} to {{ "%.3g"|format(estimate.high) }}</td><td>{{ estimate.n }}</td></tr>
{% endfor %}
</table>
</details>
</section>
{% endfor %}
</body>
</html>
""")


def _div(figure: go.Figure, name: str) -> str:
    return pio.to_html(figure, include_plotlyjs=False, full_html=False, div_id=name, config={"displaylogo": False})


def write_figures(drawn: Sequence[tuple[Result, go.Figure]], out: Path) -> str | None:
    """Write each figure as NAME.html and NAME.png, and the plotly.js they share.

    Returns:
        Why there are no PNGs, on one line; None when there are.
    """
    write_text(out / PLOTLY, get_plotlyjs())
    for result, figure in drawn:
        page = _FIGURE.render(result=result, figure=_div(figure, result.name), plotly=PLOTLY)
        write_text(out / f"{result.name}.html", page)
    figures = [figure for _, figure in drawn]
    sizes = {
        "width": [figure.layout.width for figure in figures],
        "height": [figure.layout.height for figure in figures],
    }
    with tempfile.TemporaryDirectory(dir=out) as folder:
        images: list[str | Path] = [Path(folder) / f"{result.name}.png" for result, _ in drawn]
        try:
            pio.write_images(figures, images, **sizes)
        except Exception as error:  # Kaleido's own are many, and none should cost the user the rest
            reason = str(error).strip().splitlines()
            return f"no PNGs: {reason[0] if reason else type(error).__name__}"
        for image in images:
            Path(image).replace(out / Path(image).name)
    return None


def write_index(drawn: Sequence[tuple[Result, go.Figure]], out: Path) -> None:
    """Write index.html: every figure, its question and its numbers."""
    entries = [(result, _div(figure, f"figure-{result.name}")) for result, figure in drawn]
    write_text(out / "index.html", _INDEX.render(entries=entries, plotly=PLOTLY))
