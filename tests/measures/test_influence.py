"""Influence of training sentences on queries: against autograd, steps really taken, and models trained without them."""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_helpers import write_checkpoint
from helpers import random_model
from torch import Tensor
from torch.testing import assert_close

from mdm_interp.checkpoints import load_checkpoint
from mdm_interp.data.queries import Query, QueryPair, collate
from mdm_interp.data.sentences import mask_copies, read_sentences
from mdm_interp.errors import UserError
from mdm_interp.inference.prediction import answer_loss, query_loss
from mdm_interp.measures.gradients import SourceAttention, asked
from mdm_interp.measures.gradients.components import COMPONENTS, GROUPS
from mdm_interp.measures.gradients.gram import gram
from mdm_interp.measures.gradients.influence import Influence, influence, traced_influence
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.stats.correlations import rank_correlation

ROOT = Path(__file__).parents[2]
MASK = 12
SENTENCES = [(4, 7, 3, 1), (5, 9, 1, 8, 6, 2), (1, 10)]
QUERIES = [
    Query((4, 7, MASK), (3,), (2, 3), (0, 1)),
    Query((5, 9, 1, MASK, MASK, 2), (8, 6), (3, 5), (0, 2)),
    Query((1, 10, 2, MASK), (0,), (3, 4), (1, 3)),
]
MODELS: dict[str, dict[str, Any]] = {
    "MDM": {"d_mlp": 20, "n_key_value_heads": 2},
    "as Dream, tied": {"readout_shift": -1, "tie_word_embeddings": True, "gated_mlp": True, "d_mlp": 20},
    "causal": {"attention": "causal", "position": "learned", "d_mlp": 20, "qkv_bias": True},
    "no norm, tied": {"normalization_type": None, "tie_word_embeddings": True, "initializer_range": 0.2},
}


def double_model(name: str) -> HookedTransformer:
    return random_model(dtype="float64", **({"mask_token_id": MASK} | MODELS[name]))


def sentence_loss(model: HookedTransformer, *chosen: int, **options: Any) -> Tensor:
    """The weighted sum over the copies of the chosen sentences."""
    copies = mask_copies(SENTENCES, model.cfg, **options)
    logits = [model(batch.tokens, attention_mask=batch.attention_mask) for batch in copies.batches]
    losses = [query_loss(*pair) for pair in zip(logits, copies.batches, strict=True)]
    return (torch.isin(copies.sentence, torch.tensor(chosen)) * copies.weight * torch.cat(losses)).sum()


def flat(model: HookedTransformer, loss: Tensor) -> Tensor:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [12, 2048])
def test_it_is_the_inner_product_of_the_sentences_and_the_querys_gradients(
    monkeypatch: pytest.MonkeyPatch, name: str, tokens: int
) -> None:
    monkeypatch.setattr(asked, "TOKENS", tokens)
    model, options = double_model(name), dict[str, Any](n_draws=5, seed=3)
    found = influence(model, SENTENCES, QUERIES, **options)
    left = torch.stack([flat(model, sentence_loss(model, index, **options)) for index in range(3)])
    batches = [collate([query], model.cfg) for query in QUERIES]
    right = torch.stack([flat(model, query_loss(model(batch.tokens), batch).sum()) for batch in batches])
    assert_close(found.total, left @ right.T, atol=1e-9, rtol=1e-9)
    assert_close(sum(found.group(group) for group in GROUPS), found.total, atol=1e-9, rtol=1e-9)
    rows = [row for row in found.rows(top=3) if row["query"] == 1 and row["sentence"] == 0]
    assert sum(row["influence"] for row in rows) == pytest.approx(found.total[0, 1].item())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [12, 2048])
