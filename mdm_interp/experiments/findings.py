"""What was found, in words and in tables. All of it is computed from results and from the ledger's verdicts.

sentences(results)     # a few, each under the condition that makes it true
by_setting(verdicts)   # claims and named settings: how many measures support the paper there
write(verdicts, results, "README.md")    # both between the marks of a file
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mdm_interp.errors import UserError
from mdm_interp.experiments import grids
from mdm_interp.experiments.claims import CLAIMS, OUTCOMES, Outcome, Verdict
from mdm_interp.experiments.results import Result
from mdm_interp.experiments.scope import STAGES, scope_label, scope_of
from mdm_interp.files import write_text
from mdm_interp.stats.estimates import Estimate
from mdm_interp.stats.summary import Summary

# ---- in words


def sentences(results: Mapping[str, Result]) -> list[str]:
    """Say what was found, in one sentence for each question that the results (by analysis name) answer. Where one
    number is said to be above another, their 95 % intervals are apart."""
    told = [tell(results[name].summary) for name, tell in SENTENCES if name in results]
    return [sentence for sentence in told if sentence]


def _curse(summary: Summary) -> str:
    mdm, arm = (_in_the_cycle(summary, "reverse", variant) for variant in ("MDM rope", "ARM rope"))
    forward = [_in_the_cycle(summary, "forward", variant).value for variant in ("MDM rope", "ARM rope")]
    if not mdm.n or not arm.n:
        return ""
    told = (
        f"a one-head MDM with RoPE gives the answer a probability of {_said(mdm)}, an ARM {arm.value:.3f}; forward, "
        f"they give {forward[0]:.2f} and {forward[1]:.2f} ({_seeds(mdm, arm)})"
    )
    begin = "Asked in reverse," if _above(mdm, arm) else "An MDM is not better in reverse than an ARM for sure:"
    return f"{begin} {told}."


def _heads(summary: Summary) -> str:
    one, *more = (summary.at("reverse_probability", **_of_heads(n)) for n in MANY)
    measured = {n: estimate for n, estimate in zip(MANY[1:], more, strict=True) if estimate.n}
    if not one.n or not measured:
        return ""
    told = ", ".join(f"{estimate.value:.2f} with {n}" for n, estimate in measured.items())
    fewer = all(_above(one, estimate) for n, estimate in measured.items() if n >= 4)
    begin = "More heads bring the curse back" if fewer else "More heads do not bring the curse back for sure"
    return f"{begin}: {told} ({_seeds(*measured.values())})."


def _schemes(summary: Summary) -> str:
    forward, reverse = (_in_the_cycle(summary, side, "MDM alibi") for side in ("forward", "reverse"))
    if not reverse.n:
        return ""
    told = f"with ALiBi, {reverse.value:.2f} in reverse and {forward.value:.2f} forward ({_seeds(reverse)})"
    begin = "Even positions that cannot tell left from right do worse in reverse"
    if reverse.value > 0.9 * forward.value:
        begin = "Positions that cannot tell left from right answer both ways alike"
    return f"{begin}: {told}."


def _route(summary: Summary) -> str:
    before, after = (summary.at(name, **_of_heads(4)) for name in ("reverse_probability", "even_after"))
    if not before.n or not after.n:
        return ""
    told = f"{before.value:.2f} becomes {after.value:.2f} if heads have to read both sides alike ({_seeds(after)})"
    fails = (
        "the answer is stored, and the route to it fails"
        if _above(after, before)
        else "the route is not what fails for sure"
    )
    return f"With four heads {fails}: {told}."


def _others(summary: Summary) -> str:
    none, most = (
        summary.at("reverse_probability", model="MDM rope, d_head 64, base 1e6", reversed_share=share, stage="end")
        for share in (0.0, 0.8)
    )
    if not none.n or not most.n:
        return ""
    told = f"{none.value:.2f}, and {most.value:.2f} with 80 % of other facts shown both ways ({_seeds(none, most)})"
    help_or_not = "help" if _above(most, none) else "do not help for sure"
    return f"Where the source was shown on one side only, other facts {help_or_not}: {told}."


MANY = (1, 2, 4, 8)
SENTENCES: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    ("reversal_curse", _curse),
    ("head_specialisation", _heads),
    ("reversal_curse", _schemes),
    ("head_specialisation", _route),
    ("one_sided_routes", _others),
)
"""The analysis that each sentence is about, and what writes it from that analysis' summary: an empty text where the
summary lacks what it needs."""


def _in_the_cycle(summary: Summary, side: str, variant: str) -> Estimate:
    return summary.at(f"{side}_probability", setting="relation_cycle", variant=variant)


def _of_heads(n_heads: int) -> dict[str, Any]:
    """Return where `head_specialisation` has an any-order RoPE model whose heads share its width."""
    config = grids.small_model(grids.CYCLE, "rope", "any_order", 0, n_heads=n_heads)
    return scope_of(config.model, config.facts.world, config.objective) | {"stage": "end"}


def _above(one: Estimate, other: Estimate) -> bool:
    return one.low > other.high


def _said(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _seeds(*estimates: Estimate) -> str:
    counts = sorted({estimate.n for estimate in estimates})
    return f"n = {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}"


# ---- in tables


def _setting(**different: Any) -> dict[str, Any]:
    base = {"world": "relation_cycle", "reversed_share": 0.0, "objective": "any_order", "mask_rate": 0.0}
    base |= {"attention": "bidirectional", "n_layers": 1, "n_heads": 1, "d_head": 64, "mlp": False}
    return {**base, **different}


NAMED_SETTINGS: dict[str, dict[str, Any]] = {
    "RoPE": _setting(scheme="rope"),
    "ALiBi": _setting(scheme="alibi"),
    "NoPE": _setting(scheme="none"),
    "learned": _setting(scheme="learned"),
    "T5": _setting(scheme="t5_bias"),
    "sinusoidal": _setting(scheme="sinusoidal"),
    "4 heads": _setting(scheme="rope", n_heads=4, d_head=16),
    "deep": _setting(scheme="rope", n_layers=4, mlp=True),
    "one side": _setting(scheme="rope", world="symmetric_pool", rotary_base=1e6),
    "one masked": _setting(scheme="rope", objective="target_only"),
    "ARM": _setting(scheme="rope", objective="causal", attention="causal"),
}
"""The settings that tables of findings show, by columns of their scope. An MDM with RoPE, one layer and one head, and
facts in which every entity is a source on both sides, unless the name says otherwise: NoPE has no positions, `deep`
four layers with MLP; of `one side`, training shows the source of a tested fact on one side only, and for `one masked`
only the right entity is ever masked."""

SIGNS = {"supports the paper": "🟢", "confirms the paper": "🟢", "contradicts the paper": "🔴"}
"""What a verdict's reading looks like in the tables of findings."""
OPEN, GIVEN = "🟡", "⚪"
"""What is left open, and what is true or false by construction."""

