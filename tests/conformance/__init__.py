"""CPython's own tests of ``ProcessPoolExecutor``, run against shmpool's executor."""
