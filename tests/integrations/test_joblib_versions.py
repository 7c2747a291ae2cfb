"""The joblib backend's contract under other versions of joblib than the one that is installed.

They are looked for in the folder that ``SHMPOOL_TEST_JOBLIBS`` names, one folder a version::

    for v in 1.3.2 1.4.2 1.5.3; do pip install --no-deps --target "$SHMPOOL_TEST_JOBLIBS/$v" "joblib==$v"; done

Before 1.5 joblib calls the backend's ``apply_async``, since then ``submit``; 1.3 is the first with ``parallel_config``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import TIMEUNIT

import shmpool

FOLDER = os.environ.get("SHMPOOL_TEST_JOBLIBS")
VERSIONS = sorted(path.name for path in Path(FOLDER).iterdir()) if FOLDER else []
HERE = Path(__file__).parent


@pytest.mark.skipif(
    not VERSIONS, reason="SHMPOOL_TEST_JOBLIBS names no folder with versions of joblib"
)
@pytest.mark.parametrize("version", VERSIONS or ["any"])
@pytest.mark.timeout(900)
def test_the_contract_holds_under(version: str, tmp_path: Path) -> None:
    assert FOLDER
    paths = [str(Path(FOLDER, version)), str(Path(shmpool.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    check = f"import joblib; assert joblib.__version__ == {version!r}, joblib.__version__"
    subprocess.run(
        [sys.executable, "-c", check], env=environment, check=True, timeout=60 * TIMEUNIT
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("--basetemp", str(tmp_path / "inner")),
            *(str(HERE / "test_joblib.py"), str(HERE / "test_joblib_arrays.py")),
        ],
        env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=800 * TIMEUNIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
