"""The influence page: its numbers are the measure's, and hostile tokens stay text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from helpers import TINY, random_model
from page_helpers import HOSTILE, expect, opened

from mdm_interp import viz
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.errors import UserError
from mdm_interp.measures.gradients import GROUPS, Influence, influence

if TYPE_CHECKING:
    from playwright.sync_api import Browser

MASK = TINY["d_vocab"] - 1
PAIRS = [
    QueryPair(Query((MASK, 5, 3), (1,), (0, 1), (2, 3)), Query((3, 5, MASK), (1,), (2, 3), (0, 1)), 0, "left"),
    QueryPair(Query((4, 5, MASK), (2,), (2, 3), (0, 1)), Query((MASK, 5, 4), (2,), (0, 1), (2, 3)), 1, "right"),
]
SENTENCES = [(1, 5, 3), (4, 5, 2), (6, 7, 8, 9), (0, 1, 5)]


def measured(**changes: Any) -> tuple[Any, Influence]:
    model = random_model(mask_token_id=MASK, d_mlp=20, **changes)
    return model, influence(model, SENTENCES, [pair.forward for pair in PAIRS] + [pair.reverse for pair in PAIRS])


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_a_page_holds_the_strongest_sentences_of_both_queries(attention: str) -> None:
    pairs = PAIRS
    model = random_model(mask_token_id=MASK, attention=attention)
    if attention == "causal":
        pairs = [QueryPair(pair.forward, pair.forward, pair.fact, pair.side) for pair in PAIRS[1:]]
    queries = [pair.forward for pair in pairs] + [pair.reverse for pair in pairs]
    found = influence(model, SENTENCES, queries)
    page = viz.influence(model, SENTENCES, pairs, found, top=2)
    for at, pair in enumerate(page.data["pairs"]):
        for way, place in (("forward", at), ("reverse", at + len(pairs))):
            helping, hurting = found.top(place, 2)
            assert [one["sentence"] for one in pair[way]["helping"]] == helping
            assert [one["sentence"] for one in pair[way]["hurting"]] == hurting
            for one in pair[way]["helping"] + pair[way]["hurting"]:
                sentence = one["sentence"]
                assert one["total"] == pytest.approx(found.total[sentence, place].item(), rel=1e-5)
                groups = [found.group(name)[sentence, place].item() for name in GROUPS]
                assert one["groups"] == pytest.approx(groups, rel=1e-5, abs=1e-12)
                tokens = found.by_token[sentence, : len(SENTENCES[sentence]), place].tolist()
                assert one["tokens"] == pytest.approx(tokens, rel=1e-5, abs=1e-12)
                assert page.data["sentences"][sentence] == [str(token) for token in SENTENCES[sentence]]


def test_groups_are_divided_by_layer() -> None:
    model, found = measured()
    data = viz.influence(model, SENTENCES, PAIRS, found).data
    assert data["layers"] == ["outside of layers", *(f"layer {layer}" for layer in range(model.cfg.n_layers))]
    for one in data["pairs"][0]["forward"]["helping"]:
        for total, parts in zip(one["groups"], one["layers"], strict=True):
            assert total == pytest.approx(sum(part for part in parts if part is not None), rel=1e-4, abs=1e-9)
        inside = {
            row["layer"]: row["influence"]
            for row in found.rows(9)
            if row["group"] == "storage" and (row["query"], row["sentence"]) == (0, one["sentence"])
        }
        storage = one["layers"][list(GROUPS).index("storage")]
        assert storage == [None, *(pytest.approx(inside[layer], rel=1e-5) for layer in range(model.cfg.n_layers))]


def test_the_influence_of_something_else_is_refused() -> None:
    model, found = measured()
    with pytest.raises(UserError, match="found: is of 4 sentences and 4 queries, and there are 3"):
        viz.influence(model, SENTENCES[:3], PAIRS, found)


def test_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    model, found = measured()
    names = [*HOSTILE, *map(str, range(len(HOSTILE), TINY["d_vocab"]))]

    model.tokenizer = SimpleNamespace(decode=lambda tokens: names[tokens[0]])  # type: ignore[assignment]
    viz.influence(model, SENTENCES, PAIRS, found).save(tmp_path / "page.html")
    for width in (1400, 700):
        with opened(browser, tmp_path / "page.html", viewport={"width": width, "height": 900}) as (tab, problems):
            tab.locator("#pair").select_option("1")
            for way, place in (("forward", 1), ("reverse", 3)):
                helping, hurting = found.top(place, 5)
                expect(tab.locator(f"#{way}-helping article")).to_have_count(len(helping))
                expect(tab.locator(f"#{way}-hurting article")).to_have_count(len(hurting))
                first = tab.locator(f"#{way}-helping article").first.locator("li")
                shown = [names[token].replace("\n", "⏎") for token in SENTENCES[helping[0]]]
                assert first.all_text_contents() == shown
                signs = ["hurts" if value < 0 else "helps" for value in found.by_token[helping[0], :, place].tolist()]
                classes = [str(item.get_attribute("class")).split()[0] for item in first.all()]
                assert classes == signs[: len(shown)]
                marks = [item.evaluate("item => getComputedStyle(item, '::before').content") for item in first.all()]
                assert marks == [{"helps": '"+"', "hurts": '"−"'}[sign] for sign in classes], "not by colour alone"
                table = tab.locator(f"#{way}-helping details").first
                expect(table.locator("table")).to_be_hidden()
                table.locator("summary").click()
                expect(table.locator("tr")).to_have_count(2 + model.cfg.n_layers)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert problems == []
