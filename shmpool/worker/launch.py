"""How an executor's workers come to be, by start method, and what they have of ``__main__``.

=============  ==================================  ==============================  ======================
start method   first workers                       later ones                      have of ``__main__``
=============  ==================================  ==============================  ======================
fork           forked from this process            forked from the template        what was there then
spawn, ...     started on demand                   the same                        the script's top level
loky           started on demand                   the same                        nothing
=============  ==================================  ==============================  ======================
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from shmpool.errors import BrokenPoolError
from shmpool.lokys import loky_context_module
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.pickling import Pickling
from shmpool.store.store import ObjectStore, Payload
from shmpool.wire.channel import WorkerEnd
from shmpool.worker.init import Initializer
from shmpool.worker.main import Settings
from shmpool.worker.process import ChannelSpentError, ProcessLike, Starter, context_starter
from shmpool.worker.template import Template
from shmpool.worker.threads import lowered_libraries

__all__ = ["Launcher", "find_context"]


def find_context(name_or_context: Any) -> Any:
    """A context of multiprocessing or loky, from its name or itself; None: multiprocessing's default.

    Raises
    ------
    ValueError
        There is no such start method.
    """
    import multiprocessing

    if name_or_context is None:
        return multiprocessing.get_context()
    if not isinstance(name_or_context, str):
        return name_or_context
    if name_or_context == "loky":
        return loky_context_module().LokyContext()
    try:
        return multiprocessing.get_context(name_or_context)
    except ValueError:
        names = ", ".join(map(repr, [*multiprocessing.get_all_start_methods(), "loky"]))
        raise ValueError(
            f"mp_context must be a context or one of {names}, not {name_or_context!r}"
        ) from None


class Launcher:
    """Starts the workers of one executor.

    Parameters
    ----------
    context : multiprocessing or loky context
    store : ObjectStore
    initializer, initargs :
        As given to the executor.
    settings : Settings

    Attributes
    ----------
    pickling : Pickling
        How to pickle for these workers; final once :meth:`starters` was called.
    """

    def __init__(
        self,
        context: Any,
        store: ObjectStore,
        initializer: Callable[..., object] | None,
        initargs: tuple[Any, ...],
        settings: Settings,
    ) -> None:
        self._context = context
        self._store = store
        self._settings = settings
        self.start_method: str = context.get_start_method(allow_none=False)
        main = (
            MainModule.nothing() if self.start_method in ("fork", "loky") else MainModule.script()
        )
        self.pickling = Pickling(main, store.wanted)
        self._initializer = Initializer(initializer, initargs, store, self.pickling)
        self._template: Template | None = None
        self._pinned: Payload | None = None
        self._while_forking = ExitStack()

    @property
    def forks(self) -> bool:
        """Are the workers forked from this process?"""
        return self.start_method == "fork"

    def starters(self) -> tuple[Starter, Callable[[], Starter]]:
        """What starts the first workers, and what then makes the starter of all others.

        To be called when this process is as the workers shall see it.
        """
        first = context_starter(self._context, self._initializer, self._settings)
        if not self.forks:
            return first, lambda: first
        # Workers inherit the views that there are: their blocks must not be used for anything else meanwhile.
        self._pinned = self._store.pin_views()
        self.pickling.main = MainModule.snapshot()
        self._while_forking.enter_context(lowered_libraries(self._settings.threads))
        return first, self._start_template

    def _start_template(self) -> Starter:
        # Now: the threads that OpenBLAS starts to have its number again end with the fork, as fork always ends them.
        self._while_forking.close()
        self._template = Template(self._context, self._initializer, self._settings)
        return self._fork

    def _fork(self, end: WorkerEnd) -> tuple[ProcessLike, Payload | None]:
        """Have the template fork a worker.

        If the template has been killed, it is forked anew, from this process as it is now, threads and all.  So
        ``multiprocessing.Pool`` comes by all its later workers; here it has to be better than a pool without any.
        """
        assert self._template is not None
        try:
            return self._template.start(end)
        except BrokenPoolError:
            # It may have forked a worker before it was killed, which has the channel then.
            self._template.close()
        assert self._pinned is not None
        self._pinned.blocks = [*self._pinned.blocks, *self._store.pin_views().blocks]
        self._template = Template(self._context, self._initializer, self._settings)
        raise ChannelSpentError

    def close(self) -> None:
        """All workers have ended."""
        self._while_forking.close()
        if self._template is not None:
            self._template.close()
            self._template = None
        if self._pinned is not None:
            self._pinned.release()
