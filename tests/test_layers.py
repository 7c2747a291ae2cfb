"""shmpool's layers: imports go down only, or within one folder in a listed order; and ``import shmpool`` stays cheap.

The tables below are the architecture. Who adds a file says here where it stands; who needs an import that goes up has
found that something lives in the wrong place.

All imports count, wherever they are written: at the top of a module, inside a function, under ``TYPE_CHECKING``, or as
``importlib.import_module("shmpool...")``.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support import TIMEUNIT

#: Each file and folder of shmpool/, and its level. Files of a level know nothing of each other, see SIDEWAYS.
#: ``shmpool/__init__.py`` stands above them all: it may import anything, and nothing may import it.
LEVELS = {
    "errors": 0,
    "config": 0,
    "interrupts": 0,
    "lokys": 1,
    "memory": 1,
    "serialize": 1,
    "progress": 1,
    "store": 2,
    "wire": 2,
    "worker": 3,
    "dispatch": 4,
    "mapping": 5,
    "executor": 5,
    "reusable": 5,
    "pool": 5,
    "integrations": 6,
    "trace": 6,
    "asmain": 6,
    "cli": 6,
    "__main__": 6,
}

#: Each folder's modules, lowest first: a module may import those before it. The folder's ``__init__.py`` comes last.
ORDER: dict[str, tuple[str, ...]] = {
    "memory": (
        "intervals",
        "allocator",
        "segment",
        "hugepages",
        "pagemap",
        "dirty",
        "watch",
        "bulk",
    ),
    "serialize": (
        *(
            "atoms",
            "bare",
            "scriptnames",
            "mainmodule",
            "custom",
            "words",
            "handover",
            "reductions",
            "text",
            "tracebacks",
            "parts",
            "search",
            "inspect",
        ),
        *("arrow", "tensors", "byvalue", "debugging", "pickling", "tracing", "reasons", "explain"),
    ),
    "store": (
        *("limits", "blocks", "addresses", "leases", "written", "payload"),
        *(
            "peer",
            "arena",
            "heap",
            "books",
            "exchange",
            "store",
            "current",
            "refs",
            "shared",
            "explaining",
        ),
    ),
    "wire": ("messages", "packets", "channel"),
    "worker": (
        "chunks",
        "functions",
        "threads",
        "init",
        "interrupts",
        "main",
        "process",
        "template",
        "launch",
    ),
    "dispatch": (
        "future",
        "task",
        "timer",
        "state",
        "counts",
        "living",
        "settle",
        "fleet",
        "wakeup",
        "attention",
        "deadlines",
        "table",
        "foreman",
        "answers",
        "leading",
        "rounds",
        "lifetime",
        "driver",
    ),
    "pool": (
        "outcomes",
        "callbacks",
        "results",
        "window",
        "arrivals",
        "imap",
        "core",
        "unfinished",
        "process",
        "pool",
        "context",
    ),
    "integrations": (
        "standins",
        "install",
        "in_child",
        "joblib_arrays",
        "joblib_batches",
        "joblib_workers",
        "joblib",
    ),
}

#: Imports between files of one level: (importer, imported), and why.
SIDEWAYS = {
    (
        "executor",
        "mapping",
    ): "map is a method of the executor, its generators have a file of their own",
    ("reusable", "executor"): "the reusable executor is one",
    ("pool", "executor"): "the pool stands on the executor's public methods",
    ("cli", "asmain"): "`run` runs a script as `__main__`",
    ("cli", "integrations"): "`run` installs shmpool around a script",
    ("__main__", "cli"): "`python -m shmpool` is the command",
}

#: Imports inside functions that may break the rules all the same: (importing module, imported module), and why.
HIDDEN: dict[tuple[str, str], str] = {}

#: Packages outside the standard library that ``import shmpool`` may load.
NEEDED = {"shmpool", "numpy", "cloudpickle"}

#: Parts of the standard library that it must not load, since every worker and every program pays for them.
EXPENSIVE = {
    "asyncio",
    "ensurepip",
    "multiprocessing.managers",
    "multiprocessing.pool",
    "sqlite3",
    "unittest",
}


class Import(NamedTuple):
    """One module of the package imports another. Names are without ``shmpool.``; the package itself is ""."""

    file: str
    line: int
    importer: str
    imported: str
    inside: str  # the function it is written in, or ""


def find_package() -> Path:
    spec = importlib.util.find_spec("shmpool")
    assert spec and spec.submodule_search_locations, (
        "shmpool is neither installed nor in this folder"
    )
    return Path(next(iter(spec.submodule_search_locations)))


def find_modules(package: Path) -> dict[str, Path]:
    """All modules of the package by name: "", "config", "memory", "memory.segment", ..."""
    modules = {}
    for file in sorted(package.rglob("*.py")):
        parts = list(file.relative_to(package).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        modules[".".join(parts)] = file
    return modules


def find_imports(package: Path) -> Iterator[Import]:
    """Every import of a module of the package by another."""
    modules = find_modules(package)
    for importer, file in modules.items():
        base = [package.name, *importer.split(".")] if importer else [package.name]
        folder = base if file.name == "__init__.py" else base[:-1]
        for node, function in _walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
            for target in _targets(node, folder):
                imported = _as_module(target, package.name, modules)
                if imported is not None and imported != importer:
                    where = file.relative_to(package.parent).as_posix()
                    yield Import(where, node.lineno, importer, imported, function)


def _walk(node: ast.AST, function: str = "") -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    """All statements and expressions, each with the name of the function that it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.expr):
            yield child, function
        inside = (
            child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        )
        yield from _walk(child, inside)


