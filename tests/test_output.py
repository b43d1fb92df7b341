"""What is written: a place that cannot be written is refused on one line before any work, a disk that fills up half-way
leaves whole files, links and pipes stay what they are, and whoever stops reading ends a command quietly."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from cli_helpers import Ended, assert_refused, contents
from damage_helpers import mounted, remount
from probe_helpers import tiny_probe
from test_cli import CONFIG, stored

from mdm_interp.checkpoints import save_checkpoint
from mdm_interp.cli import _opened
from mdm_interp.experiments import subjects
from mdm_interp.files import check_file, check_folder, replacing, write_text
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.tensors import save_tensors
from mdm_interp.training import loop
from mdm_interp.training.runs import Run

TO_A_FILE = {
    "attention": ["attention", "RUN", "A0 r0 [M]"],
    "denoise": ["denoise", "RUN", "A0 r0 [M]"],
    "routes": ["routes", "RUN"],
    "explore": ["explore", "new.yaml", "--limit", "1"],
}
TO_A_FOLDER = {
    "reproduce": ["reproduce", "--only", "reversal_curse", "--seeds", "1"],
    "sweep": ["sweep", "sweep.yaml"],
    "probe": ["probe", "tiny-llada", "--facts", "facts.csv"],
    "influence": ["influence", "tiny-llada", "--train", "said.txt", "--facts", "facts.csv"],
    "reversal-benchmark": ["reversal-benchmark", "--train", "--data", "celebrities"],
    "demo-checkpoint": ["demo-checkpoint"],
}
WRITING = {**TO_A_FILE, **TO_A_FOLDER}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, what commands are given, and places that cannot be written. No model computes and nothing is trained."""
    run = stored(tmp_path / "runs")
    (tmp_path / "new.yaml").write_text(yaml.safe_dump({**CONFIG, "seed": 9}))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"base": CONFIG, "grid": {"seed": [7, 8]}}))
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("kept")
    run.folder.rename(run.folder.with_name("RUN"))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("worked before the place was looked at")

    monkeypatch.setattr(HookedTransformer, "forward", refuse)
    monkeypatch.setattr(loop, "train", refuse)
    monkeypatch.setattr(subjects, "train_all", refuse)
    return tmp_path


def unwritable(command: str) -> list[str]:
    return ["file/below", "/proc/below", "n" * 300, *(["folder"] if command in TO_A_FILE else ["file"])]


@pytest.mark.promise("an output that is a folder, is below a file, or is where nothing can be", "one line, before work")
@pytest.mark.parametrize(
    ("command", "place"), [(command, place) for command in WRITING for place in unwritable(command)], ids=str
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    mdm_interp: Callable[..., Ended], workplace: Path, command: str, place: str
) -> None:
    before = contents(workplace)
    assert_refused(mdm_interp(*WRITING[command], "--out", place), place[-20:], "; give a path that can be read and")
    assert contents(workplace) == before


def test_an_output_that_can_be_written_is_not_refused(tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text("old")
    (tmp_path / "link.html").symlink_to("there.html")
    before = contents(tmp_path)
    for path in ("there.html", "link.html", "new.html", "new folder/new.html"):
        assert check_file(tmp_path / path) == tmp_path / path
    for path in (".", "new folder", "new/folder"):
        assert check_folder(tmp_path / path) == tmp_path / path
    assert contents(tmp_path) == before


def test_what_killed_commands_left_half_written_is_removed_by_the_next(
    mdm_interp: Callable[..., Ended], tmp_path: Path
) -> None:
    """Of the file that is written; of a folder, of any in it. What is young may be somebody's who is at it."""
    run, now = stored(tmp_path / "runs"), time.time()
    (tmp_path / "out" / ".depth.parts").mkdir(parents=True)
    kept = [".page.html.young_00.tmp", ".other.html.abcdefgh.tmp", ".page.html.tmp", "out/.x.html.young_00.tmp"]
    left = [".page.html.abcdefgh.tmp", "out/.x.html.abcdefgh.tmp", "out/.depth.parts/.1.json.abcdefgh.tmp"]
    for name in (*kept, *left):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now, now if "young" in name else now - 4000))
    assert mdm_interp("attention", run.folder.name, "A0 r0 [M]", "--out", "page.html").code == 0
    check_folder(tmp_path / "out")
    assert [name for name in kept if not (tmp_path / name).exists()] == []
    assert [name for name in left if (tmp_path / name).exists()] == []


