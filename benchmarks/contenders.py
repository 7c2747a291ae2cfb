"""Adapters: each way of running functions in other processes, behind one small interface.

Adapters import their package in `start`, so that a missing one costs nobody else anything and so
that the time of the import counts where starting is measured. They do what the package's own
documentation does for such a job; where there is an expert's way too, it is a contender of its own.

To add one: a subclass of `Contender` with a `name`, in `CONTENDERS`.
"""

import functools


class NotInstalled(Exception):
    """The contender's package is not there."""


class Contender:
    """One way to run functions in other processes.

    Parameters
    ----------
    workers : int
        Number of worker processes.
    start_method : str
        Of multiprocessing ("fork", "spawn", "forkserver"), where the contender lets one choose.
    """

    name = ""
    title = ""
    package = ""

    def __init__(self, workers: int, start_method: str):
        self.workers = workers
        self.start_method = start_method

    def open(self):
        """`start`, with a missing package told from other failures."""
        try:
            self.start()
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == self.package:
                raise NotInstalled(f"{self.package} is not installed") from None
            raise

    def start(self):
        raise NotImplementedError

    def call(self, fn, *args):
        """Run one task and wait for its result."""
        raise NotImplementedError

    def map(self, fn, items):
        """Run one task an item and return the list of results, in order."""
        raise NotImplementedError

    def map_singly(self, fn, items):
        """`map` where every item is a task of its own, also for those that would batch them."""
        return self.map(fn, items)

    def put(self, value):
        """What to pass instead of `value` to several tasks: a reference, where there are such."""
        return value

    def bind(self, fn, value):
        """A function for `map` whose first argument is always `value`."""
        return functools.partial(fn, value)

    def chain(self, fn, value, length):
        """Feed the result of each task to the next; return the last one's."""
        for _ in range(length):
            value = self.call(fn, value)
        return value

    def close(self):
        raise NotImplementedError


class _Futures(Contender):
    """What the concurrent.futures executors have in common; `start` sets `executor`."""

    def call(self, fn, *args):
        return self.executor.submit(fn, *args).result()

    def map(self, fn, items):
        return list(self.executor.map(fn, items))

    def close(self):
        self.executor.shutdown()


class Shmpool(_Futures):
    name, title, package = "shmpool", "shmpool", "shmpool"

    def start(self):
        from shmpool import ShmExecutor

        self.executor = ShmExecutor(self.workers, mp_context=self.start_method)


class Ppe(_Futures):
    name, title = "ppe", "ProcessPoolExecutor"

    def start(self):
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        context = multiprocessing.get_context(self.start_method)
        self.executor = ProcessPoolExecutor(self.workers, mp_context=context)


class MpPool(Contender):
    name, title = "pool", "multiprocessing.Pool"

    def start(self):
        import multiprocessing

        self.pool = multiprocessing.get_context(self.start_method).Pool(self.workers)

    def call(self, fn, *args):
        return self.pool.apply(fn, args)

    def map(self, fn, items):
        return self.pool.map(fn, items, chunksize=1)

    def close(self):
        self.pool.terminate()
        self.pool.join()


class Loky(_Futures):
    """loky starts its workers its own way (fork and exec); the start method does not apply."""

    name, title, package = "loky", "loky", "loky"

    def start(self):
        from loky import get_reusable_executor

        self.executor = get_reusable_executor(max_workers=self.workers)

    def close(self):
        self.executor.shutdown(kill_workers=True)


class Joblib(Contender):
    """joblib with its default backend (loky) and its defaults: arrays over 1 MB are memmapped."""

    name, title, package = "joblib", "joblib", "joblib"

    def start(self):
        import joblib

        self.delayed = joblib.delayed
        self.parallel = joblib.Parallel(n_jobs=self.workers).__enter__()

    def call(self, fn, *args):
        return self.parallel([self.delayed(fn)(*args)])[0]

    def map(self, fn, items):
        return self.parallel(self.delayed(fn)(item) for item in items)

    def map_singly(self, fn, items):
        self.parallel.batch_size, usual = 1, self.parallel.batch_size
        try:
            return self.map(fn, items)
        finally:
            self.parallel.batch_size = usual

    def close(self):
        from joblib.externals.loky import get_reusable_executor

        self.parallel.__exit__(None, None, None)
        get_reusable_executor().shutdown(kill_workers=True)


