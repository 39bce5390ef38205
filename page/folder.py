"""The session folder: claimed, completed, recovered.

    while recording    session.jsonl   what will be in session.json, a line when it is certain
                       frames.tmp      raw frames; play.mp4, play_memory.mp4 in fragments
                       state-N.safetensors    the whole state after N frames, a recent one
    when complete      an episode (dataset/episode.py) with play.mp4, play_memory.mp4, start.png,
                       session.json and state.safetensors

Completing needs nothing but the folder, so a recording that was killed, or whose disk was full, is
completed at the next start exactly as a recording that ended well. Its journal is locked while
somebody writes; what nobody holds is what somebody lost. _DONE comes last: who sees it sees all.
"""

import argparse
import contextlib
import glob
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch

import camera
from dataset import episode, prompt
from dataset.episode import Episode
from engine import cli, parts, weights
from engine.weights import write_text
from memory import POLICIES
from page.film import settle
from page.start import player_cameras

SEEDS = 1 << 40  # they are multiplied by a million, and must stay 64-bit numbers
JOURNAL = "session.jsonl"
FRAMES = "frames.tmp"
FILMS = ("play.mp4", "play_memory.mp4")
FARTHEST = 1e9  # metres, degrees, keys: nothing in a walk is larger
MOST_THREADS = 256  # of a stranger's session: each of them would be started
FLAGS = (  # what a replay needs to be the same again
    "fake",
    "preset",
    "weights",
    "vae",
    "steps",
    "guidance",
    "new",
    "device",
    "dtype",
    "int8",
    "size",
    "view",
)

SESSION = {  # what every session.json has
    "flags": dict,
    "seed": int,
    "prompt": str,
    "fps": int,
    "trail": list,
    "poses": list,
    "keyboard": list,
    "mouse": list,
    "chunks": list,
    "versions": dict,
    "weights_sha": dict,
}
CHUNK = {"n": int, "policy": str, "sha": str}
HEADER = {"size": list, "pose": list, "flags": dict, "fps": int, "prompt": str, "trail": list}
ROWS = {"keyboard": 6, "mouse": 2, "poses": 5, "trail": 5}  # numbers in each


# ---- whose it is -------------------------------------------------------------------------------------------


def claim(out: str) -> Path:
    """--out or runs/play-<time>, with a number where that exists: nothing is ever overwritten."""
    base = Path(out) if out else cli.beside("runs", time.strftime("play-%Y%m%d-%H%M%S"))
    if base.name in ("", "..") or base.is_file():
        raise ValueError(f"--out must name a new folder, as in runs/walk, got {out}")
    base.parent.mkdir(parents=True, exist_ok=True)
    for k in range(1, 10_000):
        path = base.with_name(base.name + (f"-{k}" if k > 1 else ""))
        # looking first and making later would give one folder to two players
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise ValueError(f"{base}-2 to {base}-9999 exist: pass another --out")


def hold(journal: BinaryIO) -> bool:
    """Lock an open journal for as long as it is open; False if another process writes it."""
    try:
        import fcntl

        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False  # held; or nobody can tell here, and nothing is completed unasked
    return True


def new_journal(folder: Path, header: dict) -> BinaryIO:
    """Locked before it has its name: nobody takes it for one that was lost."""
    draft = folder / f"{JOURNAL}.new"
    journal = open(draft, "xb")
    hold(journal)
    write_line(journal, header)
    os.replace(draft, folder / JOURNAL)
    return journal


def write_line(journal: BinaryIO, record: dict) -> None:
    """Handed to the system at once: it survives whatever happens to this process."""
    journal.write(json.dumps(record).encode() + b"\n")
    journal.flush()


def files_played(args: argparse.Namespace) -> list[Path]:
    """The weight files of a walk: the model's, and its encoder's and decoder's."""
    if args.fake or args.weights in ("", "random"):
        return []
    root = Path(args.weights)
    vaes = {parts.vae_of(root, args.preset, name) for name in ("full", args.vae)}
    return [weights.find(parts.model_of(root)), *sorted(vaes)]


def about(args: argparse.Namespace) -> dict:
    """What a replay needs to be the same again."""
    return {
        "argv": sys.argv[1:],
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "weights_sha": {file.name: weights.hash_of(file) for file in files_played(args)},
        "flags": {name: getattr(args, name) for name in FLAGS},
    }


def as_many_threads(recorded: dict) -> None:
    """As it was played: a sum that other threads share is rounded otherwise."""
    threads = recorded["versions"].get("threads")
    if type(threads) is int and 1 <= threads <= MOST_THREADS:
        torch.set_num_threads(threads)


# ---- what a session says -----------------------------------------------------------------------------------


