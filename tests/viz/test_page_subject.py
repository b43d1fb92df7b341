"""Every page is headed by the model that it shows: its scheme, its seed, and after which steps."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import random_model, tiny_run
from model_helpers import mirrored_pairs
from probe_helpers import tiny_probe

from mdm_interp import viz
from mdm_interp.config import FactConfig
from mdm_interp.training.loop import train
from mdm_interp.viz.pages.page import Page
from mdm_interp.viz.pages.subject import Subject, joined


@pytest.mark.parametrize(("scheme", "called"), [("none", "NoPE"), ("alibi", "ALiBi")])
def test_a_page_of_a_run_names_scheme_seed_and_step(scheme: str, called: str, tmp_path: Path) -> None:
    config = tiny_run(FactConfig(n_entities=9, n_filler=4), scheme, "any_order", 3)
    run = train(config, root=tmp_path, progress=False)
    pair, digest = run.query_pairs(n_contexts=1)[0], run.folder.name[:6]
    named = f"{called} any_order, 1 layer of 2 heads, {config.facts.world}, seed 3 ({digest}), "
    assert viz.attention(run, "A2 r0 [M]").title == f"Attention: A2 r0 [M] · {named}step 30"
    assert viz.trajectory(run, "A2 r0 [M]").title == f"Denoising: A2 r0 [M] · {named}step 30"
    assert viz.routes(run, pair).title.endswith(f" · {named}steps 0 to 30")
    assert viz.explore(run, [pair]).title == f"Explorer: {named}steps 0 to 30"
    assert viz.explore({"one": run, "other": run}, [pair], steps=[5]).title == "Explorer: one, step 5 and other, step 5"


def test_a_page_of_a_model_names_its_scheme_and_size() -> None:
    model, pair = random_model(position="t5_bias", mask_token_id=0), mirrored_pairs(causal=False)[0]
    pages: list[Page] = [
        viz.attention(model, [1, 0, 2]),
        viz.trajectory(model, [1, 0, 2]),
        viz.routes(model, pair),
        viz.explore(model, [pair]),
    ]
    for page in pages:
        assert page.title.endswith("T5 model, 2 layers of 4 heads"), page.title
    checkpoint = Subject.of_checkpoint(model, Path("somewhere") / "llada")
    assert viz.attention(checkpoint, [1, 0]).title == "Attention: 1 [M] · llada, T5 model, 2 layers of 4 heads"
    assert viz.patterns(torch.ones(1, 1, 1), ["a"]).title == "Attention: a"


def test_bytes_of_a_character_are_named_and_joined_to_it(tmp_path: Path) -> None:
    """Under a vocabulary of bytes, and one of characters that falls back to them."""
    model = tiny_probe(tmp_path, "llada").model
    tokenizer, subject = model.tokenizer, Subject.of(model)
    for text in (" Zoë Müller", " 日本 é"):
        tokens = tokenizer(text)["input_ids"]
        names = subject.names(tokens)
        assert "\ufffd" not in "".join(names) and joined(names) == text
    split = [index for index in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.decode([index])]
    assert split and all(re.search("<0x[89A-F][0-9A-F]>", name) for name in subject.names(split))
    falling_back = SimpleNamespace(decode=lambda tokens: "\ufffd", convert_ids_to_tokens=lambda token: "<0xC3>")
    model.tokenizer = falling_back
    assert Subject.of(model).names([3]) == ["<0xC3>"]
    assert joined(["a", "<0xC3>", "<0xAB>", "<0xC3>"]) == "a<0xC3><0xAB><0xC3>", "no half character"
