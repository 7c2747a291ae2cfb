"""Libraries that are handed a pool use it as they use multiprocessing's."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pool_tasks as tasks
import pytest
from pool_tasks import warm_pool

from shmpool.pool import Pool


@pytest.fixture(scope="module", params=["fork", "loky"])
def pool(request: pytest.FixtureRequest, temporary_folder: object) -> Iterator[Pool]:
    with warm_pool(request.param) as pool:
        yield pool


def bowl(x: Any) -> float:
    return float(((x - 0.5) ** 2).sum())


def log_probability(x: Any) -> float:
    return float(-0.5 * (x**2).sum())


def test_scipy_optimizes_with_the_pools_map(pool: Pool) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    found = optimize.differential_evolution(
        bowl, [(-1, 1)] * 2, workers=pool.map, updating="deferred", seed=1, maxiter=20, polish=False
    )
    assert found.x == pytest.approx([0.5, 0.5], abs=0.05)
    x, *_ = optimize.brute(
        bowl, [(-1, 1)] * 2, Ns=5, workers=pool.map, full_output=True, finish=None
    )
    assert list(x) == [0.5, 0.5]


def test_scipy_integrates_with_the_pools_map(pool: Pool) -> None:
    integrate = pytest.importorskip("scipy.integrate")
    value, _ = integrate.quad_vec(np.cos, 0, 1, workers=pool.map)
    assert value == pytest.approx(np.sin(1))


def test_emcee_samples_with_a_pool(pool: Pool) -> None:
    emcee = pytest.importorskip("emcee")

    def sample(pool: Any) -> Any:
        start = np.random.default_rng(0).normal(size=(8, 2))
        sampler = emcee.EnsembleSampler(8, 2, log_probability, pool=pool)
        sampler.random_state = np.random.RandomState(0).get_state()
        sampler.run_mcmc(start, 20)
        return sampler.get_chain()

    assert np.array_equal(sample(pool), sample(None))


def test_dask_computes_with_a_pool(pool: Pool) -> None:
    dask = pytest.importorskip("dask")
    squares = [dask.delayed(tasks.square)(i) for i in range(10)]
    total = dask.delayed(sum)(squares)
    assert total.compute(scheduler="processes", pool=pool) == 285
    failing = dask.delayed(tasks.fail)("key")
    with pytest.raises(KeyError):
        failing.compute(scheduler="processes", pool=pool)
    with dask.config.set(scheduler="processes", pool=pool):
        assert total.compute() == 285


def test_tqdm_wraps_what_imap_yields(pool: Pool) -> None:
    tqdm = pytest.importorskip("tqdm")
    bar = functools.partial(tqdm.tqdm, total=50, disable=True)
    assert list(bar(pool.imap(tasks.square, range(50)))) == [i * i for i in range(50)]
    assert sum(bar(pool.imap_unordered(tasks.square, iter(range(50)), chunksize=7))) == 40425


def test_pandas_frames_are_split_and_put_together(pool: Pool) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": np.arange(100.0), "b": list("xyzxy") * 20})

    def normed(part: Any) -> Any:
        part = part.copy()
        part["a"] /= 99
        return part

    parts = [frame.iloc[i : i + 25] for i in range(0, 100, 25)]
    assert pandas.concat(pool.map(normed, parts)).equals(normed(frame))
    groups = frame.groupby("b")["a"]
    sums = dict(pool.starmap(lambda name, group: (name, group.sum()), groups))
    assert sums == groups.sum().to_dict()


def test_a_callback_moves_a_progress_bar(pool: Pool) -> None:
    tqdm = pytest.importorskip("tqdm")
    with tqdm.tqdm(total=20, disable=True) as bar:
        seen: list[int] = []

        def update(value: int) -> None:
            seen.append(value)
            bar.update()

        results = [pool.apply_async(tasks.square, (i,), callback=update) for i in range(20)]
        for result in results:
            result.wait()
    assert sorted(seen) == [i * i for i in range(20)]
