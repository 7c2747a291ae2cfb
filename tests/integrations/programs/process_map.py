"""tqdm.contrib.concurrent.process_map: a progress bar around ``concurrent.futures.ProcessPoolExecutor``."""

import numpy as np
from tqdm.contrib.concurrent import process_map


def spectrum(signal):
    return np.abs(np.fft.rfft(signal))


if __name__ == "__main__":
    rng = np.random.default_rng(7)
    signals = [rng.standard_normal(40_000) for _ in range(8)]
    spectra = process_map(spectrum, signals, max_workers=2, chunksize=2)
    print([float(s.sum()) for s in spectra])
    spectra[0][:] = 0.0  # results are the caller's own
    print(float(spectra[0].sum()), float(signals[0].sum()))