REGIONS = ("one head", "several heads", "sources on one side", "several layers")
"""The regions of the map that MDMs are in, as :func:`region_of` tells them apart."""


def region_of(scope: Mapping[str, Any]) -> str | None:
    """Return which of :data:`REGIONS` a setting is in; None for an ARM, other objectives, and all settings together.

    Several layers come first, then facts whose source training shows on one side only, then the number of heads.
    """
    if scope["world"] is None or scope["objective"] != "any_order" or scope["attention"] == "causal":
        return None
    if scope["n_layers"] > 1:
        return "several layers"
    if scope["world"] == "symmetric_pool":
        return "sources on one side"
    return "one head" if scope["n_heads"] == 1 else "several heads"


def at_last_stage(verdicts: Sequence[Verdict]) -> Iterator[tuple[str, str, list[Verdict]]]:
    """Give the claim, the measure, and the verdicts of it at its last stage, measure by measure."""
    for (claim, measure), group in itertools.groupby(verdicts, key=lambda one: (one.claim["id"], one.measure)):
        every = list(group)
        stages = [str(verdict.scope["stage"]) for verdict in every]
        end = max(stages, key=lambda stage: STAGES.index(stage) if stage in STAGES else len(STAGES))
        yield claim, measure, [verdict for verdict in every if verdict.scope["stage"] == end]


