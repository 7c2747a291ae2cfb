"""Which names does a script define when it is run as ``__mp_main__``?  Read from its source, not by running it.

Those at its top level that do not stand under ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import ast
import sys
from types import ModuleType

__all__ = ["top_level_definitions"]


def top_level_definitions(module: ModuleType) -> dict[str, set[int]]:
    """Names that running the main script as ``__mp_main__`` defines, with the lines where the definitions start."""
    path = getattr(module, "__file__", None)
    if not path or _is_interactive(module):
        return {}
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return {}
    found: dict[str, set[int]] = {}
    _collect(tree.body, found)
    return found


def _is_interactive(module: ModuleType) -> bool:
    # IPython sets __file__ for %run, but multiprocessing does not hand its main module to the children.
    return hasattr(sys, "ps1") or hasattr(module, "get_ipython")


def _collect(body: list[ast.stmt], found: dict[str, set[int]]) -> None:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            lines = {node.lineno, *(decorator.lineno for decorator in node.decorator_list)}
            found.setdefault(node.name, set()).update(lines)
        elif isinstance(node, ast.Assign):
            # name = decorator(function), Class = namedtuple(...)
            for target in node.targets:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, set()).add(node.lineno)
        elif isinstance(node, ast.If):
            if not _is_main_guard(node.test):
                _collect(node.body, found)
                _collect(node.orelse, found)
            else:
                _collect(node.orelse, found)
        elif isinstance(node, ast.Try):
            for part in (node.body, node.orelse, node.finalbody, *(h.body for h in node.handlers)):
                _collect(part, found)
        elif isinstance(node, ast.With):
            _collect(node.body, found)


def _is_main_guard(test: ast.expr) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(test))