def test_sentences_have_inner_products_with_one_another(
    monkeypatch: pytest.MonkeyPatch, name: str, tokens: int
) -> None:
    """All copies of a sentence are one gradient, also where a batch holds few tokens."""
    monkeypatch.setattr(asked, "TOKENS", tokens)
    model, options = double_model(name), dict[str, Any](n_draws=5, seed=3)
    each = torch.stack([flat(model, sentence_loss(model, index, **options)) for index in range(3)])
    found = gram(model, [*SENTENCES, SENTENCES[0]], **options)  # one that is said twice is one sentence
    again = [0, 1, 2, 0]
    assert_close(found.inner.sum(0), (each @ each.T)[again][:, again], atol=1e-9, rtol=1e-9)
    for squares in (found.left_squares, found.right_squares):
        assert_close(squares.sum(0), each.square().sum(1)[again], atol=1e-9, rtol=1e-9)
    other = gram(model, torch.tensor([SENTENCES[0], SENTENCES[0][::-1]]), QUERIES, **options)
    assert_close(other.inner[:, :1], influence(model, SENTENCES, QUERIES, **options).inner[:, :1], atol=1e-9, rtol=1e-9)
    assert_close(other.left_squares[:, 0], found.left_squares[:, 0], atol=1e-9, rtol=1e-9)
    assert_close(other.right_squares, gram(model, QUERIES).left_squares, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "gradients need at least one query or sentence, got none"),
        (["Tom is the father of Ann."], r"(left|right): got text, not token ids; give model.tokenizer"),
        ([QUERIES[0], SENTENCES[0]], "(left|right): holds both sentences and queries; give them one after the other"),
        ([QueryPair(QUERIES[0], QUERIES[0], 0, "left")], "queries: got a QueryPair, which is no query"),
        ([(99,)], "sentences: "),
        ([(1.7, 2.0)], "(left|right): 1.7 is no token id; give sentences as lists of integers"),
        ([[[1, 2], [3]]], r"(left|right): \[1, 2\] is no token id"),
        ([(True, 2)], "(left|right): True is no token id"),
        ([(10**30, 2)], "(left|right): 10+ is no token id"),
        ([(1,) * 30, SENTENCES[0]], "sentences: number 0 has 30 tokens"),
        ([Query((4, 7, 99, MASK), (3,), (3, 4), (0, 1)), QUERIES[0]], r"tokens: id 99 at \[0, 2\]"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_has_no_gradients(given: Any, message: str) -> None:
    model = double_model("MDM")
    for sides in ([given], [given, QUERIES], [QUERIES, given]):
        with pytest.raises(UserError, match=message):
            gram(model, *sides)


def test_sentences_attend_to_no_source() -> None:
    with pytest.raises(UserError, match=r"loss: sentences have no source to attend to \(SourceAttention\); give"):
        gram(double_model("MDM"), SENTENCES, QUERIES, loss=SourceAttention(0))


@pytest.mark.parametrize("name", MODELS)
def test_tokens_add_up_to_the_linear_maps(name: str) -> None:
    """Each token's own part is what its inputs give with the other positions' inputs at 0."""
    model = double_model(name)
    found = influence(model, SENTENCES, QUERIES, n_draws=4)
    beyond = [part for part in found.parts if part[1] in ("norms", "position")]
    inner = found.inner[[part not in beyond for part in found.parts]].sum(0)
    if not model.cfg.qkv_bias:  # which is no token's
        assert_close(found.by_token.sum(1), inner, atol=1e-9, rtol=1e-9)
    assert found.by_token.shape == (3, 6, 3) and (found.by_token[2, 2:] == 0).all()
    assert (found.by_token[1].abs().sum(1) > 0).sum() >= 5


def test_queries_may_train_too() -> None:
    model = double_model("MDM")
    assert_close(influence(model, QUERIES, QUERIES).inner, gram(model, QUERIES).inner, atol=1e-9, rtol=1e-9)


def test_every_component_is_in_one_group() -> None:
    assert sorted(component for members in GROUPS.values() for component in members) == sorted(COMPONENTS)


def test_the_strongest_come_first() -> None:
    inner = torch.tensor([[[1.0], [-2.0], [3.0], [0.0], [-4.0]]], dtype=torch.float64)
    found = Influence(((None, "embedding"),), inner, inner[0, :, None])
    assert found.top(0, 2) == ([2, 0], [4, 1]) and found.top(0, 9) == ([2, 0], [4, 1])
    assert [(row["sentence"], row["rank"], row["group"], row["influence"]) for row in found.rows(1)] == [
        (2, 1, "embeddings", 3.0),
        (4, -1, "embeddings", -4.0),
    ]


# ---- the copies


def test_copies_estimate_the_denoising_bound_without_bias() -> None:
    """It is the mean over the number of masks l, and over all ways to place them, of L / l times the loss."""
    model, tokens = double_model("MDM"), (4, 7, 3)
    exact = 0.0
    for masked in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        noisy = torch.tensor([[MASK if at in masked else token for at, token in enumerate(tokens)]])
        log_probs = model(noisy)[0].log_softmax(-1)
        loss = -sum(log_probs[at, tokens[at]].item() for at in masked)
        exact += loss * (3 / len(masked)) / 3 / {1: 3, 2: 3, 3: 1}[len(masked)]
    copies = mask_copies([tokens], model.cfg, n_draws=3000, seed=0)
    losses = torch.cat([answer_loss(batch.at_readout(model(batch.tokens)), batch).detach() for batch in copies.batches])
    assert (copies.weight * losses).sum().item() == pytest.approx(exact, rel=0.02)


def test_a_causal_sentence_is_read_once_and_what_is_kept_is_never_masked() -> None:
    causal, mdm = double_model("causal"), double_model("MDM")
    copies = mask_copies(SENTENCES, causal.cfg, n_draws=9, seed=0)
    assert copies.sentence.tolist() == [0, 1, 2] and copies.weight.tolist() == [1, 1, 1]
    loss = sentence_loss(causal, 1, n_draws=9, seed=0).item()
    log_probs = causal(torch.tensor([SENTENCES[1]]))[0].log_softmax(-1)
    assert loss == pytest.approx(-sum(log_probs[at, SENTENCES[1][at + 1]].item() for at in range(5)))
    kept = mask_copies([(4, 7, 3, 4)], mdm.cfg, n_draws=20, seed=0, kept=[4])
    assert all((batch.tokens[:, [0, 3]] == 4).all() for batch in kept.batches)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [([()], {}, "sentences: number 0"), ([(99,)], {}, "sentences: "), (SENTENCES, {"n_draws": 0}, "n_draws: 0")],
)
def test_what_cannot_be_masked(given: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        influence(double_model("MDM"), given, QUERIES, **options)


def test_nothing_to_measure(tmp_path: Any) -> None:
    model = double_model("MDM")
    with pytest.raises(UserError, match="training: gradients need at least one query or sentence, got none"):
        influence(model, [], QUERIES)
    with pytest.raises(UserError, match="both sentences and queries"):
        influence(model, [QUERIES[0], SENTENCES[0]], QUERIES)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="checkpoints: there are none"):
        traced_influence([], SENTENCES, QUERIES)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="holds no sentences"):
        read_sentences(tmp_path / "empty.txt", None, model.cfg)
    (tmp_path / "long.txt").write_text("short\n" + "x" * 10**5)
    with pytest.raises(UserError, match=r"long\.txt: line 2 has more than 65536 characters, too many for a sentence"):
        read_sentences(tmp_path / "long.txt", lambda text: {"input_ids": []}, model.cfg)
    with pytest.raises(UserError, match=r"none\.txt: cannot be read \(.+\); give a text file in UTF-8"):
        read_sentences(tmp_path / "none.txt", None, model.cfg)


