"""The meaning of code: what changes it, what does not, and how far it reaches."""

from __future__ import annotations

import importlib
import keyword
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mdm_interp import meaning as module
from mdm_interp.experiments.analysis import Analysis, CheckpointAnalysis, discover
from mdm_interp.inference.denoising import denoise
from mdm_interp.inference.prediction import predict
from mdm_interp.meaning import UNREAD, Meaning, meaning
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.training.loop import train

ROOT = Path(__file__).parents[1]

STUDY = {
    "__init__": '''
"""A study."""
from .shared import score
''',
    "one": '''
"""One analysis."""
import json
from collections.abc import Sequence

import planted_study.deep
import planted_study.far as away
import torch
from mdm_interp.errors import UserError
from planted_study import score
from planted_study.deep import LIMIT, helper as help_out
from . import tables
from .kinds import Config, Kind

OPTIONS = {"first": 1, "second": 2}


def measure(runs):
    """Rows."""
    from planted_study.local import late

    rows = []
    for run in runs:
        if not run:
            raise UserError("runs: there is an empty one; leave it out")
        assert run, "an empty run"
        rows.append({"score": score(run) + help_out(run, scale=2.0)})
        rows.append({"other": planted_study.deep.other(run), **OPTIONS})
        rows.append({"far": away.far(run), "table": tables.table(run), "kind": judged(run)})
        rows.append({"first": first(run) - second(run), "config": Config(width=2).size()})
    return late(rows)[:LIMIT]


def judged(kind: Kind) -> float:
    return kind.value(3)


def first(run):
    return run + 1


def second(run):
    return run + 2


def draw(result):
    return json.dumps({"legend": "scores"})


def unused():
    return torch.ones(1)
''',
    "shared": """
import functools

import numpy as np


def traced(function):
    return functools.lru_cache(maxsize=7)(function)


@traced
def score(run):
    return np.sum(run)
""",
    "deep": """
LIMIT = 10
FACTOR = 0.5


def helper(run, scale=1.0, *, shift=0):
    # scaled
    total: float = run * scale
    return total + FACTOR + shift


def other(run):
    return run < FACTOR
""",
    "far": '''
def far(run):
    return [inner for inner in range(run) if near(inner)]


def near(far):
    """Even."""
    return not far % 2
''',
    "tables": """
def table(run):
    return TABLE["one"](run)


def one(run):
    return run * 31


TABLE = {"one": one}
""",
    "local": """
def late(rows):
    return sorted(rows, key=str)
""",
    "kinds": """
from pydantic import BaseModel, field_validator


class Base:
    def value(self, n):
        return n * self.weight


class Kind(Base):
    weight = 4

    def __init__(self):
        self.seen = 5

    @property
    def unseen(self):
        return 6


class Config(BaseModel):
    width: int = 8

    @field_validator("width")
    @classmethod
    def positive(cls, width):
        assert width > 0
        return width

    def size(self):
        return self.width * 9
""",
}

Edit = tuple[str, str, str]
"""A module, a text in it, and what takes its place."""


def edited(*edits: Edit, of: dict[str, str] | None = None) -> dict[str, str]:
    files = dict(of or STUDY)
    for name, old, new in edits:
        assert files[name].count(old) == 1, f"{name}: {old!r}"
        files[name] = files[name].replace(old, new)
    return files


def forget_sources() -> None:
    for cached in (module._digest, module._module):
        cached.cache_clear()


Meant = Callable[..., Meaning]


@pytest.fixture(scope="module")
def meant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Meant]:
    """A function from the files of an installed package of another study to the meaning of a function there."""
    folder = tmp_path_factory.mktemp("site") / "planted_study"

    def of(files: dict[str, str], name: str = "one.measure") -> Meaning:
        forget()
        for path in folder.glob("*"):
            path.unlink()
        for file, text in files.items():
            (folder / f"{file}.py").write_text(text)
        importlib.invalidate_caches()
        forget_sources()
        source, _, name = name.partition(".")
        function: Any = importlib.import_module(f"planted_study.{source}")
        for part in name.split("."):
            function = getattr(function, part)
        return meaning(function)

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "planted_study"]:
            del sys.modules[name]

    with pytest.MonkeyPatch.context() as patch:
        folder.mkdir()
        patch.syspath_prepend(folder.parent)
        patch.setattr(sys, "dont_write_bytecode", True)  # two edits of a second are told apart by their text alone
        yield of
        forget()
        forget_sources()


