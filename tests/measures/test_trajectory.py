"""Routes and evidence along a denoising trajectory, against every step computed by hand from the full pattern."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_model, tiny_config
from torch.testing import assert_close

from mdm_interp.data.queries import Query, QueryPair
from mdm_interp.errors import UserError
from mdm_interp.measures.trajectory import ENDINGS, Denoised, denoise_answers, other_sources, source_only, with_source
from mdm_interp.models.transformer import HookedTransformer

MASK = 12
STAGES = 3


def mdm(**changes: Any) -> HookedTransformer:
    return random_model(**{"mask_token_id": MASK, "dtype": "float64", "d_mlp": 24, "n_key_value_heads": 2} | changes)


def ask(length: int, answer: tuple[int, ...], at: int, source: tuple[int, ...], source_at: int, *given: int) -> Query:
    """All masked but the source and what is given."""
    tokens = [at % 11 if at in given else MASK for at in range(length)]
    tokens[source_at : source_at + len(source)] = source
    return Query(tuple(tokens), answer, (at, at + len(answer)), (source_at, source_at + len(source)))


QUERIES = [
    ask(9, (3, 5), 6, (7, 2, 4), 1, 0),
    ask(6, (1,), 2, (8,), 4, 0),
    ask(11, (9, 9, 4), 3, (6, 10), 8, 0, 2),
]


def by_hand(model: HookedTransformer, query: Query) -> dict[str, Any]:
    shift = model.cfg.readout_shift
    assert shift is not None
    tokens, places = list(query.tokens), list(range(*query.answer_span))
    masks = [at for at, token in enumerate(tokens) if token == MASK]
    routes: list[list[torch.Tensor]] = [[] for _ in range(STAGES)]
    evidence: list[list[torch.Tensor]] = [[] for _ in range(STAGES)]
    filled_at, probability, correct = {}, {}, {}
    source = range(*query.source_span)
    gain = model.get_parameter("ln_final.w").detach()
    group = model.cfg.n_heads // model.cfg.kv_heads
    for step in range(len(masks)):
        with torch.no_grad():
            logits, cache = model.run_with_cache(torch.tensor([tokens]))
        left = [at for at in places if tokens[at] == MASK]
        if left:
            of_route, of_evidence = torch.zeros(2, model.cfg.n_layers, dtype=torch.float64)
            for layer in range(model.cfg.n_layers):
                for head in range(model.cfg.n_heads):
                    pattern = cache["pattern", layer][0, head]
                    for j in source:
                        of_route[layer] += sum(pattern[at + shift, j] for at in left) / len(left) / model.cfg.n_heads
                        v = cache["v", layer][0, j, head // group] @ model.blocks[layer].attn.W_O.detach()[head]
                        for token in query.answer:
                            of_evidence[layer] += (v * gain) @ model.W_U.detach()[:, token]
            stage = step * STAGES // len(masks)
            routes[stage].append(of_route)
            evidence[stage].append(of_evidence)
        choice = {}
        for at in masks:
            if tokens[at] == MASK:
                row = logits[0, at + shift].clone()
                row[MASK] = -torch.inf
                best = row.softmax(-1).max(-1)
                choice[at] = float(best.values), int(best.indices)
        at = max(choice, key=lambda at: choice[at][0])
        tokens[at] = choice[at][1]
        if at in places:
            true = query.answer[at - query.answer_span[0]]
            filled_at[at] = (step + 1) / len(masks)
            probability[at] = float(logits[0, at + shift].softmax(-1)[true])
            correct[at] = float(choice[at][1] == true)

    def mean(values: Any) -> Any:
        return sum(values) / len(values)

    nothing = torch.full((model.cfg.n_layers,), torch.nan, dtype=torch.float64)
    return {
        "route": torch.stack([mean(of_stage) if of_stage else nothing for of_stage in routes]),
        "evidence": torch.stack([mean(of_stage) if of_stage else nothing for of_stage in evidence]),
        "filled_at": torch.tensor(mean(filled_at.values()), dtype=torch.float64),
        "probability": torch.tensor(mean(probability.values()), dtype=torch.float64),
        "correct": torch.tensor(mean(correct.values()), dtype=torch.float64),
    }


@pytest.mark.parametrize("shift", [0, -1])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_every_step_is_as_by_hand(shift: int, position: str) -> None:
    """Sentences and answers of different lengths, batched and padded."""
    model = mdm(readout_shift=shift, position=position)
    watched = denoise_answers(model, QUERIES, STAGES)
    for row, query in enumerate(QUERIES):
        for name, expected in by_hand(model, query).items():
            assert_close(getattr(watched, name)[row], expected, atol=1e-6, rtol=1e-6, equal_nan=True, msg=name)


def test_a_stage_in_which_the_answer_was_filled_already_is_left_out() -> None:
    query = Query((1, 2, MASK, 4), (3,), (2, 3), (0, 1))
    watched = denoise_answers(mdm(), [query], STAGES)
    assert (
        watched.route.isnan()[0].all(1).tolist() == watched.evidence.isnan()[0].all(1).tolist() == [False, True, True]
    )
    assert float(watched.filled_at) == 1


def test_batches_and_padding_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mdm(dtype="float32")
    together = denoise_answers(model, QUERIES, STAGES)
    monkeypatch.setattr("mdm_interp.data.queries.MAX_LOGITS", 1)
    alone = denoise_answers(model, QUERIES, STAGES)
    for name in Denoised.__dataclass_fields__:
        assert_close(getattr(together, name), getattr(alone, name), atol=1e-5, rtol=1e-4, equal_nan=True)


def test_a_model_without_masks_is_refused() -> None:
    for model in (mdm(mask_token_id=None), random_model(attention="causal", mask_token_id=MASK)):
        query = Query((1, 2, MASK), (3,), (2, 3), (0, 1))
        with pytest.raises(UserError, match=r"model: denoising needs bidirectional attention and a mask_token_id"):
            denoise_answers(model, [query], STAGES)


def test_all_but_the_source_is_masked() -> None:
    query = Query((3, 1, 2, MASK, MASK, 4, 11, 5), (6, 7), (3, 5), (1, 3))
    for shift, kept in ((0, MASK), (-1, 3)):
        masked = source_only(query, tiny_config(mask_token_id=MASK, readout_shift=shift), special={11, MASK})
        assert masked.tokens == (kept, 1, 2, MASK, MASK, MASK, 11, MASK)
        assert (masked.answer, masked.answer_span, masked.source_span) == ((6, 7), (3, 5), (1, 3))


def test_another_source_may_have_any_length() -> None:
    query = Query((3, 1, 2, MASK, MASK, 4), (6, 7), (3, 5), (1, 3))
    assert with_source(query, (8, 9, 10)) == Query((3, 8, 9, 10, MASK, MASK, 4), (6, 7), (4, 6), (1, 4))
    query = Query((MASK, 4, 1, 2), (6,), (0, 1), (2, 4))
    assert with_source(query, (8,)) == Query((MASK, 4, 8), (6,), (0, 1), (2, 3))


def test_the_null_shares_side_and_no_name_even_through_other_facts() -> None:
    def pair(answer: int, source: int, side: Any, fact: int) -> QueryPair:
        query = Query((source, 4, MASK), (answer,), (2, 3), (0, 1))
        return QueryPair(query, query, fact, side)

    asked = [(1, 5, "left"), (2, 5, "left"), (1, 6, "left"), (3, 7, "right"), (9, 8, "left"), (8, 10, "left")]
    pairs = [pair(*values, fact) for fact, values in enumerate(asked)]
    chosen = other_sources(pairs, n_ctx=3)
    assert all(source in ((8,), (10,)) for source in chosen[:3]) and chosen[3] is None
    assert all(source in ((5,), (6,)) for source in chosen[4:])  # not each other's: 8 is the answer of one
    assert other_sources([pairs[0], pairs[4]], n_ctx=2) == [None, None]


def test_columns_are_every_layer_and_all_together() -> None:
    watched = denoise_answers(mdm(), QUERIES, STAGES)
    columns = watched.columns
    n_layers = watched.route.shape[2]
    assert len(columns) == 2 * STAGES * (n_layers + 1) + len(ENDINGS)
    for layer in range(n_layers):
        assert_close(columns["route", 2, layer], watched.route[:, 2, layer].double(), equal_nan=True)
    assert_close(columns["route", 0, None], watched.route[:, 0].double().mean(-1), equal_nan=True)
    assert_close(columns["evidence", 1, None], watched.evidence[:, 1].double().sum(-1), equal_nan=True)
    assert [name for name, stage, _ in columns if stage is None] == list(ENDINGS)
    assert columns["filled_at", None, None] is watched.filled_at
