"""Figures from what is stored, and from nothing else.

Revisits by arm, ways to remember by place, drift by segment, what is looked back at from above, and
where the time of a segment goes. They need matplotlib, as nothing else does; without it the tables
are still written.
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
    # a picture of another world scores 13 dB: below is nothing of interest
    axes.set_ylim(bottom=10)
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


# ---- a fault beside the healthy training ---------------------------------------------------

PANELS = {  # a curve's name -> its title; the first of them are of the log, the others of the play
    "critic": "critic's loss",
    "latent_std": "spread of latents",
    "loss": "loss",
    "norm": "gradient norm",
    "psnr": "PSNR in play, dB",
    "sharpness": "sharpness in play",
    "spread": "spread in play",
}
COLOURS = ("black", "tab:red", "tab:blue", "tab:orange", "tab:purple", "tab:green")
SMOOTH = 5  # lines of a log


def curves_of(facts: dict, name: str) -> dict[str, np.ndarray]:
    """Arm -> (n, 2) points of one curve; arms without it are left out."""
    found = {}
    for arm, fact in facts["arms"].items():
        if name in fact["scores"]:
            # of every moment the mean over worlds
            means = np.mean(fact["scores"][name], 1)
            steps = facts["steps"][: len(means)]
            found[arm] = np.column_stack([steps, means])
        elif name in fact.get("log", {}):
            found[arm] = np.array(fact["log"][name])
    return found


def beside_healthy(facts: dict, strips: dict[str, np.ndarray]) -> object:
    """Five curves above, with all arms in each. Below them one view of one world: a row for every
    arm, a column for every moment, and the truth on the left."""
    import matplotlib.figure

    colours = dict(zip(facts["arms"], COLOURS, strict=False))
    heights = [2.6, 1.15 * len(colours)]
    figure = matplotlib.figure.Figure((11, sum(heights)))
    above, below = figure.subfigures(2, height_ratios=heights)
    draw_panels(above, facts, colours)
    draw_strips(below, facts["steps"], strips, colours)
    return figure


def draw_panels(figure: object, facts: dict, colours: dict[str, str]) -> None:
    """The first five curves that there are, side by side."""
    panels = {name: curves for name in PANELS if (curves := curves_of(facts, name))}
    shown = list(panels)[:5]
    every = figure.subplots(1, len(shown), squeeze=False)
    for axes, name in zip(every[0], shown, strict=True):
        for arm, points in panels[name].items():
            draw_curve(axes, points, colours[arm])
        axes.set_title(PANELS[name], fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.17, top=0.9, wspace=0.28)


def draw_curve(axes: object, points: np.ndarray, colour: str) -> None:
    """Few points with marks; many as a faint line, with its running mean on top."""
    if len(points) < 2 * SMOOTH:
        axes.plot(*points.T, "o-", color=colour, markersize=3)
        return
    axes.plot(*points.T, color=colour, alpha=0.2, linewidth=0.8)
    mean = np.convolve(points[:, 1], np.ones(SMOOTH) / SMOOTH, "valid")
    axes.plot(points[SMOOTH - 1 :, 0], mean, color=colour)


def draw_strips(
    figure: object,
    steps: list[int],
    strips: dict[str, np.ndarray],  # arm -> its pictures side by side; and the truth
    colours: dict[str, str],
) -> None:
    """The names of the arms stand on the left, in the colours of their curves."""
    side = len(strips["truth"])
    grid = figure.subplots(len(colours), len(steps) + 1, squeeze=False)
    for row, (arm, colour) in zip(grid, colours.items(), strict=True):
        strip = np.concatenate([strips["truth"], strips[arm]], 1)
        count = strip.shape[1] // side
        for axes, picture in zip(row, np.split(strip, count, 1), strict=False):
            axes.imshow(picture)
        row[0].set_ylabel(arm, color=colour, rotation=0, ha="right", va="center")

    # a training that ended early leaves its last places empty
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    titles = ["truth", *(f"step {step}" for step in steps)]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    figure.subplots_adjust(left=0.25, right=0.8, bottom=0.02, top=0.92, wspace=0.05, hspace=0.05)
