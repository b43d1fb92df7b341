"""The meaning of code: a digest of what functions do, whatever module they are in and however they are written down.

Starting from the given functions, follow every name that they use to its definition, in this package or the function's
own, and digest the syntax trees of all definitions reached. Docstrings, comments, annotations, formatting, the wording
of errors and the names of modules and of what they define are not part of it; operators, constants and defaults are.
Nothing that the functions do not use is part of it, so a legend or an option of the command line changes no digest.

Definitions in the modules of :data:`UNREAD` are named, but not read. Two rules stand in for what cannot be read off a
text:

- A method belongs to it if its class is reached and its name is used on any object, or if it overrides a method of
  another package's class, which may call it. Classes named in annotations count as reached.
- The fields and validators of a pydantic model do not belong to it: the values are known by the digest of a config.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

UNREAD = tuple(
    f"mdm_interp.{module}"
    for module in ("cli", "experiments.claims", "meaning", "parallel", "provenance", "shards", "viz")
)
"""Modules that no number depends on: how it is judged, shown and recorded, and by which process it is computed."""

_Function = (ast.FunctionDef, ast.AsyncFunctionDef)
_Comprehension = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Meaning:
    """What a digest covers."""

    digest: str
    reached: tuple[str, ...]
    """Full names of the definitions, methods included."""
    packages: tuple[str, ...]
    """Packages of others that the definitions use, by the names they are imported under."""


def meaning(*functions: Callable[..., Any]) -> Meaning:
    """Digest what `functions` do.

    Of a function that is not defined at the top of its module, as a lambda is not, the whole module is digested. Of a
    partial one, what it is given is digested too.
    """
    starts: list[tuple[str, str]] = []
    packages, given = {__name__.split(".")[0]}, ""
    for function in functions:
        if isinstance(function, functools.partial):
            given += repr((function.args, function.keywords))
            function = function.func
        function = inspect.unwrap(function)
        name = function.__module__
        if name == "__main__":  # under `python -m`
            spec = sys.modules[name].__spec__
            name = spec.name if spec else name
        starts.append((name, getattr(function, "__qualname__", "<lambda>")))
        packages.add(name.split(".")[0])
    return _digest(tuple(starts), frozenset(packages), given)


@cache
def _digest(starts: tuple[tuple[str, str], ...], packages: frozenset[str], given: str) -> Meaning:
    search = _Search(_Sources(packages))
    for module, name in starts:
        source = search.sources.module(module)
        assert source is not None, f"{module} has no source"
        for start in [name] if name in source.definitions else source.definitions:
            search.reach(_Definition(source, start))
    digest = _hashed("\n".join([*search.finish(), given]))
    return Meaning(digest, tuple(sorted(search.texts)), tuple(sorted(search.packages)))


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _named(full_name: str) -> str:
    """Return what is written for a definition until all of them are read."""
    return f"\0{full_name}\0"


_NAMED = re.compile("\0([^\0]*)\0")


# ---- where things are defined


@dataclass(eq=False)
class _Module:
    """The source of a module: what its top level defines, and what it imports."""

    name: str
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_bytes())

    @cached_property
    def definitions(self) -> dict[str, list[ast.stmt]]:
        """The statements that define each name."""
        found: dict[str, list[ast.stmt]] = defaultdict(list)
        for statement in _flat(self.tree.body):
            for name in _defined(statement):
                found[name].append(statement)
        return dict(found)

    @cached_property
    def imports(self) -> dict[str, str]:
        """The full name of what each imported name stands for; a package's stub says what it hands on lazily."""
        stub = self.path.with_suffix(".pyi")
        handed_on = ast.parse(stub.read_bytes()).body if stub.exists() else []
        statements = [*handed_on, *_flat(self.tree.body)]
        return dict(pair for statement in statements for pair in self.imported(statement))

    @cached_property
    def stars(self) -> list[str]:
        """The modules of which it imports every name."""
        return [full_name.removesuffix(".*") for full_name in self.imports.values() if full_name.endswith(".*")]

    def full_name(self, chain: list[str]) -> str | None:
        """Return what a dotted name stands for at the top of this module; None if it is built in."""
        first, *rest = chain
        if first in self.imports and first not in self.definitions:
            return ".".join([self.imports[first], *rest])
        return ".".join([self.name, *chain]) if first in self.definitions or self.stars else None

    def imported(self, node: ast.stmt) -> Iterator[tuple[str, str]]:
        """Return the names that an import statement binds, with their full names."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (top, top)
        elif isinstance(node, ast.ImportFrom):
            package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
            source = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                bound = f"{source}.*" if alias.name == "*" else alias.asname or alias.name
                yield bound, f"{source}.{alias.name}"


def _flat(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Give the statements, and those in the branches of `if`, `try` and `with` among them."""
    for statement in statements:
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            yield from _flat(statement.body)
            yield from _flat(getattr(statement, "orelse", []))
            yield from _flat(getattr(statement, "finalbody", []))
            for handler in getattr(statement, "handlers", []):
                yield from _flat(handler.body)
        else:
            yield statement


