"""The explorer: its numbers are the measures' own, and every control, click, key and link shows what it says."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers import random_model, tiny_run
from model_helpers import SHAPE, llama_bridge, mirrored_pairs
from page_helpers import HOSTILE, expect, middle_of, opened, point_of

from mdm_interp import viz
from mdm_interp.config import FactConfig
from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import predict
from mdm_interp.measures.evidence import evidence_matrix
from mdm_interp.measures.head_scores import SCORES, head_scores
from mdm_interp.measures.parity import plane_parity
from mdm_interp.measures.routes import score_matrix
from mdm_interp.training.loop import train
from mdm_interp.training.runs import Run
from mdm_interp.viz.pages import explorer
from mdm_interp.viz.pages.page import Page, as_lists, packed_signed

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SIDES = ("forward", "reverse")
PAIRS = mirrored_pairs(causal=False)


def silence_head(head: int) -> list[tuple[str, Any]]:
    def edit(z: torch.Tensor, hook: object) -> torch.Tensor:
        z = z.clone()
        z[:, :, head] = 0
        return z

    return [("blocks.0.attn.hook_z", edit)]


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    shares = np.frombuffer(base64.b64decode(packed["values"]), dtype="<u2") / 0xFFFF
    return (2 * shares - 1) * packed["most"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = tiny_run(FactConfig(n_entities=9, n_filler=4), "rope", "any_order", 0)
    return train(config, root=tmp_path_factory.mktemp("store"), progress=False)


# ---- what a page holds


def test_every_state_of_a_run_has_the_measures_own_numbers(run: Run) -> None:
    told: list[tuple[int, int]] = []
    page = viz.explore(run, report=lambda done, total: told.append((done, total)))
    pairs = run.query_pairs(n_contexts=1)[: explorer.MAX_PAIRS]
    (series,) = page.data["series"]
    assert series["steps"] == run.steps
    assert len(page.data["states"]) == len(run.steps) == len(told)
    assert told[-1] == (len(run.steps), len(run.steps))
    tokens = torch.tensor([run.facts.token_names.index(name) for name in page.data["tokens"]])
    assert len(tokens) == run.config.model.d_vocab, "a small vocabulary is there in whole"
    for step, state in list(zip(run.steps, page.data["states"], strict=True))[:: len(run.steps) - 1]:
        model = run.model(step)
        scores, parity = head_scores(model, pairs), plane_parity(model, pairs)
        for name, of_pairs in scores.by_pair.items():
            assert state["scores"][name] == as_lists(of_pairs)
            assert state["overall"][name] == as_lists(scores.over_pairs[name])
        for side in SIDES:
            queries = [getattr(pair, side) for pair in pairs]
            assert state["probability"][side] == as_lists(predict(model, queries).probability)
        for name in ("even", "odd"):
            planes = getattr(parity, name)
            for at in range(len(pairs)):
                near = float(planes[at].abs().max()) * 1e-4
                assert unpacked(state["planes"][name][at]) == pytest.approx(planes[at].flatten().numpy(), abs=near)
        maps = {"evidence": evidence_matrix(model, tokens, tokens)[..., 0]}
        for side, sign in (("right", 1), ("left", -1)):
            maps[side] = score_matrix(model, tokens, tokens, sign * page.data["offset"])
        for name, expected in maps.items():
            near = float(expected.abs().max()) * 1e-4
            assert unpacked(state["maps"][name][0]) == pytest.approx(expected.detach().flatten().numpy(), abs=near)


@torch.no_grad()
def test_the_lens_and_denoising_are_the_models_own() -> None:
    model = random_model(mask_token_id=0, n_layers=2)
    page = viz.explore(model, PAIRS)
    (state,), names = page.data["states"], page.data["names"]
    for at, pair in enumerate(PAIRS):
        logits = model(torch.tensor([pair.reverse.tokens]))[0]
        logits[:, 0] = -torch.inf  # the mask is never predicted
        last, expected = state["lens"]["reverse"][at][-1], logits.softmax(-1)
        for position, flat in enumerate(last):
            best = expected[position].topk(3)
            assert [names[place] for place in flat[::2]] == [str(token) for token in best.indices.tolist()]
            assert flat[1::2] == pytest.approx(best.values, abs=1e-4)
        ((step, position, token, probability),) = state["denoised"]["reverse"][at]
        assert (step, position) == (1, pair.reverse.answer_span[0])
        assert (names[token], probability) == (names[last[position][0]], pytest.approx(last[position][1], abs=1e-4))


def test_models_and_edits_lie_side_by_side() -> None:
    models = {"one": random_model(mask_token_id=0), "other": random_model(mask_token_id=0, seed=3)}
    page = viz.explore(models, PAIRS, edits={"head 2 off": silence_head(2)})
    assert [one["name"] for one in page.data["series"]] == ["one", "other", "one, head 2 off"]
    one, other, edited = page.data["states"]
    assert one["scores"]["forward route"] != other["scores"]["forward route"]
    assert edited["scores"]["forward route"][0][0] == one["scores"]["forward route"][0][0], "layer 0 attends as before"
    attributed = np.array(edited["scores"]["forward attribution"], dtype=float)
    assert (np.nan_to_num(attributed[:, 0, 2]) == 0).all()
    assert edited["probability"] != one["probability"]
    assert not models["one"].hook_dict["blocks.0.attn.hook_z"].fwd_hooks, "no hook stays"


def test_what_is_undefined_says_why(tmp_path: Path) -> None:
    arm = random_model(**SHAPE, attention="causal", gated_mlp=True, act_fn="silu")
    pairs = mirrored_pairs(causal=True)
    (state,) = viz.explore(arm, pairs).data["states"]
    assert "an ARM's" in state["undefined"]["odd share"]
    assert "an ARM's" in state["no_planes"]
    assert state["denoised"] == {side: [[]] * len(pairs) for side in SIDES}
    (bridged,) = viz.explore(llama_bridge(arm, tmp_path), pairs).data["states"]
    assert list(bridged["maps"]) == ["evidence"]
    for name in ("forward route", "reverse attribution"):
        ours, theirs = (np.array(of["scores"][name], dtype=float) for of in (state, bridged))
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-3, nan_ok=True)


def test_what_does_not_fit_is_thinned_then_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = run.query_pairs(n_contexts=1)[:2]
    whole = viz.explore(run, pairs)
    assert whole.data["pairs"][0]["forward"]["rows"] == list(range(len(pairs[0].forward.tokens)))
    monkeypatch.setattr(explorer, "MAX_ENTRIES", 400)
    page = viz.explore(run, pairs)
    assert page.data["pairs"][0]["forward"]["rows"] == page.data["pairs"][0]["forward"]["readout"]
    steps = page.data["series"][0]["steps"]
    assert 1 < len(steps) < len(run.steps)
    assert steps[-1] == run.steps[-1]
    monkeypatch.setattr(explorer, "MAX_ENTRIES", 50)
    with pytest.raises(
        UserError, match=r"^query_pairs: 2 pairs of 1 models .* are more than the 50 entries a page holds; give fewer"
    ):
        viz.explore(run, pairs)


def test_tokens_that_a_runs_world_does_not_have_are_named_by_their_ids(run: Run, tmp_path: Path) -> None:
    cfg = run.config.model
    wide = run.config.model_copy(update={"model": cfg.model_copy(update={"d_vocab": cfg.d_vocab + 2})})
    page = viz.explore(train(wide, root=tmp_path, progress=False))
    assert page.data["tokens"][-2:] == [str(cfg.d_vocab), str(cfg.d_vocab + 1)]


def test_chosen_checkpoints_are_shown(run: Run) -> None:
    page = viz.explore(run, steps=run.steps[::2])
    assert page.data["series"][0]["steps"] == run.steps[::2]
    assert len(page.data["states"]) == len(run.steps[::2])
    with pytest.raises(UserError, match=r"^steps: RoPE .* has no checkpoint 2; give some of \[0, 1, 5, 30\]"):
        viz.explore(run, steps=[2, 5])


def test_mistakes_are_named(run: Run) -> None:
    model = random_model(mask_token_id=0)
    with pytest.raises(UserError, match=r"^query_pairs: a model by itself does not say what to ask it"):
        viz.explore(model)
    with pytest.raises(UserError, match=r"^query_pairs: got none"):
        viz.explore(model, [])
    with pytest.raises(UserError, match=r"^model: got none"):
        viz.explore({}, PAIRS)
    with pytest.raises(UserError, match=r"^model: 'wide' has .*'n_heads': 2.* and 'narrow' .*'n_heads': 4"):
        viz.explore({"narrow": model, "wide": random_model(mask_token_id=0, n_heads=2)}, PAIRS)
    with pytest.raises(UserError, match=r"^edits: two models of the page are called 'a, b'"):
        viz.explore({"a": model, "a, b": model}, PAIRS, edits={"b": []})


def test_signed_numbers_are_packed() -> None:
    values = torch.tensor([[-3.0, 0.0], [float("nan"), 1.5]])
    assert unpacked(packed_signed(values)) == pytest.approx([-3, 0, 0, 1.5], abs=1e-4)
    assert unpacked(packed_signed(torch.zeros(2))) == pytest.approx([0, 0], abs=1e-4)


# ---- in a browser

MAP = "place => place.data[0].z"


@pytest.fixture(scope="module")
def saved(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path]:
    page = viz.explore(run)
    return page, page.save(tmp_path_factory.mktemp("explorer") / "page.html")


@pytest.fixture(scope="module")
def beside(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path]:
    """A run, and its last checkpoint under an edit."""
    page = viz.explore(run, edits={"head 1 off": silence_head(1)})
    return page, page.save(tmp_path_factory.mktemp("explorer") / "page.html")


@pytest.fixture
def shown(saved: tuple[Page, Path], browser: Browser) -> Iterator[tuple[Page, Any]]:
    """The page of a run, in a browser; nothing may go wrong there."""
    page, path = saved
    with opened(browser, path) as (tab, problems):
        tab.wait_for_selector("#training-score .shapelayer path", state="attached")
        yield page, tab
        assert problems == []


def said(tab: Any) -> dict[str, list[str]]:
    """The table of the chosen head's scores, by its rows."""
    rows = tab.locator("#scores tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(c => c.textContent))"
    )
    return {row[0]: row[1:] for row in rows}


