"""Pictures of what was measured.

Their background is transparent and all their colours are of medium brightness, so that they can be
read on white and on black pages alike.
"""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from .contenders import BOUNDS, CONTENDERS
from .curves import CURVES
from .figures import Figures, Verdict
from .growth import Growth
from .report import TITLES, quantity
from .works import WORKS

INK = "#737c86"  # contrast above 4:1 on white and on #0d1117
OURS = "#e5484d"
LIMIT = "#b8901f"
#: Colour and name by the families of contenders; the first that fits.
FAMILIES = {
    ("ppe", "pool", "pool-init"): ("#3b82f6", "standard library"),
    ("loky", "joblib", "joblib-c"): ("#ef8b17", "loky, joblib"),
    ("ray", "ray-put"): ("#9b6bdf", "Ray"),
    ("dask", "dask-scatter"): ("#2f9e6e", "dask.distributed"),
    ("mpire", "mpire-shared", "pebble"): ("#8b949e", "MPIRE, Pebble"),
}
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.transparent": True,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
}


def draw_race(figures: Figures, folder: Path) -> list[Path]:
    """Draw times, of calls and of joblib, and memory; return the files."""
    works = [work for work in figures.works if _has_peers(figures, work)]
    times = [work for work in works if not WORKS[work].is_memory]
    pictures = {
        "race.png": (_race, [work for work in times if WORKS[work].ours == "shmpool"]),
        "joblib.png": (_race, [work for work in times if WORKS[work].ours != "shmpool"]),
        "memory.png": (_memory, [work for work in works if WORKS[work].is_memory]),
    }
    files = []
    with mpl.rc_context(STYLE):
        for name, (draw, chosen) in pictures.items():
            if chosen:
                files.append(_save(draw(figures, chosen), folder / name))
    return files


def draw_growth(growths: Mapping[str, Mapping[str, Growth]], folder: Path) -> list[Path]:
    """Draw all curves into one picture; return its file."""
    names = [name for name in growths if name != "memcpy" and any(_curves(growths, name))]
    if not names:
        return []
    with mpl.rc_context(STYLE):
        columns = min(4, len(names))
        rows = -(-len(names) // columns)
        figure, grid = plt.subplots(
            rows, columns, figsize=(3.2 * columns, 2.9 * rows), squeeze=False, layout="constrained"
        )
        for axes in grid.flat[len(names) :]:
            axes.remove()
        for name, axes in zip(names, grid.flat, strict=False):
            _growth(axes, growths, name)
        lines = {label: line for axes in figure.axes for line, label in _legend_of(axes)}
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))
        return [_save(figure, folder / "growth.png")]


def _save(figure, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)
    return file


def _has_peers(figures: Figures, work: str) -> bool:
    verdict = figures.verdict(work)
    return verdict is not None and bool(verdict.peer)


def _is_peer(contender: str) -> bool:
    return contender in CONTENDERS and not CONTENDERS[contender].ours


def _colour(contender: str) -> str:
    if contender in BOUNDS:
        return LIMIT
    if CONTENDERS[contender].ours:
        return OURS
    return next(colour for names, (colour, _) in FAMILIES.items() if contender in names)


# Times: a row a work, a dot a contender, shmpool at 1.


def _race(figures: Figures, works: list[str]):
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(works) + 1.3), layout="constrained")
    labels = []
    for row, work in enumerate(works):
        verdict = figures.verdict(work)
        _race_row(axes, figures, work, verdict, row)
        labels.append(f"{WORKS[work].title}   {quantity(verdict.ours, WORKS[work].unit):>7}")
    axes.axvline(1, color=OURS, linewidth=1, alpha=0.6, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(works)), labels)
    axes.set_ylim(len(works) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="both")
    axes.set_xlabel("time that it takes, as a multiple of shmpool's")
    figure.legend(handles=_handles(figures, works), loc="outside lower center", ncols=4)
    return figure


