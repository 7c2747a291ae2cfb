"""loky, imported so that joblib's copy of it goes on working.

joblib carries a loky of its own.  When they are imported, both register the start method ``"loky"`` with
multiprocessing, and the later one wins: executors of joblib's would then have their processes started by the other,
whose children know nothing of joblib's tracker of temporary files.  (Tracebacks of it appear, and files stay.)  So
what was registered before stays registered, and shmpool takes loky's context from here, not by its name.
"""

from __future__ import annotations

import multiprocessing.context
from typing import Any

from shmpool.interrupts import whole

__all__ = ["loky_context_module"]


def loky_context_module() -> Any:
    """The module ``loky.backend.context``; all that shmpool needs of loky is in there.  Takes 9 ms the first time."""
    registered: dict[str, Any] = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
    with whole:  # modules that Ctrl-C has left half imported would be of no use to whoever goes on
        before = dict(registered)
        from loky.backend import context

        registered.update(before)
    return context