def test_a_head_is_chosen_by_click_key_and_table(shown: tuple[Page, Any]) -> None:
    page, tab = shown
    overall = page.data["states"][len(page.data["series"][0]["steps"]) - 1]["overall"]["forward route"][0]
    strongest = int(np.argmax(overall))

    def check(head: int) -> None:
        assert tab.locator("#chosen").inner_text() == f"Layer 0, head {head}"
        assert float(said(tab)["forward route"][1]) == pytest.approx(overall[head], rel=1e-3)
        frames = tab.locator("#maps-shown > div").evaluate("place => place.layout.shapes.map(({x0, x1}) => [x0, x1])")
        assert frames == [[head - 0.5, head + 0.5]]
        assert tab.locator("#ranking tr.chosen th").inner_text() == f"0.{head}"

    check(strongest)
    tab.mouse.click(*middle_of(tab, "#maps-shown > div", 1 - strongest, 0))
    check(1 - strongest)
    tab.locator("#maps").focus()
    tab.keyboard.press("ArrowLeft" if strongest == 0 else "ArrowRight")
    check(strongest)
    tab.locator("#ranking tbody tr").nth(1 - strongest).click()
    check(1 - strongest)


def test_arrow_keys_go_from_row_to_row(shown: tuple[Page, Any]) -> None:
    _, tab = shown
    for table, control in (("#ranking", "#head"), ("#served", "#pair")):
        rows = tab.locator(f"{table} tbody tr")
        assert rows.evaluate_all("rows => rows.filter(row => row.tabIndex === 0).length") == 1, "one stop of Tab"
        rows.first.focus()
        tab.keyboard.press("ArrowUp")  # there is none above
        tab.keyboard.press("ArrowDown")
        before = tab.locator(control).input_value()
        expect(rows.nth(1)).to_be_focused()
        assert tab.locator(control).input_value() == before, "going there is not choosing"
        tab.keyboard.press("Enter")
        expect(rows.nth(1)).to_be_focused()
        expect(tab.locator(f"{table} tr.chosen")).to_be_focused()
        tab.keyboard.press("ArrowUp")
        expect(rows.first).to_be_focused()