def _targets(node: ast.AST, folder: list[str]) -> Iterator[str]:
    """The dotted names that one statement or call imports."""
    match node:
        case ast.Import():
            yield from (alias.name for alias in node.names)
        case ast.ImportFrom():
            base = folder[: len(folder) - node.level + 1] if node.level else []
            parts = [*base, node.module] if node.module else base
            yield from (".".join([*parts, alias.name]) for alias in node.names)
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            yield ".".join(folder) + name if name.startswith(".") else name


def _as_module(target: str, package: str, modules: dict[str, Path]) -> str | None:
    """The module that holds ``target``, which may be a name in it; None for one of another package."""
    head, *rest = target.split(".")
    if head != package:
        return None
    while rest and ".".join(rest) not in modules:
        rest.pop()
    return ".".join(rest)


def find_homeless(package: Path) -> list[str]:
    """A sentence for every file without a place in the tables."""
    wrong = []
    for name, file in find_modules(package).items():
        unit, _, inner = name.partition(".")
        where = file.relative_to(package.parent).as_posix()
        if unit and unit not in LEVELS:
            wrong.append(f"{where} is in no layer: LEVELS must say on which level {unit!r} stands")
        elif inner and inner not in ORDER.get(unit, ()):
            wrong.append(f"{where} has no place in its folder: ORDER[{unit!r}] must list {inner!r}")
    return wrong


def find_violations(package: Path) -> list[str]:
    """A sentence for every import that breaks a rule."""
    wrong = []
    for found in find_imports(package):
        rule = _broken_rule(found.importer, found.imported)
        if rule and not (found.inside and (found.importer, found.imported) in HIDDEN):
            inside = f", inside {found.inside}()," if found.inside else ""
            name = f"shmpool.{found.imported}" if found.imported else "shmpool"
            wrong.append(f"{found.file}, line {found.line}{inside} imports {name}: {rule}")
    return wrong


def _broken_rule(importer: str, imported: str) -> str | None:
    unit, _, inner = importer.partition(".")
    other, _, other_inner = imported.partition(".")
    if not unit:
        return None
    if not other:
        return "the package's __init__ stands on top, and nothing may import it"
    if unit == other:
        return _broken_order(unit, inner, other_inner)
    if unit not in LEVELS or other not in LEVELS:
        return None  # find_homeless says so
    mine, its = LEVELS[unit], LEVELS[other]
    if mine < its:
        return f"imports go down only, and {unit} is on level {mine}, {other} on level {its}"
    if mine == its and (unit, other) not in SIDEWAYS:
        return f"{unit} and {other} are both on level {mine}, and SIDEWAYS does not list the two"
    return None


def _broken_order(folder: str, importer: str, imported: str) -> str | None:
    if not importer:
        return None
    if not imported:
        return f"{folder}/__init__.py stands on top of its folder, and the folder's modules may not import it"
    order = ORDER.get(folder, ())
    if importer in order and imported in order and order.index(importer) < order.index(imported):
        return f"ORDER[{folder!r}] lists {importer} before {imported}: the later may import the earlier"
    return None


def find_unused(package: Path) -> list[str]:
    """A sentence for every exception that no import needs any more."""
    imports = list(find_imports(package))
    units = {(i.importer.partition(".")[0], i.imported.partition(".")[0]) for i in imports}
    hidden = {
        (i.importer, i.imported)
        for i in imports
        if i.inside and _broken_rule(i.importer, i.imported)
    }
    present = {name.partition(".")[0] for name in find_modules(package)}
    sideways = {
        pair for pair in SIDEWAYS if present.issuperset(pair)
    }  # the tables may be ahead of the files
    return [
        *(f"SIDEWAYS lists {pair}, but no such import is left" for pair in sideways - units),
        *(f"HIDDEN lists {pair}, but no such import is left" for pair in HIDDEN.keys() - hidden),
    ]


def test_every_module_has_a_place() -> None:
    assert not (wrong := find_homeless(find_package())), "\n".join(wrong)


def test_imports_go_down_only() -> None:
    assert not (wrong := find_violations(find_package())), "\n".join(wrong)


def test_no_exception_outlives_its_need() -> None:
    assert not (wrong := find_unused(find_package())), "\n".join(wrong)


