"""A fair race between ways to run a Python function in another process: `python -m benchmarks`.

    python -m benchmarks                                # every work, the basic contenders
    python -m benchmarks --quick                        # one short round of most works
    python -m benchmarks --only latency arg-100mb       # some works
    python -m benchmarks --contenders shmpool ray dask  # others; "all" for all
    python -m benchmarks --json figures.json            # every sample, and the machine

The rules:

* Every measurement (a work, by a contender, in a round) has a fresh process. Rounds interleave the
  contenders and start with a different one each time, so that a noisy minute hits all alike.
* Arrays are filled with data before the clock starts; creating, checking and freeing them is
  outside of it. "Fresh" means a new array that no contender has seen, each time.
* Who is warm and who is not is said in each work's notes. Answers are checked: a contender that
  delivers stale or wrong data gets its error in the table instead of a number.
* A contender that is not installed, refuses the work or needs too long is shown as such.
* "limit" is what the machine would allow (see limit.py), measured in the same rounds.

One idea per file: `works.py` what is measured, `tasks.py` the functions that travel,
`contenders.py` who competes, `limit.py` the bound, `measure.py` one measurement, `memory.py` memory
of a process tree, `runner.py` rounds and processes, `report.py` the table and the JSON.
"""
