"""Checkpoints that a stranger made to do harm: refused on one line that says why, in 10 s and 2 GiB, or read."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import Checkpoint, edit_config, write_checkpoint, write_json, write_tensors
from helpers import random_model
from stranger_helpers import READ, outcome_of

from mdm_interp.checkpoints import load_checkpoint, save_checkpoint
from mdm_interp.data.chat import INSTRUCTION, LEAD, in_chat
from mdm_interp.data.sentences import mask_copies, read_sentences
from mdm_interp.errors import UserError
from mdm_interp.viz.pages.attention import attention
from mdm_interp.viz.pages.trajectory import trajectory

Harm = Callable[[Checkpoint], Any]
FIFO = "it is no regular file"


def says(**fields: Any) -> Harm:
    """config.json with other fields."""
    return lambda made: write_json(made.folder / "config.json", {**made.config, **fields})


def holds(file: str, content: str | bytes) -> Harm:
    return lambda made: (made.folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def is_fifo(file: str) -> Harm:
    def harm(made: Checkpoint) -> None:
        (made.folder / file).unlink(missing_ok=True)
        os.mkfifo(made.folder / file)

    return harm


def leads(file: str, to: str) -> Harm:
    """A link to a file beside the folder, or to one of the machine's."""
    return lambda made: (made.folder / file).symlink_to(made.folder.parent / to)


def header(content: Any, data: bytes = b"", size: int | None = None) -> Harm:
    """Weights with this header."""
    written = content if isinstance(content, bytes) else json.dumps(content).encode()
    return holds("model.safetensors", struct.pack("<Q", size or len(written)) + written + data)