def test_the_map_has_the_chosen_score_of_the_chosen_fact(shown: tuple[Page, Any]) -> None:
    page, tab = shown
    last = page.data["states"][len(page.data["series"][0]["steps"]) - 1]
    for name in SCORES:
        tab.locator("#score").select_option(name)
        of_layer = "of the layer" in SCORES[name]
        shown_heads = last["overall"][name] if not of_layer else [row[:1] for row in last["overall"][name]]
        assert tab.locator("#maps-shown > div").evaluate(MAP) == shown_heads
        assert SCORES[name] in tab.locator("#score-said").inner_text()
        assert ("none of a head's own" in tab.locator("#score-said").inner_text()) == of_layer
        hovered = tab.locator("#maps-shown > div").evaluate("place => place.data[0].hovertext[0][0]")
        assert ("all heads" in hovered) == of_layer
    assert tab.locator("#ranking thead th", has_text=re.compile("^storage alignment, of the layer")).count() == 1
    head = tab.locator("#head").input_value()
    tab.mouse.click(*middle_of(tab, "#maps-shown > div", 0, 0))
    assert tab.locator("#head").input_value() == head, "a layer's number chooses no head"
    tab.locator("#average").uncheck()
    tab.locator("#pair").select_option("3")
    tab.locator("#score").select_option("forward route")
    assert tab.locator("#maps-shown > div").evaluate(MAP) == last["scores"]["forward route"][3]