def test_a_sentence_that_does_not_fit_is_named_by_its_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path, "llada", tokenizer=True)
    model, path = load_checkpoint(tmp_path), tmp_path / "said.txt"
    path.write_text(f"A cat.\n\n{'x ' * 3000}\n")
    with pytest.raises(
        UserError, match=r"said\.txt: line 3 has \d{4} tokens, \d{4} to predict, .*; leave it out, or divide it"
    ):
        read_sentences(path, model.tokenizer, model.cfg)
    path.write_text("A cat.\n\n?\n")
    tokens = {" A cat.": [1, 2], " ?": [0]}
    words = {"all_special_ids": [0], "__call__": lambda self, text: {"input_ids": tokens[text]}}
    with pytest.raises(UserError, match=r"said\.txt: line 3 has 1 tokens, 0 to predict, and the model takes 1 to"):
        read_sentences(path, type("Words", (), words)(), model.cfg)
    assert capfd.readouterr() == ("", "")  # nothing of transformers' own


# ---- what it predicts comes true


@pytest.mark.parametrize("name", ["MDM", "causal"])
def test_a_small_step_on_a_sentence_moves_each_query_as_predicted(name: str) -> None:
    """The actual change over the predicted one tends to 1 as the step shrinks."""
    model, options = double_model(name), dict[str, Any](n_draws=4, seed=0)
    predicted = influence(model, SENTENCES, QUERIES, **options).total

    def losses(model: HookedTransformer) -> Tensor:
        batches = [collate([query], model.cfg) for query in QUERIES]
        return torch.cat([query_loss(model(batch.tokens), batch) for batch in batches]).detach()

    gaps = []
    for eta in (1e-4, 1e-5, 1e-6):
        slopes = []
        for index in range(3):
            moved = copy.deepcopy(model)
            step = torch.autograd.grad(sentence_loss(moved, index, **options), list(moved.parameters()))
            with torch.no_grad():
                for parameter, grad in zip(moved.parameters(), step, strict=True):
                    parameter -= eta * grad
            slopes.append((losses(model) - losses(moved)) / (eta * predicted[index]))
        gaps.append((torch.stack(slopes) - 1).abs().max().item())
    assert gaps[2] < 1e-3 and gaps[2] < 0.2 * gaps[1] < 0.04 * gaps[0]


