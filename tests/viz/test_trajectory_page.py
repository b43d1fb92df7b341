"""The trajectory page: the loop it shows is the loop that a plain one runs, and its controls show every step of it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers import TINY, random_model, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from page_helpers import HOSTILE, expect, middle_of, opened

from mdm_interp import viz
from mdm_interp.config import FactConfig
from mdm_interp.data.queries import Query
from mdm_interp.errors import UserError
from mdm_interp.training.loop import train
from mdm_interp.viz.pages import trajectory
from mdm_interp.viz.pages.page import Page

if TYPE_CHECKING:
    from playwright.sync_api import Browser

MASK = TINY["d_vocab"] - 1
TOKENS = [3, MASK, 5, MASK, 1, MASK, 2, MASK]


def read(page: Page) -> np.ndarray:
    """[filled layer head token]"""
    shape = len(page.data["layers"]), len(page.data["heads"]), len(page.data["tokens"])
    rows = [base64.b64decode(one["read"]) for one in page.data["filled"]]
    return np.stack([np.frombuffer(row, dtype="<u2").reshape(shape) / 0xFFFF for row in rows])


# ---- what a page holds


@pytest.mark.parametrize("shift", [0, -1])
@pytest.mark.parametrize("order", ["confidence", "left_to_right"])
@torch.no_grad()
def test_the_loop_is_the_one_that_a_plain_loop_runs(order: str, shift: int) -> None:
    """One mask at a time, recomputed with a cache of everything."""
    model = random_model(mask_token_id=MASK, readout_shift=shift)
    page = viz.trajectory(model, TOKENS, order=order)  # pyright: ignore[reportArgumentType]
    tokens, attention = list(TOKENS), read(page)
    for step, found in enumerate(page.data["filled"], 1):
        logits, cache = model.run_with_cache(torch.tensor([tokens]))
        logits[..., MASK] = float("-inf")
        blank = [at for at, token in enumerate(tokens) if token == MASK]
        certainty, likeliest = logits[0, [at + shift for at in blank]].softmax(-1).max(-1)
        favourites = page.data["favourites"][step - 1]
        assert favourites["positions"] == blank
        assert favourites["tokens"] == [str(token) for token in likeliest.tolist()]
        assert favourites["probabilities"] == pytest.approx(certainty.tolist(), rel=1e-4)
        here = int(certainty.argmax()) if order == "confidence" else 0
        assert (found["step"], found["position"], found["readout"]) == (step, blank[here], blank[here] + shift)
        assert (found["token"], found["top"][0]) == (str(int(likeliest[here])),) * 2
        assert found["probability"] == pytest.approx(float(certainty[here]), rel=1e-4)
        top = logits[0, blank[here] + shift].softmax(-1).topk(5)
        assert found["top"] == [str(token) for token in top.indices.tolist()]
        assert found["probabilities"] == pytest.approx(top.values.tolist(), rel=1e-4)
        rows = torch.stack([cache["pattern", layer][0, :, blank[here] + shift] for layer in range(2)])
        assert attention[step - 1] == pytest.approx(rows.numpy(), abs=1e-5)
        tokens[blank[here]] = int(likeliest[here])
    assert MASK not in tokens
    assert f"The result: “{' '.join(map(str, tokens))}”." in page.about


@settings(max_examples=15, deadline=None)
@given(
    masked=st.sets(st.integers(0, 8), min_size=1),
    steps=st.integers(1, 12),
    order=st.sampled_from(["confidence", "left_to_right", "random"]),
)
def test_every_mask_is_filled_once_in_equal_shares(masked: set[int], steps: int, order: Any) -> None:
    tokens = [MASK if at in masked else at % 12 for at in range(9)]
    page = viz.trajectory(random_model(mask_token_id=MASK), tokens, order=order, steps=steps)
    filled = page.data["filled"]
    assert sorted(one["position"] for one in filled) == sorted(masked)
    counts = np.bincount([one["step"] for one in filled])[1:]
    assert len(counts) == len(page.data["favourites"]) == min(steps, len(masked))
    assert counts.max() - counts.min() <= 1
    again = viz.trajectory(random_model(mask_token_id=MASK), tokens, order=order, steps=steps)
    assert again.data == page.data, "also in random order"


def test_chosen_layers_and_heads_are_a_part_of_the_whole() -> None:
    model = random_model(mask_token_id=MASK)
    part, whole = viz.trajectory(model, TOKENS, layers=[1], heads=[0, 2]), viz.trajectory(model, TOKENS)
    assert (part.data["layers"], part.data["heads"]) == ([1], [0, 2])
    assert read(part) == pytest.approx(read(whole)[:, 1:, [0, 2]])


def test_the_text_says_what_the_numbers_say() -> None:
    model = random_model(mask_token_id=MASK)
    page = viz.trajectory(model, TOKENS)
    filled, given_from_the_start = page.data["filled"], read(page)[..., ::2].sum(-1).mean()
    least = min(filled, key=lambda one: one["probability"])
    assert page.about.startswith("4 masks were filled in 4 steps, the most certain first. The first to be filled was ")
    assert f"the least certain was “{least['token']}” at position {least['position']} (probability " in page.about
    share = float(page.about.split("On average over steps and heads, ")[1].split("%")[0])
    assert share == pytest.approx(100 * given_from_the_start, rel=1e-2)
    assert page.about.endswith("of attention went to the tokens given from the start.")
    query = Query(tuple(TOKENS), (4,), (1, 2), (4, 7))
    page = viz.trajectory(model, query)
    assert (page.data["source"], page.data["answer"]) == ((4, 7), (1, 2))
    share = float(page.about.split("On average over steps and heads, ")[1].split("%")[0])
    assert share == pytest.approx(100 * read(page)[..., 4:7].sum(-1).mean(), rel=1e-2)
    assert page.about.endswith("of attention went to the source.")
    one = viz.trajectory(model, [1, MASK])
    assert one.about.startswith("The mask was filled with “")


def test_a_run_is_asked_in_its_worlds_words(tmp_path: Path) -> None:
    run = train(tiny_run(FactConfig(n_entities=9, n_filler=4), "rope", "any_order", 0), root=tmp_path, progress=False)
    page = viz.trajectory(run, "A1 r0 [M] f0 [M]", source="A1")
    assert page.data["tokens"] == ["A1", "r0", "[M]", "f0", "[M]"]
    assert page.data["source"] == (0, 1)
    assert all(one["token"] in run.facts.token_names[:-1] for one in page.data["filled"])


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(mask_token_id=MASK)
    with pytest.raises(UserError, match=r"^model: denoising needs bidirectional attention and a mask_token_id; use an"):
        viz.trajectory(random_model(attention="causal"), [1, 2])
    with pytest.raises(UserError, match=r"^prompt: has no mask to fill; write \[M\] where one is"):
        viz.trajectory(model, [1, 2])
    with pytest.raises(UserError, match=r"^steps: 0 is too few; use at least 1"):
        viz.trajectory(model, TOKENS, steps=0)
    with pytest.raises(UserError, match=r"^prompt: position 0 is masked, but has no prediction in a shifted model"):
        viz.trajectory(random_model(mask_token_id=MASK, readout_shift=-1), [MASK, 1])
    with pytest.raises(UserError, match=r"^layers: \[5\] is no choice from 0 to 1"):
        viz.trajectory(model, TOKENS, layers=[5])
    monkeypatch.setattr(trajectory, "MAX_ENTRIES", 2 * 4 * 4 * 8 - 1)
    with pytest.raises(UserError, match=r"^prompt: 2 layers x 4 heads x 4 masks x 8 tokens are more than the 255 entr"):
        viz.trajectory(model, TOKENS)
    assert len(viz.trajectory(model, TOKENS, heads=[0]).data["filled"]) == 4


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_order_is_named() -> None:
    order: Any = "outward"
    with pytest.raises(UserError, match=r"^order: 'outward' is none of confidence, random, left_to_right; choose one$"):
        viz.trajectory(random_model(mask_token_id=MASK), TOKENS, order=order)


# ---- in a browser


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path]:
    page = viz.trajectory(random_model(mask_token_id=MASK), TOKENS)
    return page, page.save(tmp_path_factory.mktemp("trajectory") / "page.html")


@pytest.fixture
def shown(saved: tuple[Page, Path], browser: Browser) -> Iterator[tuple[Page, Any]]:
    """The page, in a browser; nothing may go wrong there."""
    page, path = saved
    with opened(browser, path) as (tab, problems):
        tab.wait_for_selector("#favourites .scatterlayer")
        yield page, tab
        assert problems == []


def test_every_cell_holds_its_token_after_its_step(shown: tuple[Page, Any]) -> None:
    page, tab = shown
    map_drawn, words = tab.locator("#steps").evaluate("place => [place.data[0].z, place.data[1].text]")
    texts, certain = [list(page.data["tokens"])], [[None] * 8]
    for one in page.data["filled"]:
        for rows, new in ((texts, one["token"]), (certain, one["probability"])):
            rows.append([*rows[-1][: one["position"]], new, *rows[-1][one["position"] + 1 :]])
    assert map_drawn == certain
    assert words == [text for row in texts for text in row]
    drawn = tab.locator("#steps .textpoint text").evaluate_all("all => all.map(one => one.textContent)")
    assert drawn == words, "5 rows of 8 tokens are drawn"


def test_positions_are_chosen_by_click_slider_and_select(shown: tuple[Page, Any]) -> None:
    page, tab = shown
    filled, attention = page.data["filled"], read(page)

    def check(step: int) -> None:
        one = filled[step - 1]
        assert tab.locator("#chosen").inner_text() == (
            f"“{one['token']}” at position {one['position']}, filled in step {step} of 4 with probability "
            f"{one['probability']:.4f}"
        )
        assert tab.locator("#step-said").inner_text() == f"step {step} of 4"
        assert (tab.locator("#step").input_value(), tab.locator("#position").input_value()) == (
            str(step),
            str(one["position"]),
        )
        top = [f"{p:.4f}  {token}" for token, p in zip(one["top"], one["probabilities"], strict=True)]
        assert tab.locator("#top li").evaluate_all("all => all.map(one => one.textContent)") == top
        before = [filled[at - 1] for at in range(1, step)]
        texts = list(page.data["tokens"])
        for earlier in before:
            texts[earlier["position"]] = earlier["token"]
        listed = tab.locator("#tokens li").evaluate_all("all => all.map(one => one.textContent.replace(/[▶◆●]/g, ''))")
        assert listed == texts, "as they were before the step"
        mean = attention[step - 1].mean((0, 1))
        shares = tab.locator("#tokens li").evaluate_all(
            "all => all.map(one => +one.style.getPropertyValue('--share-of-full'))"
        )
        assert shares == pytest.approx((mean / mean.max()).tolist(), abs=1e-4)
        map_drawn = tab.locator("#heads").evaluate("place => place.data[0].z")
        assert np.array(map_drawn) == pytest.approx(attention[step - 1][..., ::2].sum(-1), abs=1e-4)
        curve = tab.locator("#favourites").evaluate("place => place.data[0].y")
        favourites = page.data["favourites"][:step]
        assert curve == [at["probabilities"][at["positions"].index(one["position"])] for at in favourites]
        frame = tab.locator("#steps").evaluate("place => place.layout.shapes.map(({x0, y0}) => [x0, y0])")
        assert frame == [[-0.5, step - 0.5], [one["position"] - 0.5, step - 0.5]]

    check(1)
    for step in (3, 2, 4):
        tab.mouse.click(*middle_of(tab, "#steps", filled[step - 1]["position"], 0))
        check(step)
    tab.mouse.click(*middle_of(tab, "#steps", 0, 3))
    check(4)  # position 0 was given: nothing to show
    tab.locator("#step").focus()
    for step in (3, 2, 1):
        tab.keyboard.press("ArrowLeft")
        check(step)
    tab.locator("#position").select_option(str(filled[2]["position"]))
    check(3)
    tab.locator("#tokens li").nth(filled[1]["position"]).click()
    check(2)


def test_it_opens_on_the_answer(tmp_path: Path, browser: Browser) -> None:
    query = Query(tuple(TOKENS), (4,), (5, 6), (0, 1))
    with opened(browser, viz.trajectory(random_model(mask_token_id=MASK), query).save(tmp_path / "page.html")) as (
        tab,
        problems,
    ):
        assert tab.locator("#position").input_value() == "5"
        assert " at position 5, filled in step " in tab.locator("#chosen").inner_text()
    assert problems == []


def test_without_an_answer_it_opens_on_a_word(tmp_path: Path, browser: Browser) -> None:
    model = random_model(mask_token_id=MASK)
    first, *others = viz.trajectory(model, TOKENS).data["filled"]
    words = [one["position"] for one in others if one["token"] != first["token"]]
    assert words, "there is something else to open on"
    named = {first["token"]: ". "}
    model.tokenizer = SimpleNamespace(decode=lambda tokens: named.get(str(tokens[0]), f" w{tokens[0]}"))  # type: ignore[assignment]
    with opened(browser, viz.trajectory(model, TOKENS).save(tmp_path / "page.html")) as (tab, problems):
        assert tab.locator("#position").input_value() == str(words[0])
    assert problems == []


def test_arrow_keys_choose_tokens_and_heads(shown: tuple[Page, Any]) -> None:
    page, tab = shown
    tokens, position = tab.locator("#tokens li"), tab.locator("#position")
    first = position.input_value()
    tokens.first.focus()
    for at, chosen in ((1, "1"), (2, "1"), (3, "3")):  # the token at 2 was given
        tab.keyboard.press("ArrowRight")
        expect(tokens.nth(at)).to_be_focused()
        assert position.input_value() == chosen
    assert first in {str(one["position"]) for one in page.data["filled"]}
    tab.locator("#map").focus()
    for key, chosen in (("ArrowRight", ("all", "0")), ("ArrowDown", ("0", "0")), ("ArrowDown", ("1", "0"))):
        tab.keyboard.press(key)
        assert (tab.locator("#layer").input_value(), tab.locator("#head").input_value()) == chosen


def test_one_heads_attention_is_chosen_by_click_and_by_keyboard(shown: tuple[Page, Any]) -> None:
    page, tab = shown

    def check(layers: list[int], heads: list[int]) -> None:
        mean = read(page)[0][np.ix_(layers, heads)].mean((0, 1))
        assert tab.locator("#highest").inner_text() == f"{mean.max():.3f}"
        first = tab.locator("#read li").first.evaluate("one => one.textContent")
        assert first.startswith(f"{mean.max():.4f}  ")
        assert first.endswith(f"({mean.argmax()})")

    check([0, 1], [0, 1, 2, 3])
    tab.mouse.click(*middle_of(tab, "#heads", 2, 1))
    check([1], [2])
    assert (tab.locator("#layer").input_value(), tab.locator("#head").input_value()) == ("1", "2")
    frame = "place => (place.layout.shapes ?? []).map(({x0, y0}) => [x0, y0])"
    assert tab.locator("#heads").evaluate(frame) == [[1.5, 0.5]]
    tab.locator("#layer").focus()
    tab.keyboard.press("ArrowUp")
    check([0], [2])
    tab.locator("#head").select_option("all")
    check([0], [0, 1, 2, 3])
    assert tab.locator("#heads").evaluate(frame) == []


def test_every_control_is_reached_by_keyboard_and_named(shown: tuple[Page, Any]) -> None:
    _, tab = shown
    reached = []
    while len(reached) < 8:
        tab.keyboard.press("Tab")
        reached.append(
            tab.evaluate(
                "({id, className, ariaLabel}) => id || ariaLabel || className",
                tab.evaluate_handle("document.activeElement"),
            )
        )
    of_plot = ["Save as PNG", "Save as SVG", "Save as CSV"]
    assert reached == ["step", "position", "Tokens after each step", *of_plot, "layer", "head"]
    named = [tab.get_by_role("slider", name="step"), tab.get_by_role("combobox", name="position")]
    named += [tab.get_by_role("combobox", name="attention of layer"), tab.get_by_role("combobox", name="head")]
    named += [tab.get_by_role("region", name="Tokens after each step")]
    assert [control.count() for control in named] == [1] * 5


def test_tokens_are_text_whatever_they_hold(tmp_path: Path, browser: Browser) -> None:
    model = random_model(mask_token_id=MASK)
    model.tokenizer = SimpleNamespace(decode=lambda tokens: HOSTILE[tokens[0] % len(HOSTILE)])  # type: ignore[assignment]
    page = viz.trajectory(model, [*range(10), MASK, MASK])
    texts = [text.replace("\n", "⏎") for text in HOSTILE]
    with opened(browser, page.save(tmp_path / "page.html")) as (tab, problems):
        drawn = tab.locator("#steps .textpoint text").evaluate_all("all => all.map(one => one.textContent)")
        short = [text if len(text) <= 10 else text[:9] + "…" for text in texts]
        assert [drawn[at] for at in range(10)] == short
        assert tab.locator("#steps .textpoint tspan[style]").count() == 0, "no <b> made anything bold"
        tab.locator("#steps").scroll_into_view_if_needed()
        for at in range(10):
            tab.mouse.move(*middle_of(tab, "#steps", at, 0))
            said = f"after step 0, position {at}: {texts[at]}, given"
            layer = tab.locator("#steps .hoverlayer")
            expect(layer).to_have_text(said)
            assert layer.text_content() == said, "to the last blank, which the line before does not heed"
        assert tab.locator("main script, main b").count() == 0
    assert problems == []


def test_an_open_mask_says_what_it_would_have_been(shown: tuple[Page, Any]) -> None:
    page, tab = shown
    last = page.data["filled"][-1]["position"]
    for after in range(4):
        tab.mouse.move(*middle_of(tab, "#steps", last, after))
        favourites = page.data["favourites"][after]
        at = favourites["positions"].index(last)
        said = (
            f"after step {after}, position {last}: [M]; then likeliest: {favourites['tokens'][at]} "
            f"({favourites['probabilities'][at]:.4f})"
        )
        layer = tab.locator("#steps .hoverlayer")
        expect(layer).to_have_text(said)
        assert layer.text_content() == said


INSIDE = """() => {
  const place = document.querySelector('#steps'), frame = [...place.querySelectorAll('.shapelayer path')].at(-1);
  const inner = frame.getBoundingClientRect(), outer = place.parentElement.getBoundingClientRect();
  return outer.left <= inner.left && inner.right <= outer.right + 2
    && outer.top <= inner.top && inner.bottom <= outer.bottom + 2;
}"""
"""Whether the chosen cell's frame is within the region that scrolls."""


