"""The examples: the notebooks are stored with light outputs and run, and the package puts its figure into a report."""

from __future__ import annotations

import html
import importlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import torch
from helpers import TINY_DEMO, random_model

from mdm_interp.data.queries import Query
from mdm_interp.errors import UserError
from mdm_interp.experiments.analysis import discover
from mdm_interp.experiments.results import Result
from mdm_interp.training.demo import train_demo

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))
NUMBER = r"-?\d+\.?\d*(?:e-?\d+)?"
ESTIMATE = rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]"


def read(name: str) -> Any:
    return nbformat.read(EXAMPLES / name, as_version=nbformat.NO_CONVERT)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# ---- as they are stored


def test_there_are_five() -> None:
    named = ["01_first_look", "02_custom_study", "03_llada_on_a_gpu", "04_sparse_autoencoder", "05_own_model"]
    assert [f"{name}.ipynb" for name in named] == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_readme_lists_every_notebook(name: str) -> None:
    assert f"(examples/{name})" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stored_with_what_it_prints_and_pictures_of_what_it_shows(name: str) -> None:
    """`make notebooks` has executed it as it is; the whole repository's notebooks stay light."""
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, 1 + len(code_cells(notebook))))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert {mime for output in outputs for mime in output.get("data", ())} <= {"image/png", "text/plain"}
    assert any("image/png" in output.get("data", ()) for output in outputs), "it shows nothing"
    assert not [output for output in outputs if output.get("name") == "stderr" or output.output_type == "error"]
    assert (EXAMPLES / name).stat().st_size < 1_000_000
    assert not any(cell.get("attachments") for cell in notebook.cells)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_a_notebook_says_of_files_is_so(name: str) -> None:
    prose = " ".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    for file in re.findall(r"`([\w/]+(?:\.ipynb|\.md|/))`", prose):
        assert (EXAMPLES / file).exists() or (ROOT / file).exists() or file == "runs/", file


def test_the_custom_study_has_as_many_lines_as_it_promises() -> None:
    notebook = read("02_custom_study.ipynb")
    (promised,) = re.findall(r"in the (\d+) lines below", notebook.cells[0].source)
    lines = [line for cell in code_cells(notebook) for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= int(promised) == 60


# ---- as they run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where notebooks are executed, in its folder `work`."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def executed(folder: Path) -> Callable[..., Any]:
    """A function from a notebook's name to the notebook with its outputs: run once, by this interpreter, offline,
    all in one folder, as a user would."""
    done: dict[str, Any] = {}

    def execute(name: str) -> Any:
        if name not in done:
            done[name] = run_notebook(EXAMPLES / name, folder)
        return done[name]

    return execute


EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, kernel_name="python3", timeout=300).execute()
nbformat.write(notebook, sys.argv[2])
"""
"""In a process of its own: what zmq's sockets leave behind concerns no test."""


def run_notebook(path: Path, folder: Path) -> Any:
    """Execute a notebook in `folder`, with an error where one of its cells ends in one."""
    work, out = folder / "work", folder / "executed.ipynb"
    work.mkdir(exist_ok=True)
    homes = ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")
    environment = {**os.environ, **{name: str(folder / ".jupyter") for name in homes}}
    # tqdm misses ipywidgets, which the tests do not install.
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
    command = [sys.executable, "-c", EXECUTE, str(path), str(out)]
    ran = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stderr
    assert {path.name for path in work.iterdir()} <= {"runs"}, "a notebook leaves nothing but its runs"
    assert out.stat().st_size < 3_000_000, "with all that it shows, it is too large to share"
    return nbformat.read(out, as_version=nbformat.NO_CONVERT)


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def shown(of_code: Any, mime: str) -> Any:
    """What a cell displays as that type."""
    (found,) = [output.data[mime] for output in of_code.outputs if mime in output.get("data", {})]
    return found


def traces(of_code: Any) -> list[dict[str, Any]]:
    """What the figure that a cell displays is made of."""
    return shown(of_code, "application/vnd.plotly.v1+json")["data"]


def cell(notebook: Any, name: str) -> Any:
    (found,) = [cell for cell in notebook.cells if cell.id == name]
    return found


