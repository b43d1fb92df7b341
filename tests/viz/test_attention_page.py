"""The attention page: what it holds is what the model computed, and a browser without a network shows all of it."""

from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from helpers import TINY, random_model, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from page_helpers import HOSTILE, expect, opened

from mdm_interp import viz
from mdm_interp.config import FactConfig
from mdm_interp.errors import UserError
from mdm_interp.training.loop import train
from mdm_interp.training.runs import Run
from mdm_interp.viz.pages import attention
from mdm_interp.viz.pages.page import Page, packed, places
from mdm_interp.viz.pages.subject import Subject
from mdm_interp.viz.theme import PAGE_COLORS

if TYPE_CHECKING:
    from playwright.sync_api import Browser

MASK = TINY["d_vocab"] - 1
TOKENS = [3, MASK, 5, 7, 1, 0, 2]
WORLD = FactConfig(n_entities=9, n_filler=4)


def unpacked(text: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<u2").reshape(shape) / 0xFFFF


def patterns(page: Page) -> np.ndarray:
    """[layer head row token]"""
    data = page.data
    shape = len(data["heads"]), len(data["rows"]), len(data["tokens"])
    return np.stack([unpacked(layer, *shape) for layer in data["patterns"]])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny_run(WORLD, "rope", "any_order", 0), root=tmp_path_factory.mktemp("store"), progress=False)


# ---- what a page holds


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("position", ["rope", "alibi", "learned"])
def test_the_patterns_are_those_of_a_cache(attention: str, position: str) -> None:
    mask = None if attention == "causal" else MASK
    model = random_model(attention=attention, position=position, mask_token_id=mask)
    page = viz.attention(model, TOKENS)
    _, cache = model.run_with_cache(torch.tensor([TOKENS]))
    expected = np.stack([cache["pattern", layer][0].numpy() for layer in range(2)])
    assert patterns(page) == pytest.approx(expected, abs=1e-5)
    assert page.data["reach"] == (1 if attention == "causal" else None)


