"""The race's machinery: fresh processes, verdicts, tables, JSON, pictures. Not who is fast."""
# ruff: noqa: E402  # benchmarks/ is not installed: its folder's path comes first

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import is_gone, wait_until

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import growth, processes, report
from benchmarks.contenders import make
from benchmarks.figures import Figures
from benchmarks.measure import Spec, answer_of
from benchmarks.runner import Options
from benchmarks.work import Reach, Work
from benchmarks.works import WORKS

pytestmark = pytest.mark.slow

ABOUT = {
    "cpu": "a processor",
    "cores": 2,
    "memory": 2**30,
    "system": "Linux",
    "python": "3.11",
    "date": "2026-01-01",
    "commit": "",
    "versions": {"numpy": "2.0"},
}
REFUSED = {"status": "refused", "error": "ValueError: read-only", "traceback": "Traceback ..."}


def ok(*seconds: float, **more) -> dict:
    return {"status": "ok", "samples": list(seconds)} | more


def figures_of(work: str, **answers: list[dict]) -> Figures:
    names = tuple(name.replace("_", "-") for name in answers)
    figures = Figures(Options((work,), names), ABOUT)
    for name, rounds in zip(names, answers.values(), strict=True):
        for answer in rounds:
            figures.add(work, name, answer)
    return figures


def test_a_verdict_compares_the_medians_of_rounds_with_the_best_of_the_others():
    figures = figures_of(
        "partial",
        shmpool=[ok(0.9, 1.0, 9.0), ok(1.0), ok(5.0)],  # of which 1 is the median
        shmpool_pool=[ok(0.1)],  # no peer of its own
        limit=[ok(0.01)],
        pool=[ok(80.0), ok(80.0), ok(80.0)],
        mpire=[ok(4.0), ok(4.0), ok(4.0)],
        mpire_shared=[ok(2.0), ok(2.0), ok(2.0)],
        ray=[REFUSED],
    )
    verdict = figures.verdict("partial")
    assert (verdict.ours, verdict.peer, verdict.ratio) == (1.0, "mpire-shared", 2.0)
    assert (verdict.plain_peer, verdict.plain_ratio) == ("mpire", 4.0), "without better ways"
    assert verdict.spread == (0.4, 2.0)
    assert WORKS["partial"].reach == (Reach(3),)
    assert verdict.is_reached is False, "twice as fast where three times is to be reached"


@pytest.mark.parametrize(
    ("reach", "ours", "other", "reached"),
    [
        (Reach(1.5), 1.0, 1.5, True),
        (Reach(1.5), 1.0, 1.4, False),
        (Reach(0.5, "ppe"), 2.0, 1.0, True),
        (Reach(0.5, "ppe"), 2.1, 1.0, False),
        (Reach(at_most=210e6), 209e6, None, True),
        (Reach(at_most=210e6), 211e6, 300e6, False),
        (Reach(6), 1.0, None, None),
    ],
)
def test_reach_is_a_ratio_or_a_figure(reach, ours, other, reached):
    assert reach.is_reached(ours, other) is reached


def test_every_reach_is_against_somebody_who_runs_that_work():
    for work in WORKS.values():
        assert work.is_for(work.ours) or not work.reach, work.name
        for reach in work.reach:
            assert not reach.than or work.is_for(reach.than), work.name


def test_the_table_shows_who_refuses_who_is_missing_and_who_was_scaled():
    figures = figures_of(
        "write",
        shmpool=[ok(0.02)],
        pool=[ok(0.1, scaled=3)],
        joblib=[REFUSED],
        mpire=[{"status": "not installed", "error": "mpire is not installed"}],
    )
    text = report.report(figures)
    row = next(line for line in text.splitlines() if "| joblib" not in line and "~100 ms" in line)
    table = text[text.rindex("| multiprocessing.Pool |") :]
    assert "refused [1]" in table, text
    assert "[1] ValueError: read-only" in table, text
    assert "not installed" in table, text
    assert "20.0 ms" in row, text
    assert "5.00x" in row, text
    assert "| 4x " in row, text
    assert "yes" in row, text


