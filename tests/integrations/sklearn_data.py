"""The data of the scikit-learn tests: real sets that scikit-learn carries, and one as large as covertype is wide.

Nothing is downloaded.  What these functions return is shared by all tests of a process: do not write into it.
"""

from __future__ import annotations

import functools
from typing import Any

from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    make_classification,
)

#: Features and target.
Data = tuple[Any, Any]


@functools.cache
def digits() -> Data:
    """600 images of 8 x 8, ten classes; 307 KB, so that they go through the store."""
    x, y = load_digits(return_X_y=True)
    return x[:600].copy(), y[:600].copy()


@functools.cache
def breast_cancer() -> Data:
    """569 x 30, two classes; 137 KB."""
    return load_breast_cancer(return_X_y=True)


@functools.cache
def diabetes() -> Data:
    """442 x 10, regression; small enough to ride in the messages."""
    return load_diabetes(return_X_y=True)


@functools.cache
def covertype_like() -> Data:
    """48,000 x 54, seven classes, as covertype has; 20.7 MB."""
    return make_classification(48_000, 54, n_informative=10, n_classes=7, random_state=0)
