"""A long day: Ctrl-C anywhere, hooks of contexts that fail, memory that stays flat, odd terminals, homes and paths."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_helpers import Ended
from helpers import TINY_DEMO, one_after_the_other, random_model, random_tokens
from probe_helpers import tiny_probe
from test_cli import CONFIG, stored

from mdm_interp import viz
from mdm_interp.config import FactConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.experiments import subjects, sweep
from mdm_interp.interventions import edits, effects
from mdm_interp.measures import routes
from mdm_interp.measures.evidence import storage_coupling
from mdm_interp.measures.gradients import gradient_alignment, gram
from mdm_interp.models.hooks import in_use
from mdm_interp.models.transformer import HookedTransformer

Forward = Callable[..., Any]

# ---- Ctrl-C

PROBED = ["tiny-llada", "--facts", "facts.csv", "--out", "out"]
INTERRUPTED = {
    "train": ["train", "new.yaml", "--device", "cpu"],
    "attention": ["attention", "RUN", "A0 r0 [M]", "--out", "page.html"],
    "denoise": ["denoise", "RUN", "A0 [M] [M]", "--out", "page.html"],
    "routes": ["routes", "RUN", "--out", "page.html"],
    "explore": ["explore", "new.yaml", "--limit", "1", "--device", "cpu", "--out", "page.html"],
    "sweep": ["sweep", "sweep.yaml", "--device", "cpu", "--workers", "1", "--out", "out"],
    "probe": ["probe", *PROBED, "--only", "large_model_sinks"],
    "influence": ["influence", *PROBED, "--train", "said.txt", "--draws", "2"],
    "demo-checkpoint": ["demo-checkpoint", "--out", "demo", "--device", "cpu"],
}


def visible(folder: Path) -> dict[str, bytes]:
    """Every file that a user sees."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    named = {str(path.relative_to(folder)): path for path in paths}
    return {name: path.read_bytes() for name, path in named.items() if not re.search(r"(^|/)\.", name)}


