"""scikit-learn over the joblib backend: it computes what it computes over loky, with one copy of the data.

Importing scikit-learn takes a worker a second, so all tests share the workers of each backend. They are there before a
test's watch begins (see conftest.py), which holds that no test leaves a process, a block or a file more.

``SHMPOOL_TEST_JOBS=4`` runs everything with four workers instead of two.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from support import wait_until

pytest.importorskip("sklearn")

import joblib  # comes with scikit-learn
import sklearn.exceptions
import sklearn_tasks as tasks
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import (
    TerminatedWorkerError as LokyWorkerError,
)
from joblib_tasks import pid, registered
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import BaggingClassifier, RandomForestClassifier
from sklearn.model_selection import (
    GridSearchCV,
    ShuffleSplit,
    cross_val_predict,
    cross_validate,
)
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.utils.parallel import Parallel, delayed
from sklearn_cases import CASES, JOBS, tree
from sklearn_data import breast_cancer, covertype_like, digits
from sklearn_same import assert_same

import shmpool
from shmpool.executor import total_stats
from shmpool.integrations.joblib import TerminatedWorkerError, shutdown_workers
from shmpool.store.current import set_store

pytestmark = pytest.mark.slow

ME = os.getpid()


class CountedLoky(joblib.parallel.LokyBackend):
    """loky's backend, which counts what it is given to run in its processes."""

    submitted = 0

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        CountedLoky.submitted += 1
        return super().submit(*args, **kwargs)

    def apply_async(self, *args: Any, **kwargs: Any) -> Any:  # joblib's name for it before 1.5
        CountedLoky.submitted += 1
        return super().apply_async(*args, **kwargs)


#: How many batches of tasks went to processes so far.
SUBMITTED = {
    "loky": lambda: CountedLoky.submitted,
    "shmpool": lambda: total_stats().tasks_submitted,
}


@pytest.fixture(scope="module", autouse=True)
def backends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Then one arena is enough for each process: a second one would be a descriptor that a test leaves behind.
        patch.setenv("SHMPOOL_ARENA_MIN", "1GiB")
        set_store(None)
        # loky keeps its files for as long as its workers: not in /dev/shm, which is watched.
        patch.setenv("JOBLIB_TEMP_FOLDER", str(tmp_path_factory.mktemp("loky")))
        with registered():
            joblib.register_parallel_backend("loky", CountedLoky)
            yield
        get_reusable_executor().shutdown()
        set_store(None)


@pytest.fixture(scope="class", autouse=True)
def workers(backends: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[int]]:
    """The pids of the workers of each backend, all of them ready.

    Its scope makes it come before the watch that is kept on each test, which is no part of a class: also where the last
    test has ended workers.
    """
    pids = {}
    for name in SUBMITTED:
        folder = str(tmp_path_factory.mktemp("ready"))
        with joblib.parallel_config(name, n_jobs=JOBS):
            array = np.ones(1 << 17)
            calls = [joblib.delayed(tasks.ready)(folder, JOBS, array) for _ in range(JOBS)]
            pids[name] = {number for number, *_ in joblib.Parallel(batch_size=1)(calls)}
    return pids


@pytest.fixture
def shm() -> Iterator[None]:
    """Parallel calls of the test use shmpool."""
    with joblib.parallel_config("shmpool", n_jobs=JOBS):
        yield


def copied_by(work: Callable[[], Any]) -> int:
    """Bytes that were copied into the store meanwhile, here and in workers."""
    before = total_stats().bytes_copied
    work()
    return total_stats().bytes_copied - before


# ---- the same results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_results_are_those_of_loky(name: str) -> None:
    results = []
    for backend, submitted in SUBMITTED.items():
        before = submitted()
        with joblib.parallel_config(backend, n_jobs=JOBS):
            results.append(CASES[name].run())
        assert (submitted() > before) == CASES[name].in_processes, backend
    assert_same(*results)


def test_a_difference_would_be_seen() -> None:
    x, y = digits()
    one, other = tree().fit(x, y), tree().fit(x, y)
    assert_same(one, other)
    with pytest.raises(AssertionError, match=r"random_state"):
        assert_same(one, clone(one).set_params(random_state=1).fit(x, y))
    with pytest.raises(AssertionError, match="Tree"):
        assert_same(one.tree_, tree().fit(x[::-1], y).tree_)
    assert_same({"a": [np.nan], "fit_time": 1}, {"a": [np.nan], "fit_time": 2})
    with pytest.raises(AssertionError, match=r"\['a'\]\[0\]"):
        assert_same({"a": [1.0]}, {"a": [np.nextafter(1.0, 2.0)]})