def assert_clean(notebook: Any) -> None:
    """Every cell ran and says something; nothing warns; every number is one."""
    for at, of_code in enumerate(code_cells(notebook), start=1):
        assert of_code.execution_count == at
        assert not [output for output in of_code.outputs if output.get("name") == "stderr"], of_code.outputs
        assert not re.search(r"\b(nan|inf)\b", printed(of_code)), printed(of_code)


def framed(of_code: Any, attribute: str = "srcdoc") -> str:
    """The interactive page that a cell shows in a frame of its own, or the file that it is in (`src`)."""
    (found,) = re.findall(rf'<iframe\s[^>]*?\b{attribute}="([^"]*)"', shown(of_code, "text/html"))
    return html.unescape(found)


def page(document: str) -> tuple[str, dict[str, Any]]:
    """Title and data of an interactive page."""
    (title,) = re.findall(r"<title>(.*?)</title>", document, re.DOTALL)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', document, re.DOTALL)
    return html.unescape(title), json.loads(data)


def estimates(text: str) -> list[tuple[float, ...]]:
    """Every `value [low, high]` of a text."""
    found = [tuple(map(float, estimate)) for estimate in re.findall(ESTIMATE, text)]
    assert all(low <= value <= high for value, low, high in found)
    return found


@pytest.mark.slow
def test_the_first_look_runs(executed: Callable[..., Any]) -> None:
    notebook = executed("01_first_look.ipynb")
    assert_clean(notebook)
    asked = estimates(printed(cell(notebook, "ask")))
    assert len(asked) == 6 and all(0 <= low <= high <= 1 for _, low, high in asked)
    assert all(value > 0.5 for value, _, _ in asked[::2]), "a model did not learn its facts"
    assert "logits [24, 6, 20] [batch pos d_vocab]\npattern [24, 1, 6, 6]" in printed(cell(notebook, "cache"))
    assert len(estimates(printed(cell(notebook, "hooks")))) == 2
    title, data = page(framed(cell(notebook, "attention")))
    assert title.startswith("Attention: ")
    reverse = printed(cell(notebook, "train")).splitlines()[1]
    assert reverse.startswith(f"reverse query: {' '.join(data['tokens'])}   answer: ")
    title, data = page(framed(cell(notebook, "routes")))
    assert title.startswith("Routes: ")
    assert len(data["checkpoints"]) == len(data["steps"]) > 2, "there is nothing for the slider to go through"
    said = re.findall(rf"^seed \d, head 0: ({NUMBER})$", printed(cell(notebook, "correlation")), re.MULTILINE)
    assert len(said) == 3 and all(-1 <= float(correlation) <= 1 for correlation in said)
    transplanted = printed(cell(notebook, "transplant"))
    differences = [float(number) for number in re.findall(rf"\| = ({NUMBER}) nats", transplanted)]
    assert len(differences) == 3 and max(differences) < 1e-4, "the transplant is exact in these models"
    assert len(estimates(transplanted)) == 12


@pytest.mark.slow
def test_the_custom_study_runs(executed: Callable[..., Any]) -> None:
    notebook = executed("02_custom_study.ipynb")
    assert_clean(notebook)
    before, moved = map(float, re.findall(rf"(?:before|moved) ({NUMBER})", printed(cell(notebook, "check"))))
    assert moved < 1e-4 < before, "the moved key does not score as the forward query's does"
    assert len(estimates(printed(cell(notebook, "effect")))) == 9
    drawn = traces(cell(notebook, "effect"))
    assert [trace["name"] for trace in drawn] == ["seed 0", "seed 1", "seed 2"]
    assert all(len(trace["y"]) == 3 for trace in drawn)


