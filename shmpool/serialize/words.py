"""How objects and errors are named in what users read: one line each, whatever the objects do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

__all__ = ["print_lines", "reason_of", "shorten", "text_of", "type_name", "with_article"]

#: Characters of an exception's text or of a path in a message.
MAX_TEXT = 300


# Without what a metaclass says instead, which may be anything, and may raise.
_module_of: Callable[[type], object] = type.__dict__["__module__"].__get__
_name_of: Callable[[type], str] = type.__dict__["__qualname__"].__get__


def type_name(obj: Any) -> str:
    """The name of an object's type, with its module unless that is ``builtins`` or ``__main__``."""
    kind: type = type(obj)
    module, name = _module_of(kind), _name_of(kind)
    if not isinstance(module, str) or module in ("builtins", "__main__"):
        return name
    return f"{module}.{name}"


def with_article(name: str) -> str:
    """``a 'dict'``, ``an 'int'``."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} '{name}'"


def text_of(error: BaseException) -> str:
    """What an exception says; empty if it raises instead."""
    try:
        return str(error)
    except Exception:
        return ""


def reason_of(error: BaseException) -> str:
    """What an exception says, on one line; never empty."""
    text = " ".join(text_of(error).split())
    name = type(error).__name__
    if isinstance(error, KeyError) and text:
        text = f"{name}: {text}"  # its text alone is but the key
    return shorten(text) if text else name


def shorten(text: str) -> str:
    """Cut the middle out of a text that is too long."""
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[:half]} ... {text[-half:]}"


def print_lines(lines: Iterable[str], file: TextIO | None) -> None:
    """Print to a file, by default ``sys.stdout``; what its encoding cannot show is escaped."""
    out = file if file is not None else sys.stdout
    if out is None:
        return  # a program without a console
    text = "\n".join(lines) + "\n"
    encoding = getattr(out, "encoding", None) or "utf-8"
    # A name that the file cannot show must not be what fails here.
    out.write(text.encode(encoding, "backslashreplace").decode(encoding))