def test_threads_are_used_where_estimators_would_rather_have_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A backend that is but the default gives way to prefer="threads", one that was named does not; as under loky.
    monkeypatch.setattr(joblib.parallel, "DEFAULT_BACKEND", joblib.parallel.DEFAULT_BACKEND)
    shmpool.register_joblib_backend(make_default=True)
    x, y = breast_cancer()
    before = total_stats().tasks_submitted
    forest = RandomForestClassifier(4, random_state=0, n_jobs=JOBS).fit(x, y)
    assert total_stats().tasks_submitted == before
    scores = cross_validate(forest, x, y, cv=2, n_jobs=JOBS)["test_score"]
    assert total_stats().tasks_submitted > before
    assert_same(scores, cross_validate(forest, x, y, cv=2, n_jobs=1)["test_score"])


@pytest.mark.usefixtures("shm")
def test_scorers_and_choices_may_be_lambdas() -> None:
    x, y = breast_cancer()
    search = GridSearchCV(
        tree(), {"max_features": [2, 5]}, cv=2,
        scoring=lambda estimator, x, y: -float((estimator.predict(x) != y).sum()),
        refit=lambda results: int(np.argmax(results["mean_test_score"])),
    ).fit(x, y)  # fmt: skip
    assert search.cv_results_["mean_test_score"].max() < 0
    assert search.best_estimator_.predict(x).shape == y.shape


@pytest.mark.usefixtures("shm")
def test_an_error_in_fit_is_raised_or_scored_as_asked_for() -> None:
    x, y = breast_cancer()
    grid = {"max_depth": [2, -1]}
    with pytest.raises(ValueError, match="max_depth") as caught:
        GridSearchCV(tree(), grid, cv=2, error_score="raise").fit(x, y)
    assert "_fit_and_score" in str(caught.value.__cause__)  # the worker's traceback
    with pytest.warns(
        sklearn.exceptions.FitFailedWarning, match="2 fits failed out of a total of 4"
    ):
        search = GridSearchCV(tree(), grid, cv=2, error_score=-1.0).fit(x, y)
    assert search.cv_results_["mean_test_score"][1] == -1


# ---- what is copied --------------------------------------------------------------------------------------------------


def as_array(x: Any) -> Any:
    return x.copy()


def as_fortran(x: Any) -> Any:
    return np.asfortranarray(x)


def as_frame(x: Any) -> Any:
    return pytest.importorskip("pandas").DataFrame(x.copy())


def as_sparse(x: Any) -> Any:
    return pytest.importorskip("scipy.sparse").csr_array(np.where(x > 1, x, 0))


def nbytes(x: Any) -> int:
    if hasattr(x, "indptr"):
        return int(x.data.nbytes + x.indices.nbytes + x.indptr.nbytes)
    return int(np.asarray(x).nbytes)


@pytest.mark.usefixtures("shm")
@pytest.mark.parametrize("kind", [as_array, as_fortran, as_frame, as_sparse])
def test_the_data_of_a_search_are_written_once(kind: Callable[[Any], Any]) -> None:
    x, y = covertype_like()
    x, y = kind(x), y.copy()
    search = GridSearchCV(tasks.Constant(), {"number": range(30)}, cv=2, refit=False)
    copied = copied_by(lambda: search.fit(x, y))
    assert len(search.cv_results_["params"]) == 30
    of_folds = (
        4 * len(y) // 2 * np.dtype(int).itemsize
    )  # the indices of each half, as train and as test
    assert nbytes(x) <= copied <= 1.01 * (nbytes(x) + y.nbytes + of_folds)
    # The folds are new then, the data are not.
    assert copied_by(lambda: search.fit(x, y)) <= 1.01 * of_folds


@pytest.mark.usefixtures("shm")
def test_the_data_of_a_forest_are_written_once() -> None:
    x, y = covertype_like()
    forest = RandomForestClassifier(60, max_depth=3, max_samples=500, random_state=0)
    copied = copied_by(lambda: forest.fit(x, y))
    as_float32, targets = x.nbytes // 2, y.nbytes  # what forests work on
    assert as_float32 <= copied <= 1.01 * (as_float32 + targets)


@pytest.mark.usefixtures("shm")
def test_one_array_in_5000_tasks_is_written_once_beside_clones_in_wrapped_functions() -> None:
    x, y = covertype_like()
    x, estimator = x.copy(), tasks.Constant()
    answers: list[Any] = []

    def work() -> None:
        calls = (delayed(tasks.fitted)(clone(estimator), x, y=y) for _ in range(5000))
        answers.extend(Parallel()(calls))

    assert x.nbytes <= copied_by(work) <= 1.01 * (x.nbytes + y.nbytes)
    assert answers == [x.nbytes] * 5000