@pytest.mark.slow
def test_llada_gives_way_to_a_demo_checkpoint_where_it_is_not(executed: Callable[..., Any], folder: Path) -> None:
    notebook = executed("03_llada_on_a_gpu.ipynb")
    assert_clean(notebook)
    said = printed(cell(notebook, "load")).splitlines()
    assert said[0].startswith("GSAI-ML/LLaDA-8B-Base is not loaded: ") and len(said) == 2
    assert re.match(r"demo: 2 layers, 4 heads, \d+ facts, on cpu", said[1])
    prompts = printed(cell(notebook, "prompts"))
    assert re.findall(r"^(\w+): [1-9]\d* pairs, \d+ skipped", prompts, re.MULTILINE) == ["positional", "relational"]
    assert len(re.findall(r"^   (?:forward|reverse):.*\[M\].*answer:.+$", prompts, re.MULTILINE)) == 4
    for name in ("prediction", "routes"):
        assert len(traces(cell(notebook, name))) > 4
    documents = {name: framed(cell(notebook, name)) for name in ("attention", "pair")}
    written = folder / "work" / framed(cell(notebook, "trajectory"), "src")
    documents["trajectory"] = written.read_text(encoding="utf-8")
    pages = {name: page(document) for name, document in documents.items()}
    assert [title.split(":")[0] for title, _ in pages.values()] == ["Attention", "Routes", "Denoising"]
    assert all(data["layers"] == [0, 1] and data["heads"] == [0, 1, 2, 3] for _, data in pages.values())
    watched = pages["trajectory"][1]
    masked = set(range(len(watched["tokens"]))) - set(range(*watched["source"]))
    assert set(watched["masks"]) == masked, "all but the source is denoised"


@pytest.mark.slow
def test_a_sparse_autoencoder_takes_the_place_of_an_activation(executed: Callable[..., Any]) -> None:
    notebook = executed("04_sparse_autoencoder.ipynb")
    assert_clean(notebook)
    rebuilt = re.findall(rf"seed \d, (\w+) autoencoder: ({NUMBER}) of the variance", printed(cell(notebook, "fit")))
    assert [name for name, _ in rebuilt] == ["random", "fitted"] * 3
    shares = [float(share) for _, share in rebuilt]
    assert min(shares[1::2]) > 0.8 > max(shares[::2]), "what was fitted rebuilds no more than what was not"
    spliced = printed(cell(notebook, "splice"))
    assert "features [48, 6, 128] [batch pos feature], 6.0 active at a time" in spliced
    ways, replaced, with_error = map(float, re.findall(rf": ({NUMBER})$", spliced, re.MULTILINE))
    assert ways == 0 and with_error < 1e-4 < 0.1 < replaced
    asked = estimates(printed(cell(notebook, "effect")))
    assert len(asked) == 3 * 5 * 2 and all(0 <= low <= high <= 1 for _, low, high in asked)
    for i in range(0, 30, 10):
        for own, fitted, nothing in zip(asked[i : i + 2], asked[i + 2 : i + 4], asked[i + 8 : i + 10], strict=True):
            assert own > fitted > nothing
    silenced = estimates(printed(cell(notebook, "features")))
    assert len(silenced) == 12
    assert all(answers < others for answers, others in zip(silenced[::2], silenced[1::2], strict=True))
    drawn = traces(cell(notebook, "figure"))
    assert [trace["name"] for trace in drawn] == ["seed 0", "seed 1", "seed 2"] * 2
    assert all(len(trace["y"]) == 5 for trace in drawn)


# ---- the third notebook's choice of a checkpoint


