"""When which frame is the picture, and who looks at it."""

import contextlib
import io
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
from PIL import Image

WINDOW = 4  # frames that may be on their way to a viewer who has not said that they are drawn
STREAMS = 8  # viewers
KEPT = 400  # frames, ten seconds
NOTES = 32
WAIT = 1.0  # seconds until a viewer hears at least a ping


def jpeg_of(frame: np.ndarray, side: int = 0) -> bytes:
    """(H, W, 3) uint8 -> JPEG; small pictures keep all of their colour."""
    picture = Image.fromarray(frame)
    small = max(frame.shape) <= 256
    picture.thumbnail((side or picture.width, side or picture.height))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=92 if small else 80, subsampling=0 if small else 2)
    return stream.getvalue()


class Screen:
    """A timeline: every frame has the moment from which it is the picture.

    Each viewer takes the newest; nothing queues. Frames and notes share one counter, `serial`.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.frames: deque = deque(maxlen=KEPT)
        self.notes: deque = deque(maxlen=NOTES)
        self.viewers: dict[str, dict] = {}  # who -> what is on its way to whom
        self.serial = 0
        self.end = 0.0  # when the last frame has had its time
        self.stage = ""  # what takes time now: loading, compiling; or why it stopped
        self.seen = time.monotonic()  # when the last viewer left
        self.encode = 0.0  # milliseconds of the last JPEG

    # ---- what there is to see

    def put(
        self, frames: np.ndarray, headers: list[dict], period: float, clear: bool = False
    ) -> None:
        """Show frames evenly, after those that are still to come or instead of them.

        What comes late begins now, and is not followed by a burst.
        """
        with self.changed:
            begin = time.monotonic() if clear else max(self.end, time.monotonic())
            self.end = begin + len(frames) * period
            if clear:
                self.frames.clear()
            for k, (frame, header) in enumerate(zip(frames, headers, strict=True)):
                self.serial += 1
                due = begin + k * period
                entry = {"due": due, "frame": frame, "header": header}
                self.frames.append(entry | {"jpeg": b"", "n": self.serial})
            self.changed.notify_all()

    def note(self, **record: object) -> None:
        with self.changed:
            self.serial += 1
            self.stage = record.get("stage", self.stage)
            self.notes.append((self.serial, record))
            self.changed.notify_all()

    def left(self) -> float:
        """Seconds until the last finished frame has had its time."""
        return max(0.0, self.end - time.monotonic())

    def now(self) -> dict | None:
        """What is to be seen at this moment."""
        with self.changed:
            moment = time.monotonic()
            shown = (entry for entry in reversed(self.frames) if entry["due"] <= moment)
            return next(shown, None)

    # ---- who sees it

    def plays(self, viewer: object) -> bool:
        """The first viewer plays. While there is none, anybody may (curl, tests)."""
        with self.changed:
            return next(iter(self.viewers), viewer) == viewer

    @contextlib.contextmanager
    def seat(self) -> Iterator[str | None]:
        """A place for one stream: the viewer's name, or None where all are taken."""
        viewer = None
        with self.changed:
            if len(self.viewers) < STREAMS:
                viewer = secrets.token_hex(8)
                self.viewers[viewer] = {"unacked": deque(), "sent": 0, "noted": self.serial}
        try:
            yield viewer
        finally:
            with self.changed:
                self.viewers.pop(viewer, None)
                self.seen = time.monotonic()

    def ack(self, viewer: object, shown: float) -> None:
        """This viewer has drawn a frame, and with it all that came before."""
        with self.changed:
            known = isinstance(viewer, str) and viewer in self.viewers
            unacked = self.viewers[viewer]["unacked"] if known else ()
            while unacked and unacked[0] <= shown:
                unacked.popleft()
            self.changed.notify_all()

    def take(self, viewer: str) -> list[tuple[dict, bytes]]:
        """Notes this viewer has not had, and the newest frame unless WINDOW are on their way."""
        records, entry = self.news(viewer)
        if entry:
            # nobody waits for this: of two who ask at once, both may encode
            began = time.monotonic()
            entry["jpeg"] = entry["jpeg"] or jpeg_of(entry["frame"])
            self.encode = 1000 * (time.monotonic() - began)
            records.append((entry["header"] | self.sent(entry, viewer), entry["jpeg"]))
        return records

    def news(self, viewer: str) -> tuple[list[tuple[dict, bytes]], dict | None]:
        """The notes, and the frame that may be sent; soon, or a sign of life."""
        with self.changed:
            mine = self.viewers[viewer]
            until = time.monotonic() + WAIT
            while time.monotonic() < until:
                notes = [(note, b"") for serial, note in self.notes if serial > mine["noted"]]
                entry = self.now()
                free = len(mine["unacked"]) < WINDOW
                fresh = entry if entry and entry["n"] > mine["sent"] and free else None
                if notes or fresh:
                    mine["noted"] = self.serial
                    return notes, fresh
                now = time.monotonic()
                coming = [entry["due"] for entry in self.frames if entry["due"] > now]
                self.changed.wait(max(0.001, min([until, *coming]) - now))
        # a closed tab is noticed by writing to it; while nothing is shown it may become the one that plays
        role = "play" if self.plays(viewer) else "watch"
        return [({"ping": 1, "role": role}, b"")], None

    def sent(self, entry: dict, viewer: str) -> dict:
        """A frame on its way, and what is told with it."""
        with self.changed:
            self.viewers[viewer]["sent"] = entry["n"]
            self.viewers[viewer]["unacked"].append(entry["n"])
            return {
                "n": entry["n"],
                "left": self.left(),
                "role": "play" if self.plays(viewer) else "watch",
            }
