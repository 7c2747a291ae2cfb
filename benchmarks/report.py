"""Figures to a table, and to JSON."""

import contextlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from .contenders import CONTENDERS, TITLES
from .runner import Options
from .works import WORKS

OURS = "shmpool"


class Figures:
    """What has been measured so far."""

    def __init__(self, options: Options):
        self.options = options
        self.answers: dict[str, dict[str, list[dict]]] = {}

    def add(self, work: str, contender: str, answer: dict) -> None:
        self.answers.setdefault(work, {}).setdefault(contender, []).append(answer)

    def median(self, work: str, contender: str) -> float | None:
        """Median over the rounds of each round's median; None if any round gave no number."""
        answers = self.answers.get(work, {}).get(contender, [])
        if not answers or any("samples" not in answer for answer in answers):
            return None
        return statistics.median(statistics.median(answer["samples"]) for answer in answers)

    def best_peer(self, work: str) -> tuple[float, str] | None:
        """The best of the others, the limit aside."""
        peers = [
            (value, contender)
            for contender in self.options.contenders
            if contender not in (OURS, "limit")
            and (value := self.median(work, contender)) is not None
        ]
        return min(peers, default=None)

    def as_json(self) -> dict:
        works = {}
        for work, answers in self.answers.items():
            works[work] = {"title": WORKS[work].title, "unit": WORKS[work].unit, "figures": {}}
            for contender, rounds in answers.items():
                failed = next((a for a in rounds if "samples" not in a), None)
                works[work]["figures"][contender] = failed or {
                    "median": self.median(work, contender),
                    "rounds": [answer["samples"] for answer in rounds],
                    "scaled from": [answer.get("scaled") for answer in rounds],
                }
        return {"machine": machine(), "options": asdict(self.options), "works": works}


def write_json(figures: Figures, file: Path) -> None:
    file.write_text(json.dumps(figures.as_json(), indent=1) + "\n")


def machine() -> dict:
    """What the figures depend on."""
    versions = {}
    for package in sorted({c.package for c in CONTENDERS.values()} | {"numpy", "pandas"}):
        with contextlib.suppress(metadata.PackageNotFoundError, ValueError):
            versions[package] = metadata.version(package)
    return {
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "versions": versions,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "")


def table(figures: Figures) -> str:
    """Markdown: a row a work, a column a contender, and shmpool against the best of the others."""
    columns = figures.options.contenders
    header = ["", *(TITLES[name] for name in columns)]
    if OURS in columns:
        header.append(f"{OURS} : best other")
    body, footnotes = [], []
    for name, answers in figures.answers.items():
        row = [WORKS[name].title]
        row += [_cell(figures, name, contender, answers, footnotes) for contender in columns]
        if OURS in columns:
            row.append(_ratio(figures, name))
        body.append(row)
    text = _markdown([header, *body])
    if any("~" in line for line in text.splitlines()):
        text += "\n~ scaled up from fewer tasks, as all of them would take too long"
    for number, note in enumerate(footnotes, 1):
        text += f"\n[{number}] {note}"
    return text


def notes(works: Iterable[str]) -> str:
    """What is and is not in each work's figure."""
    return "\n".join(f"{WORKS[w].title}: {WORKS[w].notes}" for w in works if WORKS[w].notes)


def _cell(figures: Figures, work: str, contender: str, answers: dict, footnotes: list) -> str:
    rounds = answers.get(contender, [])
    failed = next((answer for answer in rounds if "samples" not in answer), None)
    if failed:
        if failed["status"] not in ("error", "refused"):
            return failed["status"]
        if failed["error"] not in footnotes:
            footnotes.append(failed["error"])
        return f"{failed['status']} [{footnotes.index(failed['error']) + 1}]"
    value = figures.median(work, contender)
    if value is None:
        return ""
    scaled = any(answer.get("scaled") for answer in rounds)
    return ("~" if scaled else "") + quantity(value, WORKS[work].unit)


def _ratio(figures: Figures, work: str) -> str:
    ours, peer = figures.median(work, OURS), figures.best_peer(work)
    if not ours or not peer:
        return ""
    what = "less" if WORKS[work].unit == "bytes" else "faster"
    ratio, name = peer[0] / ours, TITLES[peer[1]]
    if ratio < 1:
        ratio, what = 1 / ratio, "more" if what == "less" else "slower"
    return f"{ratio:.{2 if ratio < 10 else 0}f}x {what} than {name}"


def quantity(value: float, unit: str) -> str:
    """A number that people can read: 12.3 ms, 205 MB."""
    if unit == "bytes":
        return f"{value / 1e6:.0f} MB"
    for factor, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= factor or name == "us":
            digits = 0 if value / factor >= 100 else 1 if value / factor >= 10 else 2
            return f"{value / factor:.{digits}f} {name}"
    raise AssertionError(value)


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
        if number == 0:
            rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
            lines.append("| " + " | ".join(rule) + " |")
    return "\n".join(lines)