def one(text: str, **others: str) -> dict[str, str]:
    """A study whose `one` has this text."""
    return {"__init__": "", "one": text, **others}


# ---- what is no part of it

SAME: dict[str, list[Edit]] = {
    "a module's docstring": [("one", '"""One analysis."""', '"""Another text."""')],
    "a function's docstring": [("one", '"""Rows."""', '"""All that was measured."""')],
    "no docstring": [("far", '    """Even."""\n', "")],
    "a comment": [("deep", "# scaled", "# made larger")],
    "an annotation": [("deep", "scale=1.0", "scale: float = 1.0")],
    "an annotation of a local": [("deep", "total: float =", "total =")],
    "a return annotation": [("tables", "def one(run):", "def one(run) -> int:")],
    "line breaks": [("one", "first(run) - second(run)", "(\n        first( run )\n        - second(run)\n    )")],
    "quotes": [("tables", 'TABLE["one"](run)', "TABLE['one'](run)")],
    "an error's wording": [("one", "there is an empty one; leave it out", "one is empty")],
    "an assertion's message": [("one", '"an empty run"', 'f"run {len(runs)}"')],
    "a legend": [("one", '"scores"', '"values"')],
    "an unused function": [("one", "torch.ones(1)", "torch.zeros(1)")],
    "no unused function": [("one", "def unused():\n    return torch.ones(1)\n", "")],
    "another unused function": [("deep", "LIMIT = 10", "def unused(): return 1\n\n\nLIMIT = 10")],
    "an unused constant": [("deep", "LIMIT = 10", "LIMIT = 10\nUNUSED = 11")],
    "an unused import": [("local", "def late", "import os\nfrom . import deep\n\n\ndef late")],
    "a method that nothing uses": [("kinds", "return 6", "return 7")],
    "no method that nothing uses": [("kinds", "    @property\n    def unseen(self):\n        return 6\n", "")],
    "a field of a pydantic model": [("kinds", "width: int = 8", "width: int = 80\n    height: int = 1")],
    "a validator of a pydantic model": [("kinds", "assert width > 0", "assert width > 1")],
    "a renamed function": [
        ("one", "from planted_study.deep import LIMIT, helper as", "from planted_study.deep import LIMIT, scaled as"),
        ("deep", "def helper(", "def scaled("),
    ],
    "a renamed function of a module": [
        ("one", "planted_study.deep.other(", "planted_study.deep.below("),
        ("deep", "def other(", "def below("),
    ],
    "a renamed function in a table": [
        ("tables", "def one(run)", "def only(run)"),
        ("tables", '"one": one}', '"one": only}'),
    ],
    "a renamed constant": [
        ("deep", "FACTOR = 0.5", "PART = 0.5"),
        ("deep", "+ FACTOR", "+ PART"),
        ("deep", "< FACTOR", "< PART"),
    ],
    "a renamed class": [
        ("kinds", "class Base", "class Root"),
        ("kinds", "(Base)", "(Root)"),
        ("kinds", "class Kind", "class Sort"),
        ("one", "Config, Kind", "Config, Sort"),
        ("one", "kind: Kind", "kind: Sort"),
    ],
    "the order of definitions": [
        ("one", "def first(run):\n    return run + 1\n", ""),
        ("one", "def draw(", "def first(run):\n    return run + 1\n\n\ndef draw("),
    ],
    "another alias": [
        ("one", "helper as help_out", "helper as aid"),
        ("one", "help_out(run", "aid(run"),
    ],
    "an import of the module instead": [
        ("one", "from planted_study import score\n", "import planted_study.shared\n"),
        ("one", "score(run) +", "planted_study.shared.score(run) +"),
    ],
    "a local import instead of one at the top": [
        ("one", "import planted_study.far as away\n", ""),
        ("one", "    rows = []\n", "    import planted_study.far as away\n    rows = []\n"),
    ],
    "an import from where it is handed on": [
        ("__init__", "import score\n", "import score\nfrom .local import late\n"),
        ("one", "from planted_study.local import late", "from planted_study import late"),
    ],
}


