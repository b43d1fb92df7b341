"""The routes page: its numbers are those of the measures and of a plain cache, and its controls show all of them."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers import TINY, random_model, tiny_run
from hypothesis import given
from hypothesis import strategies as st
from model_helpers import SHAPE, llama_bridge, mirrored_pairs
from page_helpers import HOSTILE, expect, middle_of, opened, point_of

from mdm_interp import viz
from mdm_interp.config import FactConfig
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.errors import UserError
from mdm_interp.measures.parity import score_parity
from mdm_interp.measures.routes import compute_routes
from mdm_interp.training.loop import train
from mdm_interp.training.runs import Run
from mdm_interp.viz.pages import routes
from mdm_interp.viz.pages.page import Page, as_lists
from mdm_interp.viz.pages.routes import evenly
from mdm_interp.viz.theme import PAGE_COLORS

if TYPE_CHECKING:
    from playwright.sync_api import Browser

MASK = TINY["d_vocab"] - 1
PAIR = QueryPair(
    Query((MASK, MASK, 5, 3, 7, 4), (1, 2), (0, 2), (4, 6)),
    Query((7, 4, 5, 3, MASK, MASK, 6), (1, 2), (4, 6), (0, 2)),
    fact=0,
    side="left",
)
"""Spans of two tokens, and a reverse query that is one token longer."""
SIDES = ("forward", "reverse")


def patterns(page: Page, side: str, checkpoint: int = -1) -> np.ndarray:
    """[layer head row token]"""
    shape = len(page.data["heads"]), len(page.data[side]["rows"]), len(page.data[side]["tokens"])
    layers = page.data["checkpoints"][checkpoint]["patterns"][side]
    return np.stack([np.frombuffer(base64.b64decode(of), dtype="<u2").reshape(shape) / 0xFFFF for of in layers])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def run(store: Path) -> Run:
    config = tiny_run(FactConfig(n_entities=9, n_filler=4), "rope", "any_order", 0)
    return train(config, root=store, progress=False)


@pytest.fixture(scope="module")
def arm(store: Path) -> Run:
    return train(tiny_run(FactConfig(n_entities=9, n_filler=4), "rope", "causal", 0), root=store, progress=False)


# ---- what a page holds


@pytest.mark.parametrize("position", ["rope", "alibi", "learned"])
@pytest.mark.parametrize("shift", [0, -1])
@torch.no_grad()
def test_all_numbers_follow_from_a_cache(position: str, shift: int) -> None:
    """Recomputed the plain way, from whole activations."""
    model = random_model(position=position, mask_token_id=MASK, readout_shift=shift)
    pair = PAIR
    if shift:  # position 0 has no prediction
        forward = Query((8, *PAIR.forward.tokens), (1, 2), (1, 3), (5, 7))
        pair = QueryPair(forward, PAIR.reverse, 0, "left")
    page = viz.routes(model, pair)
    (found,) = page.data["checkpoints"]
    scores = {}
    for side, query in zip(SIDES, (pair.forward, pair.reverse), strict=True):
        logits, cache = model.run_with_cache(torch.tensor([query.tokens]))
        rows = [at + shift for at in range(*query.answer_span)]
        source = list(range(*query.source_span))
        pattern = torch.stack([cache["pattern", layer][0] for layer in range(2)])  # [layer head row token]
        assert patterns(page, side) == pytest.approx(pattern.numpy(), abs=1e-5)
        assert (page.data[side]["readout"], page.data[side]["source"]) == (rows, query.source_span)

        def route(of: torch.Tensor, rows: list[int] = rows, source: list[int] = source) -> torch.Tensor:
            return of[..., source].sum(-1)[..., rows].mean(-1)

        assert np.array(found["route"][side]) == pytest.approx(route(pattern).numpy(), rel=1e-4)
        scores[side] = route(torch.stack([cache["attn_scores", layer][0] for layer in range(2)]))
        direction = (model.state_dict()["ln_final.w"][:, None] * model.W_U[:, list(query.answer)]).sum(1)
        values = torch.stack([cache["v", layer][0, source].sum(0) for layer in range(2)])  # [layer head d_head]
        evidence = torch.einsum("lhd,lhdm,m->lh", values, model.W_O, direction)
        assert np.array(found["evidence"][side]) == pytest.approx(evidence.numpy(), rel=1e-4, abs=1e-5)
        probs = logits[0, rows].softmax(-1)
        expected = probs[[0, 1], list(query.answer)].prod()
        assert found["probability"][side] == pytest.approx(float(expected), rel=1e-4)
    even, odd = (scores["forward"] + scores["reverse"]) / 2, (scores["forward"] - scores["reverse"]) / 2
    parity = {name: np.array(values) for name, values in found["parity"].items()}
    assert parity["even"] == pytest.approx(even.numpy(), rel=1e-4, abs=1e-5)
    assert parity["odd"] == pytest.approx(odd.numpy(), rel=1e-4, abs=1e-5), "forward, the source is on the right"
    assert parity["selectivity"] == pytest.approx((odd**2 / (even**2 + odd**2)).numpy(), rel=1e-3, abs=1e-5)


def test_numbers_are_the_measures_own_at_every_checkpoint(run: Run) -> None:
    pair = run.query_pairs()[3]
    page = viz.routes(run, pair)
    assert page.data["steps"] == run.steps
    assert len(page.data["checkpoints"]) == len(run.steps) > 2
    for step, found in zip(run.steps, page.data["checkpoints"], strict=True):
        model = run.model(step)
        forward, reverse = compute_routes(model, [pair.forward, pair.reverse]).pattern
        assert np.array(found["route"]["forward"]) == pytest.approx(forward.numpy(), rel=1e-5)
        assert np.array(found["route"]["reverse"]) == pytest.approx(reverse.numpy(), rel=1e-5)
        assert np.array(found["parity"]["odd"]) == pytest.approx(score_parity(model, [pair]).odd[0].numpy(), rel=1e-4)
    names = run.facts.token_names
    assert page.data["reverse"]["tokens"] == [names[token] for token in pair.reverse.tokens]


def test_chosen_layers_and_heads_are_a_part_of_the_whole() -> None:
    model = random_model(mask_token_id=MASK)
    page, whole = viz.routes(model, PAIR, layers=[1], heads=[3, 0]), viz.routes(model, PAIR)
    assert (page.data["layers"], page.data["heads"]) == ([1], [0, 3])
    for side in SIDES:
        assert patterns(page, side) == pytest.approx(patterns(whole, side)[1:][:, [0, 3]])
        for measure in ("route", "evidence"):
            part, all_of_it = (np.array(of.data["checkpoints"][0][measure][side]) for of in (page, whole))
            assert part == pytest.approx(all_of_it[1:][:, [0, 3]])


def test_a_bridge_gives_the_page_of_its_twin(tmp_path: Path) -> None:
    model = random_model(**SHAPE, attention="causal", gated_mlp=True, act_fn="silu")
    pair = mirrored_pairs(causal=True)[0]
    ours, theirs = viz.routes(model, pair), viz.routes(llama_bridge(model, tmp_path), pair)
    assert theirs.data["forward"]["tokens"] == [f"w{token}" for token in pair.forward.tokens]
    for side in SIDES:
        assert patterns(theirs, side) == pytest.approx(patterns(ours, side), abs=1e-4)
        for measure in ("route", "evidence"):
            one, other = (np.array(page.data["checkpoints"][0][measure][side]) for page in (ours, theirs))
            assert other == pytest.approx(one, rel=1e-3, abs=1e-4)


def test_the_text_says_what_the_numbers_say() -> None:
    page = viz.routes(random_model(mask_token_id=MASK), PAIR)
    route = np.array(page.data["checkpoints"][0]["route"]["forward"])
    layer, head = np.unravel_index(route.argmax(), route.shape)
    assert f"Of 8 heads, head {head} of layer {layer} has the strongest forward route" in page.about
    assert f"{100 * route.max():.3g}% of its attention" in page.about
    assert "In the forward query the source “7 4” is to the right of the answer “1 2”" in page.about
    assert "In the reverse query the source “7 4” is to the left of the answer “1 2”" in page.about


def test_parity_is_undefined_where_it_is_and_says_why(arm: Run) -> None:
    page = viz.routes(arm, arm.query_pairs()[0])
    found = page.data["checkpoints"][-1]
    assert page.data["reach"] == 1
    assert found["parity"] is None
    assert "undefined for pairs that share neither answer nor source (an ARM's)" in found["reason"]
    one_sided = QueryPair(PAIR.forward, PAIR.forward, 0, "left")
    (found,) = viz.routes(random_model(mask_token_id=MASK), one_sided).data["checkpoints"]
    assert found["parity"] is None
    assert "is on one side in both queries" in found["reason"]


def test_what_does_not_fit_is_thinned_to_rows_then_to_fewer_checkpoints_then_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, n = run.query_pairs()[0], len(run.query_pairs()[0].forward.tokens)
    whole = 2 * 2 * n * n  # both queries, two heads of one layer
    monkeypatch.setattr(routes, "MAX_ENTRIES", 3 * whole)
    page = viz.routes(run, pair)
    assert page.data["steps"] == evenly(run.steps, 3)
    assert page.about.endswith(f"Of the run's {len(run.steps)} checkpoints, 3 are shown.")
    monkeypatch.setattr(routes, "MAX_ENTRIES", whole - 1)
    page = viz.routes(run, pair)
    assert [page.data[side]["rows"] for side in SIDES] == [page.data[side]["readout"] for side in SIDES]
    at = page.data["forward"]["readout"][0]
    monkeypatch.setattr(routes, "MAX_ENTRIES", whole)
    assert patterns(page, "forward")[:, :, 0] == pytest.approx(patterns(viz.routes(run, pair), "forward")[:, :, at])
    monkeypatch.setattr(routes, "MAX_ENTRIES", 4 * n - 1)
    with pytest.raises(UserError, match=rf"^pair: 1 layers x 2 heads x {n} and {n} tokens are more than the .* choose"):
        viz.routes(run, pair)
    assert len(viz.routes(run, pair, heads=[1]).data["steps"]) == 1


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True), st.integers(1, 50))
def test_even_choice_of_checkpoints(steps: list[int], count: int) -> None:
    steps.sort()
    chosen = evenly(steps, count)
    assert chosen[-1] == steps[-1]
    assert len(chosen) == min(count, len(steps))
    assert sorted(set(chosen)) == chosen
    assert set(chosen) <= set(steps)
    assert count == 1 or chosen[0] == steps[0]


def test_tidy_numbers_are_json() -> None:
    assert as_lists(torch.tensor([[1 / 3, float("nan")], [float("inf"), 0.0]])) == [[0.333333, None], [None, 0.0]]


def test_mistakes_are_named(run: Run, arm: Run) -> None:
    model = random_model(mask_token_id=MASK)
    with pytest.raises(UserError, match=r"^layers: \[2\] is no choice from 0 to 1"):
        viz.routes(model, PAIR, layers=[2])
    with pytest.raises(UserError, match=r"^heads: \[\] is no choice from 0 to 3"):
        viz.routes(model, PAIR, heads=[])
    with pytest.raises(UserError, match=r"a model with causal attention cannot see it; ask for"):
        viz.routes(arm, run.query_pairs()[0])
    with pytest.raises(UserError, match=r"^prompt: token 99 is outside the model's vocabulary of 13"):
        stray = Query((99, MASK), (1,), (1, 2), (0, 1))
        viz.routes(model, QueryPair(stray, stray, 0, "left"))


# ---- in a browser

DRAWN = """async place => {
  const image = new Image();
  image.src = place.querySelector('.heatmaplayer image').getAttribute('href');
  await image.decode();
  const canvas = Object.assign(document.createElement('canvas'), {width: image.width, height: image.height});
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.drawImage(image, 0, 0);
  return place.data[0].z.map((row, y, rows) => row.map((_, x) =>
    context.getImageData((x + 0.5) * image.width / row.length, (y + 0.5) * image.height / rows.length, 1, 1).data[1]));
}"""
"""How green each cell of a heat map is, read from its middle in the picture that was drawn."""
MAP = "place => place.data[0].z"


@pytest.fixture(scope="module")
def saved(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path]:
    page = viz.routes(run, run.query_pairs()[0])
    return page, page.save(tmp_path_factory.mktemp("routes") / "page.html")


@pytest.fixture
def shown(saved: tuple[Page, Path], browser: Browser) -> Iterator[tuple[Page, Any]]:
    """The page of a run, in a browser; nothing may go wrong there."""
    page, path = saved
    with opened(browser, path) as (tab, problems):
        tab.wait_for_selector("#growth .shapelayer path", state="attached")
        yield page, tab
        assert problems == []


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_every_entry_of_both_patterns_is_drawn(attention: str, tmp_path: Path, browser: Browser) -> None:
    pair, mask = PAIR, MASK
    if attention == "causal":
        causal, mask = Query((3, 5, 7, 1, 2, 6), (1, 2), (3, 5), (0, 2)), None
        pair = QueryPair(causal, causal, 0, "right")
    page = viz.routes(random_model(attention=attention, mask_token_id=mask), pair)
    with opened(browser, page.save(tmp_path / "page.html")) as (tab, problems):
        for layer in range(2):
            tab.locator("#layer").select_option(str(layer))
            head = int(tab.locator("#head").input_value())
            for side in SIDES:
                place = tab.locator(f"#{side}-pattern")
                expected = patterns(page, side)[layer, head]
                read = np.ones_like(expected, dtype=bool)
                if attention == "causal":
                    read = np.tril(read)
                drawn = np.array(place.evaluate(MAP), dtype=float)
                assert (np.isnan(drawn) == ~read).all(), "only a causal model leaves entries out"
                assert drawn[read] == pytest.approx(expected[read], abs=1e-5)
                depth = 255 - int(PAGE_COLORS["share"][3:5], 16)  # how much less green the full colour is than white
                green = np.array(place.evaluate(DRAWN))[read]
                assert (255 - green) / depth == pytest.approx(expected[read], abs=2 / depth)
    assert problems == []


def test_the_slider_shows_each_checkpoint(shown: tuple[Page, Any]) -> None:
    page, tab = shown
    slider, steps = tab.locator("#checkpoint"), page.data["steps"]
    assert tab.locator("#step").inner_text() == f"step {steps[-1]}"
    line = "() => document.querySelector('#growth').layout.shapes[0].x0"
    lines = [tab.evaluate(line)]
    slider.focus()
    for at in reversed(range(len(steps) - 1)):
        tab.keyboard.press("ArrowLeft")
        found = page.data["checkpoints"][at]
        assert tab.locator("#step").inner_text() == f"step {steps[at]}" == slider.get_attribute("aria-valuetext")
        layer, head = (int(tab.locator(f"#{name}").input_value()) for name in ("layer", "head"))
        cells = tab.locator("#numbers td").all_inner_texts()
        assert float(cells[0]) == pytest.approx(found["probability"]["forward"], rel=6e-3)
        assert float(cells[3]) == pytest.approx(found["route"]["reverse"][layer][head], rel=6e-3)
        for side in SIDES:
            assert tab.locator(f"#{side}-routes").evaluate(MAP) == found["route"][side]
            drawn = np.array(tab.locator(f"#{side}-pattern").evaluate(MAP))
            assert drawn == pytest.approx(patterns(page, side, at)[layer, head], abs=1e-5)
        lines.append(tab.evaluate(line))
    assert lines[::-1] == [step or 0.5 for step in steps], "the line in the curves goes along"
    curve = tab.locator("#probabilities").evaluate("place => place.data.map(({y}) => y)")
    assert curve == [[found["probability"][side] for found in page.data["checkpoints"]] for side in SIDES]


def test_heads_are_chosen_by_click_and_by_keyboard(shown: tuple[Page, Any]) -> None:
    page, tab = shown
    found = page.data["checkpoints"][-1]

    def said() -> tuple[str, str, list[float]]:
        tokens = tab.locator("#reverse-tokens li").evaluate_all(
            "items => items.map(item => +item.style.getPropertyValue('--share-of-full'))"
        )
        return tab.locator("#chosen").inner_text(), tab.locator("#parity").inner_text(), tokens

    def expected(head: int) -> tuple[str, list[float]]:
        row = page.data["reverse"]["readout"][0]
        return f"Layer 0, head {head}, step {page.data['steps'][-1]}", patterns(page, "reverse")[0, head, row].tolist()

    tab.evaluate("() => { window.drawn = 0; document.querySelector('#bars').on('plotly_afterplot', () => drawn++); }")
    strongest = int(np.argmax(found["route"]["forward"][0]))
    assert said()[0] == expected(strongest)[0], "it opens on the strongest forward route"
    for side in SIDES:
        for head in (1, 0):
            tab.mouse.click(*middle_of(tab, f"#{side}-routes", head, 0))
            title, parity, tokens = said()
            assert (title, tokens) == (expected(head)[0], pytest.approx(expected(head)[1], abs=1e-4))
            assert f"{found['parity']['odd'][0][head]:.4g}"[:5] in parity
            frames = tab.locator(f"#{side}-routes").evaluate("place => place.layout.shapes.map(({x0, x1}) => [x0, x1])")
            assert frames == [[head - 0.5, head + 0.5]]
    assert tab.evaluate("drawn") == 4, "one click draws once"
    tab.locator("#head").focus()
    tab.keyboard.press("ArrowDown")
    assert said()[0] == expected(1)[0]
    tab.keyboard.press("Enter")  # submits nothing
    assert said()[0] == expected(1)[0]
    tab.locator("#maps").focus()
    for key, head in (("ArrowLeft", 0), ("ArrowLeft", 0), ("ArrowUp", 0), ("ArrowDown", 0), ("ArrowRight", 1)):
        tab.keyboard.press(key)
        assert said()[0] == expected(head)[0], "one layer of two heads"


def test_a_click_on_a_curve_chooses_its_checkpoint(shown: tuple[Page, Any]) -> None:
    page, tab = shown
    for place, at in (("#growth", 1), ("#probabilities", 2)):
        tab.mouse.click(*point_of(tab, place, at))
        expect(tab.locator("#step")).to_have_text(f"step {page.data['steps'][at]}")
        assert tab.locator("#checkpoint").input_value() == str(at)


def test_arrow_keys_go_from_token_to_token_and_say_how_much_of_it_is_read(shown: tuple[Page, Any]) -> None:
    page, tab = shown
    tokens = tab.locator("#reverse-tokens li")
    tokens.first.focus()
    read = patterns(page, "reverse")[0, int(tab.locator("#head").input_value()), page.data["reverse"]["readout"][0]]
    for at in (1, 2, 3):
        tab.keyboard.press("ArrowRight")
        expect(tokens.nth(at)).to_be_focused()
        said = tokens.nth(at).evaluate("token => getComputedStyle(token, '::after').content")
        assert f"{at}: read {read[at]:.4f}" in said


def test_a_tap_chooses_what_it_touches(saved: tuple[Page, Path], browser: Browser) -> None:
    with opened(browser, saved[1], has_touch=True) as (tab, problems):
        for head in (0, 1, 1, 0):
            tab.touchscreen.tap(*middle_of(tab, "#forward-routes", head, 0))
            assert tab.locator("#chosen").inner_text().startswith(f"Layer 0, head {head},")
    assert problems == []


def test_the_route_is_framed(tmp_path: Path, browser: Browser) -> None:
    """Readout rows, source columns: spans of two tokens each."""
    page = viz.routes(random_model(mask_token_id=MASK), PAIR)
    with opened(browser, page.save(tmp_path / "page.html")) as (tab, problems):
        frame = "place => place.layout.shapes.map(({x0, x1, y0, y1}) => [x0, x1, y0, y1])"
        assert tab.locator("#forward-pattern").evaluate(frame) == [[3.5, 5.5, -0.5, 1.5]]
        assert tab.locator("#reverse-pattern").evaluate(frame) == [[-0.5, 1.5, 3.5, 5.5]]
        assert tab.locator("#forward-tokens li.from").all_inner_texts() == ["▶◆[M]", "▶◆[M]"]
        assert tab.locator("#forward-tokens li.source").all_inner_texts() == ["●7", "●4"]
        assert tab.locator("#checkpoint, #growth").count() == 0, "one checkpoint has no slider"
    assert problems == []


def test_every_control_is_reached_by_keyboard_and_named(shown: tuple[Page, Any]) -> None:
    _, tab = shown
    reached = []
    for _ in range(4):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("() => document.activeElement.id"))
    assert reached[:3] == ["layer", "head", "checkpoint"]
    assert [tab.get_by_label(name, exact=False).first.get_attribute("id") for name in ("layer", "head")] == reached[:2]
    assert tab.get_by_role("slider", name="checkpoint").count() == 1
    drawings = tab.locator(".js-plotly-plot").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    assert len(drawings) == 7
    assert all(drawings)


def test_undefined_parity_is_said_on_the_page(arm: Run, tmp_path: Path, browser: Browser) -> None:
    page = viz.routes(arm, arm.query_pairs()[0])
    with opened(browser, page.save(tmp_path / "page.html")) as (tab, problems):
        assert tab.locator("#parity").inner_text().startswith("Undefined. query_pairs: score parity is undefined for")
        assert tab.locator("#bars .barlayer .trace").count() == 2
    assert problems == []


def test_tokens_are_text_whatever_they_hold(tmp_path: Path, browser: Browser) -> None:
    model = random_model(mask_token_id=MASK)
    model.tokenizer = SimpleNamespace(decode=lambda tokens: HOSTILE[tokens[0] % len(HOSTILE)])  # type: ignore[assignment]
    forward, reverse = (*range(10), MASK), (MASK, *range(1, 10), 0)
    pair = QueryPair(Query(forward, (11,), (10, 11), (0, 1)), Query(reverse, (11,), (0, 1), (10, 11)), 0, "right")
    page = viz.routes(model, pair)
    assert page.data["forward"]["tokens"][:10] == HOSTILE
    with opened(browser, page.save(tmp_path / "page.html"), viewport={"width": 1280, "height": 3000}) as (
        tab,
        problems,
    ):
        shown = ["●" + HOSTILE[0], *HOSTILE[1:7], "⏎", *HOSTILE[8:], "▶◆[M]"]
        assert tab.locator("#forward-tokens li").evaluate_all("all => all.map(one => one.textContent)") == shown
        ticks = tab.locator("#forward-pattern .ytick text").evaluate_all("all => all.map(one => one.textContent)")
        assert ticks == [text if len(text) <= 12 else text[:11] + "…" for text in shown]
        assert tab.locator("#forward-pattern .ytick tspan[style]").count() == 0, "no <b> made anything bold"
        for at, text in enumerate(shown):
            tab.mouse.move(*middle_of(tab, "#forward-pattern", at, 0))
            layer = tab.locator("#forward-pattern .hoverlayer")
            expect(layer).to_have_text(re.compile(rf" \({at}\)$"))
            said = layer.text_content() or ""
            assert said.startswith(f"{shown[0]} (0) reads 0.")
            assert said.endswith(f" of {text} ({at})")
        assert tab.locator("main script, main b").count() == 0
    assert problems == []


def test_a_narrow_window_scrolls_down_only(saved: tuple[Page, Path], browser: Browser) -> None:
    with opened(browser, saved[1], viewport={"width": 390, "height": 844}) as (tab, problems):
        tab.wait_for_selector("#growth .shapelayer path", state="attached")
        assert tab.evaluate("() => document.documentElement.scrollWidth") == 390
        (x, y), (x_below, y_below) = (middle_of(tab, f"#{side}-routes", 0, 0) for side in SIDES)
        assert x == pytest.approx(x_below, abs=1)
        assert y < y_below, "one below the other"
    assert problems == []


def test_a_page_is_small_beside_its_library(saved: tuple[Page, Path], tmp_path: Path) -> None:
    page, path = saved
    alone = page.save(tmp_path / "page.html", shared=True)
    assert alone.stat().st_size < 60_000
    assert path.stat().st_size - alone.stat().st_size < 700_000, "a part of Plotly, carried compressed"
    assert {file.name for file in tmp_path.iterdir()} == {"page.html", "plotly-cartesian.min.js"}