def test_json_holds_every_sample_and_error_and_can_be_read_again(tmp_path):
    figures = figures_of(
        "latency", shmpool=[ok(1e-6, 2e-6), ok(3e-6)], pool=[ok(5e-6)], ray=[REFUSED]
    )
    file = tmp_path / "new folder" / "figures.json"
    figures.write(file)
    content = json.loads(file.read_text())
    latency = content["works"]["latency"]
    assert latency["figures"]["shmpool"]["rounds"][0]["samples"] == [1e-6, 2e-6]
    assert latency["figures"]["ray"]["rounds"][0]["traceback"] == REFUSED["traceback"]
    assert (latency["shmpool"]["peer"], latency["reached"]) == ("pool", True)
    assert content["about"] == ABOUT
    again = Figures.read(file)
    assert again.as_json() == figures.as_json()
    assert report.report(again) == report.report(figures)


def test_who_has_another_result_than_the_others_gets_an_error():
    figures = figures_of(
        "grid",
        inline=[ok(1.0, value=[0.5, 1])],
        joblib=[ok(1.0, value=[0.5 + 1e-12, 1])],
        joblib_shmpool=[ok(1.0, value=[0.5, 2])],
    )
    assert figures.failure("grid", "joblib") is None, "the last digits may differ"
    assert "another result than inline" in figures.failure("grid", "joblib-shmpool")["error"]
    assert figures.verdict("grid") is None


def test_a_wrong_answer_is_no_figure():
    def check(_data, result):
        assert result == 2, "wrong answer"

    work = Work("sum", "", lambda contender, *_: contender.call(sum, [1, 2]), check=check)
    answer = answer_of(work, make("inline", 2, "fork"), Spec("sum", "inline"))
    assert answer["status"] == "error"
    assert "wrong answer" in answer["error"]
    assert "in check" in answer["traceback"]


