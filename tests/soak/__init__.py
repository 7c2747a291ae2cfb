"""Breaking shmpool on purpose, for as long as one likes: ``python -m tests.soak --help``.

================  ====================================================================================================
scenario          what happens
================  ====================================================================================================
``kill``          workers are killed and stopped at random while tasks pass arrays in every way that there is
``threads``       sixteen threads submit, wait, cancel, put, drop and shut down at random on one executor
``parent``        programs die in every way at random moments, with workers that are busy in every way
``interrupts``    Ctrl-C at random moments, at programs in terminals of their own
``steady``        very many tasks through one executor: is it at the end as it was at the start?
================  ====================================================================================================

Each gives a :class:`~soak.report.Report`: figures, and violations, of which there must be none.  The test suite runs
short versions (``tests/test_soak.py``).  What is random comes from a seed, so a run can be repeated as far as threads
and processes can be.

The tests' folder is on the path when these modules are imported, here as under pytest: workers find their tasks as
``soak.tasks``.
"""