@pytest.fixture
def choosing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the third notebook's first cell as if on a GPU with so much free memory, with a loader of one's own."""
    source = cell(read("03_llada_on_a_gpu.ipynb"), "load").source
    demo = train_demo(tmp_path / "demo", TINY_DEMO, progress=False)
    monkeypatch.chdir(tmp_path)

    def choose(free: int | None, load: Callable[..., Any]) -> dict[str, Any]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: free is not None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
        monkeypatch.setattr("mdm_interp.load_checkpoint", load)
        monkeypatch.setattr("mdm_interp.training.demo.train_demo", lambda *_, **__: demo)
        names: dict[str, Any] = {}
        exec(source, names)
        return names

    return choose


def model_of(asked: list[tuple[Any, dict]], fails: str = "") -> Callable[..., Any]:
    """A loader that notes what it is asked for, and does not have what `fails` names."""

    def load(checkpoint: Any, **options: Any) -> Any:
        asked.append((checkpoint, options))
        if checkpoint == fails:
            raise UserError("not to be had")
        return SimpleNamespace(cfg=SimpleNamespace(n_layers=1, n_heads=1, device=options.get("device", "cpu")))

    return load


def test_llada_is_loaded_where_a_gpu_holds_it(
    choosing: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[tuple[Any, dict]] = []
    names = choosing(40 * 2**30, model_of(asked))
    assert asked == [("GSAI-ML/LLaDA-8B-Base", {"device": "cuda", "dtype": "bfloat16"})]
    assert names["name"] == "GSAI-ML/LLaDA-8B-Base"
    assert len(names["facts"].rows) == 12 and not names["facts"].skipped
    assert capsys.readouterr().out == "GSAI-ML/LLaDA-8B-Base: 1 layers, 1 heads, 12 facts, on cuda\n"
    assert (tmp_path / "runs" / "people.csv").exists()


@pytest.mark.parametrize(
    ("free", "fails", "reason"),
    [
        (None, "", "there is no CUDA GPU here"),
        (8 * 2**30, "", "the GPU has 8 GiB free, and it takes 20"),
        (40 * 2**30, "GSAI-ML/LLaDA-8B-Base", "not to be had"),
    ],
    ids=["no GPU", "a small GPU", "no checkpoint"],
)
def test_the_notebook_says_in_one_line_why_it_takes_the_demo(
    choosing: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    free: int | None,
    fails: str,
    reason: str,
) -> None:
    asked: list[tuple[Any, dict]] = []
    names = choosing(free, model_of(asked, fails))
    why, what = capsys.readouterr().out.splitlines()
    assert why.startswith(f"GSAI-ML/LLaDA-8B-Base is not loaded: {reason}. What follows is of a demo checkpoint")
    assert what.startswith("demo: ") and names["name"] == "demo"
    assert len(asked) == (2 if fails else 1)


# ---- the package

STUDY = """
import sys
from helpers import tiny_grid
from mdm_interp import cli

with tiny_grid():
    cli.main()
"""
"""`mdm-interp` with the grid made tiny."""


def project() -> dict[str, Any]:
    """What the study's pyproject.toml says."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest needs the latter
    return toml.loads((EXAMPLES / "custom_study" / "pyproject.toml").read_text(encoding="utf-8"))


def entry_points(groups: dict[str, dict[str, str]]) -> str:
    """As an installed package lists them."""
    return "".join(
        f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in names.items()) for group, names in groups.items()
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in whose `site` the study is installed, as its pyproject.toml says."""
    folder, told = tmp_path_factory.mktemp("study"), project()
    for package in told["tool"]["setuptools"]["packages"]:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(EXAMPLES / "custom_study" / package, folder / "site" / package, ignore=ignored)
    info = folder / "site" / "custom_study-0.1.0.dist-info"
    info.mkdir()
    name, version = told["project"]["name"], told["project"]["version"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points(told["project"]["entry-points"]))
    return folder


@pytest.mark.slow
def test_pip_installs_the_study(tmp_path: Path) -> None:
    if int(importlib.metadata.version("setuptools").split(".")[0] if find_spec("setuptools") else 0) < 77:
        pytest.skip("setuptools >= 77 is not installed, and the tests use no index")
    ignored = shutil.ignore_patterns("__pycache__")
    copy = shutil.copytree(EXAMPLES / "custom_study", tmp_path / "copy", ignore=ignored)
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        *offline,
        "--target",
        str(tmp_path / "site"),
        str(copy),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    (listed,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    assert listed.read_text().strip() == entry_points(project()["project"]["entry-points"]).strip()
    assert (tmp_path / "site" / "custom_study" / "shared_heads.py").exists()


@pytest.fixture(scope="module")
def reproduce(installed: Path) -> Callable[..., str]:
    """Run `mdm-interp reproduce` on the tiny grid where the study is installed; returns what it said."""

    def run(name: str) -> str:
        paths = [str(installed / "site"), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", STUDY, "reproduce", "--only", name, "--seeds", "1", "--device", "cpu"]
        command += ["--workers", "1"]  # in the process whose grid is tiny
        ran = subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        return ran.stderr

    return run


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def reported(installed: Path, reproduce: Callable[..., str]) -> Path:
    """The folder of figures, to which the study's was added when another was there."""
    before = [stamps(ROOT / name) for name in ("figures", "analyses", "examples")]
    reproduce("reversal_curse")
    assert "shared_heads" not in (installed / "figures" / "quick" / "index.html").read_text(encoding="utf-8")
    trained = sorted((installed / "runs").iterdir())
    reproduce("shared_heads")
    assert sorted((installed / "runs").iterdir()) == trained, "the study trains runs that another analysis did not"
    assert [stamps(ROOT / name) for name in ("figures", "analyses", "examples")] == before, "the project was touched"
    return installed / "figures" / "quick"