def test_the_table_of_heads_sorts(shown: tuple[Page, Any]) -> None:
    page, tab = shown
    last = page.data["states"][len(page.data["series"][0]["steps"]) - 1]["overall"]
    for name in ("reverse evidence", "forward route"):
        button = tab.locator("#ranking thead button", has_text=name)
        button.press("Enter")
        expect(button).to_be_focused()
        order = [int(text.split(".")[1]) for text in tab.locator("#ranking tbody th").all_inner_texts()]
        assert order == sorted(range(2), key=lambda head: -last[name][0][head])
        assert button.locator("xpath=..").get_attribute("aria-sort") == "descending"
        button.press("Enter")
        assert tab.locator("#ranking tbody th").all_inner_texts() == [f"0.{head}" for head in reversed(order)]
        assert button.locator("xpath=..").get_attribute("aria-sort") == "ascending"
    first = tab.locator("#ranking thead button").first
    for direction in ("ascending", "descending"):
        first.click()
        assert first.locator("xpath=..").get_attribute("aria-sort") == direction
    assert tab.locator("#ranking tbody th").all_inner_texts() == ["0.1", "0.0"]


def test_the_slider_and_the_training_curve_move_through_training(shown: tuple[Page, Any]) -> None:
    page, tab = shown
    steps = page.data["series"][0]["steps"]
    tab.locator("#shown-at").focus()
    for at in reversed(range(len(steps) - 1)):
        tab.keyboard.press("ArrowLeft")
        state = page.data["states"][at]
        assert tab.locator("#shown-step").inner_text() == f"step {steps[at]}"
        assert float(said(tab)["forward probability of the answer"][0]) == pytest.approx(
            state["probability"]["forward"][0], rel=1e-3
        )
        assert tab.locator("#maps-shown > div").evaluate(MAP) == state["overall"]["forward route"]
    tab.mouse.click(*point_of(tab, "#training-probability", 2))
    expect(tab.locator("#shown-step")).to_have_text(f"step {steps[2]}")