def test_tracing_sums_over_checkpoints_by_learning_rate() -> None:
    models = [double_model("MDM"), double_model("as Dream, tied")]
    models[1] = copy.deepcopy(models[0])
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter *= 1.1
    traced = traced_influence(zip(models, (0.5, 2.0), strict=True), SENTENCES, QUERIES, n_draws=3)
    one, other = (influence(model, SENTENCES, QUERIES, n_draws=3) for model in models)
    assert_close(traced.inner, 0.5 * one.inner + 2 * other.inner)
    assert_close(traced.by_token, 0.5 * one.by_token + 2 * other.by_token)


def trained(model: HookedTransformer, sentences: list[int], steps: int, optimizer: Any) -> list[HookedTransformer]:
    """The models before each step on some sentences' summed losses, and the one after the last."""
    moved = copy.deepcopy(model)
    descent, passed = optimizer(moved.parameters()), [copy.deepcopy(moved)]
    for _ in range(steps):
        descent.zero_grad()
        sentence_loss(moved, *sentences, n_draws=4, seed=0).backward()
        descent.step()
        passed.append(copy.deepcopy(moved).requires_grad_())
    return passed


def left_out(
    groups: list[list[int]], queries: list[Query], steps: int, optimizer: Any, rate: float
) -> tuple[Tensor, Tensor]:
    """What leaving out each group of sentences adds to each query's loss: predicted by the trace, and actually."""
    model, everything = double_model("MDM"), list(range(len(SENTENCES)))

    def losses(model: HookedTransformer) -> Tensor:
        batch = collate(queries, model.cfg)
        return query_loss(model(batch.tokens), batch).detach()

    path = trained(model, everything, steps, optimizer)
    traced = traced_influence([(one, rate) for one in path[:-1]], SENTENCES, queries, n_draws=4).total
    actual = [
        losses(trained(model, [one for one in everything if one not in group], steps, optimizer)[-1])
        for group in groups
    ]
    return torch.stack([traced[group].sum(0) for group in groups]), torch.stack(actual) - losses(path[-1])


def correlation(predicted: Tensor, actual: Tensor) -> tuple[float, float, float]:
    """Spearman's, and its 95 % interval over rows."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(len(actual), (len(actual),), generator=generator) for _ in range(300)]
    samples = [rank_correlation(predicted[rows].flatten(), actual[rows].flatten()) for rows in drawn]
    low, high = np.percentile(samples, [2.5, 97.5])
    return rank_correlation(predicted.flatten(), actual.flatten()), low, high


def assert_in_the_docs(found: tuple[float, float, float]) -> None:
    said = "{:.2f} ({:.2f} to {:.2f})".format(*found)
    assert said in " ".join((ROOT / "docs" / "theory.md").read_text().split()), f"docs/theory.md does not say {said}"


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "at_least"), [(2e-3, 0.0), (2e-4, 0.8)], ids=["long steps", "short steps"])
def test_what_training_without_a_sentence_changes(
    monkeypatch: pytest.MonkeyPatch, rate: float, at_least: float
) -> None:
    """Traced over a training, influence ranks sentences as leaving each of them out does: Spearman's correlation over
    sentences and queries, with an interval over sentences. The longer the steps, the more the models that are trained
    without a sentence go ways of their own, of which the trace knows nothing. The docs quote what is found."""
    said = torch.randint(12, (12, 4), generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setattr(sys.modules[__name__], "SENTENCES", said)
    queries = [Query((*one[:2], MASK, one[3]), (one[2],), (2, 3), (0, 1)) for one in said]
    groups = [[index] for index in range(12)]
    found = correlation(*left_out(groups, queries, 12, partial(torch.optim.SGD, lr=rate), rate))
    assert found[0] > found[1] > at_least
    assert_in_the_docs(found)


@pytest.mark.slow
def test_what_training_without_a_fact_changes_under_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where the optimizer rescales every step, of which the trace knows nothing either, and all three
    sentences of one of eight facts are left out: each fact's forward and reverse query, with an interval over facts."""
    facts = [(entity, 8, (entity + 1) % 8) for entity in range(8)]
    monkeypatch.setattr(
        sys.modules[__name__], "SENTENCES", [(*fact, filler) for fact in facts for filler in (9, 10, 11)]
    )
    forward = [Query((MASK, r, b, 9), (a,), (0, 1), (2, 3)) for a, r, b in facts]
    reverse = [Query((b, r, MASK, 9), (a,), (2, 3), (0, 1)) for a, r, b in facts]
    groups = [[3 * fact, 3 * fact + 1, 3 * fact + 2] for fact in range(8)]
    rate = 1e-3
    predicted, actual = left_out(groups, forward + reverse, 40, partial(torch.optim.AdamW, lr=rate), rate)
    for side in (slice(8), slice(8, 16)):
        assert_in_the_docs(correlation(predicted[:, side], actual[:, side]))
