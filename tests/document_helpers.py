"""What documents say and the tests hold them to: blocks of code, commands, and messages of errors."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from mdm_interp import cli

ROOT = Path(__file__).parents[1]


def load(path: Path) -> Any:
    """Import a program that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def blocks(text: str, language: str) -> list[str]:
    """A Markdown document's blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def check_command(usage: str) -> None:
    """That the command of a usage line of `mdm-interp` exists and has the options named.

    Args:
        usage: The line after `mdm-interp`.
    """
    command: Any = typer.main.get_command(cli.app)
    words = usage.split()
    while words and (commands := getattr(command, "commands", None)):
        assert words[0] in commands, usage
        command = commands[words.pop(0)]
    options = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", usage)) <= options | {"--help"}, usage


def targets() -> dict[str, str]:
    """The Makefile's targets and their recipes."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z][a-z-]*):.*\n((?:\t.+\n?)*)", makefile, re.MULTILINE))


# ---- texts in the source, what is filled in written as "…"


def pattern(node: ast.expr | None) -> str:
    """The fixed parts of a text that an expression makes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return pattern(node.left) + pattern(node.right)
    return "…"


def raised(source: Path, names: set[str]) -> Iterator[tuple[int, str]]:
    """Line and pattern of every message that a file raises one of these exceptions with."""
    for node in ast.walk(ast.parse(source.read_bytes())):
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in names:
            yield call.lineno, pattern(call.args[0])


def texts(source: Path) -> set[str]:
    """The patterns of all texts in a file."""
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    return {pattern(node) for node in ast.walk(ast.parse(source.read_bytes())) if isinstance(node, kinds)}
