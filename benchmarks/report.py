"""Figures to tables."""

from collections.abc import Collection, Iterable, Sequence

from .contenders import BOUNDS, CONTENDERS
from .figures import Figures, Verdict
from .work import Reach
from .works import WORKS

TITLES = {name: contender.title for name, contender in CONTENDERS.items()} | BOUNDS


def header(figures: Figures) -> str:
    """On what, with what, when."""
    about, options = figures.about, figures.options
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['memory'] / 2**30:.0f} GiB, "
        f"{about['system']}, Python {about['python']}, {about['date']}\n"
        f"{options.workers} workers, {options.start_method}, median of {options.rounds} rounds\n"
        f"shmpool {about['commit']}, {versions}"
    )


def verdicts(figures: Figures) -> str:
    """Markdown: shmpool against the best of the others, and what it is to reach."""
    rows = [["", "limit", "shmpool", "best other", "", "ratio", "rounds", "reach", "reached"]]
    for work in figures.works:
        verdict = figures.verdict(work)
        if verdict is None:
            continue
        unit = WORKS[work].unit
        peer, limit = figures.median(work, verdict.peer), figures.median(work, "limit")
        rows.append(
            [
                WORKS[work].title,
                "" if limit is None else quantity(limit, unit),
                quantity(verdict.ours, unit),
                _also_plain(verdict),
                "" if peer is None else _cell(figures, work, verdict.peer),
                _ratios(verdict),
                "{:.2f} to {:.2f}".format(*verdict.spread) if verdict.spread else "",
                "; ".join(_in_words(reach, unit) for reach, _, _ in verdict.reaches),
                "; ".join(_reached(*each) for each in verdict.reaches),
            ]
        )
    return markdown(rows, left=(0, 3, 7, 8))


def table(figures: Figures, contenders: Sequence[str], works: Collection[str]) -> str:
    """Markdown: a row a work, a column a contender that has something to show."""
    columns = [c for c in contenders if any(c in figures.answers[work] for work in works)]
    rows = [["", *(TITLES[name] for name in columns)]]
    footnotes: list[str] = []
    for work in works:
        cells = [_cell(figures, work, contender, footnotes) for contender in columns]
        rows.append([WORKS[work].title, *cells])
    text = markdown(rows)
    if "~" in text:
        text += "\n~ scaled up from fewer tasks, as all of them would take too long"
    for number, note in enumerate(footnotes, 1):
        text += f"\n[{number}] {note}"
    return text


def tables(figures: Figures) -> str:
    """`table` for each group of works that the same contenders run."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for work in figures.works:
        groups.setdefault(WORKS[work].contenders or (), []).append(work)
    # The bare figures of the machine stand in the table of all.
    groups.setdefault((), [])[:0] = groups.pop(("limit",), [])
    parts = [
        table(figures, figures.options.contenders, works) for works in groups.values() if works
    ]
    return "\n\n".join(parts)


def notes(works: Iterable[str]) -> str:
    """What is and is not in each work's figure."""
    return "\n".join(f"{WORKS[w].title}: {WORKS[w].notes}" for w in works if WORKS[w].notes)


def report(figures: Figures) -> str:
    """Everything."""
    return "\n\n".join(
        filter(None, (header(figures), verdicts(figures), tables(figures), notes(figures.works)))
    )


def _cell(figures: Figures, work: str, contender: str, footnotes: list[str] | None = None) -> str:
    failure = figures.failure(work, contender)
    if failure is None:
        value = figures.median(work, contender)
        scaled = "~" if value is not None and figures.is_scaled(work, contender) else ""
        return "" if value is None else scaled + quantity(value, WORKS[work].unit)
    if footnotes is None or failure["status"] not in ("error", "refused"):
        return failure["status"]
    if failure["error"] not in footnotes:
        footnotes.append(failure["error"])
    return f"{failure['status']} [{footnotes.index(failure['error']) + 1}]"


def _also_plain(verdict: Verdict) -> str:
    """The best peer; and if that is used in a better way than it comes, the best of the others."""
    names = dict.fromkeys((verdict.peer, verdict.plain_peer))
    return "; ".join(TITLES[name] for name in names if name)


def _ratios(verdict: Verdict) -> str:
    ratios = {verdict.peer: verdict.ratio, verdict.plain_peer: verdict.plain_ratio}
    return "; ".join(_times(ratio) for ratio in ratios.values() if ratio is not None)


def _times(ratio: float) -> str:
    return f"{ratio:.{2 if ratio < 10 else 0}f}x"


def _in_words(reach: Reach, unit: str) -> str:
    than = TITLES.get(reach.than, "")
    if reach.at_most is not None:
        return f"at most {quantity(reach.at_most, unit)}"
    if reach.factor < 1:
        return f"at most {1 / reach.factor:g}x {than}".rstrip()
    if reach.factor == 1:
        return ("not more" if unit == "bytes" else "not slower") + (f" than {than}" if than else "")
    return f"{reach.factor:g}x {than}".rstrip()


def _reached(reach: Reach, ratio: float | None, reached: bool | None) -> str:
    if reached is None:
        return "not compared"
    figure = f" ({_times(ratio)})" if ratio is not None and reach.than else ""
    return ("yes" if reached else "NO") + figure


def quantity(value: float, unit: str) -> str:
    """A number that people can read: 12.3 ms, 205 MB."""
    if unit == "bytes":
        return f"{value / 1e6:.0f} MB"
    for factor, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= factor or name == "us":
            digits = 0 if value / factor >= 100 else 1 if value / factor >= 10 else 2
            return f"{value / factor:.{digits}f} {name}"
    raise AssertionError(value)


def markdown(rows: list[list[str]], left: Collection[int] = (0,)) -> str:
    """A table with its columns aligned, those of `left` to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if number == 0:
            rule = [
                "-" * width if column in left else "-" * (width - 1) + ":"
                for column, width in enumerate(widths)
            ]
            lines.append(f"| {' | '.join(rule)} |")
    return "\n".join(lines)
