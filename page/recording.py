"""The session folder: a start picture, what was played from it, and how to play it again."""

import argparse
import base64
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

import camera
import realtime
import world
from dataset import episode, prompt
from dataset.episode import Episode
from engine import weights
from page import server


@dataclass(frozen=True)
class Start:
    image: np.ndarray  # (H, W, 3) uint8, the model's size
    note: str = ""  # what was done to the picture
    truth: dict | None = (
        None  # the world it shows, if the file says so: then the truth is known everywhere
    )
    pose: tuple[float, ...] = (0.0, -world.EYE, 0.0, 0.0, 0.0)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = PngImagePlugin.PngInfo()
        for key, value in (
            {**self.truth["scene"], "pose": self.pose} if self.truth else {}
        ).items():
            text.add_text(key, json.dumps(value))
        Image.fromarray(self.image).save(path, pnginfo=text)


def true_views(
    truth: dict, poses: np.ndarray, H: int, W: int
) -> np.ndarray:  # (n, 5) → (n, H, W, 3) uint8
    return world.true_frames(truth, None, H, W, poses)


def open_start(
    source: Path | bytes, size: tuple[int, int], name: str, view: str = "first"
) -> Start:
    """Any picture becomes a start frame. One that names its world is drawn again at this size, as the player or who follows him sees it."""
    H, W = size
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        picture.load()
        if "seed" in getattr(picture, "text", {}):
            seed, kind, pose = (json.loads(picture.text[key]) for key in ("seed", "kind", "pose"))
            truth, pose = (
                {
                    "scene": {"seed": int(seed), "kind": str(kind)},
                    "view": view,
                    "character": int(seed),
                },
                np.array(pose, float).reshape(1, 5),
            )
            return Start(
                true_views(truth, pose, H, W)[0],
                f"{name}: world {seed} ({kind}), held out",
                truth,
                tuple(pose[0].tolist()),
            )
        alpha, (w, h) = "A" in picture.getbands() or "transparency" in picture.info, picture.size
        method = Image.Resampling.BOX if w >= 2 * W else Image.Resampling.BICUBIC
        fitted = np.array(
            ImageOps.fit(ImageOps.exif_transpose(picture).convert("RGB"), (W, H), method)
        )
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        SyntaxError,
        OverflowError,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(
            f"{name} cannot be read as a picture ({error}); give a PNG or JPEG file"
        ) from error
    notes = ["alpha dropped"] * alpha + [f"{w}x{h} → {W}x{H} centre crop"] * ((w, h) != (W, H))
    notes += [f"enlarged: it is smaller than the model's {W}x{H}"] * (w < W or h < H)
    return Start(
        fitted,
        f"{name}: {'; '.join(notes) or 'used as it is'}. A tiny model has only seen its own world.",
    )