def test_a_store_that_cannot_be_written_is_refused_before_training(
    mdm_interp: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"base": CONFIG, "grid": {"seed": [7, 8]}}))
    (tmp_path / "file").write_text("kept")
    before = contents(tmp_path)
    for command in ("train config.yaml", "sweep sweep.yaml --workers 1", "explore config.yaml --out page.html"):
        assert_refused(mdm_interp(*command.split(), "--runs", "file"), "file", "Not a directory")
        assert contents(tmp_path) == before


# ---- a disk of its own, where one may be mounted


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 kB, half of it taken."""
    folder = tmp_path / "disk"
    with mounted(folder, "16k"):
        (folder / "taken").write_bytes(bytes(8192))
        yield folder


@pytest.mark.promise("a disk that is full", "one line that names the file; old files whole, no half ones")
def test_a_full_disk_is_one_line_and_leaves_whole_files(
    mdm_interp: Callable[..., Ended], tmp_path: Path, disk: Path
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    run = stored(tmp_path / "runs")
    (disk / "page.html").write_text("old")
    ended = mdm_interp("attention", run.folder.name, "A0 r0 [M]", "--out", disk / "page.html")
    said = "disk/page.html: No space left on device; make room, and repeat the command, which goes on from here\n"
    assert (ended.code, ended.out) == (1, "") and ended.err.endswith(said) and ended.err.count("\n") == 1
    assert (disk / "page.html").read_text() == "old"
    ended = mdm_interp("train", "config.yaml", "--device", "cpu", "--runs", disk / "runs")
    assert (ended.code, ended.out) == (1, "") and "No space left on device; make room" in ended.err
    assert list(disk.rglob("*.tmp")) == []
    (disk / "taken").unlink()
    remount(disk, "size=1m")
    assert mdm_interp("train", "config.yaml", "--device", "cpu", "--runs", disk / "runs").code == 0
    resumed = Run.of(run.config, disk / "runs")
    assert resumed.checkpoint_path(4).read_bytes() == run.checkpoint_path(4).read_bytes()


@pytest.mark.promise("a store or an output on a read-only disk", "one line, before work; finished runs are read")
def test_a_read_only_disk_is_one_line_and_its_runs_are_read(
    mdm_interp: Callable[..., Ended], tmp_path: Path, disk: Path
) -> None:
    (tmp_path / "new.yaml").write_text(yaml.safe_dump({**CONFIG, "seed": 9}))
    remount(disk, "size=1m")
    run = stored(disk / "runs")
    remount(disk, "ro")
    page = ("attention", run.folder.name, "A0 r0 [M]", "--runs", disk / "runs", "--out")
    assert mdm_interp(*page, "page.html").code == 0
    assert_refused(mdm_interp(*page, disk / "page.html"), "disk/page.html: Read-only file system; give a path")
    train = ("train", "new.yaml", "--device", "cpu", "--runs", disk / "runs")
    assert_refused(mdm_interp(*train), "Read-only file system")


# ---- writers, and a file that may not grow


def parquet(path: Path) -> None:
    pd.DataFrame({"number": range(10_000)}).to_parquet(path)


def write_with(writer: Callable[[Path], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with replacing(path) as temporary:
            writer(temporary)

    return write


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "x" * 5000),
    "tensors": lambda path: save_tensors(path, {"x": torch.zeros(5000)}),
    "table": write_with(parquet),
}


@pytest.mark.promise("a file that the system does not let grow, written as text, tensors or a table", "the old file")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as raised:
            WRITERS[writer](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path)), "not the temporary file's name"
    assert contents(tmp_path) == {str(path): b"old"}
    WRITERS[writer](path)
    assert path.read_bytes() != b"old"


def test_a_tokenizer_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library says the number of the error in a text alone."""
    model = tiny_probe(tmp_path, "llada").model

    def full(*_: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(type(model.tokenizer.backend_tokenizer), "save", full, raising=False)
    with pytest.raises(OSError, match="No space left on device") as raised:
        save_checkpoint(model, tmp_path / "saved", format="llada")
    assert raised.value.filename == str(tmp_path / "saved")


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("umask", "new"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_keeps_its_mode_and_a_new_one_has_what_the_umask_leaves(
    tmp_path: Path, writer: str, umask: int, new: int
) -> None:
    before = os.umask(umask)
    try:
        for mode in (None, 0o600, 0o640, 0o444, 0o755):
            path = tmp_path / str(mode)
            if mode is not None:
                path.write_text("old")
                path.chmod(mode)
            WRITERS[writer](path)
            assert stat.S_IMODE(path.stat().st_mode) == (new if mode is None else mode)
    finally:
        os.umask(before)


def test_what_is_private_is_never_open_to_others_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch(0o600)
    with replacing(path) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


def test_a_long_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 120 + ".html")
    write_text(path, "content")
    assert contents(tmp_path) == {str(path): b"content"}


# ---- what is no plain file


@pytest.mark.promise("an output that is a pipe, a device or a link", "it stays one, and gets the content")
@pytest.mark.parametrize("kind", ["pipe", "device", "link", "link to a device", "link to a folder"])
def test_what_is_no_plain_file_is_written_through(mdm_interp: Callable[..., Ended], tmp_path: Path, kind: str) -> None:
    run, out = stored(tmp_path / "runs"), tmp_path / "page.html"
    command, got = ("attention", run.folder.name, "A0 r0 [M]", "--out"), list[bytes]()
    assert mdm_interp(*command, "plain.html").code == 0
    plain = (tmp_path / "plain.html").read_bytes()
    if kind == "pipe":
        os.mkfifo(out)
        reader = threading.Thread(target=lambda: got.append(out.read_bytes()), daemon=True)
        reader.start()
        assert mdm_interp(*command, out).code == 0
        reader.join(timeout=20)
        assert got == [plain] and out.is_fifo()
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "target.html").write_text("old")
        out.symlink_to("elsewhere/target.html")
        assert mdm_interp(*command, out).code == 0
        assert out.is_symlink() and (tmp_path / "elsewhere" / "target.html").read_bytes() == plain
        assert len(list((tmp_path / "elsewhere").iterdir())) == 1
    elif kind == "link to a folder":
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to("elsewhere")
        assert mdm_interp(*command, out / "page.html").code == 0
        assert (tmp_path / "elsewhere" / "page.html").read_bytes() == plain
    else:
        if kind == "link to a device":
            out.symlink_to(os.devnull)
        else:
            try:
                os.mknod(out, 0o666 | 0o020000, os.makedev(1, 3))  # another /dev/null
                out.write_bytes(b"")
            except OSError:
                pytest.skip("no device can be made here")
        assert mdm_interp(*command, out).code == 0
        assert out.is_char_device() and out.is_symlink() == (kind == "link to a device")
    assert list(tmp_path.rglob("*.tmp")) == []


