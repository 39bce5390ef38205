"""What is claimed, and how it is judged.

One line, one claim:

    where the paper speaks of it | predicted before the run, and the unit | claim | column: row

Column and row are those of a run, with a value for each world; `row - other` and `row / other` are
paired by world. "Table 2 says 31.84" is the paper's own number; "says exactly": nothing but its
digits will do. M0 to M11 are the measures of our own suite. "needs ..." names hardware that was not
there: such a claim is not measured. Any other row or column that a run did not write is an error,
unless the run itself said why it left it out.
"""

import difflib
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from lab import stats

Raw = dict[str, list[float]]  # "row/column" -> one value per world

# May the measures be trusted? Fakes have to be ranked, and clean frames found where they were taken.
SANITY = """
  M0 | >= 1        | measures that rank fakes as expected | as expected: every measure
  M0 | <= 0.25 deg | registration of clean frames, deg    | deg: registration, median
  M0 | <= 0.01 m   | registration of clean frames, m      | m: registration, median
"""

# Is the memory used? Come back to the same view, or to one beside it. Bank-only: pixels that an old
# frame saw and the last 56 frames did not; registered: with the error of the pose taken out.
MEMORY = """
  M1   | >= 1 dB   | exact, bank-only: memory adds  | registered bank-only: exact, camera - exact, none
  M1   | >= 1 dB   | 0.4 m, bank-only: memory adds  | registered bank-only: 0.4 m, camera - 0.4 m, none
  M1   | >= 1 dB   | 0.85 m, bank-only: memory adds | registered bank-only: 0.85 m, camera - 0.85 m, none
  M1   | >= 1 dB   | 1.9 m, bank-only: memory adds  | registered bank-only: 1.9 m, camera - 1.9 m, none
  M1   | >= 6 dB   | exact, all pixels: memory adds | psnr: exact, camera - exact, none
  M1   | >= 7 dB   | 0.4 m, all pixels: memory adds | psnr: 0.4 m, camera - 0.4 m, none
  M1   | >= 5 dB   | 0.85 m, all: memory adds       | psnr: 0.85 m, camera - 0.85 m, none
  M1   | >= 3 dB   | 1.9 m, all pixels: memory adds | psnr: 1.9 m, camera - 1.9 m, none
  §3.2 | dB        | exact: memory - copying        | psnr: exact, camera - exact, copy nearest
  §3.2 | >= 3 dB   | 0.4 m: memory - copying        | psnr: 0.4 m, camera - 0.4 m, copy nearest
  §3.2 | >= 3 dB   | 0.85 m: memory - copying       | psnr: 0.85 m, camera - 0.85 m, copy nearest
  §3.2 | >= 3 dB   | 1.9 m: memory - copying        | psnr: 1.9 m, camera - 1.9 m, copy nearest
  M1   | >= 0.5 x  | exact: gain / oracle warp's    | gain / the oracle's: exact, camera
  M1   | >= 0.5 x  | 0.4 m: gain / oracle warp's    | gain / the oracle's: 0.4 m, camera
  M1   | >= 0.5 x  | 0.85 m: gain / oracle warp's   | gain / the oracle's: 0.85 m, camera
  M1   | >= 0.5 x  | 1.9 m: gain / oracle warp's    | gain / the oracle's: 1.9 m, camera
  M1   | m         | exact: drawn from so far off   | m: exact, camera
  M1   |           | exact: lost frames             | lost: exact, camera
  M1   | m         | 0.4 m: drawn from so far off   | m: 0.4 m, camera
  M1   |           | 0.4 m: lost frames             | lost: 0.4 m, camera
  M1   | m         | 0.85 m: drawn from so far off  | m: 0.85 m, camera
  M1   |           | 0.85 m: lost frames            | lost: 0.85 m, camera
  M1   | m         | 1.9 m: drawn from so far off   | m: 1.9 m, camera
  M1   |           | 1.9 m: lost frames             | lost: 1.9 m, camera
  M2   | > 0 dB    | back from a bank: memory adds  | 2 W apart: from a bank, camera - from a bank, none
  M2   | > 0 dB    | back from a frame: memory adds | 2 W apart: from a frame, camera - from a frame, none
  M2   | W         | back over 8 W: half-life       | half-life: over 8 W from a bank, camera
  M3   | 0.8-1.2 x | way there / commanded          | travelled / commanded: from a bank, camera
  M3   | <= 0.1 m  | from home at the end, m        | m: from a bank, camera
  M3   | <= 2 deg  | from home at the end, deg      | deg: from a bank, camera
  §3.2 | <= 1.5 dB | exact: VAE ceiling - memory    | psnr: exact, VAE ceiling - exact, camera
  M11  | > 0 dB    | reliance on the memory         | psnr bank-only: exact, camera - exact, zeros
  M11  | >= 0.7    | adoption of a foreign memory   | adoption: exact, other world
"""