@pytest.fixture
def compared(beside: tuple[Page, Path], browser: Browser) -> Iterator[tuple[Page, Any]]:
    """The page of a run and an edit of it, in a browser; nothing may go wrong there."""
    page, path = beside
    with opened(browser, path) as (tab, problems):
        tab.wait_for_selector("#training-score .shapelayer path", state="attached")
        yield page, tab
        assert problems == []


def test_a_page_of_two_opens_with_both_and_their_difference(compared: tuple[Page, Any]) -> None:
    page, tab = compared
    one, other = page.data["states"][-2:]
    assert tab.locator("#other").input_value() == "1"
    tab.locator("#score").select_option("forward attribution")
    maps = {name: tab.locator(f"#maps-{name} > div").evaluate(MAP) for name in ("shown", "other", "difference")}
    first, second = (np.array(of["overall"]["forward attribution"], dtype=float) for of in (one, other))
    assert maps["difference"] == pytest.approx(first - second)
    assert (maps["shown"], maps["other"]) == (one["overall"]["forward attribution"], second.tolist())
    assert "head 1 off" in tab.locator("#other option:checked").inner_text()
    for slot, letter in {"shown": "A", "other": "B", "difference": "A less B"}.items():
        assert tab.locator(f"#maps-{slot} figcaption").inner_text() == f"{letter}, forward attribution"
    assert len(said(tab)["forward route"]) == 5, "both of both, and the difference"
    tab.locator("#other").select_option("-1")
    assert tab.locator("#patterns figure").count() == 2
    assert tab.locator("#maps figcaption").inner_text() == "forward attribution"
    tab.reload()
    assert tab.locator("#other").input_value() == "-1", "the address says that nothing is compared"


def test_patterns_planes_and_token_maps_have_their_differences(compared: tuple[Page, Any]) -> None:
    _, tab = compared
    tab.locator("#shown-at").focus()
    tab.keyboard.press("Home")  # the edit leaves scores as they are: another step has others
    kinds = {
        "patterns": {"forward": "z", "reverse": "z"},
        "token-maps": {"evidence": "z", "right": "z", "left": "z"},
        "planes": {"": "y"},
    }
    for part, of in kinds.items():
        for kind, axis in of.items():
            slots = [f"#{part}-{slot}{'-' * bool(kind)}{kind} > div" for slot in ("shown", "other", "difference")]
            read = f"place => place.data.map(trace => trace.{axis})"
            one, other, apart = (np.array(tab.locator(slot).evaluate(read), dtype=float) for slot in slots)
            assert apart == pytest.approx(one - other, abs=1e-4)
            assert (abs(apart) > 1e-3).any()
    ends = "place => [place.data[0].zmin, place.data[0].zmax, place.data[0].colorscale.length]"
    assert tab.locator("#patterns-other-forward > div").evaluate(ends) == [0, 1, 2]
    low, high, n_colours = tab.locator("#patterns-difference-forward > div").evaluate(ends)
    assert (low, n_colours) == (-high, 3)


def test_two_sides_of_shares_have_one_scale_and_only_their_difference_is_signed(compared: tuple[Page, Any]) -> None:
    _, tab = compared
    tab.locator("#shown-at").focus()
    tab.keyboard.press("Home")
    for name in ("forward route", "reverse route", "odd share"):
        tab.locator("#score").select_option(name)
        shown, other, apart = (
            tab.locator(f"#maps-{slot} > div").evaluate("place => [place.data[0].zmin, place.data[0].zmax]")
            for slot in ("shown", "other", "difference")
        )
        assert shown == other
        assert (shown[0], apart[0]) == (0, -apart[1])


