"""Gradients of many queries: the same numbers in blocks, in bounded memory, and whatever torch is told to record."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from call_helpers import tensors_in
from helpers import random_model, seeded
from model_helpers import mirrored_pairs, native_peer
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from mdm_interp.data.queries import Query
from mdm_interp.errors import UserError
from mdm_interp.measures.gradients import (
    LearningPath,
    asked,
    contrast_steps,
    first_order,
    gradient_alignment,
    gram,
    influence,
    layer_cosines,
    mean_gradient,
)
from mdm_interp.measures.gradients import backward as backward_pass
from mdm_interp.measures.gradients.gram import blocks
from mdm_interp.models.transformer import HookedTransformer

PAIRS = mirrored_pairs(causal=False)
QUERIES = [pair.forward for pair in PAIRS]
REVERSE = [pair.reverse for pair in PAIRS[:2]]
SENTENCES = torch.randint(1, 12, (9, 5), generator=seeded(1)).tolist()
SHAPES: dict[str, dict[str, Any]] = {"own": {"d_mlp": 20}, "tied": {"tie_word_embeddings": True}}


def double_model(shape: str = "own", **options: Any) -> Any:
    return random_model(mask_token_id=0, dtype="float64", **SHAPES[shape], **options)


def small(monkeypatch: pytest.MonkeyPatch, block: int, tokens: int = 12) -> None:
    """Few tokens at a time, and no more entries kept than a block may have."""
    monkeypatch.setattr(asked, "TOKENS", tokens)
    for function in (gram, influence):
        monkeypatch.setattr(sys.modules[function.__module__], "BLOCK", block)
    monkeypatch.setattr(backward_pass, "KEPT", 0)


# ---- in blocks


@pytest.mark.parametrize("one_side", [True, False])
@pytest.mark.parametrize("most", [0, 1, 2, 3, 5, 7, 12])
def test_blocks_hold_every_pair_once(one_side: bool, most: int) -> None:
    n_left, n_right = 7, 7 if one_side else 3
    held = torch.zeros(n_left, n_right)
    for rows, columns in blocks(most, n_left, None if one_side else n_right):
        held[rows, columns] += 1
        if one_side and rows != columns:
            held[columns, rows] += 1
        count = rows.stop - rows.start + (0 if one_side and rows == columns else columns.stop - columns.start)
        assert count <= max(most, 2)
    assert (held == 1).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [0, 20000])
def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch, shape: str, block: int) -> None:
    measures: list[Callable[[Any], Any]] = [
        lambda model: gram(model, QUERIES),
        lambda model: gram(model, QUERIES, REVERSE),
        lambda model: influence(model, QUERIES, REVERSE),
        (of_sentences := lambda model: influence(model, SENTENCES, QUERIES, n_draws=3)),
    ]
    for model in (double_model(shape), native_peer(random_model(rotary_adjacent_pairs=True))):
        for measure in measures:
            if measure is of_sentences and not isinstance(model, HookedTransformer):
                continue  # this bridge knows no mask
            with monkeypatch.context() as patch:
                whole = dict(tensors_in(measure(model)))
                small(patch, block)
                for (name, got), expected in zip(tensors_in(measure(model)), whole.values(), strict=True):
                    tolerance = 1e-10 if model.cfg.dtype == torch.float64 else 1e-5
                    scale = max(1.0, expected.abs().max().item())
                    assert_close(got, expected, atol=tolerance * scale, rtol=tolerance, msg=name)


# ---- memory


class Live(TorchDispatchMode):
    """Counts the bytes that tensors own which came to be in its time, and their most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self._seen:
                self._seen[storage] = True
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return out

    def _count(self, n_bytes: int) -> None:
        self.now += n_bytes
        self.peak = max(self.peak, self.now)


def peak(measure: Callable[[], Any]) -> int:
    with Live() as live:
        measure()
    return live.peak


def many(count: int) -> list[Query]:
    tokens = torch.randint(1, 12, (count, 6), generator=seeded(2)).tolist()
    return [Query((*said[:4], 0, said[5]), (said[4],), (4, 5), (1, 2)) for said in tokens]


