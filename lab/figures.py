"""Figures from what is stored, and from nothing else.

Revisits by arm, ways to remember by place, drift by segment, what is looked back at from above, and
where the time of a segment goes. They need matplotlib, as nothing else does; without it the tables are
still written.
"""

import re
from pathlib import Path

import numpy as np

CURVES = {  # figure -> the command it is from, the keys that are drawn, its title
    "memory": ("memory", r"exact, ([^/]+)/psnr", "PSNR of an exact revisit, dB"),
    "drift": ("drift", r"segment \d+/(.+): psnr", "PSNR by segment, dB"),
    "sharpness": ("drift", r"segment \d+/(.+): sharpness", "sharpness by segment, 1 = truth"),
}
NO_NETWORK = ("frame copied", "frames warped")  # rivals that draw nothing: hatched
LADDER = re.compile(r"(.+): ([\d.]+) ms.*")  # a row of the bench: what, and how long


def blank(title: str, size: tuple[int, int] = (7, 3), **more: str) -> tuple:
    """An empty figure and its axes."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(size)
    return figure, figure.subplots(subplot_kw={"title": title, **more})


def save(figure: object, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", dpi=110)


def plot(
    found: dict[str, dict],  # results of the commands
    ladder: list[list],  # rows of the bench, the release first
    folder: Path,
) -> None:
    """All figures of which something is stored."""
    for name, (command, pattern, title) in CURVES.items():
        curves: dict[str, list[float]] = {}
        for key, values in sorted(found.get(command, {}).get("raw", {}).items()):
            if match := re.fullmatch(pattern, key):
                curves.setdefault(match[1], []).append(np.mean(values))
        if curves:
            figure = bars(curves, title) if name == "memory" else lines(curves, title)
            save(figure, folder / f"{name}.png")
    facts = found.get("retrieval", {}).get("facts")
    if facts:
        save(from_above(facts), folder / "retrieval.png")
    rivals = found.get("rivals", {}).get("facts")
    if rivals:
        save(by_place(rivals["rivals"]), folder / "rivals.png")
    if ladder:
        save(where_time_goes(ladder), folder / "ladder.png")


def bars(curves: dict[str, list[float]], title: str) -> object:
    """One bar for every arm."""
    figure, axes = blank(title)
    for arm, values in curves.items():
        axes.barh(arm, values)
    return figure


def lines(curves: dict[str, list[float]], title: str) -> object:
    """One line for every arm, segment by segment."""
    figure, axes = blank(title)
    for arm, values in curves.items():
        segments = range(1, len(values) + 1)
        axes.plot(segments, values, label=arm)
    axes.legend()
    return figure


def from_above(facts: dict) -> object:
    """A walk: all that the bank holds, what the next views are, and what is chosen for them."""
    title = "the old frames that are looked back at; metres"
    figure, axes = blank(title, (5, 5), aspect="equal")
    # walls, then three groups of arrows on them
    axes.pcolormesh(np.array(facts["solid"]).T, cmap="Greys", vmax=2)
    poses = np.array(facts["poses"])
    groups = {
        "bank": (list(range(facts["bank"])), "silver"),
        "chosen": (facts["chosen"], "tab:blue"),
        "next views": (facts["asks"], "tab:red"),
    }
    for label, (which, colour) in groups.items():
        x, z, yaw = poses[which].T
        ahead = np.sin(np.radians(yaw)), np.cos(np.radians(yaw))
        axes.quiver(x, z, *ahead, color=colour, label=label, scale=18, width=0.006)
    low = poses.min(0) - 3
    high = poses.max(0) + 3
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes.legend(loc="upper right")
    return figure


def by_place(facts: dict[str, dict]) -> object:
    """Ways to remember: a group of bars for each place, with the intervals over worlds."""
    figure, axes = blank("PSNR of what only a memory can know, dB", (9, 3.5))
    width = 0.8 / len(facts)
    left = -0.4 + width / 2
    for arm, fact in facts.items():
        scores = fact["scores"]["bank-only"]
        means = [score["mean"] for score in scores.values()]
        hatch = "//" if arm in NO_NETWORK else None
        at = np.arange(len(means)) + left
        axes.bar(at, means, width, label=arm, hatch=hatch, edgecolor="white")
        # where worlds were too few for an interval there is none
        for x, score in zip(at, scores.values(), strict=True):
            if score["interval"]:
                axes.vlines(x, *score["interval"], color="black", linewidth=0.8)
        left += width
    places = [f"seen again: {place}" for place in scores]
    axes.set_xticks(range(len(places)), places)
    axes.set_ylim(bottom=10)  # another world has 13
    axes.legend(bbox_to_anchor=(1, 1), loc="upper left")
    return figure


def where_time_goes(ladder: list[list]) -> object:
    """Milliseconds of every variant; those with fewer frames a segment are left out."""
    rows = [LADDER.fullmatch(row[0]) for row in ladder]
    times = {row[1]: float(row[2]) for row in rows if row and not row[1].endswith(" new")}
    released = next(iter(times.values()))
    figure, axes = blank("ms per segment; green: saved against the release")
    for name, ms in times.items():
        axes.barh(name, ms, color="tab:gray")
        axes.barh(name, released - ms, left=ms, color="tab:green")
        axes.annotate(f"{ms:.0f} ", (ms, name), va="center", ha="right", color="white")
    axes.invert_yaxis()
    return figure