def one(shape: list[int], end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


def index(file: str, then: Harm = lambda made: None) -> Harm:
    """An index that says of every tensor that it is in `file`."""

    def harm(made: Checkpoint) -> None:
        weights = made.folder / "model.safetensors"
        weights.rename(made.folder.parent / "outside.safetensors")
        place = {name: file.format(made.folder.parent) for name in made.tensors}
        write_json(made.folder / "model.safetensors.index.json", {"weight_map": place})
        then(made)

    return harm


def first_weight(value: float) -> Harm:
    def harm(made: Checkpoint) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors = {**made.tensors, name: made.tensors[name].clone()}
        tensors[name][0, 0] = value
        write_tensors(made.folder, tensors)

    return harm


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4}
CASES: dict[str, tuple[Harm, str]] = {
    # config.json says what nobody means
    "10^4 layers": (says(num_hidden_layers=10**4), "num_hidden_layers: .*1000 "),
    "10^9 layers": (says(num_hidden_layers=10**9), "num_hidden_layers: .*1000 "),
    "more weights than tensors": (says(vocab_size=2**24), "it says \\d+ weights, and the tensors have"),
    "more layers than tensors": (says(num_hidden_layers=900), "it says 900 layers, and there are 21 tensors"),
    "a width of 10^9": (says(hidden_size=10**9), "hidden_size: .*less than"),
    "heads of 10^9": (says(head_dim=10**9), "head_dim: .*less than"),
    "10^12 rows": (says(vocab_size=10**12), "vocab_size: .*less than"),
    "10^12 positions": (says(max_position_embeddings=10**12), "max_position_embeddings: .*less than"),
    "a text for a number": (says(num_hidden_layers="2"), r"num_hidden_layers: .*integer \(got '2'\)"),
    "true for a number": (says(num_hidden_layers=True), r"num_hidden_layers: .*integer \(got True\)"),
    "a text for true": (says(tie_word_embeddings="false"), "tie_word_embeddings: .*boolean"),
    "1 for true": (says(tie_word_embeddings=1), "tie_word_embeddings: .*boolean"),
    "infinite eps": (says(rms_norm_eps=float("inf")), "rms_norm_eps: .*got inf"),
    "NaN eps": (says(rms_norm_eps=float("nan")), "rms_norm_eps: .*got nan"),
    "an infinite base": (says(rope_theta=float("inf")), "rope_theta: .*got inf"),
    "a base of 400 digits": (says(rope_theta=10**400), "rope_theta: .*got 10000"),
    "padding that is no id": (says(pad_token_id=-3), READ),
    # classes
    "classes that are a number": (says(architectures=7), "architectures: 7 is no list of class names"),
    "classes that are 0": (says(architectures=0), "architectures: 0 is no list of class names"),
    "a class that is a list": (says(architectures=[["LlamaForCausalLM"]]), "is no list of class names"),
    "a class that holds a known one": (says(architectures=["MyLlamaForCausalLM2"]), "is not supported; LLaDAModelLM"),
    "a known class and another": (says(architectures=["LlamaForCausalLM", "Evil"]), "is not supported"),
    "a long class": (says(architectures=["x" * 10**6] * 3), "architectures .* is not supported"),
    "a long type": (says(model_type="x" * 10**6), "with model_type 'xxx.* is not supported"),
    # rotary embedding and layers
    "kinds that are lists": (says(rope_scaling={"rope_type": ["yarn"]}), "only linear, llama3, yarn are supported"),
    "kinds that are objects": (says(rope_scaling={"rope_type": {}, "type": {}}), "only linear, llama3, yarn are"),
    "yarn over a base of 1": (says(rope_scaling=YARN, rope_theta=1), "rope_theta: under a base of 1 all planes"),
    "a factor of 400 digits": (says(rope_scaling={**YARN, "factor": 10**400}), "not all that should be numbers are"),
    "an infinite factor": (says(rope_scaling={**YARN, "factor": float("inf")}), "rope_scaling.factor: .*got inf"),
    "turns without end": (says(rope_scaling={**YARN, "beta_fast": 1e-320}), "rope_scaling.beta_fast: .*got 1e-320"),
    "layers that are objects": (says(layer_types=[{}]), "layer_types is .*only 'full_attention'"),
    # JSON
    "a field twice": (holds("config.json", '{"a": 1, "a": 2}'), "cannot be read as JSON .'a' is there twice"),
    "deep JSON": (holds("config.json", "[" * 10**6), "cannot be read as JSON .*recursion"),
    "deep and closed JSON": (holds("config.json", '{"a":' + "[" * 10**5 + "]" * 10**5 + "}"), "cannot be read as JSON"),
    "a long number": (holds("config.json", '{"a":' + "1" * 10**6 + "}"), "cannot be read as JSON"),
    "huge JSON": (holds("config.json", '{"a":[' + "[]," * 10**7 + "[]]}"), "bytes, and at most 16777216 are read"),
    "a FIFO as config.json": (is_fifo("config.json"), FIFO),
    # headers
    "a FIFO as weights": (is_fifo("model.safetensors"), FIFO),
    "a header of 2^60 bytes": (header(b"{}", size=2**60), "cannot be read as safetensors"),
    "2^60 bytes of weights": (header({"a": one([2**58], 2**60)}), "cannot be read as safetensors"),
    "2^80 weights": (header({"a": one([2**40, 2**40], 4)}, b"0000"), "cannot be read as safetensors"),
    "tensors over each other": (header({"a": one([1], 4), "b": one([1], 4)}, b"0000"), "cannot be read as safetensors"),
    "a deep header": (header(b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}"), "cannot be read as safetensors"),
    "rows without columns": (header({"model.embed_tokens.weight": one([0, 10**12], 0)}), "tensors do not fit"),
    "a million dimensions": (
        header({"model.norm.weight": one([1] * 10**6, 4), "b": {**one([0], 4), "data_offsets": [4, 4]}}, b"0000"),
        "tensors do not fit",
    ),
    "a long name": (header({name * 10**6: one([0], 0) for name in "xy"}), "tensors do not fit"),
    "very many tensors": (header({f"t{i}": one([0], 0) for i in range(3 * 10**5)}), "more than 100000 tensors"),
    "a pickle as weights": (holds("model.safetensors", pickle.dumps([1])), "cannot be read as safetensors"),
    "NaN": (first_weight(float("nan")), "model.layers.1.mlp.up_proj.weight has NaN or infinite numbers in float32"),
    "infinity": (first_weight(float("-inf")), "model.layers.1.mlp.up_proj.weight has NaN or infinite numbers"),
    "large numbers": (first_weight(3e38), READ),
    # the index
    "an index to above": (index("../outside.safetensors"), "which are not safetensors files of the folder"),
    "an index to elsewhere": (index("{}/outside.safetensors"), "which are not safetensors files of the folder"),
    "an index to a long name": (index("x" * 10**5 + ".safetensors"), "which are not safetensors files of the folder"),
    "an index to a FIFO": (index("m.safetensors", is_fifo("m.safetensors")), FIFO),
    # A hub's cache consists of links: they are followed, and what they lead to is data like all else.
    "an index to a link": (index("m.safetensors", leads("m.safetensors", "outside.safetensors")), READ),
    "an index to a link to a device": (index("m.safetensors", leads("m.safetensors", os.devnull)), FIFO),
    "an index to a link to itself": (index("m.safetensors", leads("m.safetensors", "model/m.safetensors")), "m.safete"),
}  # fmt: skip


@pytest.mark.promise("a stranger's config, index, header or weights", "one line or read, in 10 s and 2 GiB; never run")
@pytest.mark.parametrize("case", CASES)
def test_a_hostile_checkpoint_is_refused_or_read_in_time_and_memory(case: str, tmp_path: Path) -> None:
    harm, message = CASES[case]
    harm(write_checkpoint(tmp_path / "model", "llama"))
    outcome = outcome_of(lambda: load_checkpoint(tmp_path / "model"))
    assert re.search(message, outcome), outcome


@pytest.mark.promise("a stranger's config, index, header or weights", "one line or read, in 10 s and 2 GiB; never run")
@pytest.mark.parametrize(
    ("format", "fields", "message"),
    [
        ("llada", {"mlp_hidden_size": None, "mlp_ratio": "x" * 10**6}, "mlp_hidden_size is null, .*is no number"),
        (
            "llada",
            {"mlp_hidden_size": None, "mlp_ratio": [1], "d_model": 10**9},
            "mlp_hidden_size is null, .*no number",
        ),
        ("llada", {"mask_token_id": "3"}, r"mask_token_id: .*integer \(got '3'\)"),
        ("a2d-qwen3", {"mask_token_id": [3]}, r"mask_token_id: .*integer \(got \[3\]\)"),
        ("nemotron_labs_diffusion", {"max_position_embeddings": "x"}, "max_position_embeddings: .*integer"),
        ("llada", {"vocab_size": True}, "vocab_size is True, not a whole number"),
    ],
)
def test_a_hostile_field_of_one_format_is_refused(
    format: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    says(**fields)(write_checkpoint(tmp_path, format))
    outcome = outcome_of(lambda: load_checkpoint(tmp_path))
    assert re.search(message, outcome), outcome


@pytest.mark.promise("a stranger's config, index, header or weights", "one line or read, in 10 s and 2 GiB; never run")
def test_positions_that_no_tensor_holds_take_no_memory(tmp_path: Path) -> None:
    save_checkpoint(random_model(position="learned"), tmp_path, "mdm_interp")
    edit_config(tmp_path, n_ctx=2**24)
    assert "it says 26843" in outcome_of(lambda: load_checkpoint(tmp_path))


def test_a_long_field_that_is_not_known_is_cut_short_in_the_warning(tmp_path: Path) -> None:
    says(**{"z" * 10**6: 1})(write_checkpoint(tmp_path, "llama"))
    with pytest.warns(UserWarning, match="config.json has fields that are not known here") as warned:
        load_checkpoint(tmp_path)
    assert all(len(str(one.message)) < 500 for one in warned)


def test_weights_that_a_smaller_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    first_weight(1e30)(write_checkpoint(tmp_path, "llama"))
    with pytest.raises(UserError, match=r"up_proj\.weight has NaN or infinite numbers in float16; load it in another"):
        load_checkpoint(tmp_path, dtype="float16")
    assert load_checkpoint(tmp_path, dtype="bfloat16").cfg.n_layers == 2


@pytest.mark.promise("pickles that pass for safetensors", "refused by name, and never unpickled")
def test_code_in_what_passes_for_weights_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    write_checkpoint(tmp_path / "model", "llama")
    for save in (lambda path: path.write_bytes(pickle.dumps(Payload())), lambda path: torch.save(Payload(), path)):
        save(tmp_path / "model" / "model.safetensors")
        with pytest.raises(UserError, match="cannot be read as safetensors"):
            load_checkpoint(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


# ---- tokenizers


MANY = [f"<x{i}>" for i in range(10**5)]


def has(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.update(fields)


def normalizer(*steps: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    return has(normalizer={"type": "Sequence", "normalizers": [*steps]})


def pattern(regex: str) -> Callable[[dict[str, Any]], Any]:
    return has(pre_tokenizer={"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False})


TENFOLD = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
ANYWHERE = {"type": "Replace", "pattern": {"Regex": ""}, "content": "b" * 10**7}
IN_FRONT = {"type": "Prepend", "prepend": "a" * 10**6}
BYTES = {"type": "ByteLevel"}
PADDING = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
DEEP: dict[str, Any] = {"type": "Lowercase"}
for _ in range(300):
    DEEP = {"type": "Sequence", "normalizers": [DEEP]}
TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str]] = {
    "steps that multiply": (normalizer(*[TENFOLD] * 9), "a", r"makes texts up to 4e\+09 times longer"),
    "a step that multiplies": (normalizer(ANYWHERE), "a", r"makes texts up to 4e\+07 times longer"),
    "steps that put much in front": (normalizer(*[IN_FRONT] * 40), "a", r"makes texts up to 4e\+240 times longer"),
    "bytes of bytes": (normalizer(*[BYTES] * 30), "a", r"makes texts up to 4e\+09 times longer"),
    "padding to 10^9": (has(padding={**PADDING, "strategy": {"Fixed": 10**9}}), "a", READ),
    "padding to multiples": (has(padding={**PADDING, "pad_to_multiple_of": 10**9}), "a", READ),
    "a pattern that panics": (pattern(r"(a+)+$"), "a" * 40 + "b", "tokenizer: fails at a text .*retry-limit"),
    "a pattern that is none": (pattern("("), "a", "the tokenizer cannot be read"),
    "an empty pattern": (pattern(""), "a", READ),
    "steps in steps": (has(normalizer=DEEP), "a", "the tokenizer cannot be read .*recursion"),
    "half of a character": (has(), "a\ud800b", r"text: '\\+ud800' is half of a character; leave it out"),
    "a token below 0": (lambda content: content["model"]["vocab"].update(zz=-1), "a", "the tokenizer cannot be read"),
    "a token far above": (lambda content: content["model"]["vocab"].update(zz=2**32 - 1), "a", "do not fit together"),
}


@pytest.mark.promise("a stranger's tokenizer", "one line or read, in 10 s and 2 GiB; never run")
@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused_or_read_in_time_and_memory(case: str, tmp_path: Path) -> None:
    edit, text, message = TOKENIZERS[case]
    write_checkpoint(tmp_path, "llada", tokenizer=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    edit(content)
    write_json(tmp_path / "tokenizer.json", content)
    outcome = outcome_of(lambda: load_checkpoint(tmp_path).to_tokens(text))
    assert re.search(message, outcome), outcome


@pytest.mark.promise("a stranger's tokenizer", "one line or read, in 10 s and 2 GiB; never run")
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (is_fifo("tokenizer.json"), FIFO),
        (is_fifo("tokenizer_config.json"), FIFO),
        (is_fifo("chat_template.jinja"), FIFO),
        (holds("tokenizer_config.json", '{"added_tokens_decoder": [1]}'), "do not fit together"),
        (holds("tokenizer_config.json", '{"bos_token": {"content": [1]}}'), "do not fit together"),
        (holds("tokenizer_config.json", '{"model_max_length": "x", "extra_special_tokens": 9}'), "do not fit together"),
        (holds("tokenizer_config.json", json.dumps({"extra_special_tokens": MANY})), "add 100000 tokens"),
    ],
    ids=["FIFO", "FIFO of settings", "FIFO of a chat", "a list of tokens", "a token of lists", "numbers", "many"],
)  # fmt: skip
def test_a_tokenizers_hostile_files_are_refused(harm: Harm, message: str, tmp_path: Path) -> None:
    harm(write_checkpoint(tmp_path, "llada", tokenizer=True))
    outcome = outcome_of(lambda: load_checkpoint(tmp_path))
    assert message in outcome


def test_a_mask_outside_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "a2d-llama", edit=lambda config: config.update(mask_token_id=None))
    write_json(tmp_path / "added_tokens.json", {"<|mask|>": 10**12})
    with pytest.raises(UserError, match="mask_token_id 1000000000000 is outside the vocabulary of 320; correct it"):
        load_checkpoint(tmp_path)


LIMIT = "fails \\(it takes more than 3 s or 1073741824 bytes|fails \\(MemoryError"
TEMPLATES = {
    "a long loop": ("{% for i in range(10**9) %}{% endfor %}", "chat template fails"),
    "loops in loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", LIMIT),
    "a number without end": ("{{ 10**(10**10) }}", LIMIT),
    "a text without end": ("{{ 'a' * 10**11 }}", LIMIT),
    "a text that doubles": (
        "{% set x = namespace(t='a') %}{% for i in range(99) %}{% set x.t = x.t + x.t %}{% endfor %}", LIMIT
    ),
    "a wide line": ("{{ 'a' | center(10**11) }}", LIMIT),
    "a long chat": ("{{ 'a' * 10**7 }}", "fails \\(it makes 10000000 characters, and at most 1000000 are read"),
    "the class of a text": ("{{ ''.__class__.__mro__ }}", "chat template"),
    "a deep expression": ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "chat template fails"),
    "itself": ("{% include 'chat_template.jinja' %}", "chat template fails"),
    "half of a character": ("{{ '\\ud800' }}{{ messages[1].content }}", f"chat template|{READ}"),
}  # fmt: skip


@pytest.mark.promise("a stranger's chat template", "one line or read, in 10 s and 2 GiB; never run")
@pytest.mark.parametrize("case", TEMPLATES)
def test_a_hostile_chat_template_is_refused_in_time_and_memory(case: str, tmp_path: Path) -> None:
    template, message = TEMPLATES[case]
    holds("chat_template.jinja", template)(write_checkpoint(tmp_path, "llada", tokenizer=True))
    tokenizer = load_checkpoint(tmp_path).tokenizer
    outcome = outcome_of(lambda: in_chat(tokenizer, " Tom."))
    assert re.search(message, outcome), outcome


def test_a_chat_is_rendered_without_the_folder_that_it_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would find a stranger's modules there."""
    for name in ("json", "transformers", "mdm_interp"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    write_checkpoint(tmp_path, "llada", tokenizer=True)
    holds("chat_template.jinja", "{% for m in messages %}({{ m.content }}){{ eos_token }}{% endfor %}")(
        Checkpoint(tmp_path, "llada", {}, {})
    )
    tokenizer = load_checkpoint(tmp_path).tokenizer
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    end = tokenizer.eos_token or ""
    assert in_chat(tokenizer, " Tom.") == f"({INSTRUCTION}){end}({LEAD} Tom.){end}"
    assert not (tmp_path / "ran").exists()


# ---- what is asked

PROMPTS = {
    "a million characters": "a" * 10**6,
    "a hundred thousand masks": "[M] " * 10**5,
    "a hundred thousand words": "Tom " * 10**5,
    "nothing": "",
    "spaces": " " * 10**6,
    "control characters": "\x00\x1b[2J\x07" * 1000,
    "half of a character": "Tom\ud800 [M]",
    "right to left": "\u202eTom [M]",
    "marks on marks": "a" + "\u0301" * 10**5,
    "markup": "<script>alert(1)</script>{{ 7 * 7 }} [M]",
}


@pytest.mark.promise("a hostile prompt", "one line or read, in 10 s and 2 GiB; never run")
@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.usefixtures("unchecked")
def test_a_hostile_prompt_is_refused_or_read_in_time_and_memory(case: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada", tokenizer=True)
    model = load_checkpoint(tmp_path)
    for page in (attention, trajectory):
        outcome = outcome_of(lambda page=page: page(model, PROMPTS[case]).html())
        assert "\n" not in outcome and not outcome.startswith("killed"), outcome


@pytest.mark.promise("hostile training sentences", "one line or read, in 10 s and 2 GiB; never run")
@pytest.mark.parametrize("case", PROMPTS)
def test_hostile_sentences_are_refused_or_read_in_time_and_memory(case: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada", tokenizer=True)
    model, path = load_checkpoint(tmp_path), tmp_path / "said.txt"
    path.write_bytes(f"{PROMPTS[case]}\n".encode("utf-8", "surrogatepass") * 3)
    outcome = outcome_of(
        lambda: mask_copies(read_sentences(path, model.tokenizer, model.cfg), model.cfg, n_draws=2, seed=0)
    )
    assert "\n" not in outcome and not outcome.startswith("killed"), outcome


def test_a_loaded_tokenizer_is_saved_under_a_name_that_transformers_knows(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada", tokenizer=True)
    model = load_checkpoint(tmp_path)
    model.tokenizer.save_pretrained(tmp_path / "saved")
    named = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert named in ("PreTrainedTokenizerFast", "TokenizersBackend")