@pytest.mark.slow
@pytest.mark.promise("Ctrl-C early or late in a command", "one line, code 130, no half file; repeated, the same files")
@pytest.mark.parametrize("command", INTERRUPTED)
def test_ctrl_c_leaves_what_the_same_command_goes_on_from(
    mdm_interp: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, Any], None],
    command: str,
) -> None:
    monkeypatch.setitem(subjects.DEMOS, "memorised", TINY_DEMO.model_copy(update={"steps": 3}))
    monkeypatch.setattr("plotly.io.write_images", None)  # no browser
    monkeypatch.setattr(sweep, "side_by_side", one_after_the_other)
    calls, forward = [0, 0], HookedTransformer.forward

    def interrupted(self: HookedTransformer, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == calls[1]:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(HookedTransformer, "forward", interrupted)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    run = stored(fresh / "runs").folder.name
    (fresh / "new.yaml").write_text(yaml.safe_dump({**CONFIG, "seed": 9}))
    (fresh / "sweep.yaml").write_text(yaml.safe_dump({"base": CONFIG, "grid": {"seed": [5, 6]}}))
    (fresh / "said.txt").write_text("Tom Cruise's mother is Mary Lee Pfeiffer.\n")
    tiny_probe(fresh, "llada", facts=2)

    def go(name: str, stop_at: int) -> Ended:
        if not (tmp_path / name).exists():
            shutil.copytree(fresh, tmp_path / name)
        monkeypatch.chdir(tmp_path / name)
        calls[:] = 0, stop_at
        return mdm_interp(*(run if word == "RUN" else word for word in INTERRUPTED[command]))

    assert go("whole", 0).code == 0
    whole, last = visible(tmp_path / "whole"), calls[0]
    moments = sorted({1, last // 2, last} - {0})
    for moment in moments:
        ended = go(f"at {moment}", moment)
        assert (ended.code, ended.out) == (130, "")
        assert ended.err.splitlines()[-1] == "mdm-interp: interrupted; the same command goes on from here"
        assert "Traceback" not in ended.err
        assert list((tmp_path / f"at {moment}").rglob("*.tmp")) == []
        assert go(f"at {moment}", 0).code == 0
        found = visible(tmp_path / f"at {moment}")
        assert found.keys() == whole.keys()
        assert [name for name in whole if found[name] != whole[name] and not name.endswith("made_with.json")] == []
    record_property("times", len(moments))


# ---- hooks, and memory

FACTS = FactConfig(n_entities=6, n_filler=4, seq_len=7, gap=(2, 4))


def asked() -> tuple[HookedTransformer, Any]:
    model = random_model(n_layers=2, d_vocab=FACTS.d_vocab, n_ctx=FACTS.seq_len, mask_token_id=FACTS.mask_token_id)
    return model, FactWorld(FACTS, 0).query_pairs()[:4]


def hooks_of(model: HookedTransformer) -> list[str]:
    """Everything of torch's that is hooked in a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [name for name, module in model.named_modules() if any(getattr(module, kind) for kind in kinds)]


def contexts(model: HookedTransformer, pairs: Any) -> list[Callable[[], AbstractContextManager[Any]]]:
    edited = [edits.transplanted_routes, edits.shared_routes, edits.even_routes]
    edited += [edits.ablated_storage, edits.ablated_routes]
    hooked = partial(model.hooks, fwd_hooks=[(lambda name: True, lambda tensor, hook: None)])
    return [hooked, *(partial(edit, model, pairs) for edit in edited)]


@pytest.mark.promise("an exception or Ctrl-C inside a context of hooks", "no hook is left, and the model is as before")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_contexts_that_fail_leave_no_hook(
    error: type[BaseException], record_property: Callable[[str, Any], None]
) -> None:
    model, pairs = asked()
    tokens = random_tokens(pos=FACTS.seq_len, d_vocab=FACTS.d_vocab)
    before, made = model(tokens), contexts(model, pairs)
    for number in range(100):
        with pytest.raises(error), made[number % len(made)]():
            assert hooks_of(model)
            raise error
    assert hooks_of(model) == [] and not any(map(in_use, model.hook_dict.values()))
    assert torch.equal(model(tokens), before)
    record_property("times", 100)


CALLS: dict[str, Forward] = {
    "run_with_cache": lambda model, pairs: model.run_with_cache(torch.tensor([pairs[0].forward.tokens])),
    "route_correlation": routes.route_correlation,
    "storage_coupling": storage_coupling,
    "gradient_alignment": gradient_alignment,
    "gram": lambda model, pairs: gram(model, [pair.forward for pair in pairs]),
    "transplant_routes": effects.transplant_routes,
    "share_routes": effects.share_routes,
    "project_even_routes": effects.project_even_routes,
    "attention page": lambda model, pairs: viz.attention(model, pairs[0].forward),
}


@pytest.mark.promise("Ctrl-C inside a layer while a measure, an edit or a page runs", "no hook is left")
@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_interrupted_in_a_layer_leave_no_hook(
    name: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, Any], None]
) -> None:
    model, pairs = asked()
    last, passes = model.blocks[-1], [0, 0]
    forward = last.forward

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        passes[0] += 1
        if passes[0] == passes[1]:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(last, "forward", interrupted)
    with torch.no_grad() if name == "run_with_cache" else torch.enable_grad():
        CALLS[name](model, pairs)
    total = passes[0]
    assert total > 0
    for moment in range(1, total + 1):
        passes[:] = 0, moment
        with pytest.raises(KeyboardInterrupt):
            CALLS[name](model, pairs)
        assert hooks_of(model) == []
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    passes[:] = 0, 0
    CALLS[name](model, pairs)
    record_property("times", total)


def resident() -> int:
    """The memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.promise("1,000 batches, 200 contexts that fail, and ten pages in one process", "memory stays flat")
@pytest.mark.usefixtures("unchecked")
def test_a_long_day_keeps_its_memory() -> None:
    model, pairs = asked()
    tokens = random_tokens(batch=32, pos=FACTS.seq_len, d_vocab=FACTS.d_vocab)
    made = contexts(model, pairs)

    def work(n_batches: int, n_contexts: int, n_pages: int) -> None:
        for _ in range(n_batches):
            model.run_with_cache(tokens)
        for number in range(n_contexts):
            with pytest.raises(ValueError, match="planted"), made[number % len(made)]():
                model(tokens[: len(pairs)])
                raise ValueError("planted")
        for _ in range(n_pages):
            viz.attention(model, pairs[0].forward).html()

    work(50, 12, 2)
    there, before = tensors(), resident()
    work(1000, 200, 10)
    assert tensors() <= there, "tensors are kept"
    assert resident() - before < 2**24


# ---- odd terminals, homes and paths

DRIVER = """
import json, sys
from mdm_interp import cli
from mdm_interp.experiments import subjects
from helpers import TINY_DEMO

subjects.DEMOS["memorised"] = TINY_DEMO.model_copy(update={"steps": 2})
codes = {}
for arguments in json.loads(sys.stdin.read()):
    sys.argv = ["mdm-interp", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        codes[" ".join(arguments)] = ended.code or 0
with open("codes.json", "w") as file:
    json.dump(codes, file)
"""


@pytest.mark.slow
@pytest.mark.promise(
    "no terminal, an ASCII locale, NO_COLOR, no home, spaces and umlauts in paths", "each command works"
)
def test_commands_work_far_from_a_terminal(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    root, folder = Path(__file__).parents[1], tmp_path / "Größe und Maß"
    folder.mkdir()
    run = stored(folder / "Läufe")
    tiny_probe(folder, "llada", facts=3)  # Zoë Müller among them
    (folder / "tiny-llada").rename(folder / "modèle 1")
    (folder / "fàcts 1.csv").write_bytes((folder / "facts.csv").read_bytes())
    (folder / "gesagt.txt").write_text("Zoë Müller's father is José Álvarez.\n", encoding="utf-8")
    (folder / "läuft.yaml").write_text(yaml.safe_dump({**CONFIG, "seed": 9}))
    (folder / "swéep.yaml").write_text(yaml.safe_dump({"base": CONFIG, "grid": {"seed": [0]}}))
    (folder / "Bilder").mkdir()
    for result in (root / "figures").glob("*.json"):
        shutil.copy(result, folder / "Bilder")
    store, probed = ["--runs", "Läufe"], ["modèle 1", "--facts", "fàcts 1.csv"]
    commands = [
        ["train", "läuft.yaml", *store],
        ["sweep", "swéep.yaml", *store, "--out", "Tabelle ü"],
        ["attention", run.folder.name, "A0 r0 [M]", *store, "--out", "Seite ä.html"],
        ["denoise", run.folder.name, "A0 r0 [M]", *store, "--out", "Seite é.html"],
        ["routes", run.folder.name, *store, "--out", "neu ö/Seite.html"],
        ["explore", *probed, "--limit", "1", "--out", "Seite ü.html"],
        ["influence", *probed, "--train", "gesagt.txt", "--draws", "1", "--out", "Einfluß"],
        ["probe", *probed, "--only", "large_model_sinks", "--out", "Antworten é"],
        ["demo-checkpoint", "--out", "Démo 1"],
        ["verify", "--out", "Bilder"],
        ["verify", "--out", "Bilder", "--claim", "4"],
        ["runs", "list", *store],
        ["runs", "show", run.folder.name, *store],
        ["runs", "prune", *store],
        ["--help"],
    ]
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    environment = {**kept, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HOME": "/proc/nowhere"}  # neither there nor to be made
    environment |= {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(commands),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    codes = json.loads((folder / "codes.json").read_text())
    assert list(codes.values()) == [0] * len(commands), (codes, ended.stderr)
    assert "\x1b" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    record_property("times", len(commands))
    assert "Einflu\\xdf/influence.html" in ended.stdout, "what ASCII lacks is written so that it can be told"