# ---- options that would be passed over


@pytest.mark.parametrize("command", TO_A_FILE)
def test_options_of_checkpoints_are_refused_for_a_run(
    mdm_interp: Callable[..., Ended], workplace: Path, command: str
) -> None:
    run = ["RUN" if part == "new.yaml" else part for part in TO_A_FILE[command]]
    told = ("is for checkpoints; a run's model is as its config says, leave it out", "is for checkpoints; pages of")
    for option, value, says in (
        ("--dtype", "int8", told[0]),
        ("--revision", "main", told[0]),
        ("--mask-token-id", "0", told[0]),
        ("--device", "tpu", told[1]),
    ):
        refused = mdm_interp(*run, option, value, "--runs", "runs", "--out", "page.html")
        assert_refused(refused, f"{option}: {value} {says}")
    assert not (workplace / "page.html").exists()


def test_a_device_is_looked_at_although_nothing_is_left_to_train(
    mdm_interp: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    stored(tmp_path / "runs")
    assert_refused(mdm_interp("train", "config.yaml", "--device", "abacus"), "device: 'abacus' cannot be used here")
    explored = mdm_interp("explore", "config.yaml", "--device", "abacus", "--out", "page.html")
    assert_refused(explored, "device: 'abacus' cannot be used here")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"base": CONFIG, "grid": {"seed": [0]}}))
    assert_refused(mdm_interp("sweep", "sweep.yaml", "--device", "abacus"), "device: 'abacus' cannot be used here")
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.parametrize("command", ["probe tiny-llada --facts facts.csv", "reversal-benchmark tiny-llada --data x"])
def test_a_device_and_a_map_of_devices_exclude_each_other(
    mdm_interp: Callable[..., Ended], tmp_path: Path, command: str
) -> None:
    both = mdm_interp(*command.split(), "--out", "out", "--device", "cpu", "--device-map", "auto")
    assert_refused(both, "--device --device-map: these exclude each other; give one")
    assert contents(tmp_path) == {}


