"""A fair race between ways to run a Python function in another process: `python -m benchmarks`.

    python -m benchmarks                                # everything; writes figures.json and plots/
    python -m benchmarks --quick                        # one short round of most works
    python -m benchmarks --only latency arg-100mb       # some works
    python -m benchmarks --contenders shmpool ray dask  # some contenders; "basic" for the usual ones
    python -m benchmarks --json figures.json            # every sample, and the machine
    python -m benchmarks --from figures.json            # tables and plots again, of what was measured
    python -m benchmarks.growth                         # does the cost grow faster than the work?

What is measured
----------------
* Every measurement (a work, by a contender, in a round) has a fresh process. Rounds interleave the
  contenders and start with a different one each time, so that a noisy minute hits all alike. A
  figure is the median over the rounds of each round's median.
* All contenders run the same functions on the same data, with the same warm-up: the workers have
  been started and a few repetitions have run before the clock starts, unless a work's notes say
  otherwise. Answers are checked: who delivers stale or wrong data gets its error in the table.
* Arrays are filled with data before the clock starts; creating, checking and freeing them is
  outside of it. "Fresh" means a newly allocated array that no contender has seen, each time.
* Each contender does what its documentation shows. Where it knows a better way for the job (Ray's
  put, dask's scatter, MPIRE's shared_objects, a pool with an initializer, joblib's mmap_mode="c"),
  that is a contender of its own, which runs in the works where it differs. joblib's memmapping of
  large arrays is its default.
* A contender that is not installed or refuses the work is shown as such, with its error.
* Who is slow runs fewer tasks, and the figure is scaled up: `~`.
* "limit" is what the machine would allow (see contenders/limit.py), "one process" is the same work
  without any pool; both are measured in the same rounds, as are a bare memcpy and a bare ping-pong.

What is not measured
--------------------
Machines with many cores, networks of machines, GPUs; other operating systems; a busy machine. The
tasks themselves do next to nothing, so that the pools' own cost shows: in a program whose tasks
run for seconds, all contenders are alike, but for the memory that they need.

`reach` is what shmpool sets out to reach in a work, as a ratio in one run: against the best of all
others, with or without their better ways, or against the one that it names. "reached" compares
medians and allows for no noise.

One idea per file: `work.py` what a work is, `works.py` and `works_joblib.py` what is measured,
`tasks.py` the functions that travel, `contenders/` who competes, `measure.py` one measurement,
`memory.py` memory of a process tree, `processes.py` fresh processes, `runner.py` rounds,
`figures.py` what has been measured, `report.py` tables, `plots.py` pictures, `growth.py` the curves.
"""
