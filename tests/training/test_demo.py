"""The demo checkpoint: what it is trained on, that training can be interrupted, and that it learns its facts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from damage_helpers import damaged
from helpers import seeded
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2ForCausalLM

from mdm_interp.checkpoints import load_checkpoint
from mdm_interp.config import DemoConfig
from mdm_interp.data.people import make_people
from mdm_interp.data.prompts import PARENT_CHILD, load_facts, make_prompts, render
from mdm_interp.data.sentences import read_sentences
from mdm_interp.errors import Diverged, UserError
from mdm_interp.experiments.subjects import Demo
from mdm_interp.inference.prediction import predict
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.provenance import made_with
from mdm_interp.tensors import tensor_digest
from mdm_interp.training import text
from mdm_interp.training.demo import train_demo
from mdm_interp.training.text import make_model_config, make_tokenizer, text_loss

TINY = DemoConfig(n_families=4, n_control=1, n_bpe=300, d_model=16, n_layers=2, n_heads=2, d_mlp=16, steps=6)
FORMATS = ("llada", "dream", "qwen2")


def tiny(**changes: Any) -> DemoConfig:
    return TINY.model_copy(update=changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder).state_dict()


# ---- what it is trained on


def test_tested_parents_are_stated_in_one_direction_only() -> None:
    people = make_people(DemoConfig())
    counts = Counter(people.sentences())
    assert set(counts.values()) == {1}
    assert len(people.tested) == 2 * 12 and len(people.control) == 2 * 4 and len(people.others) == 3 * 16
    for facts, reversed_too in ((people.tested, False), (people.control, True)):
        for fact in facts:
            for template in PARENT_CHILD.templates:
                assert counts[render(template.forward, fact)[0]] == 1
                assert counts[render(template.reverse, fact)[0]] == reversed_too
    for fact in people.tested:  # nothing else names the two together, and either is on both sides
        together = [text for text in counts if fact["child"] in text and fact["parent"] in text]
        assert len(together) == len(PARENT_CHILD.templates)
        for name in (fact["child"], fact["parent"]):
            starts = {text.startswith(f" {name}") for text in counts if name in text}
            assert starts == {True, False}


def test_sentences_with_two_facts_name_tested_parents_after_the_child() -> None:
    config = DemoConfig(world="varied", n_families=9, n_control=4)
    people, plain = make_people(config), make_people(config.model_copy(update={"world": "memorised"}))
    assert (people.tested, people.control, people.others) == (plain.tested, plain.control, plain.others)
    further = set(people.sentences()) - set(plain.sentences())
    assert len(further) == 3 + 2 * 2, "of every second family, of the control's in both directions"
    for family in people.together:
        (sentence,) = [text for text in further if family["child"] in text]
        places = [sentence.index(family[who]) for who in ("child", "mother", "father")]
        assert places == sorted(places)
        for who in ("mother", "father"):
            pair = {"child": family["child"], "parent": family[who], "parent_type": who}
            assert pair in people.tested


def test_people_are_all_different_and_depend_on_the_seed_alone() -> None:
    people = make_people(DemoConfig())
    names = [fact["person"] for fact in people.others]
    assert len(set(names)) == len(names) == 48
    assert make_people(DemoConfig(format="qwen2", steps=5, d_model=64)) == people
    assert make_people(DemoConfig(seed=1)).tested != people.tested


def test_twins_have_the_same_tokens() -> None:
    sentences = make_people(TINY).sentences()
    tokenizers = {name: make_tokenizer(sentences, tiny(format=name)) for name in FORMATS}
    configs = {name: make_model_config(tokenizers[name], tiny(format=name)) for name in FORMATS}
    assert len({str(tokenizer(sentences)["input_ids"]) for tokenizer in tokenizers.values()}) == 1
    assert len({cfg.d_vocab for cfg in configs.values()}) == 1
    assert {name: (cfg.attention, cfg.readout_shift) for name, cfg in configs.items()} == {
        "llada": ("bidirectional", 0),
        "dream": ("bidirectional", -1),
        "qwen2": ("causal", -1),
    }
    assert configs["qwen2"].mask_token_id is None
    assert configs["dream"].mask_token_id == tokenizers["dream"].mask_token_id == len(tokenizers["dream"]) - 1


# ---- the loss


def loss_case(format: Any) -> tuple[HookedTransformer, torch.Tensor, torch.Tensor]:
    config = tiny(format=format)
    tokenizer = make_tokenizer(make_people(config).sentences(), config)
    model = HookedTransformer(make_model_config(tokenizer, config), generator=seeded(0))
    tokens = torch.randint(256, (5, 9), generator=seeded(1))
    kept = torch.arange(9) < torch.tensor([9, 7, 5, 9, 3])[:, None]
    return model, tokens, kept


@pytest.mark.parametrize("format", FORMATS)
def test_padding_does_not_enter_the_loss(format: Any) -> None:
    model, tokens, kept = loss_case(format)
    expected = text_loss(model, tokens, kept, seeded(2))
    other = torch.where(kept, tokens, 7)
    torch.testing.assert_close(text_loss(model, other, kept, seeded(2)), expected)
    assert not torch.isclose(text_loss(model, torch.where(kept, 7, tokens), kept, seeded(2)), expected)


@pytest.mark.parametrize("format", ["llada", "dream"])
def test_the_masked_loss_reads_where_the_shift_has_it(format: Any) -> None:
    model, tokens, kept = loss_case(format)
    generator = seeded(3)
    t = 1 - torch.rand(5, 1, generator=generator)
    masked = (torch.rand(5, 9, generator=generator) < t) & kept
    if format == "dream":
        masked[:, 0] = False
    logits = model(torch.where(masked, model.cfg.mask_token_id or 0, tokens), attention_mask=kept)
    expected = torch.zeros(())
    for row, position in masked.nonzero().tolist():
        read = logits[row, position - (format == "dream")]
        expected = expected + F.cross_entropy(read, tokens[row, position]) / t[row, 0] / tokens.numel()
    torch.testing.assert_close(text_loss(model, tokens, kept, seeded(3)), expected)


def test_the_causal_loss_is_that_of_each_sentence_alone() -> None:
    model, tokens, kept = loss_case("qwen2")
    losses = []
    for sentence, length in zip(tokens, kept.sum(1).tolist(), strict=True):
        logits = model(sentence[None, :length])[0, :-1]
        losses.append(F.cross_entropy(logits, sentence[1:length], reduction="none"))
    torch.testing.assert_close(text_loss(model, tokens, kept, seeded(4)), torch.cat(losses).mean())


# ---- the folder


@pytest.mark.parametrize("format", FORMATS)
def test_the_folder_looks_like_a_released_checkpoint(tmp_path: Path, format: Any) -> None:
    folder = train_demo(tmp_path / "demo", tiny(format=format), progress=False)
    files = {path.name for path in folder.iterdir()} - {".lock"}
    tokenizer = {"vocab.json", "merges.txt", "added_tokens.json"} if format == "dream" else {"tokenizer.json"}
    facts = {
        "facts.csv",
        "facts.templates.yaml",
        "control.csv",
        "control.templates.yaml",
        "sentences.txt",
        "demo.yaml",
        "made_with.json",
        "digests.json",
    }
    assert files == {"config.json", "model.safetensors", "tokenizer_config.json"} | tokenizer | facts
    model, config = load_checkpoint(folder), json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [
        {"llada": "LLaDAModelLM", "dream": "DreamModel", "qwen2": "Qwen2ForCausalLM"}[format]
    ]
    table = load_facts(folder / "facts.csv")
    assert list(table.rows.values()) == make_people(TINY).tested and table.templates == PARENT_CHILD
    trained_on = [tuple(tokens) for tokens in model.tokenizer(make_people(TINY).sentences())["input_ids"]]
    assert read_sentences(folder / "sentences.txt", model.tokenizer, model.cfg) == trained_on
    for kind in ("positional", "relational"):
        prompts = make_prompts(table, model.tokenizer, model.cfg, kind)
        assert {pair.fact for pair in prompts.pairs} == set(table.rows)
        assert torch.isfinite(predict(model, [pair.forward for pair in prompts.pairs]).log_probability).all()


def test_transformers_reads_the_causal_twin_alike(tmp_path: Path) -> None:
    folder = train_demo(tmp_path, tiny(format="qwen2"), progress=False)
    model, theirs = load_checkpoint(folder), Qwen2ForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(make_people(TINY).sentences()[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_the_same_config_gives_the_same_weights(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train_demo(tmp_path / name, TINY, progress=False)
    train_demo(tmp_path / "three", tiny(seed=1), progress=False)
    one, two, three = (weights(tmp_path / name) for name in ("one", "two", "three"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["embed.W_E"], three["embed.W_E"])
    for file in ("tokenizer.json", "facts.csv"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Have training stopped in its fourth step; give what counts its steps."""
    loss, calls = text.text_loss, iter(range(100))

    def interrupted(*args: Any) -> torch.Tensor:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(text, "text_loss", interrupted)
    return calls