def _race_row(axes: Axes, figures: Figures, work: str, verdict: Verdict, row: int) -> None:
    for contender in figures.answers[work]:
        value = figures.median(work, contender)
        is_other = contender == "limit" or _is_peer(contender)
        if value is None or not is_other:
            continue
        ratio = value / verdict.ours
        if contender == "limit":
            axes.plot(ratio, row, "|", color=LIMIT, markersize=12, markeredgewidth=2)
            continue
        colour, better = _colour(contender), bool(CONTENDERS[contender].better_way_of)
        axes.plot(
            ratio,
            row,
            "o",
            color=colour,
            markersize=6,
            markerfacecolor="none" if better else colour,
            alpha=0.9,
        )
        if contender == verdict.peer:
            axes.annotate(
                f"{ratio:.{1 if ratio < 10 else 0}f}x",
                (ratio, row),
                textcoords="offset points",
                xytext=(0, 5.5),
                ha="center",
                fontsize=7,
                fontweight="bold",
                color=colour,
            )
    axes.plot(1, row, "o", color=OURS, markersize=8)


def _handles(figures: Figures, works: list[str]) -> list[Line2D]:
    """The legend: only what is in the picture."""
    there = {c for work in works for c in figures.answers[work] if figures.median(work, c)}

    def handle(marker: str, colour: str, label: str, **more) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=colour, label=label, **more)

    handles = [handle("o", OURS, "shmpool", markersize=8)]
    handles += [
        handle("o", colour, label)
        for names, (colour, label) in FAMILIES.items()
        if there.intersection(names)
    ]
    if any(CONTENDERS[contender].better_way_of for contender in filter(_is_peer, there)):
        handles.append(handle("o", INK, "the expert's way", markerfacecolor="none"))
    if "limit" in there:
        handles.append(handle("|", LIMIT, "the machine's limit", markersize=10, markeredgewidth=2))
    return handles


# Memory: a panel a work, a bar a contender.


def _memory(figures: Figures, works: list[str]):
    bars = {
        work: [c for c in figures.answers[work] if figures.median(work, c) is not None]
        for work in works
    }
    heights = [len(contenders) + 1.5 for contenders in bars.values()]
    figure, panels = plt.subplots(
        len(works),
        figsize=(9, 0.23 * sum(heights)),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for axes, (work, contenders) in zip(panels.flat, bars.items(), strict=True):
        values = [figures.median(work, contender) for contender in contenders]
        colours = [_colour(contender) for contender in contenders]
        drawn = axes.barh(range(len(values)), values, color=colours, height=0.65)
        axes.bar_label(drawn, [quantity(v, "bytes") for v in values], padding=4, color=INK)
        axes.set_yticks(range(len(values)), [TITLES[contender] for contender in contenders])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_title(WORKS[work].title, loc="left")
        axes.margins(x=0.12)
    return figure


# Growth.


def _curves(growths: Mapping[str, Mapping[str, Growth]], name: str) -> list[str]:
    return [contender for contender, growth in growths[name].items() if growth.rounds]


def _growth(axes: Axes, growths: Mapping[str, Mapping[str, Growth]], name: str) -> None:
    curve = CURVES[name]
    for contender in _curves(growths, name):
        points = zip(*growths[name][contender].medians, strict=True)
        dashes = "--" if contender == "pool" else "-"  # of the same family as another one
        style = {"color": _colour(contender), "marker": "o", "markersize": 3}
        axes.plot(*points, dashes, label=TITLES[contender], **style)
    for growth in growths.get(curve.beside, {}).values():
        if growth.rounds:
            axes.plot(*zip(*growth.medians, strict=True), color=LIMIT, label=curve.beside)
    medians = growths[name][_curves(growths, name)[0]].medians
    if curve.linear:  # a guide to the eye, through the last point
        x, y = medians[-1]
        ends = [max(medians[0][0], x / 100), x]
        axes.plot(ends, [y * end / x for end in ends], ":", color=INK, label="linear")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _widen(axes)
    if curve.points[-1] < 100:
        ticks = [x for x, _ in medians]
        axes.set_xticks(ticks, map(str, ticks))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(_power_of_ten))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(curve.title, loc="left")
    axes.set_xlabel(curve.x)
    axes.grid()


def _power_of_ten(seconds: float, _position: int) -> str:
    for factor, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= 0.999 * factor:
            return f"{seconds / factor:g} {unit}"
    return f"{seconds / 1e-9:g} ns"


def _widen(axes: Axes) -> None:
    """Show at least two powers of ten, lest noise looks like growth."""
    low, high = axes.get_ylim()
    if high < 100 * low:
        middle = (low * high) ** 0.5
        axes.set_ylim(middle / 10, middle * 10)


def _legend_of(axes: Axes):
    return zip(*axes.get_legend_handles_labels(), strict=True)
