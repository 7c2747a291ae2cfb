"""Search for the best model, once per joblib backend, and compare what that cost.

    python examples/gridsearch.py             # scikit-learn's two sample photographs
    python examples/gridsearch.py --quick     # fewer patches and candidates

From which of the two photographs is a patch of 8 x 8 pixels: a Chinese temple, or a flower? Every
patch of every fourth row and column is a sample of 192 numbers; strips of the pictures make the
folds, so that models are tested on other parts of them than they have learned from.

`search` is a plain scikit-learn program. It runs twice, each time in a fresh process, and the name
of joblib's backend is the only difference: "shmpool", then "loky", which is joblib's own. Both must
find the same parameters with the same scores, else the exit code is 1.

Needs shmpool, scikit-learn (it brings joblib) and Pillow. Memory is measured on Linux only.
"""

import argparse
import json
import subprocess
import sys
import time

import joblib
import numpy as np
from _memory import tree_memory
from sklearn.datasets import load_sample_images
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import GridSearchCV, GroupKFold

import shmpool

BACKENDS = ("shmpool", "loky")
PATCH = 8  # pixels
STRIPS = 15  # of each picture, from top to bottom


def patches(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patches of both photographs as rows of float32, the photograph of each, and its strip."""
    samples, labels, strips = [], [], []
    for label, photo in enumerate(load_sample_images().images):
        shape = (PATCH, PATCH, photo.shape[2])
        windows = np.lib.stride_tricks.sliding_window_view(photo, shape)[::step, ::step, 0]
        rows, columns = windows.shape[:2]
        samples.append(windows.reshape(rows * columns, -1).astype(np.float32) / 255)
        labels.append(np.full(rows * columns, label))
        strips.append(np.tile(np.arange(columns) * STRIPS // columns, rows))
    return np.concatenate(samples), np.concatenate(labels), np.concatenate(strips)


def search(quick: bool) -> GridSearchCV:
    """Find the best parameters; joblib decides where the models are fitted."""
    samples, labels, strips = patches(step=9 if quick else 4)
    grid = {
        "learning_rate": [0.05, 0.2],
        "max_leaf_nodes": [15] if quick else [7, 15, 31],
        "l2_regularization": [0.0] if quick else [0.0, 1.0],
    }
    model = HistGradientBoostingClassifier(max_iter=10 if quick else 30, random_state=0)
    return GridSearchCV(model, grid, cv=GroupKFold(3)).fit(samples, labels, groups=strips)


# The measurement around it.


def run(options: argparse.Namespace) -> None:
    """Search with one backend, and print the figures as JSON."""
    shmpool.register_joblib_backend()
    start = time.perf_counter()
    with joblib.parallel_config(backend=options.backend, n_jobs=options.workers):
        found = search(options.quick)
    figures = {
        "seconds": time.perf_counter() - start,
        "best": found.best_params_,
        "scores": found.cv_results_["mean_test_score"].tolist(),
        "fits": len(found.cv_results_["params"]) * found.n_splits_ + 1,
    }
    print(json.dumps(figures))


def measure(backend: str) -> dict:
    """`run` in a fresh process; its figures, and the peak memory of that process's tree."""
    command = [sys.executable, __file__, *sys.argv[1:], "--backend", backend]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        start = time.perf_counter()
        peak = max(peak, tree_memory(process.pid))
        # To look takes some time too, of which the race is to have most.
        time.sleep(max(0.05, 4 * (time.perf_counter() - start)))
    if process.returncode:
        raise SystemExit(f"{backend} failed with exit code {process.returncode}")
    return json.loads(process.stdout.read()) | {"peak": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description="Search for a model, once per joblib backend.")
    parser.add_argument(
        "--workers", type=int, default=max(2, joblib.cpu_count()), help="default: one a core"
    )
    parser.add_argument("--quick", action="store_true", help="less data, fewer candidates")
    parser.add_argument("--backend", choices=BACKENDS, help="only this one; prints JSON")
    options = parser.parse_args()
    if options.backend:
        run(options)
        return 0

    rows = {backend: measure(backend) for backend in BACKENDS}
    print(f"{'':10}{'seconds':>9}{'peak MB':>9}{'fits':>6}{'accuracy':>10}  best parameters")
    for name, row in rows.items():
        memory = f"{row['peak'] / 1e6:9.0f}" if row["peak"] else f"{'n/a':>9}"
        best = ", ".join(f"{key}={value}" for key, value in row["best"].items())
        accuracy = f"{max(row['scores']):10.4f}"
        print(f"{name:10}{row['seconds']:9.2f}{memory}{row['fits']:6}{accuracy}  {best}")
    ours, theirs = rows.values()
    same = ours["best"] == theirs["best"] and np.allclose(ours["scores"], theirs["scores"])
    print("same parameters, same scores" if same else "THE RESULTS DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