@pytest.mark.usefixtures("shm")
def test_the_data_of_a_search_are_in_memory_once(
    tmp_path: Path, workers: dict[str, set[int]]
) -> None:
    x, y = covertype_like()
    x = np.concatenate([x, x])
    y = np.concatenate([y, y])
    # Few rows of each fold, since scikit-learn gives each fit copies of them.
    few = ShuffleSplit(4, train_size=1000, test_size=1000, random_state=0)
    search = GridSearchCV(
        tasks.Waiting(folder=str(tmp_path)), {"number": range(4)}, cv=few, refit=False
    )
    family = [psutil.Process(number) for number in (ME, *workers["shmpool"])]
    before = proportional(family)
    meanwhile: list[int] = []

    def measure() -> None:
        try:
            wait_until(lambda: len(list(tmp_path.glob("fit-*"))) == JOBS, 60, "fits under way")
            meanwhile.append(proportional(family))
        finally:
            (tmp_path / "go").touch()

    watcher = threading.Thread(target=measure)
    watcher.start()
    search.fit(x, y)
    watcher.join()
    assert {int(path.name[4:]) for path in tmp_path.glob("fit-*")} == workers["shmpool"]
    assert meanwhile[0] - before <= 1.3 * x.nbytes


def proportional(processes: list[psutil.Process]) -> int:
    """Bytes of memory that processes take, pages that they share counted once."""
    return sum(process.memory_full_info().pss for process in processes)


# ---- who sees what is written ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shm")
def test_estimators_that_write_into_their_input_do_not_disturb_each_other() -> None:
    x = covertype_like()[0][:4000].copy()  # 1.7 MB: under loky they would be read-only
    before = x.copy()
    factors = [2.0, 3.0, 5.0, 7.0, 11.0, 13.0]
    union = FeatureUnion([(str(factor), tasks.Writing(factor)) for factor in factors])
    assert_same(union.fit_transform(x), np.hstack([factor * x for factor in factors]))
    assert_same(x, before)


@pytest.mark.usefixtures("shm")
def test_scaling_in_place_works_in_a_search() -> None:
    x, y = covertype_like()
    x, y = x[:4000].copy(), y[:4000].copy()
    before = x.copy()
    results = {}
    for in_place in (True, False):
        model = make_pipeline(
            StandardScaler(copy=not in_place), MinMaxScaler(copy=not in_place), GaussianNB()
        )
        # Without refit: that is this process's, and does write into x.
        search = GridSearchCV(model, {"gaussiannb__var_smoothing": [1e-9, 1e-3]}, cv=3, refit=False)
        results[in_place] = search.fit(x, y).cv_results_
        results[in_place]["predicted"] = cross_val_predict(model, x, y, cv=3)
        assert_same(x, before)
    assert_same(results[True], results[False])


# ---- workers ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shm")
def test_thousands_of_short_calls_use_the_same_workers(workers: dict[str, set[int]]) -> None:
    pids = {number for _ in range(2000) for number in Parallel()(delayed(pid)() for _ in range(2))}
    assert pids <= workers["shmpool"]


@pytest.mark.usefixtures("shm")
def test_a_worker_that_crashes_ends_the_search_and_the_next_one_works() -> None:
    x, y = digits()
    crashing = tasks.Killed(by=signal.SIGSEGV)
    try:
        with pytest.raises(
            LokyWorkerError, match=r"unexpectedly terminated.* by SIGSEGV "
        ) as caught:
            GridSearchCV(crashing, {"number": range(6)}, cv=3).fit(x, y)
        assert isinstance(caught.value, TerminatedWorkerError)
        search = GridSearchCV(crashing, {"number": range(3)}, cv=3).fit(x, y)
        assert len(search.cv_results_["params"]) == 3
    finally:
        shutdown_workers()  # those that came in the place of the dead


