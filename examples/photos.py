"""Restore photographs in parallel, once per executor, and compare what that cost.

    python examples/photos.py --out pictures             # scikit-learn's two sample photographs
    python examples/photos.py holiday.jpg --scale 2      # your own as well
    python examples/photos.py --quick                    # small and fast

The photographs are enlarged to the size that cameras deliver today, given a camera's noise, and
restored again: the noise is estimated from each whole picture, then overlapping tiles of it are
denoised (total variation, Chambolle 2004), sharpened (Richardson-Lucy) and stitched together.

`restore` is a plain numpy program for any `concurrent.futures` executor. It runs twice, each time
in a fresh process, and the executor's class is the only difference: `shmpool.ShmExecutor`, then
`concurrent.futures.ProcessPoolExecutor`. Both must give the same pixels, else the exit code is 1.

Needs shmpool (it brings loky), scikit-learn (it brings scipy) and Pillow. Memory is measured on Linux only.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from _memory import tree_memory
from loky import cpu_count
from PIL import Image
from scipy import ndimage

import shmpool

EXECUTORS = {"shmpool.ShmExecutor": shmpool.ShmExecutor, "ProcessPoolExecutor": ProcessPoolExecutor}

DENOISE_STEPS = 12
SHARPEN_STEPS = 3
BLUR_SIGMA, BLUR_REACH = 1.0, 3
# How far a pixel sees: one row per denoising step, two blurs per sharpening step. With this overlap
# a picture restored in tiles equals, bit for bit, one restored in a single piece.
OVERLAP = DENOISE_STEPS + 1 + SHARPEN_STEPS * 2 * BLUR_REACH
TILE_ROWS = 256


# What runs in the workers: numpy in, numpy out. Tasks write into their arguments where that suits
# them, as numpy programs do; every task has its own private data, so overlapping tiles are safe.


def photograph(photo: np.ndarray, scale: float, seed: int) -> np.ndarray:
    """Enlarge an 8-bit RGB photo and expose it again: float32, linear light, a sensor's noise."""
    height, width = (round(side * scale) for side in photo.shape[:2])
    picture = np.empty((height, width, 3), np.float32)
    random = np.random.default_rng(seed)
    for channel in range(3):
        plane = Image.fromarray((photo[..., channel] / np.float32(255)) ** np.float32(2.2))
        light = np.asarray(plane.resize((width, height), Image.Resampling.LANCZOS))
        noise = random.standard_normal(light.shape, dtype=np.float32)
        noise *= np.sqrt(np.maximum(light, 0) * np.float32(0.008) + np.float32(0.0001))
        np.add(light, noise, out=picture[..., channel])
    return picture


def noise_level(picture: np.ndarray) -> float:
    """Standard deviation of the noise after `stabilise` (Immerkaer's estimator, robustly)."""
    levels = []
    for top in range(0, len(picture) - TILE_ROWS, TILE_ROWS):
        rows = stabilise(picture[top : top + TILE_ROWS])
        second = rows[:-2] - 2 * rows[1:-1] + rows[2:]
        second = second[:, :-2] - 2 * second[:, 1:-1] + second[:, 2:]
        levels.append(np.median(np.abs(second[::4, ::4])) / (0.6745 * 6))
    return float(np.median(levels))


def stabilise(picture: np.ndarray) -> np.ndarray:
    """Make photon noise the same in light and shade: a square root, in place (after Anscombe)."""
    np.maximum(picture, 0, out=picture)
    return np.sqrt(picture, out=picture)


def denoise(tile: np.ndarray, sigma: float) -> np.ndarray:
    """Total-variation denoising by Chambolle's dual projection, a fixed number of steps."""
    tile = stabilise(tile)
    step, weight = np.float32(0.25), np.float32(2 * sigma)
    down, right = np.zeros_like(tile), np.zeros_like(tile)
    clean = tile.copy()
    for _ in range(DENOISE_STEPS):
        slope_down = np.diff(clean, axis=0, append=clean[-1:])
        slope_right = np.diff(clean, axis=1, append=clean[:, -1:])
        damping = 1 + step / weight * np.sqrt(slope_down**2 + slope_right**2)
        down = (down - step * slope_down) / damping
        right = (right - step * slope_right) / damping
        np.subtract(tile, down, out=clean)
        clean -= right
        clean[1:] += down[:-1]
        clean[:, 1:] += right[:, :-1]
    clean *= clean
    return clean


