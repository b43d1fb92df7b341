"""What was found: sentences that follow from numbers, either way, and tables that count verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import planted_result
from ledger_helpers import ABOVE, result_of, rows_of

from mdm_interp.errors import UserError
from mdm_interp.experiments import findings
from mdm_interp.experiments.claims import judge
from mdm_interp.experiments.findings import NAMED_SETTINGS, by_region, by_setting, sentences, tables
from mdm_interp.experiments.results import Result
from mdm_interp.stats.estimates import NOTHING, Estimate
from mdm_interp.stats.summary import Entry, Summary

Numbers = Mapping[str, float | None]
"""Means by what they are of, each with an interval of 0.05 to either side; None where nothing was measured."""


def planted(numbers: Numbers) -> dict[str, Result]:
    def estimate(name: str) -> Estimate:
        value = numbers[name]
        return NOTHING if value is None else Estimate(value, value - 0.05, value + 0.05, 5 if name == "heads 8" else 10)

    cycle: dict[str, Any] = {"setting": "relation_cycle"}
    curse = [
        Entry(f"{side}_probability", {**cycle, "variant": variant}, estimate(f"{variant} {side}"))
        for variant in ("MDM rope", "ARM rope", "MDM alibi")
        for side in ("forward", "reverse")
    ]
    heads = [Entry("reverse_probability", findings._of_heads(n), estimate(f"heads {n}")) for n in findings.MANY] + [
        Entry("even_after", findings._of_heads(4), estimate("even 4"))
    ]
    model = {"model": "MDM rope, d_head 64, base 1e6", "stage": "end"}
    others = [
        Entry("reverse_probability", {**model, "reversed_share": share}, estimate(f"both ways {share}"))
        for share in (0.0, 0.8)
    ]
    entries = {"reversal_curse": curse, "head_specialisation": heads, "one_sided_routes": others}
    return {
        name: planted_result(name, [{"seed": 0}], summarize=lambda result, of=of: Summary(of))
        for name, of in entries.items()
    }


FOUND: dict[str, float | None] = {
    "MDM rope forward": 0.9,
    "MDM rope reverse": 0.8,
    "ARM rope forward": 1.0,
    "ARM rope reverse": 0.001,
    "MDM alibi forward": 0.75,
    "MDM alibi reverse": 0.74,
    "heads 1": 0.8,
    "heads 2": 0.5,
    "heads 4": 0.02,
    "heads 8": 0.01,
    "even 4": 0.6,
    "both ways 0.0": 0.2,
    "both ways 0.8": 0.7,
}


def test_each_sentence_says_what_its_numbers_are() -> None:
    assert sentences(planted(FOUND)) == [
        "Asked in reverse, a one-head MDM with RoPE gives the answer a probability of 0.80 [0.75, 0.85], an ARM 0.001; "
        "forward, they give 0.90 and 1.00 (n = 10).",
        "More heads bring the curse back: 0.50 with 2, 0.02 with 4, 0.01 with 8 (n = 5 to 10).",
        "Positions that cannot tell left from right answer both ways alike: with ALiBi, 0.74 in reverse and 0.75 "
        "forward (n = 10).",
        "With four heads the answer is stored, and the route to it fails: 0.02 becomes 0.60 if heads have to read both "
        "sides alike (n = 10).",
        "Where the source was shown on one side only, other facts help: 0.20, and 0.70 with 80 % of other facts shown "
        "both ways (n = 10).",
    ]


@pytest.mark.parametrize(
    ("changed", "place", "says"),
    [
        ({"MDM rope reverse": 0.05}, 0, "An MDM is not better in reverse than an ARM for sure: a one-head MDM"),
        ({"heads 8": 0.78}, 1, "More heads do not bring the curse back for sure: 0.50 with 2, 0.02 with 4, 0.78"),
        ({"MDM alibi reverse": 0.3}, 2, "Even positions that cannot tell left from right do worse in reverse: with"),
        ({"even 4": 0.1}, 3, "With four heads the route is not what fails for sure: 0.02 becomes 0.10"),
        ({"both ways 0.8": 0.25}, 4, "Where the source was shown on one side only, other facts do not help for sure"),
    ],
)
def test_another_sentence_appears_where_it_is_not_so(changed: Numbers, place: int, says: str) -> None:
    told = sentences(planted({**FOUND, **changed}))
    assert told[place].startswith(says)
    assert [one for i, one in enumerate(told) if i != place] == [
        one for i, one in enumerate(sentences(planted(FOUND))) if i != place
    ]


def test_nothing_is_said_of_what_was_not_measured() -> None:
    quick = {"heads 2": None, "heads 8": None}
    assert sentences(planted({**FOUND, **quick}))[1] == "More heads bring the curse back: 0.02 with 4 (n = 10)."
    nothing = dict.fromkeys(FOUND, None)
    assert sentences(planted(nothing)) == sentences({}) == []
    assert not any(math.isnan(value or 0.0) for value in FOUND.values())


def test_settings_say_how_many_measures_support_a_claim_there() -> None:
    test = replace(ABOVE, identity=lambda scope: scope["scheme"] == "alibi")
    other = replace(test, measure="another")
    rows = [row for name in ("RoPE", "ALiBi") for row in rows_of([0.8, 0.9, 0.85], **NAMED_SETTINGS[name])]
    rows += rows_of([0.0, 0.1, 0.05], **NAMED_SETTINGS["ARM"])
    rows += rows_of([0.0, 0.1, 0.05], **NAMED_SETTINGS["RoPE"] | {"mask_rate": 0.15})  # no named setting
    low = [row for row in rows_of([0.0, 0.1, 0.05], **NAMED_SETTINGS["RoPE"])]
    found = by_setting(judge([(result_of(rows), [test]), (result_of(low), [other])]))
    said = {name: cell for name, cell in found.loc["5"].items() if cell != "–"}
    assert said == {"RoPE": "1 🟢 1 🔴", "ALiBi": "1 ⚪", "ARM": "1 🟢"}


def test_the_findings_say_in_a_word_and_a_colour_what_was_found_in_each_named_setting() -> None:
    test = replace(ABOVE, identity=lambda scope: scope["scheme"] in ("alibi", "none"))
    rows = [
        row
        for name, setting in NAMED_SETTINGS.items()
        if name != "learned"
        for row in rows_of([0.0, 0.1, 0.05] if name in ("4 heads", "ARM") else [0.8, 0.9, 0.85], **setting, stage="end")
    ]
    rows += rows_of([0.3, 0.9], **NAMED_SETTINGS["learned"], stage="end")
    rows += rows_of([0.0, 0.1, 0.05], **NAMED_SETTINGS["RoPE"], stage="early")
    head, _, line, *_, failed = tables(judge([(result_of(rows), [test])])).splitlines()
    said = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert said["RoPE"] == "🟢 holds", "the last stage counts"
    assert said["4 heads"] == "🔴 fails" and said["ARM"] == "🟢 fails"
    assert said["ALiBi"] == said["NoPE"] == "⚪ by construction"
    assert said["learned"] == "🟡 inconclusive"
    assert said["all settings |"] == "6 holds, 1 fails, 1 inconclusive |"
    assert failed == "- **5**, m: relation_cycle, any_order rope, 1 layer, 4 heads of 16"
    assert "–" in tables(judge([(result_of(rows_of([0.8, 0.9, 0.85])), [ABOVE])]))


def test_each_region_of_the_map_says_what_its_lines_say_of_the_paper() -> None:
    for_it, against, neither = [0.8, 0.9, 0.85], [0.0, 0.1, 0.05], [0.3, 0.9]
    planted = [
        (for_it, {"n_heads": 1}),
        (for_it, {"n_heads": 1, "scheme": "learned"}),
        (against, {"n_heads": 4}),
        (neither, {"n_heads": 8}),
        (for_it, {"n_heads": 1, "world": "symmetric_pool"}),
        (against, {"n_heads": 4, "n_layers": 2, "world": "symmetric_pool"}),
        (for_it, {"n_heads": 1, "scheme": "alibi"}),  # by construction
        (for_it, {"n_heads": 1, "objective": "causal"}),
        (for_it, {"n_heads": 1, "objective": "source_only"}),
        (for_it, {"n_heads": 1, "attention": "causal"}),
    ]
    rows = [row for values, setting in planted for row in rows_of(values, stage="end", **setting)]
    rows += rows_of(against, stage="early", n_heads=1)  # only the last stage counts
    test = replace(ABOVE, identity=lambda scope: scope["scheme"] == "alibi")
    found = by_region(judge([(result_of(rows), [test])]))
    assert found.loc["5"].to_dict() == {
        "one head": "2 🟢",
        "several heads": "1 🔴 1 🟡",
        "sources on one side": "1 🟢",
        "several layers": "1 🔴",
    }
    assert by_region([]).empty


def test_what_was_found_is_written_between_the_marks_that_are_there(tmp_path: Path) -> None:
    verdicts, results = judge([(result_of(rows_of([0.8, 0.9, 0.85])), [ABOVE])]), planted(FOUND)
    (first, last), (start, end) = findings.marks("what was found"), findings.marks("findings")
    path = tmp_path / "README.md"
    path.write_text(f"before\n{first}STALE\n{last}between\n{start}{end}after\n", encoding="utf-8")
    findings.write(verdicts, results, path)
    once = path.read_text(encoding="utf-8")
    assert once == (
        f"before\n{first}\n{findings.overview(verdicts, results)}\n{last}between\n{start}\n"
        f"{tables(verdicts)}\n{end}after\n"
    )
    assert "1. Asked in reverse, " in once and "STALE" not in once
    findings.write(verdicts, results, path)
    assert path.read_text(encoding="utf-8") == once
    for text in ("no marks", f"{first} without its end"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"README\.md: no place for the findings"):
            findings.write(verdicts, results, path)
        assert path.read_text(encoding="utf-8") == text
