"""Whatever is in a config, CSV, template, config.json or header: it is read, or refused on one short line."""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint_helpers import FORMATS, RELEASED, hugging_face_shapes, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stranger_helpers import said_of

from mdm_interp.checkpoints import load_checkpoint
from mdm_interp.config import BenchmarkConfig, DemoConfig, FactConfig, ModelConfig, TrainConfig
from mdm_interp.data.prompts import FactTemplates, load_facts, render
from mdm_interp.experiments.sweep import Sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.promise("made-up configs, CSVs, templates and headers, for 60 s", "read, or refused on one short line"),
]
fuzz = partial(settings, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def counted(request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]) -> None:
    """Say how many examples a test tries."""
    record_property("times", request.function._hypothesis_internal_use_settings.max_examples)


KINDS = (ModelConfig, FactConfig, TrainConfig, DemoConfig, BenchmarkConfig, FactTemplates, Sweep)
NAMES = sorted({name for kind in KINDS for name in kind.model_fields})
VALID: dict[str, Any] = {
    "model": {"d_model": 16, "n_heads": 4, "d_vocab": 80, "n_ctx": 8},
    "base": {"model": {"d_model": 16, "n_heads": 4}},
    "entities": ["a", "b"],
    "templates": [{"forward": "{a} x {b}", "reverse": "{b} x {a}"}],
    **{"d_model": 16, "n_heads": 4, "d_vocab": 9, "n_ctx": 4, "data": "x"},
}
WORDS = (
    "rope",
    "yarn",
    "sinusoidal",
    "causal",
    "block_causal",
    "float16",
    "relation_cycle",
    "none",
    "RMS",
    "seed",
    "lr",
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**20, 2**24, 2**31, 2**63, 10**30, 10**400, 1e-320, 1e308, 1.5, 0.5]),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=9),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
SNIPPETS = (
    "&a ",
    "*a",
    "<<: ",
    "- ",
    "? ",
    ": ",
    "{",
    "}",
    "[",
    "]",
    "!!int ",
    "!!set ",
    "!!binary ",
    "!x ",
    "|\n",
    "'",
)
SNIPPETS += (
    '"\\ud800"',
    "1e-3",
    "0x",
    "1:2",
    ".inf",
    "~",
    "2001-01-01",
    "%",
    "---\n",
    "\t",
    "#",
    "\n",
    "\ufeff",
    "\x00",
)