def by_region(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Count what lines that could come out either way say of the paper, each measure at its last stage: index claim
    id, columns :data:`REGIONS`, as in `3 🟢 1 🔴 2 🟡` (supports it, contradicts it, leaves it open)."""
    return _counted_at(verdicts, REGIONS, lambda one: [region_of(one.scope)] if one.role == "test" else [])


def by_setting(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Count the same, and what is true or false by construction (`⚪`), in :data:`NAMED_SETTINGS`, its columns. An ARM
    is there too, for which claims are expected to fail."""

    return _counted_at(verdicts, tuple(NAMED_SETTINGS), lambda one: settings_of(one.scope))


def settings_of(scope: Mapping[str, Any]) -> list[str]:
    """Return which of :data:`NAMED_SETTINGS` a scope is of."""
    return [name for name, setting in NAMED_SETTINGS.items() if setting.items() <= scope.items()]


def _counted_at(
    verdicts: Sequence[Verdict], columns: Sequence[str], places: Callable[[Verdict], Sequence[str | None]]
) -> pd.DataFrame:
    marks: dict[tuple[str, str | None], list[str]] = {}
    for claim, _, last in at_last_stage(verdicts):
        for verdict in last:
            for place in places(verdict):
                marks.setdefault((claim, place), []).append(_mark(verdict))
    told = {
        at: " ".join(f"{found.count(mark)} {mark}" for mark in ("🟢", "🔴", OPEN, GIVEN) if mark in found)
        for at, found in marks.items()
    }
    claims = dict.fromkeys(verdict.claim["id"] for verdict in verdicts)
    rows = [[told.get((claim, column), "–") for column in columns] for claim in claims]
    return pd.DataFrame(rows, index=pd.Index(list(claims), name="claim"), columns=list(columns))


def _mark(verdict: Verdict) -> str:
    return GIVEN if verdict.role == "identity" else SIGNS.get(verdict.reading, OPEN)


# ---- in files


def overview(verdicts: Sequence[Verdict], results: Mapping[str, Result]) -> str:
    """Write in Markdown what was found: the sentences, and a table of claims and :data:`NAMED_SETTINGS`."""
    numbered = [f"{i}. {sentence}" for i, sentence in enumerate(sentences(results), start=1)]
    return "\n".join([*numbered, "", *_table(by_setting(verdicts))]) + "\n"


def tables(verdicts: Sequence[Verdict]) -> str:
    """Write the ledger in Markdown: a table of claims and :data:`NAMED_SETTINGS`, each measure at its last stage, with
    counts over all settings; a table of claims and :data:`REGIONS`; and a list of the settings in which a claim
    fails."""
    columns = [*NAMED_SETTINGS, "all settings"]
    table = [f"| claim | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    failures = []
    for claim, measure, last in at_last_stage(verdicts):
        tested = [verdict for verdict in last if verdict.role == "test"]
        cells = [_cell(last, setting) for setting in NAMED_SETTINGS.values()]
        cells.append(_counted([verdict.verdict for verdict in tested]))
        table.append(f"| **{claim}.** {CLAIMS[claim]}<br>*{measure}* | {' | '.join(cells)} |")
        failed = [
            scope_label({name: value for name, value in verdict.scope.items() if name != "stage"})
            for verdict in tested
            if verdict.verdict == "fails"
        ]
        if failed:
            failures.append(f"- **{claim}**, {measure}: {'; '.join(failed)}")
    told = [
        *table,
        "",
        "By region of the map, lines of all measures that support, contradict or leave open a claim:",
        "",
        *_table(by_region(verdicts)),
    ]
    return "\n".join([*told, "", "Where a claim fails:", "", *(failures or ["- nowhere"])]) + "\n"


def _table(counted: pd.DataFrame) -> list[str]:
    rows = counted.T.to_dict("list").items()
    return [
        f"| claim | {' | '.join(counted.columns)} |",
        "|" + "---|" * (len(counted.columns) + 1),
        *(f"| **{claim}.** {CLAIMS[str(claim)]} | {' | '.join(row)} |" for claim, row in rows),
    ]


def _cell(verdicts: Sequence[Verdict], setting: Mapping[str, Any]) -> str:
    """Say in a word, after a colour, what was found in a setting; a dash where nothing was measured."""
    found = [verdict for verdict in verdicts if setting.items() <= verdict.scope.items()]
    if not found:
        return "–"
    return f"{_mark(found[0])} {'by construction' if found[0].role == 'identity' else found[0].verdict}"


def _counted(outcomes: Sequence[Outcome]) -> str:
    """Say how many of each outcome there are."""
    return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in OUTCOMES if outcome in outcomes) or "–"


WRITTEN: dict[str, Callable[[Sequence[Verdict], Mapping[str, Result]], str]] = {
    "what was found": overview,
    "findings": lambda verdicts, results: tables(verdicts),
}
"""What is written between which marks of a file."""


def marks(name: str) -> tuple[str, str]:
    """Return the lines before and after what is written."""
    return f"<!-- {name}: written by `mdm-interp verify --readme` -->\n", f"<!-- end of {name} -->\n"


def write(verdicts: Sequence[Verdict], results: Mapping[str, Result], path: str | Path) -> None:
    """Put what was found between the marks of a Markdown file, atomically: of each in :data:`WRITTEN` whose marks are
    there.

    Raises:
        UserError: the file is missing or has no marks.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        there = [name for name in WRITTEN if marks(name)[0] in text]
        if not there:
            raise ValueError("it has no marks")
        for name in there:
            start, end = marks(name)
            before, rest = text.split(start)
            _, after = rest.split(end)
            text = f"{before}{start}\n{WRITTEN[name](verdicts, results)}\n{end}{after}"
    except (OSError, ValueError) as error:
        start, end = marks("findings")
        raise UserError(f"{path}: no place for the findings ({error}); add the lines {start!r}, {end!r}") from error
    write_text(path, text)