# The rules themselves, held against made-up packages: files, what the sentence says of the place, and of the rule.
BROKEN = {
    "a level above": (
        {"store/x.py": "import os\nfrom shmpool.worker import child\n", "worker/child.py": ""},
        "shmpool/store/x.py, line 2 imports shmpool.worker.child: ",
        "imports go down only, and store is on level 2, worker on level 3",
    ),
    "inside a function": (
        {
            "config.py": "def load():\n    if True:\n        import shmpool.memory.segment as s\n",
            "memory/segment.py": "",
        },
        "shmpool/config.py, line 3, inside load(), imports shmpool.memory.segment: ",
        "config is on level 0, memory on level 1",
    ),
    "for type checkers only": (
        {"store/x.py": "if TYPE_CHECKING:\n    from ..executor import E\n", "executor.py": ""},
        "shmpool/store/x.py, line 2 imports shmpool.executor: ",
        "store is on level 2, executor on level 5",
    ),
    "import_module": (
        {"errors.py": "importlib.import_module('.pool', 'shmpool')\n", "pool.py": ""},
        "shmpool/errors.py, line 1 imports shmpool.pool: ",
        "errors is on level 0, pool on level 5",
    ),
    "a neighbour": (
        {"serialize/x.py": "from shmpool import memory\n", "memory/__init__.py": ""},
        "shmpool/serialize/x.py, line 1 imports shmpool.memory: ",
        "serialize and memory are both on level 1, and SIDEWAYS does not list the two",
    ),
    "the package itself": (
        {"cli.py": "from shmpool import install\n"},
        "shmpool/cli.py, line 1 imports shmpool: ",
        "the package's __init__ stands on top, and nothing may import it",
    ),
    "a later module of the folder": (
        {"memory/intervals.py": "from .segment import Segment\n", "memory/segment.py": ""},
        "shmpool/memory/intervals.py, line 1 imports shmpool.memory.segment: ",
        "ORDER['memory'] lists intervals before segment",
    ),
    "the folder's own __init__": (
        {"memory/segment.py": "from . import PAGE\n", "memory/__init__.py": "PAGE = 4096\n"},
        "shmpool/memory/segment.py, line 1 imports shmpool.memory: ",
        "memory/__init__.py stands on top of its folder",
    ),
}

SOUND = {
    "__init__.py": "from shmpool.cli import main\nfrom .errors import E\n",
    "errors.py": "from __future__ import annotations\nimport shmpooled\n",
    "cli.py": "from shmpool import integrations\nfrom shmpool.executor import ShmExecutor\n",
    "pool.py": "from .executor import ShmExecutor\n",
    "executor.py": "def lazy():\n    from .store import refs\n",
    "integrations/__init__.py": "",
    "memory/__init__.py": "from .segment import PAGE\nfrom . import intervals\n",
    "memory/intervals.py": "",
    "memory/segment.py": "from . import intervals\nfrom ..errors import E\nPAGE = 4096\n",
    "store/__init__.py": "from shmpool.memory import PAGE\nimport shmpool.memory.segment\n",
}


def make_package(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "shmpool"
    for name, text in ({"__init__.py": ""} | files).items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    return package


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_named_with_file_and_line(case: str, tmp_path: Path) -> None:
    files, place, rule = BROKEN[case]
    (sentence,) = find_violations(make_package(tmp_path, files))
    assert sentence.startswith(place)
    assert rule in sentence


def test_what_keeps_the_rules_passes(tmp_path: Path) -> None:
    package = make_package(tmp_path, SOUND)
    assert find_violations(package) == find_homeless(package) == find_unused(package) == []
    assert len(list(find_imports(package))) == 12


def test_a_hidden_import_may_break_the_rules_where_it_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(
        tmp_path, {"config.py": "def f():\n    import shmpool.cli\n", "cli.py": ""}
    )
    assert len(find_violations(package)) == 1
    monkeypatch.setitem(HIDDEN, ("config", "cli"), "for this test")
    assert not find_violations(package) and not find_unused(package)
    (package / "config.py").write_text("import shmpool.cli\n")
    assert len(find_violations(package)) == len(find_unused(package)) == 1


def test_a_file_without_a_place_is_named(tmp_path: Path) -> None:
    wrong = find_homeless(make_package(tmp_path, {"extra.py": "", "memory/extra.py": ""}))
    assert wrong == [
        "shmpool/extra.py is in no layer: LEVELS must say on which level 'extra' stands",
        "shmpool/memory/extra.py has no place in its folder: ORDER['memory'] must list 'extra'",
    ]


def test_import_of_shmpool_is_cheap() -> None:
    script = """
import json, sys
before = set(sys.modules)
import shmpool
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    # From where this very process has it: the folder may be on sys.path only because pytest was started there.
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{script}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=60 * TIMEUNIT)
    loaded = set(json.loads(done.stdout))
    foreign = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names - NEEDED
    assert not foreign, (
        f"import shmpool loads {', '.join(sorted(foreign))}: import them where they are used"
    )
    dear = loaded & EXPENSIVE
    assert not dear, (
        f"import shmpool loads {', '.join(sorted(dear))}: import them where they are used"
    )