def test_a_slow_contender_runs_fewer_items_and_what_a_call_costs_is_not_multiplied():
    class Slow(type(make("inline", 2, "fork"))):
        """A call takes a second, an item too: by a clock that only it moves."""

        seconds = 0.0

        def map(self, fn, items):
            items = list(items)
            Slow.seconds += 1 + len(items)
            return items

    work = Work(
        "many",
        "",
        lambda contender, _, items: contender.map(None, range(items)),
        items=1000,
        pilot=4,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.measure.time.perf_counter", lambda: Slow.seconds)
        spec = Spec("many", "inline", patience=10.0, limit=1e6)
        answer = answer_of(work, Slow(2, "fork"), spec)
    assert answer["scaled"] == 16
    assert answer["samples"] == [1001.0]


HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open({pids!r}, "w").write(str(child.pid) + "\\n")
time.sleep({seconds})
"""


@pytest.mark.parametrize("seconds", [0, 600])
def test_what_a_contender_leaves_running_is_ended(tmp_path, monkeypatch, seconds):
    pids = tmp_path / "pids"
    Path(tmp_path, "hangs.py").write_text(HANGS.format(pids=str(pids), seconds=seconds))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = processes.answer_of("hangs", {}, timeout=3.0 if seconds else 60.0)
    assert answer["status"] == ("> 3 s" if seconds else "error")
    if pids.exists():  # else it was too slow to start, and has started nothing
        child = int(pids.read_text())
        wait_until(lambda: is_gone(child), 60, "the child to be gone")


def test_a_race_of_real_contenders_from_the_command_line(tmp_path):
    pytest.importorskip("joblib")
    # As if it were not installed, wherever it is.
    Path(tmp_path, "mpire.py").write_text("raise ModuleNotFoundError('none', name='mpire')")
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks", "--quick", "--no-limit", "--json", str(file)),
            *("--only", "write", "--contenders", "shmpool", "joblib", "mpire"),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    write = json.loads(file.read_text())["works"]["write"]["figures"]
    (shmpool,), (joblib,), (mpire,) = (write[n]["rounds"] for n in ("shmpool", "joblib", "mpire"))
    assert shmpool["status"] == "ok", shmpool
    assert all(0 < seconds < 60 for seconds in shmpool["samples"])
    assert joblib["status"] == "refused", "its tasks cannot write into large arguments"
    assert "Traceback" in joblib["traceback"]
    assert mpire == {"status": "not installed", "error": "mpire is not installed"}
    assert "[1] ValueError: output array is read-only" in done.stdout


def test_the_exponent_of_a_curve_is_that_of_its_upper_half():
    points = [
        (10**power, 1e-3 if power < 3 else 1e-3 * (10**power / 1e3) ** 2) for power in range(7)
    ]
    assert growth.exponent(points) == pytest.approx(2)
    square = growth.Growth([points, points])
    linear = growth.Growth([[(x, 1e-4 + x * 1e-6) for x in (1, 10, 100, 1000, 10000)]])
    flat = growth.Growth([[(x, 4e-6) for x in (10, 100, 1000)]])
    growths = {"tasks": {"pool": square, "shmpool": linear}, "live-objects": {"shmpool": flat}}
    assert growth.verdict("tasks", square, growths) == "WORSE than linear"
    assert growth.verdict("tasks", linear, growths) == "no worse than linear"
    assert growth.verdict("live-objects", flat, growths) == "flat: linear in all"
    text = growth.report(growths | {"workers": {"ppe": growth.Growth([], "Traceback\nKilled: 9")}})
    assert "WORSE than linear" in text
    assert "ProcessPoolExecutor: Killed: 9" in text


def test_curves_are_measured_in_a_process_of_their_own():
    spec = {
        "curve": "tasks",
        "contender": "shmpool",
        "workers": 2,
        "start_method": "fork",
        "most": 0,
    }
    answer = processes.answer_of("benchmarks.curves", spec, timeout=120.0)
    assert answer["status"] == "ok", answer
    assert [count for count, _ in answer["points"]] == [1, 3, 10]
    assert all(seconds > 0 for _, seconds in answer["points"])


def test_the_stages_of_a_task_are_told_apart():
    command = [sys.executable, "-m", "benchmarks.stages", "arg-1mb", "partial", "--seconds", "0.1"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert not done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    stages = {(row[0], row[1]) for row in rows if len(row) == 4}
    assert {("parent", "copies"), ("parent", "sends the call"), ("parent", "the rest")} <= stages
    assert {("worker", "maps and unpickles arguments"), ("worker", "sends the answer")} <= stages
    assert ("worker", "looks whether the function changed") in stages
    assert sum(row[1] == "whole" for row in rows if len(row) == 4) == 2


def test_pictures_can_be_read_on_white_and_on_black(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    figures = figures_of(
        "partial", shmpool=[ok(1.0)], limit=[ok(0.1)], mpire=[ok(3.0)], ray=[REFUSED]
    )
    figures.add("memory", "shmpool", ok(2e8))
    figures.add("memory", "joblib", ok(2.1e8))
    figures.add("grid", "joblib", ok(2.0))
    figures.add("grid", "joblib-shmpool", ok(1.9))
    figures.write(tmp_path / "figures.json")
    curve = growth.Growth([[(x, x * 1e-6) for x in (1, 10, 100, 1000)]])
    growths = growth.as_json({"tasks": {"shmpool": curve, "pool": curve}}, ABOUT)
    Path(tmp_path, "growth.json").write_text(json.dumps(growths))

    # In processes of their own: matplotlib keeps its fonts open.
    for module, file in (("benchmarks", "figures.json"), ("benchmarks.growth", "growth.json")):
        command = [sys.executable, "-m", module, "--from", str(tmp_path / file)]
        subprocess.run(
            [*command, "--plots", str(tmp_path / "plots")],
            cwd=ROOT,
            env=os.environ | {"MPLCONFIGDIR": str(tmp_path / "matplotlib")},
            check=True,
            stdout=subprocess.DEVNULL,
        )

    for name in ("race", "joblib", "memory", "growth"):
        with image.open(tmp_path / "plots" / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("RGBA"), dtype=float)
        assert pixels[0, 0, 3] == 0, "the background is transparent"
        solid = pixels[pixels[..., 3] == 255]
        brightness = solid[:, :3] @ [0.2126, 0.7152, 0.0722]
        assert len(solid) > 500
        assert brightness.min() > 60, "too dark for black pages"
        assert brightness.max() < 200, "too bright for white pages"