@pytest.mark.usefixtures("shm")
def test_a_worker_that_others_kill_ends_the_search_and_the_next_one_works(tmp_path: Path) -> None:
    x, y = digits()
    search = GridSearchCV(tasks.Waiting(folder=str(tmp_path)), {"number": range(6)}, cv=2)

    def kill_one() -> None:
        (first, *_) = wait_until(lambda: list(tmp_path.glob("fit-*")), 60, "a fit under way")
        os.kill(int(first.name[4:]), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        with pytest.raises(LokyWorkerError, match="by SIGKILL "):
            search.fit(x, y)
        (tmp_path / "go").touch()
        assert len(search.fit(x, y).cv_results_["params"]) == 6
    finally:
        killer.join()
        shutdown_workers()


def test_ensembles_inside_of_searches_use_threads_of_the_workers(
    tmp_path: Path, workers: dict[str, set[int]]
) -> None:
    x, y = digits()
    results, threads = [], []
    for name, pids in workers.items():
        folder = tmp_path / name
        folder.mkdir()
        bags = BaggingClassifier(tasks.Counting(folder=str(folder)), 4, random_state=0, n_jobs=2)
        search = GridSearchCV(bags, {"max_samples": [0.5, 1.0]}, cv=2, refit=False)
        with joblib.parallel_config(name, n_jobs=JOBS):
            results.append(search.fit(x, y).cv_results_)
        seen = [tuple(map(int, path.name.split("-"))) for path in folder.iterdir()]
        assert {number for number, *_ in seen} <= pids, name
        assert all(not psutil.Process(number).children() for number in pids), name
        assert max(running for _, _, running, _ in seen) <= 2, name
        threads.append({(in_main, of_libraries) for _, in_main, _, of_libraries in seen})
    assert_same(*results)
    assert threads[0] == threads[1] and not any(in_main for in_main, _ in threads[1])


@pytest.mark.usefixtures("shm")
def test_forests_inside_of_searches_do_not_warn() -> None:
    x, y = breast_cancer()
    forest = tasks.QuietForest(6, max_depth=3, random_state=0, n_jobs=2)
    search = GridSearchCV(forest, {"max_features": [2, 5]}, cv=2, error_score="raise").fit(x, y)
    alone = cross_validate(search.best_estimator_, x, y, cv=2, n_jobs=1)["test_score"].mean()
    assert search.best_score_ == alone


# ---- what travels with tasks -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shm")
def test_the_configuration_travels_to_workers(workers: dict[str, set[int]]) -> None:
    x, y = breast_cancer()
    with sklearn.config_context(assume_finite=True, working_memory=77):
        fitted = cross_validate(tasks.Telling(), x, y, cv=4, return_estimator=True)["estimator"]
        assert [one.config_ for one in fitted] == [sklearn.get_config()] * 4
    after = cross_validate(tasks.Telling(), x, y, cv=4, return_estimator=True)["estimator"]
    assert [one.config_ for one in after] == [sklearn.get_config()] * 4
    assert {one.pid_ for one in (*fitted, *after)} <= workers["shmpool"]


@pytest.mark.usefixtures("shm")
def test_frames_arrive_as_frames_and_columns_by_name() -> None:
    pandas = pytest.importorskip("pandas")
    x, y = breast_cancer()
    frame = pandas.DataFrame(x, columns=[f"c{i}" for i in range(30)])
    parts = [("scaled", StandardScaler(), ["c0", "c7"]), ("spanned", MinMaxScaler(), ["c29"])]
    with sklearn.config_context(transform_output="pandas"):
        split = ColumnTransformer(parts).fit_transform(frame)
        alone = ColumnTransformer(parts, n_jobs=1).fit_transform(frame)
    pandas.testing.assert_frame_equal(split, alone, check_exact=True)
    fitted = cross_validate(tasks.Telling(), frame, y, cv=2, return_estimator=True)["estimator"]
    assert [one.type_of_x_ for one in fitted] == ["DataFrame"] * 2


@pytest.mark.skipif(
    tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 7),
    reason="since scikit-learn 1.7 filters of warnings travel",
)
@pytest.mark.usefixtures("shm")
def test_filters_of_warnings_travel_to_workers() -> None:
    x, y = breast_cancer()
    with pytest.raises(UserWarning, match="fit warns"):  # warnings are errors in all tests
        cross_validate(tasks.Warning_(), x, y, cv=2, error_score="raise")


@pytest.mark.usefixtures("shm")
def test_what_verbose_estimators_print_arrives(capfd: pytest.CaptureFixture[str]) -> None:
    x, y = breast_cancer()
    shutdown_workers()  # new ones inherit what is captured
    GridSearchCV(tree(), {"max_features": [2, 5]}, cv=2, verbose=2, refit=False).fit(x, y)
    RandomForestClassifier(4, random_state=0, verbose=2).fit(x, y)
    shutdown_workers()  # they have written all then
    printed = capfd.readouterr()
    assert "Fitting 2 folds for each of 2 candidates, totalling 4 fits" in printed.out
    assert printed.out.count("[CV] END") == 4
    assert printed.out.count("building tree ") == 4
    assert f"Using backend ShmpoolBackend with {JOBS} concurrent workers." in printed.err