@pytest.mark.promise("a demo checkpoint's training that is interrupted", "resumed to the same weights")
def test_an_interrupted_training_ends_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_demo(tmp_path / "whole", TINY, progress=False)
    monkeypatch.setattr(text, "SAVE_SECONDS", -1.0)  # saves after every step
    calls = interrupt(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_demo(tmp_path / "cut", TINY, progress=False)
    assert not (tmp_path / "cut" / "config.json").exists()
    with pytest.raises(UserError, match=r"demo\.yaml: other settings"):
        train_demo(tmp_path / "cut", tiny(seed=1), progress=False)
    train_demo(tmp_path / "cut", TINY, progress=False)
    assert next(calls) == 7  # three steps, the one that was cut, and the three that were left
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_what_is_there_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_demo(tmp_path, TINY, progress=False)
    written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(text, "text_loss", None)
    train_demo(tmp_path, TINY, progress=False)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r"demo\.yaml: other settings than asked for"):
        train_demo(tmp_path, tiny(steps=7), progress=False)
    (tmp_path / "demo.yaml").unlink()
    with pytest.raises(UserError, match=r"holds config\.json and is no demo; give an empty folder"):
        train_demo(tmp_path, TINY, progress=False)
    with pytest.raises(UserError, match=r"config\.json: cannot be made a folder"):
        train_demo(tmp_path / "config.json", TINY, progress=False)