def session_of(folder: Path, name: str = "session.json") -> dict:
    """What a session file says, if it says all that is asked of it: it may come from a stranger."""
    path = folder / name
    with judging(path):
        if not path.is_file():  # a pipe could be read for ever
            raise ValueError("no regular file")
        session = json.loads(path.read_text())
        check_session(session)
    return session


@contextlib.contextmanager
def judging(path: Path) -> Iterator[None]:
    """Whatever is wrong with what a file says becomes one line that names the file."""
    try:
        yield
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        problem = cli.printable(str(error) or type(error).__name__)
        raise ValueError(f"{path} is damaged: {problem}") from error


def check_kinds(found: object, kinds: dict[str, type], what: str = "it") -> None:
    """An object that has all of these."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} must be an object")
    for key, kind in kinds.items():
        if not isinstance(found.get(key), kind) or found[key] is True:
            raise ValueError(f"{what} must have {key}, as {kind.__name__}")


def check_rows(session: dict, *names: str) -> None:
    """Rows of as many finite numbers as there are in an action or a pose."""
    for name in names:
        width = ROWS[name]
        rows = np.array(session[name] or np.zeros((0, width)), np.float64)
        if rows.shape[1:] != (width,) or not (abs(rows) < FARTHEST).all():
            raise ValueError(f"{name} must be rows of {width} numbers")


def check_scene(truth: dict) -> None:
    """A world that can be drawn again."""
    check_kinds(truth, {"scene": dict}, "a world")
    for problem in episode.problems_of_scene(truth, truth.get("view")):
        raise ValueError(problem)


def check_session(session: object) -> None:
    """All that a replay, or going on, will ask for."""
    check_kinds(session, SESSION)
    check_rows(session, *ROWS)
    if not 1 <= session["fps"] <= 240:
        raise ValueError(f"fps must be 1 to 240, not {session['fps']!r:.20}")
    if not 0 <= session["seed"] <= SEEDS:
        raise ValueError(f"seed must be 0 to {SEEDS}")

    # every action leads to a pose, and the first pose is where it began
    F = len(session["keyboard"])
    if len(session["mouse"]) != F or len(session["poses"]) != F + 1:
        raise ValueError("keyboard, mouse and poses have different lengths")

    for chunk in session["chunks"]:
        check_kinds(chunk, CHUNK, "every chunk")
        if chunk["policy"] not in POLICIES:
            raise ValueError(f"no policy is called {chunk['policy']!r:.40}")
    if sum(chunk["n"] for chunk in session["chunks"]) != F or F == 0:
        raise ValueError("its chunks have another length than its actions")
    if session.get("state") is not None:
        check_kinds(session, {"state": int})


def check_journal(records: list) -> None:
    """The same of what was cut off: a header, then chunks and states."""
    header, *rest = records
    check_kinds(header, HEADER, "its header")
    check_rows({"poses": [header["pose"]]}, "poses")
    check_kinds(header["flags"], {"view": str}, "its header's flags")
    sides = header["size"]
    if len(sides) != 2 or not all(isinstance(side, int) and 0 < side < 10_000 for side in sides):
        raise ValueError("its header must have size, as height and width")
    for key in ("truth", "walls"):
        if header.get(key) is not None:
            check_kinds(header, {key: dict}, "its header")
            check_scene(header[key])

    # a chunk is as many frames as it has actions, and its poses are those after each
    for record in rest:
        if isinstance(record, dict) and "state" in record:
            check_kinds(record, {"state": int})
            continue
        check_kinds(record, {**CHUNK, "keyboard": list, "mouse": list, "poses": list}, "a chunk")
        check_rows(record, "keyboard", "mouse", "poses")
        if not {len(record[key]) for key in ("keyboard", "mouse", "poses")} == {record["n"]}:
            raise ValueError("a chunk has other numbers of actions than of frames")


# ---- what is certain ---------------------------------------------------------------------------------------


def read_journal(folder: Path) -> tuple[dict, list[dict], list[int]]:
    """Header, chunks and states (frames after which they were taken), as far as all of it was written."""
    lines = (folder / JOURNAL).read_bytes().split(b"\n")[:-1]  # the last one is empty, or cut off
    records = []
    with contextlib.suppress(ValueError, RecursionError):
        for line in lines:
            records.append(json.loads(line))
    if not records:
        return {}, [], []

    # a chunk counts if its frames are there; they were written first
    with judging(folder / JOURNAL):
        check_journal(records)
    header, *rest = records
    H, W = header["size"]
    frames = folder / FRAMES
    there = frames.stat().st_size // (H * W * 3) - 1 if frames.exists() else 0
    chunks: list[dict] = []
    states = []
    total = 0
    for record in rest:
        if "state" in record:
            states.append(record["state"])
        elif total + record["n"] > there:
            break
        else:
            chunks.append(record)
            total += record["n"]
    return header, chunks, states


def state_file(folder: Path, frames: int) -> Path:
    return folder / f"state-{frames}.safetensors"


def frames_of(path: Path) -> int:
    """N of state-N.safetensors."""
    return int(path.stem.removeprefix("state-"))


# ---- whole again -------------------------------------------------------------------------------------------


def complete(folder: Path) -> list[dict]:
    """Make a folder whole out of what its journal says. Returns the chunks: none, if none was written."""
    header, chunks, states = read_journal(folder)
    if not chunks:
        discard(folder)
        return []

    rows = {}
    for key in ("keyboard", "mouse", "poses"):
        rows[key] = [row for chunk in chunks for row in chunk.pop(key)]
    rows["poses"].insert(0, header["pose"])
    save_episode(folder, header, rows)
    for name in FILMS:
        # an mp4 that cannot be mended is no reason to lose the rest
        with contextlib.suppress(av.FFmpegError):
            settle(folder / name)

    inner = ("pose", "size", "walls")
    session = {name: value for name, value in header.items() if name not in inner}
    session["state"] = choose_state(folder, states)
    write_text(folder / "session.json", json.dumps({**session, **rows, "chunks": chunks}))

    (folder / "episode/_DONE").replace(folder / "_DONE")
    (folder / "episode").rmdir()
    clean(folder)
    return chunks


def choose_state(folder: Path, states: list[int]) -> int | None:
    """The newest that exists becomes state.safetensors; who goes on from it walks the rest again."""
    final = folder / "state.safetensors"
    for frames in reversed(states):
        if state_file(folder, frames).exists():
            os.replace(state_file(folder, frames), final)
            return frames
    return states[-1] if states and final.exists() else None  # chosen before this was cut off


def save_episode(folder: Path, header: dict, rows: dict[str, list]) -> None:
    """The folder as a training clip, but for the mark that it is whole."""
    H, W = header["size"]
    keyboard, mouse, poses = (np.array(rows[key]) for key in ("keyboard", "mouse", "poses"))
    T = len(poses)

    # where the free step leads elsewhere, a wall changed it
    steps = zip(rows["poses"], rows["keyboard"], rows["mouse"], strict=False)
    free = np.array([camera.step_pose(*step) for step in steps])
    contact = np.abs(free - poses[1:])[:, :3].max(1) > 1e-3

    # frame T−1 leads nowhere: its action is a repeat, and not valid
    keyboard = np.concatenate([keyboard, keyboard[-1:]])
    mouse = np.concatenate([mouse, mouse[-1:]])
    meta = {
        "source": "play",
        "view": header["flags"]["view"],
        "metric": True,
        "action_source": "engine",
        "fps": header["fps"],
    }
    c2w = player_cameras(header["flags"]["view"], header["walls"], torch.from_numpy(poses))
    clip = Episode(
        np.memmap(folder / FRAMES, np.uint8, "r", shape=(T, H, W, 3)),
        c2w.float().numpy(),
        np.tile(camera.intrinsics(H, W).numpy(), (T, 1)),
        keyboard.astype(np.uint8),
        mouse.astype(np.float32),
        np.arange(T) < T - 1,
        np.append(contact, False),
        poses.astype(np.float32),
        prompt.caption(header["prompt"] or "a place", keyboard, mouse, poses, "play"),
        meta | (header["truth"] or {}),
    )
    written = episode.write_episode(folder / "episode", clip)
    for file in written.iterdir():
        if file.name != "_DONE":
            there = folder / file.name
            if there.is_dir():  # of an attempt that was cut off, too
                shutil.rmtree(there)
            os.replace(file, there)


def clean(folder: Path) -> None:
    """What is only needed while recording."""
    leftovers = [folder / FRAMES, *folder.glob("*.tmp"), *folder.glob("state-*.safetensors")]
    for path in [*leftovers, folder / JOURNAL]:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """A folder in which nothing was recorded, unless it holds something that is not ours."""
    clean(folder)
    for name in ("start.png", *FILMS):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def recover(out: str) -> None:
    """Complete what was cut off: folders of this name, or of the default one, that nobody is writing."""
    base = Path(out) if out else cli.beside("runs", "play-")
    for journal in sorted(base.parent.glob(f"{glob.escape(base.name)}*/{JOURNAL}")):
        folder = journal.parent
        if not journal.is_file():  # a pipe could be read for ever
            continue
        with open(journal, "rb+") as file:
            if not hold(file):
                continue
            if (folder / "_DONE").exists():
                clean(folder)
                continue
            try:
                chunks = complete(folder)
            except (OSError, ValueError, KeyError) as error:
                print(f"{folder} was cut off and cannot be completed yet: {error}", flush=True)
                continue
        if chunks:
            frames = sum(chunk["n"] for chunk in chunks)
            print(f"{folder} was cut off; completed with {frames} frames", flush=True)