@pytest.mark.parametrize("edits", SAME.values(), ids=SAME)
def test_what_changes_no_number_changes_no_digest(meant: Meant, edits: list[Edit]) -> None:
    assert meant(edited(*edits)).digest == meant(STUDY).digest


def test_a_renamed_module_means_the_same(meant: Meant) -> None:
    files = {name: text.replace("planted_study.deep", "planted_study.depth") for name, text in STUDY.items()}
    files["depth"] = files.pop("deep")
    renamed = meant(files)
    assert renamed.digest == meant(STUDY).digest
    assert "planted_study.depth.helper" in renamed.reached


def test_a_definition_in_another_module_means_the_same(meant: Meant) -> None:
    moved = "def near(far):\n    return not far % 2\n"
    files = edited(("far", 'def near(far):\n    """Even."""\n    return not far % 2\n', ""))
    files["far"] = "from .near import near\n" + files["far"]
    files["near"] = moved
    found = meant(files)
    assert found.digest == meant(STUDY).digest
    assert {"planted_study.near.near"} == set(found.reached) - set(meant(STUDY).reached)


def test_the_name_and_place_of_the_function_itself_do_not_count(meant: Meant) -> None:
    files = edited(("one", "def measure(", "def observe("))
    files["another"] = files.pop("one")
    assert meant(files, "another.observe").digest == meant(STUDY).digest


NAMES = st.from_regex(r"[a-z_]{3,9}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, comment=st.text(st.characters(codec="utf-8", exclude_characters="\n\r\x0c", categories=["L", "P"])))
def test_no_name_and_no_comment_changes_the_digest(meant: Meant, name: str, comment: str) -> None:
    assume(name not in {"first", "second", "run", "rows", "runs", "len", "str"} and f"{name}(" not in STUDY["one"])
    files = {file: text + f"# {comment}\n" for file, text in STUDY.items()}
    files["one"] = files["one"].replace("first(run)", f"{name}(run)")
    assert files["one"].count(f"{name}(run)") == 2, "its definition and its use"
    assert meant(files).digest == meant(STUDY).digest


def test_how_an_error_is_worded_does_not_count(meant: Meant) -> None:
    text = "class Odd(ValueError):\n    def __str__(self):\n        return 'odd'\n\n\n"
    text += "def measure(run):\n    raise Odd(run)\n"
    assert meant(one(text)).digest == meant(one(text.replace("'odd'", "'uneven'"))).digest
    text = text.replace("__str__", "__len__")
    assert meant(one(text)).digest != meant(one(text.replace("'odd'", "'uneven'"))).digest


# ---- what is part of it

OTHER: dict[str, list[Edit]] = {
    "a constant": [("deep", "LIMIT = 10", "LIMIT = 11")],
    "a constant's kind": [("deep", "LIMIT = 10", "LIMIT = 10.0")],
    "a constant of a constant's user": [("deep", "FACTOR = 0.5", "FACTOR = 0.25")],
    "a text": [("one", '"score":', '"scored":')],
    "a key of a table": [("one", '"second": 2', '"third": 2')],
    "an operator": [("deep", "run * scale", "run / scale")],
    "a comparison": [("deep", "run < FACTOR", "run <= FACTOR")],
    "a default argument": [("deep", "scale=1.0", "scale=1.5")],
    "a default of a keyword": [("deep", "shift=0", "shift=1")],
    "a keyword's value": [("one", "scale=2.0", "scale=3.0")],
    "a keyword": [("one", "scale=2.0", "shift=2.0")],
    "the order of calls": [("one", "first(run) - second(run)", "second(run) - first(run)")],
    "the order of statements": [("one", "        if not run:\n", "        rows.append(1)\n        if not run:\n")],
    "a decorator's argument": [("shared", "maxsize=7", "maxsize=8")],
    "no decorator": [("shared", "@traced\n", "")],
    "the kind of an error": [("one", "raise UserError(", "raise ValueError(")],
    "an assertion's condition": [("one", "assert run,", "assert runs,")],
    "what a package's init hands on": [("shared", "np.sum(run)", "np.max(run)")],
    "what an alias of a module stands for": [("far", "not far % 2", "not far % 3")],
    "what a module of `from . import` holds": [("tables", "run * 31", "run * 32")],
    "what a local import brings": [("local", "key=str", "key=repr")],
    "a method of a class named in an annotation": [("kinds", "n * self.weight", "n + self.weight")],
    "an attribute of such a class": [("kinds", "weight = 4", "weight = 5")],
    "how such a class is made": [("kinds", "self.seen = 5", "self.seen = 6")],
    "no annotation of such a class": [("one", "kind: Kind", "kind")],
    "a method of a pydantic model": [("kinds", "self.width * 9", "self.width * 10")],
    "another import of a name": [
        ("one", "import LIMIT, helper as help_out", "import helper as help_out"),
        ("one", "from . import tables\n", "from . import tables\nfrom .tables import LIMIT\n"),
        ("tables", "TABLE = {", "LIMIT = 9\nTABLE = {"),
    ],
    "another module of an alias": [
        ("one", "import planted_study.far as away", "import planted_study.local as away"),
        ("local", "def late", "def far(run):\n    return run\n\n\ndef late"),
    ],
    "a filter of a comprehension": [("far", " if near(inner)", "")],
    "the range of a comprehension": [("far", "range(run)", "range(run + 1)")],
    "a name that is local now": [("one", "    rows = []\n", "    rows = []\n    first = len\n")],
}


@pytest.mark.parametrize("edits", OTHER.values(), ids=OTHER)
def test_what_may_change_a_number_changes_the_digest(meant: Meant, edits: list[Edit]) -> None:
    changed = meant(edited(*edits)).digest
    assert changed != meant(STUDY).digest
    assert changed == meant(edited(*edits)).digest, "and is no accident"


def test_every_change_has_a_digest_of_its_own(meant: Meant) -> None:
    assert len({meant(edited(*edits)).digest for edits in OTHER.values()}) == len(OTHER)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 3) | st.sampled_from([0.0, 1.0, True, "1", None]), min_size=2, max_size=2))