class FakeSession:
    """The game itself behind the methods of realtime.Session: nothing is imagined, so nothing is forgotten."""

    def __init__(self, size: tuple[int, int], view: str = "first") -> None:
        self.size, self.view, self.frames_needed, self.policy, self.truth = (
            size,
            view,
            server.LATENT,
            "camera",
            None,
        )

    def enter(self, truth: dict, poses: list[tuple] | None = None) -> None:
        self.inside, self.game = (
            truth,
            world.World(world.make_scene(**truth["scene"]), pose=poses and poses[-1], size=0),
        )
        self.poses = poses or [self.game.pose]

    def reset(
        self, image: torch.Tensor, prompt: str, seed: int, pose: tuple[float, ...]
    ) -> realtime.Chunk:
        unknown = {
            "scene": {"seed": seed, "kind": world.make_scene(seed).kind},
            "view": self.view,
            "character": seed,
        }
        self.enter(self.truth or unknown, [tuple(pose)] if self.truth else None)
        first = torch.from_numpy(true_views(self.inside, np.array(self.poses), *self.size))
        return realtime.Chunk(first, {"ms": {}, "memory": [], "poses": list(self.poses)})

    def step(self, keyboard: torch.Tensor, mouse: torch.Tensor) -> realtime.Chunk:  # (n, 6), (n, 2)
        began, here, turned = (
            time.monotonic(),
            self.poses[-1][4],
            lambda t: abs((self.poses[t][4] - here + 180) % 360 - 180),
        )
        near = (
            []
            if self.policy == "none"
            else [*sorted(range(20, len(self.poses), 20), key=turned)[:4], 0]
        )  # what a memory would look back at
        picks = [
            {"latent": t // 4, "frame": t, "score": 1 - turned(t) / 180, "sink": not t}
            for t in near
        ]
        for keys, turn in zip(keyboard.tolist(), mouse.tolist(), strict=True):
            self.game.tick(keys, turn)
            self.poses.append(self.game.pose)
        frames = torch.from_numpy(
            true_views(self.inside, np.array(self.poses[-len(keyboard) :]), *self.size)
        )
        ms = {"retrieve": 0.0, "denoise": 0.0, "decode": 1000 * (time.monotonic() - began)}
        return realtime.Chunk(
            frames, {"ms": ms, "memory": picks, "poses": self.poses[-len(keyboard) :]}
        )

    def undo(self) -> None:
        self.enter(self.inside, self.poses[: -server.LATENT])

    def save(self, path: Path) -> None:
        weights.write_weights(
            path, {"poses": torch.tensor(self.poses, dtype=torch.float64)}, self.inside
        )

    def restore(self, path: Path) -> None:
        tensors, truth = weights.read_weights(path)
        self.enter(truth, [tuple(pose) for pose in tensors["poses"].tolist()])


def open_film(path: Path, fps: int, size: tuple[int, int]) -> tuple | None:
    """An mp4 that grows frame by frame, (container, stream), or None where none can be written."""
    if (H := size[0]) % 2 + (W := size[1]) % 2:
        raise ValueError(
            f"mp4 needs even sizes, got {W}x{H}; nearest legal size: {W + W % 2}x{H + H % 2}"
        )
    try:
        container = av.open(str(path), "w")
        stream = container.add_stream(
            "libx264", rate=fps, options={"preset": "ultrafast", "crf": "18", "threads": "1"}
        )
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        return container, stream
    except (OSError, ValueError) as error:  # no encoder, or no place to write to
        print(
            f'no {path.name} ({error}): pip install "imageio[pyav]". Every frame is kept in {path.parent / "rgb"}',
            flush=True,
        )


def memory_panel(width: int, said: dict) -> np.ndarray:  # (96, width, 3) uint8
    """Under the picture of play_memory.mp4: the frames that were looked back at, with scores, and the numbers."""
    panel, side = Image.new("RGB", (width, 96), (20, 24, 31)), min(56, width // 5 - 6)
    draw = ImageDraw.Draw(panel)
    for k, pick in enumerate(said.get("memory", [])[:5]):
        x, thumb = 4 + k * (width - 4) // 5, Image.open(io.BytesIO(base64.b64decode(pick["thumb"])))
        panel.paste(thumb.resize((side, side), Image.Resampling.NEAREST), (x, 4))
        draw.text(
            (x, side + 5),
            f"f{pick['frame']} " + ("sink" if pick["sink"] else f"{pick['score']:.2f}"),
            (165, 175, 188),
        )
    draw.text((4, 80), said.get("text", "start"), (255, 255, 255))
    return np.asarray(panel)


def free_folder(out: str) -> Path:
    """--out or runs/play-<time>, with a number where that exists: nothing is ever overwritten."""
    base = Path(out or time.strftime("runs/play-%Y%m%d-%H%M%S"))
    return next(
        path
        for path in (
            base.with_name(base.name + (f"-{k}" if k > 1 else "")) for k in range(1, 10_000)
        )
        if not path.exists()
    )


def about(args: argparse.Namespace) -> dict:
    """What a replay needs to be the same again."""
    files = (
        [
            file
            for file in sorted(Path(args.weights).glob("*.safetensors"))
            if file.stat().st_size < 1 << 28
        ]
        if args.weights
        else []
    )
    sha = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}
    flags = {
        name: getattr(args, name)
        for name in (
            "fake",
            "preset",
            "weights",
            "vae",
            "steps",
            "new",
            "device",
            "dtype",
            "int8",
            "size",
            "view",
        )
    }
    return {
        "argv": sys.argv[1:],
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "weights_sha": sha,
        "flags": flags,
    }


class Recording:
    """A session folder in the making. Chunks wait while an undo may take them back; a thread writes the older ones."""

    def __init__(
        self,
        folder: Path,
        fps: int,
        start: Start,
        image: np.ndarray,
        pose: tuple[float, ...],
        about: dict,
        camera: Callable,
    ) -> None:
        self.folder, self.fps, self.start, self.image, self.pose, self.about, self.camera = (
            folder,
            fps,
            start,
            image,
            pose,
            about,
            camera,
        )
        self.pending, self.writer, self.busy, self.times = (
            deque(),
            ThreadPoolExecutor(1),
            None,
            max(1, 256 // len(image)),
        )
        self.said = tempfile.TemporaryFile(
            "w+"
        )  # what was written, a line per chunk: sessions may last for hours

    def add(self, frames: np.ndarray, said: dict) -> None:
        self.pending.append(
            (
                frames,
                {
                    "n": len(frames),
                    "sha": hashlib.sha256(np.ascontiguousarray(frames)).hexdigest()[:16],
                    **said,
                },
            )
        )
        while (
            sum(len(frames) for frames, _ in self.pending) > (realtime.UNDO + 1) * server.SHOW_FPS
        ):
            self.commit()

    def undo(self, n: int) -> None:
        while n > 0 and self.pending:
            n -= len(self.pending.pop()[0])

    def commit(self) -> None:
        frames, said = self.pending.popleft()
        (
            self.busy or self.writer.submit(self.begin)
        ).result()  # one chunk is being written at most: a slow disk costs time
        self.busy = self.writer.submit(self.write, frames, said)
        self.said.write(
            json.dumps(
                said
                | {
                    "memory": [
                        {k: v for k, v in pick.items() if k != "thumb"} for pick in said["memory"]
                    ]
                }
            )
            + "\n"
        )

    def begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (H, W), self.raw = (
            (side * self.times for side in self.image.shape[:2]),
            open(self.folder / "frames.tmp", "wb"),
        )
        self.films = [
            open_film(self.folder / "play.mp4", self.fps, (H, W)),
            open_film(self.folder / "play_memory.mp4", self.fps, (H + 96, W)),
        ]
        self.write(self.image[None], {})

    def write(self, frames: np.ndarray, said: dict) -> None:
        """Raw frames for the episode; two films for people, enlarged without smoothing."""
        panel = memory_panel(frames.shape[2] * self.times, said)
        for frame in frames:
            self.raw.write(frame.tobytes())
            big = frame.repeat(self.times, 0).repeat(self.times, 1)
            for film, picture in zip(self.films, (big, np.concatenate([big, panel])), strict=True):
                if film:
                    film[0].mux(film[1].encode(av.VideoFrame.from_ndarray(picture)))

    def close(self, session: realtime.Session | FakeSession) -> list[dict]:
        """Write what is pending and make the folder whole: films, episode, start picture, state, session.json. Returns its chunks."""
        while self.pending:
            self.commit()
        if self.busy:
            self.busy.result()
            self.raw.close()
            self.said.seek(0)
            chunks = [json.loads(line) for line in self.said]
            for container, stream in filter(None, self.films):
                container.mux(stream.encode())
                container.close()
            rows = {
                key: [row for said in chunks for row in said.pop(key)]
                for key in ("keyboard", "mouse", "poses")
            }
            rows["poses"].insert(0, list(self.pose))
            self.save_episode(*(np.array(rows[key]) for key in ("keyboard", "mouse", "poses")))
            self.start.save(self.folder / "start.png")
            session.save(self.folder / "state.safetensors")
            (self.folder / "session.json").write_text(
                json.dumps({**self.about, "fps": self.fps, **rows, "chunks": chunks})
            )
            print(f"saved {self.folder}", flush=True)
        self.writer.shutdown()
        return chunks if self.busy else []

    def save_episode(
        self, keyboard: np.ndarray, mouse: np.ndarray, poses: np.ndarray
    ) -> None:  # (F, 6), (F, 2), (F+1, 5)
        free = [
            camera.step_pose(*step)
            for step in zip(poses.tolist(), keyboard.tolist(), mouse.tolist(), strict=False)
        ]
        contact = np.append(
            np.abs(np.array(free) - poses[1:])[:, :3].max(1) > 1e-3, False
        )  # a wall changed this step
        (H, W), last, T = (
            self.image.shape[:2],
            lambda x: np.concatenate([x, x[-1:]]),
            len(poses),
        )  # the last action is a repeat, not valid
        said = {
            "source": "play",
            "view": self.about["flags"]["view"],
            "metric": True,
            "action_source": "engine",
            "fps": self.fps,
        }
        words = prompt.caption(
            self.about["prompt"] or "a place", last(keyboard), last(mouse), poses, "play"
        )
        clip = episode.write_episode(
            self.folder.with_name(self.folder.name + ".tmp"),
            Episode(
                np.memmap(self.folder / "frames.tmp", np.uint8, "r", shape=(T, H, W, 3)),
                self.camera(torch.from_numpy(poses)).float().numpy(),
                np.tile(camera.intrinsics(H, W).numpy(), (T, 1)),
                last(keyboard).astype(np.uint8),
                last(mouse).astype(np.float32),
                np.arange(T) < T - 1,
                contact,
                poses.astype(np.float32),
                words,
                said | (self.about["truth"] or {}),
            ),
        )
        for file in sorted(
            clip.iterdir(), key=lambda file: file.name == "_DONE"
        ):  # the mark of a whole episode comes last
            os.replace(file, self.folder / file.name)
        clip.rmdir()
        (self.folder / "frames.tmp").unlink()
