"""The executors of concurrent.futures' kind."""

from .base import Contender


class _Executor(Contender):
    """`start` sets `executor`."""

    def call(self, fn, *args):
        return self.executor.submit(fn, *args).result()

    def map(self, fn, items):
        return list(self.executor.map(fn, items))

    def close(self):
        self.executor.shutdown()


class Shmpool(_Executor):
    name, title, package, ours = "shmpool", "shmpool", "shmpool", True

    def start(self):
        from shmpool import ShmExecutor

        self.executor = ShmExecutor(self.workers, mp_context=self.start_method)


class ProcessPool(_Executor):
    name, title = "ppe", "ProcessPoolExecutor"

    def start(self):
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        context = multiprocessing.get_context(self.start_method)
        self.executor = ProcessPoolExecutor(self.workers, mp_context=context)


class Loky(_Executor):
    """loky starts its workers its own way (fork and exec); the start method does not apply."""

    name, title, package = "loky", "loky", "loky"

    def start(self):
        from loky import get_reusable_executor

        self.executor = get_reusable_executor(max_workers=self.workers)

    def close(self):
        self.executor.shutdown(kill_workers=True)