def _defined(statement: ast.stmt) -> list[str]:
    """Return the names that a statement defines or changes."""
    if isinstance(statement, (*_Function, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return [name for target in targets for name in _changed(target)]
    if isinstance(statement, (ast.Import, ast.ImportFrom)) or _is_text(statement):
        return []
    # A loop or a call may change whatever it names.
    return list(dict.fromkeys(node.id for node in ast.walk(statement) if isinstance(node, ast.Name)))


def _changed(target: ast.expr) -> list[str]:
    """Return the names that an assignment changes."""
    if isinstance(target, (ast.Tuple, ast.List)):
        return [name for element in target.elts for name in _changed(element)]
    while isinstance(target, (ast.Subscript, ast.Attribute, ast.Starred)):
        target = target.value
    return [target.id] if isinstance(target, ast.Name) else []


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


@dataclass(frozen=True)
class _Definition:
    """A name at the top of a module."""

    module: _Module
    name: str

    @property
    def statements(self) -> list[ast.stmt]:
        return self.module.definitions[self.name]

    @property
    def full_name(self) -> str:
        return f"{self.module.name}.{self.name}"


class _Sources:
    """The modules of some packages, by name."""

    def __init__(self, packages: frozenset[str]) -> None:
        self.packages, self.modules = packages, dict[str, "_Module | None"]()

    def module(self, name: str) -> _Module | None:
        """Return the module of that name; None if there is none in these packages."""
        if name not in self.modules:
            path = _file(name) if name.split(".")[0] in self.packages else None
            self.modules[name] = _module(name, path, path.stat().st_mtime_ns) if path else None
        return self.modules[name]

    def find(self, full_name: str) -> tuple[_Definition | None, list[str]]:
        """Return the definition that a full name begins with, if there is one here, and the attributes of it that are
        meant.

        A name that a module only imports is followed to where it is defined.
        """
        parts = full_name.split(".")
        for n in range(len(parts), 0, -1):
            if module := self.module(".".join(parts[:n])):
                break
        else:
            return None, []
        if n == len(parts):
            return None, []
        name, *attributes = parts[n:]
        if name in module.definitions:
            return _Definition(module, name), attributes
        sources = [module.imports[name]] if name in module.imports else []
        for handed_on in [*sources, *(f"{star}.{name}" for star in module.stars)]:
            if handed_on != f"{module.name}.{name}":
                found = self.find(".".join([handed_on, *attributes]))
                if found[0] is not None:
                    return found
        return None, []


@cache
def _module(name: str, path: Path, changed: int) -> _Module:
    """Return a module, whose source is read once as long as it is not `changed`."""
    return _Module(name, path)


def _file(name: str) -> Path | None:
    """Return the source of a module, which is not imported for it."""
    top, *parts = name.split(".")
    package = sys.modules.get(top) or importlib.import_module(top)
    for folder in getattr(package, "__path__", ()):
        place = Path(folder, *parts)
        for path in (place / "__init__.py", *([place.with_name(f"{place.name}.py")] if parts else [])):
            if path.is_file():
                return path
    if not parts and not hasattr(package, "__path__") and package.__file__:
        return Path(package.__file__)
    return None


# ---- what is reached


class _Search:
    """All definitions that are reached from those given to :meth:`reach`."""

    def __init__(self, sources: _Sources) -> None:
        self.sources = sources
        self.texts: dict[str, str] = {}
        """What each definition says, by its full name."""
        self.packages: set[str] = set()
        self.seen: set[_Definition] = set()
        self.waiting: list[_Definition] = []
        self.used: set[str] = set()
        """Names that are used on any object."""
        self.methods: list[tuple[_Module, str, ast.FunctionDef | ast.AsyncFunctionDef]] = []
        """Methods of reached classes that nothing has used so far."""

    def reach(self, definition: _Definition) -> None:
        unread = any(f"{definition.module.name}.".startswith(f"{module}.") for module in UNREAD)
        if not unread and definition not in self.seen:
            self.seen.add(definition)
            self.waiting.append(definition)

    def reach_name(self, full_name: str) -> None:
        """Reach what a full name stands for: a definition, or all of a module."""
        definition, _ = self.sources.find(full_name)
        if definition:
            self.reach(definition)
        elif module := self.sources.module(full_name):
            for name in module.definitions:
                self.reach(_Definition(module, name))

    def finish(self) -> list[str]:
        """Follow everything that waits, and return a digest of what each definition says: in place of the name of
        another one, that one's digest."""
        while self.waiting or self._take_used():
            if self.waiting:
                definition = self.waiting.pop()
                for statement in definition.statements:
                    self._read(definition.module, statement, definition.full_name)
                if imported := definition.module.imports.get(definition.name):  # where one stands in for the other
                    self.reach_name(imported)
        texts, digests = self.texts, dict.fromkeys(self.texts, "")

        def digest_of(named: re.Match[str]) -> str:
            return digests.get(named[1], named[1].rpartition(".")[2])

        while True:  # until no two are told apart that were not before
            finer = {name: _hashed(_NAMED.sub(digest_of, text)) for name, text in texts.items()}
            if len(set(finer.values())) == len(set(digests.values())):
                return sorted(finer.values())
            digests = finer

    def _read(self, module: _Module, statement: ast.stmt, full_name: str) -> None:
        if isinstance(statement, ast.ClassDef):
            self._read_class(module, statement, full_name)
        else:
            self._add(module, statement, full_name)

    def _read_class(self, module: _Module, statement: ast.ClassDef, full_name: str) -> None:
        foreign = self._foreign_bases(module, statement)
        inherited = {name for base in foreign for name in dir(base)}
        is_model = any(base.__module__.startswith("pydantic.") for base in foreign)
        kept: list[ast.stmt] = []
        for member in statement.body:
            if isinstance(member, _Function):
                if any(_is_validator(decorator) for decorator in member.decorator_list):
                    continue
                special = member.name.startswith("__") and member.name.endswith("__")
                if member.name == "__str__" and _is_error(statement):
                    continue
                if special or member.name in inherited:
                    kept.append(member)
                else:
                    self.methods.append((module, f"{full_name}.{member.name}", member))
            elif not (is_model and isinstance(member, (ast.AnnAssign, ast.Assign))):
                kept.append(member)
        head = ast.ClassDef("", statement.bases, statement.keywords, kept, statement.decorator_list)
        self._add(module, head, full_name)

    def _foreign_bases(self, module: _Module, statement: ast.ClassDef) -> list[type]:
        """Return the classes of other packages among the ancestors of a class."""
        found: list[type] = []
        for base in statement.bases:
            chain = _chain(base.value if isinstance(base, ast.Subscript) else base)
            full_name = module.full_name(chain) if chain else None
            if full_name is None:
                continue
            ours, _ = self.sources.find(full_name)
            for inner in ours.statements if ours else ():
                if isinstance(inner, ast.ClassDef) and ours:
                    found += self._foreign_bases(ours.module, inner)
            if ours is None and (foreign := _imported(full_name)) is not None:
                found.append(foreign)
        return found

    def _take_used(self) -> bool:
        """Read the methods whose names are used by now; whether there were any."""
        used = [method for method in self.methods if method[2].name in self.used]
        self.methods = [method for method in self.methods if method[2].name not in self.used]
        for module, full_name, method in used:
            self._add(module, method, full_name)
        return bool(used)

    def _add(self, module: _Module, node: ast.stmt, full_name: str) -> None:
        text = _Reader(self, module, full_name).text(node)
        # A property and its setter have one name.
        self.texts[full_name] = f"{self.texts[full_name]}\n{text}" if full_name in self.texts else text


@cache
def _imported(full_name: str) -> type | None:
    """Return a class of another package."""
    module, _, name = full_name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if isinstance(found, type) else None


def _is_validator(decorator: ast.expr) -> bool:
    name = (_chain(decorator.func if isinstance(decorator, ast.Call) else decorator) or [""])[-1]
    return name.endswith(("_validator", "_serializer"))


def _is_protocol(statement: ast.ClassDef) -> bool:
    """Tell whether a class only says what others can do."""
    return any((_chain(base) or [""])[-1] == "Protocol" for base in statement.bases)


def _is_error(statement: ast.ClassDef) -> bool:
    """Tell whether a class is of errors, whose wording does not count."""
    return any((_chain(base) or [""])[-1].endswith(("Error", "Exception")) for base in statement.bases)


def _chain(node: ast.expr) -> list[str] | None:
    """Return the parts of a dotted name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *parts[::-1]] if isinstance(node, ast.Name) else None


class _Reader:
    """Puts a definition into words, and tells the search what it uses."""

    def __init__(self, search: _Search, module: _Module, definition: str) -> None:
        self.search, self.module, self.definition = search, module, definition
        self.scopes: list[dict[str, str | None]] = []
        """Names that are local, innermost scope last, with the full names of those imported there."""

    def full_name(self, chain: list[str]) -> str | None:
        """Return what a dotted name stands for here; None if its beginning is local or built in."""
        for scope in reversed(self.scopes):
            if chain[0] in scope:
                imported = scope[chain[0]]
                return imported and ".".join([imported, *chain[1:]])
        return self.module.full_name(chain)

    def note(self, annotation: ast.AST | None) -> None:
        """Reach the classes that an annotation names, directly or by a name for several."""
        for node in ast.walk(annotation) if annotation else ():
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                with contextlib.suppress(SyntaxError):
                    self.note(ast.parse(node.value, mode="eval"))
            if not isinstance(node, (ast.Name, ast.Attribute)):
                continue
            chain = _chain(node)
            named, _ = self.search.sources.find(self.full_name(chain) or "") if chain else (None, [])
            for statement in named.statements if named else ():
                if isinstance(statement, ast.ClassDef) and named and not _is_protocol(statement):
                    self.search.reach(named)
                elif isinstance(statement, ast.Assign) and named and named.full_name != self.definition:
                    _Reader(self.search, named.module, named.full_name).note(statement.value)

    def text(self, node: Any) -> str:
        """Return what a node says."""
        if isinstance(node, list):
            return f"[{','.join(filter(None, map(self.text, node)))}]"
        if not isinstance(node, ast.AST):
            if isinstance(node, str) and node.isidentifier():
                self.search.used.add(node)  # as in getattr(x, "name")
            return repr(node)
        special = getattr(self, f"_{type(node).__name__}", None)
        return special(node) if special else self._plain(node)

    def _plain(self, node: ast.AST, *leaving_out: str) -> str:
        fields = [
            self.text(value)
            for name, value in ast.iter_fields(node)
            if name not in ("ctx", "kind", "type_comment", "type_params", *leaving_out)
        ]
        return f"{type(node).__name__}({','.join(fields)})"

    def _within(self, scope: dict[str, str | None], read: Callable[[], str]) -> str:
        self.scopes.append(scope)
        try:
            return read()
        finally:
            self.scopes.pop()

    # ---- what is left out

    def _Expr(self, node: ast.Expr) -> str:
        return "" if _is_text(node) else self._plain(node)

    def _arg(self, node: ast.arg) -> str:
        self.note(node.annotation)
        return node.arg

    def _AnnAssign(self, node: ast.AnnAssign) -> str:
        self.note(node.annotation)
        if node.value is None:
            return f"Declared({self.text(node.target)})"
        return f"Assign([{self.text(node.target)}],{self.text(node.value)})"

    def _Raise(self, node: ast.Raise) -> str:
        """Return the kind of error, and not how it is worded."""
        kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return f"Raise({self.text(kind)})"

    def _Assert(self, node: ast.Assert) -> str:
        return f"Assert({self.text(node.test)})"

    def _Import(self, node: ast.Import | ast.ImportFrom) -> str:
        return ""

    _ImportFrom = _Import

    # ---- names

    def _Name(self, node: ast.Name | ast.Attribute) -> str:
        chain = _chain(node)
        full_name = self.full_name(chain) if chain else None
        if full_name is None:
            if isinstance(node, ast.Name):
                return node.id
            self.search.used.add(node.attr)
            return f"{self.text(node.value)}.{node.attr}"
        definition, attributes = self.search.sources.find(full_name)
        if definition is None:
            if (top := full_name.split(".")[0]) not in self.search.sources.packages:
                self.search.packages.add(top)
            self.search.reach_name(full_name)
            return full_name
        self.search.reach(definition)
        self.search.used.update(attributes)
        return ".".join([_named(definition.full_name), *attributes])

    _Attribute = _Name

    # ---- scopes

    def _FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
        outside = [self.text(node.decorator_list), self.text(node.args.defaults), self.text(node.args.kw_defaults)]
        self.note(node.returns)
        inside = self._within(self._locals(node), lambda: f"{self._parameters(node.args)}:{self.text(node.body)}")
        is_definition = not self.scopes and self.definition == f"{self.module.name}.{node.name}"
        name = _named(self.definition) if is_definition else node.name
        return f"{type(node).__name__}({name},{','.join(outside)},{inside})"

    _AsyncFunctionDef = _FunctionDef

    def _Lambda(self, node: ast.Lambda) -> str:
        outside = f"{self.text(node.args.defaults)},{self.text(node.args.kw_defaults)}"
        scope: dict[str, str | None] = dict.fromkeys(arg.arg for arg in _every_arg(node.args))
        inside = self._within(scope, lambda: f"{self._parameters(node.args)}:{self.text(node.body)}")
        return f"Lambda({outside},{inside})"

    def _parameters(self, args: ast.arguments) -> str:
        kinds = ("posonlyargs", "args", "vararg", "kwonlyargs", "kwarg")
        return ",".join(self.text(getattr(args, kind)) for kind in kinds)

    def _locals(self, function: ast.AST) -> dict[str, str | None]:
        """Return the names that are local to a function, without those of functions and comprehensions in it."""
        found: dict[str, str | None] = dict.fromkeys(arg.arg for arg in _every_arg(function.args))  # pyright: ignore[reportAttributeAccessIssue]
        waiting: list[ast.AST] = list(function.body)  # pyright: ignore[reportAttributeAccessIssue]
        outer: set[str] = set()
        while waiting:
            node = waiting.pop()
            if isinstance(node, (*_Function, ast.ClassDef)):
                found[node.name] = None
                continue
            if isinstance(node, (ast.Global, ast.Nonlocal)):
                outer.update(node.names)
            elif isinstance(node, ast.ExceptHandler) and node.name:
                found[node.name] = None
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found[node.id] = None
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                found |= dict(self.module.imported(node))
            if isinstance(node, ast.Lambda):
                continue
            if isinstance(node, _Comprehension):  # only := reaches out of it
                waiting += [inner for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr)]
                continue
            waiting += ast.iter_child_nodes(node)
        return {name: value for name, value in found.items() if name not in outer}

    def _ListComp(self, node: Any) -> str:
        stored = (
            inner.id
            for generator in node.generators
            for inner in ast.walk(generator.target)
            if isinstance(inner, ast.Name)
        )
        outside = self.text(node.generators[0].iter)
        return f"{outside}:{self._within(dict.fromkeys(stored), lambda: self._plain(node))}"

    _SetComp = _DictComp = _GeneratorExp = _ListComp


def _every_arg(args: ast.arguments) -> list[ast.arg]:
    single = [arg for arg in (args.vararg, args.kwarg) if arg]
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *single]
