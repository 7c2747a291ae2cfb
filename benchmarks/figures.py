"""What has been measured, who is best, and whether shmpool has reached what it set out to."""

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from .contenders import BOUNDS, CONTENDERS
from .runner import Options
from .work import Reach
from .works import WORKS


@dataclass(frozen=True)
class Verdict:
    """shmpool beside the others in one work.

    Attributes
    ----------
    ours : float
        The median, in the work's unit.
    peer : str
        The best of all others; empty if none has a figure.
    ratio : float or None
        How many times better than that.
    plain_peer, plain_ratio
        The same, of those that are used as they come.
    spread : tuple of float or None
        The smallest and largest ratio of a round.
    reaches : tuple of (Reach, float or None, bool or None)
        What is to be reached, the ratio that counts, and whether it is.
    """

    ours: float
    peer: str
    ratio: float | None
    plain_peer: str
    plain_ratio: float | None
    spread: tuple[float, float] | None
    reaches: tuple[tuple[Reach, float | None, bool | None], ...]

    @property
    def is_reached(self) -> bool | None:
        """None: nothing was to be reached, or there was nothing to compare with."""
        known = [reached for _, _, reached in self.reaches if reached is not None]
        return all(known) if known else None


class Figures:
    """Answers of measurements, by work and contender, one a round.

    Parameters
    ----------
    options : Options
        What was run.
    about : dict
        The machine, versions, the date.
    """

    def __init__(self, options: Options, about: dict):
        self.options = options
        self.about = about
        self.answers: dict[str, dict[str, list[dict]]] = {}

    @property
    def works(self) -> list[str]:
        """In the order in which they are listed, whatever the order of the run."""
        return [work for work in WORKS if work in self.answers]

    def add(self, work: str, contender: str, answer: dict) -> dict:
        """Take an answer, and return it: with an error, if others have another result."""
        for other, answers in self.answers.get(work, {}).items():
            value = answers[0].get("value")
            if answer["status"] == "ok" and value and not _equal(value, answer["value"]):
                text = f"another result than {other}: {answer['value']}, not {value}"
                answer = {"status": "error", "error": text[:200], "traceback": text}
        self.answers.setdefault(work, {}).setdefault(contender, []).append(answer)
        return answer

    def failure(self, work: str, contender: str) -> dict | None:
        """The answer that is none, if there is one."""
        answers = self.answers.get(work, {}).get(contender, [])
        return next((answer for answer in answers if answer["status"] != "ok"), None)

    def rounds(self, work: str, contender: str) -> list[float]:
        """The median of each round; empty if any round gave no number."""
        answers = self.answers.get(work, {}).get(contender, [])
        if self.failure(work, contender):
            return []
        return [statistics.median(answer["samples"]) for answer in answers]

    def median(self, work: str, contender: str) -> float | None:
        """Median over the rounds of each round's median; None if any round gave no number."""
        rounds = self.rounds(work, contender)
        return statistics.median(rounds) if rounds else None

    def is_scaled(self, work: str, contender: str) -> bool:
        return any(answer.get("scaled") for answer in self.answers[work].get(contender, []))

    def verdict(self, work: str) -> Verdict | None:
        """None if shmpool has no figure."""
        name = WORKS[work].ours
        ours = self.median(work, name)
        if ours is None:
            return None
        others = {
            contender: value
            for contender in self.answers[work]
            if contender not in BOUNDS and not CONTENDERS[contender].ours
            if (value := self.median(work, contender)) is not None
        }
        peer = min(others, key=others.__getitem__, default="")
        plain = [contender for contender in others if not CONTENDERS[contender].better_way_of]
        plain_peer = min(plain, key=others.__getitem__, default="")
        reaches = []
        for reach in WORKS[work].reach:
            other = others.get(reach.than or peer)
            ratio = None if other is None else other / ours
            reaches.append((reach, ratio, reach.is_reached(ours, other)))
        pairs = zip(self.rounds(work, peer), self.rounds(work, name), strict=False)
        ratios = [theirs / own for theirs, own in pairs]
        return Verdict(
            ours=ours,
            peer=peer,
            ratio=others[peer] / ours if peer else None,
            plain_peer=plain_peer,
            plain_ratio=others[plain_peer] / ours if plain_peer else None,
            spread=(min(ratios), max(ratios)) if ratios else None,
            reaches=tuple(reaches),
        )

    # As a file.

    def as_json(self) -> dict:
        works = {}
        for work in self.works:
            verdict = self.verdict(work)
            works[work] = {
                "title": WORKS[work].title,
                "unit": WORKS[work].unit,
                "shmpool": verdict and asdict(verdict),
                "reached": verdict and verdict.is_reached,
                "figures": {
                    contender: {"median": self.median(work, contender), "rounds": rounds}
                    for contender, rounds in self.answers[work].items()
                },
            }
        return {"about": self.about, "options": asdict(self.options), "works": works}

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.as_json(), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> "Figures":
        """What `write` wrote; works and contenders that are no more are left out."""
        content = json.loads(file.read_text())
        options = content["options"]
        options |= {key: tuple(options[key]) for key in ("works", "contenders")}
        figures = cls(Options(**options), content["about"])
        for work in WORKS.keys() & content["works"].keys():
            figures.answers[work] = {
                contender: figure["rounds"]
                for contender, figure in content["works"][work]["figures"].items()
                if contender in CONTENDERS or contender in BOUNDS
            }
        return figures


def _equal(left: list, right: list) -> bool:
    """Numbers may differ in the last digits: the order of sums is not the same in two threads."""
    return len(left) == len(right) and all(map(math.isclose, left, right))