@pytest.mark.slow
def test_the_study_is_in_the_report_beside_the_rest(reported: Path) -> None:
    index = (reported / "index.html").read_text(encoding="utf-8")
    places = [index.index(f'id="{name}"') for name in ("reversal_curse", "shared_heads")]
    assert places == sorted(places)
    assert "Does the head that answers forward answer in reverse too?" in index
    assert {"shared_heads.html", "shared_heads.json"} <= {path.name for path in reported.iterdir()}
    assert "Nats that the reverse answer loses" in (reported / "shared_heads.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_studys_rows_are_complete_and_its_summary_follows_from_them(reported: Path, shared_heads: Any) -> None:
    result = shared_heads.ANALYSIS.load(reported / "shared_heads.json")
    assert len(result.rows) == 2 * 2, "the two position schemes of a quick run, two directions"
    assert all(math.isfinite(row[name]) for row in result.rows for name in ("chosen", "others"))
    for row in result.rows:
        of = {"scheme": row["scheme"], "query": row["query"]}
        for head in ("chosen", "others"):
            estimate = result.summary.at(head, **of)
            assert estimate.n == 1 and estimate.value == pytest.approx(row[head], rel=1e-4)
        over = result.summary.at("difference", **of)
        assert over.value == pytest.approx(row["chosen"] - row["others"], rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_the_study_is_measured_again_when_its_code_changes(reported: Path, reproduce: Callable[..., str]) -> None:
    path, module = reported / "shared_heads.json", reported.parents[1] / "site" / "custom_study" / "shared_heads.py"
    before, text = path.stat().st_mtime_ns, module.read_text(encoding="utf-8")
    module.write_text(text + "\n# reworded\n", encoding="utf-8")
    reproduce("shared_heads")
    assert path.stat().st_mtime_ns == before, "measured again though nothing changed but words"
    code = Result.load(path).versions["code"]
    module.write_text(text.replace("edited[:, :, head] = 0", "edited[:, :, head] = 0.0"), encoding="utf-8")
    reproduce("shared_heads")
    assert Result.load(path).versions["code"] != code


@pytest.fixture
def shared_heads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(EXAMPLES / "custom_study")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield importlib.import_module("custom_study.shared_heads")
    for name in [name for name in sys.modules if name.startswith("custom_study")]:
        del sys.modules[name]


def test_a_head_that_alone_answers_is_found(shared_heads: Any) -> None:
    """Planted: every head but one writes nothing; silencing it must cost what the model knows, the others nothing."""
    model = random_model(n_layers=1, initializer_range=0.8, normalization_type=None)
    with torch.no_grad():
        model.blocks[0].attn.W_O[[0, 1, 3]] = 0
    queries = [Query((12, 5, token, 3), (token,), (0, 1), (2, 3)) for token in range(4, 10)]
    drops = shared_heads.drops(model, queries)
    assert drops.shape == (6, 4)
    assert torch.equal(drops[:, [0, 1, 3]], torch.zeros(6, 3))
    assert drops[:, 2].abs().min() > 1e-3
    assert not model.blocks[0].attn.hook_z.has_hooks(), "the hook outlives its use"


def test_the_study_reads_runs_that_the_report_trains_anyway(shared_heads: Any) -> None:
    trained = {config.digest() for analysis in discover() for config in analysis.configs(range(3))}
    assert {config.digest() for config in shared_heads.ANALYSIS.configs(range(3))} <= trained


# ---- a model of one's own


def test_a_model_of_ones_own_learns_and_is_read(executed: Callable[..., Any]) -> None:
    """The facts are learnt, and without positions both ways alike; what is shown is the explorer."""
    cells = code_cells(executed("05_own_model.ipynb"))
    (forward, reverse, effect) = printed(cells[3]).splitlines()
    assert float(forward.split()[1]) > 0.5
    assert float(forward.split()[1]) == pytest.approx(float(reverse.split()[1]), abs=0.01)
    numbers = dict(re.findall(rf"'(\w+)': ({NUMBER})", effect))
    assert float(numbers["after"]) < float(numbers["before"])
    assert "Explorer: NoPE model" in html.unescape(shown(cells[4], "text/html"))
