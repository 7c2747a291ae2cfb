"""What comes of a task, as users of ``multiprocessing.Pool`` expect it.

The executor's futures carry ``concurrent.futures``' idea of errors; pools have their own:

* what a task raised has a ``multiprocessing.pool.RemoteTraceback`` as its cause;
* a result that cannot be pickled raises ``multiprocessing.pool.MaybeEncodingError``: here a :class:`EncodingError`,
  which is a :class:`~shmpool.SerializationError` as well;
* an argument that cannot be pickled raises what the pickler raised, with its traceback as a text for a cause; the
  sentence of the ``SerializationError``, which names the culprit, is a note on it;
* what :meth:`Pool.terminate` has ended raises :class:`~shmpool.BrokenPoolError`, where multiprocessing's ``get()``
  waits for ever.
"""

from __future__ import annotations

import time
import traceback
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import _RemoteTraceback
from multiprocessing.pool import (  # type: ignore[attr-defined]  # unknown to typeshed
    MaybeEncodingError,
    RemoteTraceback,
)
from typing import Any, NamedTuple, Protocol

from shmpool.errors import BrokenPoolError, SerializationError

__all__ = [
    "TERMINATED",
    "EncodingError",
    "Fate",
    "Outcome",
    "is_done",
    "outcome_of",
    "without_frames",
]

TERMINATED = "the pool was terminated before this task was done"


class Outcome(NamedTuple):
    """What came of a task: a value if ``ok``, else an exception."""

    ok: bool
    value: Any


class Fate(Protocol):
    """What became of the pool that had the task."""

    @property
    def terminated(self) -> bool:
        """It ended its workers."""


class EncodingError(MaybeEncodingError, SerializationError):  # type: ignore[misc]  # unknown to typeshed
    """What a task returned, or raised, cannot be pickled.

    Attributes
    ----------
    exc : str
        ``repr`` of what the pickler raised.
    value : str
        ``repr`` of what cannot be pickled, at most 10,000 characters.
    what, culprit, reason : str
        See :class:`shmpool.SerializationError`.
    """

    _fields = ("what", "culprit", "reason", "exc", "value")  # type: ignore[assignment]  # three of the base's

    def __init__(
        self, *, what: str, culprit: str | None, reason: str, exc: str, value: str
    ) -> None:
        SerializationError.__init__(self, what=what, culprit=culprit, reason=reason)
        self.exc = exc
        self.value = value
        self.args = (exc, value)

    def __str__(self) -> str:
        return f"{MaybeEncodingError.__str__(self)} That is: {SerializationError.__str__(self)}"


def outcome_of(future: Future[Any], fate: Fate) -> Outcome:
    """Wait for a task, and tell what came of it.

    What interrupts the waiting, such as Ctrl-C, is raised; what the task raised is returned.
    """
    try:
        return Outcome(True, future.result())
    except BaseException as error:
        if not future.done():
            raise
        if future.cancelled():
            if not isinstance(error, CancelledError):
                raise
        elif future.exception() is not error:
            raise
        return Outcome(False, _translated(error, fate))
    finally:
        del future  # breaks a cycle with the exception's traceback


def is_done(future: Future[Any], deadline: float | None) -> bool:
    """Wait for a task; False if it was not done by then (a time, by ``time.monotonic``)."""
    try:
        future.exception(None if deadline is None else deadline - time.monotonic())
    except CancelledError:
        pass
    except TimeoutError:
        return False
    return True


def _translated(error: BaseException, fate: Fate) -> BaseException:
    # Of this process's frames none tells anything, and they would keep the variables of all callers alive, among them
    # the result that keeps this error.
    error.__traceback__ = None
    cause = error.__cause__
    if isinstance(error, CancelledError) and fate.terminated:
        return BrokenPoolError(TERMINATED)
    if isinstance(cause, _RemoteTraceback):
        error.__cause__ = RemoteTraceback(cause.tb)
        if type(error) is SerializationError and "value" in vars(error):
            return _encoding_error(error)
    elif type(error) is SerializationError and isinstance(cause, Exception):
        note = str(error)
        if note not in getattr(cause, "__notes__", ()):  # a function fails in all of its calls
            without_frames(cause).add_note(note)
        return cause
    return error


def without_frames(error: BaseException) -> BaseException:
    """The exception with its traceback as a text, as those have that come from workers.

    Its frames are of the user's thread, and would keep the variables there alive.
    """
    text = "".join(traceback.format_exception(error))
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__context__
    error.__cause__ = RemoteTraceback(f'\n"""\n{text}"""')
    return error


def _encoding_error(error: SerializationError) -> EncodingError:
    translated = EncodingError(**{name: vars(error)[name] for name in EncodingError._fields})
    translated.__cause__ = error.__cause__
    for note in getattr(error, "__notes__", ()):
        translated.add_note(note)
    return translated
