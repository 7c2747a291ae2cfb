"""What is measured through joblib, and through scikit-learn, which stands on it: its backends."""

import functools

import numpy as np

from . import tasks
from .contenders import Contender
from .inputs import KB, MB, fresh_array, number
from .work import Reach, Unavailable, Work

BACKENDS = ("inline", "joblib", "joblib-shmpool")

# Inputs.


def fresh_arrays(nbytes: int, count: int):
    return lambda _contender: [fresh_array(nbytes) for _ in range(count)]


@functools.cache
def classification() -> tuple[np.ndarray, np.ndarray]:
    """20 MB of numbers in two classes."""
    try:
        from sklearn.datasets import make_classification
    except ModuleNotFoundError:
        raise Unavailable("scikit-learn is not installed") from None
    return make_classification(50_000, 50, n_informative=20, random_state=0)


def fresh_classification(_contender: Contender) -> tuple[np.ndarray, np.ndarray]:
    features, classes = classification()
    return features.copy(), classes


# Bodies.


def short_calls(contender, _, items):
    for _ in range(items):
        contender.map(tasks.noop, range(4))


def one_task_each(task):
    return lambda contender, arrays, _: contender.map(task, arrays)


def results(nbytes: int, read):
    task = functools.partial(tasks.create, nbytes)

    def body(contender, start, items):
        arrays = contender.map(task, range(start, start + items))
        return [(array[0], read(array)) for array in arrays]

    return body


def grid_search(contender, data, _):
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    grid = {"logisticregression__C": np.logspace(-3, 2, 6)}
    search = GridSearchCV(make_pipeline(StandardScaler(), LogisticRegression()), grid, cv=3)
    with contender.scikit_learn():
        return search.fit(*data)


def forest(contender, data, _):
    from sklearn.ensemble import RandomForestClassifier

    with contender.scikit_learn():
        return RandomForestClassifier(16, max_samples=0.3, random_state=0).fit(*data)


# Checks.


def equal_each(task):
    def check(arrays, values):
        expected = [task(array) for array in arrays]
        assert np.allclose(values, expected, rtol=1e-9), "wrong answer"

    return check


def check_results(start, pairs):
    firsts = [first for first, _ in pairs]
    assert firsts == list(range(start, start + len(pairs))), f"stale answers: {firsts}"


def scores(_, search):
    return [*map(float, search.cv_results_["mean_test_score"]), *search.best_params_.values()]


def predictions(data, model):
    nodes = sum(tree.tree_.node_count for tree in model)
    return [int(model.predict(data[0][:5000]).sum()), int(nodes)]


def joblib_work(name: str, title: str, body, *arguments, reach: float = 1.0, **options) -> Work:
    return Work(
        name,
        title,
        body,
        *arguments,
        contenders=BACKENDS,
        ours="joblib-shmpool",
        reach=(Reach(reach, "joblib"),),
        **options,
    )


JOBLIB = (
    joblib_work(
        "joblib-tiny",
        "joblib: 10,000 tiny tasks, each",
        lambda contender, _, items: contender.map(tasks.noop, range(items)),
        items=10_000,
        pilot=1000,
        per_item=True,
        notes="joblib batches them as it sees fit.",
    ),
    joblib_work(
        "joblib-calls",
        "joblib: a Parallel call of 4 tiny tasks",
        short_calls,
        items=100,
        pilot=10,
        per_item=True,
    ),
    joblib_work(
        "joblib-arg-1mb",
        "joblib: 64 tasks with 1 MB each",
        one_task_each(tasks.touch),
        fresh_arrays(MB + 64 * KB, 64),
        equal_each(tasks.touch),
        notes="Fresh arrays, a little more than the 1 MB from which on joblib memmaps.",
    ),
    joblib_work(
        "joblib-result-1mb",
        "joblib: 64 results of 1 MB",
        results(MB, tasks.touch),
        number,
        check_results,
        items=64,
        pilot=64,
    ),
    joblib_work(
        "joblib-arg-100mb",
        "joblib: 4 tasks with 100 MB each, summed",
        one_task_each(tasks.total),
        fresh_arrays(100 * MB, 4),
        equal_each(tasks.total),
    ),
    joblib_work(
        "joblib-result-100mb",
        "joblib: 4 results of 100 MB, summed",
        results(100 * MB, tasks.total),
        number,
        check_results,
        items=4,
        pilot=4,
        reach=10,
        notes="np.full in the workers and the sum by the caller are part of it.",
    ),
    joblib_work(
        "grid",
        "GridSearchCV, 18 fits on 20 MB",
        grid_search,
        fresh_classification,
        scores,
        notes="Logistic regression in a pipeline, 6 candidates, 3 folds; the best is fitted again.",
    ),
    joblib_work(
        "forest",
        "RandomForestClassifier, 16 trees on 20 MB",
        forest,
        fresh_classification,
        predictions,
    ),
    joblib_work(
        "joblib-memory",
        "peak memory, 8 results of 100 MB one by one",
        lambda contender, start, items: [
            results(100 * MB, tasks.total)(contender, start + nth, 1)[0] for nth in range(items)
        ],
        number,
        check_results,
        items=8,
        kind="growth",
        quick=False,
        notes="Beyond what the processes held before.",
    ),
    joblib_work(
        "grid-memory",
        "peak memory of the GridSearchCV",
        grid_search,
        fresh_classification,
        scores,
        kind="peak",
        quick=False,
        notes="All memory of all processes, imports included, shared pages once.",
    ),
    joblib_work(
        "forest-memory",
        "peak memory of the RandomForestClassifier",
        forest,
        fresh_classification,
        predictions,
        kind="peak",
        quick=False,
        notes="All memory of all processes, imports included, shared pages once.",
    ),
)
