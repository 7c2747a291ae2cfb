"""emcee: Markov chains whose log-probabilities are computed by a pool."""

from multiprocessing import Pool

import emcee
import numpy as np


def log_probability(theta, x, y):
    slope, offset = theta
    return -0.5 * float(((y - slope * x - offset) ** 2).sum())


if __name__ == "__main__":
    np.random.seed(42)  # noqa: NPY002  # emcee takes its random numbers from there
    rng = np.random.default_rng(1)
    x = np.linspace(0.0, 1.0, 20_000)
    y = 2.0 * x + 1.0 + rng.standard_normal(x.size)
    start = rng.standard_normal((8, 2)) * 0.01 + [2.0, 1.0]
    with Pool(2) as pool:
        sampler = emcee.EnsembleSampler(8, 2, log_probability, args=(x, y), pool=pool)
        sampler.run_mcmc(start, 10)
    chain = sampler.get_chain()
    print(chain.shape, chain[-1].tolist(), sampler.acceptance_fraction.tolist())