def sharpen(tile: np.ndarray) -> np.ndarray:
    """Richardson-Lucy deconvolution of a small Gaussian blur."""

    def blur(image: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            image = ndimage.gaussian_filter1d(image, BLUR_SIGMA, axis=axis, radius=BLUR_REACH)
        return image

    sharp = tile.copy()
    for _ in range(SHARPEN_STEPS):
        ratio = blur(sharp)
        np.maximum(ratio, np.float32(1e-6), out=ratio)
        np.divide(tile, ratio, out=ratio)
        sharp *= blur(ratio)
    return sharp


# The program.


def restore(executor: Executor, photos: list[np.ndarray], scale: float) -> tuple[list, list]:
    """Return the noisy pictures and the restored ones, in the order of `photos`."""
    noisy = list(executor.map(photograph, photos, repeat(scale), range(len(photos))))
    levels = list(executor.map(noise_level, noisy))
    restored = []
    for picture, level in zip(noisy, levels, strict=True):
        tops = range(0, len(picture), TILE_ROWS)
        tiles = [picture[max(0, top - OVERLAP) : top + TILE_ROWS + OVERLAP] for top in tops]
        clean = executor.map(denoise, tiles, repeat(level))
        sharp = executor.map(sharpen, clean)  # results of one stage are arguments of the next
        canvas = np.empty_like(picture)
        for top, tile in zip(tops, sharp, strict=True):
            part = canvas[top : top + TILE_ROWS]
            part[:] = tile[min(top, OVERLAP) :][: len(part)]
        restored.append(canvas)
    return noisy, restored


# The measurement around it.


def count_pipes() -> list[int]:
    """Note in a list what multiprocessing's pipes carry from and to this process, in bytes."""
    counts = []

    def counted(method, size):
        def count_and_call(self, what, *args):
            counts.append(size(what))
            return method(self, what, *args)

        return count_and_call

    Connection._send = counted(Connection._send, len)
    Connection._recv = counted(Connection._recv, int)
    return counts


def run(name: str, photos: list[np.ndarray], options: argparse.Namespace, folder: str) -> None:
    """Restore the photos with one executor; leave the pictures and the figures in `folder`."""
    counts = count_pipes()
    start = time.perf_counter()
    with EXECUTORS[name](max_workers=options.workers) as executor:
        noisy, restored = restore(executor, photos, options.scale)
        seconds = time.perf_counter() - start
        stats = executor.stats() if hasattr(executor, "stats") else None
    copied = sum(counts)  # through pipes, once; that pickle copies them as well is not counted
    if stats is not None:  # into the shared store, and what was small enough for the message
        copied += stats.bytes_copied + stats.bytes_inline
    Path(folder, f"{name}.json").write_text(json.dumps({"seconds": seconds, "copied": copied}))
    np.save(f"{folder}/{name}.noisy.npy", noisy[0])
    for number, picture in enumerate(restored):
        np.save(f"{folder}/{name}.{number}.npy", picture)


def measure(name: str, photos: list[np.ndarray], options: argparse.Namespace, folder: str) -> dict:
    """`run` in a fresh process; its figures, and the peak memory of that process's tree."""
    process = multiprocessing.get_context("spawn").Process(
        target=run, args=(name, photos, options, folder)
    )
    process.start()
    peak = 0
    while process.is_alive():
        peak = max(peak, tree_memory(process.pid))
        process.join(0.05)
    if process.exitcode:
        raise SystemExit(f"{name} failed with exit code {process.exitcode}")
    return json.loads(Path(folder, f"{name}.json").read_text()) | {"peak": peak}


def photos_of(files: list[str], quick: bool) -> dict[str, np.ndarray]:
    """scikit-learn's photographs, and the user's."""
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    pairs = list(zip(samples.filenames, samples.images, strict=True))[: 1 if quick else None]
    pairs += [(file, np.asarray(Image.open(file).convert("RGB"))) for file in files]
    return {Path(file).stem: photo for file, photo in pairs}


def save(file: Path, picture: np.ndarray) -> None:
    """Write linear float32 pixels as an 8-bit PNG."""
    display = np.clip(picture, 0, 1) ** np.float32(1 / 2.2) * 255
    Image.fromarray(display.round().astype(np.uint8)).save(file, compress_level=1)
    print(f"wrote {file}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Restore photographs, once per executor.")
    parser.add_argument("photos", nargs="*", help="image files, beside scikit-learn's")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder for the PNGs")
    parser.add_argument("--workers", type=int, default=cpu_count(), help="default: one a core")
    parser.add_argument("--scale", type=float, help="enlargement, default 6 (--quick: 2)")
    parser.add_argument("--quick", action="store_true", help="one photo, small")
    options = parser.parse_args()
    options.scale = options.scale or (2 if options.quick else 6)
    photos = photos_of(options.photos, options.quick)

    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        rows = {n: measure(n, list(photos.values()), options, folder) for n in EXECUTORS}
        same = True
        for number, photo in enumerate(photos):
            pictures = [np.load(f"{folder}/{name}.{number}.npy") for name in EXECUTORS]
            same = same and all(np.array_equal(pictures[0], other) for other in pictures)
            save(options.out / f"{photo}.png", pictures[0])
        pair = [np.load(f"{folder}/{next(iter(EXECUTORS))}.{which}.npy") for which in ("noisy", 0)]
        detail = [p[len(p) // 3 :][:400, :400] for p in pair]
        save(options.out / "before-after.png", np.hstack(detail))

    print(f"{'':22}{'seconds':>9}{'MB copied':>11}{'peak MB':>9}")
    for name, row in rows.items():
        memory = f"{row['peak'] / 1e6:9.0f}" if row["peak"] else f"{'n/a':>9}"
        print(f"{name:22}{row['seconds']:9.2f}{row['copied'] / 1e6:11.1f}{memory}")
    print("same pixels" if same else "THE PIXELS DIFFER", f"in {len(photos)} picture(s)")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