# Other things in the place of the memory, and other ways to know what was there; bank-only pixels.
RIVALS = """
  §3.2 | -0.5-0.5 dB | 0.4 m: last frames - none | psnr bank-only: 0.4 m, last frames - 0.4 m, none
  §3.2 | >= 5 dB | 0.4 m: retrieval - pooled     | psnr bank-only: 0.4 m, retrieval - 0.4 m, pooled
  §3.2 | -1-1 dB | exact: warp cache - retrieval | psnr bank-only: exact, warp cache - exact, retrieval
  §3.2 | >= 1 dB | 0.85 m: warp cache - retrieval | psnr bank-only: 0.85 m, warp cache - 0.85 m, retrieval
  §3.2 | >= 2 dB | 1.9 m: warp cache - retrieval | psnr bank-only: 1.9 m, warp cache - 1.9 m, retrieval
  §3.2 | 1-1.6 x | a segment's time: retrieval / none | ms: retrieval / none
"""

# Does a long rollout keep to the world? In place it looks round a room that the bank knows.
DRIFT = """
  §3.1 | >= -0.5 dB/100 frames | in place, memory on: slope | dB per 100 frames: in place, camera
  §3.1 | dB/100 frames | in place, memory off: slope       | dB per 100 frames: in place, none
  §3.3 | 0.85-1.15 x   | exploring: sharpness after 256    | sharpness after 256: exploring, camera
  §3.3 | 0.85-1.15 x   | exploring: sharpness after 640    | sharpness after 640: exploring, camera
  M6   |               | exploring: TWFD around frame 256  | exploring, camera: TWFD: segment 07
  M6   |               | exploring: TWFD around frame 640  | exploring, camera: TWFD: segment 16
  M4   | frames        | in place: until lost, or the end  | frames until lost: in place, camera
"""

# A start picture, and a minute to where nobody has been.
EXPLORE = """
  M4 | >= 0.6 x | 256 frames out: sharpness            | sharpness after 256: 10 at once
  M4 | >= 0.6 x | 640 frames out: sharpness            | sharpness after 640: 10 at once
  M4 | x        | 256 frames out: sharpness of the VAE | sharpness of the VAE after 256: 10 at once
  M4 | x        | 640 frames out: sharpness of the VAE | sharpness of the VAE after 640: 10 at once
  M4 | x        | 640 frames out: sharpness, 5 at once | sharpness after 640: 5 at once
  M4 | x        | 640 frames out: sharpness, 2 at once | sharpness after 640: 2 at once
"""

# Do keys do what they say? Shuffled actions also have every turn reversed.
ACTION = """
  §3.1 | >= 3 dB   | true minus shuffled actions        | psnr: true actions - shuffled actions
  M5   | 0.9-1.1 x | gain: turn                         | gain: turn
  M5   | 0.9-1.1 x | gain: move                         | gain: move
  M5   | >= 0.9    | KCtrl: opposite keys that both act | mean: KCtrl
"""

# What a part is worth: for models that were trained without it.
ABLATION = """
  §3 | dB                | revisit                      | psnr bank-only: memory
  §3 | dB                | revisit, memory switched off | psnr bank-only: no memory
  §3 | dB | revisit 800 latents later minus at once | psnr: memory, 800 latents later - memory
  §3 | dB/100 frames     | in place, slope              | dB per 100 frames: in place
  §3 | levels/100 frames | in place, colours            | grey levels per 100 frames: in place
  §3 | frames            | in place, until lost         | frames until lost: in place
  §3 | dB                | true minus shuffled actions  | psnr: true actions - shuffled actions
  §3 | deg               | pose error: turn             | relative pose error: turn
  §3 | m                 | pose error: move             | relative pose error: move
"""

# Three steps instead of fifty.
DISTILL = """
  §3.3 | -0.5-0.5 dB | student at 3 - teacher at 50, seen    | psnr seen: student 3 - teacher 50
  §3.3 | > 0 dB      | student - teacher, both at 3          | psnr: student 3 - teacher 3
  M6   | >= 0.7 x    | spread of seeds / teacher's, unseen   | rms, unseen: student 3 / teacher 50
  M6   | >= 1 x      | sharpness / teacher's at 50           | sharpness: student 3 / teacher 50
  M6   | x           | sharpness / guided teacher's at 50    | sharpness: student 3 / teacher 50, guided
  §3.3 | <= 1.1 x    | TWFD / teacher's at 50                | TWFD: student 3 / teacher 50
  §3.3 | 10-17 x     | segment time: teacher at 50 / student | ms per segment: teacher 50 / student 3
"""

# Disturbed: a float rollout that was pushed as far once, after its first segment.
INT8 = """
  §3.4 | >= 25 dB | velocity SQNR at sigma 0.5          | sigma 0.5: velocity SQNR dB
  M7   | >= 0 dB  | nearness to float: int8 - disturbed | SQNR, segment 3: int8 - disturbed
"""

