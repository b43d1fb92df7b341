"""Facts inside a chat template: names keep their tokens, and their spans are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_helpers import CHATML, write_checkpoint, write_json
from probe_helpers import FACTS

from mdm_interp.checkpoints import load_checkpoint, save_checkpoint
from mdm_interp.data.chat import INSTRUCTION, LEAD
from mdm_interp.data.prompts import load_facts, make_prompts
from mdm_interp.errors import UserError
from mdm_interp.experiments.subjects import KINDS, open_probe
from mdm_interp.measures.answers import answer_all, questions


def checkpoint(folder: Path, format: str = "a2d-qwen3", template: str | None = CHATML, **changes: Any) -> Path:
    write_checkpoint(folder / "model", format, tokenizer=True, max_position_embeddings=512, **changes)
    if template is not None:
        (folder / "model" / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "facts.csv").write_text(FACTS, encoding="utf-8")
    return folder / "model"


@pytest.mark.parametrize("format", ["a2d-qwen3", "dream", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_names_have_the_same_tokens_as_without_a_chat(format: str, kind: Any, tmp_path: Path) -> None:
    model = load_checkpoint(checkpoint(tmp_path, format))
    table = load_facts(tmp_path / "facts.csv")
    plain, chat = (make_prompts(table, model.tokenizer, model.cfg, kind, chat=asked) for asked in (False, True))
    unasked = [skip for skip in plain.skipped if "position 0" in skip.reason]  # a shifted model; in a chat it is later
    assert len(chat.pairs) == len(plain.pairs) + len(unasked) > 10 and chat.chat
    known = {
        (pair.fact, template, pair.side): pair for pair, template in zip(plain.pairs, plain.templates, strict=True)
    }
    for pair, template in zip(chat.pairs, chat.templates, strict=True):
        own = known.get((pair.fact, template, pair.side))
        if own is None:
            continue
        for query, before in ((pair.forward, own.forward), (pair.reverse, own.reverse)):
            assert (query.answer, query.source, query.offset) == (before.answer, before.source, before.offset)
            assert query.source == tuple(query.statement[slice(*query.source_span)])
            said = model.tokenizer.decode(query.statement)
            assert said.startswith(f"<|im_start|>user\n{INSTRUCTION}<|im_end|>") and f"assistant\n{LEAD} " in said
            rest = query.statement[query.answer_span[0] - before.answer_span[0] :]
            assert rest[: len(before.statement)] == before.statement


def test_a_causal_model_is_asked_up_to_the_answer(tmp_path: Path) -> None:
    probe = open_probe(checkpoint(tmp_path, "qwen3"), tmp_path / "facts.csv", chat=True)
    pair = probe.pairs("relational")[0]
    assert pair.reverse.answer_span[1] == len(pair.reverse.tokens)
    asked = questions(probe.model, probe.prompts)
    end = probe.model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert any(end in question.ends for question in asked) or all(question.ends for question in asked)
    assert answer_all(probe.model, asked)


def test_the_templates_file_comes_first_and_is_saved(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, template="file")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": "config"}
    write_json(folder / "tokenizer_config.json", config)
    model = load_checkpoint(folder)
    assert model.tokenizer.chat_template == "file"
    save_checkpoint(model, tmp_path / "saved", "a2d-qwen3")
    assert load_checkpoint(tmp_path / "saved").tokenizer.chat_template == "file"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "chat: the tokenizer has no chat template; leave chat out"),
        ("{{ raise_exception('no assistant here') }}", r"chat template fails \(no assistant here\)"),
        ("{{ messages[0].content.missing.more }}", "chat template fails"),
        ("{{ ''.__class__.__mro__ }}", "chat template"),
        (
            "{% for m in messages %}{{ m.content[:5] }}{% endfor %}",
            "does not hold what the assistant says once, as it is",
        ),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "does not hold what the assistant says"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template: str | None, message: str, tmp_path: Path) -> None:
    model = load_checkpoint(checkpoint(tmp_path, template=template))
    with pytest.raises(UserError, match=message) as raised:
        make_prompts(load_facts(tmp_path / "facts.csv"), model.tokenizer, model.cfg, chat=True)
    assert len(str(raised.value)) < 500
