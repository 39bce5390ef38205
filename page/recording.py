"""What is played becomes a session folder: frames, films and the journal, a chunk at a time.

A chunk waits in memory while an undo may still take it back. Then a thread writes it: its raw
frames, its part of the two films, and at last the line of the journal that says it is certain.
Whatever ends this process, all chunks with a line are kept (page/folder.py). A full disk ends the
recording, never the walk: add() raises OSError, and the folder waits for the next start.
"""

import hashlib
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import av
import numpy as np

import realtime
from page import folder as folders
from page.film import PANEL, Film, enlarge, memory_panel
from page.folder import FILMS, FRAMES, complete, frames_of, state_file
from page.game import FakeSession
from page.start import Start

SNAPSHOT = 10.0  # seconds between two states
SHARE = 50  # a state is saved at most this small a part of the time
SMALLEST = 256  # pixels of a film's side, enlarged until there


class Entry(NamedTuple):
    frames: np.ndarray  # (n, H, W, 3) uint8
    about: dict
    state: int | None  # frames after which the whole state was saved, if it was


class Recording:
    """A session folder in the making."""

    def __init__(
        self,
        out: str,
        start: Start,  # what the walk began with
        image: np.ndarray,  # (H, W, 3) what the recording begins with
        header: dict,  # folder.about, and fps, pose, seed, prompt, truth, trail, walls
    ) -> None:
        self.image = image
        self.fps = header["fps"]
        self.pending: deque[Entry] = deque()
        self.total = 0  # frames, pending ones included
        self.due = 0.0  # when the next state is saved
        self.films: list[Film] = []
        self.raw: BinaryIO | None = None
        self.writer = ThreadPoolExecutor(1)
        self.busy: Future | None = None

        self.folder = folders.claim(out)
        start.save(self.folder / "start.png")
        size = list(image.shape[:2])
        self.journal = folders.new_journal(self.folder, {**header, "size": size})

    # ---- what comes in

    def add(
        self,
        frames: np.ndarray,
        about: dict,
        session: realtime.Session | FakeSession | None = None,  # as it is after these frames
        undoable: int = 0,  # frames that an undo may take back
    ) -> None:
        self.total += len(frames)
        digest = hashlib.sha256(np.ascontiguousarray(frames)).hexdigest()[:16]
        about = {"n": len(frames), "sha": digest, **about}
        state = self.snapshot(session) if session and time.monotonic() >= self.due else None
        self.pending.append(Entry(frames, about, state))

        waiting = sum(len(entry.frames) for entry in self.pending)
        while self.pending and waiting - len(self.pending[0].frames) >= undoable:
            waiting -= len(self.pending[0].frames)
            self.commit()

    def undo(self, n: int) -> int:
        """The last n frames never were: they are still in memory, for that is why they waited.

        Returns how many of them are older than this recording.
        """
        while n > 0 and self.pending:
            entry = self.pending.pop()
            n -= len(entry.frames)
            self.total -= len(entry.frames)
            if entry.state is not None:
                state_file(self.folder, entry.state).unlink(missing_ok=True)
                self.due = 0.0
        return max(n, 0)

    def snapshot(self, session: realtime.Session | FakeSession) -> int:
        """The whole state, from which one can go on; now and then, so that it costs little."""
        began = time.monotonic()
        session.save(state_file(self.folder, self.total))
        now = time.monotonic()
        self.due = now + max(SNAPSHOT, SHARE * (now - began))
        return self.total

    # ---- what is written

    def commit(self) -> None:
        """The oldest chunk is certain. One is being written at most: a slow disk costs time."""
        self.wait()
        self.busy = self.writer.submit(self.write, self.pending.popleft())

    def wait(self) -> None:
        """Until nothing is being written; what went wrong there is raised here."""
        if self.busy:
            busy, self.busy = self.busy, None
            try:
                busy.result()
            except av.FFmpegError as error:
                raise OSError(error.errno, f"no film: {error.strerror}") from error

    def write(self, entry: Entry) -> None:
        """In the thread: frames, then the line that says they are there, then the state they led to."""
        if not self.raw:
            self.open()
        self.write_frames(entry.frames, entry.about)

        # thumbnails are in the film; the journal names their frames
        memory = [
            {key: value for key, value in pick.items() if key != "thumb"}
            for pick in entry.about["memory"]
        ]
        folders.write_line(self.journal, {**entry.about, "memory": memory})
        if entry.state is not None:
            self.trust(entry.state)

    def trust(self, frames: int) -> None:
        """What this state led from is written: older ones are not needed, and they may be large."""
        folders.write_line(self.journal, {"state": frames})
        for path in self.folder.glob("state-*.safetensors"):
            if frames_of(path) < frames:
                path.unlink()

    def open(self) -> None:
        """Frames for the episode, two films for people; all begin with the first picture."""
        H, W = self.image.shape[:2]
        self.times = max(1, SMALLEST // H)
        self.raw = open(self.folder / FRAMES, "wb")
        height, width = H * self.times, W * self.times
        sizes = (height, width), (height + PANEL, width)
        self.films = [
            Film(self.folder / name, self.fps, size)
            for name, size in zip(FILMS, sizes, strict=True)
        ]
        self.write_frames(self.image[None], {})

    def write_frames(self, frames: np.ndarray, about: dict) -> None:
        """Raw, and enlarged into both films."""
        panel = memory_panel(frames.shape[2] * self.times, about)
        for frame in frames:
            self.raw.write(frame.tobytes())
            big = enlarge(frame, self.times)
            self.films[0].add(big)
            self.films[1].add(np.concatenate([big, panel]))
        self.raw.flush()

    # ---- how it ends

    def close(self, session: realtime.Session | FakeSession) -> list[dict]:
        """Write what is pending and make the folder whole. Returns its chunks."""
        try:
            while self.pending:
                self.commit()
            self.wait()
            if self.raw:
                self.last_state(session)
                for file in (*self.films, self.raw):
                    file.close()
            chunks = complete(self.folder)
        finally:
            self.abandon()
        return chunks

    def last_state(self, session: realtime.Session | FakeSession) -> None:
        """Where one goes on. A model that broke may have none: then an older one is taken."""
        try:
            self.trust(self.snapshot(session))
        except (RuntimeError, ValueError) as error:
            print(f"the state at the end could not be saved: {error}", flush=True)

    def abandon(self) -> None:
        """Let go of the folder as it is: what was written is completed at the next start."""
        self.writer.shutdown()
        self.pending.clear()
        for file in (*self.films, self.raw, self.journal):
            try:
                if file:
                    file.close()
            except (OSError, av.FFmpegError):
                continue  # what could not be written before cannot be written now
