"""Does the store's cost per object grow with what is in it?  ``python -m benchmarks.growth``

Puts objects and keeps them, and prints the time of one more put (and of dropping it again) after so many. Small objects
live in their refs, arrays in a block each. The figures should be flat.
"""

import time

import numpy as np

import shmpool

COUNTS = (10, 100, 1_000, 10_000, 100_000)
TRIALS = 200


def one_more(make, store):
    """Median seconds of one put and drop."""
    times = []
    for number in range(TRIALS):
        value = make(number)
        start = time.perf_counter()
        ref = shmpool.put(value, store=store)
        del ref
        times.append(time.perf_counter() - start)
    return sorted(times)[TRIALS // 2]


def grow(title, make, most):
    store = shmpool.ObjectStore()
    live = []
    for count in COUNTS:
        if count > most:
            break
        live += [shmpool.put(make(number), store=store) for number in range(count - len(live))]
        seconds = one_more(make, store)
        stats = store.stats()
        inside = f"{stats.blocks:>6,} in {stats.arenas} arenas"
        print(f"| {title:<24} | {count:>7,} | {seconds * 1e6:6.1f} us | {inside} |")


def main():
    print("| object                   |    live | put, drop | blocks             |")
    print("| ------------------------ | ------: | --------: | ------------------ |")
    grow("small dict", lambda number: {"number": number, "name": "x" * 20}, 100_000)
    grow("array of 66 KB", lambda number: np.full(66_000, number % 251, np.uint8), 10_000)


if __name__ == "__main__":
    main()
