"""The README's one table, and results/README.md around all the other ones.

The texts of results/README.md are results/notes/*.md in the order of their names; a line
`<!-- table:NAME -->` in one of them is where the table of that name goes. A table that no text asks for
follows at the end, but for raw ones.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from engine import weights

MARK = re.compile(r"^<!-- table:([\w:.-]+) -->$", re.M)


class Row(NamedTuple):
    """One line of the README's table: what was measured, what it is compared with, and ours."""

    what: str
    source: str  # the command, whose results are in results/SOURCE.json
    column: str  # of its raw numbers
    compared: dict[
        str, str | float
    ]  # what a reader calls it -> row of the raw numbers, or a number
    ours: str  # row of the raw numbers
    needs: str = ""  # what a run wrote that was as long as `what` says


def revisit(place: str, distance: str) -> Row:
    compared = {
        "another world": f"{place}, floor: other world",
        "an old frame copied": f"{place}, copy nearest",
        "memory off": f"{place}, none",
    }
    what = f"a place seen again {distance}: PSNR, dB"
    return Row(what, "memory", "psnr", compared, f"{place}, camera")


BASE = {"base, 3 steps": "teacher 3", "base, 50 steps": "teacher 50"}
STUDENT = "student 3"
THINNER = {"75 % thinner": "75 %, 33 frames", "50 % thinner": "50 %, 33 frames"}
STREAMED = {"75 % thinner": "75 %, streaming", "50 % thinner": "50 %, streaming"}
FULL = "in place, camera/sharpness after 640"  # of sixteen segments; a quick run has eight
# What anybody could do comes first in every row: copy, do nothing, take the thinner or the slower way.
ROWS = [
    # a place seen again: is the memory used, and is it better than copying?
    revisit("exact", "from the same pose"),
    revisit("0.4 m", "from 0.4 m away"),
    revisit("0.85 m", "from 0.85 m away"),
    revisit("1.9 m", "from 1.9 m away"),
    # does it do what the keys say?
    Row(
        "the keys obeyed: PSNR, dB",
        "action",
        "psnr",
        {"no keys given": "no action", "shuffled keys given": "shuffled actions"},
        "true actions",
    ),
    # what three steps cost and save
    Row("three steps: PSNR, dB", "distill", "psnr", BASE, STUDENT),
    Row("three steps: sharpness", "distill", "sharpness", {"the truth": 1.0} | BASE, STUDENT),
    Row("three steps: ms for 40 frames", "distill", "ms per segment", BASE, STUDENT),
    # 16 segments, each from what the last one made
    Row(
        "640 frames in a known room: dB per 100 frames",
        "drift",
        "dB per 100 frames",
        {"memory off": "in place, none"},
        "in place, camera",
        FULL,
    ),
    Row(
        "640 frames into the unknown: sharpness at the end",
        "drift",
        "sharpness after 640",
        {"the truth": 1.0, "memory off": "exploring, none"},
        "exploring, camera",
    ),
    # the way from latents to frames, and the whole session
    Row("the full decoder: PSNR, dB", "vae", "psnr", THINNER, "Wan2.2, 33 frames"),
    Row("the full decoder: frames per second", "vae", "FPS", STREAMED, "Wan2.2, streaming"),
    Row(
        "play.py, 2 latents at once: frames per second",
        "latency",
        "FPS, one after the other",
        {"wanted": 40.0, "10 latents at once": "tiny"},
        "2 at once",
    ),
    Row(
        "play.py, 2 latents at once: seconds from key to picture",
        "latency",
        "s by the clock",
        {"10 latents at once": "key to photon", "5": "5 at once"},
        "2 at once",
    ),
]


def digits(x: float) -> str:
    """Three of them, without an exponent."""
    if abs(x) >= 100 or x == int(x):
        return f"{x:.0f}"
    return f"{x:.1f}" if abs(x) >= 10 else f"{x:.3g}"


def numbers(result: dict, key: str) -> list[float]:
    """A value for each world; a row that was not measured is not left out in silence."""
    if key not in result["raw"]:
        raise ValueError(
            f"the README's table needs {key!r}, which is not among the results of "
            f"`{result['command']}`: measure it again, with --full"
        )
    return result["raw"][key]


def mean(result: dict, key: str) -> str:
    """Over the worlds that could be measured."""
    values = [x for x in numbers(result, key) if math.isfinite(x)]
    return digits(sum(values) / len(values)) if values else "nan"


def table(found: dict[str, dict]) -> str:
    """The README's table, from the results of the commands that its rows name."""
    lines = ["| what is measured | compared with | here | n |", "|---|---|---|---|"]
    for row in ROWS:
        result = found[row.source]
        if row.needs:
            numbers(result, row.needs)
        cells = []
        for name, other in row.compared.items():
            if isinstance(other, str):
                key = other if "/" in other else f"{other}/{row.column}"
                cells.append(f"{name} {mean(result, key)}")
            else:
                cells.append(f"{name} {digits(other)}")
        ours = f"{row.ours}/{row.column}"
        n = len(numbers(result, ours))
        lines.append(f"| {row.what} | {' · '.join(cells)} | **{mean(result, ours)}** | {n} |")
    return "\n".join(lines)


def page(notes: Sequence[str], tables: dict[str, str]) -> str:
    """All texts with their tables, then the tables that no text asks for."""
    text = "\n".join(notes)
    asked = MARK.findall(text)
    if unknown := sorted(set(asked) - set(tables)):
        raise ValueError(
            f"results/notes ask for tables that were not measured: {', '.join(unknown)}; "
            f"there are {', '.join(sorted(tables))}"
        )
    text = MARK.sub(lambda mark: tables[mark[1]], text)
    rest = [name for name in tables if name not in asked and not name.endswith(":raw")]
    for name in rest:
        text += f"\n## {name}\n\n{tables[name]}\n"
    return text


def write_page(folder: Path, tables: dict[str, str]) -> None:
    """folder/README.md from folder/notes and the tables; nothing, where there are no notes."""
    notes = [path.read_text() for path in sorted((folder / "notes").glob("*.md"))]
    if notes:
        weights.write_text(folder / "README.md", page(notes, tables))
