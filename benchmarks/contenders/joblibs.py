"""joblib, with the backends that run other processes."""

from typing import Any, ClassVar

from .base import Contender


class Joblib(Contender):
    """joblib with its default backend (loky) and its defaults: arrays over 1 MB are memmapped."""

    name, title, package = "joblib", "joblib", "joblib"
    backend = "loky"
    options: ClassVar[dict[str, Any]] = {}  # of Parallel

    def start(self):
        import joblib

        self.joblib = joblib
        self.delayed = joblib.delayed
        self.register()
        parallel = joblib.Parallel(n_jobs=self.workers, backend=self.backend, **self.options)
        self.parallel = parallel.__enter__()

    def register(self):
        """Make the backend known."""

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

    def scikit_learn(self):
        return self.joblib.parallel_config(backend=self.backend, n_jobs=self.workers)

    def close(self):
        self.parallel.__exit__(None, None, None)
        self.end_workers()

    def end_workers(self):
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(kill_workers=True)


class JoblibPrivate(Joblib):
    """Tasks may write into what they get, if one says so."""

    name, title = "joblib-c", 'joblib(mmap_mode="c")'
    better_way_of, works = "joblib", frozenset({"write"})
    options: ClassVar[dict[str, Any]] = {"mmap_mode": "c"}


class JoblibShmpool(Joblib):
    name, title, ours = "joblib-shmpool", "joblib, shmpool's backend", True
    backend = "shmpool"

    def register(self):
        from shmpool import register_joblib_backend

        register_joblib_backend()

    def end_workers(self):
        from shmpool.integrations.joblib import shutdown_workers

        shutdown_workers()