def test_constants_mean_the_same_if_they_are_the_same(meant: Meant, constants: list[Any]) -> None:
    digests = {meant(edited(("deep", "LIMIT = 10", f"LIMIT = {constant!r}"))).digest for constant in constants}
    assert len(digests) == len({repr(constant) for constant in constants})


# ---- how far it reaches


def test_it_reaches_what_is_used_and_nothing_else(meant: Meant) -> None:
    found = meant(STUDY)
    used = {
        "one": ("OPTIONS", "first", "judged", "measure", "second"),
        "shared": ("score", "traced"),
        "deep": ("FACTOR", "LIMIT", "helper", "other"),
        "far": ("far", "near"),
        "tables": ("TABLE", "one", "table"),
        "local": ("late",),
        "kinds": ("Base", "Base.value", "Config", "Config.size", "Kind"),
    }
    expected = {f"planted_study.{file}.{name}" for file, names in used.items() for name in names}
    assert set(found.reached) == expected | {"mdm_interp.errors.UserError"}
    assert list(found.reached) == sorted(found.reached)


def test_packages_are_named_where_they_are_used(meant: Meant) -> None:
    assert meant(STUDY).packages == ("functools", "numpy", "pydantic"), "torch is only in an unused function"
    assert "torch" in meant(edited(("one", "run + 1", "torch.ones(run)"))).packages
    assert "numpy" not in meant(edited(("shared", "np.sum(run)", "sum(run)"))).packages
    assert meant(STUDY, "one.unused").packages == ("torch",)
    assert meant(STUDY, "one.draw").packages == ("json",)