@pytest.mark.parametrize("width", [1400, 700])
def test_long_names_stretch_nothing(width: int, run: Run, tmp_path: Path, browser: Browser) -> None:
    models = {f"{name} " * 12 + name: run for name in ("a_very_long_name", "another_one")}
    path = viz.explore(models, run.query_pairs(n_contexts=1)[:2], steps=run.steps[-1:]).save(tmp_path / "page.html")
    with opened(browser, path, viewport={"width": width, "height": 1000}) as (tab, problems):
        tab.wait_for_selector("#maps-difference .heatmaplayer image", state="attached")
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        if width == 1400:
            assert tab.locator("#ranking").evaluate("table => table.scrollWidth <= table.parentElement.clientWidth")
        assert problems == []


def test_runs_that_differ_at_the_end_of_their_names_look_different(shown: tuple[Page, Any]) -> None:
    """A browser cuts what does not fit into a box."""
    _, tab = shown
    box = tab.locator("#shown").evaluate(
        """select => {
          const free = select.cloneNode(true);
          free.style.maxWidth = 'none';
          select.after(free);
          const widths = [select.offsetWidth, free.offsetWidth];
          free.remove();
          return widths;
        }"""
    )
    assert box[0] == box[1]


def test_a_model_without_planes_says_why(tmp_path: Path, browser: Browser) -> None:
    models = {name: random_model(mask_token_id=0, position=name) for name in ("alibi", "rope")}
    with opened(browser, viz.explore(models, PAIRS).save(tmp_path / "page.html")) as (tab, problems):
        expect(tab.locator("#no-planes")).to_be_visible()
        assert tab.locator("#no-planes").inner_text().startswith("A, model: position scheme 'alibi' has no rotation")
        assert tab.locator("#planes figcaption").all_inner_texts() == [
            f"B, {tab.locator('#pair option:checked').inner_text()}"
        ]
        tab.locator("#shown").select_option("1")
        assert tab.locator("#no-planes").inner_text() == ""
        assert tab.locator("#planes figure").count() == 3
        assert problems == []


def test_the_address_holds_the_view_and_opens_it(beside: tuple[Page, Path], browser: Browser) -> None:
    page, path = beside
    steps = page.data["series"][0]["steps"]
    with opened(browser, path) as (tab, problems):
        tab.goto(f"{path.as_uri()}#layer=0&head=1&step={steps[3]}&pair=2&score=odd+share")
        tab.reload()
        tab.wait_for_selector("#maps-shown .heatmaplayer image", state="attached")
        assert tab.locator("#chosen").inner_text() == "Layer 0, head 1"
        assert tab.locator("#shown-step").inner_text() == f"step {steps[3]}"
        assert (tab.locator("#pair").input_value(), tab.locator("#score").input_value()) == ("2", "odd share")
        tab.locator("#head").select_option("0")
        assert "head=0" in tab.url
        assert f"step={steps[3]}" in tab.url
        tab.goto(f"{path.as_uri()}#head=1&other=1")
        expect(tab.locator("#chosen")).to_have_text("Layer 0, head 1")
        assert tab.locator("#patterns figure").count() == 6
        expect(tab.locator("#code")).to_contain_text("#layer=0&head=1")
        assert problems == []


