"""Which names does a script define when it is run as ``__mp_main__``?  Read from its source, not by running it.

Those at its top level that do not stand under ``if __name__ == "__main__":``.  A name may have been given to something
else since: so what has it now is compared with the definition by its lines in the file.  In doubt the answer is no.
"""

from __future__ import annotations

import ast
import sys
from types import CodeType, FunctionType, ModuleType

__all__ = ["ScriptNames"]


class ScriptNames:
    """The names that ``module``, a main module, has when it is imported by a worker."""

    def __init__(self, module: ModuleType | None) -> None:
        self._file = getattr(module, "__file__", None)
        self._lines: dict[str, list[range]] = {}  # of the definitions of functions and classes
        self._decorated: set[str] = set()
        self._assigned: set[str] = set()
        self._again: set[str] = set()  # what the main guard defines
        if module is not None and self._file and _is_imported_by_workers(module):
            try:
                with open(self._file, "rb") as file:
                    self._collect(ast.parse(file.read()).body)
            except (OSError, SyntaxError, ValueError):
                pass

    def define(self, name: str, obj: object) -> bool:
        """Does the script define ``name``, at its top level, as the function or class ``obj``?"""
        places = self._lines.get(name, [])
        line = self._line_of(obj)
        if line is not None:
            return any(line in place for place in places)
        # Its code lies elsewhere, or it has none: made by a decorator, or by a call (a namedtuple).
        made = name in self._decorated or name in self._assigned
        made = made or (isinstance(obj, type) and bool(places))
        return made and name not in self._again

    def _line_of(self, obj: object) -> int | None:
        """A line of the script in which ``obj`` is defined."""
        if isinstance(obj, type):
            if obj.__dict__.get("__firstlineno__") is not None:  # Python 3.13
                return int(obj.__dict__["__firstlineno__"])
            codes = [part.__code__ for part in vars(obj).values() if isinstance(part, FunctionType)]
        else:
            while hasattr(obj, "__wrapped__"):
                obj = obj.__wrapped__
            code = getattr(obj, "__code__", None)
            codes = [code] if isinstance(code, CodeType) else []
        lines = [code.co_firstlineno for code in codes if code.co_filename == self._file]
        return lines[0] if lines else None

    def _collect(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                place = range(first, (node.end_lineno or first) + 1)
                self._lines.setdefault(node.name, []).append(place)
                if node.decorator_list:
                    self._decorated.add(node.name)
            elif isinstance(node, ast.Assign):
                self._assigned.update(t.id for t in node.targets if isinstance(t, ast.Name))
            elif isinstance(node, ast.If):
                here, everywhere = _branches(node)
                self._again.update(_bound_names(here))
                self._collect(everywhere)
            elif isinstance(node, ast.Try):
                for part in (
                    node.body,
                    node.orelse,
                    node.finalbody,
                    *(h.body for h in node.handlers),
                ):
                    self._collect(part)
            elif isinstance(node, ast.With):
                self._collect(node.body)


def _is_imported_by_workers(module: ModuleType) -> bool:
    # IPython sets __file__ for %run, but multiprocessing does not hand its main module to the children.
    if hasattr(sys, "ps1") or hasattr(module, "get_ipython"):
        return False
    name = getattr(getattr(module, "__spec__", None), "name", None) or ""
    return not name.endswith(".__main__")  # nor does it hand on that of ``python -m package``


def _branches(node: ast.If) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """What only the main process runs, or perhaps only that; and what a worker may run as well."""
    match node.test:
        case ast.Compare(
            left=ast.Name("__name__") | ast.Constant("__main__"),
            ops=[ast.Eq() | ast.NotEq() as op],
            comparators=[ast.Name("__name__") | ast.Constant("__main__")],
        ):
            guarded, other = node.body, node.orelse
            return (other, guarded) if isinstance(op, ast.NotEq) else (guarded, other)
    if any(isinstance(part, ast.Name) and part.id == "__name__" for part in ast.walk(node.test)):
        return [*node.body, *node.orelse], []
    return [], [*node.body, *node.orelse]


def _bound_names(body: list[ast.stmt]) -> set[str]:
    found = set()
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found