def test_a_lambda_means_its_whole_module(meant: Meant) -> None:
    text = "def helper():\n    return 1\n\n\nK = 2\nmeasure = lambda runs: 3\n"
    before = meant(one(text))
    assert before.reached == tuple(f"planted_study.one.{name}" for name in ("K", "helper", "measure"))
    for old, new in (("return 1", "return 2"), ("K = 2", "K = 3"), ("runs: 3", "runs: 4")):
        assert meant(edited(("one", old, new), of=one(text))).digest != before.digest


def test_what_a_function_is_given_in_advance_counts() -> None:
    named: list[dict[str, Any]] = [{}, {"a": 1}]
    digests = [meaning(partial(predict, *given, **more)).digest for given in ((), (1,), (2,)) for more in named]
    assert len(set(digests)) == 6
    assert digests[0] == meaning(partial(predict)).digest


def test_the_order_of_functions_does_not_count_and_each_does() -> None:
    assert meaning(predict, denoise).digest == meaning(denoise, predict).digest
    assert len({meaning(predict).digest, meaning(denoise).digest, meaning(predict, denoise).digest}) == 3


SHADOWED = {
    "an argument": "def measure(helper):\n    return helper()\n",
    "a keyword": "def measure(*, helper=None):\n    return helper\n",
    "other arguments": "def measure(*helper, **K):\n    return helper, K\n",
    "an assignment": "def measure():\n    helper = 1\n    return helper\n",
    "a loop": "def measure(runs):\n    for helper in runs:\n        runs = helper\n    return runs\n",
    "a with": "def measure(runs):\n    with runs as helper:\n        return helper\n",
    "an error": "def measure(runs):\n    try:\n        pass\n    except ValueError as helper:\n        return helper\n",
    "a comprehension": "def measure(runs):\n    return [helper for helper in runs if helper]\n",
    "a generator": "def measure(runs):\n    return sum(helper for _, helper in runs)\n",
    "a dictionary": "def measure(runs):\n    return {helper: K for helper, K in runs}\n",
    "a lambda": "def measure():\n    return lambda helper: helper\n",
    "a function in it": "def measure():\n    def helper():\n        return 2\n    return helper()\n",
    "a function around it": "def measure(helper):\n    def inner():\n        return helper\n    return inner\n",
    "a walrus": "def measure(runs):\n    return [1 for _ in runs if (helper := 1)], helper\n",
    "an import": "def measure():\n    from json import dumps as helper\n    return helper\n",
    "an attribute": "def measure(runs):\n    return runs.helper(K=1).K\n",
}
GLOBALS = "K = {n}\n\n\ndef helper():\n    return {n}\n\n\n"


@pytest.mark.parametrize("text", SHADOWED.values(), ids=SHADOWED)
def test_a_local_name_is_not_the_global_one(meant: Meant, text: str) -> None:
    before, after = (meant(one(GLOBALS.format(n=n) + text)) for n in (1, 2))
    assert before == after
    assert before.reached == ("planted_study.one.measure",)


FOLLOWED = {
    "beside a comprehension's": "def measure(runs):\n    return [K for K in runs], helper\n",
    "beside a local of a function in it": "def measure():\n    def inner():\n        helper = 1\n    return helper\n",
    "in a function in it": "def measure():\n    def inner():\n        return helper\n    return inner\n",
    "in a lambda": "def measure():\n    return lambda: helper()\n",
    "in a comprehension": "def measure(runs):\n    return {run: helper for run in runs}\n",
    "in a comprehension's source": "def measure():\n    return [run for run in helper()]\n",
    "in a default": "def measure(n=helper()):\n    return n\n",
    "in a decorator": "@(lambda f: helper() and f)\ndef measure():\n    return 1\n",
    "declared global": "def measure():\n    global helper\n    helper = helper\n    return helper\n",
    "in a text": "def measure(x):\n    return f'{helper()}'\n",
    "in an await": "async def measure():\n    return await helper()\n",
    "in a class in it": "def measure():\n    class Inner:\n        helped = helper\n    return Inner\n",
    "at the top, in a branch": "if K:\n    both = helper\nelse:\n    both = 1\n\n\ndef measure():\n    return both\n",
    "at the top, added to": "both = []\nboth += [helper]\n\n\ndef measure():\n    return both\n",
    "at the top, as an entry": "both = {}\nboth[1] = helper\n\n\ndef measure():\n    return both\n",
    "at the top, among several": "one, (two, *three) = 1, (2, helper)\n\n\ndef measure():\n    return three\n",
}


