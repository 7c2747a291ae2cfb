"""scikit-image: filters over the bands of a picture, with ``imap`` of a spawned pool, each band changed in place."""

import multiprocessing

import numpy as np
from skimage.filters import gaussian, sobel

EDGE = 8


def smooth(band):
    band /= band.max()  # what a task does to its argument is its own business
    return gaussian(band, sigma=2)[EDGE:-EDGE]


def edges(band):
    return sobel(band)


def main():
    rng = np.random.default_rng(5)
    picture = rng.random((512, 512))
    padded = np.pad(picture, ((EDGE, EDGE), (0, 0)), mode="reflect")
    bands = [padded[top : top + 128 + 2 * EDGE] for top in range(0, 512, 128)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        smoothed = np.vstack(list(pool.imap(smooth, bands)))
        found = dict(pool.imap_unordered(number, enumerate([smoothed, picture])))
        pool.close()
        pool.join()
    print(smoothed.shape, float(smoothed.sum()), sorted(found.items()), float(picture.sum()))


def number(item):
    i, picture = item
    return i, float(edges(picture).sum())


if __name__ == "__main__":
    main()