@settings(max_examples=20, deadline=None)
@given(
    layers=st.sets(st.integers(0, 1), min_size=1),
    heads=st.sets(st.integers(0, 3), min_size=1),
    rows=st.sets(st.integers(0, 6), min_size=1),
)
def test_chosen_layers_heads_and_rows_are_a_part_of_the_whole(
    layers: set[int], heads: set[int], rows: set[int]
) -> None:
    model = random_model(mask_token_id=MASK)
    page = viz.attention(model, TOKENS, layers=layers, heads=heads, rows=rows)
    whole = patterns(viz.attention(model, TOKENS))
    assert (page.data["layers"], page.data["heads"], page.data["rows"]) == tuple(map(sorted, (layers, heads, rows)))
    chosen = whole[np.ix_(sorted(layers), sorted(heads), sorted(rows))]
    assert patterns(page) == pytest.approx(chosen, abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_attention_is_no_number_has_no_page(value: float) -> None:
    model = random_model(mask_token_id=MASK)
    with torch.no_grad():
        model.embed.W_E[TOKENS[0], 0] = value
    with pytest.raises(
        UserError, match=r"^model: its attention holds NaN or infinity, of which there is no page; check"
    ):
        viz.attention(model, TOKENS)


def test_a_number_that_is_not_finite_is_null_in_a_pages_json() -> None:
    data = {"a": [1.5, float("nan"), {"b": (float("inf"), "NaN", None)}], "c": -float("inf"), "</script>": 1}
    page = Page("attention", "", "", (), data).html(shared=True)
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert json.loads(found, parse_constant=lambda name: pytest.fail(name)) == {
        "a": [1.5, None, {"b": [None, "NaN", None]}], "c": None, "</script>": 1
    }  # fmt: skip


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_packing_is_exact_to_16_bits(shares: list[float]) -> None:
    assert unpacked(packed(torch.tensor(shares, dtype=torch.float64)), len(shares)) == pytest.approx(shares, abs=8e-6)


@pytest.mark.parametrize("shift", [0, -1])
def test_predictions_are_read_where_the_model_reads_them(shift: int) -> None:
    model = random_model(mask_token_id=MASK, readout_shift=shift)
    page = viz.attention(model, TOKENS)
    logits = model(torch.tensor([TOKENS]))[0, 1 + shift].clone()
    logits[MASK] = float("-inf")
    top = logits.softmax(-1).topk(attention.TOP)
    (filled,) = page.data["filled"]
    assert (page.data["masks"], page.data["readout"], filled["readout"]) == ([1], [1 + shift], 1 + shift)
    assert filled["tokens"] == [str(token) for token in top.indices.tolist()]
    assert filled["probabilities"] == pytest.approx(top.values.tolist(), rel=1e-5)


@pytest.mark.parametrize("shift", [0, -1])
def test_every_layer_is_read_as_the_last_one_is(shift: int) -> None:
    model = random_model(readout_shift=shift, mask_token_id=12, d_mlp=20)
    data = viz.attention(model, [3, 5, 12, 7, 12]).data
    assert len(data["lens"]) == 2
    for predicted, filled in zip(data["lens"][-1], data["filled"], strict=True):
        assert predicted["tokens"] == filled["tokens"]
        assert predicted["probabilities"] == pytest.approx(filled["probabilities"], rel=1e-5)
    resid = model(torch.tensor([[3, 5, 12, 7, 12]]), stop_at_layer=1)
    logits = model.unembed(model.ln_final(resid))[0, 2 + shift]
    logits[12] = -torch.inf
    first = data["lens"][0][0]
    assert first["readout"] == 2 + shift and first["probabilities"][0] == pytest.approx(logits.softmax(-1).max().item())
    assert viz.attention(model, [3, 5, 7]).data["lens"] == []


def test_a_causal_model_without_masks_is_read_at_the_end() -> None:
    page = viz.attention(random_model(attention="causal"), [1, 2, 3])
    assert (page.data["masks"], page.data["readout"]) == ([], [2])


def test_a_query_marks_its_source_and_answer_and_a_run_names_its_tokens(run: Run) -> None:
    query = run.query_pairs()[0].forward
    page = viz.attention(run, query)
    names = run.facts.token_names
    assert page.data["tokens"] == [names[token] for token in query.tokens]
    assert (page.data["source"], page.data["answer"]) == (query.source_span, query.answer_span)
    as_text = viz.attention(run, " ".join(page.data["tokens"]), source=page.data["tokens"][query.source_span[0]])
    assert as_text.data["patterns"] == page.data["patterns"]
    assert as_text.data["source"] == query.source_span


class Words:
    """A tokenizer of single characters, as far as a page asks one."""

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": [ord(c) % 12 for c in text], "offset_mapping": [(i, i + 1) for i in range(len(text))]}

    def decode(self, tokens: list[int]) -> str:
        return "".join(HOSTILE[token % len(HOSTILE)] for token in tokens)


def test_a_text_has_its_masks_and_source_where_they_were_written() -> None:
    model = random_model(mask_token_id=MASK)
    model.tokenizer = Words()  # type: ignore[assignment]
    prompt = Subject.of(model).prompt("ab [M][M] cd", source="cd")
    assert prompt.tokens == (*(ord(c) % 12 for c in "ab"), MASK, MASK, *(ord(c) % 12 for c in " cd"))
    assert (prompt.masks, prompt.source) == ((2, 3), (5, 7))


def refused(says: str) -> Any:
    return pytest.raises(UserError, match=says)


def test_mistakes_are_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(mask_token_id=MASK)
    with refused(r"^text: 'Anna' cannot be read, since the model has no tokenizer; give token ids$"):
        viz.attention(model, "Anna")
    with refused(r"^text: '.*Anna.*' holds what this model's tokenizer has no token for .*; use its tokens: A0, A1"):
        viz.attention(run, "Anna r0 [M]")
    with refused(r"^prompt: 0 tokens, and the model reads 1 to 12; change its length$"):
        viz.attention(model, [])
    with refused(r"^prompt: token 13 is outside the model's vocabulary of 13"):
        viz.attention(model, [13])
    with refused(r"^source: 'B9' is not in the text 'A0 r0 \[M\]'"):
        viz.attention(run, "A0 r0 [M]", source="B9")
    with refused(r"^source: 'x' names words of a text, and the prompt is none"):
        viz.attention(model, [1], source="x")
    with refused(r"^text: holds \[M\], and the model has no mask token"):
        Subject(random_model(attention="causal"), lambda tokens: [""], lambda text: ([], []), "").prompt("[M]")
    with refused(r"^prompt: position 0 is masked, but has no prediction in a shifted model"):
        viz.attention(random_model(mask_token_id=MASK, readout_shift=-1), [MASK, 1])
    for chosen in ({"layers": [9]}, {"heads": [9]}, {"rows": [9]}):
        with refused(rf"^{next(iter(chosen))}: \[9\] is no choice from 0 to"):
            viz.attention(model, TOKENS, **chosen)  # pyright: ignore[reportArgumentType]
    with refused(r"^heads: \[\] is no choice from 0 to 3"):
        viz.attention(model, TOKENS, heads=[])
    monkeypatch.setattr(attention, "MAX_ENTRIES", 50)
    with refused(r"^prompt: 2 layers x 4 heads x 1 rows x 7 tokens are more than the 50 entries a page holds; choose"):
        viz.attention(model, TOKENS)
    assert viz.attention(model, TOKENS, layers=[0]).data["rows"] == [1], "only where predictions are read"


def test_places_are_all_or_those_chosen() -> None:
    assert places(3, None, "rows") == [0, 1, 2]
    assert places(3, (2, 0, 2), "rows") == [0, 2]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = viz.attention(random_model(mask_token_id=MASK), TOKENS)
    path = page.save(tmp_path / "page.html", shared=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert before.keys() == {"page.html", "circuitsvis.js"}

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        viz.attention(random_model(seed=1, mask_token_id=MASK), TOKENS).save(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# ---- in a browser

SMALL = """canvas => {
  const {width, height} = canvas;
  return [width, height, [...canvas.getContext('2d').getImageData(0, 0, width, height).data]];
}"""


def test_every_entry_of_every_head_is_drawn(tmp_path: Path, browser: Browser) -> None:
    """Read back from the canvases: the full square of a bidirectional model."""
    model = random_model(mask_token_id=MASK)
    page = viz.attention(model, TOKENS)
    _, cache = model.run_with_cache(torch.tensor([TOKENS]))
    with opened(browser, page.save(tmp_path / "page.html")) as (tab, problems):
        for layer in range(2):
            tab.locator("#layer").select_option(str(layer))
            for head, canvas in enumerate(tab.locator("#heads canvas").all()):
                width, height, pixels = canvas.evaluate(SMALL)
                assert (width, height) == (len(TOKENS), len(TOKENS))
                green = np.array(pixels).reshape(height, width, 4)[..., 1]
                expected = cache["pattern", layer][0, head].numpy()
                full = int(PAGE_COLORS["share"][3:5], 16)
                assert (255 - green) / (255 - full) == pytest.approx(expected, abs=1 / (255 - full))
    assert problems == []


GREYS = """canvas => {
  const image = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer);
  return pixels.filter(pixel => pixel === 0xffc8c8c8).length / pixels.length;
}"""


DRAWN = """() => {
  const canvas = document.querySelector('#pattern canvas'), blank = document.createElement('canvas');
  if (canvas) [blank.width, blank.height] = [canvas.width, canvas.height];
  return canvas && canvas.toDataURL() !== blank.toDataURL();
}"""
"""CircuitsVis has a canvas before it draws on it."""


@pytest.mark.parametrize(("attention", "lowest", "highest"), [("bidirectional", 0, 0.01), ("causal", 0.2, 0.5)])
def test_circuitsvis_hides_half_a_pattern_only_of_a_causal_model(
    attention: str, lowest: float, highest: float, tmp_path: Path, browser: Browser
) -> None:
    page = viz.attention(random_model(attention=attention), [1, 2, 3, 4, 5, 6])
    with opened(browser, page.save(tmp_path / "page.html")) as (tab, problems):
        tab.wait_for_function(DRAWN)
        assert lowest <= tab.locator("#pattern canvas").evaluate(GREYS) <= highest
    assert problems == []


INKED = "document.querySelector('#pattern canvas').toDataURL()"


@pytest.fixture
def shown(tmp_path: Path, browser: Browser) -> Iterator[tuple[Any, list[str]]]:
    """The page of a query with a source, in a browser."""
    model = random_model(mask_token_id=MASK, seed=1)
    with opened(browser, viz.attention(model, TOKENS).save(tmp_path / "page.html")) as (tab, problems):
        tab.wait_for_function(DRAWN)
        yield tab, problems


def test_hovering_and_clicking_a_head_changes_the_picture_and_names_tokens(shown: tuple[Any, list[str]]) -> None:
    tab, problems = shown
    first = tab.evaluate(INKED)
    assert tab.locator("#caption").inner_text().startswith("layer 0, head 0:")
    button = tab.locator("#heads button").nth(2)
    box = button.locator("canvas").bounding_box()
    button.hover()
    tab.mouse.move(box["x"] + box["width"] * 2.5 / 7, box["y"] + box["height"] * 1.5 / 7)
    said = tab.locator("#hovered").inner_text()
    assert re.fullmatch(r"layer 0, head 2: ▶◆\[M\] \(1\) reads 0\.\d{4} of 5 \(2\)", said)
    tab.wait_for_function(f"first => {INKED} !== first", arg=first)
    tab.mouse.move(5, 5)
    tab.wait_for_function(f"first => {INKED} === first", arg=first)
    assert tab.locator("#caption").inner_text().startswith("layer 0, head 0:"), "hovering is not choosing"
    button.click()
    tab.mouse.move(5, 5)
    assert tab.locator("#caption").inner_text().startswith("layer 0, head 2:")
    assert button.get_attribute("aria-pressed") == "true"
    assert problems == []


def test_every_control_is_reached_by_keyboard(shown: tuple[Any, list[str]]) -> None:
    tab, problems = shown
    reached = []
    for _ in range(20):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("() => document.activeElement.id || document.activeElement.textContent"))
    assert {"layer", "head", "row", "stretch", "head 0"} <= set(reached)
    assert "head 3" not in reached, "the heads are one stop, and so are the tokens"
    tab.locator("#heads button").nth(1).focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#head").input_value() == "1"
    tab.locator("#layer").focus()
    tab.keyboard.press("ArrowDown")
    assert tab.locator("#caption").inner_text().startswith("layer 1, head 1:")
    assert problems == []


def test_arrow_keys_choose_heads_layers_and_tokens(shown: tuple[Any, list[str]]) -> None:
    tab, problems = shown
    heads, tokens = tab.locator("#heads button"), tab.locator("#tokens li")
    heads.first.focus()
    keys = ("ArrowLeft", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowUp")
    for key, layer, head in zip(keys, (0, 0, 0, 1, 1, 1, 0), (0, 1, 2, 2, 2, 1, 1), strict=True):
        tab.keyboard.press(key)
        expect(heads.nth(head)).to_be_focused()
        assert tab.locator("#caption").inner_text().startswith(f"layer {layer}, head {head}:")
        assert heads.nth(head).get_attribute("aria-pressed") == "true"
    tokens.first.focus()
    for at in (1, 2, 3):
        tab.keyboard.press("ArrowRight")
        expect(tokens.nth(at)).to_be_focused()
        assert tab.locator("#row").input_value() == str(at)
        assert tab.locator("#tokens [aria-selected=true]").inner_text() == tokens.nth(at).inner_text()
    assert problems == []


def test_the_hover_line_is_not_left_over_from_another_layer(shown: tuple[Any, list[str]]) -> None:
    tab, problems = shown
    hint = tab.locator("#hovered").inner_text()
    tab.locator("#heads button canvas").first.hover()
    expect(tab.locator("#hovered")).to_contain_text("layer 0, head 0:")
    tab.mouse.move(5, 5)
    tab.locator("#layer").select_option("1")
    assert tab.locator("#hovered").inner_text() == hint
    assert problems == []


def test_a_row_says_what_it_reads(shown: tuple[Any, list[str]]) -> None:
    tab, problems = shown
    _, cache = random_model(mask_token_id=MASK, seed=1).run_with_cache(torch.tensor([TOKENS]))
    tab.locator("#tokens li").nth(4).click()
    read = cache["pattern", 0][0, 0, 4]
    first = tab.locator("#read li").first.inner_text()
    assert (
        first == f"{read.max():.4f}  {'▶◆[M]' if read.argmax() == 1 else TOKENS[int(read.argmax())]} ({read.argmax()})"
    )
    shares = tab.evaluate(
        "() => [...document.querySelectorAll('#tokens li')].map(i => +i.style.getPropertyValue('--share-of-full'))"
    )
    assert shares == pytest.approx(read.tolist(), abs=1e-5)
    tab.locator("#stretch").check()
    label = tab.locator("label", has=tab.locator("#stretch")).inner_text().strip()
    assert re.fullmatch(r"full colour at this layer's highest share, \d\.\d\d, not at 1", label)
    stretched = tab.evaluate(
        "() => +document.querySelectorAll('#tokens li')[0].style.getPropertyValue('--share-of-full')"
    )
    assert stretched == pytest.approx(float(read[0] / cache["pattern", 0][0].max()), abs=1e-4)
    assert problems == []


def test_tokens_are_text_whatever_they_hold(tmp_path: Path, browser: Browser) -> None:
    model = random_model(mask_token_id=MASK)
    model.tokenizer = Words()  # type: ignore[assignment]
    page = viz.attention(model, list(range(10)))
    assert page.data["tokens"] == HOSTILE
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><meta charset='utf-8'><body>{page._repr_html_()}", encoding="utf-8")
    with opened(browser, page.save(tmp_path / "page.html")) as (tab, problems):
        listed = tab.locator("#tokens li").evaluate_all("items => items.map(item => item.textContent)")
        assert listed == [text.replace("\n", "⏎") for text in HOSTILE]
        assert tab.locator("main script, main b").count() == 0
        assert tab.title().startswith("Attention: <script>")
    with opened(browser, notebook) as (tab, more):
        frame = tab.frame_locator("iframe")
        assert frame.locator("#tokens li").count() == 10
        frame.locator("#pattern canvas").wait_for()
        tab.wait_for_function(  # the frame takes its page's height
            "() => { const f = document.querySelector('iframe');"
            " return f.clientHeight >= f.contentDocument.documentElement.scrollHeight - 1; }"
        )
    assert problems == more == []


def test_5000_tokens_are_shown_row_by_row(tmp_path: Path, browser: Browser) -> None:
    model = random_model(mask_token_id=MASK, n_ctx=5000)
    tokens = [position % 12 for position in range(5000)]
    tokens[17] = MASK
    page = viz.attention(model, tokens)
    assert page.data["rows"] == [17]
    assert "from 1 of the 5000 positions" in page.about
    path = page.save(tmp_path / "page.html")
    with opened(browser, path) as (tab, problems):
        assert tab.locator("#tokens li").count() == 5000
        assert "Whole patterns are drawn of up to 128 tokens" in tab.locator("#pattern").inner_text()
        assert tab.locator("#read li").count() == 8
    assert problems == []


def test_32_layers_of_32_heads_over_64_tokens_fit(tmp_path: Path, browser: Browser) -> None:
    model = random_model(d_model=64, n_heads=32, n_layers=32, n_ctx=64, mask_token_id=MASK)
    path = viz.attention(model, [position % 12 for position in range(64)]).save(tmp_path / "page.html")
    assert path.stat().st_size < 25_000_000
    with opened(browser, path) as (tab, problems):
        tab.wait_for_selector("#pattern canvas", timeout=5000)
        assert tab.locator("#heads canvas").count() == 32
        tab.locator("#layer").select_option("31")
        assert tab.locator("#caption").inner_text().startswith("layer 31, head 0:")
    assert problems == []


def test_a_causal_pattern_has_its_upper_triangle_grey(tmp_path: Path, browser: Browser) -> None:
    page = viz.attention(random_model(attention="causal"), [1, 2, 3])
    with opened(browser, page.save(tmp_path / "page.html")) as (tab, problems):
        _, _, pixels = tab.locator("#heads canvas").first.evaluate(SMALL)
        colours = np.array(pixels).reshape(3, 3, 4)[..., :3]
        assert (colours[np.triu_indices(3, 1)] == 200).all()
        assert not (colours[np.tril_indices(3)] == 200).all(-1).any()
    assert problems == []


def test_the_data_survives_its_page(tmp_path: Path) -> None:
    page = viz.attention(random_model(mask_token_id=MASK), TOKENS)
    text = page.html(shared=True)
    assert text.count('<script src="circuitsvis.js"></script>') == 1
    assert len(text) < 40_000
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert json.loads(data)["patterns"] == page.data["patterns"]


# ---- patterns from elsewhere


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6)),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    tensor=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_attention_is_shown_as_it_is(shape: tuple[int, int, int], dtype: str, tensor: bool, seed: int) -> None:
    rows = np.random.default_rng(seed).dirichlet(np.ones(shape[-1]), shape).astype(dtype)
    array, tokens = torch.tensor(rows) if tensor else rows, [f"t{at}" for at in range(shape[-1])]
    page = viz.patterns(array, tokens)
    assert page.kind == "attention" and page.data["tokens"] == tokens
    assert patterns(page) == pytest.approx(rows.astype(float), abs=1e-5)
    assert patterns(viz.patterns(array[0], tokens)) == pytest.approx(rows[:1].astype(float), abs=1e-5), "of one layer"


def test_a_models_own_patterns_make_the_same_pictures() -> None:
    for kind, reach in (("bidirectional", None), ("causal", 1)):
        model = random_model(attention=kind)
        whole = viz.attention(model, [1, 2, 3, 4])
        _, cache = model.run_with_cache(torch.tensor([[1, 2, 3, 4]]))
        page = viz.patterns(torch.stack([cache["pattern", layer][0] for layer in range(2)]), [1, 2, 3, 4])
        assert patterns(page) == pytest.approx(patterns(whole), abs=2e-5)
        assert page.data["reach"] == whole.data["reach"] == reach
        assert page.data["tokens"] == whole.data["tokens"]
        assert ("reads a later one" in page.about) == (reach == 1)


def test_an_edited_pattern_whose_rows_add_up_to_less_is_shown() -> None:
    array = np.full((1, 3, 3), 1 / 3)
    array[0, :, 2] = 0
    assert patterns(viz.patterns(array, "abc"))[0] == pytest.approx(array, abs=1e-5)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.ones((3, 3)), r"^array: has the shape \(3, 3\) for 3 tokens; give \[layer head query_pos key_pos\] or \["),
        (np.ones((1, 1, 1, 3, 3)), r"^array: has the shape \(1, 1, 1, 3, 3\) for 3 tokens"),
        (np.ones((2, 3, 4)), r"^array: has the shape \(2, 3, 4\) for 3 tokens; .* with a position for each token$"),
        (np.ones((2, 4, 4)), r"^array: has the shape \(2, 4, 4\) for 3 tokens"),
        (np.ones((0, 3, 3)), r"^array: has the shape \(0, 3, 3\) for 3 tokens"),
        (-np.eye(3)[None], r"^array: holds -1, and attention is from 0 to 1; give it as it is after softmax$"),
        (np.full((1, 3, 3), np.nan), r"^array: holds nan, and attention is from 0 to 1"),
        (np.full((1, 3, 3), np.inf), r"^array: row 0 of layer 0, head 0 adds up to inf"),
        (np.eye(3)[[0, 0, 0]].T[None, None], r"^array: row 0 of layer 0, head 0 adds up to 3, and attention to 1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_attention_is_refused(array: np.ndarray, says: str) -> None:
    for given_as in (array, torch.tensor(array)):
        with refused(says):
            viz.patterns(given_as, "abc")


def test_more_patterns_than_a_page_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_ENTRIES", 17)
    with refused(r"^array: 18 entries are more than the 17 that a page holds; choose some layers or heads"):
        viz.patterns(np.full((2, 3, 3), 1 / 3), "abc")
    assert len(patterns(viz.patterns(np.full((1, 3, 3), 1 / 3), "abc"))) == 1


FULL = """canvas => {
  const {width, height} = canvas, {data} = canvas.getContext('2d').getImageData(0, 0, width, height);
  const [x, y] = [[], []], box = canvas.getBoundingClientRect();
  for (let at = 0; at < width * height; at++) {
    if (data[4 * at + 1] < 40 && data[4 * at + 2] > 100) { x.push(at % width); y.push(Math.floor(at / width)); }
  }
  const [from, to] = [(all) => all.reduce((a, b) => Math.min(a, b)), (all) => all.reduce((a, b) => Math.max(a, b)) + 1];
  return [box.left + from(x) * box.width / width, box.top + from(y) * box.height / height,
          box.left + to(x) * box.width / width, box.top + to(y) * box.height / height];
}"""
"""The part of the window in which cells have the full colour, from the first to the last."""
LISTEN = """() => {
  window.written = [];
  const write = CanvasRenderingContext2D.prototype.fillText;
  CanvasRenderingContext2D.prototype.fillText = function (text, ...at) {
    written.push(text);
    write.call(this, text, ...at);
  };
}"""


def test_a_click_on_the_large_pattern_chooses_its_row(tmp_path: Path, browser: Browser) -> None:
    read = [2, 0, 3, 1]  # each row reads one token, each token is read once: full colours reach from edge to edge
    page = viz.patterns(np.eye(4)[read][None], HOSTILE[:4])
    high = {"width": 1280, "height": 1600}
    with opened(browser, page.save(tmp_path / "page.html"), viewport=high) as (tab, problems):
        tab.wait_for_function(DRAWN)
        left, top, right, bottom = tab.locator("#pattern canvas").evaluate(FULL)
        tab.evaluate(LISTEN)
        for row, column in ((1, 0), (0, 2), (3, 1), (2, 0)):
            tab.mouse.move(left + (right - left) * (column + 0.5) / 4, top + (bottom - top) * (row + 0.5) / 4)
            share = f"{float(column == read[row]):.4f}"
            said = f"{HOSTILE[row]} ({row}) reads {share} of {HOSTILE[column]} ({column})"
            tab.wait_for_function("said => written.includes(said)", arg=said)
            tab.mouse.down()
            tab.mouse.up()
            expect(tab.locator("#row")).to_have_value(str(row))
            assert tab.locator("#reading").text_content() == f"What {HOSTILE[row]} ({row}) reads, layer 0, head 0"
            assert tab.locator("#tokens li.from").text_content() == HOSTILE[row]
            tab.wait_for_function(DRAWN)
        words = set(tab.evaluate("written"))
        assert {"read from", "reads"} <= words
        assert not {"Source Token", "Destination Token"} & words, "a source is something else here"
        assert "▶" not in tab.locator("main").inner_text(), "nothing is predicted here"
    assert problems == []


# ---- what a reader takes away


def saved_as(tab: Any, format: str) -> bytes:
    with tab.expect_download() as download:
        tab.locator("#save").get_by_role("button", name=format).click()
    assert download.value.suggested_filename.endswith(f".{format.lower()}")
    return download.value.path().read_bytes()


def test_the_shown_pattern_is_saved_as_a_table_and_as_pictures(tmp_path: Path, browser: Browser) -> None:
    array = np.tril(np.random.default_rng(0).dirichlet(np.ones(4), (2, 4)))
    tokens = ["a,b", "<b>", '"', "d"]
    with opened(browser, viz.patterns(array, tokens).save(tmp_path / "page.html")) as (tab, problems):
        tab.locator("#head").select_option("1")
        rows = list(csv.reader(saved_as(tab, "CSV").decode().splitlines()))
        assert rows[0] == ["name", "x", "y", "z"]
        assert [(x, y) for _, x, y, _ in rows[1:3]] == [("a,b (0)", "a,b (0)"), ("<b> (1)", "a,b (0)")]
        read = np.array([float(z or "nan") for *_, z in rows[1:]]).reshape(4, 4)
        assert {name for name, *_ in rows[1:]} == {"layer 0, head 1"}
        assert read[np.tril_indices(4)] == pytest.approx(array[1][np.tril_indices(4)], abs=2e-5)
        assert np.isnan(read[np.triu_indices(4, 1)]).all(), "what is not reached has no number"
        svg = ElementTree.fromstring(saved_as(tab, "SVG"))
        fills = [part.get("fill") for part in svg.iter("{http://www.w3.org/2000/svg}rect")][1:]
        assert len(fills) == 16 and fills.count("#c8c8c8") == 6
        assert "<b> (1)" in [part.text for part in svg.iter("{http://www.w3.org/2000/svg}text")]
        png = saved_as(tab, "PNG")
        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
        assert png.startswith(b"\x89PNG") and (width, height) == tuple(
            2 * float(svg.get(of) or 0) for of in ("width", "height")
        )
        assert problems == []


def test_of_rows_alone_there_is_a_table_and_no_picture(tmp_path: Path, browser: Browser) -> None:
    page = viz.attention(random_model(mask_token_id=MASK), TOKENS, rows=[1])
    with opened(browser, page.save(tmp_path / "page.html")) as (tab, problems):
        assert tab.locator("#save button").all_inner_texts() == ["CSV"]
        assert len(saved_as(tab, "CSV").decode().splitlines()) == 1 + len(TOKENS)
        assert problems == []


def test_full_colour_at_the_highest_share_is_no_choice_where_that_is_1(tmp_path: Path, browser: Browser) -> None:
    array = np.stack([np.full((1, 2, 2), 0.5), np.eye(2)[None]])
    with opened(browser, viz.patterns(array, ["a", "b"]).save(tmp_path / "page.html")) as (tab, problems):
        expect(tab.locator("#stretch")).to_be_visible()
        tab.locator("#stretch").check()
        tab.locator("#layer").select_option("1")
        expect(tab.locator("#stretch")).to_be_hidden()
        assert problems == []