class Mpire(Contender):
    name, title, package = "mpire", "MPIRE", "mpire"

    def start(self):
        from mpire import WorkerPool

        self.pool = WorkerPool(self.workers, start_method=self.start_method, keep_alive=True)

    def call(self, fn, *args):
        return self.pool.apply(fn, args)

    def map(self, fn, items):
        # In tuples: MPIRE would unpack items that are sequences or dictionaries.
        return self.pool.map(fn, [(item,) for item in items], chunk_size=1)

    def close(self):
        self.pool.terminate()


class Pebble(Contender):
    name, title, package = "pebble", "Pebble", "pebble"

    def start(self):
        import multiprocessing

        from pebble import ProcessPool

        context = multiprocessing.get_context(self.start_method)
        self.pool = ProcessPool(self.workers, context=context)

    def call(self, fn, *args):
        return self.pool.schedule(fn, args=args).result()

    def map(self, fn, items):
        return list(self.pool.map(fn, items, chunksize=1).result())

    def close(self):
        self.pool.stop()
        self.pool.join()


class Ray(Contender):
    """Ray as a beginner writes it: values in, values out."""

    name, title, package = "ray", "Ray", "ray"

    def start(self):
        import os

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self.ray = ray
        self.remotes = {}
        ray.init(
            num_cpus=self.workers, include_dashboard=False, log_to_driver=False, logging_level=40
        )

    def remote(self, fn):
        key = id(fn)
        if key not in self.remotes:  # the function is kept as well, so that its id stays its own
            self.remotes[key] = fn, self.ray.remote(_as_function(fn))
        return self.remotes[key][1]

    def call(self, fn, *args):
        return self.ray.get(self.remote(fn).remote(*args))

    def map(self, fn, items):
        remote = self.remote(fn)
        return self.ray.get([remote.remote(item) for item in items])

    def close(self):
        self.ray.shutdown()


class RayPut(Ray):
    """Ray as an expert writes it: what several tasks need is put once, chains pass references."""

    name, title = "ray-put", "Ray + put"

    def put(self, value):
        return self.ray.put(value)

    def bind(self, fn, value):
        remote, ref = self.remote(fn), self.ray.put(value)
        return lambda item: remote.remote(ref, item)

    def map(self, fn, items):
        if getattr(fn, "__name__", "") == "<lambda>":  # from `bind`
            return self.ray.get([fn(item) for item in items])
        return super().map(fn, items)

    def chain(self, fn, value, length):
        for _ in range(length):
            value = self.remote(fn).remote(value)
        return self.ray.get(value)


class Dask(Contender):
    name, title, package = "dask", "dask.distributed", "distributed"

    def start(self):
        import logging

        from distributed import Client, LocalCluster

        cluster = LocalCluster(
            n_workers=self.workers,
            threads_per_worker=1,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        )
        self.client = Client(cluster)

    def call(self, fn, *args):
        return self.client.submit(fn, *args, pure=False).result()

    def map(self, fn, items):
        return self.client.gather(self.client.map(fn, list(items), pure=False))

    def close(self):
        self.client.cluster.close()
        self.client.close()


def _as_function(fn):
    """Ray takes functions only; a functools.partial needs one around it."""
    if hasattr(fn, "__code__"):
        return fn

    def call(*args):
        return fn(*args)

    return call


def _limit(workers, start_method):
    from .limit import Limit  # the only contender that needs numpy

    return Limit(workers, start_method)


CONTENDERS = {
    c.name: c for c in (Shmpool, Ppe, MpPool, Loky, Joblib, Mpire, Pebble, Ray, RayPut, Dask)
}
BASIC = ("shmpool", "ppe", "pool", "loky")
TITLES = {name: contender.title for name, contender in CONTENDERS.items()} | {"limit": "limit"}


def make(name: str, workers: int, start_method: str) -> Contender:
    """The adapter of that name, not started yet."""
    return (_limit if name == "limit" else CONTENDERS[name])(workers, start_method)