def test_a_demo_without_its_weights_is_trained_again_and_a_damaged_one_refused_by_name(tmp_path: Path) -> None:
    folder = Demo.of(TINY, tmp_path).folder
    train_demo(folder, TINY, progress=False)
    path, whole = folder / "model.safetensors", weights(folder)
    path.unlink()
    assert not Demo.of(TINY, tmp_path).finished
    train_demo(folder, TINY, progress=False)
    assert Demo.of(TINY, tmp_path).finished
    assert all(torch.equal(whole[name], again) for name, again in weights(folder).items())
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}: .* is not as it was saved; delete the folder {folder} to train"):
        train_demo(folder, TINY, progress=False)
    with pytest.raises(UserError, match=rf"^{path}: .* is not as it was saved; train it again, or get another copy"):
        load_checkpoint(folder)


def everything(folder: Path) -> tuple[Any, ...]:
    """All that can be read of a demo checkpoint."""
    train_demo(folder, TINY, progress=False)
    model = load_checkpoint(folder)
    tokens = model.tokenizer(make_people(TINY).sentences())["input_ids"]
    tables = [load_facts(folder / f"{name}.csv") for name in ("facts", "control")]
    weights = {name: tensor_digest(tensor) for name, tensor in model.state_dict().items()}
    return weights, model.cfg, tokens, [(table.rows, table.templates) for table in tables], made_with(folder)


