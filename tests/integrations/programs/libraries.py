"""Libraries that start processes, each in its own way; which one is the argument."""

import sys

import numpy as np


def total(x):
    return float(np.asarray(x).sum())


def use_dask():
    import multiprocessing
    from multiprocessing.pool import ThreadPool

    import dask

    with dask.config.set({"multiprocessing.context": "fork"}):
        parts = [dask.delayed(np.full)(50_000, i) for i in range(4)]
        whole = dask.delayed(sum)([dask.delayed(total)(part) for part in parts])
        yield whole.compute(scheduler="processes", num_workers=2)
        with ThreadPool(2) as threads, dask.config.set(pool=threads):
            yield whole.compute(scheduler="threads")
        with multiprocessing.Pool(2) as pool:
            yield whole.compute(scheduler="processes", pool=pool)
            pool.close()
            pool.join()


def use_joblib():
    from joblib import Parallel, delayed
    from joblib.pool import MemmappingPool

    arrays = [np.full(50_000, i) for i in range(4)]
    for backend in ("multiprocessing", "loky", "threading"):
        tasks = (delayed(total)(array) for array in arrays)
        yield backend, Parallel(n_jobs=2, backend=backend, max_nbytes=1000)(tasks)
    yield [base.__module__ for base in MemmappingPool.__mro__]


def use_sklearn():
    import joblib
    from sklearn.datasets import make_classification
    from sklearn.model_selection import cross_val_score
    from sklearn.tree import DecisionTreeClassifier

    x, y = make_classification(1000, random_state=0)
    with joblib.parallel_config(backend="multiprocessing"):
        yield cross_val_score(DecisionTreeClassifier(random_state=0), x, y, n_jobs=2).tolist()


def use_torch():
    import torch.multiprocessing
    from torch.utils.data import DataLoader

    loader = DataLoader(np.arange(12.0), batch_size=4, num_workers=2)
    yield [batch.tolist() for batch in loader]
    with torch.multiprocessing.Pool(2) as pool:
        yield pool.map(torch.sum, [torch.ones(50_000), torch.zeros(3)])
        pool.close()
        pool.join()


def use_pebble():
    from pebble import ProcessPool

    with ProcessPool(max_workers=2) as pool:
        yield list(pool.map(total, [np.ones(50_000), np.zeros(3)]).result())


def use_mpire():
    from mpire import WorkerPool

    with WorkerPool(n_jobs=2) as pool:
        yield pool.map(total, [np.ones(50_000), np.zeros(3)])


if __name__ == "__main__":
    for result in globals()[f"use_{sys.argv[1]}"]():
        print(result)
