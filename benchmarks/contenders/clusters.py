"""Ray and dask: schedulers for whole clusters, here on one machine. They have references to data."""

from benchmarks import tasks

from .base import Contender

#: Where references help: what several tasks need is put once, results that tasks need stay where they are.
WITH_REFERENCES = frozenset({"same-list", "same-generator", "partial", "memory", "chain", "slices"})


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
    """Ray as an expert writes it: what several tasks need is put once, tasks pass references."""

    name, title = "ray-put", "Ray(put)"
    better_way_of, works = "ray", WITH_REFERENCES

    def map_same(self, fn, value, count):
        return self.map(fn, [self.ray.put(value)] * count)

    def map_same_generated(self, fn, value, count):
        return self.map_same(fn, value, count)

    def map_bound(self, fn, value, items):
        remote, ref = self.remote(fn), self.ray.put(value)
        return self.ray.get([remote.remote(ref, item) for item in items])

    def chain(self, fn, value, length):
        for _ in range(length):
            value = self.remote(fn).remote(value)
        return self.ray.get(value)

    def make(self, fn, *args):
        ref = self.remote(fn).remote(*args)
        self.ray.wait([ref])
        return ref

    def map_parts(self, fn, whole, count):
        remote = self.remote(tasks.on_part)
        return self.ray.get([remote.remote(fn, whole, part, count) for part in range(count)])


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


class DaskScatter(Dask):
    """dask as an expert writes it: large arguments are scattered, tasks pass futures."""

    name, title = "dask-scatter", "dask(scatter)"
    better_way_of, works = "dask", WITH_REFERENCES | {"arg-100mb", "frame"}

    def scatter(self, value):
        return self.client.scatter(value, direct=True, hash=False)

    def call(self, fn, *args):
        return super().call(fn, *map(self.scatter, args))

    def map_same(self, fn, value, count):
        return self.map(fn, [self.scatter(value)] * count)

    def map_same_generated(self, fn, value, count):
        return self.map_same(fn, value, count)

    def map_bound(self, fn, value, items):
        values = [self.scatter(value)] * len(items)
        return self.client.gather(self.client.map(fn, values, list(items), pure=False))

    def chain(self, fn, value, length):
        value = self.scatter(value)
        for _ in range(length):
            value = self.client.submit(fn, value, pure=False)
        return value.result()

    def make(self, fn, *args):
        from distributed import wait

        future = self.client.submit(fn, *args, pure=False)
        wait(future)
        return future

    def map_parts(self, fn, whole, count):
        return self.client.gather(
            [
                self.client.submit(tasks.on_part, fn, whole, part, count, pure=False)
                for part in range(count)
            ]
        )


def _as_function(fn):
    """Ray takes functions only; a functools.partial needs one around it."""
    if hasattr(fn, "__code__"):
        return fn

    def call(*args):
        return fn(*args)

    return call