def test_memory_does_not_grow_with_the_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model of width 32, whose streams and activations are more than the result."""
    model = random_model(mask_token_id=0, d_mlp=64, n_layers=4, d_model=32)
    said = torch.randint(1, 12, (80, 6), generator=seeded(1)).tolist()

    def growth(block: int) -> float:
        small(monkeypatch, block, tokens=60)
        few, more = (peak(lambda n=n: influence(model, said[:n], REVERSE, n_draws=4)) for n in (20, 80))
        return more / few

    assert growth(2**18) < 1.25
    assert growth(2**29) > 1.6  # this is what is counted


def test_memory_does_not_grow_with_left_and_right_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model so wide that streams and activations are more than the result."""
    model = random_model(mask_token_id=0, d_mlp=256, d_model=128)

    def growth(block: int, *sides: slice) -> float:
        small(monkeypatch, block, tokens=30)
        few, more = (peak(lambda n=n: gram(model, *(many(n)[side] for side in sides))) for n in (10, 40))
        return more / few

    for sides in ([slice(None)], [slice(2, None), slice(2)], [slice(2), slice(2, None)]):
        assert growth(2**17, *sides) < 1.12
        assert growth(2**29, *sides) > 1.12


def test_memory_grows_with_the_copies_of_a_sentence_and_not_with_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = random_model(mask_token_id=0, n_ctx=64), torch.randint(1, 12, (2, 60), generator=seeded(1)).tolist()
    small(monkeypatch, 0, tokens=64)
    few, more = (peak(lambda n=n: gram(model, said, n_draws=n)) for n in (4, 16))
    assert more / few < 5


# ---- whatever is recorded


MEASURES: dict[str, Callable[[Any], Any]] = {
    "gram": lambda model: gram(model, QUERIES),
    "influence": lambda model: influence(
        model, SENTENCES if isinstance(model, HookedTransformer) else REVERSE, QUERIES, n_draws=2
    ),  # the bridge knows no mask
    "mean_gradient": lambda model: mean_gradient(model, QUERIES),
    "first_order": lambda model: first_order(model, PAIRS, [1e-3]),
    "contrast_steps": lambda model: contrast_steps(model, PAIRS, [1e-3], ["V", "O"], seed=0),
    "gradient_alignment": lambda model: gradient_alignment(model, PAIRS).gram,
    "layer_cosines": lambda model: layer_cosines(model, PAIRS, {"V": ["V"]}),
}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("kind", ["own", "bridge"])
@pytest.mark.parametrize("name", MEASURES)
def test_gradients_are_taken_where_torch_records_nothing(name: str, kind: str, mode: Any) -> None:
    def made() -> Any:
        own = random_model(mask_token_id=0, rotary_adjacent_pairs=True, d_mlp=20)
        return own if kind == "own" else native_peer(own)

    expected, model = MEASURES[name](made()), made()
    with mode():
        got = MEASURES[name](model)
    pairs = list(zip(tensors_in(got), tensors_in(expected), strict=True))
    assert any(one.abs().max() > 0 for (_, one), _ in pairs)
    for (path, one), (_, other) in pairs:
        assert_close(one, other, equal_nan=True, msg=path)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_path_is_followed_where_torch_records_nothing(mode: Any) -> None:
    found = []
    for around in (torch.no_grad, mode):
        model = double_model()
        with around():
            path = LearningPath(model, {"one": QUERIES})
            for parameter in model.parameters():
                parameter *= 1.1
            path.advance()
        found.append(path.learnt["one"])
    assert_close(*found)
    assert found[0].abs().sum() > 0


def test_a_model_that_was_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = double_model()
        for measure in (*MEASURES.values(), lambda model: LearningPath(model, {"one": QUERIES})):
            with pytest.raises(
                UserError, match=r"^model: it was made under torch.inference_mode\(\), .+; make it outs"
            ):
                measure(model)


# ---- losses and lists of one's own


@pytest.mark.parametrize("bridged", [False, True])
def test_a_loss_without_gradients_is_refused(bridged: bool) -> None:
    own = random_model(mask_token_id=0, rotary_adjacent_pairs=True)
    model, weight = native_peer(own) if bridged else own, torch.ones((), requires_grad=True)
    for loss in (
        lambda rows, batch: rows.detach().sum((1, 2)),
        lambda rows, batch: rows.detach().sum((1, 2)) * weight,
    ):
        with pytest.raises(UserError, match=r"^loss: does not depend on the logits, .+; compute it from them"):
            gram(model, QUERIES, loss=loss)
    with pytest.raises(UserError, match=r"^loss: gave shape \[\] for 4 queries; return a number for each"):
        gram(model, QUERIES, loss=lambda rows, batch: rows.mean())


def test_any_list_will_do() -> None:
    model = double_model()
    expected = gram(model, QUERIES, REVERSE).inner
    assert_close(gram(model, iter(QUERIES), iter(REVERSE)).inner, expected, atol=0, rtol=0)
    expected = influence(model, SENTENCES, QUERIES, n_draws=2).inner
    for said in (torch.tensor(SENTENCES), map(tuple, SENTENCES)):
        found = influence(model, said, iter(QUERIES), n_draws=2)
        assert_close(found.inner, expected, atol=0, rtol=0)
