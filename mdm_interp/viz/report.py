"""Figures as files: HTML that works offline with one shared plotly.js, PNG where a browser is there, an index page."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
import plotly.io as pio
from jinja2 import Environment
from plotly.offline import get_plotlyjs

from mdm_interp.claims import Verdict
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
.ledger { max-height: 32rem; overflow: auto; font-size: 14px; }
.ledger th { position: sticky; top: 0; background: white; }
.filters label { margin-right: 1rem; white-space: nowrap; }
td.holds { color: #0072B2; font-weight: bold; } td.fails { color: #D55E00; font-weight: bold; }
code { background: #f3f3f3; padding: 0 0.25rem; }
</style>
</head>
<body>
<h1>mdm_interp: figures</h1>
<p>Every number is a mean over seeds with its 95 % bootstrap interval, computed from the rows of its JSON file.</p>
{% if verdicts %}
<section id="claims">
<h2>The paper's claims, setting by setting</h2>
<p>Each verdict is computed from the rows of the figure it links to; p is adjusted for all verdicts
(Benjamini-Hochberg). A claim may hold early and fail at the end.</p>
<p class="filters">
{% for name, values in filters.items() %}
<label>{{ name }} <select data-column="{{ loop.index0 }}"><option value="">all</option>
{% for value in values %}
<option>{{ value }}</option>
{% endfor %}
</select></label>
{% endfor %}
<span id="shown" aria-live="polite"></span>
</p>
<div class="ledger">
<table id="ledger">
<thead><tr>{% for name in filters %}<th>{{ name }}</th>{% endfor %}
<th>measure</th><th>effect</th><th>null</th><th>p</th><th>figure</th></tr></thead>
<tbody>
{% for verdict, cells in verdicts %}
<tr>{% for cell in cells %}<td{% if loop.last %} class="{{ cell }}"{% endif %}>{{ cell }}</td>{% endfor %}
<td title="{{ verdict.rule }}; null: {{ verdict.null_is }}">{{ verdict.measure }}</td>
<td>{{ verdict.effect }}, n = {{ verdict.effect.n }}</td><td>{{ verdict.null }}</td>
<td>{{ "%.2g"|format(verdict.p) }}</td>
<td><a href="{{ verdict.figure }}.html">{{ verdict.figure }}</a>
(<a href="{{ verdict.figure }}.json">rows</a>)</td></tr>
{% endfor %}
</tbody>
</table>
</div>
<details><summary>The claims and their rules</summary><ul>
{% for sentence in sentences %}
<li>{{ sentence }}</li>
{% endfor %}
</ul></details>
<script>
const filters = [...document.querySelectorAll(".filters select")];
function filterLedger() {
  let shown = 0;
  for (const row of document.querySelectorAll("#ledger tbody tr")) {
    row.hidden = !filters.every(f => !f.value || row.cells[f.dataset.column].textContent === f.value);
    shown += !row.hidden;
  }
  document.getElementById("shown").textContent = shown + " verdicts";
}
for (const filter of filters) filter.addEventListener("change", filterLedger);
filterLedger();
</script>
</section>
{% endif %}
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


def _cells(verdict: Verdict) -> list[str]:
    """What a verdict is filtered by."""
    scope = verdict.scope
    depth = f"{scope['n_layers']}{' + MLP' if scope['mlp'] else ''}"
    by = [verdict.claim["id"], scope["world"], scope["scheme"], scope["objective"], depth, scope["stage"]]
    return [*map(str, by), verdict.verdict]


FILTERS = ("claim", "world", "scheme", "objective", "layers", "stage", "verdict")


def write_index(drawn: Sequence[tuple[Result, go.Figure]], verdicts: Sequence[Verdict], out: Path) -> None:
    """Write index.html: the claims ledger, and every figure, its question and its numbers."""
    rows = [(verdict, _cells(verdict)) for verdict in verdicts]
    filters = {name: list(dict.fromkeys(cells[i] for _, cells in rows)) for i, name in enumerate(FILTERS)}
    sentences = dict.fromkeys(
        f"Claim {verdict.claim['id']}: {verdict.claim['sentence']} Measured: {verdict.measure}. Null: "
        f"{verdict.null_is}. Rule: {verdict.rule}."
        for verdict in verdicts
    )
    entries = [(result, _div(figure, f"figure-{result.name}")) for result, figure in drawn]
    write_text(
        out / "index.html",
        _INDEX.render(entries=entries, plotly=PLOTLY, verdicts=rows, filters=filters, sentences=sentences),
    )
