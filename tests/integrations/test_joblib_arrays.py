"""The joblib backend and arrays: what is copied and when, who sees what is written, files that are mapped."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import joblib_tasks as tasks
import numpy as np
import pytest
from joblib_tasks import parallel, registered

import shmpool
from shmpool import ObjectStore, StoreFullError
from shmpool.executor import total_stats
from shmpool.store import current

joblib = pytest.importorskip("joblib")

from joblib import Parallel, delayed, parallel_config  # noqa: E402  # after the skip

pytestmark = pytest.mark.slow

#: More than joblib's max_nbytes of 1M.
LARGE = 1 << 18  # float64: 2 MiB


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    with registered():
        yield


def copied_by(work: Callable[[], Any]) -> int:
    """Bytes that were copied into the store meanwhile, here and in workers."""
    before = total_stats().bytes_copied
    work()
    return total_stats().bytes_copied - before


# ---- who sees what is written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, *({"mmap_mode": mode} for mode in ("r", "c", None))], ids=str
)
def test_each_task_has_its_own_array_to_write_to(options: dict[str, Any]) -> None:
    array = np.zeros(LARGE)
    answers = parallel(batch_size=1, **options)(delayed(tasks.write)(array, i) for i in range(1, 9))
    assert answers == [(0.0, True)] * 8
    assert not array.any()


def _closure_over(array: Any) -> Callable[[int], None]:
    return lambda number: tasks.put(array, number)


#: Where an array may be in a task, and what then is called with a number.
PLACES: dict[str, Callable[[Any], Callable[[int], None]]] = {
    "argument": lambda array: partial(tasks.put, array),
    "bound": lambda array: tasks.Holder(array).put,
    "attribute": lambda array: partial(tasks.Holder.put, tasks.Holder(array)),
    "closure": _closure_over,
    "deep": lambda array: partial(tasks.put_deep, [[[[[{"x": array}]]]]]),
    "long list": lambda array: partial(tasks.put_in_first, [array, *range(1000)]),
}


@pytest.mark.parametrize("place", PLACES)
def test_all_tasks_write_to_one_array_wherever_it_is(place: str) -> None:
    array = np.zeros(LARGE)
    with parallel(mmap_mode="r+", batch_size=1) as call:
        call(delayed(PLACES[place](array))(i) for i in range(8))
        (seen,) = call([delayed(tasks.identity)([array])])
    assert seen[0][:8].tolist() == list(range(1, 9))


@pytest.mark.parametrize("place", PLACES)
def test_what_tasks_write_is_in_the_file_wherever_the_array_is(place: str, rows: Any) -> None:
    array = rows[0]
    parallel(batch_size=1)(delayed(PLACES[place](array))(i) for i in range(8))
    assert array[:8].tolist() == list(range(1, 9))


def test_a_file_that_is_mapped_for_reading_is_each_tasks_own(rows: Any, tmp_path: Path) -> None:
    for array in (np.memmap(tmp_path / "rows", float, "r"), np.asarray(rows)[:, ::-2]):
        array.flags.writeable = False
        answers = parallel(batch_size=20)(delayed(tasks.add_one)(array) for _ in range(40))
        assert set(answers) == {8.0}
    assert (rows == 7).all()


KINDS: dict[str, Callable[[], Any]] = {
    "large": lambda: np.zeros(LARGE),
    "in the message": lambda: np.zeros(100),
    "Fortran": lambda: np.zeros((300, LARGE // 300), order="F"),
    "axes": lambda: np.zeros((30, 40, 50)).transpose(2, 0, 1),
    "strided": lambda: np.zeros(LARGE)[::2],
    "read-only": lambda: np.broadcast_to(np.zeros(1), (LARGE,)),
    "structured": lambda: np.zeros(LARGE, [("x", "u1"), ("y", float)])["y"],
    "objects": lambda: np.array([0.0, "a"], dtype=object)[:1],
    "0-d": lambda: np.zeros(()),
}


@pytest.mark.parametrize("batch_size", [50, "auto"])
def test_tasks_of_a_batch_do_not_see_what_others_have_written(batch_size: int | str) -> None:
    answers = {}
    with parallel(batch_size=batch_size) as call:
        for kind, make in KINDS.items():
            array = make()
            answers[kind] = set(call(delayed(tasks.add_one)(array) for _ in range(200)))
    assert answers == {kind: {1.0} for kind in KINDS}


@pytest.mark.parametrize("size", [LARGE, 100])
def test_nor_in_containers_and_by_keyword(size: int) -> None:
    array, other = np.zeros(size), np.zeros(size)
    into = {"array": array}
    call = parallel(batch_size=10)
    assert call(delayed(tasks.add_one)(into=into) for _ in range(20)) == [1.0] * 20
    assert call(delayed(tasks.add_one)(array, other, into=into) for _ in range(20)) == [2.0] * 20
    # What is one array in a task is one there.
    assert (
        call(delayed(tasks.same_and_add)(array, [array]) for _ in range(20)) == [(True, 1.0)] * 20
    )


def test_arrays_in_a_long_list_are_common_to_a_batch() -> None:
    """Nobody looks there for arrays."""
    array = np.zeros(100)
    call = parallel(batch_size=4)
    work = [delayed(tasks.same_and_add)(array, [array] * 101) for _ in range(4)]
    assert call(work) == [(False, 0.0)] * 4


@pytest.mark.parametrize("size", [LARGE, 100])
def test_what_a_task_has_returned_is_not_changed_by_the_next_of_its_batch(size: int) -> None:
    array = np.zeros(size)
    call = parallel(batch_size=30)
    results = call(delayed(tasks.add_one_and_keep)(array, i) for i in range(60))
    assert [set(result) for result in results] == [{i if i % 2 else 0} for i in range(60)]


def test_a_batch_that_reads_one_array_maps_it_once() -> None:
    array = np.ones(LARGE)
    views = parallel(batch_size=50)(delayed(tasks.views)(array) for _ in range(100))
    assert max(views) == 1


@pytest.mark.parametrize("mode", ["r+", "w+"])
def test_all_tasks_write_to_one_array(mode: str) -> None:
    array = np.ones((4, LARGE))
    with parallel(mmap_mode=mode, batch_size=2) as call:
        call(delayed(tasks.write_item)([array], i) for i in range(4))
        ((_, seen),) = call([delayed(tasks.first_and_sum)(array)])
    assert seen == array.sum() - 4 + 10 * (0 + 1 + 2 + 3)
    assert (array == 1).all()  # the caller's own is another


@pytest.mark.parametrize("max_nbytes", [None, "1M", 8 * LARGE])
def test_smaller_arrays_are_not_shared(max_nbytes: str | int | None) -> None:
    array = np.zeros(LARGE if max_nbytes != "1M" else 1000)
    answers = parallel(batch_size=1, mmap_mode="r+", max_nbytes=max_nbytes)(
        delayed(tasks.write)(array, i) for i in range(1, 5)
    )
    assert answers == [(0.0, True)] * 4


def test_an_array_for_whose_shared_copy_there_is_no_room_is_an_error() -> None:
    current.set_store(ObjectStore(8 * LARGE, False))
    with pytest.raises(StoreFullError, match="nothing may be spilled"):
        parallel(batch_size=1, mmap_mode="r+")(
            delayed(tasks.write)(np.zeros(4 * LARGE), i) for i in range(3)
        )


def test_arrays_are_read_only_where_that_is_asked_for() -> None:
    array = np.zeros(LARGE)
    with parallel_config(backend="shmpool", n_jobs=2, read_only=True):
        assert Parallel()(delayed(tasks.write)(array, 1) for _ in range(3)) == [(0.0, False)] * 3


def test_a_mode_that_makes_no_sense_is_an_error() -> None:
    with pytest.raises(ValueError, match="mmap_mode must be"):
        parallel(mmap_mode="x")([delayed(tasks.square)(1)])


# ---- what is copied --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, "auto"])
def test_one_array_in_many_tasks_is_written_once(batch_size: int | str) -> None:
    array = np.arange(LARGE, dtype=float)
    call = parallel(batch_size=batch_size)

    def work() -> None:
        answers = call(delayed(tasks.first_and_sum)(array) for _ in range(400))
        assert answers == [(0.0, array.sum())] * 400

    assert copied_by(work) == array.nbytes
    assert copied_by(work) == 0


def test_an_array_that_changes_while_results_are_taken_is_written_anew() -> None:
    array = np.zeros(LARGE)

    def produce() -> Iterator[Any]:
        yield delayed(tasks.first_and_sum)(array)
        array[:] = 1  # as who takes the results might
        yield delayed(tasks.first_and_sum)(array)

    results = parallel(batch_size=1, pre_dispatch=1, return_as="generator")(produce())
    assert list(results) == [(0, 0), (1, LARGE)]


def test_an_array_that_changes_between_calls_is_written_anew() -> None:
    array = np.zeros(LARGE)
    with parallel() as call:
        for i in range(4):
            array[-1] = i
            assert call([delayed(tasks.first_and_sum)(array)]) == [(0.0, i)]


def test_results_come_and_go_on_without_a_copy() -> None:
    call = parallel(batch_size=1)
    results: list[Any] = []
    made = copied_by(lambda: results.extend(call(delayed(tasks.ones)(LARGE) for _ in range(4))))
    assert made == 4 * results[0].nbytes
    again = copied_by(lambda: call(delayed(tasks.first_and_sum)(array[10:]) for array in results))
    assert again == 0
    results[0][0] = 5  # they are the caller's
    assert call([delayed(tasks.first_and_sum)(results[0])]) == [(5.0, LARGE + 4.0)]


def test_an_array_is_written_once_though_scikit_learn_clones_and_wraps() -> None:
    sklearn = pytest.importorskip("sklearn")
    from sklearn.linear_model import Ridge
    from sklearn.utils.parallel import Parallel as SklearnParallel
    from sklearn.utils.parallel import delayed as sklearn_delayed

    x = np.random.default_rng(0).random((LARGE // 8, 8))
    y = x.sum(axis=1)
    estimator = Ridge()

    def work() -> None:
        with parallel_config(backend="shmpool"):
            scores = SklearnParallel(n_jobs=2, batch_size=1)(
                sklearn_delayed(tasks.fit_and_score)(sklearn.clone(estimator), x, y, alpha)
                for alpha in range(1, 31)
            )
        assert min(scores) > 0.9

    assert copied_by(work) == x.nbytes + y.nbytes


def test_an_array_bound_to_the_function_is_written_once() -> None:
    holder = tasks.Holder(np.ones(LARGE))

    def work() -> None:
        totals = parallel(batch_size=1)(delayed(holder.total)(i) for i in range(30))
        assert totals == [LARGE + i for i in range(30)]

    assert copied_by(work) == holder.array.nbytes


def test_there_are_no_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBLIB_TEMP_FOLDER", str(tmp_path))
    seen: set[str] = set()

    def produce() -> Iterator[Any]:
        for i in range(20):
            seen.update(
                os.listdir(tmp_path),
                (
                    name
                    for name in os.listdir("/dev/shm")
                    if "joblib" in name and f"_{os.getpid()}_" in name
                ),
            )
            yield delayed(tasks.identity)(np.full(LARGE, i, dtype=float))

    results = parallel(temp_folder=str(tmp_path))(produce())
    seen.update(os.listdir(tmp_path))
    assert [array[0] for array in results] == list(range(20))
    assert not seen


# ---- mapped files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Any:
    mapped = np.memmap(tmp_path / "rows", float, "w+", shape=(6, 3000))
    mapped[:] = 7
    return mapped


def test_what_tasks_write_into_a_mapped_file_is_in_the_file(rows: Any, tmp_path: Path) -> None:
    call = parallel(batch_size=3)
    work = lambda: call(delayed(tasks.write_row)(rows, i) for i in range(6))  # noqa: E731
    assert copied_by(work) == 0
    assert rows.mean(axis=1).tolist() == list(range(6))
    assert np.fromfile(tmp_path / "rows").reshape(rows.shape).mean(axis=1).tolist() == list(
        range(6)
    )
    assert parallel()([delayed(tasks.write_row)(rows, 0)]) == [np.memmap]


@pytest.mark.parametrize(
    "part",
    [
        lambda rows: rows[2:4],
        lambda rows: rows[:, 1::2],
        lambda rows: rows[::-1, ::-3],
        np.asarray,
        lambda rows: np.asarray(rows)[3].reshape(30, 100),
        lambda rows: rows.T,
    ],
    ids=["slice", "strided", "backwards", "asarray", "reshaped", "transposed"],
)
def test_parts_of_a_mapped_file_are_in_the_file_as_well(
    part: Callable[[Any], Any], rows: Any
) -> None:
    array = part(rows)
    expected = np.array(rows)
    part(expected)[...] = 1
    assert copied_by(lambda: parallel()([delayed(tasks.fill)([array], 1)])) == 0
    assert np.array_equal(rows, expected)


def test_a_file_that_is_mapped_for_reading_is_not_copied_and_not_written_to(
    rows: Any, tmp_path: Path
) -> None:
    mapped = np.memmap(tmp_path / "rows", float, "r", offset=8, shape=(5, 3000))
    work = lambda: parallel()(delayed(tasks.write)(mapped, i) for i in range(4))  # noqa: E731
    assert copied_by(work) == 0
    assert (
        parallel(batch_size=1)(delayed(tasks.write)(mapped, i) for i in range(4)) == [(7, True)] * 4
    )
    assert (rows == 7).all()


def test_what_is_written_into_a_private_mapping_is_seen(rows: Any, tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "rows", float, "c", shape=rows.shape)
    mapped[0, 0] = 100
    assert parallel()([delayed(tasks.first_and_sum)(mapped)]) == [(100, mapped.sum())]


def test_a_mapped_file_that_is_gone_is_copied(rows: Any, tmp_path: Path) -> None:
    (tmp_path / "rows").unlink()
    assert parallel()([delayed(tasks.first_and_sum)(rows)]) == [(7, rows.sum())]


def test_a_mapped_file_that_has_become_shorter_is_copied(rows: Any, tmp_path: Path) -> None:
    rows.flush()
    os.truncate(
        tmp_path / "rows", rows.nbytes - 8
    )  # within the last page, which reads as zeros there
    assert parallel()([delayed(tasks.first_and_sum)(rows)]) == [(7, rows.sum())]
    assert rows[-1, -1] == 0


def test_mapped_files_come_back_by_name(rows: Any) -> None:
    (result,) = parallel()([delayed(tasks.same_file)(rows)])
    result["rows"][0] = 50
    assert (rows[1] == 50).all()


def test_what_joblib_has_loaded_is_not_copied(tmp_path: Path) -> None:
    joblib.dump({"x": np.arange(LARGE, dtype=float)}, tmp_path / "data")
    data = joblib.load(tmp_path / "data", mmap_mode="r")
    work = lambda: parallel()(delayed(tasks.sum_of)(data) for _ in range(4))  # noqa: E731
    assert copied_by(work) == 0


def test_mapped_files_among_many_other_arguments() -> None:
    numbers = list(range(1000))
    assert parallel()([delayed(tasks.identity)(numbers)]) == [numbers]
    assert parallel()([delayed(tasks.identity)({"a": [(1, numbers)]})]) == [{"a": [(1, numbers)]}]


# ---- beside other users of the store ---------------------------------------------------------------------------------


def test_a_ref_is_a_ref_in_a_task() -> None:
    ref = shmpool.put(np.ones(LARGE))
    assert parallel()(delayed(tasks.get_sum)(ref) for _ in range(3)) == [LARGE] * 3


def test_threads_that_pass_one_array_see_it_whole() -> None:
    array = np.arange(LARGE, dtype=float)
    wrong: list[Any] = []

    def work() -> None:
        for _ in range(5):
            answers = parallel()(delayed(tasks.first_and_sum)(array) for _ in range(10))
            wrong.extend(answer for answer in answers if answer != (0, array.sum()))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_list_given_twice_to_a_task_of_a_batch_is_one_list_there() -> None:
    """With an array of its own in it, since another task of the batch is given that, too."""
    shared = [np.zeros(LARGE), 1]
    work = [delayed(tasks.write_and_compare)(shared, shared) for _ in range(4)]
    assert parallel(batch_size=4)(work) == [(True, 0.0, 1.0)] * 4
    assert shared[0][0] == 0


def test_a_read_only_array_of_several_tasks_of_a_batch_is_one() -> None:
    """Nobody can write to it, so nobody needs one of his own."""
    array = np.ones(LARGE)
    work = [delayed(tasks.address_of)(array) for _ in range(4)]
    found = parallel(batch_size=4, read_only=True)(work)
    assert len(set(found)) <= 2, "one for each worker"