@pytest.mark.parametrize("text", FOLLOWED.values(), ids=FOLLOWED)
def test_a_global_name_is_followed_wherever_it_is_used(meant: Meant, text: str) -> None:
    before, after = (meant(one(GLOBALS.format(n=n) + text)) for n in (1, 2))
    assert before.digest != after.digest
    assert "planted_study.one.helper" in before.reached


@pytest.mark.parametrize("name", ["one", "two"])
def test_recursion_and_imports_in_a_circle_end(meant: Meant, name: str) -> None:
    files = {
        "__init__": "from .one import measure\n",
        "one": "from . import two\n\n\ndef measure(n):\n    return n and two.measure(n - 1)\n",
        "two": "import planted_study.one as one\n\n\ndef measure(n):\n    return one.measure(n) + measure(n)\n",
    }
    found = meant(files, f"{name}.measure")
    assert found.reached == ("planted_study.one.measure", "planted_study.two.measure")
    for edit in (("one", "n - 1", "n - 2"), ("two", "+ measure", "- measure")):
        assert meant(edited(edit, of=files), f"{name}.measure").digest != found.digest


def test_methods_count_if_their_name_is_used_on_anything(meant: Meant) -> None:
    text = "class A:\n    def used(self):\n        return {n}\n\n    def unused(self):\n        return {m}\n\n\n"
    for use in ("A().used()", "getattr(A(), 'used')", "map(A.used, [])", "other.used"):
        of = [meant(one(text.format(n=n, m=m) + f"def measure(other=A()):\n    return {use}\n")) for n, m in PAIRS]
        assert of[0].digest == of[1].digest != of[2].digest, use


PAIRS = [(1, 1), (1, 2), (2, 1)]


def test_a_method_that_another_packages_class_calls_counts(meant: Meant) -> None:
    text = "import torch\n\n\nclass Net(torch.nn.Module):\n    def forward(self):\n        return {n}\n\n"
    text += "    def own(self):\n        return {m}\n\n\ndef measure(x):\n    return Net()(x)\n"
    of = [meant(one(text.format(n=n, m=m))) for n, m in PAIRS]
    assert of[0].digest == of[1].digest != of[2].digest


def test_classes_named_by_a_name_for_several_are_reached(meant: Meant) -> None:
    text = "class A:\n    def m(self):\n        return {n}\n\n\nMaybe = A | None\n\n\n"
    text += "def measure(x: list[Maybe]):\n    return x[0].m()\n"
    assert len({meant(one(text.format(n=n))).digest for n in (1, 2)}) == 2


# ---- what is seldom written

SELDOM: dict[str, tuple[dict[str, str], Edit]] = {
    "a definition of which only what it calls differs": (
        one(
            "def a():\n    return 1\n\n\ndef b():\n    return 2\n\n\ndef f():\n    return a()\n\n\n"
            "def g():\n    return b()\n\n\ndef measure():\n    return f() - g()\n"
        ),
        ("one", "f() - g()", "g() - f()"),
    ),
    "a star": (one("from .two import *\n\n\ndef measure():\n    return K\n", two="K = 1\n"), ("two", "1", "2")),
    "a loop at the top": (
        one("K = {}\nfor i in range(3):\n    K[i] = 1\n\n\ndef measure():\n    return K\n"),
        ("one", "range(3)", "range(4)"),
    ),
    "a call at the top": (
        one("K = {}\nK.update(a=1)\n\n\ndef measure():\n    return K\n"),
        ("one", "a=1", "a=2"),
    ),
    "an imported name by which something is entered": (
        one("from .two import K\n\nT = {}\nT[K] = 1\n\n\ndef measure():\n    return T\n", two="K = 1\n"),
        ("two", "1", "2"),
    ),
    "an import with something to fall back on": (
        one(
            "try:\n    from .two import K\nexcept ImportError:\n    K = 0\n\n\ndef measure():\n    return K\n",
            two="K = 1\n",
        ),
        ("two", "1", "2"),
    ),
    "a module that is handed on whole": (
        one("from . import two\n\n\ndef measure():\n    return vars(two)\n", two="K = 1\n"),
        ("two", "1", "2"),
    ),
    "an annotation in quotes": (
        one('class A:\n    def m(self):\n        return 1\n\n\ndef measure(x: "A"):\n    return x.m()\n'),
        ("one", "return 1", "return 2"),
    ),
    "what a comprehension goes through under its variable's name": (
        one("from .two import K\n\n\ndef measure():\n    return [K for K in K]\n", two="K = [1]\n"),
        ("two", "1", "2"),
    ),
}


