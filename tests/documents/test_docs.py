"""The documentation: it builds, works offline, runs as written, and knows every error."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from document_helpers import ROOT, blocks, check_command, raised, targets, texts
from helpers import TINY_DEMO, train_here
from page_helpers import expect, opened

import mdm_interp
from mdm_interp.config import TrainConfig
from mdm_interp.data.prompts import FactTemplates
from mdm_interp.experiments import subjects
from mdm_interp.training.demo import train_demo

if TYPE_CHECKING:
    from playwright.sync_api import Browser

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
SOURCES = [*sorted((ROOT / "mdm_interp").rglob("*.py")), *sorted((ROOT / "analyses").glob("*.py"))]
NOT_RUN = re.compile(r"^% not run: (.+)\n```python\n", re.MULTILINE)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return str(path.relative_to(DOCS))


# ---- the built pages


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built by what `make docs` runs."""
    out = tmp_path_factory.mktemp("docs")
    recipe = targets()["docs"].split()
    assert {"--fail-on-warning", "--keep-going"} < set(recipe), "warnings must be errors"
    assert recipe[-2:] == ["docs", "docs/_build/html"]
    command = [sys.executable, *recipe[1:-2], "-d", str(out / "doctrees")]
    ran = subprocess.run(
        [*command, str(DOCS), str(out / "html")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return out / "html"


class Resources(HTMLParser):
    """What a page loads, where it leads, and the places in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given.get("id") or ""}
        if tag in ("script", "img", "iframe", "source", "video") and given.get("src"):
            self.loaded.append(given["src"] or "")
        if tag == "link" and given.get("rel") not in ("index", "search", "next", "prev", "canonical"):
            self.loaded.append(given.get("href") or "")
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")


@pytest.mark.slow
def test_the_built_pages_load_nothing_from_elsewhere(built: Path) -> None:
    pages = sorted(built.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        loaded = Resources(read(page)).loaded
        assert loaded, page
        assert [url for url in loaded if re.match(r"(https?:)?//", url)] == [], page.name
        files = [page.parent / unquote(urlsplit(url).path) for url in loaded if not url.startswith("data:")]
        assert [file for file in files if not file.exists()] == [], page.name
    styles = "".join(map(read, built.rglob("*.css")))
    assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", styles)


@pytest.mark.slow
def test_links_between_the_built_pages_lead_somewhere(built: Path) -> None:
    parsed = {page.resolve(): Resources(read(page)) for page in built.rglob("*.html")}
    broken = []
    for page, resources in parsed.items():
        for link in resources.links:
            parts = urlsplit(link)
            if parts.scheme or page.name in ("search.html", "genindex.html", "py-modindex.html"):
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if target not in parsed or unquote(parts.fragment) not in parsed[target].anchors:
                broken.append(f"{page.name}: {link}")
    assert broken == []


@pytest.mark.slow
def test_pictures_are_on_the_pages(built: Path) -> None:
    assert read(built / "concepts.html").count('<svg class="drawing"') == len(list((DOCS / "pictures").glob("*.svg")))


@pytest.mark.slow
def test_pages_without_formulas_do_not_load_mathjax(built: Path) -> None:
    pages = [page for page in built.rglob("*.html") if any("mathjax" in url for url in Resources(read(page)).loaded)]
    assert pages == [built / "theory.html"]


FONTS = "document.fonts.ready.then(all => [...all].filter(font => font.status == 'loaded').map(font => font.family))"
WIDER = """formulas => formulas.filter(formula =>
  formula.scrollWidth > formula.clientWidth + 1 && formula.hasAttribute('display') ||
  formula.getBoundingClientRect().right > formula.closest('p, li, .math').getBoundingClientRect().right + 1
).map(formula => formula.textContent)"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 700])
def test_formulas_are_drawn_without_a_network_and_fit(built: Path, browser: Browser, width: int) -> None:
    written = read(built / "theory.html").count('class="math notranslate')
    with opened(browser, built / "theory.html", viewport={"width": width, "height": 1000}) as (page, problems):
        expect(page.locator(".math mjx-container")).to_have_count(written)
        expect(page.locator("mjx-container[display]")).to_have_count(len(FORMULAS))
        misread = page.locator("mjx-assistive-mml merror, mjx-assistive-mml [mathcolor=red]")
        assert misread.all_inner_texts() == []
        assert "MJXTEX-I" in page.evaluate(FONTS)
        assert page.locator("mjx-container").evaluate_all(WIDER) == []
        assert problems == []


@pytest.mark.slow
def test_a_number_in_the_text_leads_to_its_formula(built: Path) -> None:
    parsed = Resources(read(built / "theory.html"))
    led_to = {link for link in parsed.links if link.startswith("#formula-")}
    assert led_to == {f"#formula-{number}" for number in REFERRED_TO}
    assert {f"formula-{number}" for number in numbers(THEORY)} <= parsed.anchors


@pytest.mark.slow
def test_signatures_have_their_shapes(built: Path) -> None:
    text = re.sub(r"<[^>]+>", "", read(built / "api" / "measures.html"))
    assert "Float[Tensor, 'query layer head']" in text


# ---- formulas

THEORY = read(DOCS / "theory.md")
FORMULAS = blocks(THEORY, "math")
PROSE = re.sub(r"^```math\n.*?^```$", "", THEORY, flags=re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<![^\s(])\$((?! )[^$\n]+(?<! ))\$(?!\w)")
REFERRED_TO = set(re.findall(r"\((\d+\.\d+)\)", PROSE))


def numbers(text: str) -> list[str]:
    return re.findall(r"\\tag\{(.+?)\}", text)


def test_every_formula_has_the_next_number_of_its_section() -> None:
    for section in re.split("^## ", THEORY, flags=re.MULTILINE)[1:]:
        number, formulas = section.partition(".")[0], blocks(section, "math")
        assert [numbers(formula) for formula in formulas] == [[f"{number}.{at + 1}"] for at in range(len(formulas))]
    assert len(FORMULAS) > 20 and set(numbers(THEORY)) >= REFERRED_TO


def test_formulas_are_written_for_github_too() -> None:
    """GitHub reads Markdown first: it takes a backslash away before what is no letter, and what is between underscores
    that follow no letter or digit for emphasis. Sphinx wraps a block with a double backslash in an environment that has
    no numbers: such lines end in \\cr."""
    inline = INLINE.findall(PROSE)
    assert len(inline) > 200 and "$" not in INLINE.sub("", PROSE)
    assert [formula for formula in inline if re.search(r"\\[^a-zA-Z]|[^a-zA-Z\d]_|[*<>]|\]\(", formula)] == []
    assert [formula for formula in FORMULAS if re.search(r"\\\\|\$", formula)] == []
    assert "operatorname" not in THEORY, "GitHub refuses it"


def test_no_formula_is_left_as_plain_text() -> None:
    assert re.findall("[Α-Ωα-ω√∂∇⟨⟩½²⊙·]", INLINE.sub("", PROSE)) == []


# ---- what the pages say


def test_the_reference_has_every_module() -> None:
    listed = [name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"automodule:: (\S+)", read(page))]
    walked = pkgutil.walk_packages(mdm_interp.__path__, "mdm_interp.")
    assert sorted(listed) == sorted(module.name for module in walked if not module.name.split(".")[-1].startswith("_"))


def test_references_to_the_package_resolve() -> None:
    for page in PAGES:
        for target in re.findall(r"\{py:\w+\}`~?([\w.]+)`", read(page)):
            module, _, name = target.rpartition(".")
            if target not in sys.modules:
                assert hasattr(importlib.import_module(module), name), f"{page.name}: {target}"


def test_every_file_it_names_is_there() -> None:
    made_by_the_reader = {"figures/NAME.json", "figures/index.html", "figures/quick/", "figures/quick/index.html"}
    for page in PAGES:
        folders = "examples|figures|analyses|benchmarks|mdm_interp|tests|docs"
        named = set(re.findall(rf"`((?:{folders})/[^`\s]*)`", read(page)))
        for name in named - made_by_the_reader:
            assert list(ROOT.glob(name)) or (ROOT / name).exists(), f"{page.name}: {name}"


def commands_of(text: str) -> list[str]:
    """The commands that a page shows."""
    shown = [line for block in blocks(text, "sh") for line in block.splitlines()]
    return shown + re.findall(r"`((?:mdm-interp|make|python -m) [^`]+)`", text)


def test_every_command_exists() -> None:
    checked = 0
    for page in PAGES:
        for line in commands_of(read(page)):
            program, *words = line.split()
            checked += 1
            if program == "mdm-interp":
                check_command(line.removeprefix("mdm-interp "))
            elif program == "make":
                assert words[0] in targets(), f"{page.name}: {line}"
            else:
                assert (program, words[0]) == ("python", "-m"), f"{page.name}: {line}"
                module, options = importlib.import_module(words[1]), re.findall(r"--[a-z-]+", line)
                assert [option for option in options if option not in (module.__doc__ or "")] == [], line
    assert checked > 20


def test_the_configs_in_yaml_are_valid() -> None:
    found = [(page, block) for page in PAGES for block in blocks(read(page), "yaml")]
    assert len(found) >= 2
    for page, block in found:
        content = yaml.safe_load(block)
        config = FactTemplates if "templates" in content else TrainConfig
        assert config.model_validate(content), page


def test_the_run_in_yaml_is_the_one_in_python() -> None:
    page = read(DOCS / "howto" / "train_and_look_inside.md")
    code, _, _ = blocks(page, "python")[0].partition("run = train(")
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    config = TrainConfig(model=namespace["model_config"], facts=namespace["facts"], steps=300)
    assert "steps=300" in blocks(page, "python")[0]
    assert TrainConfig.model_validate(yaml.safe_load(*blocks(page, "yaml"))).digest() == config.digest()


# ---- its code


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the pages' code runs: with the committed figures, a demo checkpoint, and one store for all runs."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "figures").symlink_to(ROOT / "figures")
    train_demo(folder / "demo", TINY_DEMO, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "train_all", train_here)
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        yield folder


def code_of(text: str) -> tuple[str, dict[str, str]]:
    """A page's Python as one script, and its files by name."""
    for reason in NOT_RUN.findall(text):
        assert len(reason) > 10
    runs = NOT_RUN.sub("```python-not-run\n", text)
    files = re.findall(
        r"^```\{code-block\} (?:python|yaml)\n:caption: (\S+)\n\n(.*?)^```$", runs, re.MULTILINE | re.DOTALL
    )
    return "\n\n".join(blocks(runs, "python")), dict(files)


WITH_CODE = [page for page in PAGES if code_of(read(page))[0]]


def test_most_pages_have_code_that_runs() -> None:
    assert len([page for page in WITH_CODE if page.parent.name == "howto"]) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
@pytest.mark.usefixtures("own_schemes")
def test_the_code_of_a_page_runs(page: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, files = code_of(read(page))
    for name, content in files.items():
        (workplace / name).parent.mkdir(parents=True, exist_ok=True)
        (workplace / name).write_text(content, encoding="utf-8")
        if name.endswith(".py"):
            compile(content, name, "exec")
    namespace: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, name_of(page), "exec"), namespace)
    assert "nan" not in capsys.readouterr().out.replace("nanmean", "")


def test_code_that_does_not_run_here_is_code() -> None:
    for page in PAGES:
        for _, block in re.findall(r"^% not run: (.+)\n```python\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL):
            compile(block, name_of(page), "exec")


# ---- errors

TROUBLESHOOTING = read(DOCS / "troubleshooting.md")
ENTRIES = [message for _, message in re.findall(r"^(`+)(.+)\1\n: ", TROUBLESHOOTING, re.MULTILINE)]
RAISED = {"UserError", "Diverged", "Overflow", "ValueError", "_Unaskable"}
"""What a user's mistake ends in: pydantic makes its own error of a ValueError in a config."""
ELSEWHERE = {"it is empty", "it has no marks", "a column does not have … rows"}
ELSEWHERE |= {"a line is not of a step", "the line of step … is not as it was recorded"}
ELSEWHERE |= {"it is at step … of …", "it is of run …", "… holds NaN or infinity"}
ELSEWHERE |= {"it has moments of … parameters, not of …", "the moments of parameter … are not of its shape …"}
ELSEWHERE |= {"it is at step …, and its moments at …"}
ELSEWHERE |= {"… is there twice", "what it says of itself is not as it was saved"}
ELSEWHERE |= {"it has … lines, and at most … are read", "they add … tokens, and at most … are read"}
ELSEWHERE |= {"it makes texts up to … times longer", "it is nested too deeply"}
ELSEWHERE |= {"the line of step … has no number as its …", "it makes … characters, and at most … are read"}
"""ValueErrors that never reach the user as they are."""


@cache
def messages() -> dict[str, str]:
    """Each message that is raised anywhere, and where. What only hands on another message has no fixed words."""
    found = {}
    for source in SOURCES:
        for line, message in raised(source, RAISED):
            if re.search(r"[a-z]{2}", message) and message not in ELSEWHERE:
                found[" ".join(message.split())] = f"{source.relative_to(ROOT)}:{line}"
    return found


def test_every_error_has_an_entry() -> None:
    assert len(messages()) > 100
    missing = [f"{where} {message}" for message, where in messages().items() if message not in ENTRIES]
    assert missing == [], "docs/troubleshooting.md lacks them"


def test_every_entry_is_an_error() -> None:
    assert len(ENTRIES) == len(set(ENTRIES))
    known = messages().keys() | {" ".join(text.split()) for source in SOURCES for text in texts(source)}
    assert [entry for entry in ENTRIES if entry not in known] == [], "no code says this any more"


def pieces(message: str) -> set[str]:
    """Every two words in a row of what is fixed in a message."""
    words = [re.findall(r"\w+", part) for part in message.split("…")]
    return {" ".join(pair) for part in words for pair in pairwise(part)}


def test_every_error_is_quoted_by_a_test() -> None:
    """Two words in a row that no other message has, if it has such: enough to see that somebody thought of it."""
    tests = {text for source in sorted((ROOT / "tests").rglob("*.py")) for text in texts(source)}
    quoted = " | ".join(" ".join(re.findall(r"\w+", text.replace("\\", ""))) for text in tests)
    how_many = Counter(piece for message in messages() for piece in pieces(message))
    missing = []
    for message, where in messages().items():
        own = {piece for piece in pieces(message) if how_many[piece] == 1} or pieces(message)
        if own and not any(piece in quoted for piece in own):
            missing.append(f"{where} {message}")
    assert missing == [], "no test provokes them"


def test_a_message_is_read_off_the_source_with_its_gaps(tmp_path: Path) -> None:
    source = tmp_path / "raising.py"
    lines = ['raise UserError(f"{path}: a " "b" f" {c!r}; " + "d")', 'raise KeyError("e")', "raise UserError(message)"]
    source.write_text("\n".join(lines))
    assert list(raised(source, RAISED)) == [(1, "…: a b …; d"), (3, "…")]
