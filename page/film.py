"""Films for people: enlarged without smoothing, and under one of them what was looked back at.

A film grows in fragments, each with an index of its own, so that it can be seen whatever ends it;
when all is well, or at the next start, settle() makes an ordinary mp4 of them.
"""

import base64
import contextlib
import io
import os
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

PANEL = 96  # pixels under the picture
THUMBS = 5
CODEC = {"preset": "ultrafast", "crf": "18", "threads": "1"}
FRAGMENTS = {  # every one of them is handed to the system at once
    "movflags": "frag_keyframe+empty_moov+default_base_moof",
    "flush_packets": "1",
}


class Film:
    """An mp4 that grows frame by frame. Without an encoder there is none, and it says so."""

    def __init__(self, path: Path, fps: int, size: tuple[int, int]) -> None:
        H, W = size
        if H % 2 or W % 2:
            legal = f"{W + W % 2}x{H + H % 2}"
            raise ValueError(f"mp4 needs even sizes, got {W}x{H}; nearest legal size: {legal}")
        self.container = None
        try:
            container = av.open(str(path), "w", options=FRAGMENTS)
            # a key frame ends a fragment: one a second is what a crash can cost
            stream = container.add_stream("libx264", rate=fps, options=CODEC | {"g": str(fps)})
            stream.height, stream.width = size
            stream.pix_fmt = "yuv420p"
        except (OSError, ValueError) as error:
            kept = path.parent / "rgb"
            print(
                f'no {path.name} ({error}): pip install "imageio[pyav]". '
                f"Every frame is kept in {kept}",
                flush=True,
            )
            return
        self.container = container
        self.stream = stream

    def add(self, picture: np.ndarray) -> None:
        """(H, W, 3) uint8."""
        if self.container:
            frame = av.VideoFrame.from_ndarray(picture)
            self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        if self.container:
            container, self.container = self.container, None
            container.mux(self.stream.encode())
            container.close()


def settle(path: Path) -> None:
    """From fragments to an ordinary mp4 with one index; what was cut off in the middle is left out."""
    if not path.exists() or not path.stat().st_size:
        return
    whole = path.with_suffix(".tmp")
    with av.open(str(path)) as source, av.open(str(whole), "w", format="mp4") as target:
        video = source.streams.video[0]
        stream = target.add_stream_from_template(video)
        with contextlib.suppress(av.FFmpegError):
            for packet in source.demux(video):
                if packet.dts is not None:  # the last one is empty
                    packet.stream = stream
                    target.mux(packet)
    os.replace(whole, path)


def enlarge(frame: np.ndarray, times: int) -> np.ndarray:
    """Every pixel becomes a square: a player shall see what the model made, not a filter."""
    return frame.repeat(times, 0).repeat(times, 1)


def memory_panel(width: int, about: dict) -> np.ndarray:
    """(PANEL, width, 3) uint8: the frames that were looked back at, with scores, and the numbers."""
    panel = Image.new("RGB", (width, PANEL), (20, 24, 31))
    draw = ImageDraw.Draw(panel)
    side = min(56, width // THUMBS - 6)
    for k, pick in enumerate(about.get("memory", [])[:THUMBS]):
        x = 4 + k * (width - 4) // THUMBS
        # of what was seen before a walk went on there is none
        if pick["thumb"]:
            thumb = Image.open(io.BytesIO(base64.b64decode(pick["thumb"])))
            panel.paste(thumb.resize((side, side), Image.Resampling.NEAREST), (x, 4))
        score = "sink" if pick["sink"] else f"{pick['score']:.2f}"
        draw.text((x, side + 5), f"f{pick['frame']} {score}", (165, 175, 188))
    draw.text((4, 80), about.get("text", "start"), (255, 255, 255))
    return np.asarray(panel)