# Decoders with a half and a quarter of the channels.
VAE = """
  Table 2 says 33.79 | >= 30 dB   | Wan2.2: PSNR         | psnr: Wan2.2, 33 frames
  Table 2 says 31.84 | dB         | 50 %: PSNR           | psnr: 50 %, 33 frames
  Table 2 says 31.14 | dB         | 75 %: PSNR           | psnr: 75 %, 33 frames
  Table 2 says 0.99  | >= 0.93    | Wan2.2: SSIM         | ssim: Wan2.2, 33 frames
  Table 2 says 0.99  |            | 50 %: SSIM           | ssim: 50 %, 33 frames
  Table 2 says 0.99  |            | 75 %: SSIM           | ssim: 75 %, 33 frames
  Table 2 says 1.95  | <= 2.45 dB | 50 %: PSNR lost      | psnr: Wan2.2, 33 frames - 50 %, 33 frames
  Table 2 says 2.65  | <= 3.15 dB | 75 %: PSNR lost      | psnr: Wan2.2, 33 frames - 75 %, 33 frames
  Table 2 says 2.53  | >= 2.5 x   | 50 %: streams faster | s: Wan2.2, streaming / 50 %, streaming
  Table 2 says 5.85  | >= 4 x     | 75 %: streams faster | s: Wan2.2, streaming / 75 %, streaming
  §3.4               | >= 400 FPS | Wan2.2: streams      | FPS: Wan2.2, streaming
  §3.4               | >= 100 FPS | 75 %, float32: streams | FPS: 75 %, float32, streaming
  Table 2 says 0.99  | s | Wan2.2: encode + decode, 17 frames at 720p | needs a GPU
  Table 2 says 0.52  | s | 50 %: encode + decode, 17 frames at 720p   | needs a GPU
  Table 2 says 0.35  | s | 75 %: encode + decode, 17 frames at 720p   | needs a GPU
  Table 2 says 0.76  | s | Wan2.2: decode, 17 frames at 720p          | needs a GPU
  Table 2 says 0.3   | s | 50 %: decode, 17 frames at 720p            | needs a GPU
  Table 2 says 0.13  | s | 75 %: decode, 17 frames at 720p            | needs a GPU
"""

# Of what the old frames could show, how much do the five chosen ones?
RETRIEVAL = """
  §3.2 | >= 0.75    | coverage@5 of the camera rule   | coverage@5: camera, uniform
  §3.2 | > 0        | coverage@5: camera minus recent | coverage@5: camera, uniform - recent
  §3.4 | -0.05-0.05 | coverage@5: sampled minus exact | coverage@5: camera, uniform - camera, exact
"""

# Does a memory from long ago still count?
ROPE = """
  Eq. 7 | <= 0        | likeness, sigma_theta 0.8 - 0 | likeness: sigma_theta 0.8 - sigma_theta 0.0
  §3.2  | -0.5-0.5 dB | revisit 800 latents later     | psnr: 800 latents later - 0 latents later
"""

# Two experts beside one dense model that was trained as long.
MOE = """
  §3.5 | > 0 dB | experts - dense, first person          | psnr: moe-0.9, first - dense, first
  §3.5 | > 0 dB | experts - dense, first person, actions | effect: moe-0.9, first - dense, first
  §3.5 | > 0 dB | experts - dense, third person          | psnr: moe-0.9, third - dense, third
  §3.5 | > 0 dB | experts - dense, third person, actions | effect: moe-0.9, third - dense, third
"""

# How fast, and how long from a key to the light that it changes?
LATENCY = """
  Table 1 says 40            | FPS | 5B, 8+1 GPUs, all           | needs 8+1 GPUs
  Table 1 says 27.38         | FPS | 5B, 8+1 GPUs, no INT8       | needs 8+1 GPUs
  Table 1 says 6.6           | FPS | 5B, 8+1 GPUs, CPU retrieval | needs 8+1 GPUs
  Table 1 says exactly 25.79 | FPS | no LightVAE: 40 in 1.551 s  | FPS at 1.551 s: arithmetic
  §3.1 | 905-906 TF  | a 5B segment as released   | TF as released: arithmetic
  §3.4 | -0.5-0.5 dB | 5 latents at once minus 10 | psnr: 5 latents at once - 10 latents at once
  §3.4 | -0.5-0.5 dB | 2 latents at once minus 10 | psnr: 2 latents at once - 10 latents at once
  §3.4 | >= 200 FPS  | tiny here, part by part    | FPS, one after the other: tiny
  M9   | 0.9-1.1 x   | key to photon: clock / formula | clock / formula: key to photon
  M9   | <= 0.25 s   | key to photon, 2 latents at once | s by the clock: 2 at once
  M9   | >= 40 FPS   | made, 2 latents at once    | FPS, one after the other: 2 at once
"""


