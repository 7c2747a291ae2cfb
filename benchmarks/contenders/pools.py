"""multiprocessing.Pool, and what looks like it."""

import functools

from benchmarks import tasks

from .base import Contender

#: Where it helps that workers are started with the value that all tasks need.
SAME_FOR_ALL = frozenset({"same-list", "partial", "memory"})


class MultiprocessingPool(Contender):
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


class MultiprocessingPoolInitialised(MultiprocessingPool):
    """A new pool for each value that all tasks need: under fork its workers inherit it."""

    name, title = "pool-init", "Pool(initializer)"
    better_way_of, works = "pool", SAME_FOR_ALL

    def map_same(self, fn, value, count):
        return self.map_bound(fn, value, range(count))

    def map_bound(self, fn, value, items):
        import multiprocessing

        context = multiprocessing.get_context(self.start_method)
        with context.Pool(self.workers, tasks.keep, (value,)) as pool:
            return pool.map(functools.partial(tasks.with_kept, fn), items, chunksize=1)


class ShmpoolPool(MultiprocessingPool):
    name, title, package, ours = "shmpool-pool", "shmpool.Pool", "shmpool", True

    def start(self):
        import shmpool

        self.pool = shmpool.get_context(self.start_method).Pool(self.workers)


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


class MpireShared(Mpire):
    """A new pool for each value that all tasks need, as a shared object."""

    name, title = "mpire-shared", "MPIRE(shared_objects)"
    better_way_of, works = "mpire", SAME_FOR_ALL

    def map_same(self, fn, value, count):
        return self.map_bound(fn, value, range(count))

    def map_bound(self, fn, value, items):
        from mpire import WorkerPool

        with WorkerPool(self.workers, start_method=self.start_method, shared_objects=value) as pool:
            return pool.map(fn, [(item,) for item in items], chunk_size=1)


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