def test_tokens_facts_and_planes_are_those_of_the_head(shown: tuple[Page, Any]) -> None:
    page, tab = shown
    last = page.data["states"][len(page.data["series"][0]["steps"]) - 1]
    tab.locator("#head").select_option("1")
    n = len(page.data["tokens"])
    expected = unpacked(last["maps"]["evidence"][0]).reshape(2, n, n)[1]
    place = "#token-maps-shown-evidence > div"
    assert np.array(tab.locator(place).evaluate(MAP)) == pytest.approx(expected, rel=1e-3, abs=1e-3)
    tab.locator("#search").fill("a1")
    found = [at for at, name in enumerate(page.data["tokens"]) if "a1" in name.lower()]
    assert 0 < len(found) < n
    assert np.array(tab.locator(place).evaluate(MAP)) == pytest.approx(expected[found], rel=1e-3, abs=1e-3)
    odd = unpacked(last["planes"]["odd"][0]).reshape(2, -1)[1]
    drawn = tab.locator("#planes-shown > div").evaluate("place => place.data.find(({name}) => name === 'odd').y")
    assert drawn == pytest.approx(odd, rel=1e-3, abs=1e-3)
    served = np.array(last["scores"]["forward attribution"], dtype=float)[:, 0, 1]
    best = int(np.nanargmax(served))
    tab.locator("#served tbody tr").first.click()
    assert tab.locator("#pair").input_value() == str(best)
    tab.locator("#served tbody tr").nth(1).focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#pair").input_value() == str(
        int(np.argsort(-np.nan_to_num(served, nan=-np.inf), kind="stable")[1])
    )


def test_a_plot_is_saved_as_a_table(shown: tuple[Page, Any]) -> None:
    page, tab = shown
    tab.locator("#maps-shown").hover()
    with tab.expect_download() as download:
        tab.locator("#maps-shown button[data-title='Save as CSV']").click()
    lines = download.value.path().read_text().splitlines()
    assert lines[0] == "name,x,y,z"
    last = page.data["states"][len(page.data["series"][0]["steps"]) - 1]["overall"]["forward route"][0]
    assert [float(line.split(",")[3]) for line in lines[1:]] == pytest.approx(last)


def test_hostile_texts_are_shown_as_they_are(tmp_path: Path, browser: Browser) -> None:
    model = random_model(mask_token_id=0)
    model.tokenizer = type("Hostile", (), {"decode": lambda self, tokens: HOSTILE[tokens[0] % len(HOSTILE)]})()
    pair = QueryPair(Query((0, 5, 2), (4,), (0, 1), (2, 3)), Query((2, 5, 0), (4,), (2, 3), (0, 1)), 0, "left")
    page = viz.explore({"<b>one</b>": model}, [pair])
    with opened(browser, page.save(tmp_path / "page.html")) as (tab, problems):
        tab.wait_for_selector("#maps-shown .heatmaplayer image", state="attached")
        assert tab.locator("#shown option").inner_text() == "<b>one</b>"
        assert HOSTILE[5].strip() in tab.locator("#lens").inner_text()
        assert tab.locator("b").count() == 0
        assert problems == []


@pytest.mark.slow
def test_a_model_of_the_size_of_an_8b_one_is_explored(tmp_path: Path, browser: Browser) -> None:
    """32 layers of 32 heads: the page stays small, and a click is answered at once."""
    model = random_model(n_layers=32, n_heads=32, d_head=8, d_model=64, d_vocab=300, n_ctx=32, mask_token_id=299)
    pairs = [
        QueryPair(
            Query((299, 299, *range(at, at + 14), 7, 8), (1, 2), (0, 2), (16, 18)),
            Query((7, 8, *range(at, at + 14), 299, 299), (1, 2), (16, 18), (0, 2)),
            at,
            "left",
        )
        for at in range(8)
    ]
    path = viz.explore(model, pairs).save(tmp_path / "page.html")
    assert path.stat().st_size < 25e6
    with opened(browser, path) as (tab, problems):
        tab.wait_for_selector("#maps-shown .heatmaplayer image", state="attached")
        tab.mouse.click(*middle_of(tab, "#maps-shown > div", 30, 29))
        expect(tab.locator("#chosen")).to_have_text("Layer 29, head 30")
        assert tab.locator("#ranking tbody tr").count() == 60
        assert tab.evaluate("document.querySelectorAll('*').length") < 10_000
        assert problems == []
