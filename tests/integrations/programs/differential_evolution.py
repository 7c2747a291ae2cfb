"""scipy.optimize over worker processes: ``workers=`` starts a ``multiprocessing`` pool, or takes a map of one."""

import multiprocessing

import numpy as np
from scipy.optimize import brute, differential_evolution, rosen

MEASURED = np.sin(np.linspace(0.0, 20.0, 50_000)) * 3.0 + 0.5


def misfit(parameters, measured):
    amplitude, offset = parameters
    model = amplitude * np.sin(np.linspace(0.0, 20.0, measured.size)) + offset
    return float(((model - measured) ** 2).mean())


def main():
    found = differential_evolution(
        rosen, [(-2.0, 2.0)] * 3, rng=1, maxiter=5, popsize=5, updating="deferred", workers=-1
    )
    print("rosen", found.x.tolist(), found.fun, found.nfev)
    with multiprocessing.Pool(2) as pool:
        fitted = differential_evolution(
            misfit, [(0.0, 5.0), (-1.0, 1.0)], args=(MEASURED,), rng=1, maxiter=5, popsize=5,
            updating="deferred", workers=pool.map,
        )  # fmt: skip
    print("fit", fitted.x.tolist(), fitted.fun, fitted.nfev)
    grid = brute(misfit, (slice(0, 5, 1), slice(-1, 1, 0.5)), (MEASURED,), finish=None, workers=2)
    print("grid", grid.tolist())


if __name__ == "__main__":
    main()