@fuzz(max_examples=2000)
@given(
    kind=st.sampled_from(KINDS),
    changes=st.dictionaries(st.sampled_from(NAMES), values, max_size=4),
    snippets=st.lists(st.sampled_from(SNIPPETS + tuple(NAMES)) | st.text(max_size=3), max_size=8),
    at=st.integers(0, 200),
)
def test_a_config_is_read_or_refused_on_one_line(
    kind: Any, changes: dict[str, Any], snippets: list[str], at: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    valid = {name: value for name, value in VALID.items() if name in kind.model_fields}
    text = yaml.safe_dump({**valid, **changes}, allow_unicode=True)
    path.write_bytes((text[:at] + "".join(snippets) + text[at:] if snippets else text).encode("utf-8", "surrogatepass"))
    said_of(lambda: kind.from_yaml(path))


def csv_texts() -> st.SearchStrategy[str]:
    names, marks = ["child", "parent", "parent_type", "Dora", "Gus"], [";", "\r", "sep=,", "\ufeff", "\x00", " "]
    pieces = st.sampled_from([*names, *[","] * 4, *["\n"] * 3, '"', '""', *marks])
    return st.lists(pieces | st.text(max_size=2), max_size=30).map("".join)


@fuzz(max_examples=3000)
@given(
    text=csv_texts(),
    has_header=st.booleans(),
    limit=st.sampled_from([None, 1, 2]),
    garbage=st.binary(max_size=3),
)
def test_a_csv_is_read_or_refused_on_one_line(
    text: str, has_header: bool, limit: int | None, garbage: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "facts.csv"
    text = ("child,parent,parent_type\n" if has_header else "") + text
    path.write_bytes(text.encode("utf-8", "surrogatepass") + garbage)
    said_of(lambda: load_facts(path, limit=limit))


sentences = st.lists(
    st.sampled_from(
        ["{a}", "{b}", "{", "}", "{{", "}}", "{a!r}", "{a:>9}", "{}", "{0}", "{a.b}", "{a[0]}", " is ", "'s"]
    )
    | st.text(max_size=3),
    max_size=7,
).map("".join)


@fuzz(max_examples=2500)
@given(
    forward=sentences,
    reverse=sentences,
    entities=st.lists(st.sampled_from(["a", "b", "a.b", ""]), min_size=1, max_size=3),
)
def test_a_template_is_read_or_refused_on_one_line(forward: str, reverse: str, entities: list[str]) -> None:
    content = {"entities": tuple(entities), "templates": [{"forward": forward, "reverse": reverse}]}

    def state() -> None:
        templates = FactTemplates.model_validate(content)
        values = dict.fromkeys(templates.columns, "x")
        assert render(templates.templates[0].forward, values)[1].keys() >= {*entities}

    said_of(state)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each format, whose files the examples replace."""
    made = {format: write_checkpoint(tmp_path_factory.mktemp(format), format) for format in FORMATS}
    made["header"] = write_checkpoint(tmp_path_factory.mktemp("header"), "llama")
    return {format: one.folder for format, one in made.items()}


ROPE = ("rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings", "beta_fast", "low_freq_factor")
ropes = st.dictionaries(st.sampled_from(ROPE), scalars | st.sampled_from(["yarn", "llama3", "linear"]), max_size=5)


@fuzz(max_examples=2000)
@given(format=st.sampled_from(FORMATS), data=st.data())
def test_a_config_json_is_read_or_refused_on_one_line(
    format: str, data: st.DataObject, folders: dict[str, Path]
) -> None:
    fields = st.sampled_from([*RELEASED[format], "rope_scaling", "rope_parameters", "block_size", "layer_types"])
    changes = data.draw(st.dictionaries(fields, values | ropes, max_size=3))
    (folders[format] / "config.json").write_text(json.dumps({**RELEASED[format], **changes}))
    said_of(lambda: load_checkpoint(folders[format]))


SHAPES = hugging_face_shapes(RELEASED["llama"], bias=False, qk_norm=False)
ENDS = [*itertools.accumulate(4 * math.prod(shape) for shape in SHAPES.values())]
TENSORS = {
    name: {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    for (name, shape), start, end in zip(SHAPES.items(), [0, *ENDS], ENDS, strict=False)
}
"""What the header of a whole checkpoint says."""
numbers = st.integers(-2, 400) | st.sampled_from([2**31, 2**60, 2**64, 10**30])
tensors = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "F8_E4M3", "?"]),
        "shape": st.lists(numbers, max_size=3) | values,
        "data_offsets": st.lists(numbers, max_size=3) | values,
    },
)


@fuzz(max_examples=1500)
@given(
    header=st.dictionaries(st.sampled_from([*TENSORS, "__metadata__", "x"]), tensors | values, max_size=4),
    is_added=st.booleans(),
    size=st.none() | numbers.filter(lambda size: 0 <= size < 2**64),
    body=st.binary(max_size=40),
)
def test_a_header_is_read_or_refused_on_one_line(
    header: dict[str, Any], is_added: bool, size: int | None, body: bytes, folders: dict[str, Path]
) -> None:
    folder = folders["header"]
    if is_added:  # to what is there
        header, body = {**TENSORS, **header}, bytes(ENDS[-1]) + body
    written = json.dumps(header).encode()
    content = struct.pack("<Q", len(written) if size is None else size) + written + body
    (folder / "model.safetensors").write_bytes(content)
    said_of(lambda: load_checkpoint(folder))
