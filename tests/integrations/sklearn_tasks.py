"""Estimators that tell how they were run, for the scikit-learn tests; they are imported in workers."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import threadpoolctl
from joblib_tasks import meet
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.ensemble import RandomForestClassifier
from support import wait_until


def ready(folder: str, parties: int, array: Any) -> tuple[int, Any, Any]:
    """Wait until so many workers have scikit-learn loaded and are in here.

    Arrays and a pickle stream that are large enough to go through the store make each process map all that it ever maps
    of its own arena and of others'.
    """
    return meet(folder, str(os.getpid()), parties), array + 1, list(range(1 << 16))


def fitted(estimator: Any, x: Any, y: Any) -> int:
    """Fit a clone of an estimator; the size of what it was fitted to."""
    estimator.fit(x, y)
    return int(x.nbytes)


class Constant(ClassifierMixin, BaseEstimator):
    """Predicts one class."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def fit(self, x: Any, y: Any) -> Constant:
        self.classes_ = np.arange(10)  # quick: np.unique(y) is not
        return self

    def predict(self, x: Any) -> Any:
        return np.full(x.shape[0], self.number % 10)


class Waiting(Constant):
    """``fit`` tells that it has begun by a file in ``folder``, and waits for the file ``folder/go``."""

    def __init__(self, number: int = 0, folder: str = "") -> None:
        super().__init__(number)
        self.folder = folder

    def fit(self, x: Any, y: Any) -> Waiting:
        Path(self.folder, f"fit-{os.getpid()}").touch()
        wait_until(Path(self.folder, "go").exists, 120, "the file that lets fits go on")
        super().fit(x, y)
        return self


class Killed(Constant):
    """With ``number == 3``, ``fit`` is the end of its worker."""

    def __init__(self, number: int = 0, by: int = signal.SIGKILL) -> None:
        super().__init__(number)
        self.by = by

    def fit(self, x: Any, y: Any) -> Killed:
        if self.number == 3:
            os.kill(os.getpid(), self.by)
        super().fit(x, y)
        return self


class Telling(Constant):
    """Says after ``fit`` which process it ran in, and which configuration scikit-learn had there."""

    def fit(self, x: Any, y: Any) -> Telling:
        super().fit(x, y)
        self.pid_ = os.getpid()
        self.config_ = sklearn.get_config()
        self.type_of_x_ = type(x).__name__
        return self


class Writing(TransformerMixin, BaseEstimator):
    """Scales its input in place, as estimators with ``copy=False`` do, without a look at whether it may."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    def fit(self, x: Any, y: Any = None) -> Writing:
        self.n_features_in_ = x.shape[1]
        return self

    def transform(self, x: Any) -> Any:
        x *= self.factor
        return x


class Warning_(Constant):  # noqa: N801  # the builtin's name is taken
    """``fit`` warns."""

    def fit(self, x: Any, y: Any) -> Warning_:
        warnings.warn("fit warns", UserWarning, stacklevel=2)
        super().fit(x, y)
        return self


# ---- nesting ---------------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_running = 0


@contextlib.contextmanager
def _counted() -> Iterator[int]:
    """How many threads of this process are in here, this one among them."""
    global _running
    with _lock:
        _running += 1
        running = _running
    try:
        yield running
    finally:
        with _lock:
            _running -= 1


class Counting(Constant):
    """Part of an ensemble; ``fit`` writes into ``folder`` where it ran, and beside how many others."""

    def __init__(self, number: int = 0, folder: str = "") -> None:
        super().__init__(number)
        self.folder = folder

    def fit(self, x: Any, y: Any) -> Counting:
        with _counted() as running:
            super().fit(x, y)
            for _ in range(20):
                np.linalg.svd(x[:50])  # BLAS may start its threads
            of_libraries = max(info["num_threads"] for info in threadpoolctl.threadpool_info())
        in_main = int(threading.current_thread() is threading.main_thread())
        Path(self.folder, f"{os.getpid()}-{in_main}-{running}-{of_libraries}").touch()
        return self


class QuietForest(RandomForestClassifier):
    """A forest whose ``fit`` raises what would else be a warning in a worker's log."""

    def fit(self, x: Any, y: Any) -> QuietForest:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            super().fit(x, y)
        return self