def test_a_run_beside_a_checkpoint_leaves_the_options_to_it(tmp_path: Path) -> None:
    run, loading = stored(tmp_path / "runs"), {"dtype": "bfloat16"}
    tiny_probe(tmp_path, "llada")
    opened, model = _opened([str(run.folder), str(tmp_path / "tiny-llada")], tmp_path / "runs", "cpu", loading)
    assert opened.config == run.config and model.model.W_E.dtype == torch.bfloat16


def test_options_of_training_and_of_scoring_exclude_each_other(
    mdm_interp: Callable[..., Ended], tmp_path: Path
) -> None:
    scored = ("reversal-benchmark", "tiny-llada", "--data", "x", "--out", "out")
    for option in ("--steps", "--seed", "--workers"):
        assert_refused(mdm_interp(*scored, option, 3), f"{option}: 3 is for --train; add it, or leave this out")
    trained = ("reversal-benchmark", "--train", "--data", "x", "--out", "out", "--attention", "causal")
    assert_refused(mdm_interp(*trained), "--attention: causal is for checkpoints; with --train the pair is made here")
    assert contents(tmp_path) == {}


def test_a_message_is_never_longer_than_a_screen_takes(mdm_interp: Callable[..., Ended]) -> None:
    for command in (["reproduce", "--only", "n" * 10_000], ["train", "n" * 3000], ["x" * 10_000]):
        ended = mdm_interp(*command)
        assert ended.code == 2 and ended.out == ""
        assert ended.err.startswith("mdm-interp: ") and len(ended.err) < 500


# ---- whoever reads goes away

RUN_MAIN = "import sys; from mdm_interp.cli import main; sys.argv[0] = 'mdm-interp'; main()"


@pytest.mark.slow
@pytest.mark.promise("a pipe that nobody reads any more", "a quiet end with the code of SIGPIPE")
@pytest.mark.parametrize("buffered", ["", "1"], ids=["at the end", "at once"])
def test_a_closed_pipe_ends_a_command_quietly(tmp_path: Path, buffered: str) -> None:
    stored(tmp_path / "runs")
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [sys.executable, "-c", RUN_MAIN, "runs", "list"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONUNBUFFERED": buffered},
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=100,
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_has_no_room_is_one_line(tmp_path: Path) -> None:
    stored(tmp_path / "runs")
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", RUN_MAIN, "runs", "list"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
        )
    assert ended.returncode == 1
    assert ended.stderr == (
        "mdm-interp: output: No space left on device; make room, and repeat the command, which goes on from here\n"
    )