class Claim(NamedTuple):
    """What the paper says, what we predicted, and which numbers of a run decide."""

    name: str
    where: str  # the paper's section, or our own measure
    paper: float | None  # what the paper says
    exact: bool  # only the paper's digits will do
    predicted: str  # ">= 6", "<= 2", "> 0", "0.9-1.1", or "" for none
    unit: str
    measure: str  # "column: row", "column: row - other", "column: row / other", "needs HARDWARE"


LINE = re.compile(r" *(.+?) *\| *(.*?) *\| *(.+?) *\| *(.+)")
PAPER = re.compile(r"(.+?)(?: says (exactly )?([\d.]+))?")
WISH = re.compile(r"((?:>=|<=|>) -?[\d.]+|-?[\d.]+-[\d.]+)? ?(.*)")
MEASURE = re.compile(r"(.+): (.+?)(?: ([-/]) (.+))?")


def claim(line: str) -> Claim:
    """A line of a table, read from left to right."""
    source, wish, name, measure = LINE.fullmatch(line.rstrip()).groups()
    where, exact, paper = PAPER.fullmatch(source).groups()
    predicted, unit = WISH.fullmatch(wish).groups()
    number = float(paper) if paper else None
    return Claim(name, where, number, bool(exact), predicted or "", unit, measure)


def table(text: str) -> list[Claim]:
    return [claim(line) for line in text.splitlines() if line]


CLAIMS = {
    "sanity": table(SANITY),
    "memory": table(MEMORY),
    "rivals": table(RIVALS),
    "drift": table(DRIFT),
    "explore": table(EXPLORE),
    "action": table(ACTION),
    "distill": table(DISTILL),
    "int8": table(INT8),
    "vae": table(VAE),
    "retrieval": table(RETRIEVAL),
    "rope": table(ROPE),
    "moe": table(MOE),
    "latency": table(LATENCY),
    "ablation": table(ABLATION),
}


# ---- judging ------------------------------------------------------------------------------


def nearest(wrong: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, sorted(known), 1, 0)
    return close[0] if close else "nothing"


def look_up(claim: Claim, row: str, column: str, raw: Raw) -> list[float]:
    """The values of a cell; or an error with the name that comes nearest."""
    if f"{row}/{column}" in raw:
        return raw[f"{row}/{column}"]
    rows = {key.split("/", 1)[0] for key in raw}
    if row not in rows:
        raise ValueError(
            f"the claim {claim.name!r} asks for the row {row!r}, which the run did not write; "
            f"the nearest is {nearest(row, rows)!r}"
        )
    columns = {key.split("/", 1)[1] for key in raw if key.split("/", 1)[0] == row}
    raise ValueError(
        f"the claim {claim.name!r} asks for the column {column!r} of {row!r}, which the run did "
        f"not write; the nearest is {nearest(column, columns)!r}"
    )


def left_out(claim: Claim, raw: Raw, absent: dict[str, str]) -> bool:
    """Did the run say that it leaves a row or column of this claim out? "*" is all the rest."""
    column, row, _, other = MEASURE.fullmatch(claim.measure).groups()
    names = [name for name in (column, row, other) if name in absent]
    keys = {f"{name}/{column}" for name in (row, other) if name}
    return bool(names) or ("*" in absent and not keys <= set(raw))


def values(claim: Claim, raw: Raw) -> list[float]:
    """What a claim is about, a number per world; a difference or ratio is taken world by world."""
    column, row, sign, other = MEASURE.fullmatch(claim.measure).groups()
    x = look_up(claim, row, column, raw)
    if sign:
        pairs = list(zip(x, look_up(claim, other, column, raw), strict=True))
        x = [a - b if sign == "-" else a / b for a, b in pairs]
    return [v for v in x if math.isfinite(v)]


def unmeasured(claim: Claim) -> dict:
    """A claim as it is stored before the run."""
    empty = {"value": None, "interval": None, "n": 0, "verdict": "not measured"}
    return claim._asdict() | empty


def judge(claim: Claim, raw: Raw, absent: dict[str, str]) -> dict:
    """Value, interval and verdict: met, missed, unclear, reported, or not measured."""
    if claim.measure.startswith("needs ") or left_out(claim, raw, absent):
        return unmeasured(claim)
    x = values(claim, raw)
    if not x:
        raise ValueError(f"the claim {claim.name!r} has no finite value: {claim.measure}")
    mean = sum(x) / len(x)
    word, interval = stats.verdict(x, claim.predicted)
    if claim.exact:
        word = "met" if round(mean, 2) == claim.paper else "missed"
    found = {"value": mean, "interval": interval, "n": len(x), "verdict": word}
    return claim._asdict() | found