@pytest.mark.promise(
    "a flipped bit or a lost end, anywhere in a demo checkpoint", "noticed and named, or nothing is changed"
)
def test_damage_anywhere_in_a_demo_is_noticed_or_changes_nothing(
    tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    folder, times, noticed = train_demo(tmp_path / "demo", TINY, progress=False), 0, 0
    whole = everything(folder)
    for path in sorted(path for path in folder.iterdir() if path.name != ".lock"):
        for how in damaged(path, 8):
            times += 1
            try:
                assert everything(folder) == whole, how
            except UserError as error:
                assert (path.name if path.name != "digests.json" else str(folder)) in str(error), how
                noticed += 1
    assert noticed > 0.9 * times
    record_property("times", times)


def test_a_demos_file_that_was_changed_on_purpose_is_used_without_its_digests(tmp_path: Path) -> None:
    folder = train_demo(tmp_path / "demo", TINY, progress=False)
    facts = folder / "facts.csv"
    facts.write_text("".join(facts.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(UserError, match=rf"^{facts}: is missing or not as it was written; .*\(digests\.json alone, if"):
        load_checkpoint(folder)
    (folder / "digests.json").unlink()
    assert load_checkpoint(folder).tokenizer is not None
    assert train_demo(folder, TINY, progress=False) == folder
    (folder / "digests.json").write_text("{")
    with pytest.raises(UserError, match=r"digests\.json: cannot be read \(.*; delete it to use the files beside it"):
        load_checkpoint(folder)


def test_a_demo_that_was_killed_before_its_state_was_deleted_is_finished_again(tmp_path: Path) -> None:
    whole = train_demo(tmp_path / "whole", TINY, progress=False)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(text, "write_digests", die)
        train_demo(tmp_path / "cut", TINY, progress=False)
    cut = tmp_path / "cut"
    assert (cut / "config.json").exists() and not Demo(TINY, cut).finished
    train_demo(cut, TINY, progress=False)
    assert Demo(TINY, cut).finished
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in cut.iterdir()) == names
    assert [name for name in names if (cut / name).read_bytes() != (whole / name).read_bytes()] == []


@pytest.mark.promise(
    "training whose loss or weights become NaN or infinite", "stopped by name, with what to try; what was good is kept"
)
@pytest.mark.parametrize("save_seconds", [30.0, -1.0])
def test_a_demo_that_diverges_stops_with_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_seconds: float
) -> None:
    """Weights are looked at when they are saved, a step before the loss tells."""
    monkeypatch.setattr(text, "SAVE_SECONDS", save_seconds)
    kept, step = ("nothing was saved before", 3) if save_seconds > 0 else ("what was saved at step 1 is kept", 2)
    for _ in range(2):
        with pytest.raises(Diverged) as caught:
            train_demo(tmp_path, tiny(lr=1e30), progress=False)
        assert str(caught.value) == (
            f"{tmp_path}: loss or weights are NaN or infinite from step {step} on; lower lr (1e+30) or raise warmup "
            f"(100); {kept}"
        )
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "model.safetensors").exists()


def test_a_demo_whose_loss_explodes_stops_with_the_step(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=rf"^{tmp_path}: the loss has exploded by step \d\d, from 3 to \d+, where"):
        train_demo(tmp_path, tiny(lr=100.0, steps=60), progress=False)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("change", ["step", "moment", "flipped"])
def test_a_damaged_training_state_of_a_demo_is_never_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(text, "SAVE_SECONDS", -1.0)
    calls = interrupt(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_demo(tmp_path, TINY, progress=False)
    path = tmp_path / "training_state.safetensors"
    state = load_file(path)
    if change == "step":
        save_file(state, path, {"step": "5"})
    elif change == "moment":
        del state["optimizer.1.exp_avg"]
        save_file(state, path, {"step": "3"})
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=rf"^{path}: .*; delete the folder {tmp_path} to train"):
        train_demo(tmp_path, TINY, progress=False)
    assert next(calls) == 4, "a step was taken"


def test_progress_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_demo(tmp_path, TINY)
    assert "demo llada" in capsys.readouterr().err


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="n_control: 4 of 4 families leave none"):
        DemoConfig(n_families=4, n_control=4)
    with pytest.raises(ValidationError, match="format"):
        DemoConfig(format="llama")  # type: ignore[arg-type]


# ---- what it learns


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "steps", "learnt", "changes"),
    [
        ("llada", 800, 0.95, {"n_families": 4, "n_control": 1, "batch_size": 64}),
        ("dream", 700, 0.3, {}),
        ("qwen2", 500, 0.9, {}),
    ],
)
def test_it_learns_its_facts(tmp_path: Path, format: Any, steps: int, learnt: float, changes: dict[str, Any]) -> None:
    """A third of the default's people or fewer, to be quick; one format to the end, the others until much is learnt.
    Chance is below a thousandth."""
    small: dict[str, Any] = {"n_families": 6, "n_control": 2, "d_model": 64, "d_mlp": 128, "batch_size": 32}
    config = DemoConfig(format=format, steps=steps, **small | changes)
    folder = train_demo(tmp_path, config, progress=False)
    model, table = load_checkpoint(folder), load_facts(folder / "facts.csv")
    prompts = make_prompts(table, model.tokenizer, model.cfg, "relational")
    forward = [pair.forward for pair in prompts.pairs]
    assert predict(model, forward).correct.float().mean() > learnt
    if format == "dream":  # read without its shift, the same model knows nothing, and nothing else tells
        model.cfg = model.cfg.model_copy(update={"readout_shift": 0})
        assert predict(model, forward).correct.float().mean() < 0.1