@pytest.mark.parametrize(("files", "edit"), SELDOM.values(), ids=SELDOM)
def test_what_is_seldom_written_is_read(meant: Meant, files: dict[str, str], edit: Edit) -> None:
    assert meant(edited(edit, of=files)).digest != meant(files).digest


@pytest.mark.parametrize(
    "text",
    [
        "from mdm_interp import HookedTransformer\n\n\ndef measure():\n    return HookedTransformer(1)\n",
        "import mdm_interp\n\n\ndef measure():\n    return mdm_interp.HookedTransformer(1)\n",
        "from mdm_interp import routes\n\n\ndef measure():\n    return routes.compute_routes(1)\n",
    ],
    ids=["a name", "an attribute", "a module"],
)
def test_what_the_package_hands_on_is_reached(meant: Meant, text: str) -> None:
    reached = meant(one(text)).reached
    assert {"mdm_interp.models.transformer.HookedTransformer", "mdm_interp.measures.routes.compute_routes"} & {*reached}


# ---- the installed analyses


@pytest.mark.parametrize("analysis", discover(), ids=lambda analysis: analysis.name)
def test_an_analysis_means_its_measure_and_the_model_and_nothing_of_looks_and_verdicts(analysis: Analysis) -> None:
    found = meaning(*analysis.measuring())
    measure = analysis.measure.func if isinstance(analysis.measure, partial) else analysis.measure
    assert f"{measure.__module__}.{measure.__qualname__}" in found.reached
    assert f"{HookedTransformer.__module__}.HookedTransformer" in found.reached
    assert {"torch"} <= set(found.packages)
    for unread in UNREAD:
        assert importlib.import_module(unread)
        assert not [name for name in found.reached if f"{name}.".startswith(f"{unread}.")]
    for name in ("draw", "summarize", "takeaway", "ANALYSIS"):
        assert f"{measure.__module__}.{name}" not in found.reached
    assert isinstance(analysis, CheckpointAnalysis) or "mdm_interp.training.runs.Run.model" in found.reached


@pytest.mark.parametrize("name", [analysis.name for analysis in discover()])
def test_no_analysis_uses_another(name: str) -> None:
    """What two of them need belongs to the library, and a change of one leaves the numbers of the other."""
    (analysis,) = [analysis for analysis in discover() if analysis.name == name]
    theirs = {reached.split(".")[1] for reached in meaning(*analysis.measuring()).reached if "analyses." in reached}
    assert theirs == {name}


def test_training_means_its_loss_and_its_model_and_no_measure() -> None:
    reached = set(meaning(train).reached)
    assert {"mdm_interp.training.losses.drawn_loss", "mdm_interp.models.transformer.HookedTransformer"} <= reached
    assert not [name for name in reached if name.startswith(("mdm_interp.measures", "mdm_interp.experiments"))]


@pytest.mark.slow
def test_an_analysis_run_as_a_program_means_the_same() -> None:
    program = "import sys, runpy\nfrom mdm_interp import cli\nfrom mdm_interp.meaning import meaning\n"
    program += "cli.run_one = lambda analysis: print(meaning(*analysis.measuring()).digest)\n"
    program += "runpy.run_module('analyses.depth', run_name='__main__', alter_sys=True)\n"
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    (depth,) = [analysis for analysis in discover() if analysis.name == "depth"]
    assert printed.stdout.strip() == meaning(*depth.measuring()).digest, printed.stderr