@pytest.mark.parametrize(("n_tokens", "n_masks"), [(60, 40), (120, 60)])
def test_long_prompts_scroll_in_their_own_region(n_tokens: int, n_masks: int, tmp_path: Path, browser: Browser) -> None:
    model = random_model(mask_token_id=MASK, n_ctx=200)
    tokens = [MASK if at >= n_tokens - n_masks else at % 12 for at in range(n_tokens)]
    page = viz.trajectory(model, tokens)
    path = page.save(tmp_path / "page.html", shared=True)
    assert path.stat().st_size < 1_000_000
    for width in (1280, 390):
        with opened(browser, path, viewport={"width": width, "height": 900}) as (tab, problems):
            tab.wait_for_selector("#favourites .scatterlayer")
            assert tab.evaluate("() => document.documentElement.scrollWidth") == width
            n_words = tab.locator("#steps .textpoint").count()
            cells = n_tokens * (n_masks + 1)
            assert n_words == (cells if cells <= 5000 else n_tokens + n_masks), "of many cells, what is new"
            for step in (n_masks, 1):  # the chosen cell is brought into view
                tab.locator("#step").evaluate(f"e => {{ e.value = {step}; e.dispatchEvent(new Event('input')); }}")
                inside = tab.evaluate(INSIDE)
                assert inside, f"step {step} at {width} px"
        assert problems == []
